"""
The contract with the installed vLLM: whatever the adapter uses of it is there, and does what it is used for.

A test that fails here after an upgrade names what vLLM changed; only `trl/rollouts/vllm_adapter.py` has to follow.
"""

import dataclasses
import gc
import inspect
import os
import random
from types import SimpleNamespace
from typing import get_args

import numpy
import pytest
import torch
from accelerate import Accelerator

from tests.conftest import build_model, build_tokenizer
from trl import import_utils
from trl.models.weight_export import WeightInfo, iter_weights
from trl.rollouts import vllm_adapter as adapter

IDS = list(range(5, 40))


def test_without_vllm(monkeypatch):
    """The error says which extra brings it, in which versions, and how to go on without."""
    monkeypatch.setattr(adapter, "is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match=r'pip install "trl\[vllm\]".*0\.22\.0 to 0\.32.*`use_vllm=False`'):
        adapter.require_vllm()


def test_the_range_is_the_one_of_import_utils():
    assert adapter.TESTED_VERSIONS == (import_utils.VLLM_MIN_VERSION, import_utils.VLLM_MAX_VERSION)


def test_an_untested_version_warns(monkeypatch):
    monkeypatch.setattr(import_utils, "_is_package_available", lambda *args, **kwargs: (True, "0.99.0"))
    with pytest.warns(UserWarning, match=r"vLLM 0\.99\.0 is installed; versions 0\.22\.0 to 0\.32"):
        adapter.require_vllm()


def test_the_installed_version_is_tested(recwarn):
    pytest.importorskip("vllm")
    adapter.require_vllm()
    assert not [warning for warning in recwarn if "vLLM" in str(warning.message)]


# ---------------------------------------------------------------------------------------------------------------------
# What vLLM has
# ---------------------------------------------------------------------------------------------------------------------


def parameters_of(function):
    return set(inspect.signature(function).parameters)


def test_settings_of_an_engine():
    """Every setting that an engine is built with is one of `EngineArgs`, and has the values that are used."""
    pytest.importorskip("vllm")
    from vllm.config.load import LoadConfig
    from vllm.config.model import LogprobsMode
    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in dataclasses.fields(EngineArgs)}
    used = {
        "model", "load_format", "dtype", "tensor_parallel_size", "distributed_executor_backend",
        "gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "enable_sleep_mode",
        "enforce_eager", "model_impl", "logprobs_mode", "seed", "trust_remote_code",
    }  # fmt: skip
    assert used - names == set()
    assert {"raw_logprobs", "processed_logprobs"} <= set(get_args(LogprobsMode))
    assert "load_format" in {field.name for field in dataclasses.fields(LoadConfig)}


def test_settings_of_a_request():
    pytest.importorskip("vllm")
    made = adapter.sampling_params(
        {
            "n": 2, "seed": 2**62, "temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": 0.1, "max_tokens": 4,
            "repetition_penalty": 1.1, "logprobs": 0, "prompt_logprobs": 0, "stop_token_ids": [2], "min_tokens": 1,
            "logit_bias": {3: 1.0}, "allowed_token_ids": [3], "structured_outputs": {"json": {"type": "object"}},
        }
    )  # fmt: skip
    assert made.structured_outputs.json == {"type": "object"}
    assert (made.top_k, made.seed) == (0, 2**62)
    assert not made.detokenize


def test_methods_of_an_engine():
    pytest.importorskip("vllm")
    from vllm import LLM

    assert {"prompts", "sampling_params", "use_tqdm"} <= parameters_of(LLM.generate)
    assert {"method", "args"} <= parameters_of(LLM.collective_rpc)
    assert "level" in parameters_of(LLM.sleep)
    assert "tags" in parameters_of(LLM.wake_up)
    assert callable(LLM.reset_prefix_cache)
    assert callable(LLM.reset_mm_cache)
    assert callable(LLM.apply_model)


def test_methods_of_a_worker():
    """`reload_weights` takes an iterator: on this machine's runner, and on a GPU's."""
    pytest.importorskip("vllm")
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "weights_iterator" in parameters_of(GPUModelRunner.reload_weights)
    assert callable(GPUModelRunner.get_model)


def test_functions_at_the_end_of_an_engine():
    pytest.importorskip("vllm")
    from vllm.distributed import parallel_state
    from vllm.v1.engine.core_client import EngineCoreClient

    assert callable(parallel_state.cleanup_dist_env_and_memory)
    assert callable(parallel_state.get_tensor_model_parallel_world_size)
    assert callable(EngineCoreClient.shutdown)


