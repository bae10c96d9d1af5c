"""State that the processes of one service share. `Fleet` itself is the case of a single process.

    gunicorn's master -> server.fleet.ForkingFleet -> FLEET -> fork -> create_app() in each worker
    no master (tests, tools) -----------------------> Fleet of its own -> create_app()

Callers need not know whether there is a master: `Fleet` has the same methods for a single process.
"""

import os
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from app.core.batcher import MAX_BYTES
from app.core.errors import ArtifactError
from app.core.lookup import own_lookup
from app.core.runtimes import import_libraries
from app.core.store import Artifact, read_artifact, read_release
from app.monitoring.feedback import Given
from app.observability.metrics import count_alone
from app.rollout.canary import Counts
from app.settings import Settings, local_folder

WORKER_BYTES = 120 * 2**20  # a worker with the runtime and a tiny model, measured, rounded up
MODEL_FACTOR = 4  # a loaded model takes up to this many times the size of its file


class Machine(NamedTuple):
    """Processors and bytes of memory that the service may use."""

    cpus: int
    memory: int


def machine(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Machine:
    """Processors and memory within the limits of this process's control group and its parents."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    groups = {cgroups, cgroups / "cpu", cgroups / "memory"}
    # A container sees its own group as the root, or (version 1) a path that exists only outside of it.
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        group = cgroups / controllers / path.lstrip("/")
        groups |= {one for one in (group, *group.parents) if one.is_relative_to(cgroups)}
    for group in groups:
        # Version 2 of control groups has both numbers of the quota in one file, version 1 in two.
        quota = _numbers(group, "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
        if len(quota) == 2:
            cpus = max(1, min(cpus, quota[0] // quota[1]))
        memory = min([memory, *_numbers(group, "memory.max", "memory.limit_in_bytes")])
    return Machine(cpus, memory)


def default_workers(artifacts_dir: Path, cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """One worker per usable CPU, fewer if the memory does not suffice, at least one."""
    there = machine(cgroups)
    largest = max((path.stat().st_size for path in artifacts_dir.glob("v*/*") if path.is_file()), default=0)
    a_worker = WORKER_BYTES + MAX_BYTES + MODEL_FACTOR * largest  # with as many requests as it admits
    return max(1, min(there.cpus, there.memory // a_worker))


def _numbers(group: Path, *names: str) -> list[int]:
    """The positive numbers in a control group's files; `max` and -1 mean no limit and are left out."""
    content = " ".join((group / name).read_text() for name in names if (group / name).is_file())
    return [int(word) for word in content.split() if word.isdigit()]


# gunicorn calls create_app() without arguments; forked workers find the master's fleet here.
FLEET: ContextVar["Fleet"] = ContextVar("FLEET")


class Fleet:
    """The processes that serve together: here a single one, which waits for no other."""

    def __init__(self, settings: Settings, workers: int = 1) -> None:
        count_alone()
        self.settings, self.workers = settings, workers
        self.given = Given()  # labels given as feedback
        self.counts = Counts()  # requests of a canary and of the version beside it

    def served(self) -> tuple[Artifact, str]:
        """The verified artifact to serve; and why it is the fallback version, or an empty string."""
        return read_usable(self.settings)

    @property
    def all_loaded(self) -> bool:
        """Whether every worker has loaded the model."""
        return True

    @property
    def replaces(self) -> bool:
        """Whether a worker that starts now replaces one that has served."""
        return False

    def note_loaded(self) -> None:
        """This worker has loaded the model."""


def read_served(settings: Settings) -> Artifact:
    """The version named by APP_MODEL_VERSION or else by release.json, verified; raises ArtifactError."""
    version = settings.model_version
    with local_folder(settings, version) as root:
        artifact = read_artifact(root, version or read_release(root).serving, settings.trusted_keys)
    if settings.env == "production" and (missing := artifact.manifest.unpinned):
        raise ArtifactError(f"{artifact.manifest.version}/manifest.json: production needs {missing}")
    return artifact


def read_usable(settings: Settings) -> tuple[Artifact, str]:
    """The served version and ""; or APP_FALLBACK_VERSION and the reason why the served one is refused."""
    own_lookup(settings.lookup_on_miss == "degrade")  # here, so that an unfit function stops the start
    try:
        artifact = read_served(settings)
        import_libraries(artifact)  # in the master, so that workers share their memory
    except ArtifactError as error:
        return read_fallback(settings, error), str(error)
    return artifact, ""


def read_fallback(settings: Settings, error: Exception) -> Artifact:
    """The version named by APP_FALLBACK_VERSION, verified; raises `error` if none is set."""
    if settings.fallback_version is None:
        raise error
    return read_served(settings.model_copy(update={"model_version": settings.fallback_version}))
