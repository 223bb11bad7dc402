"""`trl env`."""

from trl.cli import main
from trl.scripts import env

LABELS = [
    "Platform",
    "Python version",
    "TRL version",
    "PyTorch version",
    "accelerator(s)",
    "Transformers version",
    "Accelerate version",
    "Accelerate config",
    "Datasets version",
    "HF Hub version",
    "bitsandbytes version",
    "DeepSpeed version",
    "Liger-Kernel version",
    "PEFT version",
    "vLLM version",
]


def lines_of(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert "Copy" in lines[0]
    return lines[2:]


def test_labels_in_order(capsys, monkeypatch):
    monkeypatch.setattr(env, "_accelerate_config", lambda: "not found")
    lines = lines_of(capsys)
    assert [line[2:].partition(":")[0] for line in lines] == LABELS
    assert all(line.startswith("- ") and line.partition(": ")[2] for line in lines)


def test_what_is_absent_says_so(capsys, monkeypatch):
    installed = env.version

    def version(name):
        if name == "peft":
            raise env.PackageNotFoundError
        return installed(name)

    monkeypatch.setattr(env, "version", version)
    assert "- PEFT version: not installed" in lines_of(capsys)


def test_accelerate_config_is_nested(capsys, monkeypatch, tmp_path):
    import accelerate.commands.config as accelerate_config

    from trl.cli.accelerate_config import builtin_configs

    monkeypatch.setattr(accelerate_config, "default_config_file", str(builtin_configs()["zero2"]))
    lines = lines_of(capsys)
    position = lines.index("- Accelerate config:")
    assert "  - distributed_type: DEEPSPEED" in lines[position:]
    assert lines[-1].startswith("- vLLM version")
