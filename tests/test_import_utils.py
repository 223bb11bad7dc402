import subprocess
import sys
import warnings

import pytest

from trl import import_utils
from trl.import_utils import (
    TRLExperimentalWarning,
    _is_package_available,
    is_liger_kernel_available,
    is_vllm_available,
    suppress_experimental_warning,
    suppress_warning,
)


def _pretend_installed(monkeypatch, version):
    def fake(package, return_version=False):
        return (True, version) if return_version else True

    monkeypatch.setattr(import_utils, "_is_package_available", fake)


def test_importing_does_not_import_torch():
    code = "import sys, trl.import_utils; assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_package_and_version():
    available, version = _is_package_available("torch", return_version=True)
    assert available
    assert version[0].isdigit()
    assert _is_package_available("no_such_package_here", return_version=True) == (False, "N/A")
    assert _is_package_available("yaml", return_version=True)[1] != "N/A"  # distributed under another name: PyYAML


def test_every_check_answers_with_a_bool():
    for name in dir(import_utils):
        if name.startswith("is_") and name.endswith("_available"):
            assert isinstance(getattr(import_utils, name)(), bool), name


def test_package_distribution_mapping():
    assert "torch" in import_utils.PACKAGE_DISTRIBUTION_MAPPING["torch"]
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = import_utils.nothing_like_it


@pytest.mark.parametrize(("version", "enough"), [("0.8.1", False), ("0.8.2", True), ("1.0.0", True)])
def test_liger_needs_a_version(monkeypatch, version, enough):
    _pretend_installed(monkeypatch, version)
    assert is_liger_kernel_available() is enough


@pytest.mark.parametrize(
    ("version", "warns"),
    [
        ("0.21.9", True),
        ("0.22.0rc1", True),
        ("0.22.0", False),
        ("0.31.0+cu129", False),
        ("0.32.0+cpu", False),
        ("0.32.7", False),
        ("0.33.0", True),
        ("0.33.0rc1", True),
        ("1.0", True),
    ],
)
def test_vllm_version_range(monkeypatch, version, warns):
    """From the oldest version to the last patch of the newest minor one; the warning says what to install."""
    _pretend_installed(monkeypatch, version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert is_vllm_available()
    assert bool(caught) is warns
    if warns:
        assert f"vLLM {version} is installed" in str(caught[0].message)
        assert 'pip install "vllm>=0.22.0,<0.33"' in str(caught[0].message)


def test_vllm_min_version(monkeypatch):
    _pretend_installed(monkeypatch, "0.25.0")
    assert is_vllm_available(min_version="0.25.0")
    assert not is_vllm_available(min_version="0.26.0")


def test_suppressing_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress_experimental_warning():
            warnings.warn("quiet", TRLExperimentalWarning)
            warnings.warn("other", FutureWarning)
        with suppress_warning(FutureWarning):
            warnings.warn("quiet", FutureWarning)
        warnings.warn("loud", TRLExperimentalWarning)
    assert [str(warning.message) for warning in caught] == ["other", "loud"]
