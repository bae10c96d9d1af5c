"""Packaging and sizing: written whole or not at all, and advice from figures."""

from dataclasses import replace
from pathlib import Path

import pytest

from app.rollout.fleet import Machine, machine
from lifecycle.operations.size import MIB, Cost, advise, carried, size_table
from lifecycle.package import differing, publish
from load.run import STAGES, Step, bottleneck, draw, report


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failure_half_way_leaves_the_version_as_it_was(tmp_path: Path) -> None:
    """When a file cannot be written, the old version stays whole and nothing half-made lies beside it."""
    publish(tmp_path, "v1", {"model.onnx": b"old", "manifest.json": b"{}"})
    before = contents(tmp_path)
    with pytest.raises(OSError, match="no-such-folder"):
        publish(tmp_path, "v1", {"model.onnx": b"new", "no-such-folder/manifest.json": b"{}"})
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["v1"]


def test_a_run_killed_between_its_renames_loses_nothing(tmp_path: Path) -> None:
    """The old version, set aside by a run that was killed, comes back even when the next run fails too."""
    publish(tmp_path, "v1", {"model.onnx": b"old"})
    (tmp_path / "v1").rename(tmp_path / ".v1.old")
    with pytest.raises(OSError, match="no-such-folder"):
        publish(tmp_path, "v1", {"no-such-folder/model.onnx": b"new"})
    assert contents(tmp_path) == {str(Path("v1", "model.onnx")): b"old"}


def test_files_that_are_missing_or_too_many_count_as_different(tmp_path: Path) -> None:
    """A version differs by what it lacks and by what it has on top, not only by changed bytes."""
    publish(tmp_path, "v1", {"a": b"1", "b": b"2", "c": b"3"})
    assert differing(tmp_path / "v1", {"a": b"1", "b": b"x", "d": b"4"}) == ["b", "c", "d"]


COST = Cost(50 * MIB, 100 * MIB, model_seconds=1e-5, request_seconds=1e-4, execution="batch")
STEP = Step(
    connections=64, rate=10_000, p50=5, p95=8, p99=12, refused={}, refused_share=0,
    stages=dict.fromkeys((*STAGES, "total"), 1.0), rows_a_call=8, client=0.4, server=0.5, model=0.1, stray=0,
)  # fmt: skip


def test_memory_limits_the_workers_where_it_is_short() -> None:
    """Where memory carries fewer workers than there are processors, `make size` advises those few."""
    small = Machine(cpus=8, memory=500 * MIB)
    assert carried(COST, small) == 3  # 80 % of 500 MiB, less the 50 that all share
    workers, reason = advise(COST, small)
    assert workers == 3
    assert reason.startswith("memory bound")
    cells = [line.replace("|", " ").split() for line in size_table(COST, small).splitlines()]
    assert ["3", "350", "MiB", "70%", "30,000", "<-"] in cells


def test_processors_limit_the_workers_otherwise() -> None:
    """With memory to spare, or unknown, the advice is a worker a processor."""
    large = Machine(cpus=4, memory=16_000 * MIB)
    for cost in (COST, replace(COST, shared=None, worker=None)):
        workers, reason = advise(cost, large)
        assert workers == 4
        assert reason.startswith("CPU bound")
    assert "n/a" in size_table(replace(COST, shared=None, worker=None), large)


def test_a_machine_too_small_still_gets_a_worker() -> None:
    """The advice is never less than one worker."""
    assert advise(COST, Machine(cpus=1, memory=10 * MIB))[0] == 1


def test_limits_of_a_container_count(tmp_path: Path) -> None:
    """A container's quota and memory limit are what a machine has."""
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text(f"{300 * MIB}\n")
    assert machine(tmp_path) == Machine(cpus=1, memory=300 * MIB)


@pytest.mark.parametrize(
    ("found", "workers", "said"),
    [
        (replace(STEP, server=1.95, model=0.2), 2, "Processor time of the workers: 1.9"),
        (replace(STEP, server=1.95, model=1.9), 2, "97% of it in the model"),
        (replace(STEP, server=1.5, model=0.2, client=0.4), 2, "Processor time of this machine"),
        (replace(STEP, server=1.0, client=0.97), 4, "The load generator"),
        (replace(STEP, refused={503: 900}, refused_share=0.3), 2, "Admission: 30% were refused"),
        (replace(STEP, stages=STEP.stages | {"queue": 9.0}), 2, "The longest stage is `queue`"),
        (replace(STEP, rate=0.0), 2, "Unknown"),
    ],
)
def test_the_first_bottleneck_is_decided_by_figures(found: Step, workers: int, said: str) -> None:
    """The profile names what was used up first: workers, machine, load generator, admission, or nothing."""
    what, _ = bottleneck(found, workers, max(workers, 2))
    assert said in what


def test_the_profile_survives_a_service_that_answers_nothing(tmp_path: Path) -> None:
    """Where no request was answered with 200, the profile says what came instead."""
    nothing = replace(STEP, rate=0, p50=float("nan"), p95=float("nan"), p99=float("nan"), refused={401: 7})
    text = report([nothing], 2, 2, "model v1", "profile.svg")
    assert "| 7 of 401 |" in text
    assert "does not hold" in text
    draw([nothing], tmp_path / "profile.svg")
    assert "<svg " in (tmp_path / "profile.svg").read_text("utf-8")
