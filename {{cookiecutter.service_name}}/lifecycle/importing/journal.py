"""All files of an import move into the repository, or none.

.import/repository/ (made) -> .import/backup/ (the old files), journal.json -> moved, file by file
a failure, Ctrl-C, or the next import after a kill -> recover() puts back what the journal names
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lifecycle.errors import LifecycleError

WORK, JOURNAL = ".import", "journal.json"


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Work while no other import does, else raise LifecycleError. The lock ends with its last process."""
    with (root / "pyproject.toml").open("r+b") as file:
        os.set_inheritable(file.fileno(), True)  # a step may still run after its parent was killed
        try:
            if sys.platform == "win32":
                import msvcrt

                file.seek(2**30)  # beyond its end: others may read it
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LifecycleError(
                "another import is at work in this service; wait until it has ended"
            ) from None
        yield


@contextmanager
def unstopped() -> Iterator[list[int]]:
    """Delay Ctrl-C to the end of the block; the list has an entry for each press."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def apply(root: Path, work: Path, changes: Sequence[Path]) -> None:
    """Move changed files into the repository; on any failure the old files come back."""
    made, backup = work / "repository", work / "backup"
    for path in changes:  # the copies need space on the disk: make them first
        (backup / path).parent.mkdir(parents=True, exist_ok=True)
        if (root / path).is_file():
            shutil.copyfile(root / path, backup / path)
    journal = {path.as_posix(): (root / path).is_file() for path in changes}
    (work / "journal.new").write_text(json.dumps(journal), "utf-8")
    with unstopped() as pressed:
        try:
            (work / "journal.new").replace(work / JOURNAL)
            for path in changes:
                if pressed:
                    raise KeyboardInterrupt
                (root / path).parent.mkdir(exist_ok=True)
                if (made / path).is_file():
                    (made / path).replace(root / path)
                else:
                    (root / path).unlink()
        except BaseException:
            recover(root)
            raise
        (work / JOURNAL).unlink()


def recover(root: Path) -> None:
    """Undo the moves of an import that did not finish. Can be repeated, also after a partial undo."""
    work = root / WORK
    journal = work / JOURNAL
    if journal.is_file():
        for name, there in json.loads(journal.read_bytes()).items():
            path, before = root / name, work / "backup" / name
            if before.is_file():
                before.replace(path)
            elif not there:
                with suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
            with suppress(OSError):
                path.parent.rmdir()  # if it is empty
        journal.unlink()
    shutil.rmtree(work, ignore_errors=True)
