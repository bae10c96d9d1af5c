"""What holds for the model that comes with the template only; left out once another is imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from app.core.store import read_artifact, read_release
from app.schemas.contract import served_contract_sha256
from lifecycle.command import LifecycleError
from lifecycle.package import Rows, baseline
from tests.service.conftest import DEMO, EXAMPLE, OTHER, Service, copied_artifacts, run
from tests.service.example import ARTIFACTS, Data, convert, fit, load, model_files, prove_parity, train
from tests.service.unit.test_artifacts import fitted, put, put_skops
from tests.service.unit.test_lifecycle import contents
from tests.service.where import TEMPLATE

pytestmark = pytest.mark.skipif(not DEMO, reason="another model was imported; these are of the demo's")
Start = Callable[..., Service]


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """A copy to change."""
    return copied_artifacts(tmp_path)


def test_the_examples_are_named_rightly(service: Service) -> None:
    """The first example of the documentation is a setosa and the second a virginica, both for sure."""
    for instance, label in ((EXAMPLE, "setosa"), (OTHER, "virginica")):
        body = service.predict(instance).json()
        assert (body["label"], body["action"]) == (label, "accept")
        assert body["score"] == body["probabilities"][label] == max(body["probabilities"].values()) > 0.9


def test_a_skops_model_is_served_like_any_other(artifacts: Path, tmp_path: Path, start: Start) -> None:
    """Server and golden path give scikit-learn's own answers, and an overflow is an error, not a NaN."""
    model = fitted()
    model[-1].coef_[2, 3] = 1e307  # times 0.2 it is a number, times 100 it is not
    put_skops(artifacts / "v1", model)
    (recorded,) = model.predict_proba([list(EXAMPLE.values())]).tolist()
    golden: dict[str, Any] = {"features": EXAMPLE, "tolerance": 1e-5}
    golden["probabilities"] = dict(zip(model.classes_.tolist(), recorded, strict=True))
    (golden["label"],) = model.predict([list(EXAMPLE.values())]).tolist()
    put(artifacts / "v1", "golden.jsonl", json.dumps(golden).encode())
    service = start(artifacts_dir=artifacts)
    for instance in (EXAMPLE, OTHER):
        answer = service.predict(instance).json()
        (probabilities,) = model.predict_proba(np.array([list(instance.values())], np.float32)).tolist()
        assert list(answer["probabilities"].values()) == probabilities
        assert answer["label"] == model.predict([list(instance.values())])[0]
        given = json.dumps(instance).encode()
        done = run(tmp_path, "app", "predict", stdin=given, artifacts_dir=artifacts)
        assert json.loads(done.stdout)["probabilities"] == answer["probabilities"]
        assert done.stderr == ""
    overflow = service.predict({**EXAMPLE, "petal_width": 100.0})
    assert (overflow.status_code, overflow.json()["code"]) == (500, "non_finite_output")
    assert service.metrics()['model_info{runtime="skops",' + model_labels(artifacts)] == 1


def model_labels(artifacts: Path) -> str:
    """The rest of the labels of `model_info`."""
    digest = json.loads((artifacts / "v1/manifest.json").read_bytes())["files"]["model.skops"]["sha256"]
    return f'sha256="{digest}",version="v1"}}'


@pytest.fixture(scope="module")
def data() -> Data:
    """The training data and its holdout."""
    return load()


@pytest.fixture(scope="module")
def made(data: Data) -> dict[str, bytes]:
    """The files of a freshly trained version."""
    return model_files("v1", data)


def test_training_again_elsewhere_gives_the_same_bytes(made: dict[str, bytes], tmp_path: Path) -> None:
    """Another process in another folder with another hash seed makes the same files, byte for byte."""
    subprocess.run(
        [sys.executable, "-m", "tests.service.example", "--artifacts", "made"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TEMPLATE), "PYTHONHASHSEED": "7"},
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


def test_the_committed_model_names_the_code_that_makes_it(made: dict[str, bytes]) -> None:
    """The manifest's code revision is the hash of tests/service/example.py as it is: else `make example`."""
    committed = json.loads((ARTIFACTS / "v1" / "manifest.json").read_bytes())
    assert (
        committed["training"]["code_revision"]
        == json.loads(made["manifest.json"])["training"]["code_revision"]
    )


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
    train(artifacts=tmp_path, version="v1", check=True, force=False)
    assert contents(tmp_path) == before


def test_a_version_that_differs_is_refused_in_one_line(tmp_path: Path) -> None:
    """Other bytes in a version stop --check and training, which name the file; only --force replaces it."""
    train(artifacts=tmp_path, version="v1", check=False, force=False)
    (tmp_path / "v1" / "model.onnx").write_bytes(b"tampered")
    before = contents(tmp_path)
    for check in (True, False):
        with pytest.raises(LifecycleError) as ended:
            train(artifacts=tmp_path, version="v1", check=check, force=False)
        (line,) = str(ended.value).splitlines()
        assert "v1" in line
        assert "model.onnx" in line
        assert contents(tmp_path) == before
    train(artifacts=tmp_path, version="v1", check=False, force=True)
    read_artifact(tmp_path, "v1")


def test_check_writes_nothing_where_nothing_is(tmp_path: Path) -> None:
    """--check on an empty folder fails and leaves it empty."""
    with pytest.raises(LifecycleError, match="v0 differs"):
        train(artifacts=tmp_path, version="v1", check=True, force=False)
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


def test_bins_are_as_many_as_the_rows_support() -> None:
    """Few training rows make few bins and many make ten, so that a share is never a guess from a few rows."""

    def made(rows: Rows) -> list[dict[str, Any]]:
        probabilities = np.full((len(rows), 3), 1 / 3)
        return list(json.loads(baseline(list(rows.T), probabilities))["features"].values())

    random = np.random.default_rng(0)
    for count, bins in ((30, 2), (120, 6), (5000, 10)):
        for feature in made(random.normal(5, 1, (count, 4))):
            assert len(feature["bins"]) == bins
            assert min(feature["counts"]) >= count / bins - 1
    assert [len(feature["bins"]) for feature in made(np.ones((500, 4)))] == [
        2
    ] * 4  # one value: it, and above
