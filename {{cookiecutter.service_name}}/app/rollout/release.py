"""`release.json`, looked at every second: the version that each role is to have."""

import asyncio
import math
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple

from app.core.store import RELEASE, Release, read_release

LOOK_SECONDS = 1.0
RETRY_SECONDS = 5.0  # the files of a version may arrive after the release that names it

Role = Literal["serving", "canary", "shadow"]


class Wanted(NamedTuple):
    """The version that a role is to have; any other content starts the role anew."""

    version: str
    percent: int = 100  # of the clients
    beside: str = ""  # the version that the other clients get


def wanted(release: Release) -> dict[Role, Wanted | None]:
    """Wanted version per role; None if unset or equal to the serving version."""
    serving, percent = release.serving, release.canary_percent
    canary = release.canary if percent and release.canary != serving else None
    shadow = release.shadow if release.shadow != serving else None
    return {
        "serving": Wanted(serving),
        "canary": Wanted(canary, percent, serving) if canary else None,
        "shadow": Wanted(shadow) if shadow else None,
    }


class Follower:
    """Says when the release in a folder has changed, or is to be tried again; without a folder, never."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._seen: tuple[int, ...] | None = None
        self._again = 0.0  # when to try the same release once more

    async def news(self) -> dict[Role, Wanted | None]:
        """Wanted version per role if there may be something to do, else nothing; raises ArtifactError."""
        if self._root is None or (
            (seen := _stamp(self._root)) == self._seen and perf_counter() < self._again
        ):
            return {}
        self._seen, self._again = seen, math.inf
        return wanted(await asyncio.to_thread(read_release, self._root))

    def retry(self) -> None:
        """Try the same release again after a while."""
        self._again = perf_counter() + RETRY_SECONDS


def _stamp(root: Path) -> tuple[int, ...] | None:
    """Another value when release.json has changed."""
    try:
        found = (root / RELEASE).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
