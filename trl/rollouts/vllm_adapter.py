"""
Everything that depends on vLLM's version: how an engine is built, asked, given weights, put to sleep and ended.

The rest of the package sees only these functions; a test holds them against the installed vLLM. The functions on a
`worker` run in vLLM's worker process, which is this one where the engine is in process.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..import_utils import VLLM_MAX_VERSION, VLLM_MIN_VERSION, is_vllm_available
from ..models.weight_export import WeightInfo
from .weight_probe import fingerprint, probe_vector

if TYPE_CHECKING:
    from vllm import LLM

# The one place that states the range is `import_utils`, which imports nothing heavy.
TESTED_VERSIONS = (VLLM_MIN_VERSION, VLLM_MAX_VERSION)


def require_vllm() -> None:
    """
    Make sure that vLLM is there; warn where its version is outside the tested range.

    Raises:
        ImportError: it is not installed.
    """
    if not is_vllm_available():
        raise ImportError(
            '`use_vllm=True`, but vLLM is not installed. `pip install "trl[vllm]"` brings it (versions '
            f"{VLLM_MIN_VERSION} to {VLLM_MAX_VERSION}), or set `use_vllm=False` to generate with Transformers."
        )


# ---------------------------------------------------------------------------------------------------------------------
# An engine in this process
# ---------------------------------------------------------------------------------------------------------------------


def make_engine(trained: nn.Module, /, **settings: Any) -> LLM:
    """
    A vLLM engine in this process.

    Args:
        trained: the trainer's model, whose classes vLLM is to leave as they are.
        settings: of `vllm.LLM`; those whose value is None are left to vLLM.
    """
    # Read when the engine is built: one process, so that weights can be handed over as tensors.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # On a CPU it would bind this process's threads, the trainer's too, to single cores.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    LLM = _load_vllm()
    _forget_ended_world()
    with _classes_kept(trained) as move_changes:
        engine = LLM(**{name: value for name, value in settings.items() if value is not None})
        engine.apply_model(move_changes)
    gc.unfreeze()  # vLLM puts all that exists out of the collector's sight, trainers that are dropped later included
    return engine


def _load_vllm() -> type[LLM]:
    """
    Import vLLM's engine, in a thread of its own: modules that are missing leave exceptions behind that keep the frames of whoever
    imported them, a trainer and its model among these.
    """

    def load() -> type[LLM]:
        from vllm import LLM

        return LLM

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(load).result()


def _forget_ended_world() -> None:
    """Have vLLM make groups anew where those of an engine before were ended with all others of the process."""
    from vllm.distributed import parallel_state

    try:
        torch.distributed.get_process_group_ranks(parallel_state.get_world_group().cpu_group)
    except AssertionError:
        return  # it has none
    except (ValueError, KeyError):
        with _ended_groups_left_alone(keep_default=True):
            parallel_state.cleanup_dist_env_and_memory()


@contextlib.contextmanager
def _classes_kept(model: nn.Module) -> Iterator[Callable[[nn.Module], None]]:
    """
    Keep the classes of a model's modules.

    With `model_impl="transformers"` vLLM changes Transformers' own class of the decoder, so that its instances are
    compiled. The trainer's model is such an instance, made before, and would fail; others made later would, too. What is
    yielded moves the changes to the modules of vLLM's model alone.
    """
    names = ("__init__", "__call__")
    classes = {type(module) for module in model.modules()}
    before = {cls: (cls.__bases__, {name: cls.__dict__.get(name) for name in names}) for cls in classes}

    def move_changes(engine_model: nn.Module) -> None:
        for cls, (bases, _) in before.items():
            if cls.__bases__ == bases:
                continue
            own = {name: cls.__dict__[name] for name in names if name in cls.__dict__}
            changed = type(cls.__name__, (cls, *(base for base in cls.__bases__ if base not in bases)), own)
            for module in engine_model.modules():
                if type(module) is cls:
                    module.__class__ = changed

    try:
        yield move_changes
    finally:
        for cls, (bases, methods) in before.items():
            if cls.__bases__ != bases:
                cls.__bases__ = bases
                for name, method in methods.items():
                    if method is not None:
                        setattr(cls, name, method)
                    elif name in cls.__dict__:
                        delattr(cls, name)


def sampling_params(settings: Mapping[str, Any]) -> Any:
    """`vllm.SamplingParams` of plain settings; text is made only where it is asked for (stop strings, bad words)."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    settings = dict(settings)
    structured = settings.get("structured_outputs")
    if isinstance(structured, Mapping):
        settings["structured_outputs"] = StructuredOutputsParams(**structured)
    if settings.get("logit_bias"):
        settings["logit_bias"] = {int(token): bias for token, bias in settings["logit_bias"].items()}
    settings.setdefault("detokenize", bool(settings.get("stop")))
    return SamplingParams(**settings)


def generate(engine: LLM, prompts: Sequence[dict[str, Any]], settings: Sequence[Mapping[str, Any]]) -> list[Any]:
    """vLLM's request outputs, in the order of the prompts; the settings are one request's each."""
    if not prompts:
        return []
    return engine.generate(list(prompts), [sampling_params(one) for one in settings], use_tqdm=False)


