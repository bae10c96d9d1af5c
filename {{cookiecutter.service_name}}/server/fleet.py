"""The fleet that gunicorn's master prepares before it forks, and gunicorn's hooks, which keep it current.

    gunicorn.conf.py -> prepare(): settings, verified artifact -> fork -> each worker reads FLEET
    SIGHUP: gunicorn.conf.py again -> prepare(), or all stays as it was -> on_reload -> fork -> others leave

The hooks bear the names that gunicorn looks for in gunicorn.conf.py. Nothing that goes wrong for one worker
may end the master while others are healthy.
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
PAUSE_SECONDS = 1.0  # before the next try when no process can be forked
# What may be given to gunicorn itself; all else is what limits, quotas and drain depend on.
HARMLESS = {
    "access_log_format", "accesslog", "args", "backlog", "chdir", "check_config", "config", "errorlog",
    "forwarded_allow_ips", "loglevel", "pidfile", "print_config", "proc_name", "pythonpath", "timeout",
    "umask", "worker_tmp_dir",
}  # fmt: skip


class Heartbeat(workertmp.WorkerTmp):  # type: ignore[misc]  # which has no types
    """A worker's sign of life for the master, without a folder that may go away."""

    def __init__(self, _cfg: Any) -> None:
        self._tmp = memory_file()


class ForkingFleet(Fleet):
    """What the master gives its workers by forking them.

    A worker that starts later depends on no file that may have changed since.
    """

    def __init__(self, settings: Settings, workers: int, artifact: Artifact, problem: str) -> None:
        super().__init__(settings, workers)
        self.count = workers  # of now; `workers` is how many have to load before the first is ready
        self.metric_files = MetricFiles()
        self._artifact, self._problem = artifact, problem
        self._shared = SharedMemory(4 * 8)
        # Workers that have loaded the model so far; those that have begun to take connections; how many must
        # have begun before replaced workers may leave; 1 once the whole service stops.
        self._numbers = memoryview(self._shared.content).cast("q")

    def served(self) -> tuple[Artifact, str]:
        """The artifact as the master verified it, and what is wrong with the released version."""
        return self._artifact, self._problem

    @property
    def loaded(self) -> int:
        """How many workers have loaded the model so far."""
        return int(self._numbers[0])

    @property
    def all_loaded(self) -> bool:
        """Whether as many workers as there were to be at the start have loaded the model."""
        return self.loaded >= self.workers

    replaces = all_loaded  # a worker that starts later takes the place of another

    @property
    def may_leave(self) -> bool:
        """Whether a worker that was told to end may stop serving: its successor serves, if it gets one."""
        return self.stopping or self._numbers[1] >= self._numbers[2]

    @property
    def stopping(self) -> bool:
        """Whether the whole service stops, not only a worker that is replaced."""
        return self._numbers[3] == 1

    def note_loaded(self) -> None:
        """This worker has loaded the model."""
        with self._shared.locked():
            self._numbers[0] += 1

    def note_serving(self) -> None:
        """This worker takes connections."""
        with self._shared.locked():
            self._numbers[1] += 1

    def replace(self, workers: int) -> None:
        """So many workers start now; those there are leave when these serve."""
        self._numbers[2] = self._numbers[1] + workers

    def stop(self) -> None:
        """The whole service stops."""
        self._numbers[3] = 1

    def renew(self, settings: Settings, workers: int) -> None:
        """Workers that start from now on have these settings; raises what says why not."""
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
    """The fleet, with the settings of now: made at the start, kept at SIGHUP. One line ends it otherwise."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file would get the log's number
        pass
    os.close(spare)
    try:
        refuse_overrides()
        settings = load_settings()
        workers = settings.workers or default_workers(Path(settings.artifacts_dir))
        if FLEET.get(None) is not None:
            forking_fleet().renew(settings, workers)
        else:
            project()  # read once, here
            FLEET.set(ForkingFleet(settings, workers, *read_usable(settings)))
    except Exception as error:  # whatever a file or a person can cause
        kind = "" if isinstance(error, SettingsError | ArtifactError) else f"{type(error).__name__}: "
        sys.exit(f"cannot start: {kind}{' '.join(str(error).split())}"[:300])
    return forking_fleet()


def refuse_overrides() -> None:
    """Raise SettingsError for arguments of gunicorn that would undo what gunicorn.conf.py relies on."""
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
    """Refuse an address that cannot be had; then make the master outlive what befalls single workers."""
    fleet = forking_fleet()
    try:
        if "LISTEN_PID" not in os.environ and "GUNICORN_FD" not in os.environ:
            check_address(*server.cfg.address[0])
        fleet.metric_files.prepare(fleet.settings.metrics_enabled)
    except SettingsError as problem:
        sys.exit(f"cannot start: {problem}"[:300])
    # When several workers cannot load the model, gunicorn fails twice and shows the second as a traceback.
    sys.excepthook = lambda kind, *rest: None if kind is HaltServer else sys.__excepthook__(kind, *rest)
    outlive(server)
    import_module("app.main")  # here, so that its memory is shared by all workers
    gc.collect()
    gc.freeze()  # a collection in a worker would write to, and so copy, every shared page


def check_address(host: str, port: int) -> None:
    """Raise SettingsError if the address cannot be bound; gunicorn would try for five seconds."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:
        address = f"{host[:100]}, port {port}"
        raise SettingsError(f"cannot listen at {address} ({error}): change APP_PORT or APP_HOST") from None


def outlive(server: Any) -> None:
    """Keep a worker that cannot boot or be forked, or a wrong gunicorn.conf.py, from ending the master."""
    reap, spawn, reload = server.reap_workers, server.spawn_worker, server.app.reload

    def reap_workers() -> None:
        if forking_fleet().loaded:  # from now on a worker that cannot boot is started again
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
    server.START_CTX["args"] = sys.orig_argv  # for SIGUSR2: after `python -m gunicorn`, sys.argv is another
    server.reap_workers, server.spawn_worker, server.app.reload = reap_workers, spawn_worker, reload_settings


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


def pre_fork(server: Any, worker: Any) -> None:
    """Give the worker its slot, and memory for the stacks of its threads, which the master can read."""
    taken = {one.slot for one in server.WORKERS.values()}
    worker.slot = min(set(range(len(taken) + 1)) - taken)
    worker.stacks = memory_file()


def child_exit(server: Any, worker: Any) -> None:
    """Log where a worker was if a signal ended it, and take its live gauges out of /metrics."""
    worker.stacks.seek(0)
    if stacks := worker.stacks.read(MAX_STACK_BYTES).decode(errors="replace"):
        server.log.error("worker died", extra={"fields": {"pid": worker.pid, "stacks": stacks}})
    worker.stacks.close()
    forking_fleet().metric_files.end(worker.slot)


def on_exit(_server: Any) -> None:
    """Remove this start's metric files."""
    forking_fleet().metric_files.remove()
