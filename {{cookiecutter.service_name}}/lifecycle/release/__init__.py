"""Releases of versions, for Python: the functions that `python -m lifecycle` calls, too.

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
    """Import what is asked for when it is: a rollback does not wait for what an evaluation needs."""
    promotion = ("new_key", "promote", "release_check", "rollback", "sign")
    modules = {"evaluate": "evaluation"} | dict.fromkeys(promotion, "promotion")
    return door(__name__, name, modules | dict.fromkeys(("canary", "compare", "shadow"), "rollout"))
