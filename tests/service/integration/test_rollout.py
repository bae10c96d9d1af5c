"""A version beside the served one: a shadow nobody sees, a canary for some, a fallback for a bad start."""

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.service.conftest import INPUTS, Service, copied_artifacts, golden_set, run, serving, until
from tests.service.conftest import SERVED as RELEASED
from tests.service.integration.test_artifacts import edit, rewrite
from tests.service.integration.test_release import FAILURES, Start, add, events, misremember

SERVED = "v1"
USUAL = {one["name"]: one["example"] for one in INPUTS.values()}
# A row that a rule can tell from the manifest's example, and the feature by which.
FEATURE, ODD = next(
    (name, row["features"])
    for row in golden_set(RELEASED)
    for name, value in row["features"].items()
    if value is not None and value != USUAL[name]
)
ROWS = [row["features"] for row in golden_set(RELEASED)]


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """Artifacts of one's own, in which v1 serves."""
    return copied_artifacts(tmp_path)


def release(root: Path, **change: object) -> None:
    """Change release.json, the whole file at once."""
    document = json.loads((root / "release.json").read_bytes()) | change
    (root / "release.new").write_text(json.dumps(document))
    (root / "release.new").replace(root / "release.json")


def ruled(root: Path, version: str, change: Callable[[dict[str, Any]], object]) -> None:
    """A version made of v0's rules, changed, and without a golden set."""
    folder = Path(shutil.copytree(root / "v0", root / version))
    rules = json.loads((folder / "rules.json").read_bytes())
    change(rules)
    (folder / "golden.jsonl").unlink()
    edit(folder / "manifest.json", lambda manifest: manifest.update(version=version))
    edit(folder / "manifest.json", lambda manifest: manifest["files"].pop("golden.jsonl"))
    rewrite(folder, "rules.json", json.dumps(rules).encode())


def erring(rules: dict[str, Any]) -> None:
    """No number for a row that is not the example."""
    broken = {key: float("nan") if key in ("score", "value") else value
              for key, value in rules["otherwise"].items()}  # fmt: skip
    rules["rules"].insert(0, {"when": {FEATURE: {"==": ODD[FEATURE]}}, **broken})


def laborious(rules: dict[str, Any]) -> None:
    """Many rules that never hold."""
    never = {"when": {FEATURE: {"==": ODD[FEATURE], ">": ODD[FEATURE]}}, **rules["otherwise"]}
    rules["rules"] = [never] * 10_000 + rules["rules"]


