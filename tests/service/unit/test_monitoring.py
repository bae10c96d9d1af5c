"""Drift, feedback and quality without a server: what is counted, judged and computed from it."""

import asyncio
import itertools
import json
import multiprocessing
import os
import re
import subprocess
from collections import Counter, defaultdict
from collections import Counter as Tally
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from structlog.testing import CapturingLogger
from typer.testing import CliRunner, Result

from app.core.batcher import Batch
from app.core.errors import ServiceError
from app.monitoring.drift import (
    COUNT_ROWS,
    COUNT_SECONDS,
    LEAST_ROWS,
    LINE_ROWS,
    MISSING,
    OTHER,
    ROWS_A_BIN,
    Calls,
    Drift,
    settled,
)
from app.monitoring.feedback import STEM_DIGITS, Feedback, Given
from app.observability.metrics import Metrics
from app.schemas.service import Feedback as Truth
from lifecycle.__main__ import commands
from lifecycle.operations import monitor
from lifecycle.operations.monitor import MINIMUM
from lifecycle.package import MAX_BINS
from tests.service.conftest import ANSWER, ARTIFACTS, SERVED, prediction
from tests.service.conftest import LABELS as OWN_LABELS
from tests.service.watching import program
from tests.service.where import ROOT

RULES = ROOT / "ops" / "prometheus" / "drift_rules.yml"


def histogram(*edges: float, missing: int = 0) -> dict[str, Any]:
    """A feature as a baseline has it, 20 rows in each bin."""
    bounds = ["-inf", *map(str, edges), "inf"]
    bins = [f"({low},{high}]" for low, high in itertools.pairwise(bounds)]
    return {"edges": edges, "bins": bins, "counts": [20] * len(bins), "missing": missing}


LENGTHS = {
    "length": histogram(1.4, 2.6, 4.3, 4.9, 5.5),
    "width": histogram(0.2, 0.4, 1.2, 1.5, 2.0),
    "height": histogram(4.9, 5.2, 5.8, 6.2, 6.7),
    "depth": histogram(2.6, 2.8, 3.0, 3.2, 3.4),
}
BASELINE = json.dumps({"rows": 120, "features": LENGTHS, "labels": {"yes": 50, "no": 70}}).encode()
BINS: dict[str, list[str]] = {name: feature["bins"] for name, feature in LENGTHS.items()}
SERVED_BASELINE: dict[str, Any] = json.loads((ARTIFACTS / SERVED / "baseline.json").read_bytes())


def counted(registry: CollectorRegistry, name: str, *labels: str) -> dict[Any, float]:
    """The samples of a metric that are not zero, by the values of these labels."""
    return {
        tuple(one.labels[label] for label in labels): one.value
        for family in registry.collect()
        for one in family.samples
        if one.name == name and one.value
    }


def drift_of(document: bytes, names: list[str], log: Any = None) -> tuple[Drift, CollectorRegistry]:
    """A drift of its own, and where it counts."""
    metrics = Metrics()
    return Drift("v1", document, names, metrics, log or CapturingLogger()), metrics.registry


VALUES = st.floats(0, 10, width=32) | st.sampled_from([1.4, 0.2, 3.0, 5.0, float("nan")])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(VALUES, min_size=4, max_size=4), min_size=1, max_size=40), cut=st.integers(0, 40)
)
def test_every_value_is_counted_in_its_bin(rows: list[list[float]], cut: int) -> None:
    """Whatever comes, each value is counted once: in the bin that holds it, or as missing."""
    drift, registry = drift_of(BASELINE, [*BINS])
    parts = [np.array(part, np.float32) for part in (rows[:cut], rows[cut:]) if part]
    drift.observe(parts, Tally())
    expected: Tally[tuple[str, str]] = Tally()
    for name, values in zip([*BINS], np.array(rows, np.float32).T.tolist(), strict=True):
        for value in values:
            bounds = {bin_: [np.float32(edge) for edge in bin_[1:-1].split(",")] for bin_ in BINS[name]}
            inside = [bin_ for bin_, (low, high) in bounds.items() if low < value <= high]
            expected[name, inside[0] if inside else MISSING] += 1
    assert counted(registry, "feature_observations_total", "feature", "bin") == expected
    missing = {(name,): count for (name, bin_), count in expected.items() if bin_ == MISSING}
    assert counted(registry, "feature_missing_total", "feature") == missing


