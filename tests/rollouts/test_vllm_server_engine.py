"""Sampling with vLLM servers: against a server whose answers can be foretold, in two processes, and with the real one."""

import json
import math
import textwrap
import warnings
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import build_model
from tests.rollouts.fake_vllm import EOS, FakeVLLM, completion_of
from tests.rollouts.vllm_server_process import KEY, ServerProcess
from tests.two_processes import run_on_two_processes
from trl.rollouts.types import Prompt, RolloutEngine, SamplingParams
from trl.rollouts.vllm_client import VLLMClient
from trl.rollouts.vllm_sampling import request_seeds
from trl.rollouts.vllm_server_engine import VLLMServerEngine

PAD = 3


def make_engine(*urls, verify="off", **options):
    settings = {
        "timeout": 30.0,
        "group_port": 51216,
        "eos_token_ids": [EOS],
        "pad_token_id": PAD,
        "request_timeout": 30.0,
    }
    return VLLMServerEngine(Accelerator(cpu=True), urls=list(urls), verify=verify, **{**settings, **options})


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with FakeVLLM() as server:
        yield server


@pytest.fixture
def engine(fake):
    engine = make_engine(fake.url)
    yield engine
    engine.close()


def completions(fake):
    return [body for _, path, body in fake.calls if path == "/v1/completions"]


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------


def test_it_is_an_engine(engine):
    assert isinstance(engine, RolloutEngine)
    assert engine.max_model_length == 64
    engine.sleep()
    engine.wake()


def test_neighbours_with_one_prompt_are_one_request(fake, engine):
    prompts = [[4, 5], [4, 5], [6], [4, 5]]
    rollouts = engine.generate(prompts, SamplingParams(max_completion_length=8, n=2, seed=7, with_logps=True))
    seeds = request_seeds(7, 3)
    expected = (
        [completion_of([4, 5], seeds[0], index, 8) for index in range(4)]
        + [completion_of([6], seeds[1], index, 8) for index in range(2)]
        + [completion_of([4, 5], seeds[2], index, 8) for index in range(2)]
    )
    assert [rollout.completion_ids for rollout in rollouts] == expected
    assert [rollout.prompt_ids for rollout in rollouts] == [[4, 5]] * 4 + [[6]] * 2 + [[4, 5]] * 2
    assert [rollout.sampled_logps for rollout in rollouts] == [[-token / 100 for token in ids] for ids in expected]
    assert sorted((body["prompt"], body["n"]) for body in completions(fake)) == [([4, 5], 2), ([4, 5], 4), ([6], 2)]
    assert not any(rollout.error or rollout.is_truncated for rollout in rollouts)


def test_the_settings_are_the_requests(fake, engine):
    sampling = SamplingParams(
        max_completion_length=5, temperature=0.7, top_p=0.9, top_k=4, min_p=0.1, repetition_penalty=1.2, seed=1,
        generation_kwargs={"min_tokens": 2},
    )  # fmt: skip
    engine.generate([[4, 5]], sampling)
    sent = completions(fake)[0]
    expected = {
        "model": "tiny", "prompt": [4, 5], "return_token_ids": True, "return_tokens_as_token_ids": True, "n": 1,
        "temperature": 0.7, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2, "max_tokens": 5,
        "logprobs": None, "stop_token_ids": [EOS], "seed": request_seeds(1, 1)[0], "min_tokens": 2,
    }  # fmt: skip
    assert sent == expected
    assert fake.headers[-1]["trl-weights"] == fake.version


def test_a_regular_expression_goes_along(fake):
    make_engine(fake.url, structured_outputs_regex="a+").generate([[4]], SamplingParams())
    assert completions(fake)[0]["structured_outputs"] == {"regex": "a+"}


def test_completions_end_with_the_first_stop_token_and_else_are_truncated(fake):
    engine = make_engine(fake.url, eos_token_ids=[61, EOS])  # the second token names a prompt of one token
    stopped, cut = engine.generate([[4], [4, 5]], SamplingParams(max_completion_length=4, with_logps=True))
    assert (len(stopped.completion_ids), stopped.is_truncated) == (2, False)
    assert len(stopped.sampled_logps) == 2
    assert (len(cut.completion_ids), cut.is_truncated) == (4, True)


