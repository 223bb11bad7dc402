"""vLLM in this process, in float32 and eager: its numbers are the trainer's to 1e-4."""

import copy
import gc
import json
import random
import re
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from accelerate import Accelerator

from tests.conftest import build_model, build_tokenizer
from tests.two_processes import run_on_two_processes

pytest.importorskip("vllm")

from trl.rollouts import vllm_adapter, vllm_colocate
from trl.rollouts.transformers_engine import TransformersEngine
from trl.rollouts.types import RolloutEngine, SamplingParams
from trl.rollouts.vllm_colocate import VLLMColocateEngine

TOLERANCE = 1e-4
LENGTH = 256  # of the engines' context: two blocks of their cache
PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9], [30, 31, 32, 33, 34]]
SAMPLING = SamplingParams(max_completion_length=10, with_logps=True)
SHAPED = SamplingParams(max_completion_length=10, with_logps=True, temperature=0.7, top_p=0.9)


def make_model(tied, seed=0):
    # vLLM's attention on a CPU has no smaller heads than of 32
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return build_model(tie_word_embeddings=tied, seed=seed, **sizes).eval()


def make_engine(model, tokenizer, **settings):
    settings = {"sampling": SAMPLING, "max_model_length": LENGTH, "max_num_seqs": 16, **settings}
    eos = [tokenizer.eos_token_id]
    return VLLMColocateEngine(
        model, Accelerator(cpu=True), tokenizer, pad_token_id=tokenizer.pad_token_id, eos_token_ids=eos, **settings
    )


@pytest.fixture(scope="module")
def engines():
    """The engine of a kind, with the kind's model. One at a time: the last one ends when another kind is asked for."""
    kinds = {
        "tied": (True, {}),
        "untied, shaped": (False, {"sampling": SHAPED}),
        "regex": (True, {"structured_outputs_regex": "(ab){2,4}"}),
    }
    alive = {}

    def engine_of(kind):
        if kind not in alive:
            for engine, _ in alive.values():
                engine.close()
                assert engine.llm is None
            alive.clear()
            if kind is None:
                return None
            tied, settings = kinds[kind]
            model = make_model(tied)
            alive[kind] = make_engine(model, build_tokenizer(), **settings), model
        return alive[kind]

    yield engine_of
    engine_of(None)


@pytest.fixture
def tied(engines):
    """An engine with fresh weights of a model with a tied head, and a copy of the model that a test may train."""
    engine, model = engines("tied")
    return _ready(engine, copy.deepcopy(model))


@pytest.fixture
def shaped(engines):
    """The same with a head of its own, built for a temperature and top-p."""
    engine, model = engines("untied, shaped")
    return _ready(engine, copy.deepcopy(model))


@pytest.fixture
def regex(engines):
    """The same with a regular expression that all completions match."""
    engine, model = engines("regex")
    return _ready(engine, copy.deepcopy(model))


def _ready(engine, model):
    engine.verify = "probe"
    engine.update_weights(model)
    return engine, model


