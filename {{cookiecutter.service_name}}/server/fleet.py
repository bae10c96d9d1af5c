"""The fleet that gunicorn's master prepares before it forks, and gunicorn's hooks, which keep it current.

    gunicorn.conf.py -> prepare() -> on_starting: verified artifact -> fork -> each worker reads FLEET
    SIGHUP: gunicorn.conf.py again -> prepare(): the settings of now -> on_reload -> fork -> the others leave

The hooks bear the names that gunicorn looks for in gunicorn.conf.py.
"""

import gc
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from gunicorn.errors import HaltServer
from prometheus_client import multiprocess, values

from app import capabilities
from app.core.errors import ArtifactError
from app.core.store import Artifact
from app.observability.metrics import METRICS_FOLDER
from app.rollout.fleet import FLEET, Fleet, default_workers, read_usable
from app.settings import Settings, SettingsError, load_settings

MAX_STACK_BYTES = 16_384


class ForkingFleet(Fleet):
    """What the master gives its workers by forking them.

    A worker that starts later depends on no file that may have changed since: it could not start, and then
    gunicorn would stop the healthy ones, too.
    """

    def __init__(self, settings: Settings, workers: int) -> None:
        super().__init__(settings, workers)
        self._loaded = multiprocessing.Value("i")  # workers that have loaded the model so far
        self._serving = multiprocessing.Value("i")  # workers that have begun to take connections
        self._wanted = multiprocessing.RawValue("i")  # how many must serve before replaced workers may leave
        self._stopping = multiprocessing.RawValue("i")  # 1 once the whole service stops

    def verify(self) -> None:
        """Read the artifact once, before any worker is forked; raises ArtifactError."""
        self._artifact, self._problem = read_usable(self.settings)

    def served(self) -> tuple[Artifact, str]:
        """The artifact as the master verified it, and what is wrong with the released version."""
        return self._artifact, self._problem

    @property
    def all_loaded(self) -> bool:
        """Whether as many workers as there are to be have loaded the model."""
        return bool(self._loaded.value >= self.workers)

    @property
    def replaces(self) -> bool:
        """Once all workers have loaded, a worker that starts takes the place of another."""
        return self.all_loaded

    @property
    def may_leave(self) -> bool:
        """Whether a worker that was told to end may stop serving: its successor serves, if it gets one."""
        return self.stopping or bool(self._serving.value >= self._wanted.value)

    @property
    def stopping(self) -> bool:
        """Whether the whole service stops, not only a worker that is replaced."""
        return bool(self._stopping.value)

    def note_loaded(self) -> None:
        """This worker has loaded the model."""
        with self._loaded:
            self._loaded.value += 1

    def note_serving(self) -> None:
        """This worker takes connections."""
        with self._serving:
            self._serving.value += 1

    def replace(self, workers: int) -> None:
        """So many workers start now; those there are leave when these serve."""
        self._wanted.value = self._serving.value + workers

    def stop(self) -> None:
        """The whole service stops."""
        self._stopping.value = 1


def forking_fleet() -> ForkingFleet:
    """The fleet of this master or worker."""
    fleet = FLEET.get()
    assert isinstance(fleet, ForkingFleet)  # noqa: S101  # `prepare` set it
    return fleet


def prepare() -> ForkingFleet:
    """The fleet, with the settings of now: made at the start, kept at SIGHUP. Ends a start that is wrong."""
    try:
        settings = load_settings()
    except SettingsError as problem:
        if FLEET.get(None) is None:
            sys.exit(f"cannot start: {problem}")
        logging.getLogger("gunicorn.error").error("the settings stay as they were: %s", problem)
        return forking_fleet()
    if FLEET.get(None) is None:
        FLEET.set(ForkingFleet(settings, worker_count(settings)))
    fleet = forking_fleet()
    fleet.settings = settings
    return fleet


def worker_count(settings: Settings) -> int:
    """APP_WORKERS, or as many as this machine carries."""
    return settings.workers or default_workers(Path(settings.artifacts_dir))


def on_starting(server: Any) -> None:
    """Verify the artifact once, before any worker is forked; the workers inherit the verified bytes."""
    fleet = forking_fleet()
    if server.cfg.workers != fleet.workers:  # quotas and readiness count on it
        sys.exit("cannot start: APP_WORKERS says how many workers there are, not gunicorn's --workers")
    # When several workers cannot load the model, gunicorn fails twice and shows the second as a traceback.
    sys.excepthook = lambda kind, *rest: None if kind is HaltServer else sys.__excepthook__(kind, *rest)
    try:
        fleet.verify()
    except ArtifactError as problem:
        sys.exit(f"cannot start: {problem}")
    if fleet.settings.metrics_enabled:
        # One folder per start, so that no old count survives.
        os.environ[METRICS_FOLDER] = tempfile.mkdtemp(prefix="metrics-")
        values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]  # as it is set when imported
    import_module("app.main")  # here, so that its memory is shared by all workers
    capabilities.project()
    gc.collect()
    gc.freeze()  # a collection in a worker would write to, and so copy, every shared page


def when_ready(server: Any) -> None:
    """SIGTERM once: drain. Twice: at once, which gunicorn would not hear."""

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != server.pid:  # a worker that has not begun yet
            os._exit(0)
        fleet = forking_fleet()
        again = fleet.stopping
        fleet.stop()
        server.signal(signal.SIGQUIT if again else number, frame)

    signal.signal(signal.SIGTERM, stop)


def on_reload(server: Any) -> None:
    """SIGHUP: workers with the settings of now take over from those there are, once they have loaded."""
    forking_fleet().replace(server.cfg.workers)


def pre_fork(_server: Any, worker: Any) -> None:
    """Give the worker a file for the stacks of its threads, which the master can read when it has died."""
    worker.stacks = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the worker lives


def child_exit(server: Any, worker: Any) -> None:
    """Log where a worker was if a signal ended it, and take its live gauges out of /metrics."""
    worker.stacks.seek(0)
    if stacks := worker.stacks.read(MAX_STACK_BYTES).decode(errors="replace"):
        server.log.error("worker died", extra={"fields": {"pid": worker.pid, "stacks": stacks}})
    worker.stacks.close()
    if METRICS_FOLDER in os.environ:
        multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def on_exit(_server: Any) -> None:
    """Remove this start's metric files."""
    if folder := os.environ.get(METRICS_FOLDER):
        shutil.rmtree(folder, ignore_errors=True)
