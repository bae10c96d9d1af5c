"""Imports of models, for Python: the function that `python -m lifecycle import-model` calls, too.

>>> from lifecycle.importing import import_model
>>> import_model(Path("model.joblib"), Path("train.csv"), "species")
"""

from typing import Any

from lifecycle.command import door

__all__ = ["import_model"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: this takes seconds."""
    return door(__name__, name, {"import_model": "importer"})