def test_seeds_come_from_the_global_generator_once_per_generation(fake, engine):
    def sample():
        torch.manual_seed(5)
        rollouts = engine.generate([[4], [5], [6]], SamplingParams())
        return [rollout.completion_ids for rollout in rollouts], torch.rand(())

    first, second = sample(), sample()
    assert first == second
    torch.manual_seed(5)
    torch.randint(2**62, ())
    assert torch.rand(()) == first[1], "one number was drawn"
    state = torch.random.get_rng_state()
    engine.generate([[4]], SamplingParams(seed=9))
    assert torch.equal(torch.random.get_rng_state(), state), "a seed of its own leaves the generator alone"


def test_greedy_completions_are_asked_for_once(fake, engine):
    rollouts = engine.generate([[4], [4]], SamplingParams(temperature=0.0, n=3, seed=1))
    assert [body["n"] for body in completions(fake)] == [1]
    assert len({tuple(rollout.completion_ids) for rollout in rollouts}) == 1
    assert len(rollouts) == 6


def test_large_groups_are_split(fake, engine):
    rollouts = engine.generate([[4]], SamplingParams(n=150, seed=1))
    assert sorted(body["n"] for body in completions(fake)) == [22, 64, 64]
    assert len(rollouts) == 150


def test_the_rest_of_the_context_is_room(fake, engine):
    engine.generate([[4] * 60], SamplingParams(max_completion_length=None))
    engine.generate([[4] * 60], SamplingParams(max_completion_length=50))
    engine.generate([[4] * 60], SamplingParams(max_completion_length=2))
    assert [body["max_tokens"] for body in completions(fake)] == [4, 4, 2]
    with pytest.raises(ValueError, match="64 tokens leaves no room.*64 tokens that the vLLM server takes"):
        engine.generate([[4] * 64], SamplingParams())


def test_a_shorter_length_is_kept(fake):
    engine = make_engine(fake.url, max_model_length=32)
    assert engine.max_model_length == 32
    engine.generate([[4] * 30], SamplingParams())
    assert completions(fake)[0]["max_tokens"] == 2


def test_no_prompts_are_no_requests(fake, engine):
    assert engine.generate([], SamplingParams()) == []
    assert completions(fake) == []


def test_unknown_logprobs_are_nan(fake, engine, monkeypatch):
    complete = fake._complete

    def forget(body, headers):
        status, said, headers = complete(body, headers)
        said["choices"][0]["logprobs"]["token_logprobs"][1] = None
        return status, said, headers

    monkeypatch.setattr(fake, "_complete", forget)
    rollout = engine.generate([[4]], SamplingParams(with_logps=True))[0]
    assert [math.isnan(value) for value in rollout.sampled_logps] == [False, True, False, False, False]
    assert rollout.error is None


def test_requests_in_flight_are_bounded(fake, engine, monkeypatch):
    monkeypatch.setattr("trl.rollouts.vllm_server_engine.REQUESTS_IN_FLIGHT", 3)
    fake.seconds = 0.03
    engine.generate([[4, index] for index in range(12)], SamplingParams())
    assert 2 <= fake.most_running <= 3


def test_servers_share_the_requests_by_their_size():
    with FakeVLLM() as small, FakeVLLM(world_size=3) as large:
        engine = make_engine(small.url, large.url)
        rollouts = engine.generate([[4, index] for index in range(8)], SamplingParams(seed=3))
        assert (len(completions(small)), len(completions(large))) == (2, 6)
        seeds = request_seeds(3, 8)
        assert [rollout.completion_ids for rollout in rollouts] == [
            completion_of([4, index], seeds[index], 0, 99) for index in range(8)
        ]
        engine.update_weights(build_model())
        assert (small.version, large.version) == ("first:1", "first:1")
        assert small.weights.keys() == large.weights.keys()


def test_servers_of_different_models_are_refused():
    refused = pytest.raises(RuntimeError, match="same model.*other")
    with FakeVLLM() as one, FakeVLLM(model="other") as other, refused:
        make_engine(one.url, other.url)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs, versions
# ---------------------------------------------------------------------------------------------------------------------