def logps_of(model, rollout, temperature=1.0):
    """Log-probs of a completion over the whole vocabulary, by Transformers in float32."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    with torch.no_grad():
        logps = torch.log_softmax(model.eval()(ids).logits[0] / temperature, -1)
    start = len(rollout.prompt_ids) - 1
    return [logps[start + index, token].item() for index, token in enumerate(rollout.completion_ids)]


def largest_difference(model, rollouts, temperature=1.0):
    differences = [
        abs(one - other)
        for rollout in rollouts
        for one, other in zip(rollout.sampled_logps, logps_of(model, rollout, temperature), strict=True)
    ]
    assert differences
    return max(differences)


def completions(rollouts):
    return [rollout.completion_ids for rollout in rollouts]


def perturb(model, generator, scale=0.02):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def test_it_is_an_engine(tied):
    engine, _ = tied
    assert isinstance(engine, RolloutEngine)
    assert engine.max_model_length == LENGTH
    assert engine.dtype is torch.float32


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_log_probs_are_those_of_the_whole_vocabulary(tied, temperature):
    """What the engine says of the tokens it sampled is what the loss will compute of them."""
    engine, model = tied
    torch.manual_seed(0)
    sampling = SamplingParams(max_completion_length=10, with_logps=True, temperature=temperature)
    assert largest_difference(model, engine.generate(PROMPTS * 3, sampling), temperature) < TOLERANCE


def test_greedy_completions_are_those_of_transformers(tied):
    """At temperature 0 both engines give the same tokens, for equal and unequal prompts."""
    engine, model = tied
    tokenizer = build_tokenizer()
    other = TransformersEngine(
        model, engine.accelerator, pad_token_id=tokenizer.pad_token_id, eos_token_ids=[tokenizer.eos_token_id]
    )
    sampling = SAMPLING.greedy()
    model.model.embed_tokens.weight.data.mul_(torch.linspace(0.2, 3, 64))  # or every token repeats itself
    engine.update_weights(model)
    found = completions(engine.generate(PROMPTS, sampling))
    assert found == completions(other.generate(PROMPTS, sampling))
    assert found[0] == found[1] != found[2]


def test_log_probs_only_where_they_are_wanted(tied):
    engine, _ = tied
    (rollout,) = engine.generate([[5, 6]], SamplingParams(max_completion_length=3))
    assert rollout.sampled_logps is None
    assert len(rollout.completion_ids) == 3


def test_random_numbers_come_from_torchs_generator(tied):
    """A resumed run, which restores torch's generator, samples what it would have sampled; a seed of its own wins."""
    engine, _ = tied
    torch.manual_seed(5)
    first, second = completions(engine.generate(PROMPTS, SAMPLING)), completions(engine.generate(PROMPTS, SAMPLING))
    torch.manual_seed(5)
    assert completions(engine.generate(PROMPTS, SAMPLING)) == first
    state = torch.random.get_rng_state()
    assert completions(engine.generate(PROMPTS, SAMPLING)) == second != first
    torch.random.set_rng_state(state)
    assert completions(engine.generate(PROMPTS, SAMPLING)) == second

    seeded = SamplingParams(max_completion_length=10, seed=3)
    state = torch.random.get_rng_state()
    one = completions(engine.generate(PROMPTS, seeded))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(9)
    assert completions(engine.generate(PROMPTS, seeded)) == one


def test_rows_and_completions_of_a_prompt_stay_in_order(tied):
    """`n` rollouts for each row, also where rows repeat a prompt; all of them differ, none is lost or moved."""
    engine, _ = tied
    prompts = [[5, 6, 7], [5, 6, 7], [8, 9], [5, 6, 7]]
    sampling = SamplingParams(max_completion_length=10, n=2)
    rollouts = engine.generate(prompts, sampling)
    assert [rollout.prompt_ids for rollout in rollouts] == [prompt for prompt in prompts for _ in range(2)]
    assert len({tuple(rollout.completion_ids) for rollout in rollouts}) == 8


def test_greedy_completions_of_a_repeated_prompt(tied):
    """vLLM refuses several greedy completions: one is made, and each row has it."""
    engine, _ = tied
    sampling = SamplingParams(max_completion_length=4, temperature=0.0, n=2)
    rollouts = engine.generate([[5, 6], [5, 6], [7, 8]], sampling)
    assert len(rollouts) == 6
    assert len({tuple(ids) for ids in completions(rollouts[:4])}) == 1
    assert rollouts[0].completion_ids is not rollouts[1].completion_ids


def test_no_prompts(tied):
    engine, _ = tied
    assert engine.generate([], SAMPLING) == []


def test_a_prompt_without_room(tied):
    """A prompt that fills the context is an error with its length; nothing of the batch stays in the engine."""
    engine, model = tied
    for sampling in (SAMPLING, SamplingParams(max_completion_length=None)):
        with pytest.raises(ValueError, match="260 tokens leaves no room .* 256 tokens"):
            engine.generate([[5, 6], [7] * 260], sampling)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    engine.update_weights(model)
    assert len(engine.generate([[5, 6]], SAMPLING)) == 1


def test_completions_up_to_the_end_of_the_context(tied):
    """`max_completion_length=None` fills the context, whatever room a prompt leaves."""
    engine, _ = tied
    tokenizer = build_tokenizer()
    no_end = {"logit_bias": {tokenizer.eos_token_id: -100}}
    rollouts = engine.generate(
        [[5] * 250, [6] * 240], SamplingParams(max_completion_length=None, generation_kwargs=no_end)
    )
    assert [len(rollout.completion_ids) for rollout in rollouts] == [6, 16]
    assert all(rollout.is_truncated for rollout in rollouts)