def test_categories_are_bins_and_strangers_are_other() -> None:
    """A known category has its bin, an unknown one is `other`, null is `missing`: labels stay few."""
    colour = {
        "bins": ["red", "blue"],
        "categories": ["red", "blue"],
        "counts": [60, 20],
        "missing": 10,
        "other": 10,
    }
    size = {"bins": ["(-inf,1]", "(1,inf]"], "edges": [1.0], "counts": [50, 50], "missing": 0}
    document = {"rows": 100, "features": {"colour": colour, "size": size}, "labels": {"yes": 100}}
    drift, registry = drift_of(json.dumps(document).encode(), ["colour", "size"])
    rows = [["red", 1.0], ["red", 2.0], ["green", 3.0], ["mauve", None], [None, 0.0]]
    drift.observe([np.array(rows, object)], Tally(yes=5))
    assert counted(registry, "feature_observations_total", "feature", "bin") == {
        ("colour", "red"): 2, ("colour", OTHER): 2, ("colour", MISSING): 1,
        ("size", "(-inf,1]"): 2, ("size", "(1,inf]"): 2, ("size", MISSING): 1,
    }  # fmt: skip
    shares = counted(registry, "feature_baseline_ratio", "feature", "bin")
    assert (shares["colour", "red"], shares["colour", MISSING], shares["colour", OTHER]) == (0.6, 0.1, 0.1)


def test_the_baseline_is_exposed_as_shares() -> None:
    """For each feature, and for the labels, the exposed shares of training add up to one."""
    _, registry = drift_of(BASELINE, [*BINS])
    shares = counted(registry, "feature_baseline_ratio", "feature", "bin")
    for name in [*BINS]:
        assert sum(share for (feature, _), share in shares.items() if feature == name) == pytest.approx(1)
    assert sum(counted(registry, "prediction_baseline_ratio", "label").values()) == pytest.approx(1)


def test_of_little_training_there_is_no_index() -> None:
    """What training saw too little of has no baseline to drift from, in Prometheus and in `make drift`."""
    few = {**json.loads(BASELINE), "rows": LEAST_ROWS - 1}
    _, registry = drift_of(json.dumps(few).encode(), [*BINS])
    assert not counted(registry, "feature_baseline_ratio", "feature", "bin")
    assert not counted(registry, "prediction_baseline_ratio", "label")
    rows: monitor.Counts = defaultdict(Counter)
    for name, bins in BINS.items():
        rows["v1", name] = Counter({bins[0]: 600})
    table = monitor.drift_table(monitor.compare("v1", few, rows)).splitlines()
    assert all(" - " in line and "too few rows" in line for line in table[2:])
    enough = monitor.drift_table(monitor.compare("v1", json.loads(BASELINE), rows)).splitlines()
    assert all("drifted" in line for line in enough[2:-1])


def test_few_rows_are_no_line_of_the_log() -> None:
    """Bins are logged only when enough rows share them, and each row in one line only."""
    log = CapturingLogger()
    drift, _ = drift_of(BASELINE, [*BINS], log)
    row = np.array([[1.4, 3.5, 5.1, 0.2]], np.float32)
    drift.observe([row] * (LINE_ROWS - 1), Tally(yes=LINE_ROWS - 1))
    drift.write_line()
    assert log.calls == []
    drift.observe([row], Tally(yes=1))
    drift.write_line()
    drift.write_line()
    (line,) = log.calls
    assert (line.args, line.kwargs["model_version"], line.kwargs["rows"]) == (("drift",), "v1", LINE_ROWS)
    assert line.kwargs["features"]["length"] == {"(-inf,1.4]": LINE_ROWS}
    assert line.kwargs["predictions"] == {"yes": LINE_ROWS}