def test_shaped_sampling_is_scored_without_the_shaping(fake, engine):
    rollouts = engine.generate([[4, 5]], SamplingParams(top_p=0.5, with_logps=True, n=2, seed=1))
    scored = completions(fake)[-1]
    assert scored["prompt"] == [[4, 5, *rollout.completion_ids] for rollout in rollouts]
    assert scored["prompt_logprobs"] == 0
    for rollout in rollouts:
        assert rollout.sampled_logps == [-token / 1000 for token in rollout.completion_ids]


def test_what_a_grammar_shaped_is_scored_even_where_raw_log_probs_are_told(fake, engine):
    engine._servers[0].info = replace(engine._servers[0].info, logprobs_mode="raw_logprobs")
    structured = {"structured_outputs": {"regex": "a"}}
    [rollout] = engine.generate([[4, 5]], SamplingParams(with_logps=True, generation_kwargs=structured))
    assert completions(fake)[-1]["prompt"] == [[4, 5, *rollout.completion_ids]]
    assert completions(fake)[-1]["prompt_logprobs"] == 0


def test_shaped_sampling_at_another_temperature_has_no_logprobs(engine):
    with pytest.warns(UserWarning, match="top-p.*temperature 0.7"):
        rollout = engine.generate([[4, 5]], SamplingParams(top_p=0.5, temperature=0.7, with_logps=True))[0]
    assert rollout.sampled_logps is None
    assert rollout.completion_ids


