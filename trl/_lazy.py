"""Lazy package exports (PEP 562): `import trl` costs milliseconds, a name is imported when it is first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_exports(
    package: str, exports: dict[str, list[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """
    Build `__getattr__`, `__dir__` and `__all__` for a package whose public names live in submodules.

    Args:
        package: the package's `__name__`.
        exports: absolute module name -> the public names it provides. A module with an empty list is
            itself the export (a submodule reachable as an attribute).

    Returns:
        The three values to assign at module level.
    """
    origin = {name: module for module, names in exports.items() for name in names}
    submodules = {module.rpartition(".")[2]: module for module in exports if module.startswith(f"{package}.")}
    submodules = {
        name: module for name, module in submodules.items() if module == f"{package}.{name}" and name not in origin
    }
    public = sorted({*origin, *submodules})

    def __getattr__(name: str) -> Any:
        module_name = origin.get(name) or submodules.get(name)
        if module_name is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise RuntimeError(f"Importing {module_name} (for {package}.{name}) failed: {error}") from error
        value = getattr(module, name) if name in origin else module
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *public})

    return __getattr__, __dir__, public