def test_rows_are_held_a_second_at_most() -> None:
    """Rows wait to be counted together, until there are enough of them or a second has passed."""
    metrics = Metrics()
    calls, row = Calls(metrics, CapturingLogger()), np.array([[5.1, 3.5, 1.4, 0.2]], np.float32)
    inputs = [SimpleNamespace(name=name) for name in BINS]
    manifest = SimpleNamespace(version="v1", inputs=inputs)
    values = {} if OWN_LABELS else {"values": {"bins": ["-0", "0-"], "counts": [50, 70], "edges": [0.0]}}
    baseline = json.dumps(json.loads(BASELINE) | values).encode()
    artifact: Any = SimpleNamespace(manifest=manifest, files={"baseline.json": baseline})
    calls.know(artifact)

    def seen() -> float:
        return counted(metrics.registry, "feature_observations_total", "feature").get(("length",), 0)

    async def happen() -> None:
        answer = prediction(ANSWER)
        for rows in (COUNT_ROWS - 1, 1, 3):
            calls.batch(Batch([answer] * rows, (0, 0, 0), {}, row.repeat(rows, axis=0), "v1"), [0.0])
            calls.write(everything=False)
            waiting.append(seen())
        counted_all = asyncio.Event()
        asyncio.get_running_loop().call_later(COUNT_SECONDS, counted_all.set)  # after the timer of the calls
        await counted_all.wait()
        assert seen() == COUNT_ROWS + 3

    waiting: list[float] = []
    asyncio.run(asyncio.wait_for(happen(), 60))
    assert waiting == [0, COUNT_ROWS, COUNT_ROWS]


def false_alarms(then: Any, now: Any) -> float:
    """The share of samples, a row each, whose PSI calls for an alarm."""
    then, now = np.maximum(then, monitor.FLOOR), np.maximum(now, monitor.FLOOR)
    return float(((((now - then) * np.log(now / then)).sum(axis=1)) > monitor.DRIFTED).mean())


