"""Releases of versions: evaluate, promote and roll back, sign."""

from lifecycle.release.signing import new_key, sign

__all__ = ["new_key", "sign"]
