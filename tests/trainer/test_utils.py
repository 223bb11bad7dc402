"""`trl.trainer.utils` and the other old paths: every name is there; the plain Python helpers do what they say."""

import asyncio
import functools
import importlib
import inspect
import subprocess
import sys
import time

import pytest

from trl.trainer import utils
from trl.trainer.utils import (
    get_callable_name,
    identity,
    is_async_callable,
    remove_none_values,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)

SIGNATURES = {
    "add_fused_lm_head": ["model", "temperature", "cast_lm_head_to_fp32", "outputs"],
    "adjusted_mfu": ["mfu", "config", "seq_len"],
    "compute_flops_per_token": ["config", "seq_len"],
    "compute_mfu": ["flops_per_token", "tokens_per_second", "world_size", "peak_flops_per_device"],
    "create_model_from_path": ["model_id", "architecture", "kwargs"],
    "disable_dropout_in_model": ["model"],
    "ensure_master_addr_port": ["addr", "port"],
    "entropy_from_logits": ["logits", "chunk_size"],
    "flush_left": ["mask", "tensors"],
    "get_callable_name": ["func"],
    "get_comet_experiment_url": [],
    "get_config_model_id": ["config"],
    "get_peak_flops": ["device_name", "dtype"],
    "get_peak_flops_per_device": ["accelerator", "dtype"],
    "get_peft_config": ["model_args"],
    "get_quantization_config": ["model_args"],
    "get_trackio_space_url": [],
    "global_then_local_main_first": [],
    "hash_module": ["module"],
    "identity": ["x"],
    "is_async_callable": ["func"],
    "is_trackio_available": [],
    "log_table_to_comet_experiment": ["name", "table"],
    "maybe_gather_lm_head_ctx": ["params"],
    "nanmax": ["tensor"],
    "nanmin": ["tensor"],
    "nanstd": ["tensor", "dim", "keepdim"],
    "pad": ["tensors", "padding_value", "padding_side", "pad_to_multiple_of"],
    "patch_chunked_lm_head": ["model", "chunk_size", "temperature", "output_router_logits"],
    "print_prompt_completions_sample": [
        "prompts", "completions", "rewards", "advantages", "step", "num_samples", "extra",
    ],
    "remove_none_values": ["example"],
    "repeat_iterable_dataset": ["dataset", "mini_repeat_count", "batch_size", "repeat_count"],
    "selective_log_softmax": ["logits", "index", "temperature", "row_mask"],
    "selective_log_softmax_and_entropy": ["logits", "index", "entropy_requires_grad", "temperature", "row_mask"],
    "shuffle_sequence_dict": ["seq_dict"],
    "split_pixel_values_by_grid": ["batch"],
    "split_tensor_dict": ["tensor_dict", "num_chunks"],
    "start_event_loop_in_daemon": ["name"],
    "strip_images_from_messages": ["messages"],
    "unsplit_pixel_values_by_grid": ["batch"],
    "use_adapter": ["model", "adapter_name"],
}  # fmt: skip

