"""
Differences between the ways of spreading a model over devices, behind one object; and small process-group helpers.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from typing import Any

from accelerate import Accelerator, PartialState
from torch import nn


class DistributedBackend:
    """
    What sharding an accelerator uses, and how to see whole parameters under it.

    Args:
        accelerator: the trainer's accelerator.

    Attributes:
        zero_stage: DeepSpeed's ZeRO stage, 0 without DeepSpeed.
        fsdp_version: 1 or 2, 0 without FSDP.
    """

    def __init__(self, accelerator: Accelerator):
        deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
        fsdp = getattr(accelerator.state, "fsdp_plugin", None)
        self.accelerator = accelerator
        self.zero_stage: int = deepspeed.zero_stage if deepspeed is not None else 0
        self.fsdp_version: int = fsdp.fsdp_version if fsdp is not None else 0

    @property
    def is_zero3(self) -> bool:
        """Whether DeepSpeed shards the parameters."""
        return self.zero_stage == 3

    @property
    def is_fsdp(self) -> bool:
        """Whether FSDP, of either version, shards the parameters."""
        return self.fsdp_version > 0

    def gather_params(self, params: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager:
        """Context in which the given parameters are whole on every process (ZeRO-3); nothing to do elsewhere."""
        if not self.is_zero3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(params))

    def summon_full_params(self, module: nn.Module, **kwargs: Any) -> contextlib.AbstractContextManager:
        """Context in which an FSDP1 module's parameters are whole; nothing to do elsewhere. `kwargs` are torch's."""
        if self.fsdp_version != 1:
            return contextlib.nullcontext()
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel.summon_full_params(module, **kwargs)


@contextlib.contextmanager
def global_then_local_main_first() -> Iterator[None]:
    """
    Run the block on the main process first, then on each machine's first process, then on the others.

    For work whose result is cached in files: done once where machines share a disk, once per machine where not.
    """
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        yield


def ensure_master_addr_port(addr: str | None = None, port: int | None = None) -> None:
    """
    Set MASTER_ADDR and MASTER_PORT for a process group, where they are not set.

    Args:
        addr: host of the first process; default localhost.
        port: its port; default a free one.
    """
    os.environ["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or addr or "localhost"
    os.environ["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(port or _free_port())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
