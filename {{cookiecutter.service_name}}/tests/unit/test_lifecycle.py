"""Training and packaging: the same bytes every time, proven, and written whole or not at all."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer

from app.core.sizing import Machine, machine
from app.core.store import read_artifact, read_release
from app.schemas.contract import served_contract_sha256
from lifecycle.package import differing, publish
from lifecycle.size import MIB, Cost, advise, carried, table
from lifecycle.train import ARTIFACTS, Data, convert, fit, load, model_files, prove_parity, train
from load.profile import STAGES, Step, bottleneck, chart, report
from load.profile import Machine as Place

ROOT = ARTIFACTS.parent


@pytest.fixture(scope="module")
def data() -> Data:
    """The training data and its holdout."""
    return load()


@pytest.fixture(scope="module")
def made(data: Data) -> dict[str, bytes]:
    """The files of a freshly trained version."""
    return model_files("v1", data)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_training_again_elsewhere_gives_the_same_bytes(made: dict[str, bytes], tmp_path: Path) -> None:
    """Another process in another folder with another hash seed makes the same files, byte for byte."""
    subprocess.run(
        [sys.executable, "-m", "lifecycle", "train", "--artifacts", "made"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        check=True,
    )
    assert contents(tmp_path / "made" / "v1") == made


def test_a_fresh_training_passes_the_checks_of_the_service(tmp_path: Path) -> None:
    """What training writes is what the service verifies: release, stub and model, for the served contract."""
    train(artifacts=tmp_path, version="v1", check=False, force=False)
    release = read_release(tmp_path)
    assert (release.serving, release.previous) == ("v1", "v0")
    for version in ("v0", "v1"):
        assert read_artifact(tmp_path, version).manifest.contract_sha256 == served_contract_sha256()


def test_training_again_agrees_with_the_committed_model(made: dict[str, bytes]) -> None:
    """A fresh training gives the committed golden answers, whatever the versions of the libraries."""
    fresh = [json.loads(line) for line in made["golden.jsonl"].splitlines()]
    committed = [json.loads(line) for line in (ARTIFACTS / "v1" / "golden.jsonl").read_bytes().splitlines()]
    for ours, theirs in zip(fresh, committed, strict=True):
        assert ours["features"] == theirs["features"]
        assert ours["label"] == theirs["label"]
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-3)


def test_the_onnx_model_answers_as_scikit_learn_does(data: Data) -> None:
    """On every row the ONNX model gives scikit-learn's label and its probabilities within 1e-5."""
    pipeline = fit(data)
    prove_parity(pipeline, convert(pipeline), np.vstack([data.training, data.holdout]))


def test_a_model_that_answers_differently_is_not_packaged(data: Data) -> None:
    """A conversion that changed the answers is noticed before anything is written."""
    other = Data(data.training[::-1], data.training_labels, data.holdout, data.holdout_labels)
    with pytest.raises(ValueError, match="than scikit-learn"):
        prove_parity(fit(data), convert(fit(other)), data.holdout)


def test_the_model_gets_the_holdout_right(data: Data) -> None:
    """On the rows it never saw, the model is right in at least nine of ten."""
    assert fit(data).score(data.holdout, data.holdout_labels) >= 0.9


def test_the_baseline_counts_every_training_row_once(made: dict[str, bytes]) -> None:
    """For each feature, the score and the labels the baseline's counts add up to the training rows."""
    baseline = json.loads(made["baseline.json"])
    histograms = [*baseline["features"].values(), baseline["scores"]]
    assert {sum(entry["counts"]) + entry.get("missing", 0) for entry in histograms} == {baseline["rows"]}
    assert {len(entry["counts"]) - len(entry["edges"]) for entry in histograms} == {1}
    assert sum(baseline["labels"].values()) == baseline["rows"]


