"""The benchmark serves the right model and reports right. No figure is judged: machines differ."""

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from benchmarks.run import BARE, OURS, RAW, SEED, report
from scripts.demo import serving
from scripts.render import ROOT
from tests.conftest import Render, run

BIN = Path(".venv", "Scripts" if os.name == "nt" else "bin")


@pytest.fixture(scope="module")
def medium(render: Render) -> Path:
    """A default render that was given the medium model; what trains a model can also serve it."""
    folder = render().folder
    for command in (
        [sys.executable, "-m", "venv", ".venv"],
        [
            BIN / "python",
            "-m",
            "pip",
            "install",
            "--require-hashes",
            "--requirement",
            "requirements/dev.txt",
        ],
    ):
        ended = run(*command, cwd=folder, PIP_QUIET="1")
        assert ended.returncode == 0, ended.stdout[-20_000:]
    python = folder / BIN / "python"
    ended = run(python, "-m", "benchmarks.medium", folder, cwd=ROOT, PROVE_SERVICE=str(folder))
    assert ended.returncode == 0, ended.stdout[-20_000:]
    return folder


@pytest.mark.slow
def test_the_medium_model_answers_like_scikit_learn(medium: Path) -> None:
    """The copy with 30 features and 200 trees answers over HTTP with the probabilities of scikit-learn."""
    lines = (medium / "artifacts" / "v1" / "golden.jsonl").read_text(encoding="utf-8").splitlines()
    golden = [json.loads(line) for line in lines]
    assert {len(row["features"]) for row in golden} == {30}
    assert {row["label"] for row in golden} == {"benign", "malignant"}
    with serving(medium) as address:
        for row in golden:
            answer = predict(address, row["features"])
            assert answer["label"] == row["label"]
            expected = pytest.approx(row["probabilities"], abs=row["tolerance"])
            assert answer["probabilities"] == expected


def predict(address: str, features: dict[str, float]) -> Any:
    """The answer to one instance."""
    body, kind = json.dumps(features).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/predict", body, kind)) as response:
        return json.load(response)


def measured(rate: float, p99: float) -> dict[str, Any]:
    """What the harness notes of one server in one round."""
    noise = {"errors": 0, "other_cores": 0.1, "stolen_cores": 0.0}
    points = [{"c": c, "rps": rate, "p50_ms": 1.0, "p99_ms": p99, **noise} for c in (1, 64)]
    return {"points": points, "loaded": {"pss_mb": 100.0}}


def recorded(folder: Path, run: str, *rounds: dict[str, Any], model: str = "tiny") -> None:
    """Writes a result as the harness does."""
    setup = {"workers": 2, "cpus": 2, "duration_s": 8, "started": "2026-01-01 00:00:00"}
    (folder / f"{model}-{run}.json").write_text(json.dumps({"setup": setup, "rounds": rounds}))


def test_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    """A ratio is the median of those of each round, so a round on a slower machine counts like any other."""
    rounds = [{OURS: measured(rate, 9), RAW: measured(2 * rate, 3)} for rate in (1000, 10, 500)]
    recorded(tmp_path, "1", *rounds)
    text = report(tmp_path)
    assert f"| at least 0.40 of the requests/s of `{RAW}` at 64 | 0.50 |" in text
    assert f"| at most 2.5 times the p99 of `{RAW}` at 64 | 3.00 |" in text
    assert f"| at least 7 times the requests/s of `{SEED}` at 64 | not measured |" in text
    assert "## medium" not in text


def test_parts_measured_later_are_added(tmp_path: Path) -> None:
    """A server of a later run is compared with this service as that run found it, a silent one not at all."""
    recorded(tmp_path, "1", {OURS: measured(100, 1), RAW: measured(100, 1), SEED: measured(10, 1)})
    recorded(tmp_path, "2", {OURS: measured(50, 1), SEED: measured(10, 1), "litserve": measured(0, 0)})
    recorded(tmp_path, "3", {OURS: {"error": "interrupted"}})
    text = report(tmp_path)
    assert f"| at least 0.40 of the requests/s of `{RAW}` at 64 | 1.00 |" in text
    assert f"| at least 7 times the requests/s of `{SEED}` at 64 | 5.00 |" in text
    assert "| litserve | 0 | - |" in text


def test_observation_is_weighed_against_none(tmp_path: Path) -> None:
    """What observation costs is the service against itself without it, in the same round."""
    rounds = [{OURS: measured(0.8 * rate, 9), BARE: measured(rate, 9)} for rate in (1000, 10, 500)]
    recorded(tmp_path, "1", *rounds, model="cost-tiny")
    assert "| tiny | 400 | 500 | 0.80 | at least 0.70 |" in report(tmp_path)


def test_without_the_harness_there_is_one_line() -> None:
    """Where the reference servers are not at hand, the benchmark says so in one line and measures nothing."""
    ended = run(sys.executable, "-m", "benchmarks.run", "--peers", "nowhere", cwd=ROOT)
    assert ended.returncode == 1
    (line,) = ended.stdout.splitlines()
    assert line.startswith("benchmark: there is no harness in ")
