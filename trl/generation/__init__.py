"""Generation with vLLM under the path users know; it lives in `trl.rollouts`."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "VLLMGeneration":  # which imports torch and transformers
        from .vllm_generation import VLLMGeneration

        return VLLMGeneration
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
