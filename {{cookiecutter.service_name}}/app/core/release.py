"""Follows `release.json`: a version that is released while the service runs replaces the one that answers.

    release.json changes -> verify -> load, warm up -> replay the golden set -> swap -> the old one ends

All of it but the swap happens in a thread. Whatever is wrong with a new version, the old one goes on.
"""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from app.core.errors import ArtifactError
from app.core.pipeline import Pipeline
from app.core.store import RELEASE, read_release

LOOK_SECONDS = 1.0
RETRY_SECONDS = 5.0  # the files of a version may arrive after the release that names it


class Follower:
    """Keeps one process at the version that is released in `root`; without one there is nothing to follow."""

    def __init__(
        self,
        root: Path | None,
        served: Callable[[], str],
        build: Callable[[], Pipeline],
        serve: Callable[[Pipeline], None],
        refuse: Callable[[str], None],
    ) -> None:
        self._root, self._served = root, served
        self._build, self._serve, self._refuse = build, serve, refuse
        self._seen: tuple[int, ...] | None = None
        self._again = 0.0  # when to try the same release once more

    async def follow(self, loading: asyncio.Task[None]) -> None:
        """Once the first version has been loaded, look every second, until cancelled."""
        await asyncio.shield(loading)
        while self._root is not None:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Serve the released version; what cannot be served is refused, and tried again later."""
        if self._root is None or (
            (seen := _stamp(self._root)) == self._seen and perf_counter() < self._again
        ):
            return
        self._seen = seen
        try:
            pipeline = await asyncio.to_thread(self._prepare, self._root)
        except Exception as error:  # whatever it is, the old version is none the worse
            self._again = perf_counter() + RETRY_SECONDS
            self._refuse(str(error) if isinstance(error, ArtifactError) else type(error).__name__)
            return
        self._again = math.inf
        if pipeline is not None:
            self._serve(pipeline)

    def _prepare(self, root: Path) -> Pipeline | None:
        return None if read_release(root).serving == self._served() else self._build()


def _stamp(root: Path) -> tuple[int, ...] | None:
    """What changes when release.json does."""
    try:
        found = (root / RELEASE).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
