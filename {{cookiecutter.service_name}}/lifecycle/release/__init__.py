"""Releases of versions, for Python: the functions behind `python -m lifecycle`.

>>> from lifecycle.release import evaluate, promote
>>> if not evaluate("v2").failed:
...     promote("v2")
"""

from typing import TYPE_CHECKING, Any

from lifecycle.release.checklist import release_check
from lifecycle.release.promotion import promote, rollback
from lifecycle.release.rollout import canary, compare, shadow
from lifecycle.release.signing import new_key, sign

if TYPE_CHECKING:
    from lifecycle.release.evaluation import evaluate

__all__ = [
    "canary", "compare", "evaluate", "new_key", "promote", "release_check", "rollback", "shadow", "sign",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import `evaluate` on first use: its libraries take seconds, for which a rollback must not wait."""
    if name != "evaluate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lifecycle.release.evaluation import evaluate

    return evaluate
