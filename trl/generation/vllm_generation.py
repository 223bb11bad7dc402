"""vLLM generation under the path users know; it lives in `trl.rollouts.vllm_generation`."""

from ..rollouts.vllm_generation import VLLMGeneration, empty_cache, extract_logprobs

__all__ = ["VLLMGeneration", "empty_cache", "extract_logprobs"]
