"""The fleet that gunicorn's master prepares before forking, and the gunicorn hooks that update it.

    gunicorn.conf.py -> prepare(): settings, verified artifact -> fork -> each worker reads FLEET
    SIGHUP: gunicorn.conf.py again -> prepare(), or no change -> on_reload -> fork -> old workers leave

The hooks have the names that gunicorn expects in gunicorn.conf.py. A failure of one worker must never end the
master while other workers are healthy.
"""

import gc
import os
import signal
import socket
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from gunicorn.config import Config
from gunicorn.errors import HaltServer
from gunicorn.workers import base, workertmp

from app.core.errors import ArtifactError
from app.core.store import Artifact
from app.monitoring.feedback import SharedMemory, memory_file
from app.rollout.fleet import FLEET, Fleet, default_workers, read_served, read_usable
from app.settings import Settings, SettingsError, load_settings, project
from server.metric_files import MetricFiles

MAX_STACK_BYTES = 16_384
PAUSE_SECONDS = 1.0  # before the next try if a fork fails
# The gunicorn options that may be set directly; limits, quotas and drain depend on the others.
HARMLESS = {
    "access_log_format", "accesslog", "args", "backlog", "chdir", "check_config", "config", "errorlog",
    "forwarded_allow_ips", "loglevel", "pidfile", "print_config", "proc_name", "pythonpath", "timeout",
    "umask", "worker_tmp_dir",
}  # fmt: skip


class Heartbeat(workertmp.WorkerTmp):  # type: ignore[misc]  # which has no types
    """A worker's heartbeat file, in memory: gunicorn's own needs a folder, which may disappear."""

    def __init__(self, _cfg: Any) -> None:
        self._tmp = memory_file()


class ForkingFleet(Fleet):
    """State that workers inherit from the master by fork.

    A worker that starts later does not depend on files that may have changed since.
    """

    def __init__(self, settings: Settings, workers: int, artifact: Artifact, problem: str) -> None:
        super().__init__(settings, workers)
        self.count = workers  # current number of workers; `workers` is the number at the start
        self.metric_files = MetricFiles()
        self._artifact, self._problem = artifact, problem
        self._shared = SharedMemory(4 * 8)
        # Number of workers that loaded the model; that accepted connections; the latter that is needed before
        # replaced workers may leave; 1 if the whole service stops.
        self._numbers = memoryview(self._shared.content).cast("q")

    def served(self) -> tuple[Artifact, str]:
        """The artifact that the master verified; and why it is the fallback version, or an empty string."""
        return self._artifact, self._problem

    @property
    def loaded(self) -> int:
        """Number of workers that have loaded the model so far."""
        return int(self._numbers[0])

    @property
    def all_loaded(self) -> bool:
        """Whether the initial number of workers has loaded the model."""
        return self.loaded >= self.workers

    replaces = all_loaded  # any later worker replaces another

    @property
    def may_leave(self) -> bool:
        """Whether a worker that was told to end may stop serving: its successor, if any, serves."""
        return self.stopping or self._numbers[1] >= self._numbers[2]

    @property
    def stopping(self) -> bool:
        """Whether the whole service stops, as opposed to a worker that is replaced."""
        return self._numbers[3] == 1

    def note_loaded(self) -> None:
        """This worker has loaded the model."""
        with self._shared.locked():
            self._numbers[0] += 1

    def note_serving(self) -> None:
        """This worker accepts connections."""
        with self._shared.locked():
            self._numbers[1] += 1

    def replace(self, workers: int) -> None:
        """`workers` new workers start; the present workers leave when all of these serve."""
        self._numbers[2] = self._numbers[1] + workers

    def stop(self) -> None:
        """The whole service stops."""
        self._numbers[3] = 1

    def renew(self, settings: Settings, workers: int) -> None:
        """Use these settings for workers that start from now on; raises SettingsError or ArtifactError."""
        for name in ("host", "port"):
            if getattr(settings, name) != getattr(self.settings, name):
                raise SettingsError(f"APP_{name.upper()} is taken at a restart only")
        for name, waived in (("api_keys", settings.auth_disabled), ("trusted_keys", False)):
            if getattr(self.settings, name) and not getattr(settings, name) and not waived:
                raise SettingsError(f"APP_{name.upper()} is empty now; a restart is needed to do without")
        artifact = read_served(settings)
        self.metric_files.prepare(settings.metrics_enabled)
        self.settings, self.count, self._artifact, self._problem = settings, workers, artifact, ""


def forking_fleet() -> ForkingFleet:
    """The fleet of this master or worker."""
    fleet = FLEET.get()
    assert isinstance(fleet, ForkingFleet)  # noqa: S101  # `prepare` set it
    return fleet


