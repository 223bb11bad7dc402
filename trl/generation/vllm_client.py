"""The vLLM client under the path users know; it lives in `trl.rollouts.vllm_client`."""

from ..rollouts.vllm_client import VLLMClient, parse_logprobs, pil_to_base64, to_openai_messages

__all__ = ["VLLMClient", "parse_logprobs", "pil_to_base64", "to_openai_messages"]
