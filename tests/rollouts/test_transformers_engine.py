import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from tests.conftest import build_model
from trl.ops.scoring import score_tokens
from trl.rollouts.continuous_batching_engine import ContinuousBatchingEngine
from trl.rollouts.transformers_engine import TransformersEngine, cut_after_eos, stop_token_ids
from trl.rollouts.types import Prompt, RolloutEngine, SamplingParams

PAD, EOS = 0, 1
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
GREEDY = SamplingParams(max_completion_length=6, temperature=0.0)


def make_engine(model, **options):
    return TransformersEngine(model, Accelerator(cpu=True), pad_token_id=PAD, eos_token_ids=[EOS], **options)


def make_batching_engine(model, **options):
    config = {"num_blocks": 16, "page_size": 32, "max_batch_tokens": 64, **options.pop("config", {})}
    accelerator = Accelerator(cpu=True)
    return ContinuousBatchingEngine(
        model, accelerator, pad_token_id=PAD, eos_token_ids=[EOS], config=config, **options
    )


def greedy_one_by_one(model, prompts, length):
    """Argmax of the model's logits, a whole forward per token, without padding and cache."""
    model.eval()
    completions = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + length and ids[-1] != EOS:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        completions.append(ids[len(prompt) :])
    return completions


@pytest.mark.parametrize("make", [make_engine, make_batching_engine])
def test_greedy_is_the_models_argmax(make, tiny_model):
    engine = make(tiny_model)
    assert isinstance(engine, RolloutEngine)
    rollouts = engine.generate(PROMPTS, GREEDY)
    assert [rollout.prompt_ids for rollout in rollouts] == PROMPTS
    assert [rollout.completion_ids for rollout in rollouts] == greedy_one_by_one(tiny_model, PROMPTS, 6)
    assert all(rollout.is_truncated and rollout.sampled_logps is None for rollout in rollouts)


@pytest.mark.parametrize("make", [make_engine, make_batching_engine])
def test_tokens_after_the_first_eos_are_removed_and_it_is_kept(make, tiny_model):
    expected = greedy_one_by_one(tiny_model, PROMPTS, 6)
    engine = make(tiny_model)
    engine.eos_token_ids = [expected[1][2]]  # as if this token ended a sequence
    rollouts = engine.generate(PROMPTS, GREEDY)
    assert rollouts[1].completion_ids == cut_after_eos(expected[1], engine.eos_token_ids)
    assert rollouts[1].completion_ids[-1] == expected[1][2]
    assert not rollouts[1].is_truncated


@pytest.mark.parametrize("make", [make_engine, make_batching_engine])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logps_are_those_of_the_scorer(make, tiny_model, temperature):
    sampling = SamplingParams(max_completion_length=6, temperature=temperature, with_logps=True)
    torch.manual_seed(3)
    tiny_model.eval()
    for rollout in make(tiny_model).generate(PROMPTS, sampling):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        labels = ids.clone()
        labels[:, : len(rollout.prompt_ids)] = -100
        scores = score_tokens(tiny_model, {"input_ids": ids, "labels": labels}, temperature=temperature)
        expected = scores.logps[0, len(rollout.prompt_ids) - 1 :]
        torch.testing.assert_close(torch.tensor(rollout.sampled_logps), expected, atol=1e-4, rtol=1e-4)


def test_scores_are_freed_as_generation_goes(tiny_model, monkeypatch):
    """Those of all steps together are tokens x rows x vocabulary; none is left after its step."""
    outputs, generate = [], tiny_model.generate
    monkeypatch.setattr(tiny_model, "generate", lambda **inputs: outputs.append(generate(**inputs)) or outputs[-1])
    make_engine(tiny_model).generate(PROMPTS, SamplingParams(4, with_logps=True))
    assert [scores.untyped_storage().size() for scores in outputs[0].scores] == [0] * 4


def test_sampled_logps_are_those_of_the_truncated_distribution(tiny_model):
    """With one token left to choose from, its log-probability is 0."""
    rollouts = make_engine(tiny_model).generate(PROMPTS, SamplingParams(4, top_k=1, with_logps=True))
    assert all(value == 0 for rollout in rollouts for value in rollout.sampled_logps)


