"""`trainer.vllm_generation` and its kind: vLLM in this process, and a server whose answers can be foretold."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import build_model, build_tokenizer
from tests.rollouts.fake_vllm import FakeVLLM
from trl.reports.profiling import ProfilingContext
from trl.rollouts.types import SamplingParams
from trl.rollouts.vllm_client import VLLMClient
from trl.rollouts.vllm_colocate import VLLMColocateEngine
from trl.rollouts.vllm_generation import VLLMGeneration, empty_cache, extract_logprobs
from trl.rollouts.vllm_server_engine import VLLMServerEngine

PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9]]


def make_model():
    return build_model(hidden_size=64, num_attention_heads=2, num_key_value_heads=1).eval()


def logps_of(model, prompt, completion, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)


def test_it_is_where_users_import_it_from():
    module = importlib.import_module("trl.generation.vllm_generation")
    assert module.VLLMGeneration is VLLMGeneration
    assert module.extract_logprobs is extract_logprobs
    assert module.empty_cache is empty_cache
    assert empty_cache() is None


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs
# ---------------------------------------------------------------------------------------------------------------------


def told(value, rank):
    return SimpleNamespace(logprob=value, rank=rank)


def output(*completions):
    return SimpleNamespace(outputs=[SimpleNamespace(logprobs=logprobs) for logprobs in completions])


def test_extracted_log_probs_are_sorted_by_rank():
    """Per completion and token, the most probable first; the sampled token, wherever it ranks, is among them."""
    first = [{7: told(-3.0, 9), 4: told(-0.1, 1), 5: told(-0.7, 2)}, {8: told(-0.5, 1)}]
    second = [{1: told(math.nan, 1)}]
    logprobs, ids = extract_logprobs([output(first), output(second, [])])
    assert logprobs == [[[-0.1, -0.7, -3.0], [-0.5]], [[None]], []]
    assert ids == [[[4, 5, 7], [8]], [[1]], []]


def test_a_completion_without_log_probs_makes_there_be_none():
    assert extract_logprobs([output([{1: told(-1.0, 1)}]), output(None)]) == (None, None)
    assert extract_logprobs([]) == ([], [])


# ---------------------------------------------------------------------------------------------------------------------
# In this process
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colocate():
    pytest.importorskip("vllm")
    generation = VLLMGeneration(
        make_model(),
        Accelerator(cpu=True),
        build_tokenizer(),
        model_impl="vllm",
        max_model_length=64,
        max_num_seqs=8,
        temperature=0.8,
        max_completion_length=6,
    )
    generation.sync_weights()
    yield generation
    generation.engine.close()


def test_completions_with_the_log_probs_of_their_tokens(colocate):
    """Whole: prompts, completions, one log-prob and one id for each token, equal to Transformers'."""
    torch.manual_seed(0)
    prompt_ids, completion_ids, logprobs, token_ids = colocate.generate(PROMPTS, None, 2)
    assert prompt_ids == PROMPTS
    assert completion_ids[0] != completion_ids[1]
    for prompt, completion, values, ids in zip(prompt_ids, completion_ids, logprobs, token_ids, strict=True):
        assert ids == [[token] for token in completion]
        expected = logps_of(colocate.model, prompt, completion, 0.8).gather(1, torch.tensor(ids))
        assert (torch.tensor(values) - expected).abs().max() < 1e-4
    torch.manual_seed(0)
    assert colocate.generate(PROMPTS, None, 2)[1] == completion_ids


def test_what_rollout_functions_touch(colocate):
    assert colocate.mode == "colocate"
    assert isinstance(colocate.engine, VLLMColocateEngine)
    assert (colocate.temperature, colocate.max_completion_length, colocate.top_k) == (0.8, 6, 0)
    from vllm import LLM
    from vllm import SamplingParams as OwnParams

    assert isinstance(colocate.llm, LLM)
    (answer,) = colocate.llm.generate(
        [{"prompt_token_ids": [5, 6]}], OwnParams(max_tokens=3, logprobs=2), use_tqdm=False
    )
    logprobs, token_ids = extract_logprobs([answer])
    assert len(logprobs[0]) == 3
    assert all(values == sorted(values, reverse=True) for values in logprobs[0])
    assert all(token in ids for token, ids in zip(answer.outputs[0].token_ids, token_ids[0], strict=True))
    with pytest.raises(AttributeError, match="use `llm`"):
        colocate.vllm_client
    assert not hasattr(colocate, "vllm_client")


def test_the_most_probable_tokens(colocate, monkeypatch):
    """`logprobs=3`: they are those of the whole vocabulary, the sampled token always among them; None: nothing."""
    monkeypatch.setattr(colocate, "logprobs", 3)
    prompt_ids, completion_ids, logprobs, token_ids = colocate.generate(PROMPTS, None, 1)
    assert prompt_ids == PROMPTS
    for prompt, completion, values, ids in zip(prompt_ids, completion_ids, logprobs, token_ids, strict=True):
        expected = logps_of(colocate.model, prompt, completion, 0.8)
        for place, (told_values, told_ids) in enumerate(zip(values, ids, strict=True)):
            assert completion[place] in told_ids
            assert set(expected[place].topk(3).indices.tolist()) <= set(told_ids)
            assert (torch.tensor(told_values) - expected[place][told_ids]).abs().max() < 1e-4
            assert told_values == sorted(told_values, reverse=True)


