"""Follows `release.json`: what is released while the service runs takes over, or comes beside what answers.

    release.json changes -> what each role wants -> verify -> load, warm up -> replay the golden set -> swap
                         -> the old one ends

All of it but the swap happens in a thread. Whatever is wrong with a new version, the served one goes on.
"""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple

from app.core.errors import reason_of
from app.core.pipeline import Pipeline
from app.core.store import RELEASE, Release, read_release

LOOK_SECONDS = 1.0
RETRY_SECONDS = 5.0  # the files of a version may arrive after the release that names it

Role = Literal["serving", "canary", "shadow"]


class Wanted(NamedTuple):
    """What a role is to have; a change of any of it is a new beginning."""

    version: str
    percent: int = 100  # of the clients
    beside: str = ""  # the version that the other clients get


def wanted(release: Release) -> dict[Role, Wanted | None]:
    """By role; None where it is nobody's, as it is next to the same version."""
    serving, percent = release.serving, release.canary_percent
    canary = release.canary if percent and release.canary != serving else None
    shadow = release.shadow if release.shadow != serving else None
    return {
        "serving": Wanted(serving),
        "canary": Wanted(canary, percent, serving) if canary else None,
        "shadow": Wanted(shadow) if shadow else None,
    }


class Follower:
    """Keeps one process at what is released in `root`; without one there is nothing to follow."""

    def __init__(
        self,
        root: Path | None,
        served: Callable[[], str],
        build: Callable[[Role, str], Pipeline],
        use: dict[Role, Callable[[Pipeline | None, Wanted | None], None]],
        refuse: Callable[[str, str], None],
    ) -> None:
        self._root, self._served = root, served
        self._build, self._use, self._refuse = build, use, refuse
        self._beside: dict[Role, Wanted | None] = {}
        self._seen: tuple[int, ...] | None = None
        self._again = 0.0  # when to try the same release once more

    async def follow(self, loading: asyncio.Task[None]) -> None:
        """Once the first version has been loaded, look every second, until cancelled."""
        await asyncio.shield(loading)
        while self._root is not None:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Give each role what is released for it; what is bad is refused, and tried again later."""
        if self._root is None or (
            (seen := _stamp(self._root)) == self._seen and perf_counter() < self._again
        ):
            return
        self._seen, self._again = seen, math.inf
        try:
            release = await asyncio.to_thread(read_release, self._root)
        except Exception as error:
            self._fail("release.json", error)
            return
        for role, want in wanted(release).items():
            if want == (Wanted(self._served()) if role == "serving" else self._beside.get(role)):
                continue
            pipeline = None
            try:
                if want is not None:
                    pipeline = await asyncio.to_thread(self._build, role, want.version)
            except Exception as error:  # whatever it is, the served version is none the worse
                self._fail(role, error)
                want = None
            self._beside[role] = want
            self._use[role](pipeline, want)

    def _fail(self, role: str, error: Exception) -> None:
        self._again = perf_counter() + RETRY_SECONDS
        self._refuse(role, reason_of(error))


def _stamp(root: Path) -> tuple[int, ...] | None:
    """What changes when release.json does."""
    try:
        found = (root / RELEASE).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
