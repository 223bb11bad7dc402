"""
Keeping forward activations in host memory until the backward pass needs them.

A pair of saved-tensor hooks: what autograd saves on an accelerator is copied to pinned host memory, and copied back
when the backward pass asks for it. On CUDA-like devices the copies run on a stream of their own, next to the
computation; in the backward pass the activation needed next is fetched ahead. What autograd gets is a handle that owns
its copy, so the memory goes when the graph goes, and nothing has to be tracked or cleaned up by id.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

HOST_MEMORY_SHARE = 0.6  # of the machine's memory; more than this in activations is worth a warning


class NoOpManager(saved_tensors_hooks):
    """Keeps saved tensors where they are. Inside an offloading block it switches offloading off for a part."""

    def __init__(self) -> None:
        super().__init__(lambda tensor: tensor, lambda tensor: tensor)


# ---- Layouts ----


def _without_broadcast(tensor: Tensor) -> Tensor:
    """The tensor with every broadcast dimension (stride 0) cut to size 1: what is really in memory."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices may be one memory location (e.g. the windows of `unfold`)."""
    span = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride < span:
            return True
        span += (size - 1) * stride
    return False


class _Offloaded:
    """One saved tensor in host memory, with what is needed to rebuild it as it was."""

    def __init__(self, tensor: Tensor, index: int, pin_memory: bool):
        self.index = index
        self.device, self.dtype = tensor.device, tensor.dtype
        self.size, self.stride = tensor.size(), tensor.stride()
        compact = _without_broadcast(tensor)
        self.compact_size, self.compact_stride = compact.size(), compact.stride()
        self.extent = 1 + sum((n - 1) * step for n, step in zip(self.compact_size, self.compact_stride, strict=True))
        self.host = torch.empty(self.compact_size, dtype=self.dtype, pin_memory=pin_memory)  # contiguous
        self.fetched: tuple[Tensor, Any] | None = None  # prefetched tensor and the event of its copy

    def store(self, tensor: Tensor, non_blocking: bool) -> None:
        self.host.copy_(_without_broadcast(tensor), non_blocking=non_blocking)

    def allocate(self) -> Tensor:
        """Device memory for the tensor, with its own strides."""
        return torch.empty(self.extent, dtype=self.dtype, device=self.device)

    def fill(self, memory: Tensor, non_blocking: bool) -> Tensor:
        memory.as_strided(self.compact_size, self.compact_stride).copy_(self.host, non_blocking=non_blocking)
        return memory.as_strided(self.size, self.stride)

    def nbytes(self) -> int:
        return self.host.numel() * self.host.element_size()


# ---- The hooks ----


