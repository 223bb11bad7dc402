"""What is installed, for a bug report: what `trl env` prints."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

NOT_INSTALLED = "not installed"


def print_env() -> None:
    """Print versions, devices and the Accelerate configuration, ready to be pasted into an issue."""
    print("\nCopy this block into your issue:\n")
    for label, value in _facts():
        separator = "" if value.startswith("\n") else " "
        print(f"- {label}:{separator}{value}")
    print()


def _facts() -> list[tuple[str, str]]:
    return [
        ("Platform", platform.platform()),
        ("Python version", platform.python_version()),
        ("TRL version", _own_version()),
        ("PyTorch version", _version("torch")),
        ("accelerator(s)", _accelerators()),
        ("Transformers version", _version("transformers")),
        ("Accelerate version", _version("accelerate")),
        ("Accelerate config", _accelerate_config()),
        ("Datasets version", _version("datasets")),
        ("HF Hub version", _version("huggingface_hub")),
        ("bitsandbytes version", _version("bitsandbytes")),
        ("DeepSpeed version", _version("deepspeed")),
        ("Liger-Kernel version", _version("liger_kernel")),
        ("PEFT version", _version("peft")),
        ("vLLM version", _version("vllm")),
    ]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return NOT_INSTALLED


def _own_version() -> str:
    from .. import __version__
    from .utils import get_git_commit_hash

    commit = get_git_commit_hash("trl")
    return f"{__version__}+{commit[:7]}" if commit else __version__


def _accelerators() -> str:
    """The names of the devices that PyTorch would train on."""
    import torch

    if torch.backends.mps.is_available():
        return "MPS"
    for kind in ("cuda", "xpu", "neuron"):  # torch.neuron exists where its plugin is installed
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            return ", ".join(backend.get_device_name(i) for i in range(backend.device_count()))
    return "cpu"


def _accelerate_config() -> str:
    from accelerate.commands.config import default_config_file, load_config_from_file

    if not os.path.isfile(default_config_file):
        return "not found"
    config = load_config_from_file(default_config_file).to_dict()
    return "\n" + "\n".join(f"  - {key}: {value}" for key, value in config.items())


if __name__ == "__main__":
    print_env()
