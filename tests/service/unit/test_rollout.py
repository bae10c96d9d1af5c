"""When a canary ends, who gets it, and what the commands say and write, without a server."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from app.core.store import Release
from app.observability.metrics import Metrics
from app.rollout.canary import MIN_REQUESTS, REASONS, Canary, Counts, worse
from app.rollout.models import Wanted, wanted
from lifecycle.__main__ import commands
from lifecycle.release.rollout import comparison, sides
from tests.service.conftest import ARTIFACTS, SERVED


class Stub:
    """As much of a pipeline as a canary looks at."""

    def __init__(self, version: str = "v2") -> None:
        self.version = version


def canary(percent: int, counts: Counts | None = None, version: str = "v2") -> Canary:
    """One worker's canary."""
    stub: Any = Stub(version)
    return Canary(stub, "v1", percent, counts or Counts(), 1, Metrics())


def asked(one: Canary, taken: bool, times: int, status: int = 200, seconds: float = 0.01) -> None:
    """So many requests that ended so."""
    for _ in range(times):
        one.note(taken, status, seconds)


def judged(*requests: tuple[bool, int, int, float]) -> str | None:
    """Why a canary ends that saw (taken, times, status, seconds) each; None if it goes on."""
    counts = Counts()
    counts.begin(1)
    one = canary(10, counts)
    for taken, times, status, seconds in requests:
        asked(one, taken, times, status, seconds)
    verdict = one.judge()
    return str(verdict["reason"]) if verdict else None


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([(True, MIN_REQUESTS - 1, 500, 0.01)], None),
        ([(True, MIN_REQUESTS, 500, 0.01)], "errors"),
        ([(True, 100, 200, 0.01), (False, 900, 200, 0.01)], None),
        ([(True, 90, 200, 0.01), (True, 10, 503, 0.01), (False, 900, 200, 0.01)], "errors"),
        # As bad as the served version, or hardly worse.
        ([(True, 90, 200, 0.01), (True, 10, 500, 0.01), (False, 81, 200, 0.01), (False, 9, 500, 0.01)], None),
        ([(True, 9950, 200, 0.01), (True, 50, 500, 0.01), (False, 90_000, 200, 0.01)], None),
        # A client's own mistakes are nobody's failures.
        ([(True, 100, 422, 0.01), (False, 900, 200, 0.01)], None),
        ([(True, 100, 200, 0.05), (False, 900, 200, 0.01)], "latency"),
        ([(True, 100, 200, 0.013), (False, 900, 200, 0.01)], None),
        ([(True, 95, 200, 0.01), (True, 5, 200, 1.0), (False, 900, 200, 0.01)], None),
        ([(True, 80, 200, 0.01), (True, 20, 200, 1.0), (False, 900, 200, 0.01)], "latency"),
        # Slow beside too few to compare with.
        ([(True, 100, 200, 1.0), (False, MIN_REQUESTS - 1, 200, 0.01)], None),
    ],
)  # fmt: skip
def test_a_canary_ends_where_it_does_worse(requests: list[Any], reason: str | None) -> None:
    """By more than a margin and than chance, in failures or in latency, and never by too few requests."""
    assert judged(*requests) == reason


def test_chance_ends_hardly_any_canary() -> None:
    """Of a thousand canaries no different from what is served, judged once each, at most five end."""
    random = np.random.default_rng(0)
    ended = 0
    for _ in range(1000):
        arms = [np.zeros(73, np.int64), np.zeros(73, np.int64)]
        for arm, requests in zip(arms, (1800, 200), strict=True):
            failed = random.random(requests) < 0.02
            buckets = np.minimum(72, 1 + random.lognormal(3, 0.3, requests).astype(int))
            np.add.at(arm, np.where(failed, 0, buckets), 1)
        ended += REASONS[worse(*arms)] is not None
    assert ended <= 5


