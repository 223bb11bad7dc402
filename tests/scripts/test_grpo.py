"""The GRPO script on a tiny model: rewards by name, evaluation, an adapter, and its flags."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl.cli import main
from trl.scripts import grpo

from .conftest import ONLINE_ROWS


@pytest.fixture
def run(run_online_script):
    """Runs the script with more flags, and returns what it logged."""
    return lambda *flags: run_online_script(grpo, *flags)


@pytest.fixture
def reward_model_path(tmp_path, tiny_model_path):
    path = str(tmp_path / "tiny-judge")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    config = AutoConfig.from_pretrained(tiny_model_path, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_several_rewards_train_save_and_evaluate(run, my_rewards, reward_model_path, tmp_path, tiny_model_path):
    """A model, a built-in function and one of the user's, each with its weight, in the order of the names."""
    logs = run(
        *["--reward_model_name_or_path", reward_model_path, "--reward_funcs", "think_format_reward", my_rewards],
        *["--reward_weights", "0", "0", "0.5", "--eval_strategy", "steps", "--eval_steps", "2"],
    )
    steps = [entry for entry in logs if "loss" in entry]
    assert len(steps) == 2
    for step in steps:
        assert {"rewards/tiny-judge/mean", "rewards/think_format_reward/mean", "rewards/vowels/mean"} <= step.keys()
        assert step["reward"] == pytest.approx(0.5 * step["rewards/vowels/mean"], abs=1e-5)
    (evaluation,) = [entry for entry in logs if "eval_reward" in entry]
    assert evaluation["eval_reward"] == pytest.approx(0.5 * evaluation["eval_rewards/vowels/mean"], abs=1e-5)
    before = AutoModelForCausalLM.from_pretrained(tiny_model_path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_trains_an_adapter(run, my_rewards, tmp_path):
    logs = run("--reward_funcs", my_rewards, "--use_peft", "--lora_r", "2", "--beta", "0.1")
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-5)  # the reference is the model without the adapter
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


def test_accuracy_reward_needs_its_column(make_online_flags):
    rows = [{"prompt": row["prompt"], "answer": row["solution"]} for row in ONLINE_ROWS]
    flags = [*make_online_flags(rows), "--reward_funcs", "accuracy_reward"]
    with pytest.raises(Exception, match="(?s)accuracy_reward.*`solution`.*`answer`"):
        grpo.main(*grpo.make_parser().parse_args_and_config(flags))


def test_a_misspelt_reward_costs_no_loading(make_online_flags, my_rewards, monkeypatch):
    """It is found before the dataset and the model are read."""
    monkeypatch.setattr("trl.scripts.training.load_script_dataset", lambda *args: pytest.fail("the dataset was read"))
    flags = [*make_online_flags(), "--reward_funcs", "my_rewards.vowel"]
    with pytest.raises(ValueError, match="Did you mean `vowels`"):
        grpo.main(*grpo.make_parser().parse_args_and_config(flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss_type", "dappo"], "dappo"),
        (["--num_generations", "3", "--per_device_train_batch_size", "4"], "num_generations"),
        (["--reward_funcs", "acuracy_reward"], "accuracy_reward"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_read(flags, message, tmp_path):
    base = ["--output_dir", str(tmp_path), "--bf16", "false"]
    with pytest.raises(ValueError, match=message):
        grpo.make_parser().parse_args_and_config([*base, *flags])


def test_command_with_a_config_file(make_online_flags, my_rewards, tmp_path, capfd, monkeypatch):
    """From `trl grpo` through Accelerate; the launched process finds the function in the working directory too."""
    flags = make_online_flags()
    settings = {}
    for flag in flags:
        if flag.startswith("--"):
            name, settings[flag[2:]] = flag[2:], True
        else:
            settings[name] = flag
    settings |= {"reward_funcs": ["think_format_reward", my_rewards], "num_processes": 1}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["grpo", "--config", str(file), "--max_steps", "1"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("'rewards/vowels/mean'") == 1
    assert f"The model is saved in {tmp_path / 'out'}" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_preview_shows_prompts_and_columns(method, make_online_flags, my_rewards, tiny_model_path, capsys):
    flags = [*make_online_flags(), "--reward_funcs", my_rewards]
    assert main(["preview", method, *flags, "--num_examples", "2"]) == 0
    printed = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    text = tokenizer.apply_chat_template(ONLINE_ROWS[0]["prompt"], add_generation_prompt=True, tokenize=False)
    assert printed.count("── row") == 2
    assert f"── row 0: prompt, {len(tokenizer(text)['input_ids'])} tokens\n{text}" in printed
    assert "solution (for the rewards): '$1$'" in printed
    assert "2 completions of up to 6 tokens" in printed
    with pytest.raises(ValueError, match="Did you mean `vowels`"):
        main(["preview", method, *flags[:-1], "my_rewards.vowel"])