def test_a_sync_takes_the_models_weights_as_they_are_now(colocate):
    with torch.no_grad():
        colocate.model.model.embed_tokens.weight.mul_(1.5)
    prompts, completions, before, ids = colocate.generate([[5, 6]], None, 1)
    expected = logps_of(colocate.model, prompts[0], completions[0], 0.8).gather(1, torch.tensor(ids[0]))
    assert (torch.tensor(before[0]) - expected).abs().max() > 1e-3
    colocate.sync_weights()
    prompts, completions, after, ids = colocate.generate([[5, 6]], None, 1)
    expected = logps_of(colocate.model, prompts[0], completions[0], 0.8).gather(1, torch.tensor(ids[0]))
    assert (torch.tensor(after[0]) - expected).abs().max() < 1e-4


def test_around_a_trainers_engine(colocate):
    """The trainer's engine, its model and its settings: the same completions, no second engine."""
    sampling = SamplingParams(max_completion_length=4, temperature=0.8, top_k=3, with_logps=False)
    generation = VLLMGeneration.around(colocate.engine, colocate.model, sampling)
    assert generation.llm is colocate.llm
    assert (generation.mode, generation.top_k, generation.max_completion_length) == ("colocate", 3, 4)
    torch.manual_seed(0)
    _, completion_ids, logprobs, token_ids = generation.generate(PROMPTS, None, 1)
    assert (logprobs, token_ids) == (None, None)
    torch.manual_seed(0)
    assert completion_ids == [rollout.completion_ids for rollout in colocate.engine.generate(PROMPTS, sampling)]
    generation.sync_weights()


def test_a_profiler_times_the_call(colocate):
    profiler = ProfilingContext("vLLM.generate", [])
    colocate.generate([[5]], None, 1, profiler)
    assert profiler.duration > 0


# ---------------------------------------------------------------------------------------------------------------------
# With a server
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with FakeVLLM() as fake:
        generation = VLLMGeneration(
            make_model(),
            Accelerator(cpu=True),
            build_tokenizer(),
            mode="server",
            server_host="127.0.0.1",
            server_port=fake.port,
            server_timeout=10.0,
            max_completion_length=8,
            temperature=0.5,
            top_k=7,
            structured_outputs_regex="a+",
            generation_kwargs={"min_tokens": 1},
        )
        yield fake, generation
        generation.engine.close()


def test_a_server_is_asked_as_it_was_set_up(server):
    fake, generation = server
    assert generation.mode == "server"
    assert isinstance(generation.engine, VLLMServerEngine)
    prompt_ids, completion_ids, _, _ = generation.generate(PROMPTS, None, 2)
    assert prompt_ids == PROMPTS
    assert len(completion_ids) == 3
    sent = [body for _, path, body in fake.calls if path == "/v1/completions"]
    assert [(body["prompt"], body["n"]) for body in sent] == [([5, 6, 7], 2), ([8, 9], 1)]
    for body in sent:
        assert (body["temperature"], body["top_k"], body["max_tokens"], body["min_tokens"]) == (0.5, 7, 8, 1)
        assert body["structured_outputs"] == {"regex": "a+"}


def test_a_servers_weights_are_synced(server):
    fake, generation = server
    generation.engine.verify = "off"
    generation.sync_weights()
    assert fake.updates == 1
    assert "model.embed_tokens.weight" in fake.weights


def test_the_client_of_the_server(server):
    """For rollout functions that ask the server themselves; there is no engine in this process."""
    fake, generation = server
    client = generation.vllm_client
    assert isinstance(client, VLLMClient)
    assert client is generation.vllm_client
    assert client.base_url == fake.url
    with pytest.raises(AttributeError, match="use `vllm_client`"):
        generation.llm
    assert not hasattr(generation, "llm")


def test_several_servers_by_their_addresses(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with FakeVLLM() as one, FakeVLLM() as other:
        generation = VLLMGeneration(
            make_model(), Accelerator(cpu=True), build_tokenizer(), "server", server_base_url=f"{one.url}, {other.url}"
        )
        generation.generate([[5], [6]], None, 1)
        generation.engine.close()
        assert all("/v1/completions" in [path for _, path, _ in fake.calls] for fake in (one, other))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_mode():
    with pytest.raises(ValueError, match='"colocate" or "server"; found \'remote\''):
        VLLMGeneration(make_model(), Accelerator(cpu=True), build_tokenizer(), mode="remote")


def test_a_server_tells_the_sampled_token_alone():
    with pytest.raises(ValueError, match=r"`logprobs=5`.*vllm_client.generate"):
        VLLMGeneration(make_model(), Accelerator(cpu=True), build_tokenizer(), mode="server", logprobs=5)


def test_without_vllm(monkeypatch):
    """In this process it has to be installed: the error says which extra brings it."""
    from trl.rollouts import vllm_adapter

    monkeypatch.setattr(vllm_adapter, "is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match=r"trl\[vllm\]"):
        VLLMGeneration(make_model(), Accelerator(cpu=True), build_tokenizer())
