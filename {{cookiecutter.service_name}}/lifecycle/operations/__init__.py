"""Looking at a service, for Python: the functions that `python -m lifecycle` calls, too.

>>> from lifecycle.operations import drift
>>> drift(logs=Path("service.log"))

`size` and `sbom` are called like their modules: `from lifecycle.operations.size import size`.
"""

from typing import Any

from lifecycle.command import door

__all__ = ["docs", "drift", "quality", "runbooks"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is."""
    modules = {"docs": "documents", "runbooks": "documents", "drift": "monitor", "quality": "monitor"}
    return door(__name__, name, modules)