def test_workers_decide_together() -> None:
    """What each worker saw too little of ends the canary in all of them, and in one that starts later."""
    counts = Counts()
    assert not counts.begin(1)
    first, second = canary(10, counts), canary(10, counts)
    asked(first, True, MIN_REQUESTS // 2, 500)
    assert first.judge() is None
    asked(second, True, MIN_REQUESTS // 2, 500)
    verdict = second.judge()
    assert verdict is not None
    assert verdict["canary"]["requests"] == verdict["canary"]["errors"] == MIN_REQUESTS
    assert first.judge() == verdict
    assert counts.begin(1)
    # Another release is another beginning, and what a worker still has of the one before does not count.
    assert not counts.begin(2)
    asked(first, True, 2 * MIN_REQUESTS, 500)
    assert first.judge() is None


def test_who_has_a_canary_keeps_it() -> None:
    """A larger share takes more clients and loses none; another version takes others; 0 and 100 are exact."""
    clients = [f"client {number}" for number in range(2000)]
    takers = {percent: {one for one in clients if canary(percent).takes(one)} for percent in (0, 10, 30, 100)}
    assert takers[0] == set()
    assert takers[10] < takers[30] < takers[100] == set(clients)
    assert len(takers[10]) == pytest.approx(200, abs=40)
    other = {one for one in clients if canary(10, version="v3").takes(one)}
    assert len(other & takers[10]) < 60


@pytest.mark.parametrize(
    ("change", "beside"),
    [
        ({}, {}),
        ({"shadow": "v2"}, {"shadow": Wanted("v2")}),
        ({"shadow": "v1"}, {}),
        ({"canary": "v2", "canary_percent": 10}, {"canary": Wanted("v2", 10, "v1")}),
        ({"canary": "v2"}, {}),
        ({"canary": "v1", "canary_percent": 10}, {}),
    ],
)
def test_what_is_released_beside(change: dict[str, Any], beside: dict[str, Any]) -> None:
    """A version beside itself is none, and neither is a canary for nobody."""
    roles = wanted(Release(serving="v1", **change))
    assert roles == {"serving": Wanted("v1"), "canary": None, "shadow": None, **beside}


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """Artifacts of one's own."""
    return Path(shutil.copytree(ARTIFACTS, tmp_path / "artifacts"))


def lifecycle(*arguments: object) -> tuple[int, str]:
    """Exit code and words of `python -m lifecycle ...`."""
    command: typer.Typer = commands
    done = CliRunner().invoke(command, [str(one) for one in arguments])
    return done.exit_code, done.output


def test_shadow_and_canary_change_the_release(artifacts: Path) -> None:
    """`make shadow` and `make canary` write release.json, each its own part, and take it back."""
    released = json.loads((artifacts / "release.json").read_bytes())
    assert lifecycle("shadow", "--version=v0", "--artifacts", artifacts)[0] == 0
    assert lifecycle("canary", "--version=v0", "--percent=20", "--artifacts", artifacts)[0] == 0
    beside = {"shadow": "v0", "canary": "v0", "canary_percent": 20}
    assert json.loads((artifacts / "release.json").read_bytes()) == released | beside
    assert lifecycle("shadow", "--end", "--artifacts", artifacts)[0] == 0
    assert lifecycle("canary", "--end", "--artifacts", artifacts)[0] == 0
    assert (artifacts / "release.json").read_bytes() == (ARTIFACTS / "release.json").read_bytes()


@pytest.mark.parametrize(
    ("version", "reason"),
    [("v99", "there is no such version"), (SERVED, "serves already"), ("x", "not a version")],
)
@pytest.mark.parametrize("command", ["shadow", "canary"])
def test_what_cannot_be_beside_is_refused(artifacts: Path, command: str, version: str, reason: str) -> None:
    """One line says why, and release.json stays as it is."""
    code, said = lifecycle(command, f"--version={version}", "--artifacts", artifacts)
    (line,) = said.splitlines()
    assert (code, reason in line) == (1, True)
    assert (artifacts / "release.json").read_bytes() == (ARTIFACTS / "release.json").read_bytes()


def histogram(name: str, labels: dict[str, str], counts: dict[str, float]) -> list[Any]:
    """Samples of a histogram, from cumulative counts by bound."""
    return [(f"{name}_bucket", {**labels, "le": bound}, count) for bound, count in counts.items()]


def test_versions_stand_side_by_side() -> None:
    """`make compare`: traffic, agreement, failures, quantiles as Prometheus has them, and a verdict."""
    v1, v2, shadow = {"model_version": "v1"}, {"model_version": "v2"}, {"shadow_version": "v3"}
    calls = {"0.001": 80.0, "0.01": 100.0, "+Inf": 100.0}
    samples = [
        ("model_info", {"version": "v1"}, 1.0),
        ("model_info", {"version": "v0"}, 0.0),
        ("predictions_total", {**v1, "label": "a", "action": "accept"}, 900.0),
        ("predictions_total", {**v2, "label": "a", "action": "accept"}, 400.0),
        ("canary_requests_total", v1, 900.0),
        ("canary_requests_total", v2, 400.0),
        ("canary_failures_total", v2, 20.0),
        *(("shadow_predictions_total", {**shadow, "agreement": one}, count)
          for one, count in (("agree", 450.0), ("disagree", 50.0), ("error", 0.0), ("dropped", 400.0))),
        *histogram("model_call_duration_seconds", v1, calls),
        *histogram("model_call_duration_seconds", {"model_version": "v3"}, calls),
        *histogram("shadow_score", shadow, {"0.5": 50.0, "1.0": 100.0, "+Inf": 100.0}),
    ]  # fmt: skip
    found = sides(samples)
    assert [(side.version, side.role, side.rows) for side in found] == [
        ("v1", "serving", 900), ("v2", "canary", 400), ("v3", "shadow", 500),
    ]  # fmt: skip
    assert found[2].agreement == 0.9
    assert found[1].failures == 0.05
    assert found[0].quantile("model_call_duration_seconds", 0.9) == pytest.approx(0.0055)
    assert found[2].quantile("shadow_score", 0.5) == pytest.approx(0.5)
    lines = [line.strip("| ") for line in comparison(found).splitlines()]
    assert lines[3].endswith("fails too often")
    assert lines[4].endswith("try as canary")
    assert "90.0%" in lines[4]
    assert len(lines) == 5


def test_without_anything_beside_there_is_nothing_to_compare(tmp_path: Path) -> None:
    """One line says so."""
    (tmp_path / "scrape").write_text('model_info{version="v1"} 1.0\n')
    code, said = lifecycle("compare", "--metrics", tmp_path / "scrape")
    (line,) = said.splitlines()
    assert (code, "no shadow and no canary" in line) == (1, True)