def test_chance_alone_raises_no_alarm_at_the_minimum_sample() -> None:
    """Of 20,000 samples of minimum size from training itself, fewer than 1 % cross 0.2: for every feature."""
    random, document = np.random.default_rng(0), SERVED_BASELINE
    spreads = [[*monitor.baseline_counts(feature).values()] for feature in document["features"].values()]
    answers = document["values"]["counts"] if "values" in document else [*document["labels"].values()]
    for counts in [*spreads, answers]:
        then = np.array(counts) / document["rows"]
        now = random.multinomial(MINIMUM, then, 20_000) / MINIMUM
        assert false_alarms(then, now) < 0.001
    # Training is a sample as well: with the fewest rows of which there is an index, still fewer than 1 %.
    for bins in range(2, MAX_BINS + 1):
        least = max(LEAST_ROWS, ROWS_A_BIN * bins)
        assert settled([1] * bins, least)
        assert not settled([1] * bins, least - 1)
        for spread in (np.ones(bins), 1 / np.arange(1, bins + 1)):  # even, and with some that are rare
            shares = spread / spread.sum()
            then, now = (random.multinomial(rows, shares, 20_000) / rows for rows in (least, MINIMUM))
            assert false_alarms(then, now) < 0.01, bins
    # These are needed: two bins of 30 rows would not do.
    few, now = (random.multinomial(rows, [0.5, 0.5], 20_000) / rows for rows in (30, MINIMUM))
    assert false_alarms(few, now) > 0.01
    # The minimum is needed: a third of it would not do.
    even = np.full(10, 0.1)
    assert false_alarms(even, random.multinomial(MINIMUM // 3, even, 20_000) * 3 / MINIMUM) > 0.01


def test_a_shift_is_seen_at_the_minimum_sample() -> None:
    """A feature that moves by one standard deviation is above 0.2 in 99 of 100 samples of minimum size."""
    random = np.random.default_rng(0)
    edges = np.quantile(random.normal(size=100_000), np.linspace(0, 1, 7)[1:-1])
    then = np.full(6, 1 / 6)
    moved = np.searchsorted(edges, random.normal(1, 1, (2000, MINIMUM)))
    now = np.stack([(moved == bin_).mean(axis=1) for bin_ in range(6)], axis=1)
    assert false_alarms(then, now) > 0.99


def test_rules_and_command_compute_the_same() -> None:
    """Prometheus' rules and `make drift` have the same minimum sample and the same floor for empty bins."""
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    rules = {rule["record"]: rule["expr"] for group in groups for rule in group["rules"]}
    names = [f"{one}:{window}" for window in ("1h", "24h") for one in ("feature:psi", "prediction:psi")]
    assert set(names) < rules.keys()
    for name, expression in rules.items():
        kind, pattern = (
            ("least", r">= (\d+)") if ":ratio:" in name else ("floor", r"clamp_min\(.*, ([\d.]+)\)")
        )
        expected = {"least": MINIMUM, "floor": monitor.FLOOR}[kind]
        assert {float(value) for value in re.findall(pattern, expression)} == {expected}


def rule_test(observed: dict[str, int], minutes: int, *, window: str = "1h") -> dict[str, Any]:
    """A test for promtool: two bins, half of training in each, `observed` rows a minute in each."""
    bins = {"low": 0.5, "high": 0.5, "missing": 0}
    inputs = [
        {"series": f'feature_baseline_ratio{{model_version="v1",feature="x",bin="{bin_}"}}',
         "values": f"{share}x{minutes}"}
        for bin_, share in bins.items()
    ] + [
        {"series": "feature_observations_total"
                   f'{{model_version="v1",feature="x",bin="{bin_}",instance="{n}"}}',
         "values": f"0+{observed.get(bin_, 0)}x{minutes}"}
        for bin_ in bins for n in (1, 2)
    ]  # fmt: skip
    then = {bin_: max(share, monitor.FLOOR) for bin_, share in bins.items()}
    rows = sum(observed.values())
    now = {bin_: max(observed.get(bin_, 0) / rows, monitor.FLOOR) for bin_ in bins}
    psi = sum((now[bin_] - then[bin_]) * np.log(now[bin_] / then[bin_]) for bin_ in bins)
    # Two instances; what an hour holds must reach the minimum.
    enough = 2 * rows * minutes >= MINIMUM
    name = f'feature:psi:{window}{{feature="x", model_version="v1"}}'
    return {
        "interval": "1m",
        "input_series": inputs,
        "promql_expr_test": [
            {"expr": f"round(feature:psi:{window}, 0.0001)", "eval_time": f"{minutes}m",
             "exp_samples": [{"labels": name.partition(":psi")[2].partition("{")[1] + name.partition("{")[2],
                              "value": round(float(psi), 4)}] if enough else []}
        ],
    }  # fmt: skip


PREDICTION_TEST = {  # three of four are yes, accepted or not, where training had two
    "interval": "1m",
    "input_series": [
        {"series": 'prediction_baseline_ratio{model_version="v1",label="yes"}', "values": "0.5x60"},
        {"series": 'prediction_baseline_ratio{model_version="v1",label="no"}', "values": "0.5x60"},
        {"series": 'predictions_total{model_version="v1",label="yes",action="accept"}', "values": "0+10x60"},
        {"series": 'predictions_total{model_version="v1",label="yes",action="review"}', "values": "0+5x60"},
        {"series": 'predictions_total{model_version="v1",label="no",action="accept"}', "values": "0+5x60"},
        {"series": 'predictions_total{model_version="v2",label="no",action="accept"}', "values": "0+4x60"},
    ],
    "promql_expr_test": [
        {
            "expr": f"round(prediction:psi:{window}, 0.0001)",
            "eval_time": "60m",
            "exp_samples": [{"labels": '{model_version="v1"}', "value": round(0.25 * float(np.log(3)), 4)}],
        }
        for window in ("1h", "24h")
    ],
}


def test_the_rules_compute_the_index(tmp_path: Path) -> None:
    """promtool: PSI is right over two instances, finite with an empty bin, absent below the minimum."""
    tests = [
        rule_test({"low": 10, "high": 10}, 60),
        rule_test({"low": 10, "high": 30}, 60),
        rule_test({"low": 10, "high": 30}, 60, window="24h"),
        rule_test({"low": 20}, 60),
        rule_test({"low": 10, "high": 10, "missing": 20}, 60),
        rule_test({"low": 1, "high": 1}, 60),  # 240 rows
        PREDICTION_TEST,
    ]
    document = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(document), "utf-8")
    for command in (["check", "rules", str(RULES)], ["test", "rules", "tests.yml"]):
        done = subprocess.run(
            [program("promtool"), *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


CONTRACT = "c" * 64
LABELS = ["yes", "no", "maybe"]
IDS = Feedback(LABELS, dict.fromkeys(["v0", "v1", "v20261121"], 0.0), CONTRACT)
STEMS = st.text("0123456789abcdef", min_size=STEM_DIGITS, max_size=STEM_DIGITS)


def test_the_truth_comes_in_the_type_of_the_labels() -> None:
    """`false` is no 0 and `true` no 1, though Python takes them for equal; what is a label is taken."""

    def taken(label: Any) -> Any:
        return Truth.model_validate_json(json.dumps({"prediction_id": "0" * 32, "label": label})).label

    own = OWN_LABELS or [0.5]
    assert [taken(label) for label in own] == own
    for other in (0, 1) if isinstance(own[0], bool) else (False, True):
        with pytest.raises(ValueError, match="label"):
            taken(other)


@given(stem=STEMS, version=st.sampled_from(["v0", "v1", "v20261121"]), chosen=st.sampled_from(LABELS))
def test_an_id_says_what_was_predicted(stem: str, version: str, chosen: str) -> None:
    """Any process can read from an id which version gave which label: no database, no time limit."""
    elsewhere = Feedback(LABELS, dict.fromkeys(["v20261121", "v1", "v0"], 0.0), CONTRACT)
    prediction_id = IDS.identify(stem, version, chosen)
    assert re.fullmatch("[0-9a-f]{32}", prediction_id)
    assert elsewhere.judge(prediction_id, chosen) == (version, True, True)
    assert elsewhere.judge(prediction_id, chosen) == (version, True, False)


@given(noise=st.text("0123456789abcdef", min_size=32, max_size=32), stem=STEMS, at=st.integers(0, 31))
def test_an_id_that_was_not_given_out_is_not_found(noise: str, stem: str, at: int) -> None:
    """Invented ids, mistyped ones, those of another version or another contract are refused."""
    good = IDS.identify(stem, "v1", "yes")
    mistyped = good[:at] + ("0" if good[at] != "0" else "1") + good[at + 1 :]
    other = Feedback(LABELS, {"v1": 0}, "d" * 64).identify(stem, "v1", "yes")
    unknown = Feedback(LABELS, {"v2": 0}, CONTRACT).identify(stem, "v2", "yes")
    for wrong in (noise, mistyped, other, unknown):
        with pytest.raises(ServiceError, match="not_found"):
            IDS.judge(wrong, "yes")


@given(stem=STEMS, value=st.floats(-1e6, 1e6), off=st.floats(-1, 1))
def test_a_value_is_right_when_it_is_close_to_the_truth(stem: str, value: float, off: float) -> None:
    """A regressor's id holds its value: feedback counts as correct within the tolerance of the manifest."""
    for truth, right in ((value + off, True), (value + 3, False)):
        ids = Feedback([], {"v1": 1.5}, CONTRACT)
        ids.know("v2", tolerance=0.0)  # a canary, which is judged by its own
        assert ids.judge(ids.identify(stem, "v1", value), truth) == ("v1", right, True)
        assert ids.judge(ids.identify(stem, "v2", value), value + 1) == ("v2", False, True)
    elsewhere = Feedback([], None, CONTRACT)  # of a version that it has no folder of
    elsewhere.know("v2", tolerance=1.5)
    assert elsewhere.judge(ids.identify(stem, "v1", value), value + off) == ("v1", True, True)


def test_the_first_label_counts() -> None:
    """The same label again is no news; another one for the same prediction is refused and changes nothing."""
    ids = Feedback(LABELS, {"v1": 0}, CONTRACT)
    one = ids.identify("ab" * 9, "v1", "yes")
    assert ids.judge(one, "no") == ("v1", False, True)
    with pytest.raises(ServiceError, match="conflict"):
        ids.judge(one, "yes")
    assert ids.judge(one, "no") == ("v1", False, False)


def give(given: Given, ids: list[str], together: Any, results: Any) -> None:
    """What a worker does."""
    together.wait()
    results.put(sum(given.put(one, 1) is None for one in ids))


def test_workers_share_what_was_given() -> None:
    """Of four processes that take the same labels at once, exactly one counts each."""
    context, given = multiprocessing.get_context("fork"), Given(buckets=2**17)  # none overflows
    results, together = context.Queue(), context.Barrier(4)
    ids = [IDS.identify(os.urandom(STEM_DIGITS // 2).hex(), "v1", "yes") for _ in range(20_000)]
    workers = [context.Process(target=give, args=(given, ids, together, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    counts = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(counts) == 20_000


def test_the_oldest_label_is_forgotten_first() -> None:
    """The memory is bounded: a full bucket lets go of its oldest label and keeps the others."""
    given, ids = Given(buckets=1), [IDS.identify(f"{n:018x}", "v1", "yes") for n in range(9)]
    assert [given.put(one, 7) for one in ids] == [None] * 9
    assert [given.put(one, 8) for one in ids[1:]] == [7] * 8
    assert given.put(ids[0], 7) is None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`python -m lifecycle ...` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(commands, words)


def scrape(rows: dict[str, dict[str, int]], version: str = SERVED) -> str:
    """What /metrics says after so many rows by bin of each feature."""
    metrics = Metrics()
    for name, counts in rows.items():
        for bin_, count in counts.items():
            metrics.observations.labels(version, name, bin_).inc(count)
    return generate_latest(metrics.registry).decode()


def drift_line(rows: dict[str, dict[str, int]]) -> str:
    """The log line that says the same, behind what a collector put in front of it."""
    line = {"event": "drift", "model_version": SERVED, "rows": 1, "features": rows, "predictions": {}}
    return "api-1  | " + json.dumps(line) + "\n"


AS_TRAINED = {
    name: {bin_: 5 * count for bin_, count in monitor.baseline_counts(feature).items()}
    for name, feature in SERVED_BASELINE["features"].items()
}
# The last feature, and all rows in the bin that training had least of.
MOVED = [*AS_TRAINED][-1]
RARE = min(SERVED_BASELINE["features"][MOVED]["bins"], key=AS_TRAINED[MOVED].__getitem__)
ONE_BIN = {MOVED: {RARE: 600}}


def verdicts(output: str) -> dict[str, list[str]]:
    """PSI, verdict and the rest of each feature's line."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in output.splitlines()]
    return {row[1]: row[2:] for row in rows if row[0] == SERVED}


@pytest.mark.parametrize(
    ("variable", "content"),
    [("METRICS", scrape(AS_TRAINED | ONE_BIN)), ("LOGS", drift_line(AS_TRAINED | ONE_BIN) + "no JSON\n")],
)
def test_drift_is_printed_and_drawn(
    variable: str, content: str, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make drift` names what moved, from a scrape or a log, and draws the features that drifted only."""
    (tmp_path / "input").write_text("some words\n" * (variable == "LOGS") + content)
    monkeypatch.setenv(variable, "input")
    done = run("drift", "--pictures", "pictures")
    assert done.exit_code == 0, done.stderr
    lines = verdicts(done.stdout)
    assert float(lines[MOVED][0]) > 1
    assert lines[MOVED][1:3] == ["drifted", "600"]
    assert f"{RARE}: " in done.stdout
    assert {name for name, words in lines.items() if words[1] == "stable"} == {*AS_TRAINED} - {MOVED}
    (picture,) = (tmp_path / "pictures").iterdir()
    assert picture.name == f"drift-{SERVED}-" + re.sub(r"[^\w.-]+", "_", MOVED) + ".svg"
    assert "<svg " in picture.read_text()


def test_too_few_rows_are_no_verdict(run: Callable[..., Result], tmp_path: Path) -> None:
    """Below the minimum sample there is no index and no picture, only the number of rows."""
    (tmp_path / "scrape").write_text(scrape({MOVED: {RARE: MINIMUM - 1}}))
    done = run("drift", "--metrics", "scrape", "--pictures", "pictures")
    assert "too few rows" in done.stdout
    assert "drifted" not in done.stdout
    assert not (tmp_path / "pictures").exists()


def cells(line: str) -> list[str]:
    """The words of a table's line."""
    return line.replace("|", " ").split()


LOG = "".join(
    json.dumps(
        {
            "event": "request", "model_version": version, "prediction_id": f"{version}-{n}", "thresholds": {},
            "predictions": [{"prediction_id": f"{version}-{n}", "label": "yes", "score": 0.85}],
        }
    ) + "\n"
    for version, count in (("v1", 10), ("v2", 4)) for n in range(count)
)  # fmt: skip
TRUE_LABELS = {"v1-": ["yes"] * 8 + ["no"] * 2, "v2-": ["no"] * 4}
PAIRS = [
    (f"{version}{n}", truth) for version, truths in TRUE_LABELS.items() for n, truth in enumerate(truths)
]
AS_CSV = "prediction_id,label\n" + "".join(f"{one},{truth}\n" for one, truth in PAIRS)
AS_JSON = "".join(json.dumps({"prediction_id": one, "label": truth}) + "\n" for one, truth in PAIRS)
AS_FEEDBACK = "".join(
    json.dumps({"event": "request", "prediction_id": one, "feedback": truth, "news": True}) + "\n"
    for one, truth in PAIRS
)


@pytest.mark.parametrize(
    ("log", "truths"),
    [(LOG, AS_CSV), (LOG, AS_JSON), (LOG + AS_FEEDBACK, None)],
    ids=["CSV", "JSON", "feedback"],
)
def test_quality_is_printed_and_drawn(
    log: str, truths: str | None, run: Callable[..., Result], tmp_path: Path
) -> None:
    """`make quality` joins log and labels: accuracy, calibration, confusion and a picture of each version."""
    (tmp_path / "log").write_text("some words\n" + log)
    options = ["--logs", "log", "--pictures", "pictures"]
    if truths is not None:
        (tmp_path / "labels").write_text(truths)
        options += ["--labels", "labels"]
    done = run("quality", *options)
    assert done.exit_code == 0, done.stderr
    first, second = done.stdout.split("v2:")
    assert first.startswith("v1: 10 predictions with a label, accuracy 0.800, calibration error 0.050")
    assert second.startswith(" 4 predictions with a label, accuracy 0.000, calibration error 0.850")
    assert ["0.8", "to", "0.9", "10", "0.850", "0.800"] in [cells(line) for line in first.splitlines()]
    assert ["no", "0", "2"] in [cells(line) for line in first.splitlines()]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"quality-v1.svg", "quality-v2.svg"}


@pytest.mark.parametrize(("made", "label"), [(1, 1.0), ("01", "01"), (True, True), ("1", 1)])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "tsv.gz"])
def test_labels_are_the_same_from_every_format(
    made: Any, label: Any, suffix: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    """A label is known again in whole floats, with leading zeros and as text, whatever holds it."""
    one = {"prediction_id": "007", "label": made, "score": 0.9}
    line = {"event": "request", "model_version": "v1", "thresholds": {}, "predictions": [one]}
    (tmp_path / "log").write_text(json.dumps(line) + "\n")
    frame, path = (
        pd.DataFrame({"other": [[1]], "prediction_id": ["007"], "label": [label]}),
        tmp_path / f"t.{suffix}",
    )
    if suffix == "parquet":
        frame.to_parquet(path)
    elif suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if "tsv" in suffix else ",")
    done = run("quality", "--logs", "log", "--labels", str(path), "--pictures", "pictures")
    assert "accuracy 1.000" in done.stdout, done.stderr


def test_errors_of_a_regressor_are_printed_and_drawn(run: Callable[..., Result], tmp_path: Path) -> None:
    """`make quality` of a regressor: RMSE, MAE and bias, in all and by size, and a picture of the errors."""
    values = [(n, 10.0 * n, 10.0 * n + (-1) ** n * 3 + 1) for n in range(20)]
    made = [{"prediction_id": f"id{n}", "value": value, "action": "accept"} for n, value, _ in values]
    line = {"event": "request", "model_version": "v1", "thresholds": {}, "predictions": made}
    (tmp_path / "log").write_text(json.dumps(line) + "\n")
    truths = "".join(f"id{n},{truth}\n" for n, _, truth in values)
    (tmp_path / "labels").write_text("prediction_id,label\n" + truths)
    done = run("quality", "--logs", "log", "--labels", "labels", "--pictures", "pictures")
    assert done.exit_code == 0, done.stderr
    words = "v1: 20 predictions with a true value, RMSE 3.162, MAE 3, bias -1\n"
    assert done.stdout.startswith(words)
    assert ["180", "to", "190", "2", "3.162", "3", "-1"] in [cells(one) for one in done.stdout.splitlines()]
    picture = (tmp_path / "pictures" / "quality-v1.svg").read_text()
    assert picture.partition('id="PathCollection_1"')[2].partition("</g>")[0].count("<use ") == 20
    (tmp_path / "labels").write_text("prediction_id,label\nid1,many\n")
    done = run("quality", "--logs", "log", "--labels", "labels")
    assert (done.exit_code, done.stderr) == (1, "quality: id1 has a truth that is no number\n")


BAD = {
    "no log": (["quality"], "say which log"),
    "a log that is not there": (["quality", "--logs", "nowhere"], "nowhere: No such file"),
    "a log without predictions": (["quality", "--logs", "empty"], "no predictions in this log"),
    "labels without columns": (["quality", "--logs", "log", "--labels", "log"], "log:1: needs prediction_id"),
    "labels half way": (["quality", "--logs", "log", "--labels", "half"], "half:3: needs prediction_id"),
    "labels of others": (["quality", "--logs", "log", "--labels", "others"], "none of the 14 predictions"),
    "no Prometheus": (["drift", "--prometheus", "http://127.0.0.1:1"], "no answer from Prometheus"),
    "no address": (["drift", "--prometheus", "here"], "no answer from Prometheus"),
    "no scrape": (["drift", "--metrics", "log"], "log: not a scrape of /metrics"),
    "no drift lines": (["drift", "--logs", "log"], "log: nothing was observed"),
    "two sources": (["drift", "--logs", "log", "--metrics", "log"], "not both"),
    "an unknown version": (["drift", "--metrics", "v9"], "v9: there is no such version"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(what: str, run: Callable[..., Result], tmp_path: Path) -> None:
    """Whatever is wrong with what the commands are given, one line says it."""
    files = {
        "log": LOG, "empty": "", "half": "prediction_id,label\nv1-1,yes\nv1-2\n",
        "others": "prediction_id,label\nstranger,yes\n", "v9": scrape({"x": {"y": 1}}, "v9"),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    command, message = BAD[what]
    done = run(*command)
    (line,) = done.stderr.splitlines()
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in line