def ask(service: Service, features: Any, session: object = "") -> tuple[int, dict[str, Any]]:
    """Status and document of a prediction on a fresh connection, which any worker may take."""
    headers = {"content-type": "application/json"} | ({"x-session-id": f"{session}"} if session != "" else {})
    connection = service.connection()
    try:
        connection.request("POST", "/v1/predict", json.dumps(features), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def shadowed(service: Service, version: str) -> Counter[str]:
    """Rows of a shadow by agreement."""
    prefix = 'shadow_predictions_total{agreement="'
    counts = Counter[str]()
    for name, value in service.metrics().items():
        if name.startswith(prefix) and f'shadow_version="{version}"' in name:
            counts[name.removeprefix(prefix).partition('"')[0]] += int(value)
    return counts


def alike(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> bool:
    """Whether two answers agree."""
    if "label" in one:
        return bool(one["label"] == other["label"])
    return bool(abs(one["value"] - other["value"]) <= tolerance)


def test_a_shadow_is_counted_and_never_seen(start: Start, artifacts: Path, tmp_path: Path) -> None:
    """Clients get the served version's answers, and each row is counted once, as agreed on or not."""
    release(artifacts, shadow="v0")
    service = start(artifacts_dir=artifacts)
    until(lambda: events(service, "shadow", "v0") == 2, "the shadow in both workers")
    answers = [ask(service, row)[1] for row in ROWS]
    assert {answer["model_version"] for answer in answers} == {SERVED}
    (tmp_path / "rows.json").write_text(json.dumps({"instances": ROWS}))
    alone = run(tmp_path, "app", "predict", "rows.json", model_version="v0", artifacts_dir=artifacts)
    own = [json.loads(line) for line in alone.stdout.splitlines()]
    outputs = json.loads((artifacts / "v0" / "manifest.json").read_bytes())["outputs"]
    tolerance = outputs.get("feedback_tolerance", 0)
    agreed = sum(alike(answer, one, tolerance) for answer, one in zip(answers, own, strict=True))
    found = until(
        lambda: counts if (counts := shadowed(service, "v0")).total() == len(ROWS) else None,
        "every row's count",
    )
    assert found == {"agree": agreed, "disagree": len(ROWS) - agreed, "error": 0, "dropped": 0}
    metrics = service.metrics()
    assert not any(value for name, value in metrics.items() if "predictions_total" in name and
                   'model_version="v0"' in name)  # fmt: skip
    assert metrics['model_call_duration_seconds_count{model_version="v0"}'] >= 1
    (tmp_path / "scrape.txt").write_text(httpx2.get(f"{service.url}/metrics").text)
    picture = tmp_path / "compare.svg"
    said = run(
        tmp_path, "lifecycle", "compare", "--metrics", "scrape.txt", "--picture", str(picture)
    ).stdout.splitlines()
    assert [line.replace("|", " ").split()[:3] for line in said[2:4]] == [
        [SERVED, "serving", str(len(ROWS))],
        ["v0", "shadow", str(len(ROWS))],
    ]
    assert f"{agreed / len(ROWS):.1%}" in said[3]
    assert picture.read_bytes().rstrip().endswith(b"</svg>")
    release(artifacts, shadow=None)
    until(lambda: events(service, "shadow", None) == 2, "the end of the shadow")
    ask(service, ROWS[0])
    assert shadowed(service, "v0") == found


def test_under_load_the_shadow_goes_first(start: Start, artifacts: Path) -> None:
    """At overload whoever is let in is answered, the others told to come back; it is the shadow that pays."""
    ruled(artifacts, "v2", laborious)
    release(artifacts, serving="v2", shadow=SERVED)
    service = start(workers=1, artifacts_dir=artifacts, max_concurrency=4, max_queue=4)
    until(lambda: events(service, "shadow", SERVED) == 1, "the shadow")
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda at: ask(service, ROWS[at % len(ROWS)]), range(400)))
    status = Counter(status for status, _ in answers)
    assert status.keys() == {200, 503}
    assert {answer["code"] for status, answer in answers if status == 503} == {"overloaded"}
    found = until(
        lambda: counts if (counts := shadowed(service, SERVED)).total() == status[200] else None,
        "every row's count",
    )
    assert found["dropped"] > 0
    assert found["error"] == 0


def test_a_client_keeps_its_version(start: Start, artifacts: Path, tmp_path: Path) -> None:
    """About as many clients as released get the canary, each always the same version, from every replica."""
    add(artifacts, "v2")
    release(artifacts, canary="v2", canary_percent=30)
    sessions = range(200)
    settings: dict[str, Any] = {"artifacts_dir": artifacts, "canary_header": "X-Session-ID"}
    service = start(**settings)
    (tmp_path / "other").mkdir()
    with serving(tmp_path / "other", workers=1, **settings) as replica:
        until(lambda: events(service, "canary", "v2") == 2, "the canary in both workers")
        until(lambda: events(replica, "canary", "v2") == 1, "the canary in the replica")
        asked = [
            {at: ask(where, USUAL, at)[1]["model_version"] for at in sessions}
            for where in (service, service, replica)
        ]
    assert asked[0] == asked[1] == asked[2]
    shares = Counter(asked[0].values())
    assert shares.keys() == {SERVED, "v2"}
    assert shares["v2"] == pytest.approx(0.3 * len(sessions), abs=0.07 * len(sessions))
    metrics = service.metrics()
    for version, clients in shares.items():
        assert metrics[f'canary_requests_total{{model_version="{version}"}}'] == 2 * clients
        assert metrics[f'canary_duration_seconds_count{{model_version="{version}"}}'] == 2 * clients
        assert metrics[f'canary_failures_total{{model_version="{version}"}}'] == 0
    assert metrics["canary_percent"] == 30
    # Without the header it is the key or the address that counts.
    assert len({ask(service, USUAL)[1]["model_version"] for _ in range(20)}) == 1
    assert service.client.get("/ready").json()["model_version"] == SERVED


