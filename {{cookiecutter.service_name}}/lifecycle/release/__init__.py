"""Releases of versions, for Python: the functions that `python -m lifecycle` calls, too.

>>> from lifecycle.release import evaluate, promote
>>> if not evaluate("v2").failed:
...     promote("v2")
"""

from lifecycle.release.evaluation import evaluate
from lifecycle.release.promotion import new_key, promote, release_check, rollback, sign
from lifecycle.release.rollout import canary, compare, shadow

__all__ = [
    "canary", "compare", "evaluate", "new_key", "promote", "release_check", "rollback", "shadow", "sign",
]  # fmt: skip
