"""The `trl` command: what it lists, what it hands over, what it refuses."""

import argparse
import subprocess
import sys
import time

import pytest

from trl.cli import main
from trl.cli import main as public_main
from trl.cli.commands import Command, CommandContext, get_commands
from trl.cli.commands.env import EnvCommand
from trl.cli.commands.training import TRAINING_METHODS, TrainingCommand

HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "pandas")


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("argv", [["--help"], [], ["env", "--help"], ["preview", "--help"]])
def test_help_imports_nothing_heavy(argv):
    result = run(
        "import sys\nfrom trl.cli import main\n"
        f"try:\n    code = main({argv!r})\nexcept SystemExit as exit:\n    code = exit.code\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], code or 0)"
    )
    assert "HEAVY [] 0" in result.stdout, result.stdout + result.stderr
    assert "usage: trl" in result.stdout


def test_help_answers_in_under_a_second():
    durations = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "trl.cli", "--help"], capture_output=True, check=True)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 1


def test_help_lists_the_commands(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    for command in get_commands():
        assert command.name in output
    assert {command.name for command in get_commands()} >= {"sft", "preview", "env"}


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["stf"])
    assert exit.value.code == 2
    assert "stf" in capsys.readouterr().err


def test_flag_without_a_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--seed"])
    assert exit.value.code == 2
    assert "a command comes first" in capsys.readouterr().err


def test_errors_are_raised_in_python_and_printed_on_the_command_line(monkeypatch, capsys):
    argv = ["sft", "--config", "nowhere.yaml"]
    with pytest.raises(ValueError, match=r"no config file nowhere\.yaml"):
        main(argv)
    monkeypatch.setattr(sys, "argv", ["trl", *argv])
    assert public_main() == 2
    assert capsys.readouterr().err.startswith("trl sft: error: There is no config file")


def test_context():
    context = CommandContext(argv=["sft", "--a", "sft"])
    assert context.argv_after("sft") == ["--a", "sft"]
    assert context.argv_after("dpo") == []


def test_a_command_of_ones_own():
    class Hello(Command):
        def register(self, subparsers):
            subparsers.add_parser(self.name, help=self.help_text)

        def run(self, args, context):
            return 7

    parser = argparse.ArgumentParser()
    command = Hello("hello", "Say so.")
    command.register(parser.add_subparsers())
    assert command.run(parser.parse_args(["hello"]), CommandContext(["hello"])) == 7
    with pytest.raises(TypeError):
        Command("abstract", "")


def test_env_takes_no_arguments():
    assert EnvCommand().name == "env"
    with pytest.raises(ValueError, match="no arguments"):
        main(["env", "--verbose"])


# ---- Training commands: what is checked, and what is launched ----


@pytest.fixture
def launches(monkeypatch):
    """Records what would be launched."""
    seen = []

    def launch(script_name, launch_args, training_script_args):
        seen.append((script_name, launch_args, training_script_args))

    monkeypatch.setattr("trl.cli.accelerate_launcher.launch_training_script", launch)
    return seen


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\nnum_processes: 4\nmulti_gpu: true\naccelerate_config: zero2\n")
    return str(file)


def test_arguments_are_dealt_out(launches, config):
    """Launcher arguments: of the file, then of the command line, so that the later wins. The rest is replayed."""
    argv = ["sft", "--packing", "--num_processes", "2", "--config", config, "--max-length=64", "--bf16", "false"]
    assert main(argv) == 0
    ((script, launch_args, script_args),) = launches
    assert script == "sft"
    assert launch_args == [
        *["--num_processes", "4", "--multi_gpu", "--accelerate_config", "zero2"],
        *["--num_processes", "2"],
    ]
    assert script_args == ["--packing", "--config", config, "--max-length=64", "--bf16", "false"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max_stepz", "1"], "Unknown argument `--max_stepz`. Did you mean `--max_steps`"),
        (["--num_proceses", "1"], "Unknown argument `--num_proceses`. Did you mean `--num_processes`"),
        (["--max_steps", "1", "stray"], "Unexpected argument `stray`"),
        (["--config"], "`--config` needs"),
    ],
)
def test_unknown_arguments_are_refused_before_the_launch(launches, args, message):
    with pytest.raises(ValueError, match=message):
        main(["sft", *args])
    assert not launches


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_stepz: 1", "Unknown key `max_stepz`.*Did you mean `max_steps`"),
        ("num_proceses: 1", "Unknown key `num_proceses`.*Did you mean `num_processes`"),
        ("max_steps: many", "`max_steps` takes a value of type int"),
        ("model_init_kwargs: '{a'", "`model_init_kwargs`.*not JSON"),
        ("multi_gpu: perhaps", "`multi_gpu` is a switch"),
    ],
)
def test_bad_config_is_refused_before_the_launch(launches, tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        main(["sft", "--config", str(file)])
    assert not launches


def test_bad_value_of_a_flag_is_refused_before_the_launch(launches, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["sft", "--model_init_kwargs", "{a"])
    assert exit.value.code == 2
    assert "model_init_kwargs" in capsys.readouterr().err
    assert not launches


def test_unknown_accelerate_config():
    with pytest.raises(ValueError, match=r"zero9.*Did you mean"):
        main(["sft", "--accelerate_config", "zero9", "--output_dir", "x"])


def test_environment_of_the_config_is_set_first(launches, tmp_path, monkeypatch):
    import os

    monkeypatch.delenv("TRL_TEST_D", raising=False)
    file = tmp_path / "run.yaml"
    file.write_text("env:\n  TRL_TEST_D: 1\n")
    main(["sft", "--config", str(file)])
    assert os.environ["TRL_TEST_D"] == "1"
    monkeypatch.delenv("TRL_TEST_D")


@pytest.mark.parametrize(("code", "expected"), [(3, 3), (-9, 137)])
def test_exit_code_of_the_script(monkeypatch, code, expected):
    def launch(*args):
        raise subprocess.CalledProcessError(returncode=code, cmd=["x"])

    monkeypatch.setattr("trl.cli.accelerate_launcher.launch_training_script", launch)
    assert main(["sft", "--output_dir", "x"]) == expected


@pytest.mark.parametrize("method", TRAINING_METHODS)
def test_help_of_a_method_is_complete(method, capsys):
    """Every field of every config, and what belongs to the launcher."""
    import dataclasses
    import importlib

    with pytest.raises(SystemExit) as exit:
        main([method, "--help"])
    assert exit.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: trl {method}")
    for dataclass_type in importlib.import_module(f"trl.scripts.{method}").ARGUMENTS:
        for field in dataclasses.fields(dataclass_type):
            if field.init:
                assert f"--{field.name}" in output
    assert "--num_processes" in output
    assert TrainingCommand(method).help_text == TRAINING_METHODS[method]
