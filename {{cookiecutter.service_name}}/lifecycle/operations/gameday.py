"""Breaks the service on purpose, and shows that every alert fires, finds its runbook and resolves.

    service + Prometheus + Alertmanager + receiver, with time compressed -> faults, one after the other
    -> alerts as they arrive at the receiver, panels -> a line for each alert of ops/prometheus -> exit code

All durations in the rules and in the routing are divided by the same factor; nothing else in them changes.
The service, its metrics, the rules, Prometheus and Alertmanager are the real ones, on free ports of loopback.
"""

import http.client
import json
import math
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import httpx2
import numpy as np
import typer

from app.core.runtimes import load_runtime
from app.core.store import RELEASE, read_artifact, read_release
from lifecycle.operations.drift import PREDICTION, trained_features
from lifecycle.operations.traffic import usual
from lifecycle.operations.trial import SOUND, Trouble, add_trial, number_of
from lifecycle.operations.watching import Watch, program, queries, watching
from lifecycle.package import canonical_json
from load.service import Running, service

ROOT = Path(__file__).resolve().parents[2]
SPEED = 120  # an hour of the rules passes in 30 s
SAMPLE_MS = 500
RULES = "v0"
SESSION = "X-Session-ID"  # which sends one of two requests to a canary
PATIENCE_SECONDS = 300.0  # until an alert has resolved: the longest window for tickets, 6 h, takes 180
CLIENTS, PAUSE_SECONDS = 2, 0.08
FLOOD = 60
HOURS_OF_TICKET = 1
SINES = 400
FAILING, SLOW, BAD = "v101", "v102", "v103"  # versions that exist on this day only


@dataclass(frozen=True)
class Alert:
    """One alerting rule, by what Alertmanager is told of it."""

    name: str
    severity: str
    sign: str = ""


@dataclass
class Seen:
    """When an alert came and went, in seconds of `time.monotonic`, and what it said."""

    fired: float
    fault: str
    began: float
    labels: list[dict[str, str]]  # of each series that fired
    annotations: dict[str, str]
    resolved: float | None = None


@dataclass
class Day:
    """What is going on: the fault, and the alerts that arrived."""

    fault: str = "none"
    began: float = field(default_factory=time.monotonic)
    seen: dict[Alert, Seen] = field(default_factory=dict)
    due: set[Alert] = field(default_factory=set)  # an earlier fault may have raised one of them by the way

    def begin(self, fault: str) -> None:
        """A new fault starts now."""
        self.fault, self.began = fault, time.monotonic()
        typer.echo(f"gameday: {fault}")

    def notify(self, _path: str, message: dict[str, Any]) -> None:
        """Alertmanager's message to a receiver."""
        for one in message["alerts"]:
            labels = one["labels"]
            alert = alert_of(labels)
            known = self.seen.get(alert)
            if one["status"] == "firing":
                if known is None or (known.resolved is not None and alert in self.due):
                    self.seen[alert] = Seen(
                        time.monotonic(), self.fault, self.began, [labels], one["annotations"]
                    )
                    typer.echo(f"gameday:   fires: {alert.name} ({alert.severity})")
                else:
                    known.resolved = None
                    known.labels.append(labels)
            elif known is not None and known.resolved is None:
                known.resolved = time.monotonic()
                typer.echo(f"gameday:   resolved: {alert.name} ({alert.severity})")


class Traffic:
    """Clients that ask all the time, as `payload` says, and never wait longer than a moment for the next."""

    def __init__(
        self, address: str, payloads: Iterator[dict[str, Any]], clients: int, pause: float = PAUSE_SECONDS
    ) -> None:
        self._host, self._payloads = address.removeprefix("http://"), payloads
        self._lock, self._ending, self._pause = threading.Lock(), threading.Event(), pause
        self.paused = False
        self.answers: list[dict[str, Any]] = []  # the latest, for feedback
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def switch(self, payloads: Iterator[dict[str, Any]]) -> None:
        """Send these from now on."""
        self._payloads = payloads

    def _ask(self) -> None:
        while not self._ending.wait(self._pause):
            if self.paused:
                continue
            with self._lock:
                body = next(self._payloads)
            with suppress(OSError, http.client.HTTPException, ValueError):
                answer = call(self._host, "/v1/predict", body)
                if "prediction_id" in answer:
                    self.answers = [*self.answers[-200:], answer]


def call(host: str, path: str, body: dict[str, Any]) -> Any:
    """The parsed answer to a POST, whatever its status."""
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        headers = {"Content-Type": "application/json", SESSION: secrets.token_hex(8)}
        connection.request("POST", path, json.dumps(body), headers)
        return json.loads(connection.getresponse().read() or b"{}")
    finally:
        connection.close()


