"""A prompt that several rows have goes through the model once, and the completions are the same."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from tests.conftest import build_model
from trl.rollouts import transformers_engine
from trl.rollouts.transformers_engine import TransformersEngine
from trl.rollouts.types import SamplingParams

PAD, EOS = 0, 1
# Groups of three, two of one and a half each; of different lengths, so that two are padded.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11]] * 3 + [[10, 11]] * 2 + [[12]] * 3 + [[10, 11]]
SLIDING = {"sliding_window": 4, "max_window_layers": 1, "use_sliding_window": True}


def sample(model, prompts=PROMPTS, engine_options=None, **options):
    engine = TransformersEngine(
        model, Accelerator(cpu=True), pad_token_id=PAD, eos_token_ids=[EOS], **(engine_options or {})
    )
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    params = {"max_completion_length": 8, "seed": 3, "with_logps": True, **options}
    rollouts = engine.generate(prompts, SamplingParams(**params))
    hook.remove()
    return rollouts, seen


def assert_alike(ours, plain):
    assert [rollout.completion_ids for rollout in ours] == [rollout.completion_ids for rollout in plain]
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(torch.tensor(one.sampled_logps), torch.tensor(other.sampled_logps))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("qwen2", SLIDING),
        ("mistral", {"sliding_window": 3}),
        ("gpt_neox", {"num_key_value_heads": None}),
    ],
)
def test_the_same_completions_for_less(monkeypatch, architecture, settings):
    model = build_model(architecture=architecture, **settings)
    ours, seen = sample(model)
    assert seen[0] == (3, 6)  # three prompts, all tokens but the last
    assert seen[1] == (9, 1)
    monkeypatch.setattr(transformers_engine, "shared_prefill", lambda *args: None)
    plain, seen = sample(model)
    assert seen[0] == (9, 7)
    assert_alike(ours, plain)


def test_with_an_adapter(monkeypatch):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(build_model(), config)
    ours, _ = sample(model)
    monkeypatch.setattr(transformers_engine, "shared_prefill", lambda *args: None)
    assert_alike(ours, sample(model)[0])


@pytest.mark.parametrize(
    ("prompts", "engine_options", "options"),
    [
        ([[5, 6], [7, 8]], {}, {}),  # nothing in common
        ([[5]] * 2, {}, {}),  # nothing to compute ahead
        (PROMPTS, {"cache_implementation": "static"}, {}),
        (PROMPTS, {}, {"generation_kwargs": {"use_cache": False}}),
    ],
)
def test_where_it_cannot_be(prompts, engine_options, options):
    _, seen = sample(build_model(), prompts, engine_options, **options)
    assert seen[0] == (len(prompts), max(map(len, prompts)))


def test_a_model_with_a_state_is_left_alone():
    model = build_model(architecture="qwen3_next", layer_types=["linear_attention", "full_attention"], num_experts=2,
                        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, head_dim=8,
                        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)  # fmt: skip
    _, seen = sample(model)
    assert seen[0] == (9, 7)