OLD_PATHS = {
    "trl.distributed": ["DistributedBackend"],
    "trl.extras.profiling": ["ProfilingContext", "profiling_context", "profiling_decorator"],
    "trl.models": [
        "create_reference_model", "enable_selective_activation_checkpointing", "get_act_offloading_ctx_manager",
        "prepare_deepspeed", "prepare_fsdp", "unwrap_model_for_generation", "utils", "activation_offloading",
    ],
    "trl.models.activation_offloading": ["NoOpManager", "OffloadActivations", "get_act_offloading_ctx_manager"],
    "trl.models.selective_activation_checkpointing": ["enable_selective_activation_checkpointing"],
    "trl.models.utils": [
        "TYPE_CHECKING", "_ForwardRedirection", "add_hooks", "create_reference_model", "disable_gradient_checkpointing",
        "get_all_parameters", "iter_params", "prepare_deepspeed", "prepare_fsdp", "remove_hooks",
        "unwrap_model_for_generation",
    ],
    "trl.trainer.callbacks": [
        "BEMACallback", "LogCompletionsCallback", "RichProgressCallback", "SyncRefModelCallback", "WeaveCallback",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_function_and_its_parameters(name):
    assert list(inspect.signature(getattr(utils, name)).parameters)[: len(SIGNATURES[name])] == SIGNATURES[name]


def test_model_card_parameters():
    parameters = list(inspect.signature(utils.generate_model_card).parameters)
    assert parameters[:13] == [
        "base_model", "model_name", "hub_model_id", "dataset_name", "tags", "wandb_url", "trackio_url", "trainer_name",
        "trainer_citation", "template_file", "paper_title", "paper_id", "comet_url",
    ]  # fmt: skip


def test_classes():
    assert {"loss", "log_probs", "entropy"} <= set(utils.FusedCausalLMOutput.__dataclass_fields__)
    assert list(inspect.signature(utils.RepeatSampler).parameters)[:2] == ["data_source", "mini_repeat_count"]


def test_every_listed_name_is_there():
    for name in utils.__all__:
        assert getattr(utils, name) is not None


def test_unknown_name():
    with pytest.raises(AttributeError, match="no_such_helper"):
        _ = utils.no_such_helper


@pytest.mark.parametrize("module", OLD_PATHS)
def test_old_paths(module):
    imported = importlib.import_module(module)
    for name in OLD_PATHS[module]:
        assert hasattr(imported, name), name


def test_importing_utils_is_cheap():
    code = "import sys, trl.trainer.utils; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- Callables ----


def function():
    pass


async def coroutine(x):
    return x


class Plain:
    def __call__(self):
        pass


class Async:
    async def __call__(self):
        pass


def test_names():
    assert identity(7) == 7
    assert get_callable_name(function) == "function"
    assert get_callable_name(functools.partial(functools.partial(function))) == "function"
    assert get_callable_name(Plain()) == "Plain"
    assert get_callable_name(lambda: None) == "<lambda>"


def test_what_is_asynchronous():
    assert is_async_callable(coroutine)
    assert is_async_callable(functools.partial(coroutine, 1))
    assert is_async_callable(Async())
    assert not is_async_callable(function)
    assert not is_async_callable(Plain())


# ---- Event loop ----


def test_event_loop_runs_and_stops():
    thread, loop, ready = start_event_loop_in_daemon("worker")
    assert ready.wait(5)
    assert thread.daemon
    assert thread.name == "worker"
    assert asyncio.run_coroutine_threadsafe(coroutine(3), loop).result(5) == 3
    shutdown_event_loop_in_daemon(thread, loop)
    assert not thread.is_alive()
    assert loop.is_closed()
    shutdown_event_loop_in_daemon(thread, loop)  # a second time is nothing to do
    shutdown_event_loop_in_daemon(None, None)


def test_shutdown_cancels_what_waits():
    cleaned = []

    async def waits():
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append(True)

    thread, loop, ready = start_event_loop_in_daemon()
    ready.wait(5)
    asyncio.run_coroutine_threadsafe(waits(), loop)
    time.sleep(0.05)
    start = time.monotonic()
    shutdown_event_loop_in_daemon(thread, loop)
    assert time.monotonic() - start < 5
    assert cleaned == [True]
    assert loop.is_closed()


# ---- Rows ----


def test_none_values_go_at_every_depth():
    row = {"a": None, "b": {"c": None, "d": [{"e": None, "f": 1}, None]}, "g": 0, "h": ""}
    assert remove_none_values(row) == {"b": {"d": [{"f": 1}, None]}, "g": 0, "h": ""}
    assert remove_none_values([row]) == [remove_none_values(row)]
    assert "a" in row  # a copy is returned


def test_none_values_of_something_else():
    with pytest.raises(TypeError, match="found str"):
        remove_none_values("text")
