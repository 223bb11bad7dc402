"""What every training script does: read its flags, load, train, save and push, in that order. No model is trained."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict

import trl
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from trl.scripts import sft
from trl.scripts.training import checkpoint_to_resume

ONLINE = {"grpo": "GRPO", "rloo": "RLOO"}
TRAINERS = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", **ONLINE}

ROWS = [{"prompt": f"what is {i} plus 1? ", "completion": f"the answer is {i + 1}."} for i in range(12)]


def script(method: str):
    return importlib.import_module(f"trl.scripts.{method}")


def arguments(*args: str):
    return sft.make_parser().parse_args_and_config(list(args))


@pytest.fixture
def flags(make_flags):
    return make_flags(ROWS)


@pytest.fixture
def flags_of(make_flags, make_online_flags):
    """Flags by method."""

    def flags_of(method: str) -> list[str]:
        if method in ONLINE:
            return [*make_online_flags(ROWS), "--reward_funcs", "think_format_reward"]
        return make_flags(ROWS)

    return flags_of


@pytest.fixture
def data_folder(flags):
    return flags[flags.index("--dataset_name") + 1]


# ---- The parser ----


@pytest.mark.parametrize("method", TRAINERS)
def test_dataclasses_in_order(method):
    config = getattr(trl, f"{TRAINERS[method]}Config")
    values = script(method).make_parser().parse_args_and_config(["--lora_r", "4"])
    first = getattr(script(method), f"{TRAINERS[method]}ScriptArguments") if method in ONLINE else ScriptArguments
    assert issubclass(first, ScriptArguments)
    assert [type(value) for value in values] == [first, config, ModelConfig, DatasetMixtureConfig]


@pytest.mark.parametrize("method", TRAINERS)
def test_parser_as_a_subcommand(method):
    parent = TrlParser(prog="tool")
    parser = script(method).make_parser(parent.add_subparsers(dest="command"))
    assert isinstance(parser, TrlParser)
    (namespace,) = parent.parse_args_and_config([method, "--lora_r", "4"])
    assert (namespace.command, namespace.lora_r) == (method, 4)


# ---- What main does ----


class Recorder:
    """Stands in for the trainer and writes down what is asked of it."""

    def __init__(self, **kwargs):
        type(self).calls = [("init", kwargs)]
        self.accelerator = self
        self.hub_model_id = "me/model"
        self.model = torch.nn.Linear(1, 1)

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args[0] if args else kwargs))

        return call


@pytest.fixture
def recorder(monkeypatch):
    for name in TRAINERS.values():
        monkeypatch.setattr(trl, f"{name}Trainer", Recorder)
    return Recorder


@pytest.mark.parametrize("method", TRAINERS)
def test_order(recorder, flags_of, tmp_path, method):
    parser = script(method).make_parser()
    script(method).main(*parser.parse_args_and_config([*flags_of(method), "--resume_from_checkpoint", "ckpt"]))
    names = [name for name, _ in recorder.calls]
    assert names == ["init", "train", "print", "save_model", "print", "end"]
    calls = dict(recorder.calls)
    assert calls["train"] == {"resume_from_checkpoint": "ckpt"}
    assert calls["save_model"] == str(tmp_path / "out")
    assert len(calls["init"]["train_dataset"]) == len(ROWS)
    assert calls["init"]["eval_dataset"] is None
    assert (calls["init"]["peft_config"], calls["init"]["quantization_config"]) == (None, None)


def test_push(recorder, flags, data_folder):
    args = arguments(*flags)
    args[1].push_to_hub = True
    sft.main(*args)
    calls = recorder.calls
    assert ("push_to_hub", {"dataset_name": data_folder}) in calls
    names = [name for name, _ in calls]
    assert names.index("save_model") < names.index("push_to_hub") < names.index("end")
    assert any("me/model" in str(text) for name, text in calls if name == "print")


@pytest.mark.parametrize(
    ("text", "value"),
    [(None, None), ("true", True), ("True", True), ("false", None), ("a/checkpoint-1", "a/checkpoint-1")],
)
def test_what_to_resume(text, value):
    assert checkpoint_to_resume(text) == value


def test_model_init_kwargs(recorder, flags):
    sft.main(*arguments(*flags, "--dtype", "bfloat16", "--attn_implementation", "eager", "--model_revision", "v2"))
    assert dict(recorder.calls)["init"]["args"].model_init_kwargs == {
        "revision": "v2",
        "trust_remote_code": False,
        "attn_implementation": "eager",
        "dtype": "bfloat16",
    }
    sft.main(*arguments(*flags, "--trust_remote_code", "--model_init_kwargs", '{"dtype": "auto", "use_cache": false}'))
    assert dict(recorder.calls)["init"]["args"].model_init_kwargs == {
        "revision": "main",
        "trust_remote_code": True,
        "attn_implementation": None,
        "dtype": "auto",
        "use_cache": False,
    }


def test_adapter_and_quantization(recorder, flags):
    sft.main(*arguments(*flags, "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"))
    config = dict(recorder.calls)["init"]["peft_config"]
    assert (config.r, set(config.target_modules)) == (4, {"q_proj", "v_proj"})
    sft.main(*arguments(*flags, "--load_in_4bit"))
    assert dict(recorder.calls)["init"]["quantization_config"].load_in_4bit


def test_evaluation_split_is_taken_only_where_asked_for(recorder, flags, data_folder):
    sft.main(*arguments(*flags, "--eval_strategy", "steps", "--eval_steps", "1"))
    assert len(dict(recorder.calls)["init"]["eval_dataset"]) == 4
    sft.main(*arguments(*flags, "--eval_strategy", "steps", "--dataset_test_split", "train"))
    assert len(dict(recorder.calls)["init"]["eval_dataset"]) == len(ROWS)
    with pytest.raises(ValueError, match=r"no split 'validation'.*train, test"):
        sft.main(*arguments(*flags, "--eval_strategy", "steps", "--dataset_test_split", "validation"))
    sft.main(*arguments(*flags, "--dataset_test_split", "validation"))  # not looked at


@pytest.mark.parametrize("form", ["file", "saved", "saved_dict", "parquet", "csv", "mixture", "streaming"])
def test_local_data(recorder, flags, tmp_path, form):
    rows = Dataset.from_list(ROWS)
    place = tmp_path / {"parquet": "rows.parquet", "csv": "rows.csv"}.get(form, "rows")
    extra = []
    if form in ("file", "mixture", "streaming"):
        place = tmp_path / "rows.jsonl"
        place.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        extra = {"mixture": ["--datasets", str(place)], "streaming": ["--dataset_streaming"], "file": []}[form]
    elif form == "saved":
        rows.save_to_disk(place)
    elif form == "saved_dict":
        DatasetDict({"train": rows}).save_to_disk(place)
    elif form == "parquet":
        rows.to_parquet(place)
    elif form == "csv":
        rows.to_csv(place)
    name = [] if form == "mixture" else ["--dataset_name", str(place)]
    kept = [*flags[:2], *flags[4:]]  # without the folder
    sft.main(*arguments(*kept, *name, *extra))
    assert list(dict(recorder.calls)["init"]["train_dataset"]) == ROWS


@pytest.mark.parametrize(
    ("missing", "message"), [("--model_name_or_path", "No model"), ("--dataset_name", "No dataset")]
)
def test_what_must_be_named(recorder, flags, missing, message):
    position = flags.index(missing)
    with pytest.raises(ValueError, match=f"{message}.*{missing}"):
        sft.main(*arguments(*flags[:position], *flags[position + 2 :]))


def test_boolean_buffers_are_left_out_of_the_synchronisation_where_asked(recorder, flags, monkeypatch):
    model = torch.nn.Linear(1, 1)
    model.register_buffer("causal", torch.ones(1, dtype=torch.bool))
    model.register_buffer("scale", torch.ones(1))
    initialise = Recorder.__init__

    def with_model(self, **kwargs):
        initialise(self, **kwargs)
        self.model = model

    monkeypatch.setattr(Recorder, "__init__", with_model)
    sft.main(*arguments(*flags))
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    sft.main(*arguments(*flags, "--ignore_bias_buffers"))
    assert model._ddp_params_and_buffers_to_ignore == ["causal"]


@pytest.mark.parametrize("method", TRAINERS)
def test_the_example_is_the_same_script(recorder, flags_of, monkeypatch, method):
    example = Path(__file__).parents[2] / "examples" / "scripts" / f"{method}.py"
    monkeypatch.setattr(sys, "argv", [str(example), *flags_of(method)])
    runpy.run_path(str(example), run_name="__main__")
    assert [name for name, _ in recorder.calls][:2] == ["init", "train"]


@pytest.mark.parametrize("method", ONLINE)
def test_the_script_is_run_as_a_file(recorder, flags_of, monkeypatch, tmp_path, method):
    """As the launcher does it; a function of the working directory is found."""
    (tmp_path / "rewards_of_mine.py").write_text(
        "def one(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = script(method).__file__
    monkeypatch.setattr(sys, "argv", [file, *flags_of(method), "rewards_of_mine.one"])
    runpy.run_path(file, run_name="__main__")
    rewards = dict(recorder.calls)["init"]["reward_funcs"]
    assert [reward.__name__ for reward in rewards] == ["think_format_reward", "one"]
