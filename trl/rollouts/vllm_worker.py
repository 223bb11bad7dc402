"""What a vLLM worker of a rollout server can be told beyond vLLM's own. Only vLLM's processes import this."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


class WeightWorker:
    """
    Methods that vLLM adds to its worker class (`--worker-extension-cls`), for the server to call on every worker. Their
    arguments and results are plain text and numbers.
    """

    def trl_load_weights(self, folder: str) -> int:
        """
        Load weights from a folder of safetensors files, a tensor at a time.

        Args:
            folder: on a disk that this worker sees.

        Returns:
            How many there were.

        Raises:
            FileNotFoundError: the folder has no such files, as seen from here.
        """
        from .vllm_adapter import load_weights

        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"no weights in {folder} as this worker sees it; on several machines set TRL_SERVER_STAGING_DIR to a "
                "folder that all of them share"
            )
        counted = _Counted(_read_weights(paths))
        load_weights(self, counted)
        return counted.count

    def trl_refresh_weights(self) -> None:
        """Derive anew what the model makes of its weights, after vLLM's own routes brought them."""
        from .vllm_adapter import refresh_tied_head

        refresh_tied_head(self.model_runner.get_model())

    def trl_fingerprints(self) -> dict[str, Any]:
        """Numbers that identify the weights of each layer."""
        from .vllm_adapter import fingerprint_layers

        return fingerprint_layers(self)


class _Counted:
    def __init__(self, weights: Iterator[tuple[str, Tensor]]):
        self._weights = weights
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for pair in self._weights:
            self.count += 1
            yield pair


def _read_weights(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, file.get_tensor(name)
