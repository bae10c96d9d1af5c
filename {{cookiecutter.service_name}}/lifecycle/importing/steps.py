"""The import's steps that run in processes of their own, and the lines that all of them say on the way.

run("convert", folder) -> python -m lifecycle.importing.convert FOLDER -> step(function)
-> documents in FOLDER, of which a Refusal ends the import as a LifecycleError
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from app.core.errors import ArtifactError
from lifecycle.errors import LifecycleError
from lifecycle.files import ROOT
from lifecycle.importing.documents import Refusal

SECONDS_A_LINE = 5


def run(name: str, folder: Path, cwd: Path = ROOT) -> None:
    """Run a step and wait for its end; raises LifecycleError if it refuses or fails."""
    own = {key: value for key, value in os.environ.items() if not key.upper().startswith("APP_")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The converter iterates over sets, whose order would otherwise differ each time, and with it the bytes.
    own |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", f"lifecycle.importing.{name}", str(folder)]
    # In a group of its own, so that Ctrl-C reaches this process alone, which then ends the step.
    with subprocess.Popen(  # noqa: S603  # this package's own steps
        command, cwd=cwd, env=own, stdin=subprocess.DEVNULL, process_group=0, close_fds=False
    ) as process:
        try:
            status = process.wait()
        except BaseException:
            process.kill()
            raise
    if status:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        raise LifecycleError(f"the step `{name}` ended with {how}; nothing was changed")
    if Refusal.path(folder).is_file():
        raise LifecycleError(Refusal.read(folder).reason)


def step(function: Callable[[Path], None]) -> None:
    """Call a step with its folder; its LifecycleError becomes a Refusal for the process that waits."""
    sys.stdout = sys.stderr  # for anything that the model's own code prints
    folder = Path(sys.argv[1])
    try:
        function(folder)
    except (LifecycleError, ArtifactError) as error:
        Refusal(reason=str(error)).write(folder)
    except MemoryError:
        Refusal(reason="there is not enough memory for this model").write(folder)


def say(words: str) -> None:
    """Write a line of progress to stderr."""
    print(f"import-model: {words}", file=sys.stderr, flush=True)


class Progress:
    """Says every five seconds how many rows of a long piece of work are done."""

    def __init__(self, work: str) -> None:
        self._work, self._last = work, time.monotonic()

    def __call__(self, rows: int) -> None:
        """So many rows are done."""
        if time.monotonic() - self._last > SECONDS_A_LINE:
            self._last = time.monotonic()
            say(f"{self._work}: {rows:,} rows")
