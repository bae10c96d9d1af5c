"""The run of an import: its processes, the documents that they exchange, and the move into the repository.

importer -> Conversion -> proof    -> Converted, answers.npy, model.*; or text.txt, columns to read as text
importer -> Assembly   -> assemble -> repository/; or unfit.txt, why this form cannot be served
each step -> refusal.txt, if it found a reason to stop
.import/repository/ (made) -> .import/backup/ (the old files), journal.json -> moved, file by file
a failure, Ctrl-C, or the next import after a kill -> recover() restores the files in the journal
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from app.core.errors import ArtifactError
from app.core.store import Input, Training
from lifecycle.command import ROOT, LifecycleError

ANSWERS, SAMPLE, TEXT, UNFIT = "answers.npy", "sample.arrow", "text.txt", "unfit.txt"
WORK, JOURNAL, REFUSAL, LOG = ".import", "journal.json", "refusal.txt", "log.txt"
SECONDS_A_LINE = 5
Runtime = Literal["onnx", "skops"]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the document that another process has written."""
        return cls.model_validate_json((folder / f"{cls.__name__.lower()}.json").read_bytes())

    def write(self, folder: Path) -> None:
        """Write the document for the next process."""
        (folder / f"{type(self).__name__.lower()}.json").write_text(self.model_dump_json(), "utf-8")


class Conversion(_Document):
    """The model to open and convert, and the columns that it may take."""

    model: Path
    target: str
    runtime: Runtime | None  # None: the fastest that is proven
    trust: list[str]
    trust_listed: bool
    inputs: list[Input]
    unusable: dict[str, str]  # by column: why no model can take it
    unfit: dict[str, str] = {}  # by form: why it cannot be served


class Converted(_Document):
    """The opened model, and the proof of its converted form."""

    task: Literal["classification", "regression"]
    labels: list[bool | int | str]
    names: list[str]  # the model's columns, in order
    described: str
    runtime: Runtime
    form: str
    advice: str  # which change of the model would make it ONNX
    files: list[str]
    tolerance: float
    gap: float  # the largest difference from the original's answers
    rate: int  # rows a second on this machine, at one row a call
    original_rate: int
    closed: list[str]  # text columns in which the model fails on unknown words
    outputs: dict[str, Any]  # `threshold` and `classes` of the manifest
    manifest: dict[str, Any]  # its libraries, trusted_types, code, takes, dtypes, stages


class Assembly(_Document):
    """The version to make from the converted model."""

    version: str
    name: str
    target: str
    new_contract: bool
    rewritten: bool  # whether the import wrote the contract
    training: Training
    ranges: dict[str, tuple[float, float]]
    review_threshold: float
    feedback_tolerance: float
    holdout: str | None  # path in the repository
    words: dict[str, dict[str, Any]]  # by input, from an earlier import of this version
    requirements: list[str]  # packages that the image lacks


def run(name: str, folder: Path, cwd: Path = ROOT, environment: Mapping[str, str] | None = None) -> None:
    """Run a step and wait for its end; raises LifecycleError if it refuses or fails."""
    own = {key: value for key, value in os.environ.items() if not key.upper().startswith("APP_")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The converter iterates over sets: their order, and so the bytes, would differ in each run.
    own |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
    # Rows are asked one at a time, and threads of a library would slow this down.
    own |= {name: own.get(name, "1") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    own |= environment or {}
    command = [sys.executable, "-m", f"lifecycle.importing.{name}", str(folder)]
    process: subprocess.Popen[bytes] | None = None
    try:
        with unstopped() as pressed:  # Ctrl-C amid the start would leave the step behind
            # In its own process group, so that Ctrl-C reaches only this process, which then ends the step.
            process = subprocess.Popen(  # noqa: S603  # this package's own steps
                command, cwd=cwd, env=own, stdin=subprocess.DEVNULL, process_group=0, close_fds=False
            )
        if pressed:
            raise KeyboardInterrupt
        status = process.wait()
    finally:
        if process is not None:
            process.kill()
            process.wait()
    if status:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        raise LifecycleError(f"the step `{name}` ended with {how}; nothing was changed")
    if (folder / REFUSAL).is_file():
        raise LifecycleError((folder / REFUSAL).read_text("utf-8"))


def step(function: Callable[[Path], None]) -> None:
    """Call a step with its folder; its LifecycleError is written for the parent process."""
    sys.stdout = sys.stderr  # for anything that the model's own code prints
    folder = Path(sys.argv[1])
    try:
        function(folder)
    except (LifecycleError, ArtifactError) as error:
        (folder / REFUSAL).write_text(str(error), "utf-8")
    except MemoryError:
        (folder / REFUSAL).write_text("there is not enough memory for this model", "utf-8")
    except Exception as error:  # from the model's own code or a library
        log(traceback.format_exc())
        (folder / REFUSAL).write_text(f"{type(error).__name__}: {error}; nothing was changed", "utf-8")


def log(words: str) -> None:
    """Append text that is too long for a line of progress to the log in the work folder."""
    with Path(sys.argv[1], LOG).open("a", encoding="utf-8") as file:
        file.write(words.rstrip() + "\n")


def say(words: str) -> None:
    """Write a line of progress to stderr."""
    print(f"import-model: {words}", file=sys.stderr, flush=True)


def quoted(names: Sequence[str]) -> str:
    """At most eight names, for a message."""
    listed = ", ".join(map(repr, names[:8])) or "nothing else"
    return listed + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class Progress:
    """Says every five seconds how many rows of a long piece of work are done."""

    def __init__(self, work: str) -> None:
        self._work, self._last = work, time.monotonic()

    def __call__(self, rows: int) -> None:
        """Report the number of rows done."""
        if time.monotonic() - self._last > SECONDS_A_LINE:
            self._last = time.monotonic()
            say(f"{self._work}: {rows:,} rows")


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """A lock against other imports; raises LifecycleError if taken. It ends with the last process."""
    with (root / "pyproject.toml").open("r+b") as file:
        os.set_inheritable(file.fileno(), True)  # a step may still run after its parent was killed
        try:
            if sys.platform == "win32":
                import msvcrt

                file.seek(2**30)  # beyond the end, so that others may read the file
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
