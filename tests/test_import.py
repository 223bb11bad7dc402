"""Importing the package costs nothing, and its public names are there."""

import json
import subprocess
import sys

import pytest

import trl
from trl._lazy import lazy_exports


def run(code: str) -> dict:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(finished.stdout)


def test_import_is_light():
    heavy = run(
        "import sys, json, trl; names = ('torch', 'transformers', 'datasets', 'accelerate', 'peft', 'numpy');"
        "print(json.dumps([n for n in names if n in sys.modules]))"
    )
    assert heavy == []


@pytest.mark.parametrize("package", ["trl", "trl.trainer", "trl.models", "trl.scripts"])
def test_every_public_name_can_be_imported(package):
    module = __import__(package, fromlist=["_"])
    for name in module.__all__:
        assert getattr(module, name) is not None, name
    assert set(module.__all__) <= set(dir(module))


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'trl' has no attribute 'SFTrainer'"):
        _ = trl.SFTrainer


def test_a_failing_submodule_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import does_not_exist_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    attribute, _, names = lazy_exports("trl", {"broken_module": ["Thing"]})
    assert names == ["Thing"]
    with pytest.raises(RuntimeError, match=r"Importing broken_module \(for trl.Thing\) failed: No module named"):
        attribute("Thing")


def test_version():
    assert trl.__version__[0].isdigit()
