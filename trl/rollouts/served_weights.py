"""
The weights that a rollout server answers with: which they are, and how they are replaced.

A version `INSTANCE:N` names them: a random name of this process, so that a restart is seen, and the number of updates
since it was started.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import secrets
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from .server_access import GateTimeout, GenerationGate, RequestError, ServerLimits
from .vllm_adapter import reset_served_caches
from .weight_staging import ExpectedWeight, WeightUpdate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.get_logger(__name__)

LOAD_SECONDS = 1800.0
"""Longest time that workers may take to load an update."""
_RETRY_SECONDS = 5


class ServedWeights:
    """
    State of the weights of a server's engine.

    Args:
        engine: vLLM's engine client.
        limits: how long to wait.

    Attributes:
        owner: who sent the present weights; None as loaded from disk.
        are_whole: False after an update that failed on its way, when they may be half new and half old.
    """

    def __init__(self, engine: Any, limits: ServerLimits):
        self.engine = engine
        self.limits = limits
        self.instance = secrets.token_hex(8)
        self.updates = 0
        self.owner: str | None = None
        self.are_whole = True
        self.gate = GenerationGate()

    @property
    def version(self) -> str:
        """Name of the present weights."""
        return f"{self.instance}:{self.updates}"

    def check(self, wanted: str | None) -> None:
        """
        Make sure that a request may be answered with the present weights.

        Args:
            wanted: the version that the request is for; None for any.

        Raises:
            RequestError: they are other weights, or not whole.
        """
        if wanted is not None and wanted != self.version:
            raise RequestError(
                412,
                f"The request is for the weights {wanted[:80]!r}, this server has {self.version!r}"
                + (f", sent by {self.owner!r}." if self.owner else ", as loaded from disk."),
                "other_weights",
                details={"weights": self.version, "owner": self.owner},
            )
        if not self.are_whole:
            raise RequestError(
                503,
                "The last update of the weights failed on its way: part of them may be new, part old. Nothing is "
                "generated until an update succeeds; send the weights again.",
                "broken_weights",
                details={"weights": self.version, "owner": self.owner},
            )

    @contextlib.asynccontextmanager
    async def change(self):
        """
        Replace the weights inside, while nothing is generated.

        Raises:
            RequestError: requests that generate took too long.
        """
        try:
            async with self.gate.change(self.limits.wait_seconds):
                yield
        except GateTimeout:
            raise self.busy("change its weights") from None

    def busy(self, action: str) -> RequestError:
        """The error for a wait that was too long."""
        return RequestError(
            503,
            f"The server could not {action} within {self.limits.wait_seconds:.0f} s: {self.gate.running} requests are "
            "generating, or an update is being loaded. Ask again, or start the server with a larger "
            "TRL_SERVER_WAIT_SECONDS.",
            "busy",
            {"retry-after": str(_RETRY_SECONDS)},
        )

    async def load(self, update: WeightUpdate) -> None:
        """
        Have every worker load an update's files. Call it inside [`change`].

        Args:
            update: it is complete.

        Raises:
            RequestError: that failed; nothing is generated until an update succeeds.
        """
        await self._replace(self.engine.collective_rpc("trl_load_weights", args=(str(update.folder),)), update.owner)

    async def adopt(self) -> None:
        """
        Make weights that vLLM's own routes have brought the present ones. Call it inside [`change`].

        Raises:
            RequestError: that failed; nothing is generated until an update succeeds.
        """
        await self._replace(self.engine.collective_rpc("trl_refresh_weights"), None)

    async def _replace(self, work: Awaitable[Any], owner: str | None) -> None:
        self.are_whole = False
        try:
            await asyncio.wait_for(work, LOAD_SECONDS)
            await reset_served_caches(self.engine, self.gate.running > 0)
        except Exception as error:  # whatever it was: the weights may be half replaced
            logger.exception("Weights could not be loaded")
            reason = str(error)[:500] or type(error).__name__
            raise RequestError(
                500, f"The weights could not be loaded: {reason}. Send them again.", "load_failed"
            ) from None
        self.updates += 1
        self.owner = owner
        self.are_whole = True


# ---------------------------------------------------------------------------------------------------------------------
# What can be sent
# ---------------------------------------------------------------------------------------------------------------------


def expected_weights(config: PretrainedConfig, checkpoint: str, revision: str | None) -> dict[str, ExpectedWeight]:
    """
    The weights of a served model under their published names; a head tied to the embeddings is not one of them.

    Args:
        config: the model's.
        checkpoint: folder or name on the Hub that it was loaded from; read where Transformers has no class for it.
        revision: of the checkpoint.

    Returns:
        The weights by name.

    Raises:
        ValueError: neither tells.
    """
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    model_class = getattr(transformers, name, None)
    if model_class is not None:
        try:
            return _weights_of_class(model_class, config)
        except Exception as error:  # the served config may be vLLM's own kind
            logger.warning(
                f"{name} could not be built to see its weights ({error}); reading the checkpoint's headers."
            )
    return _weights_of_checkpoint(config, checkpoint, revision)


def _weights_of_class(model_class: type, config: PretrainedConfig) -> dict[str, ExpectedWeight]:
    from ..models.weight_export import weight_manifest

    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    # A model of its own, in no process group.
    alone = SimpleNamespace(state=SimpleNamespace(), unwrap_model=lambda model, **_: model)
    return {info.name: ExpectedWeight(info.dtype, info.shape) for info in weight_manifest(model, alone)}


def _weights_of_checkpoint(
    config: PretrainedConfig, checkpoint: str, revision: str | None
) -> dict[str, ExpectedWeight]:
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = Path(checkpoint)
    if not folder.is_dir():
        folder = Path(snapshot_download(checkpoint, revision=revision, local_files_only=True))
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                tensor = file.get_slice(name)
                dtype = "float32" if "F" in tensor.get_dtype() else "int64"
                weights[name] = ExpectedWeight(dtype, tuple(tensor.get_shape()))
    if getattr(config, "tie_word_embeddings", False):
        weights.pop("lm_head.weight", None)
    if not weights:
        raise ValueError(f"{checkpoint} has no safetensors files, and Transformers has no class for its model.")
    return weights