def test_a_stop_token_ends_a_completion_and_is_kept(tied):
    """With its log-prob; what has none is truncated."""
    engine, _ = tied
    eos = build_tokenizer().eos_token_id
    likely = SamplingParams(max_completion_length=200, with_logps=True, generation_kwargs={"logit_bias": {eos: 4}})
    rollouts = engine.generate([[5, 6]] * 8, likely)
    for rollout in rollouts:
        assert not rollout.is_truncated
        assert rollout.completion_ids.index(eos) == len(rollout.completion_ids) - 1
        assert len(rollout.sampled_logps) == len(rollout.completion_ids)
    assert max(map(len, completions(rollouts))) > 1
    cut = engine.generate(
        [[5, 6]], SamplingParams(max_completion_length=2, generation_kwargs={"logit_bias": {eos: -100}})
    )
    assert cut[0].is_truncated


def test_every_stop_token_ends_a_completion(tied, monkeypatch):
    """Models have several, such as an end of turn: each is as good as the tokenizer's own."""
    engine, _ = tied
    monkeypatch.setattr(engine, "eos_token_ids", [*engine.eos_token_ids, 9])
    sampling = SamplingParams(max_completion_length=4, generation_kwargs={"logit_bias": {9: 100}})
    (rollout,) = engine.generate([[5]], sampling)
    assert rollout.completion_ids == [9]
    assert not rollout.is_truncated


def test_generation_kwargs_are_vllms(tied):
    """Bias on single tokens, a least length, allowed tokens: settings that go through as they are."""
    engine, _ = tied
    eos = build_tokenizer().eos_token_id

    def ids(**kwargs):
        return engine.generate([[5, 6]], SamplingParams(max_completion_length=8, generation_kwargs=kwargs))[
            0
        ].completion_ids

    assert ids(logit_bias={17: 100}) == [17] * 8
    assert ids(logit_bias={eos: 100}) == [eos]
    late = ids(logit_bias={eos: 100}, min_tokens=5)
    assert len(late) == 6 and late[-1] == eos
    assert set(ids(allowed_token_ids=[20, 21])) <= {20, 21}
    assert len(ids(max_tokens=2)) == 2


def test_json_schema(tied):
    """`generation_kwargs["structured_outputs"]`, as plain settings: every completion is what the schema says."""
    engine, _ = tied
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    kwargs = {"structured_outputs": {"json": schema}}
    rollouts = engine.generate([[5, 6]] * 3, SamplingParams(max_completion_length=200, generation_kwargs=kwargs))
    tokenizer = build_tokenizer()
    for rollout in rollouts:
        if not rollout.is_truncated:
            assert json.loads(tokenizer.decode(rollout.completion_ids, skip_special_tokens=True))["a"] in (1, 2)
    text = [tokenizer.decode(rollout.completion_ids).lstrip() for rollout in rollouts]
    assert all(one.startswith("{") for one in text)


def test_nothing_else_of_the_process_changes(tied):
    """vLLM seeds generators and sets the number of threads: not ours."""
    engine, model = tied
    seeded = SamplingParams(max_completion_length=4, seed=1)

    def settings():
        return (
            random.getstate(),
            repr(numpy.random.get_state()),
            torch.random.get_rng_state().tolist(),
            torch.get_num_threads(),
        )

    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    before = settings()
    engine.generate(PROMPTS, seeded)
    engine.update_weights(model)
    assert settings() == before
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_sleep_has_no_effect_on_a_cpu(tied):
    """vLLM keeps its memory there; the engine says so instead of losing its weights."""
    engine, _ = tied
    with pytest.warns(UserWarning, match="no effect on a CPU"):
        assert not vllm_colocate._can_sleep(engine.accelerator)
    engine.sleep()
    engine.wake()
    assert len(engine.generate([[5, 6]], SAMPLING)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def train_a_step(model, optimizer, generator):
    ids = torch.randint(512, (4, 12), generator=generator)
    optimizer.zero_grad()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def check_while_training(engine, model, temperature, sampling):
    """After 1, 10 and 50 optimizer steps, each with an update: the engine's log-probs are the trainer's."""
    before = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for step in range(1, 51):
        train_a_step(model, optimizer, generator)
        engine.verify = "full" if step in (1, 10, 50) else "off"
        engine.update_weights(model)
        if step in (1, 10, 50):
            found[step] = largest_difference(model, engine.generate(PROMPTS, sampling), temperature)
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert (after - before).abs().max() > 0.05
    assert all(value < TOLERANCE for value in found.values()), found


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))


