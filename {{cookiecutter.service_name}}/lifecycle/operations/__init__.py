"""Inspection of a service, for use from Python: the functions behind `python -m lifecycle`.

>>> from lifecycle.operations import drift
>>> drift(logs=Path("service.log"))

`size` and `sbom` have the names of their modules: `from lifecycle.operations.size import size`.
"""

from typing import Any

from lifecycle.command import door

__all__ = ["docs", "drift", "quality", "runbooks"]


def __getattr__(name: str) -> Any:
    """Import a function on first use."""
    modules = {"docs": "documents", "runbooks": "documents", "drift": "monitor", "quality": "monitor"}
    return door(__name__, name, modules)
