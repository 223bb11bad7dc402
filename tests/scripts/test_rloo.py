"""The RLOO script on a tiny model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl.scripts import rloo


def test_trains_saves_and_evaluates(run_online_script, my_rewards, tmp_path, tiny_model_path):
    """The reference is the model as it was, so the first step's divergence is 0; rewards are clipped before it counts."""
    logs = run_online_script(
        *[rloo, "--reward_funcs", my_rewards, "think_format_reward", "--reward_clip_range", "-0.5", "0.25"],
        *["--eval_strategy", "steps", "--eval_steps", "2", "--num_iterations", "2", "--max_steps", "3"],
    )
    steps = [entry for entry in logs if "loss" in entry]
    assert len(steps) == 3
    divergences = [step["kl"] for step in steps if "kl" in step]
    assert divergences[0] == pytest.approx(0, abs=1e-5)
    assert abs(divergences[1]) > 1e-4  # of the second generation, after two steps on the first
    assert "rewards/think_format_reward/mean" in steps[0]
    assert any("eval_rewards/vowels/mean" in entry for entry in logs)
    before = AutoModelForCausalLM.from_pretrained(tiny_model_path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_needs_a_reward(make_online_flags):
    with pytest.raises(ValueError, match="--reward_funcs"):
        rloo.main(*rloo.make_parser().parse_args_and_config(make_online_flags()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward_clip_range", "1", "-1"], "reward_clip_range"),
        (["--num_generations", "1"], "num_generations"),
        (["--reward_funcs", "length"], "no built-in"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_read(flags, message, tmp_path):
    base = ["--output_dir", str(tmp_path), "--bf16", "false"]
    with pytest.raises(ValueError, match=message):
        rloo.make_parser().parse_args_and_config([*base, *flags])