@pytest.mark.parametrize("adapted", [False, True])
def test_agreement_over_training_with_a_tied_head(tied, adapted):
    engine, model = tied
    if adapted:
        pytest.importorskip("peft")
        model = lora(model)
    check_while_training(engine, model, 1.0, SAMPLING)


def test_many_updates_of_an_adapter_leave_the_base(tied):
    """A thousand weight syncs: the base and the adapter are bit-identical, and the engine still has both."""
    pytest.importorskip("peft")
    engine, model = tied
    model = lora(model)
    perturb(model, torch.Generator().manual_seed(1), 0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine.verify = "off"
    for _ in range(1000):
        engine.update_weights(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert largest_difference(model, engine.generate(PROMPTS, SAMPLING)) < TOLERANCE


@pytest.mark.parametrize("level", ["probe", "full"])
def test_a_stale_tied_head_is_noticed_and_repaired(tied, monkeypatch, caplog, level):
    """vLLM's own update leaves a packed copy of the old head; where ours does too, once, it is loaded again."""
    engine, model = tied
    engine.verify = level
    refresh, calls = vllm_adapter.refresh_tied_head, []

    def forgetful(inner):
        calls.append(1)
        return refresh(inner) if len(calls) > 1 else []

    monkeypatch.setattr(vllm_adapter, "refresh_tied_head", forgetful)
    perturb(model, torch.Generator().manual_seed(2), 0.3)
    engine.update_weights(model)
    assert len(calls) == 2
    assert largest_difference(model, engine.generate(PROMPTS, SAMPLING)) < TOLERANCE


def test_a_head_that_stays_stale_is_an_error(tied, monkeypatch):
    engine, model = tied
    monkeypatch.setattr(vllm_adapter, "refresh_tied_head", lambda inner: [])
    perturb(model, torch.Generator().manual_seed(2), 0.3)
    with pytest.raises(RuntimeError, match=r"The vLLM engine in this process does not have the trainer's weights"):
        engine.update_weights(model)
    engine.verify = "full"
    with pytest.raises(RuntimeError, match=r"these layers differ: .*lm_head"):
        engine.update_weights(model)
    engine.verify = "off"
    engine.update_weights(model)
    assert largest_difference(model, engine.generate(PROMPTS, SAMPLING)) > 0.01  # what the check keeps from training


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.layers.0.self_attn.k_proj.weight"]
)
def test_wrong_weights_are_an_error_that_names_the_layer(tied, monkeypatch, name):
    """A single weight that does not arrive as it is."""
    engine, model = tied
    engine.verify = "full"
    right = vllm_colocate.iter_weights

    def wrong(*args):
        for key, tensor in right(*args):
            yield key, tensor * 1.3 if key == name else tensor

    monkeypatch.setattr(vllm_colocate, "iter_weights", wrong)
    with pytest.raises(RuntimeError, match="these layers differ: .*" + re.escape(name)):
        engine.update_weights(model)


def test_a_weight_that_is_missing_is_an_error(tied, monkeypatch):
    """What vLLM does not get stays the old one, and it says nothing: the check does."""
    engine, model = tied
    right = vllm_colocate.iter_weights
    missing = "model.layers.0.mlp.gate_proj.weight"
    monkeypatch.setattr(
        vllm_colocate, "iter_weights", lambda *args: (pair for pair in right(*args) if pair[0] != missing)
    )
    perturb(model, torch.Generator().manual_seed(3), 0.3)
    with pytest.raises((RuntimeError, ValueError)):
        engine.update_weights(model)


def test_cached_prompts_do_not_survive_an_update(tied, monkeypatch):
    """Keys and values of a long prompt are reused until the weights change, and not after."""
    engine, model = tied
    long = [[token % 400 + 4 for token in range(200)]]
    outputs = []
    generate = vllm_adapter.generate
    monkeypatch.setattr(vllm_adapter, "generate", lambda *args: outputs.append(generate(*args)) or outputs[-1])
    engine.generate(long, SAMPLING)
    engine.generate(long, SAMPLING)
    assert outputs[-1][0].num_cached_tokens > 100
    perturb(model, torch.Generator().manual_seed(4), 0.3)
    engine.update_weights(model)
    outputs.clear()
    assert largest_difference(model, engine.generate(long, SAMPLING)) < TOLERANCE
    assert outputs[-1][0].num_cached_tokens == 0

    engine.verify = "off"  # and without the reset, they would have: that is what is tested
    monkeypatch.setattr(vllm_adapter, "reset_caches", lambda engine: None)
    perturb(model, torch.Generator().manual_seed(5), 0.3)
    engine.update_weights(model)
    assert largest_difference(model, engine.generate(long, SAMPLING)) > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# An engine whose sampling is shaped: raw log-probs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.2},
        {"repetition_penalty": 1.3},
        {"generation_kwargs": {"allowed_token_ids": list(range(20, 40))}},
    ],
)
def test_raw_log_probs_at_a_temperature(shaped, settings):
    """Where not every token may be drawn, log-probs are still the loss's: of all tokens, at the temperature."""
    engine, model = shaped
    sampling = SamplingParams(max_completion_length=10, with_logps=True, temperature=0.7, **settings)
    assert largest_difference(model, engine.generate(PROMPTS * 2, sampling), 0.7) < TOLERANCE


