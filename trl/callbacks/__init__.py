"""Callbacks for trainers."""

from .._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "trl.callbacks.bema": ["BEMACallback"],
        "trl.callbacks.log_completions": ["LogCompletionsCallback"],
        "trl.callbacks.reference_sync": ["SyncRefModelCallback"],
        "trl.callbacks.rich_progress": ["RichProgressCallback"],
        "trl.callbacks.weave": ["WeaveCallback"],
    },
)
