"""Operation of a service, for Python: the functions behind `python -m lifecycle`.

>>> from lifecycle.operations import moved
>>> [one.feature for one in moved("http://127.0.0.1:9090", "24h") if one.verdict == "drifted"]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifecycle.operations.docs import refresh
    from lifecycle.operations.drift import moved
    from lifecycle.operations.gameday import hold_gameday
    from lifecycle.operations.quality import judged
    from lifecycle.operations.runbooks import wiki
    from lifecycle.operations.sbom import bill_of_materials
    from lifecycle.operations.size import measure

__all__ = ["bill_of_materials", "hold_gameday", "judged", "measure", "moved", "refresh", "wiki"]
_MODULES = {
    "bill_of_materials": "sbom",
    "hold_gameday": "gameday",
    "judged": "quality",
    "measure": "size",
    "moved": "drift",
    "refresh": "docs",
    "wiki": "runbooks",
}


def __getattr__(name: str) -> Any:
    """Import a function on first use: the libraries of some take seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