def test_top_k_is_of_the_scaled_logits(shaped):
    """The temperature in front of everything else changes no draw: the most probable token is what greedy takes."""
    engine, _ = shaped
    one = SamplingParams(max_completion_length=10, temperature=0.7, top_k=1, with_logps=True)
    assert completions(engine.generate(PROMPTS, one)) == completions(engine.generate(PROMPTS, SHAPED.greedy()))


@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_draws_are_at_the_temperature(shaped, temperature):
    """Also at another one than the engine was built for, as an evaluation's is: frequencies of the most probable token."""
    engine, model = shaped
    model.lm_head.weight.data.mul_(6)
    engine.update_weights(model)
    sampling = SamplingParams(max_completion_length=1, temperature=temperature, top_k=2, seed=0)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1].topk(2)
    expected = torch.softmax(logits.values / temperature, -1)[0].item()
    drawn = [rollout.completion_ids[0] for rollout in engine.generate([[5, 6, 7]] * 400, sampling)]
    assert set(drawn) <= set(logits.indices.tolist())
    share = drawn.count(logits.indices[0].item()) / len(drawn)
    assert abs(share - expected) < 4 * (expected * (1 - expected) / len(drawn)) ** 0.5


def test_agreement_over_training_with_a_head_of_its_own(shaped):
    engine, model = shaped
    check_while_training(engine, model, 0.7, SHAPED)


def test_log_probs_that_vllm_cannot_tell_are_not_made_up(shaped):
    """A bias is added to the logits after the temperature was put in: a warning, and no log-probs."""
    engine, _ = shaped
    biased = SamplingParams(with_logps=True, temperature=0.7, generation_kwargs={"logit_bias": {5: 1.0}})
    with pytest.warns(UserWarning, match="logit_bias.*there is no correction"):
        assert engine._prepare_logps(biased, "raw_logprobs") == (1.0, False)


# ---------------------------------------------------------------------------------------------------------------------
# An engine with a regular expression
# ---------------------------------------------------------------------------------------------------------------------


def test_completions_match_the_regular_expression(regex):
    """Every one of them; and its log-probs are those of the whole vocabulary."""
    engine, model = regex
    rollouts = engine.generate([[5, 6, 7]] * 6, SamplingParams(max_completion_length=40, with_logps=True))
    tokenizer = build_tokenizer()
    for rollout in rollouts:
        text = tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
        assert re.fullmatch("(ab){2,4}", text), text
    assert largest_difference(model, rollouts) < TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# Beginning and end
# ---------------------------------------------------------------------------------------------------------------------