def prepare() -> ForkingFleet:
    """The fleet with current settings: created at the start, renewed at SIGHUP. Errors exit with one line."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file would become stdout or stderr
        pass
    os.close(spare)
    try:
        refuse_overrides()
        settings = load_settings()
        workers = settings.workers or default_workers(Path(settings.artifacts_dir))
        if FLEET.get(None) is not None:
            forking_fleet().renew(settings, workers)
        else:
            project()  # cached for the workers
            FLEET.set(ForkingFleet(settings, workers, *read_usable(settings)))
    except Exception as error:  # any fault in a file or setting
        kind = "" if isinstance(error, SettingsError | ArtifactError) else f"{type(error).__name__}: "
        sys.exit(f"cannot start: {kind}{' '.join(str(error).split())}"[:300])
    return forking_fleet()


def refuse_overrides() -> None:
    """Raise SettingsError for gunicorn arguments that would override gunicorn.conf.py."""
    config = Config()
    parser = config.parser()
    for given in (sys.argv[1:] if "gunicorn" in sys.argv[0] else [], config.get_cmd_args_from_env()):
        named = {name for name, value in vars(parser.parse_args(given)).items() if value is not None}
        if refused := sorted(named - HARMLESS):
            raise SettingsError(
                f"gunicorn's {refused[0]} cannot be set by its command line or GUNICORN_CMD_ARGS; use APP_ "
                "variables: APP_WORKERS, APP_HOST, APP_PORT, APP_DRAIN_SECONDS, APP_KEEP_ALIVE_SECONDS"
            )


def on_starting(server: Any) -> None:
    """Refuse an address that cannot be bound; then make the master survive failures of single workers."""
    fleet = forking_fleet()
    try:
        if "LISTEN_PID" not in os.environ and "GUNICORN_FD" not in os.environ:
            check_address(*server.cfg.address[0])
        fleet.metric_files.prepare(fleet.settings.metrics_enabled)
    except SettingsError as problem:
        sys.exit(f"cannot start: {problem}"[:300])
    # When several workers cannot load the model, gunicorn fails twice and prints a traceback for the second.
    sys.excepthook = lambda kind, *rest: None if kind is HaltServer else sys.__excepthook__(kind, *rest)
    outlive(server)
    import_module("app.main")  # here, so that its memory is shared by all workers
    gc.collect()
    gc.freeze()  # a collection in a worker would write to, and so copy, every shared page


def check_address(host: str, port: int) -> None:
    """Raise SettingsError if the address cannot be bound; gunicorn would retry for five seconds."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:
        address = f"{host[:100]}, port {port}"
        raise SettingsError(f"cannot listen at {address} ({error}): change APP_PORT or APP_HOST") from None


def outlive(server: Any) -> None:
    """Keep the master running if a worker cannot boot or be forked, or gunicorn.conf.py is broken."""
    reap, spawn, reload = server.reap_workers, server.spawn_worker, server.app.reload

    def reap_workers() -> None:
        if forking_fleet().loaded:  # from now on, restart workers that cannot boot
            server.WORKER_BOOT_ERROR = server.APP_LOAD_ERROR = -1
        reap()

    def spawn_worker() -> Any:
        try:
            return spawn()
        except OSError as error:
            if not server.WORKERS:
                raise
            server.log.error("no worker could be started: %s", error.strerror)
            time.sleep(PAUSE_SECONDS)
            return None

    def reload_settings() -> None:
        config = server.app.cfg
        try:
            reload()
        except (Exception, SystemExit) as end:
            server.app.cfg = config
            own = isinstance(end, SystemExit) and isinstance(end.code, str)
            reason = str(end).removeprefix("cannot start: ") if own else "gunicorn.conf.py cannot be read"
            server.log.error("the settings stay as they were: %s", reason)

    base.WorkerTmp = Heartbeat
    server.START_CTX["args"] = sys.orig_argv  # for SIGUSR2: `python -m gunicorn` changes sys.argv
    server.reap_workers, server.spawn_worker, server.app.reload = reap_workers, spawn_worker, reload_settings


def when_ready(server: Any) -> None:
    """SIGTERM once: drain. Twice: stop immediately; gunicorn itself ignores a second SIGTERM."""

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != server.pid:  # a forked worker before its own handlers are set
            os._exit(0)
        fleet = forking_fleet()
        again = fleet.stopping
        fleet.stop()
        server.signal(signal.SIGQUIT if again else number, frame)

    signal.signal(signal.SIGTERM, stop)


def on_reload(server: Any) -> None:
    """SIGHUP: workers with the new settings replace the present workers once they have loaded."""
    forking_fleet().replace(server.cfg.workers)


def pre_fork(server: Any, worker: Any) -> None:
    """Give the worker a slot, and memory in which the master can read the stacks of its threads."""
    taken = {one.slot for one in server.WORKERS.values()}
    worker.slot = min(set(range(len(taken) + 1)) - taken)
    worker.stacks = memory_file()


def child_exit(server: Any, worker: Any) -> None:
    """Log the stacks of a worker that a signal ended, and remove its live gauges from /metrics."""
    worker.stacks.seek(0)
    if stacks := worker.stacks.read(MAX_STACK_BYTES).decode(errors="replace"):
        server.log.error("worker died", extra={"fields": {"pid": worker.pid, "stacks": stacks}})
    worker.stacks.close()
    forking_fleet().metric_files.end(worker.slot)


def on_exit(_server: Any) -> None:
    """Remove this start's metric files."""
    forking_fleet().metric_files.remove()
