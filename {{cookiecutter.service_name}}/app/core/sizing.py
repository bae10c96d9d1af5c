"""How many workers this machine carries, from the CPUs and the memory the process may really use."""

import os
from pathlib import Path

WORKER_BYTES = 120 * 2**20  # a worker with the runtime loaded and a tiny model, measured, rounded up
MODEL_FACTOR = 4  # a loaded model takes up to this many times the size of its file
_CGROUP = Path("/sys/fs/cgroup")


def default_workers(artifacts_dir: Path) -> int:
    """One worker per usable CPU, fewer where memory does not carry as many, at least one."""
    largest = max((path.stat().st_size for path in artifacts_dir.glob("v*/*") if path.is_file()), default=0)
    return max(1, min(usable_cpus(), usable_memory() // (WORKER_BYTES + MODEL_FACTOR * largest)))


def usable_cpus(cgroup: Path = _CGROUP) -> int:
    """CPUs by affinity and by the cgroup's quota, at least one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    return max(1, min(cpus, int(quota) // int(period))) if quota.isdigit() else cpus


def usable_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes by the cgroup's limit and the machine's memory."""
    total: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read(cgroup / "memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