def test_an_equal_version_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training twice says `unchanged`, changes nothing, and --check agrees."""
    train(artifacts=tmp_path, version="v1", check=False, force=False)
    before = contents(tmp_path)
    capsys.readouterr()
    train(artifacts=tmp_path, version="v1", check=False, force=False)
    assert capsys.readouterr().out.count("unchanged") == 2
    with pytest.raises(typer.Exit) as ended:
        train(artifacts=tmp_path, version="v1", check=True, force=False)
    assert ended.value.exit_code == 0
    assert contents(tmp_path) == before


def test_a_version_that_differs_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other bytes in a version stop --check and training, which name the file; only --force replaces it."""
    train(artifacts=tmp_path, version="v1", check=False, force=False)
    (tmp_path / "v1" / "model.onnx").write_bytes(b"tampered")
    before = contents(tmp_path)
    capsys.readouterr()
    for check in (True, False):
        with pytest.raises(typer.Exit) as ended:
            train(artifacts=tmp_path, version="v1", check=check, force=False)
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.exit_code == 1
        assert "v1" in line
        assert "model.onnx" in line
        assert contents(tmp_path) == before
    train(artifacts=tmp_path, version="v1", check=False, force=True)
    read_artifact(tmp_path, "v1")


def test_check_writes_nothing_where_nothing_is(tmp_path: Path) -> None:
    """--check on an empty folder fails and leaves it empty."""
    with pytest.raises(typer.Exit) as ended:
        train(artifacts=tmp_path, version="v1", check=True, force=False)
    assert ended.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_new_version_does_not_take_over_serving(tmp_path: Path) -> None:
    """Training v2 adds a folder; what serves is still what release.json said before."""
    train(artifacts=tmp_path, version="v1", check=False, force=False)
    train(artifacts=tmp_path, version="v2", check=False, force=False)
    assert read_artifact(tmp_path, "v2").manifest.version == "v2"
    assert read_release(tmp_path).serving == "v1"


@pytest.mark.parametrize("version", ["latest", "v0", "../v1", ""])
def test_a_name_that_is_no_new_version_is_refused(version: str, tmp_path: Path) -> None:
    """Only v and a number names a version, and v0 is the stub's."""
    with pytest.raises(typer.BadParameter):
        train(artifacts=tmp_path, version=version, check=False, force=False)
    assert list(tmp_path.iterdir()) == []


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
    assert "350 MiB           70%                30,000  <-" in table(COST, small)


def test_processors_limit_the_workers_otherwise() -> None:
    """With memory to spare, or unknown, the advice is a worker a processor."""
    large = Machine(cpus=4, memory=16_000 * MIB)
    for cost in (COST, replace(COST, shared=None, worker=None)):
        workers, reason = advise(cost, large)
        assert workers == 4
        assert reason.startswith("CPU bound")
    assert "n/a" in table(replace(COST, shared=None, worker=None), large)


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
        (replace(STEP, server=1.95, model=1.9), 2, "the model, 97% of it"),
        (replace(STEP, server=1.5, model=0.2, client=0.4), 2, "Processor time of this machine"),
        (replace(STEP, server=1.0, client=0.97), 4, "The load generator"),
        (replace(STEP, refused={503: 900}, refused_share=0.3), 2, "Admission: 30% were refused"),
        (replace(STEP, stages=STEP.stages | {"queue": 9.0}), 2, "The longest stage is `queue`"),
        (replace(STEP, server=None), 2, "Unknown"),
    ],
)
def test_the_first_bottleneck_is_decided_by_figures(found: Step, workers: int, said: str) -> None:
    """The profile names what was used up first: workers, machine, load generator, admission, or nothing."""
    what, _ = bottleneck(found, Place(workers, max(workers, 2), "model v1"))
    assert said in what


def test_the_profile_survives_a_service_that_answers_nothing() -> None:
    """Where no request was answered with 200, the profile says what came instead."""
    nothing = replace(STEP, rate=0, p50=float("nan"), p95=float("nan"), p99=float("nan"), refused={401: 7})
    text = report([nothing], Place(2, 2, "model v1"), "profile.svg", "2026-01-01")
    assert "| 7 of 401 |" in text
    assert "does not hold" in text
    assert chart([nothing]).startswith("<svg ")