def sampled_logps(completion: Any) -> list[float | None] | None:
    """Of the sampled tokens of a `CompletionOutput`, in nats; None where it was not asked for."""
    if completion.logprobs is None:
        return None
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return [position[token].logprob if token in position else None for token, position in pairs]


def prompt_logps(engine: LLM, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """
    Log-probs of the tokens of given sequences, each from the second on, before any sampling step.
    """
    asked = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    outputs = generate(engine, [{"prompt_token_ids": list(ids)} for ids in sequences], [asked] * len(sequences))
    return [
        [position[token].logprob for token, position in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(sequences, outputs, strict=True)
    ]


def update_weights(engine: LLM, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give an engine in this process new weights, one tensor at a time, and forget what it cached of the old ones."""
    engine.collective_rpc(load_weights, args=(weights,))
    reset_caches(engine)


def reset_caches(engine: LLM) -> None:
    """
    Forget the keys and values of prompts and the embeddings of images: they are those of the old weights. The processed
    images too, for the worker has forgotten its copies of them.
    """
    engine.reset_mm_cache()
    engine.llm_engine.reset_encoder_cache()
    if not engine.reset_prefix_cache():
        raise RuntimeError(
            "vLLM did not give up its prefix cache, which holds keys and values of the old weights: requests are still "
            "running. Wait for every generation to end before the weights are updated."
        )


def scale_logits(engine: LLM, factor: float) -> bool:
    """Multiply all logits by a factor before anything reads them; False where a model has no place for it."""

    def scale(model: nn.Module) -> bool:
        processor = getattr(model, "logits_processor", None) or getattr(
            getattr(model, "language_model", None), "logits_processor", None
        )
        if not isinstance(getattr(processor, "scale", None), int | float):
            return False
        own = getattr(processor, "_trl_own_scale", processor.scale)
        processor._trl_own_scale, processor.scale = own, own * factor
        return True

    return all(engine.apply_model(scale))


def sleep(engine: LLM) -> None:
    """Give back the memory of weights and cache; the weights are lost."""
    engine.sleep(level=2)


def wake_for_weights(engine: LLM) -> None:
    """Take the memory of the weights again; they have to be loaded anew."""
    engine.wake_up(tags=["weights"])


def wake_for_generation(engine: LLM) -> None:
    """Take the memory of the cache again."""
    engine.wake_up(tags=["kv_cache"])


def close(engine: LLM, owns_process_group: bool) -> None:
    """
    End an engine in this process.

    Args:
        engine: is not used afterwards.
        owns_process_group: whether vLLM made the process group; the trainer's is left alone.
    """
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    with _ended_groups_left_alone(keep_default=not owns_process_group):
        engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@contextlib.contextmanager
def _ended_groups_left_alone(keep_default: bool) -> Iterator[None]:
    """
    An engine that ends destroys its groups, and the process's default group, whoever made it. In the block it does not
    where the trainer made that, nor where a script has ended all groups before (`accelerator.end_training()`).
    """
    destroy = torch.distributed.destroy_process_group

    def destroy_own(group: Any = None) -> None:
        if torch.distributed.is_initialized() and not (group is None and keep_default):
            with contextlib.suppress(ValueError):  # one of a world that has ended, and another has begun
                destroy(group)

    torch.distributed.destroy_process_group = destroy_own
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


@contextlib.contextmanager
def process_settings_kept() -> Iterator[None]:
    """
    vLLM seeds all generators of the process, and on a CPU sets its number of threads and lets nobody change it again;
    the block's end undoes that.
    """
    import random

    import numpy

    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    states = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        if device_states is not None:
            torch.cuda.set_rng_state_all(device_states)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# A server's engine, and the trainer's side of NCCL
# ---------------------------------------------------------------------------------------------------------------------

_CACHE_SECONDS = 5.0


def served_facts(engine: Any, args: Any) -> dict[str, Any]:
    """
    What a server's engine says of itself, as plain JSON.

    Args:
        engine: vLLM's engine client.
        args: of the command line.
    """
    import vllm

    model = engine.vllm_config.model_config
    served = getattr(args, "served_model_name", None)
    return {
        "vllm_version": vllm.__version__,
        "model": served[0] if served else model.model,
        "max_model_len": model.max_model_len,
        "dtype": str(model.dtype).removeprefix("torch."),
        "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
        "vocab_size": model.get_vocab_size(),
        "world_size": worker_count(engine),
    }


def worker_count(engine: Any) -> int:
    """Number of workers of a server's engine, over all its copies."""
    parallel = engine.vllm_config.parallel_config
    return int(getattr(parallel, "world_size_across_dp", parallel.world_size))


def takes_nccl(engine: Any) -> bool:
    """Whether a server was started to take weights over NCCL."""
    transfer = getattr(engine.vllm_config, "weight_transfer_config", None)
    return getattr(transfer, "backend", None) == "nccl"


async def reset_served_caches(engine: Any, has_running_requests: bool) -> None:
    """
    As `reset_caches`, for a server's engine.

    Args:
        engine: vLLM's engine client.
        has_running_requests: whether a paused engine holds requests; they begin anew with the new weights.
    """
    # Where there are several engines, what is answered is the first one's word only, so nothing is left to their state.
    forced = has_running_requests or engine.vllm_config.parallel_config.data_parallel_size > 1
    deadline = asyncio.get_running_loop().time() + _CACHE_SECONDS
    # Requests that were given up leave the engine a little later, and hold their blocks until then.
    while not await engine.reset_prefix_cache(forced):
        if forced:
            raise RuntimeError("the engine did not give up its prefix cache")
        await asyncio.sleep(0.1)
        forced = asyncio.get_running_loop().time() > deadline
    if hasattr(engine, "reset_encoder_cache"):
        await engine.reset_encoder_cache()


def make_nccl_sender(address: str, port: int, world_size: int, client: Any, source: Any) -> Any:
    """
    vLLM's own trainer side of weights over NCCL; joins the group.

    Args:
        address: of this process, as the server's workers see it.
        port: a free one there.
        world_size: the server's workers and this process.
        client: makes the four calls of a weight update.
        source: names and tensors.

    Raises:
        ImportError: vLLM is not installed here, or has no such engine.
    """
    try:
        from vllm.distributed.weight_transfer import nccl_engine
    except ImportError as error:
        raise ImportError(
            "Pushing weights over NCCL needs vLLM in the trainer's environment, in the server's version: "
            "`pip install trl[vllm]`."
        ) from error
    init = nccl_engine.NCCLTrainerInitInfo(
        rank=0, master_address=address, master_port=port, world_size=world_size, packed=True
    )
    return nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(init, client=client, source=source)


def nccl_metadata(manifest: Iterable[WeightInfo]) -> list[Any]:
    """What vLLM's trainer side asks a source for: names, dtypes and shapes."""
    from vllm.distributed.weight_transfer.base import ParamMeta

    return [ParamMeta(weight.name, getattr(torch, weight.dtype), tuple(weight.shape)) for weight in manifest]


# ---------------------------------------------------------------------------------------------------------------------
# In a worker
# ---------------------------------------------------------------------------------------------------------------------


def load_weights(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """
    Replace a worker's weights.

    vLLM takes the tensors as a checkpoint's, fuses and repacks them a layer at a time. What it derives from a weight
    that belongs to two modules (a head tied to the embeddings, packed for the CPU) it makes for one of them only; the
    head's is made anew here.

    Args:
        worker: vLLM's worker.
        weights: published names and whole tensors.
    """
    worker.model_runner.reload_weights(weights_iterator=weights)
    refresh_tied_head(worker.model_runner.get_model())


def refresh_tied_head(model: nn.Module) -> list[str]:
    """Derive again what heads make of weights that other modules own. Returns the names of those heads."""
    owners: dict[int, int] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    refreshed = []
    for name, module in model.named_modules():
        if type(module).__name__ != "ParallelLMHead" or owners.get(id(module._parameters.get("weight")), 0) < 2:
            continue
        module.quant_method.process_weights_after_loading(module)
        refreshed.append(name)
    return refreshed


def fingerprint_layers(worker: Any) -> dict[str, tuple[float, float]]:
    """
    What a worker's layers make of a fixed vector, however they keep their weights, by the published names of these,
    joined by `+` where vLLM fused several; see `trl.rollouts.weight_probe`. Empty where layers are cut over devices.
    """
    from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size

    if get_tensor_model_parallel_world_size() > 1:
        return {}
    model = worker.model_runner.get_model()
    fused = getattr(model, "packed_modules_mapping", {})
    found: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        for path, module in model.named_modules():
            value = _probed(module)
            if value is None:
                continue
            parent, _, name = path.rpartition(".")
            parts = [f"{parent}.{part}".lstrip(".") for part in fused.get(name, [name])]
            found["+".join(f"{part}.weight" for part in parts)] = fingerprint(value)
    return found


def _probed(module: nn.Module) -> Tensor | None:
    """A layer's output for the probe vector, without its bias; a norm's weight; None for what has neither."""
    method, weight = getattr(module, "quant_method", None), getattr(module, "weight", None)
    if hasattr(module, "num_embeddings_per_partition"):  # embeddings and heads, padded to whole blocks
        vector = probe_vector(module.embedding_dim)
        if type(module).__name__ == "ParallelLMHead":
            vector = vector.to(module.weight)
            return method.apply(module, vector[None], None)[0, : module.org_vocab_size]
        return module.weight[: module.org_vocab_size].float() @ vector.to(module.weight.device)
    if method is not None and hasattr(module, "input_size_per_partition"):
        dtype, device = getattr(module, "params_dtype", torch.float32), _device_of(module)
        return method.apply(module, probe_vector(module.input_size_per_partition).to(device, dtype)[None], None)[0]
    if isinstance(weight, Tensor) and weight.dim() == 1 and weight.numel():
        return weight
    return None


def _device_of(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
