"""What a worker was doing when it died, told by its master, which outlives it.

    worker: route, model version -> shared memory; a fatal signal -> every thread's stack -> file
    master: both -> one log line

The stacks are written by C code that needs no lock of Python's, so a model that never comes back, or that
crashes, is caught, too. They hold names of files and functions, never values.
"""

import faulthandler
import mmap
import tempfile
from typing import Any

LABEL_BYTES = 64
MAX_STACK_BYTES = 16_384


def label(text: str) -> bytes:
    """`text` as `FlightRecorder.route` takes it; made once, because it is noted for each request."""
    return text.encode()[:LABEL_BYTES].ljust(LABEL_BYTES, b"\0")


OTHER = label("other")


class FlightRecorder:
    """Made before the fork, written by the worker, read by the master."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the worker lives

    def watch(self) -> None:
        """In the worker: when a signal ends it, write down where every thread was."""
        faulthandler.enable(self._stacks)

    def route(self, name: bytes) -> None:
        """The latest request is for this `label`."""
        self._memory[:LABEL_BYTES] = name

    def version(self, name: str) -> None:
        """This model version is loaded."""
        self._memory[LABEL_BYTES : 2 * LABEL_BYTES] = label(name)

    def read(self) -> dict[str, Any]:
        """The log line's fields; empty unless a fatal signal ended the worker."""
        self._stacks.seek(0)
        if not (stacks := self._stacks.read(MAX_STACK_BYTES).decode(errors="replace")):
            return {}
        route, version = (
            self._memory[at : at + LABEL_BYTES].rstrip(b"\0").decode() or None for at in (0, LABEL_BYTES)
        )
        return {"route": route, "model_version": version, "stacks": stacks}


inherited: FlightRecorder | None = None  # by the worker that is forked next
