"""What is peculiar to one library: a module each, which the rest of the import does not know.

    FILES:      open_file(...)         -> an Original, for files that only this library reads
    ESTIMATORS: convertible(estimator) -> as the ONNX converter can take it, with converters registered

A module imports its library only where a model needs it.
"""

import sys
from importlib import import_module
from typing import Any

FILES = {".onnx": "onnx", **dict.fromkeys((".pt", ".pth", ".pt2", ".ts"), "torch")}
ESTIMATORS = ("lightgbm", "xgboost")


def opener(suffix: str) -> Any:
    """The `open_file` for files with this suffix; None if they hold a pickled estimator."""
    return import_module(f"{__name__}.{FILES[suffix]}").open_file if suffix in FILES else None


def in_use() -> list[str]:
    """The libraries whose estimators the model brought along."""
    return [name for name in ESTIMATORS if name in sys.modules]


def convertible(estimator: Any) -> Any:
    """The estimator, or a copy, as the ONNX converter can take it."""
    for name in in_use():
        estimator = import_module(f"{__name__}.{name}").convertible(estimator)
    return estimator
