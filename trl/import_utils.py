"""
Which optional packages are there. Importing this module imports none of them, nor torch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from packaging.version import Version

LIGER_KERNEL_MIN_VERSION = "0.8.2"
# The oldest whose settings and weight updates have the form that is used, and the one that is tested, in any patch.
VLLM_MIN_VERSION = "0.22.0"
VLLM_MAX_VERSION = "0.32"


class TRLExperimentalWarning(UserWarning):
    """Given on the first import of `trl.experimental`, whose interface may change in any release."""


@functools.cache
def _package_distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def __getattr__(name: str) -> dict[str, list[str]]:
    if name == "PACKAGE_DISTRIBUTION_MAPPING":  # reads every installed package's metadata, so not at import
        return _package_distributions()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _installed_version(package: str) -> str:
    """Version of an importable package; "N/A" where no distribution claims it (e.g. a folder on the path)."""
    with_dashes = package.replace("_", "-")
    for distribution in (package, with_dashes):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    for distribution in _package_distributions().get(package, []):
        return importlib.metadata.version(distribution)
    return "N/A"


def _is_package_available(package: str, return_version: bool = False) -> bool | tuple[bool, str]:
    """
    Whether a package can be imported, without importing it.

    Args:
        package: import name of a top-level package.
        return_version: return its version too ("N/A" where it is missing or unknown).
    """
    try:
        available = importlib.util.find_spec(package) is not None
    except ValueError:  # a module in sys.modules without a spec, as test doubles are
        available = True
    if not return_version:
        return available
    return available, _installed_version(package) if available else "N/A"


def _is_at_least(version: str, minimum: str) -> bool:
    # A build of unknown version is taken at its word: it is there because someone put it there.
    return version == "N/A" or Version(version) >= Version(minimum)


def is_aiohttp_available() -> bool:
    """Whether `aiohttp` (requests to several servers at once) is installed."""
    return _is_package_available("aiohttp")


def is_deepspeed_available() -> bool:
    """Whether `deepspeed` is installed."""
    return _is_package_available("deepspeed")


def is_fastapi_available() -> bool:
    """Whether `fastapi` (the rollout server) is installed."""
    return _is_package_available("fastapi")


def is_harbor_available() -> bool:
    """Whether `harbor` (sandboxed agent environments) is installed."""
    return _is_package_available("harbor")


def is_jmespath_available() -> bool:
    """Whether `jmespath` (parsing responses by schema) is installed."""
    return _is_package_available("jmespath")


def is_joblib_available() -> bool:
    """Whether `joblib` is installed."""
    return _is_package_available("joblib")


def is_liger_kernel_available(min_version: str = LIGER_KERNEL_MIN_VERSION) -> bool:
    """Whether `liger_kernel` is installed in `min_version` or newer."""
    available, version = _is_package_available("liger_kernel", return_version=True)
    return available and _is_at_least(version, min_version)


def is_math_verify_available() -> bool:
    """Whether `math_verify` (comparing mathematical answers) is installed."""
    return _is_package_available("math_verify")


def is_mergekit_available() -> bool:
    """Whether `mergekit` (merging checkpoints) is installed."""
    return _is_package_available("mergekit")


def is_openreward_available() -> bool:
    """Whether `openreward` (environments behind a server) is installed."""
    return _is_package_available("openreward")


def is_pydantic_available() -> bool:
    """Whether `pydantic` is installed."""
    return _is_package_available("pydantic")


def is_requests_available() -> bool:
    """Whether `requests` is installed."""
    return _is_package_available("requests")


def is_trackio_available() -> bool:
    """Whether `trackio` (experiment tracking) is installed."""
    return _is_package_available("trackio")


def is_unsloth_available() -> bool:
    """Whether `unsloth` is installed."""
    return _is_package_available("unsloth")


def is_uvicorn_available() -> bool:
    """Whether `uvicorn` (the rollout server) is installed."""
    return _is_package_available("uvicorn")


def is_vllm_available(min_version: str | None = None) -> bool:
    """
    Whether `vllm` is installed; warns where its version is outside the range that is supported.

    Args:
        min_version: also require this version or a newer one.
    """
    available, version = _is_package_available("vllm", return_version=True)
    if not available:
        return False
    if version != "N/A":
        release = Version(Version(version).public)  # without a local suffix such as +cu128
        newest = Version(VLLM_MAX_VERSION)
        if release < Version(VLLM_MIN_VERSION) or release.release[:2] > newest.release[:2]:
            warnings.warn(
                f"vLLM {version} is installed; versions {VLLM_MIN_VERSION} to {VLLM_MAX_VERSION} are supported. Others "
                f'may fail: `pip install "vllm>={VLLM_MIN_VERSION},<{newest.major}.{newest.minor + 1}"`.',
                stacklevel=2,
            )
    return min_version is None or _is_at_least(version, min_version)


def is_vllm_ascend_available() -> bool:
    """Whether `vllm_ascend` (vLLM on NPUs) is installed."""
    return _is_package_available("vllm_ascend")


def is_weave_available() -> bool:
    """Whether `weave` (tracing of evaluations) is installed."""
    return _is_package_available("weave")


@contextmanager
def suppress_warning(category: type[Warning]) -> Iterator[None]:
    """Silence warnings of one category inside the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=category)
        yield


@contextmanager
def suppress_experimental_warning() -> Iterator[None]:
    """Silence `TRLExperimentalWarning` inside the block."""
    with suppress_warning(TRLExperimentalWarning):
        yield
