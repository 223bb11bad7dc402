"""Rewards of the online scripts, by name: built in, of the working directory, a model, and what is none of these."""

import logging
import math
import sys

import pytest

from trl.rewards import accuracy_reward, think_format_reward
from trl.scripts import grpo, rloo
from trl.scripts.online import BUILTIN_REWARDS, load_reward_funcs
from trl.trainer.grpo_config import GRPOConfig

LONG_ENOUGH = 2048


@pytest.fixture
def config(tmp_path):
    return GRPOConfig(
        output_dir=str(tmp_path / "out"), max_completion_length=LONG_ENOUGH, report_to="none", bf16=False
    )


@pytest.fixture
def load(config):
    """Loads rewards as `trl grpo` does with these flags."""

    def load(**arguments):
        return load_reward_funcs(grpo.GRPOScriptArguments(**arguments), config)

    return load


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    """A folder of the user's that is the working directory; its modules are forgotten at the end."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", ["/nowhere", *sys.path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_builtin_names(load):
    rewards = load(reward_funcs=["accuracy_reward", "think_format_reward", "get_soft_overlong_punishment"])
    assert rewards[:2] == [accuracy_reward, think_format_reward]
    assert rewards[2].__name__ == "soft_overlong_punishment_reward"
    # It begins 256 tokens before the limit of 1280.
    lengths = [1024, 1024 + 64, 1280, 1281]
    assert rewards[2](completion_ids=[[0] * length for length in lengths]) == [0.0, -0.25, -1.0, -1.0]


def test_every_builtin_name_is_a_reward(load):
    text = [[{"role": "assistant", "content": "<think>a</think>\n```python\nx = 4\n```\n$4$"}]]
    columns = {"solution": ["$4$"], "tests": ["assert x == 4"], "completion_ids": [[1, 2, 3]]}
    for name, reward in zip(BUILTIN_REWARDS, load(reward_funcs=list(BUILTIN_REWARDS)), strict=True):
        (value,) = reward(completions=text, prompts=["?"], **columns)
        assert math.isfinite(value), name


def test_model_comes_first(load):
    """`reward_weights` are in this order."""
    assert load(reward_model_name_or_path="org/judge", reward_funcs=["accuracy_reward"]) == [
        "org/judge",
        accuracy_reward,
    ]
    assert load(reward_model_name_or_path="org/judge") == ["org/judge"]


def test_functions_of_the_working_directory(load, working_directory):
    (working_directory / "my_rewards.py").write_text(
        "def length_reward(completion_ids, **kwargs):\n    return [7.0]\n"
    )
    package = working_directory / "judges"
    (package / "inner").mkdir(parents=True)
    (package / "inner" / "tone.py").write_text("def polite(completions, **kwargs):\n    return [2.0]\n")
    mine, builtin, nested = load(
        reward_funcs=["my_rewards.length_reward", "accuracy_reward", "judges.inner.tone.polite"]
    )
    assert (mine(completion_ids=[[1]]), builtin, nested(completions=["a"])) == ([7.0], accuracy_reward, [2.0])
    assert sys.path[0] == str(working_directory)


def test_working_directory_goes_before_the_scripts_own_folder(load, working_directory, monkeypatch):
    """Run as a file, the script has its own folder first on the path, where there is a `launch_options.py` too."""
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(grpo.__file__).parent))
    (working_directory / "launch_options.py").write_text("def mine(completions, **kwargs):\n    return [1.0]\n")
    (function,) = load(reward_funcs=["launch_options.mine"])
    assert function(completions=["a"]) == [1.0]


@pytest.mark.parametrize("script", [grpo.GRPOScriptArguments, rloo.RLOOScriptArguments])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy_reward", "no built-in.*Did you mean `accuracy_reward`.*my_rewards.acuracy_reward"),
        ("length_reward", "There are: accuracy_reward"),
        ("rewards/mine.py", "import path, such as `mine.my_function`"),
        ("org/reward-model", "reward_model_name_or_path"),
    ],
)
def test_names_that_cannot_be_are_refused_when_they_are_read(script, name, message):
    with pytest.raises(ValueError, match=message):
        script(reward_funcs=["accuracy_reward", name])


def test_flags_refuse_an_unknown_name_without_a_traceback(capsys, tmp_path):
    from trl.scripts.utils import read_script_arguments

    flags = ["--output_dir", str(tmp_path), "--bf16", "false", "--reward_funcs", "accurcy_reward"]
    with pytest.raises(SystemExit) as exit:
        read_script_arguments(grpo.make_parser(prog="trl grpo"), flags)
    assert exit.value.code == 2
    assert "Did you mean `accuracy_reward`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rewards.lenght_reward", "has no `lenght_reward`. Did you mean `length_reward`"),
        ("my_rewards.Judge", r"is a class.*my_reward = Judge\(\)"),
        ("my_rewards.weight", "is no function, but a float"),
        (
            "my_rewrds.length_reward",
            r"no module `my_rewrds`.*no my_rewrds.py in the working directory.*Did you mean `my_rewards`",
        ),
        ("my_rewards.inner.length_reward", "no module `my_rewards.inner`"),
        ("needs_more.reward", "`needs_more`.*needs `package_that_nobody_has`.*Install it"),
    ],
)
def test_import_paths_that_lead_nowhere(load, working_directory, path, message):
    (working_directory / "my_rewards.py").write_text(
        "weight = 0.5\nclass Judge: pass\ndef length_reward(completions, **kwargs): return [1.0]\n"
    )
    (working_directory / "needs_more.py").write_text("import package_that_nobody_has\n")
    with pytest.raises(ValueError, match=message):
        load(reward_funcs=[path])


def test_an_error_in_the_users_module_is_shown_as_it_is(load, working_directory):
    (working_directory / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load(reward_funcs=["broken.reward"])


def test_no_reward_at_all(load):
    with pytest.raises(ValueError, match="--reward_funcs.*accuracy_reward.*--reward_model_name_or_path"):
        load()


def test_warns_of_a_punishment_that_never_comes(load, config, caplog):
    config.max_completion_length = 1025
    with caplog.at_level(logging.WARNING, logger="trl.scripts.online"):
        load(reward_funcs=["get_soft_overlong_punishment"])
        assert not caplog.records
        config.max_completion_length = 1024
        load(reward_funcs=["get_soft_overlong_punishment"])
    assert "after 1024 tokens" in caplog.text


def test_clip_range_from_flags_and_file(tmp_path):
    """Two numbers after the flag, or a list in the file."""
    base = ["--output_dir", str(tmp_path), "--bf16", "false"]

    def clip_range(*more):
        return rloo.make_parser().parse_args_and_config([*base, *more])[1].reward_clip_range

    assert clip_range("--reward_clip_range", "-1", "1.5") == (-1.0, 1.5)
    file = tmp_path / "run.yaml"
    file.write_text("reward_clip_range: [-2, 2]\nreward_funcs: accuracy_reward\n")
    assert clip_range("--config", str(file)) == (-2.0, 2.0)
    assert clip_range("--config", str(file), "--reward_clip_range", "none") is None
    with pytest.raises(ValueError, match="reward_clip_range"):
        clip_range("--reward_clip_range", "1")