def width_for(root: Path, seconds: float) -> int:
    """With which width a slow model takes so long for a row on this machine."""
    trial, width = "v100", 4096
    add_trial(root, read_release(root).serving, trial, Trouble(sines=SINES, width=width))
    artifact = read_artifact(root, trial)
    runtime = load_runtime(artifact)
    row = np.array([[one.example for one in artifact.manifest.inputs]], runtime.dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        runtime.infer(row)
        times.append(time.perf_counter() - began)
    shutil.rmtree(root / trial)
    return math.ceil(width * seconds / min(times))


def release(root: Path, **changes: Any) -> None:
    """Change what is released: the running service follows the file."""
    document = json.loads((root / RELEASE).read_bytes()) | changes
    (root / "release.new").write_bytes(canonical_json(document))
    (root / "release.new").replace(root / RELEASE)


def until(condition: Callable[[], object], what: str, seconds: float = 90) -> bool:
    """Whether `condition` held in time; without it the day goes on, and the table says what is missing."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        with suppress(httpx2.TransportError):  # on a machine that stands still
            if condition():
                return True
        time.sleep(0.1)
    typer.echo(f"gameday:   waited in vain for {what}", err=True)
    return False


def alert_of(labels: dict[str, str]) -> Alert:
    """The rule that an alert with these labels comes from."""
    return Alert(labels["alertname"], labels.get("severity", ""), labels.get("sign", ""))


def release_bad(root: Path) -> str:
    """Release a version whose model was changed; the one that served."""
    served = read_release(root).serving
    add_trial(root, served, BAD, SOUND)
    with (root / BAD / "model.onnx").open("ab") as file:
        file.write(b"changed")
    release(root, serving=BAD)
    return served


class GameDay:
    """The faults, each with what it breaks and how it is mended; it begins with BAD released."""

    def __init__(
        self, day: Day, watch: Watch, own: Running, artifacts: Path, served: str, slow_seconds: float
    ) -> None:
        self._day, self._watch, self._artifacts, self._served = day, watch, artifacts, served
        self._address, self._own = own.address, own
        self._host = own.address.removeprefix("http://")
        self._usual = usual(artifacts, self._served)
        manifest = read_artifact(artifacts, self._served).manifest
        self._labels: list[Any] = list(manifest.outputs.labels)
        self._tolerance = manifest.outputs.feedback_tolerance
        number = number_of(manifest.inputs)
        self._strange, limit = self._usual[0], -1.0
        if number and number.training_range:
            low, limit = number.training_range
            beyond = min(limit + (limit - low), math.inf if number.maximum is None else number.maximum)
            whole = number.dtype == "int64"
            self._strange = {**self._usual[0], number.name: math.floor(beyond) if whole else beyond}
        # Without a number to tell them apart, all of its answers are none.
        add_trial(artifacts, self._served, FAILING, Trouble(fails_above=limit), golden=number is not None)
        slow = Trouble(sines=SINES, width=width_for(artifacts, slow_seconds))
        add_trial(artifacts, self._served, SLOW, slow)
        version, first = {"model_version": self._served}, manifest.inputs[0].name
        moved = number.name if number else first
        culprits = {
            "HighInvalidInputRate": {"field": first},
            "FeatureDrift": {"feature": moved, **version},
            **dict.fromkeys(("PredictionShift", "LowConfidence", "AccuracyDrop"), version),
        }
        # A regressor has no confidence to be low, and what training saw too little of cannot drift from it.
        trained = trained_features(artifacts, served)
        needs = {
            "LowConfidence": self._labels,
            "FeatureDrift": moved in trained,
            "PredictionShift": PREDICTION in trained,
        }
        self.shipped = {  # with the labels that each must have
            alert_of({"alertname": rule["name"], **rule["labels"]}): rule["labels"]
            | culprits.get(rule["name"], {})
            for rule in watch.shipped()
            if needs.get(rule["name"], True)
        }

    def lacks(self, query: str) -> bool:
        """Whether training was too small for what is asked."""
        drifting = {"feature:psi": "FeatureDrift", "prediction:psi": "PredictionShift"}
        names = {one.name for one in self.shipped}
        return any(series in query and alert not in names for series, alert in drifting.items())

    def usual(self) -> Iterator[dict[str, Any]]:
        """What training looked like."""
        return cycle(self._usual)

    def run(self) -> None:
        """Fault after fault, under traffic."""
        with Traffic(self._address, self.usual(), CLIENTS) as traffic:
            self._bad_start()
            self._day.begin("none, for two minutes of usual traffic")
            time.sleep(60)
            quiet = sorted(one.name for one, seen in self._day.seen.items() if seen.fault == self._day.fault)
            if quiet:
                typer.echo(f"gameday:   fired without a fault: {', '.join(quiet)}", err=True)
            self._beside(traffic)
            self._feedback_comes(traffic)
            self._invalid(traffic)
            self._killed()
            self._bad_artifact()
            self._drift(traffic)
            self._errors(traffic)
            self._canary(traffic)
            self._latency_and_saturation()
            self._silence(traffic)
            self._frozen()

    def _fires(self, *names: str) -> None:
        """Wait for these alerts. A page inhibits the ticket of its name: only Prometheus knows of it yet."""
        due = {one for one in self.shipped if one.name in names}
        paged = {one.name for one in due if one.severity == "page"}
        told = {one for one in due if one.severity == "page" or one.name not in paged}
        known: set[Alert] = set()
        self._day.due = due

        def all_known() -> bool:
            alerts = self._watch.alerts()
            known.update(alert_of(one["labels"]) for one in alerts if one["state"] == "firing")
            return due <= known and told <= self._day.seen.keys()

        until(all_known, ", ".join(names))

    def _released(self, version: str) -> None:
        release(self._artifacts, serving=version)
        until(
            lambda: (
                {httpx2.get(f"{self._address}/ready").json().get("model_version") for _ in range(10)}
                == {version}
            ),
            f"{version} to serve",
        )

    def _bad_start(self) -> None:
        self._day.begin("a start with a version whose model was changed")
        self._fires("ServingFallback")
        self._released(self._served)

    def _beside(self, traffic: Traffic) -> None:
        self._day.begin("none: the rules beside the model, as its shadow and as a canary")
        release(self._artifacts, shadow=RULES, canary=RULES, canary_percent=50)
        time.sleep(20)  # the dashboards show rates
        release(self._artifacts, shadow=None, canary=None, canary_percent=0)
        # Labels that come next are to be the served version's.
        until(lambda: {one["model_version"] for one in traffic.answers[-50:]} == {self._served}, "it alone")
        traffic.answers = []

    def _feedback_comes(self, traffic: Traffic) -> None:
        self._feedback(traffic, 30, wrong=False)
        self._day.begin("labels that contradict the predictions")
        self._feedback(traffic, 30, wrong=True)
        self._fires("AccuracyDrop")
        self._day.begin("none: labels that agree again")
        self._feedback(traffic, 400, wrong=False)

    def _feedback(self, traffic: Traffic, count: int, *, wrong: bool) -> None:
        told: set[str] = set()
        while len(told) < count:
            for answer in traffic.answers:
                if answer["prediction_id"] not in told and len(told) < count:
                    told_label = self._true(answer, wrong=wrong)
                    body = {"prediction_id": answer["prediction_id"], "label": told_label}
                    call(self._host, "/v1/feedback", body)
                    told.add(answer["prediction_id"])
            traffic.answers = []
            time.sleep(PAUSE_SECONDS)

    def _true(self, answer: dict[str, Any], *, wrong: bool) -> Any:
        if self._labels:
            return next(one for one in self._labels if (one != answer["label"]) == wrong)
        return answer["value"] + wrong * 10 * (self._tolerance + abs(answer["value"]) + 1)

    def _invalid(self, traffic: Traffic) -> None:
        self._day.begin("a client that breaks the contract")
        first = next(iter(self._usual[0]))
        traffic.switch(cycle([*self._usual, *([{**self._usual[0], first: ["long"]}] * len(self._usual))]))
        self._fires("HighInvalidInputRate")
        traffic.switch(self.usual())

    def _killed(self) -> None:
        self._day.begin("a worker is killed")
        os.kill(self._own.workers()[0].pid, signal.SIGKILL)
        self._fires("WorkerRestarts")

    def _bad_artifact(self) -> None:
        self._day.begin("a released version whose model was changed")
        release(self._artifacts, serving=BAD)
        self._fires("ModelReloadFailed")
        release(self._artifacts, serving=self._served)

    def _drift(self, traffic: Traffic) -> None:
        self._day.begin("inputs beyond those of training")
        traffic.switch(cycle([self._strange]))
        self._fires("FeatureDrift", "PredictionShift", "LowConfidence")
        traffic.switch(self.usual())

    def _errors(self, traffic: Traffic) -> None:
        self._day.begin("a model that answers NaN to one in three")
        self._released(FAILING)
        traffic.switch(cycle([*self._usual[:2], self._strange]))
        self._fires("NonFiniteOutput", "AvailabilityBudgetBurn")
        traffic.switch(self.usual())
        self._released(self._served)

    def _canary(self, traffic: Traffic) -> None:
        self._day.begin("a canary that answers NaN to one in three")
        release(self._artifacts, canary=FAILING, canary_percent=50)
        traffic.switch(cycle([*self._usual[:2], self._strange]))
        self._fires("CanaryStopped")
        traffic.switch(self.usual())
        release(self._artifacts, canary=None, canary_percent=0)

    def _latency_and_saturation(self) -> None:
        self._day.begin("a model that is too slow")
        self._released(SLOW)
        self._fires("LatencyBudgetBurn")
        time.sleep(HOURS_OF_TICKET * 3600 / SPEED)  # so that the ticket is still due when the page has gone
        self._day.begin("more requests than the slow model can do")
        with Traffic(self._address, self.usual(), FLOOD, 8 * PAUSE_SECONDS):
            self._fires("Saturation")
        self._released(self._served)

    def _silence(self, traffic: Traffic) -> None:
        self._day.begin("no client any more")
        traffic.paused = True
        self._fires("NoTraffic")
        traffic.paused = False

    def _frozen(self) -> None:
        self._day.begin("all workers frozen")
        frozen = [one.pid for one in self._own.workers()]
        for worker in frozen:
            os.kill(worker, signal.SIGSTOP)
        self._fires("ServiceNotReady")
        for worker in frozen:
            os.kill(worker, signal.SIGCONT)


def table(day: Day, shipped: dict[Alert, dict[str, str]]) -> tuple[list[str], bool]:
    """A line for each alert that ships, and whether all is as it should be."""
    lines = [
        "| alert | fault | fired after | labels | runbook | resolved after |",
        "|---|---|--:|---|---|--:|",
    ]
    good = True
    for alert, expected in sorted(shipped.items(), key=lambda one: astuple(one[0])):
        name = f"{alert.name} ({', '.join(filter(None, (alert.severity, alert.sign)))})"
        if (seen := day.seen.get(alert)) is None:
            good = False
            lines.append(f"| {name} | | never | | | |")
            continue
        page = seen.annotations.get("runbook_url", "").rpartition("/")[2]
        found = bool(page) and (ROOT / "docs" / "runbooks" / page).is_file()
        right = any(expected.items() <= labels.items() for labels in seen.labels)
        good = good and found and right and seen.resolved is not None
        told = ", ".join(
            f"{key}={value}" for key, value in expected.items() if key not in ("severity", "sign")
        )
        resolved = "never" if seen.resolved is None else f"{seen.resolved - seen.began:.0f} s"
        lines.append(
            f"| {name} | {seen.fault} | {seen.fired - seen.began:.0f} s | {'' if right else 'not '}{told} "
            f"| {'found' if found else 'missing'} | {resolved} |"
        )
    return lines, good


def gameday(
    keep: Annotated[Path | None, typer.Option(help="Keep logs and configurations in this folder.")] = None,
) -> None:
    """Inject every fault; show that each alert fires, has its runbook, and resolves. Ten minutes."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # leave by the usual way, which ends what it began
    program("prometheus"), program("alertmanager")  # rather now than after the model was made slow
    slo = tomllib.loads((ROOT / "slo.toml").read_text("utf-8"))
    day, began = Day(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gameday-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        artifacts = Path(shutil.copytree(ROOT / "artifacts", folder / "artifacts"))
        served = release_bad(artifacts)
        settings = {
            "APP_ENV": "local",
            "APP_ARTIFACTS_DIR": str(artifacts),
            "APP_WORKERS": "2",
            "APP_BATCH_MAX_ROWS": "8",
            "APP_METRICS_ENABLED": "true",
            "APP_CANARY_HEADER": SESSION,
            "APP_FALLBACK_VERSION": RULES,
        }
        typer.echo(f"gameday: an hour passes in {3600 / SPEED:.0f} s; logs in {folder}")
        with (
            service(**settings) as own,
            watching(folder, own.address, SPEED, SAMPLE_MS, tell=day.notify) as watch,
        ):
            start = watch.now()
            game = GameDay(day, watch, own, artifacts, served, 2 * slo["latency_p95_ms"] / 1000)
            game.run()
            day.begin("none: waiting until all is resolved")
            with Traffic(own.address, game.usual(), CLIENTS):
                until(
                    lambda: all(one in day.seen and day.seen[one].resolved for one in game.shipped),
                    "every alert to resolve",
                    PATIENCE_SECONDS,
                )
            empty = [one for one in queries() if not (watch.has_data(one, start) or game.lacks(one))]
    lines, good = table(day, game.shipped)
    typer.echo("\n".join(["", *lines, ""]))
    for query in empty:
        typer.echo(f"gameday: a panel shows nothing: {query}", err=True)
    good = good and not empty
    typer.echo(f"gameday: {'passed' if good else 'FAILED'} in {time.monotonic() - began:.0f} s")
    raise typer.Exit(0 if good else 1)