class OffloadActivations(saved_tensors_hooks):
    """
    Context manager: inside it, activations saved for the backward pass wait in host memory.

    Stays on the device: tensors on the CPU, tensors below `min_offload_size`, parameters and buffers and views of
    them, tensor subclasses (float8, sharded), and self-overlapping views. A tensor saved several times is moved once.
    Gradients are bit for bit those without it.

    Args:
        use_pin_memory: copy to page-locked memory, which is faster and may overlap with computation.
        use_streams: copy on a separate stream.
        min_offload_size: smallest tensor that is moved, in bytes; default 1024.
        max_fwd_stash_size: copies under way in the forward pass before computation waits for the oldest; at least 1,
            default 5. Their tensors stay on the device until the copy is done.

    Raises:
        ValueError: `max_fwd_stash_size` is below 1.
    """

    def __init__(
        self,
        use_pin_memory: bool = True,
        use_streams: bool = True,
        min_offload_size: int = 1024,
        max_fwd_stash_size: int = 5,
    ):
        if max_fwd_stash_size < 1:
            raise ValueError(
                f"`max_fwd_stash_size` is at least 1 (one copy under way), found {max_fwd_stash_size}. To copy without "
                "overlap, set `use_streams=False`."
            )
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self._backend = torch.get_device_module(accelerator) if accelerator is not None else None
        self.use_pin_memory = use_pin_memory and accelerator is not None
        self.use_streams = use_streams and hasattr(self._backend, "Stream")
        self.min_offload_size = min_offload_size
        self.max_fwd_stash_size = max_fwd_stash_size
        self._model: weakref.ref[nn.Module] | None = None
        self._model_storages: set[int] = set()
        self._copy_stream = self._backend.Stream() if self.use_streams else None
        self._warned_about_memory = False
        self._reset()
        super().__init__(self._pack, self._unpack)

    @property
    def s0(self) -> Any:
        """The stream that computes; None without an accelerator."""
        return self._backend.current_stream() if self._backend is not None else None

    @property
    def s1(self) -> Any:
        """The stream that copies: a second one with `use_streams`, else the one that computes."""
        return self._copy_stream if self.use_streams else self.s0

    def update_model_params(self, model: nn.Module) -> None:
        """Remember whose parameters and buffers are never moved. They are looked up anew at every entry."""
        self._model = weakref.ref(model)
        self._model_storages = {
            tensor.untyped_storage().data_ptr()
            for tensor in (*model.parameters(), *model.buffers())
            if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"
        } - {0}

    def _reset(self) -> None:
        self._stash: deque[tuple[Any, Tensor]] = deque()  # copies under way: (event, source)
        self._known: dict[StorageWeakRef, dict[tuple, weakref.ref[_Offloaded]]] = {}
        self._order: list[weakref.ref[_Offloaded]] = []
        self._host_bytes = 0

    def __enter__(self) -> OffloadActivations:
        self._reset()
        model = self._model() if self._model is not None else None
        if model is not None:
            self.update_model_params(model)
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        if self.use_streams:
            self.s0.wait_stream(self.s1)
        self._reset()

    # ---- Forward ----

    def _is_on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type not in ("cpu", "meta")

    def _is_moved(self, tensor: Tensor) -> bool:
        return (
            type(tensor) is Tensor  # no parameter, no subclass with a memory layout of its own
            and tensor.layout is torch.strided
            and self._is_on_accelerator(tensor)
            and tensor.numel() * tensor.element_size() >= self.min_offload_size
            and tensor.untyped_storage().data_ptr() not in self._model_storages
            and not _overlaps_itself(_without_broadcast(tensor))
        )

    def _pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        if not self._is_moved(tensor):
            return tensor
        # The weak reference keeps the storage's identity from being reused, so an equal one is the same, living storage.
        storage = StorageWeakRef(tensor.untyped_storage())
        layout = (tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype, tensor._version)
        views = self._known.setdefault(storage, {})
        handle = views[layout]() if layout in views else None
        if handle is None:
            handle = _Offloaded(tensor, len(self._order), self.use_pin_memory)
            self._order.append(weakref.ref(handle))
            views[layout] = weakref.ref(handle)
            self._store(handle, tensor)
            self._watch_host_memory(handle)
        return handle

    def _store(self, handle: _Offloaded, tensor: Tensor) -> None:
        if not self.use_streams:
            handle.store(tensor, non_blocking=False)
            return
        self._drop_finished()
        while len(self._stash) >= self.max_fwd_stash_size:
            event, _ = self._stash.popleft()
            self.s0.wait_event(event)  # its memory may be used again only after the copy
        self.s1.wait_stream(self.s0)
        with self._backend.stream(self.s1):
            handle.store(tensor, non_blocking=True)
            self._stash.append((self.s1.record_event(), tensor))

    def _drop_finished(self) -> None:
        while self._stash and self._stash[0][0].query():
            self._stash.popleft()

    def _watch_host_memory(self, handle: _Offloaded) -> None:
        self._host_bytes += handle.nbytes()
        total = psutil.virtual_memory().total
        if not self._warned_about_memory and self._host_bytes > HOST_MEMORY_SHARE * total:
            self._warned_about_memory = True
            warnings.warn(
                f"Offloaded activations take {self._host_bytes / 2**30:.1f} GiB, more than {HOST_MEMORY_SHARE:.0%} of "
                f"this machine's {total / 2**30:.1f} GiB. Use a smaller batch or shorter sequences, or turn on "
                "gradient checkpointing, before the system starts to swap."
            )

    # ---- Backward ----

    def _unpack(self, packed: Tensor | _Offloaded) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if not isinstance(packed, _Offloaded):
            raise ValueError(f"Unknown saved tensor {packed!r}: it was not packed by activation offloading.")
        if not self.use_streams:
            return packed.fill(packed.allocate(), non_blocking=False)
        self._release_stash()
        if packed.fetched is None:
            self._fetch(packed)
        tensor, event = packed.fetched
        packed.fetched = None
        self.s0.wait_event(event)
        self._prefetch_before(packed.index)
        return tensor

    def _release_stash(self) -> None:
        while self._stash:
            event, _ = self._stash.popleft()
            self.s0.wait_event(event)

    def _fetch(self, handle: _Offloaded) -> None:
        memory = handle.allocate()  # on the computing stream, which frees it later
        self.s1.wait_stream(self.s0)
        with self._backend.stream(self.s1):
            tensor = handle.fill(memory, non_blocking=True)
            handle.fetched = (tensor, self.s1.record_event())

    def _prefetch_before(self, index: int) -> None:
        """Fetch the tensor that was saved before this one: most likely the next that the backward pass asks for."""
        for position in range(min(index, len(self._order)) - 1, -1, -1):
            handle = self._order[position]()
            if handle is not None:
                if handle.fetched is None:
                    self._fetch(handle)
                return


