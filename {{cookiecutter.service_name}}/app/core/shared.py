"""Memory that the master makes and all the workers it forks see."""

import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


class SharedMemory:
    """`size` bytes, zero at first, that one process at a time may change."""

    def __init__(self, size: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._file.truncate(size)
        self.content = mmap.mmap(self._file.fileno(), 0)

    @contextmanager
    def locked(self) -> Iterator[mmap.mmap]:
        """The bytes, while no other process has them; the kernel lets go when a process is killed."""
        import fcntl  # here, because `python -m app predict` runs on Windows too

        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield self.content
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)
