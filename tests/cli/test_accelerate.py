"""Accelerate: built-in configurations, and how a script is launched."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file

from trl.cli import accelerate_launcher
from trl.cli.accelerate_config import builtin_configs, resolve_accelerate_config_argument
from trl.cli.accelerate_launcher import launch_training_script


@pytest.fixture(autouse=True)
def _no_own_config(monkeypatch, tmp_path):
    monkeypatch.setattr(accelerate_launcher, "default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


# ---- Configurations ----


def test_builtin_names():
    assert list(builtin_configs()) == ["fsdp1", "fsdp2", "multi_gpu", "single_gpu", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("name", builtin_configs())
def test_builtin_configs_are_read_by_accelerate(name):
    config = load_config_from_file(str(builtin_configs()[name]))
    assert config.num_processes == 8
    assert config.mixed_precision == "bf16"


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3)])
def test_zero_stages(name, stage):
    settings = yaml.safe_load(builtin_configs()[name].read_text())["deepspeed_config"]
    assert (settings["zero_stage"], settings["zero3_init_flag"]) == (stage, stage == 3)


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_versions(version):
    settings = yaml.safe_load(builtin_configs()[f"fsdp{version}"].read_text())["fsdp_config"]
    assert settings["fsdp_version"] == version
    assert settings["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"


@pytest.mark.parametrize("flag", [["--accelerate_config", "zero2"], ["--accelerate-config=zero2"]])
def test_name_becomes_a_file(flag):
    resolved = resolve_accelerate_config_argument(["--num_processes", "2", *flag, "--debug"])
    assert resolved == ["--config_file", str(builtin_configs()["zero2"]), "--num_processes", "2", "--debug"]


def test_file_stays_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("{}")
    assert resolve_accelerate_config_argument(["--accelerate_config", str(file)]) == ["--config_file", str(file)]


def test_last_one_counts():
    resolved = resolve_accelerate_config_argument(["--accelerate_config", "zero2", "--accelerate_config", "fsdp2"])
    assert resolved == ["--config_file", str(builtin_configs()["fsdp2"])]


def test_without_the_flag_nothing_changes():
    assert resolve_accelerate_config_argument(["--num_processes", "2"]) == ["--num_processes", "2"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--accelerate_config"], "needs a value.*zero3"),
        (["--accelerate_config", "--debug"], "needs a value"),
        (["--accelerate_config="], "needs a value"),
        (["--accelerate_config", "zero33"], "zero33.*Did you mean `zero3`"),
    ],
)
def test_bad_accelerate_config(args, message):
    with pytest.raises(ValueError, match=message):
        resolve_accelerate_config_argument(args)


# ---- Launch ----


def launched(launch_args, script="sft", script_args=("--seed", "1")):
    """What would be launched: the launcher's arguments, and the environment."""
    seen = {}

    def launch(args):
        seen.update(args=args, environment=dict(os.environ))

    launch_training_script(script, list(launch_args), list(script_args), launch_command_fn=launch)
    return seen["args"], seen["environment"]


@pytest.mark.parametrize("script", ["sft", "sft.py"])
def test_script_and_its_arguments(script):
    args, _ = launched(["--main_process_port", "1234"], script)
    assert Path(args.training_script).name == "sft.py"
    assert Path(args.training_script).is_file()
    assert args.training_script_args == ["--seed", "1"]
    assert args.main_process_port == 1234


def test_no_such_script():
    with pytest.raises(ValueError, match=r"no training script nope\.py"):
        launched([], "nope")


def test_config_file_is_passed_on():
    args, _ = launched(["--accelerate_config", "zero3"])
    assert args.config_file == str(builtin_configs()["zero3"])


def test_one_cpu_process_gets_all_cores(monkeypatch):
    """Accelerate alone would leave it with one thread."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(accelerate_launcher.psutil, "cpu_count", lambda logical: 6)
    args, _ = launched([])
    assert (args.num_processes, args.num_cpu_threads_per_process) == (1, 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    args, _ = launched([])
    assert args.num_cpu_threads_per_process is None  # Accelerate reads the variable


@pytest.mark.parametrize("with_accelerator", [True, False])
def test_several_cpu_processes(monkeypatch, with_accelerator):
    """`--cpu --num_processes 2` runs two, not silently one."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: with_accelerator)
    monkeypatch.setattr(accelerate_launcher.psutil, "cpu_count", lambda logical: 6)
    args, environment = launched(["--cpu", "--num_processes", "2"])
    assert (args.multi_gpu, args.num_processes, args.num_machines) == (True, 2, 1)
    assert args.num_cpu_threads_per_process == 3
    assert environment["ACCELERATE_USE_CPU"] == "true"
    assert "ACCELERATE_USE_CPU" not in os.environ


def test_several_cpu_processes_from_a_config_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = yaml.safe_load(builtin_configs()["single_gpu"].read_text())
    file = tmp_path / "cpu.yaml"
    file.write_text(yaml.safe_dump({**config, "distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}))
    args, _ = launched(["--accelerate_config", str(file)])
    assert (args.multi_gpu, args.num_processes) == (True, 2)


def test_single_process_config_on_cpu_stays_single(monkeypatch):
    """The built-in file has `num_processes: 8`, which `distributed_type: NO` makes void."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args, _ = launched(["--accelerate_config", "single_gpu"])
    assert not args.multi_gpu


@pytest.mark.parametrize(
    ("devices", "launch_args", "message"),
    [
        (1, ["--num_processes", "2"], "2 processes.*there is 1 accelerator.*--num_processes 1.*--cpu"),
        (2, ["--num_processes", "4"], "4 processes.*there are 2 accelerators"),
        (4, ["--num_processes", "2", "--accelerate_config", "single_gpu"], "is for one.*multi_gpu"),
    ],
)
def test_more_processes_than_would_run(monkeypatch, devices, launch_args, message):
    """Accelerate would start one process and say nothing."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    with pytest.raises(ValueError, match=message):
        launched(launch_args)


def test_machines_with_one_accelerator_each(monkeypatch):
    """Two processes on two machines are one here: Accelerate would forget the other machine."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    machines = ["--num_machines", "2", "--machine_rank", "0", "--main_process_ip", "10.0.0.1"]
    args, _ = launched(["--num_processes", "2", *machines, "--main_process_port", "29500"])
    assert args.multi_gpu


@pytest.mark.parametrize("launch_args", [["--num_processes", "2"], ["--multi_gpu", "--num_processes", "2"], []])
def test_accelerators_are_left_to_accelerate(monkeypatch, launch_args):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    args, environment = launched(launch_args)
    assert args.multi_gpu == ("--multi_gpu" in launch_args)
    assert not args.cpu
    assert "ACCELERATE_USE_CPU" not in environment
