"""How many workers this machine carries, from the CPUs and the memory the process may really use."""

import os
from dataclasses import dataclass
from pathlib import Path

WORKER_BYTES = 120 * 2**20  # a worker with the runtime and a tiny model, measured, rounded up
MODEL_FACTOR = 4  # a loaded model takes up to this many times the size of its file


@dataclass(frozen=True)
class Machine:
    """Processors and bytes of memory that the service may use."""

    cpus: int
    memory: int


def machine(cgroup: Path = Path("/sys/fs/cgroup")) -> Machine:
    """The processors and the memory that the limits of a container, if there are any, leave."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Version 2 of cgroups has both numbers in one file, version 1 in two.
    quota = _numbers(cgroup / "cpu.max") or [
        *_numbers(cgroup / "cpu/cpu.cfs_quota_us"),
        *_numbers(cgroup / "cpu/cpu.cfs_period_us"),
    ]
    if len(quota) == 2:
        cpus = max(1, min(cpus, quota[0] // quota[1]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        memory = min(memory, *_numbers(cgroup / limit), memory)
    return Machine(cpus, memory)


def default_workers(artifacts_dir: Path, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """One worker per usable CPU, fewer where memory does not carry as many, at least one."""
    there = machine(cgroup)
    largest = max((path.stat().st_size for path in artifacts_dir.glob("v*/*") if path.is_file()), default=0)
    return max(1, min(there.cpus, there.memory // (WORKER_BYTES + MODEL_FACTOR * largest)))


def _numbers(path: Path) -> list[int]:
    """The positive numbers of a cgroup's file; `max` and -1 mean that there is no limit."""
    words = path.read_text().split() if path.is_file() else []
    return [int(word) for word in words if word.isdigit()]
