"""How many workers this machine carries, from the CPUs and the memory the process may really use."""

import os
from pathlib import Path

WORKER_BYTES = 120 * 2**20  # a worker with the runtime and a tiny model, measured, rounded up
MODEL_FACTOR = 4  # a loaded model takes up to this many times the size of its file


def default_workers(artifacts_dir: Path, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """One worker per usable CPU, fewer where memory (bytes) does not carry as many, at least one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if quota.isdigit():
        cpus = min(cpus, int(quota) // int(period))
    memory, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _read(cgroup / "memory.max")
    if limit.isdigit():
        memory = min(memory, int(limit))
    largest = max((path.stat().st_size for path in artifacts_dir.glob("v*/*") if path.is_file()), default=0)
    return max(1, min(cpus, memory // (WORKER_BYTES + MODEL_FACTOR * largest)))


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
