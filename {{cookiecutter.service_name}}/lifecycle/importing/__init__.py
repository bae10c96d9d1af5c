"""Imports of models, for use from Python: the function behind `python -m lifecycle import-model`.

>>> from lifecycle.importing import import_model
>>> import_model(Path("model.joblib"), Path("train.csv"), "species")
"""

from typing import Any

from lifecycle.command import door

__all__ = ["import_model"]


def __getattr__(name: str) -> Any:
    """Import the function on first use: this takes seconds."""
    return door(__name__, name, {"import_model": "importer"})
