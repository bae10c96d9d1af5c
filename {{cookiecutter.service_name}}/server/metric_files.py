"""The folder in which workers share their metrics.

    master: a folder per start, a slot per live worker -> worker: files named by its slot -> /metrics

A slot is reused after its worker has ended: the successor continues in the same files, so their number is
bounded. A folder that is removed while workers run is recreated with their counts.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from prometheus_client import values
from prometheus_client.multiprocess import mark_process_dead

from app.observability.metrics import METRICS_FOLDER, count_alone, readable
from app.settings import SettingsError

MEMORY = "/dev/shm"  # noqa: S108  # if no temporary folder is writable


class MetricFiles:
    """The folder as master and workers see it; None while metrics are off."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._name = ""  # part of the file names of this worker

    def prepare(self, enabled: bool) -> None:
        """In the master: create the folder, once. A folder that the platform has set is left alone."""
        count_alone()
        if not enabled:
            return
        for place in (None, MEMORY):
            if self._folder is None:
                with suppress(OSError):
                    self._folder = Path(tempfile.mkdtemp(prefix="metrics-", dir=place))
        if self._folder is None:
            raise SettingsError(
                "no folder for metrics can be written: mount a tmpfs at /tmp (docker run --tmpfs /tmp), "
                "or set TMPDIR, or APP_METRICS_ENABLED=false"
            )
        os.environ[METRICS_FOLDER] = str(self._folder)

    def begin(self, slot: int) -> None:
        """In a worker, before it creates its metrics; without a folder it counts only for itself."""
        self._name = f"{slot}x"
        if METRICS_FOLDER in os.environ and self._folder:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self._folder).close()
                for path in self._folder.glob(f"*_{self._name}.db"):
                    if not readable(path):  # truncated, because the previous worker was killed, or damaged
                        path.unlink()
            except OSError:
                del os.environ[METRICS_FOLDER]
            else:
                values.ValueClass = values.MultiProcessValue(lambda: self._name)  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """In a worker, every second: if its files were removed, write their content to new files."""
        folder, own = self._folder, f"_{self._name}.db"
        if METRICS_FOLDER not in os.environ or not folder or (folder / f"counter{own}").exists():
            return
        with suppress(OSError):  # retried at the next call
            folder.mkdir(parents=True, exist_ok=True)
            for opened in Path("/proc/self/fd").iterdir():
                kind, found, rest = (opened.readlink().name if opened.is_symlink() else "").partition(own)
                if found and rest in ("", " (deleted)"):
                    shutil.copyfile(opened, folder / f"{kind}_{self._name}x.db")
            self._name += "x"  # prometheus_client now opens files of this name

    def end(self, slot: int) -> None:
        """In the master: remove the gauges of a worker that has ended."""
        if self._folder:
            with suppress(OSError):
                mark_process_dead(f"{slot}x*", str(self._folder))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """In the master, at the end: remove the folder that `prepare` created."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