@pytest.mark.parametrize("make", [make_engine, make_batching_engine])
def test_the_generators_state_decides(make, tiny_model):
    engine = make(tiny_model)
    sampling = SamplingParams(max_completion_length=8, n=2)

    def sample():
        return [rollout.completion_ids for rollout in engine.generate(PROMPTS, sampling)]

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = sample(), sample()
    assert first != second
    torch.set_rng_state(state)
    assert [sample(), sample()] == [first, second]


@pytest.mark.parametrize("make", [make_engine, make_batching_engine])
def test_a_seed_leaves_the_generator_alone(make, tiny_model):
    engine, sampling = make(tiny_model), SamplingParams(max_completion_length=8, seed=5)
    state = torch.get_rng_state()
    first = engine.generate(PROMPTS, sampling)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert engine.generate(PROMPTS, sampling) == first


def test_n_completions_per_prompt_stand_side_by_side(tiny_model):
    rollouts = make_engine(tiny_model).generate(PROMPTS, SamplingParams(max_completion_length=4, n=2))
    assert [rollout.prompt_ids for rollout in rollouts] == [prompt for prompt in PROMPTS for _ in range(2)]


def test_small_batches_give_the_same_greedy_completions(tiny_model):
    expected = make_engine(tiny_model).generate(PROMPTS, GREEDY)
    assert make_engine(tiny_model, max_batch_rows=1).generate(PROMPTS, GREEDY) == expected
    assert make_engine(tiny_model, max_batch_rows=2).generate(PROMPTS, GREEDY) == expected


def test_the_models_own_sampling_settings_do_not_count(tiny_model):
    """A published `generation_config.json` with `min_p` or `top_k` would make the policy another than the loss takes it for."""
    config = tiny_model.generation_config
    config.do_sample, config.min_p, config.top_k, config.no_repeat_ngram_size = True, 1.0, 1, 1
    torch.manual_seed(0)
    rollouts = make_engine(tiny_model).generate([[5, 6]] * 20, SamplingParams(max_completion_length=2))
    assert len({tuple(rollout.completion_ids) for rollout in rollouts}) > 10
    assert (config.min_p, config.top_k, config.no_repeat_ngram_size) == (1.0, 1, 1)


def test_generation_kwargs_win(tiny_model):
    sampling = SamplingParams(max_completion_length=9, generation_kwargs={"max_new_tokens": 2, "do_sample": False})
    rollouts = make_engine(tiny_model).generate(PROMPTS, sampling)
    assert [rollout.completion_ids for rollout in rollouts] == greedy_one_by_one(tiny_model, PROMPTS, 2)


def test_suppressed_tokens_are_never_sampled(tiny_model):
    unwanted = greedy_one_by_one(tiny_model, PROMPTS[:1], 1)[0][0]
    rollouts = make_engine(tiny_model, suppress_tokens=[unwanted]).generate(PROMPTS, GREEDY)
    assert unwanted not in rollouts[0].completion_ids


def test_the_model_is_as_before(tiny_model):
    """Training mode, checkpointing and weights: sampling leaves no trace, dropout does not touch it."""
    model = build_model(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    rollouts = make_engine(model).generate(PROMPTS, GREEDY)
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing
    assert [rollout.completion_ids for rollout in rollouts] == greedy_one_by_one(model, PROMPTS, 6)


@pytest.mark.parametrize("make", [make_engine, make_batching_engine])
def test_an_adapter_takes_part(make, tiny_model):
    adapted = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    plain = make(adapted).generate(PROMPTS, GREEDY)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    rollouts = make(adapted).generate(PROMPTS, GREEDY)
    assert rollouts != plain
    assert [rollout.completion_ids for rollout in rollouts] == greedy_one_by_one(adapted, PROMPTS, 6)


@pytest.mark.parametrize("adapted", [False, True])
def test_it_samples_in_the_precision_of_training(tiny_model, adapted):
    """All of it, prompt and tokens; `generate` of an adapter does not go through the forward that training wraps."""
    projection = tiny_model.model.layers[0].self_attn.o_proj
    model = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj", "v_proj"])) if adapted else tiny_model
    engine = make_engine(model)
    engine.accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    dtypes = []
    projection.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    engine.generate(PROMPTS, GREEDY)
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) >= GREEDY.max_completion_length