def test_an_engine_after_another(engines):
    """Building one leaves generators and threads alone; a dropped one is ended before the next, and the next one is right."""
    engines("tied")  # what is imported with the first one may keep frames of it, in exceptions for missing modules
    engines(None)
    model, tokenizer = make_model(True), build_tokenizer()
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    before = random.getstate(), repr(numpy.random.get_state()), torch.random.get_rng_state(), torch.get_num_threads()
    dropped = make_engine(model, tokenizer)
    after = random.getstate(), repr(numpy.random.get_state()), torch.random.get_rng_state(), torch.get_num_threads()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2]) and before[3] == after[3]
    dropped.update_weights(model)
    alive = weakref.ref(dropped)
    del dropped
    gc.collect()
    assert alive() is None
    assert len(vllm_colocate._abandoned) == 1  # vLLM's part waits for a safe moment

    other = make_model(True, seed=1)
    engine = make_engine(other, tokenizer, max_num_seqs=4)
    assert not vllm_colocate._abandoned
    try:
        engine.update_weights(other)
        assert largest_difference(other, engine.generate(PROMPTS, SAMPLING)) < TOLERANCE
    finally:
        engine.close()
    engine.close()  # a second time: nothing to do


def test_eight_bits_are_refused():
    """Before vLLM is started."""
    model = make_model(True)
    model.is_loaded_in_8bit = True
    with pytest.raises(ValueError, match="load_in_4bit"):
        make_engine(model, build_tokenizer())


def test_processes_that_cannot_share_an_engine():
    with pytest.raises(ValueError, match=r"must divide the number of processes, 1.*\"server\""):
        make_engine(make_model(True), build_tokenizer(), tensor_parallel_size=2)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------

_TWO_PROCESSES = """
import sys
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from tests.conftest import build_model, build_tokenizer
from tests.two_processes import run_on_two_processes
from trl.models.distributed import prepare_fsdp
from trl.rollouts.types import SamplingParams
from trl.rollouts.vllm_colocate import VLLMColocateEngine

size, sharded = int(sys.argv[1]), sys.argv[2] == "sharded"
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
rank, tokenizer = accelerator.process_index, build_tokenizer()


def build(seed):
    return build_model(tie_word_embeddings=True, seed=seed, hidden_size=64, num_attention_heads=2, num_key_value_heads=2)


def prepare(model):
    if not sharded:
        return accelerator.prepare(model)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"])
    model = prepare_fsdp(model, accelerator)
    assert any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return model


def check(plain, prompts):
    rollouts = engine.generate(prompts, sampling)
    assert [rollout.prompt_ids for rollout in rollouts] == prompts
    for rollout in rollouts:
        ids, start = rollout.prompt_ids + rollout.completion_ids, len(rollout.prompt_ids)
        with torch.no_grad():
            logps = torch.log_softmax(plain.eval()(torch.tensor([ids])).logits[0] / 0.8, -1)
        expected = logps[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        assert (torch.tensor(rollout.sampled_logps) - expected).abs().max() < 1e-4
    return [rollout.completion_ids for rollout in rollouts]


sampling = SamplingParams(max_completion_length=6, with_logps=True, temperature=0.8)
engine = VLLMColocateEngine(prepare(build(0)), accelerator, tokenizer, sampling=sampling, pad_token_id=3,
    eos_token_ids=[tokenizer.eos_token_id], tensor_parallel_size=size, max_model_length=64, max_num_seqs=8)
from vllm.distributed import get_tensor_model_parallel_world_size
assert get_tensor_model_parallel_world_size() == size

# another number of prompts on each process, the same one twice on both
prompts = [[5, 6, 7], [5, 6, 7]] if rank == 0 else [[8, 9], [5, 6, 7], [30, 31]]
for seed in (0, 1):
    engine.update_weights(prepare(build(seed)))
    torch.manual_seed(7)
    found = check(build(seed), prompts)
    torch.manual_seed(7)
    assert check(build(seed), prompts) == found
everyone = [None, None]
torch.distributed.all_gather_object(everyone, found)
assert len({tuple(ids) for part in everyone for ids in part}) == 5  # no two processes draw the same numbers
engine.close()
total = torch.ones(1)
torch.distributed.all_reduce(total)
assert total.item() == 2  # the trainer's group is still there
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "model"), [(1, "whole"), (2, "whole"), (2, "sharded")])
def test_on_two_processes(size, model):
    """An engine for each process, or one cut over both: each gets completions of its own prompts, by whole weights."""
    try:
        outputs = run_on_two_processes(_TWO_PROCESSES, str(size), model, seconds=300)
    finally:
        for left in Path("/dev/shm").glob("-tp:0-*cpushm_*"):  # by processes that end at once; the next run's name too
            left.unlink()
    assert all(output.strip().endswith("done") for output in outputs)
