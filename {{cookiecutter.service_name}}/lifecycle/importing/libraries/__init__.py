"""What is peculiar to one library: a module each, which the rest of the import finds here by its duties.

    SUFFIXES, open_file(...) -> an Original: the module opens files of its own
    convertible(estimator)   -> the estimator as the ONNX converter can take it, with converters registered

Each module is called as its library, and imports it only where a model needs it.
"""

import sys
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


def modules(duty: str) -> dict[str, ModuleType]:
    """The modules here that have a function of this name, by library."""
    found = {one.name: import_module(f"{__name__}.{one.name}") for one in iter_modules(__path__)}
    return {name: module for name, module in found.items() if hasattr(module, duty)}


def opener(suffix: str) -> Any:
    """The `open_file` for files with this suffix; None if no library here has such files."""
    openers = modules("open_file").values()
    return next((module.open_file for module in openers if suffix in module.SUFFIXES), None)


def in_use() -> set[str]:
    """The libraries of estimators that the model brought along."""
    return {name for name in modules("convertible") if name in sys.modules}


def convertible(estimator: Any) -> Any:
    """The estimator, or a copy, as the ONNX converter can take it."""
    for name in sorted(in_use()):
        estimator = modules("convertible")[name].convertible(estimator)
    return estimator