# ---- For a model ----

_HEAD_NAMES = ("output", "lm_head", "decoder.output", "final_layer_norm", "head", "score")


def _find_heads(model: nn.Module) -> list[nn.Module]:
    """The last layers. Their activations are wanted again at once: to move them away only costs time."""
    heads = []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "get_output_embeddings") and base.get_output_embeddings() is not None:
        heads.append(base.get_output_embeddings())
    for path in _HEAD_NAMES:
        module = base
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.Module) and module not in heads:
            heads.append(module)
    # Liger's fused modules save what they have already turned into gradients.
    heads += [module for module in base.modules() if "liger" in type(module).__module__ and module not in heads]
    return heads


def _keep_on_device(module: nn.Module) -> None:
    """Switch offloading off while the module's forward runs."""
    entered: list[NoOpManager] = []

    def before(module: nn.Module, args: Any) -> None:
        entered.append(NoOpManager())
        entered[-1].__enter__()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if entered:  # a pre-hook before ours may have failed
            entered.pop().__exit__()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def get_act_offloading_ctx_manager(
    model: nn.Module,
    use_pin_memory: bool = True,
    use_streams: bool = True,
    min_offload_size: int = 1024,
    max_fwd_stash_size: int = 5,
    warn_if_no_head: bool = True,
) -> OffloadActivations:
    """
    Activation offloading for a model: use it as a context manager around forward and backward.

    Args:
        model: the model; hooks on its output head keep that part on the device.
        use_pin_memory: copy to page-locked memory.
        use_streams: copy on a separate stream, next to the computation.
        min_offload_size: smallest tensor that is moved, in bytes.
        max_fwd_stash_size: copies under way in the forward pass.
        warn_if_no_head: warn where no output head is found.

    Returns:
        The context manager; it can be entered again and again.

    Raises:
        ValueError: `max_fwd_stash_size` is below 1.
    """
    manager = OffloadActivations(use_pin_memory, use_streams, min_offload_size, max_fwd_stash_size)
    manager.update_model_params(model)
    heads = _find_heads(model)
    for head in heads:
        _keep_on_device(head)
    if not heads and warn_if_no_head:
        warnings.warn(
            f"No output head was found in {type(model).__name__}: the activations of its last layer are offloaded too, "
            "though they are needed again at once. The result is the same."
        )
    return manager
