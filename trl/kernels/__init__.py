"""Fused functions for those who call them directly; they live in `trl.ops`."""

from .._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "trl.kernels.chunked_logprob": ["ChunkedLogProbFunction"],
        "trl.kernels.logprob_entropy": ["selective_log_softmax_and_entropy"],
    },
)