def test_the_trainers_side_of_nccl():
    """Only its surface: a group needs GPUs."""
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer import nccl_engine

    fields = {field.name for field in dataclasses.fields(nccl_engine.NCCLTrainerInitInfo)}
    assert {"rank", "master_address", "master_port", "world_size", "packed"} <= fields
    engine = nccl_engine.NCCLTrainerWeightTransferEngine
    assert {"init_info", "client", "source"} <= parameters_of(engine.trainer_init)
    assert callable(engine.send_weights)
    assert callable(engine.shutdown)
    [meta] = adapter.nccl_metadata([WeightInfo("head", "bfloat16", (2, 3))])
    assert (meta.name, meta.dtype, tuple(meta.shape)) == ("head", torch.bfloat16, (2, 3))


def test_what_a_server_is_asked():
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "worker_extension_cls" in {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert "middleware" in {field.name for field in dataclasses.fields(FrontendArgs)}
    assert {"method", "args"} <= parameters_of(AsyncLLM.collective_rpc)
    assert "reset_running_requests" in parameters_of(AsyncLLM.reset_prefix_cache)
    assert callable(AsyncLLM.reset_encoder_cache)


def test_names_of_layers():
    """Of a head, an embedding and a linear layer: by what the adapter knows them, and where it finds their weights."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    assert ParallelLMHead.__name__ == "ParallelLMHead"
    assert issubclass(ParallelLMHead, VocabParallelEmbedding)
    assert "scale" in parameters_of(LogitsProcessor.__init__)
    assert "params_dtype" in parameters_of(LinearBase.__init__)


# ---------------------------------------------------------------------------------------------------------------------
# What an engine does. It joins a process group that is there already, as a distributed trainer's.
# ---------------------------------------------------------------------------------------------------------------------


def make_model(seed=0):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return build_model(tie_word_embeddings=True, seed=seed, **sizes).eval()


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("described")
    model = make_model()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with adapter.process_settings_kept():
        engine = adapter.make_engine(
            model, model=str(folder), load_format="dummy", dtype="float32", enforce_eager=True, max_model_len=256,
            max_num_seqs=8, max_num_batched_tokens=4096, logprobs_mode="raw_logprobs", trust_remote_code=None,
        )  # fmt: skip
    yield engine
    adapter.close(engine, owns_process_group=False)
    assert torch.distributed.is_initialized(), "vLLM ended a process group that is not its own"
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total.item() == 1
    torch.distributed.destroy_process_group()
    assert not torch.distributed.is_initialized()


@pytest.fixture
def loaded(engine, accelerator):
    model = make_model()
    adapter.update_weights(engine, iter_weights(model, accelerator))
    return engine, model


def logps_of(model, ids=IDS, scale=1.0):
    with torch.no_grad():
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0] * scale, -1)
    return logps[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def difference(engine, model, scale=1.0):
    (found,) = adapter.prompt_logps(engine, [IDS])
    return (torch.tensor(found) - logps_of(model, scale=scale)).abs().max().item()


def perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)


def test_the_engine_is_in_this_process(loaded):
    """Functions and tensors are handed over as they are; nothing is pickled."""
    engine, _ = loaded
    assert engine.collective_rpc(lambda worker: os.getpid()) == [os.getpid()]
    marker = object()
    assert engine.collective_rpc(lambda worker, given: given, args=(marker,))[0] is marker
    assert gc.get_freeze_count() == 0


def test_an_update_brings_all_weights(loaded, accelerator):
    engine, model = loaded
    assert difference(engine, model) < 1e-4
    perturb(model)
    assert difference(engine, model) > 0.1
    adapter.update_weights(engine, iter_weights(model, accelerator))
    assert difference(engine, model) < 1e-4


def test_the_tied_head_has_to_be_refreshed(loaded, accelerator, monkeypatch):
    """vLLM leaves the packed head as it was, and reports success. Once it does not, the adapter need not mend it."""
    engine, model = loaded
    perturb(model)
    refresh = adapter.refresh_tied_head
    with monkeypatch.context() as patched:
        patched.setattr(adapter, "refresh_tied_head", lambda model: [])
        adapter.update_weights(engine, iter_weights(model, accelerator))
    assert difference(engine, model) > 0.1
    assert engine.apply_model(refresh) == [["lm_head"]]
    assert difference(engine, model) < 1e-4


def test_fingerprints_are_those_of_the_weights(loaded, accelerator):
    """Every layer has one, under the names that the weights are published with."""
    from trl.rollouts.weight_probe import _own_fingerprints, compare_fingerprints

    engine, model = loaded
    (found,) = engine.collective_rpc(adapter.fingerprint_layers)
    own = _own_fingerprints(model, accelerator)
    named = {name for names in found for name in names.split("+")}
    assert named == set(own)
    assert any("q_proj.weight+" in names for names in found)
    assert compare_fingerprints(own, found, 1e-4) == []
    perturb(model)
    assert set(compare_fingerprints(_own_fingerprints(model, accelerator), found, 1e-4)) == set(found)


def test_outputs_have_tokens_and_log_probs(loaded):
    """In the order of the prompts, each with the settings of its own; the sampled token is always told."""
    engine, model = loaded
    prompts = [{"prompt_token_ids": IDS[:4]}, {"prompt_token_ids": IDS[:9]}]
    one = {"n": 2, "max_tokens": 3, "temperature": 1.0, "seed": 1, "logprobs": 0}
    outputs = adapter.generate(engine, prompts, [one, {**one, "n": 1, "logprobs": None}])
    assert [output.prompt_token_ids for output in outputs] == [IDS[:4], IDS[:9]]
    assert [len(output.outputs) for output in outputs] == [2, 1]
    for completion in outputs[0].outputs:
        ids = list(completion.token_ids)
        expected = logps_of(model, IDS[:4] + ids)[-len(ids) :]
        assert (torch.tensor(adapter.sampled_logps(completion)) - expected).abs().max() < 1e-4
    assert adapter.sampled_logps(outputs[1].outputs[0]) is None
    assert adapter.generate(engine, [], []) == []
    again = adapter.generate(engine, prompts[:1], [one])
    assert [one.token_ids for one in again[0].outputs] == [one.token_ids for one in outputs[0].outputs]


def test_a_token_that_is_not_told_is_unknown():
    told = [{5: SimpleNamespace(logprob=-1.0)}, {6: SimpleNamespace(logprob=-2.0)}]
    assert adapter.sampled_logps(SimpleNamespace(token_ids=[5, 7], logprobs=told)) == [-1.0, None]


def test_logits_are_scaled_before_anything_reads_them(loaded):
    """And not twice: the factor is of the model's own scale."""
    engine, model = loaded
    try:
        assert adapter.scale_logits(engine, 0.5)
        assert difference(engine, model, 0.5) < 1e-4
        assert adapter.scale_logits(engine, 2.0)
        assert difference(engine, model, 2.0) < 1e-4
    finally:
        adapter.scale_logits(engine, 1.0)
    assert difference(engine, model) < 1e-4


def test_a_model_without_a_place_for_the_scale():
    class Engine:
        def apply_model(self, function):
            return [function(torch.nn.Linear(1, 1))]

    assert adapter.scale_logits(Engine(), 0.5) is False


def test_a_cache_that_is_not_given_up_is_an_error():
    """It would hold keys and values of the old weights."""
    inner = SimpleNamespace(reset_encoder_cache=lambda: None)
    engine = SimpleNamespace(reset_mm_cache=lambda: None, llm_engine=inner, reset_prefix_cache=lambda: False)
    with pytest.raises(RuntimeError, match="prefix cache"):
        adapter.reset_caches(engine)


def test_caches_of_the_engine_are_reset(loaded):
    engine, _ = loaded
    prompt = [{"prompt_token_ids": [token % 400 + 4 for token in range(200)]}]
    ask = [{"max_tokens": 1}]
    adapter.generate(engine, prompt, ask)
    assert adapter.generate(engine, prompt, ask)[0].num_cached_tokens > 100
    adapter.reset_caches(engine)
    assert adapter.generate(engine, prompt, ask)[0].num_cached_tokens == 0


def test_sleep_and_wake_ask_for_what_they_mean():
    """Level 2: the weights are not kept, they are loaded anew; then the cache by itself."""
    calls = []
    engine = SimpleNamespace(
        sleep=lambda **kwargs: calls.append(kwargs), wake_up=lambda **kwargs: calls.append(kwargs)
    )
    adapter.sleep(engine)
    adapter.wake_for_weights(engine)
    adapter.wake_for_generation(engine)
    assert calls == [{"level": 2}, {"tags": ["weights"]}, {"tags": ["kv_cache"]}]


def test_settings_of_the_process_are_kept():
    """Generators, the number of threads, and that it can be changed at all; also where the block fails."""
    setter, threads = torch.set_num_threads, torch.get_num_threads()
    states = random.getstate(), repr(numpy.random.get_state()), torch.random.get_rng_state()

    def block():
        with adapter.process_settings_kept():
            random.seed(0)
            numpy.random.seed(0)
            torch.manual_seed(0)
            torch.set_num_threads(threads + 1)
            torch.set_num_threads = lambda count: None
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert torch.set_num_threads is setter
    assert torch.get_num_threads() == threads
    assert random.getstate() == states[0]
    assert repr(numpy.random.get_state()) == states[1]
    assert torch.equal(torch.random.get_rng_state(), states[2])