def test_raw_logprobs_are_warned_of_where_they_differ():
    with FakeVLLM(logprobs_mode="raw_logprobs") as fake:
        engine = make_engine(fake.url)
        with pytest.warns(UserWarning, match="processed_logprobs"):
            engine.generate([[4]], SamplingParams(temperature=0.7, with_logps=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.generate([[4]], SamplingParams(with_logps=True))
            engine.generate([[4]], SamplingParams(temperature=0.7))


@pytest.mark.parametrize(
    ("version", "is_warned"), [("0.5.0", True), ("9.1", True), ("0.30.0+cpu", False), ("dev", False)]
)
def test_versions_outside_the_tested_range_are_warned_of(version, is_warned):
    with FakeVLLM(vllm_version=version) as fake, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_engine(fake.url)
    assert any("tested with" in str(one.message) for one in caught) == is_warned


def test_a_server_with_other_weights_does_not_pass(fake):
    """Whatever the transport reported: the fake server's log-probs are not the model's."""
    engine = make_engine(fake.url, verify="probe")
    with pytest.raises(RuntimeError, match="The vLLM server http.*does not have the trainer's weights"):
        engine.update_weights(build_model())
    assert fake.version == "first:2", "pushed, and once more to repair it"


def test_images_need_a_processor(fake):
    with pytest.raises(ValueError, match="image_token_id"):
        make_engine(fake.url, with_images=True, processing_class=object())


def test_images_are_rendered_by_the_server(fake, monkeypatch):
    from types import SimpleNamespace

    from PIL import Image

    features = {"mm_hashes": {"image": ["a"]}, "mm_placeholders": {"image": [{"offset": 0, "length": 2}]}}
    answer, asked = fake.answer, []

    def answer_images(method, path, body, headers):
        if path == "/v1/chat/completions/render":
            return 200, {"features": features}, {}
        if path == "/inference/v1/generate":
            asked.append(json.loads(body))
            logprobs = {"content": [{"token_id": 11, "logprob": -0.5}, {"token_id": EOS, "logprob": None}]}
            choices = [{"index": index, "token_ids": [11, EOS], "logprobs": logprobs} for index in range(2)]
            return 200, {"choices": choices}, {"trl-weights": fake.version}
        return answer(method, path, body, headers)

    monkeypatch.setattr(fake, "answer", answer_images)
    engine = make_engine(fake.url, with_images=True, processing_class=SimpleNamespace(image_token_id=9))
    images = [Image.new("RGB", (4, 4))]
    prompts = [Prompt([1, 9, 9, 4], images=images)] * 2
    rollouts = engine.generate(prompts, SamplingParams(max_completion_length=4, with_logps=True))
    assert [rollout.completion_ids for rollout in rollouts] == [[11, EOS]] * 2
    assert rollouts[0].sampled_logps[0] == -0.5 and math.isnan(rollouts[0].sampled_logps[1])
    assert rollouts[0].images is images
    assert len(asked) == 1
    assert asked[0]["features"]["mm_placeholders"] == {"image": [{"offset": 1, "length": 2}]}
    assert asked[0]["token_ids"] == [1, 9, 9, 4]
    sent = asked[0]["sampling_params"]
    assert (sent["n"], sent["max_tokens"], sent["output_kind"], sent["stop_token_ids"]) == (2, 4, 2, [EOS])


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------

TWO = """
import json, sys
import torch
from accelerate import Accelerator
from tests.conftest import build_model
from trl.rollouts.types import SamplingParams
from trl.rollouts.vllm_server_engine import VLLMServerEngine

accelerator = Accelerator()
assert accelerator.num_processes == 2
rank = accelerator.process_index
url = sys.argv[1]
if rank == 1:
    # Only the main process may talk.
    import requests
    requests.Session.request = None

def make(**options):
    return VLLMServerEngine(accelerator, urls=[url], timeout=30.0, group_port=51216, eos_token_ids=[2], pad_token_id=3,
                            request_timeout=30.0, verify="off", **options)

def walked_to_the_end():
    # Grows by one whenever a process went through all weights.
    import trl.rollouts.vllm_server_engine as module
    walks, whole = [], module.iter_weights

    def counted(*arguments):
        yield from whole(*arguments)
        walks.append(True)

    module.iter_weights = counted
    return walks

engine = make()
"""


def test_two_processes_get_their_own_parts(fake):
    script = TWO + textwrap.dedent("""
        torch.manual_seed(rank)
        prompts = [[4, 5], [6]] if rank == 0 else [[6], [7], [7]]   # a group spans the processes
        rollouts = engine.generate(prompts, SamplingParams(max_completion_length=8, seed=3, with_logps=True))
        none = engine.generate([] if rank == 0 else [[8]], SamplingParams(seed=3))
        walks = walked_to_the_end()
        engine.update_weights(build_model(seed=rank))
        print(json.dumps([[rollout.prompt_ids, rollout.completion_ids, rollout.sampled_logps[0]] for rollout in rollouts]))
        print(json.dumps([engine.max_model_length, len(none), len(walks)]))
    """)
    outputs = [output.strip().splitlines()[-2:] for output in run_on_two_processes(script, fake.url)]
    seeds = request_seeds(3, 3)
    rows = [[[4, 5], completion_of([4, 5], seeds[0], 0, 8)], [[6], completion_of([6], seeds[1], 0, 8)],
            [[6], completion_of([6], seeds[1], 1, 8)], [[7], completion_of([7], seeds[2], 0, 8)],
            [[7], completion_of([7], seeds[2], 1, 8)]]  # fmt: skip
    rows = [[prompt, ids, -ids[0] / 100] for prompt, ids in rows]
    assert [json.loads(output[0]) for output in outputs] == [rows[:2], rows[2:]]
    assert [json.loads(output[1]) for output in outputs] == [[64, 0, 1], [64, 1, 1]]
    assert sorted((body["prompt"], body["n"]) for body in completions(fake)) == [
        ([4, 5], 1),
        ([6], 2),
        ([7], 2),
        ([8], 1),
    ]
    model = build_model(seed=0)
    assert fake.version == "first:1"
    assert torch.equal(fake.weights["lm_head.weight"], model.state_dict()["lm_head.weight"]), "the main process's"


def test_a_failure_ends_both_processes(fake):
    script = TWO + textwrap.dedent("""
        walks = walked_to_the_end()
        for fail in (lambda: engine.generate([[4] * 99], SamplingParams()), lambda: engine.generate([[4]], SamplingParams()),
                     lambda: engine.update_weights(build_model())):
            try:
                fail()
            except Exception as error:
                print(type(error).__name__, str(error)[:80].replace(url, "URL"))
        print(len(walks))
    """)
    fake.fail("/v1/completions", 400)
    fake.fail("/trl/weights/token", 400)
    outputs = [output.strip().splitlines()[-4:] for output in run_on_two_processes(script, fake.url)]
    assert outputs[0][0].startswith("ValueError A prompt of 99 tokens leaves no room")
    assert outputs[1][0].startswith("RuntimeError The main process ended with ValueError: A prompt")
    assert outputs[0][1].startswith("RuntimeError URL answered 400")
    assert outputs[1][1].startswith("RuntimeError The main process ended with RuntimeError: URL")
    assert outputs[1][2].startswith("RuntimeError The main process ended with ServerError: URL answered 400")
    assert [output[3] for output in outputs] == ["1", "1"], "shards are gathered to the end, also after an error"


def test_a_restart_is_mended_by_both_processes(fake):
    """Weights of two processes are gathered by both, so both take part when they are pushed once more."""
    fake.fail("/v1/completions", lambda: fake.restart_after(0.3) or "reset")
    script = TWO + textwrap.dedent("""
        model = build_model(seed=4)
        engine.update_weights(model)
        rollouts = engine.generate([[4 + rank]], SamplingParams(max_completion_length=8, seed=3))
        print(json.dumps([rollout.completion_ids for rollout in rollouts]))
    """)
    outputs = [output.strip().splitlines()[-1] for output in run_on_two_processes(script, fake.url)]
    seeds = request_seeds(3, 2)
    assert [json.loads(output) for output in outputs] == [
        [completion_of([4 + rank], seeds[rank], 0, 8)] for rank in (0, 1)
    ]
    assert fake.version == "second:1"


# ---------------------------------------------------------------------------------------------------------------------
# The real server
# ---------------------------------------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
         "initializer_range": 0.2}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory, _tokenizer):
    """A real server with a tied head."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("vllm-server")
    model = build_model(**SHAPE, tie_word_embeddings=True, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(folder / "model")
    _tokenizer.save_pretrained(folder / "model")
    with ServerProcess(str(folder / "model"), folder) as process:
        yield process


@pytest.fixture
def model(server):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(server.model)


@pytest.fixture
def real_engine(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    engine = make_engine(server.url, verify="full", request_timeout=60.0)
    yield engine
    engine.close()


PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9], [40, 41, 42, 43, 44]]


def largest_difference(model, rollouts, temperature=1.0):
    """Between the log-probs that the engine reports and Transformers', in float32."""
    largest = 0.0
    for rollout in rollouts:
        assert rollout.error is None and rollout.completion_ids
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        with torch.no_grad():
            logps = (model(input_ids=ids).logits[0].float() / temperature).log_softmax(-1)
        start = len(rollout.prompt_ids)
        expected = [logps[start - 1 + at, token].item() for at, token in enumerate(rollout.completion_ids)]
        largest = max(largest, *(abs(one - other) for one, other in zip(expected, rollout.sampled_logps, strict=True)))
    return largest