def test_a_canary_that_fails_ends_by_itself(start: Start, artifacts: Path) -> None:
    """After enough failures all workers, also those that come later, give nobody the canary any more."""
    ruled(artifacts, "v2", erring)
    release(artifacts, canary="v2", canary_percent=50)
    service = start(artifacts_dir=artifacts, canary_header="X-Session-ID")
    until(lambda: events(service, "canary", "v2") == 2, "the canary in both workers")
    got: Counter[tuple[int, str]] = Counter()

    def stopped() -> bool:
        for session in range(20):
            status, answer = ask(service, ODD, session)
            got[status, answer.get("code", "")] += 1
        return events(service, "canary stopped", "v2") == 2

    until(stopped, "the end of the canary in both workers")
    assert got.keys() == {(200, ""), (500, "non_finite_output")}
    line = next(line for line in service.lines() if line["event"] == "canary stopped")
    assert line["reason"] == "errors"
    assert line["canary"]["requests"] >= 100
    assert line["canary"]["errors"] == line["canary"]["requests"]
    assert line["served"]["errors"] == 0
    os.kill(service.workers()[0], signal.SIGKILL)
    until(lambda: events(service, "canary", "v2") == 3, "a new worker")
    assert next(line for line in reversed(service.lines()) if line["event"] == "canary")["stopped"]
    answers = [ask(service, ODD, session) for session in range(50)]
    assert {(status, answer["model_version"]) for status, answer in answers} == {(200, SERVED)}
    metrics = service.metrics()
    assert (metrics["canary_percent"], metrics["canary_stopped"]) == (0, 1)
    assert json.loads((artifacts / "release.json").read_bytes())["canary_percent"] == 50
    release(artifacts, canary_percent=60)
    until(lambda: events(service, "canary", "v2") == 5, "another attempt")
    assert service.metrics()["canary_stopped"] == 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(shutil.rmtree, "v2: there is no such version"), (misremember, "v2/golden.jsonl: line 1")],
    ids=["absent", "wrong answers"],
)
@pytest.mark.parametrize("role", ["shadow", "canary"])
def test_a_bad_version_comes_beside_nobody(
    start: Start, artifacts: Path, role: str, spoil: Callable[[Path], object], reason: str
) -> None:
    """It is refused, logged and counted, all clients get the served version; mended, it is used."""
    spoil(add(artifacts, "v2"))
    release(artifacts, **{role: "v2"}, canary_percent=100)
    service = start(workers=1, artifacts_dir=artifacts)
    until(lambda: events(service, "release refused", SERVED), "the refusal")
    line = next(line for line in service.lines() if line["event"] == "release refused")
    assert (line["role"], reason in line["reason"]) == (role, True)
    assert service.metrics()[FAILURES] >= 1
    assert service.predict(USUAL).json()["model_version"] == SERVED
    shutil.rmtree(artifacts / "v2", ignore_errors=True)
    add(artifacts, "v2")
    until(lambda: events(service, role, "v2"), "v2, mended")
    assert service.predict(USUAL).json()["model_version"] == ("v2" if role == "canary" else SERVED)


@pytest.mark.parametrize(
    "spoil",
    [lambda folder: (folder / "manifest.json").write_text("{"), misremember],
    ids=["no manifest", "wrong answers"],
)
def test_a_bad_start_falls_back(
    start: Start, artifacts: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    """With APP_FALLBACK_VERSION another version stands in for a bad one, and says so; mended, it serves.

    Released itself, it stands in for nobody any more.
    """
    shutil.copytree(artifacts / SERVED, tmp_path / "good")
    spoil(artifacts / SERVED)
    service = start(artifacts_dir=artifacts, fallback_version="v0")
    until(lambda: events(service, "fallback serves", "v0") == 2, "both workers")
    line = next(line for line in service.lines() if line["event"] == "fallback serves")
    assert line["level"] == "error"
    assert SERVED in line["reason"]
    assert service.predict(USUAL).json()["model_version"] == "v0"
    assert service.client.get("/ready").json()["model_version"] == "v0"
    assert service.metrics()["model_fallback"] == 1
    release(artifacts, serving="v0")
    until(lambda: events(service, "ready", "v0") == 4, "the release of what stands in")
    assert service.metrics()["model_fallback"] == 0
    shutil.rmtree(artifacts / SERVED)
    shutil.copytree(tmp_path / "good", artifacts / SERVED)
    release(artifacts, serving=SERVED)
    until(lambda: events(service, "ready", SERVED) == 2, "the mended version")
    assert service.predict(USUAL).json()["model_version"] == SERVED
    assert service.metrics()["model_fallback"] == 0