def test_no_length_means_the_context(tiny_model):
    engine = make_engine(tiny_model, max_model_length=8)
    rollouts = engine.generate([[5, 6, 7]], SamplingParams(max_completion_length=None, temperature=0.0))
    assert len(rollouts[0].completion_ids) == 5
    with pytest.raises(ValueError, match="no room for a completion in a context of 8"):
        engine.generate([[5] * 8], SamplingParams(max_completion_length=None))
    assert make_engine(tiny_model).max_model_length == 512


@pytest.mark.parametrize(
    ("of_the_model", "expected"), [(None, [2]), (5, [2, 5]), ([5, 6], [2, 5, 6]), ([5, 2], [5, 2]), (2, [2])]
)
def test_stop_tokens_are_the_models_and_the_tokenizers(tiny_model, tokenizer, of_the_model, expected):
    assert tokenizer.eos_token_id == 2
    tiny_model.generation_config.eos_token_id = of_the_model
    assert stop_token_ids(tiny_model, tokenizer) == expected


def test_no_prompts_no_rollouts(tiny_model):
    assert make_engine(tiny_model).generate([], GREEDY) == []
    assert make_batching_engine(tiny_model).generate([], GREEDY) == []


def test_a_process_without_rows_takes_part_where_weights_are_sharded(tiny_model, monkeypatch):
    """Each forward gathers parameters from all processes; one that stays away would leave the others waiting."""
    engine = make_engine(tiny_model)
    calls = []
    monkeypatch.setattr(TransformersEngine, "_forwards_together", True)
    generate = tiny_model.generate
    monkeypatch.setattr(
        tiny_model,
        "generate",
        lambda **inputs: calls.append(inputs.pop("synced_gpus")) or generate(**inputs),
    )
    assert engine.generate([], GREEDY) == []
    assert calls == [True]


class TestContinuousBatching:
    def test_reads_text_only(self, tiny_model):
        with pytest.raises(ValueError, match="text only"):
            make_batching_engine(tiny_model, is_vision_model=True)
        with pytest.raises(ValueError, match="text only"):
            make_batching_engine(tiny_model).generate([Prompt([1], images=["image"])], GREEDY)

    def test_an_unknown_setting_is_named(self, tiny_model):
        with pytest.raises(ValueError, match="max_memory_fraction"):
            make_batching_engine(tiny_model, config={"max_memory_fraction": 0.5})

    def test_half_of_the_memory_by_default(self, tiny_model):
        assert make_batching_engine(tiny_model).config["max_memory_percent"] == 0.5

    def test_weights_come_back_bit_by_bit(self, tiny_model):
        before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
        pointers = [parameter.data_ptr() for parameter in tiny_model.parameters()]
        seen = []
        tiny_model.lm_head.register_forward_pre_hook(
            lambda module, args: seen.append((args[0].dtype, module.weight.dtype))
        )
        rollouts = make_batching_engine(tiny_model, dtype=torch.bfloat16).generate(PROMPTS, GREEDY)
        assert all(len(rollout.completion_ids) == 6 for rollout in rollouts)
        assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
        assert [parameter.data_ptr() for parameter in tiny_model.parameters()] == pointers
        assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())

    def test_a_failed_request_costs_one_sample(self, tiny_model, monkeypatch):
        generate_batch = tiny_model.generate_batch

        def failing(*args, **kwargs):
            outputs = generate_batch(*args, **kwargs)
            list(outputs.values())[1].error = "out of blocks"
            return outputs

        monkeypatch.setattr(tiny_model, "generate_batch", failing)
        good, bad, _ = make_batching_engine(tiny_model).generate(PROMPTS, GREEDY)
        assert (good.error, bad.error) == (None, "out of blocks")
        assert bad.generated_length == 0

    def test_lost_requests_end_the_run(self, tiny_model, monkeypatch):
        monkeypatch.setattr(tiny_model, "generate_batch", lambda *args, **kwargs: {})
        with pytest.raises(RuntimeError, match="0 of 3 completions"):
            make_batching_engine(tiny_model).generate(PROMPTS, GREEDY)