def shift(model, scale=0.05):
    """As an optimizer step would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


@pytest.mark.parametrize(("temperature", "updates"), [(1.0, 50), (0.7, 1)])
def test_log_probs_agree_after_1_10_and_50_updates(real_engine, model, temperature, updates):
    sampling = SamplingParams(max_completion_length=16, temperature=temperature, n=2, with_logps=True)
    for update in range(1, updates + 1):
        shift(model, 0.01)
        real_engine.verify = "full" if update in (1, 10, 50) else "off"
        real_engine.update_weights(model)
        if update in (1, 10, 50):
            assert largest_difference(model, real_engine.generate(PROMPTS, sampling), temperature) < 1e-4


def test_groups_seeds_and_greedy(real_engine, model):
    real_engine.update_weights(model)
    sampling = SamplingParams(max_completion_length=12, n=3, seed=11)
    first, again = (real_engine.generate(PROMPTS, sampling) for _ in range(2))
    assert [rollout.completion_ids for rollout in first] == [rollout.completion_ids for rollout in again]
    assert len({tuple(rollout.completion_ids) for rollout in first[:6]}) == 6, "one prompt, other completions"
    other = real_engine.generate(PROMPTS, SamplingParams(max_completion_length=12, n=3, seed=12))
    assert [rollout.completion_ids for rollout in first] != [rollout.completion_ids for rollout in other]
    greedy = real_engine.generate(PROMPTS[2:], SamplingParams(max_completion_length=12, temperature=0.0))
    for rollout in greedy:
        ids = torch.tensor([rollout.prompt_ids])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                                  eos_token_id=EOS, pad_token_id=PAD)  # fmt: skip
        assert rollout.completion_ids == expected[0, ids.shape[1] :].tolist()


def test_log_probs_of_shaped_sampling_are_those_of_the_whole_vocabulary(real_engine, model):
    real_engine.update_weights(model)
    sampling = SamplingParams(max_completion_length=16, top_p=0.5, n=2, with_logps=True, seed=5)
    assert largest_difference(model, real_engine.generate(PROMPTS, sampling)) < 1e-4


def test_up_to_the_end_of_the_context(real_engine):
    rollout = real_engine.generate([[5] * 250], SamplingParams(max_completion_length=None, with_logps=True))[0]
    assert 1 <= len(rollout.completion_ids) <= 6
    assert rollout.is_truncated == (EOS not in rollout.completion_ids)


def test_adapters_are_sampled_with_and_the_base_is_left_alone(real_engine, model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft_model = get_peft_model(model, config)
    base = {name: tensor.clone() for name, tensor in peft_model.state_dict().items() if "lora_" not in name}
    sampling = SamplingParams(max_completion_length=16, n=2, with_logps=True, seed=2)
    for update in range(1, 11):
        shift(peft_model)
        real_engine.verify = "probe" if update in (1, 10) else "off"
        real_engine.update_weights(peft_model)
        if update in (1, 10):
            assert largest_difference(peft_model, real_engine.generate(PROMPTS, sampling)) < 1e-4
    assert all(torch.equal(base[name], peft_model.state_dict()[name]) for name in base)


def test_an_adapter_that_unties_the_head_is_refused(real_engine, model):
    """This server's model has no head of its own."""
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(model, LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    with pytest.raises(RuntimeError, match="lm_head.weight.*tie_word_embeddings=False"):
        real_engine.update_weights(peft_model)


def test_two_trainers_on_one_server(real_engine, model, server):
    real_engine.update_weights(model)
    other = make_engine(server.url, request_timeout=60.0)
    shift(model)
    other.update_weights(model)
    with pytest.raises(RuntimeError, match=f"another trainer uses the server {server.url}.*{other.owner}"):
        real_engine.generate(PROMPTS, SamplingParams(max_completion_length=4))
    with pytest.raises(RuntimeError, match="another trainer"):
        real_engine.update_weights(model)
    assert len(other.generate(PROMPTS, SamplingParams(max_completion_length=4))) == 4
    other.close()


def test_a_wrong_key_is_named(server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "another")
    with pytest.raises(RuntimeError, match="answered 401.*VLLM_API_KEY"):
        make_engine(server.url)


def test_the_client_with_the_real_server(server, model, monkeypatch, tokenizer):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    client = VLLMClient(base_url=server.url)
    client.init_communicator()
    shift(model)
    client.update_model_params(model)
    answer = client.generate([[5, 6, 7], [8, 9]], n=2, max_tokens=6, logprobs=2)
    assert answer["prompt_ids"] == [[5, 6, 7], [8, 9]]
    scored = client.get_sequence_logprobs([[5, 6, 7, *ids] for ids in answer["completion_ids"][:2]], [3, 3], 2)
    for at in range(2):
        for place, ids in enumerate(answer["completion_ids"][at]):
            sampled = answer["logprob_token_ids"][at][place].index(ids)
            one, other = answer["logprobs"][at][place][sampled], scored["actual_logprobs"][at][place][0]
            assert abs(one - other) < 1e-4
            assert scored["logprobs"][at][place] == pytest.approx(answer["logprobs"][at][place][:2], abs=1e-4)
    messages = [{"role": "user", "content": "what is 12 plus 30?"}]
    chat = client.chat([messages], max_tokens=3)
    assert chat["prompt_ids"] == [tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]]
    assert len(chat["completion_ids"][0]) <= 3
    assert client.generate(["hello world"], max_tokens=2)["prompt_ids"] == [tokenizer("hello world")["input_ids"]]
    client.reset_prefix_cache()
    assert client.get_world_size() == 1
    with pytest.raises(Exception, match="whole updates only"):
        client.update_named_param("model.norm.weight", torch.ones(64))
    client.close_communicator()
