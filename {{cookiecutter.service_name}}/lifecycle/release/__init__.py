"""Releases of versions, for use from Python: the functions behind `python -m lifecycle`.

>>> from lifecycle.release import evaluate, promote
>>> if not evaluate("v2").failed:
...     promote("v2")
"""

from typing import Any

from lifecycle.command import door

__all__ = [
    "canary", "compare", "evaluate", "new_key", "promote", "release_check", "rollback", "shadow", "sign",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a function on first use: a rollback must not wait for the libraries of an evaluation."""
    promotion = ("new_key", "promote", "release_check", "rollback", "sign")
    modules = {"evaluate": "evaluation"} | dict.fromkeys(promotion, "promotion")
    return door(__name__, name, modules | dict.fromkeys(("canary", "compare", "shadow"), "rollout"))
