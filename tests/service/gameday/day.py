"""Breaks the service on purpose, and shows that every alert fires, finds its runbook and resolves.

    service + Prometheus + Alertmanager + receiver, with time compressed -> faults, one after the other
    -> alerts as they arrive at the receiver, panels -> a line for each alert of ops/prometheus -> exit code

All durations in the rules and in the routing are divided by the same factor; nothing else in them changes.
The service, its metrics, the rules, Prometheus and Alertmanager are the real ones, on free ports of loopback.
"""

import math
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx2
import numpy as np
import typer

from app.core.runtimes import load_runtime
from app.core.store import read_artifact, read_release
from lifecycle.command import ROOT, LifecycleError, table
from lifecycle.operations.monitor import PREDICTION, trained_features
from lifecycle.operations.programs import Running, service, wait_for
from lifecycle.package import write_release
from tests.service.gameday.programs import Watch, program, queries, watching
from tests.service.gameday.trial import SOUND, Trouble, add_trial, number_of, usual

SPEED = 120  # an hour of the rules passes in 30 s
SAMPLE_MS = 500
SESSION = "X-Session-ID"  # sends about one request in two to a canary
ALERT_SECONDS = 90.0
RESOLVED_SECONDS = 300.0  # the longest window for tickets, 6 h, takes 180
TICKET_SECONDS = 3600 / SPEED  # so that the ticket is still due when the page has gone
CLIENTS, PAUSE_SECONDS = 2, 0.08
FLOOD_CLIENTS, FLOOD_PAUSE_SECONDS = 60, 0.64
SINES, CALIBRATION_SECONDS = 400, 2.0
RULES, FAILING, SLOW, BAD = "v0", "v101", "v102", "v103"  # all but the rules exist on this day only


def say(words: str) -> None:
    """A line of progress, at once also where the output is a pipe."""
    print(f"gameday: {words}", flush=True)


class Alert(NamedTuple):
    """One alerting rule, by its labels in Alertmanager."""

    name: str
    severity: str
    sign: str

    @classmethod
    def of(cls, labels: dict[str, str]) -> "Alert":
        """The rule that an alert with these labels comes from."""
        return cls(labels["alertname"], labels.get("severity", ""), labels.get("sign", ""))


class Event(NamedTuple):
    """An alert that Alertmanager told a receiver of, `at` seconds of `time.monotonic`."""

    at: float
    fault: "Fault"  # that was going on, and since when
    began: float
    alert: Alert
    message: dict[str, Any]  # status, labels, annotations


@dataclass
class Day:
    """The fault that is going on, and the alerts that arrived."""

    fault: "Fault"
    began: float = field(default_factory=time.monotonic)
    events: list[Event] = field(default_factory=list)

    def begin(self, fault: "Fault") -> None:
        """A new fault starts now."""
        self.fault, self.began = fault, time.monotonic()
        say(fault.name)

    def notify(self, _path: str, message: dict[str, Any]) -> None:
        """Take a message of Alertmanager to a receiver."""
        for one in message["alerts"]:
            alert = Alert.of(one["labels"])
            if self.status(alert) != one["status"]:
                say(f"  {one['status']}: {alert.name} ({alert.severity})")
            self.events.append(Event(time.monotonic(), self.fault, self.began, alert, one))

    def status(self, alert: Alert) -> str:
        """`firing`, `resolved`, or nothing if it never arrived."""
        own = [event for event in self.events if event.alert == alert]
        return str(own[-1].message["status"]) if own else ""


class Traffic:
    """Clients that ask without end, in a `with` block, and pause a moment after each answer."""

    def __init__(self, address: str, payloads: list[dict[str, Any]], clients: int, pause: float) -> None:
        # A connection a request, so that both workers get their share.
        self._http = httpx2.Client(
            base_url=address, timeout=60, limits=httpx2.Limits(max_keepalive_connections=0)
        )
        self._lock, self._ending, self._pause = threading.Lock(), threading.Event(), pause
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]
        self.send(payloads)
        self.answers: list[dict[str, Any]] = []  # the latest, for feedback

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        self._http.close()

    def send(self, payloads: list[dict[str, Any]]) -> None:
        """Send these from now on, one after the other; nothing, if there are none."""
        self._payloads = cycle(payloads)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The parsed answer to a POST, whatever its status."""
        return self._http.post(path, json=body, headers={SESSION: secrets.token_hex(8)}).json()

    def _ask(self) -> None:
        while not self._ending.wait(self._pause):
            with self._lock:
                body = next(self._payloads, None)
            if body is None:
                continue
            with suppress(httpx2.TransportError, ValueError):
                answer = self.post("/v1/predict", body)
                if "prediction_id" in answer:
                    self.answers = [*self.answers[-200:], answer]


def width_for(root: Path, seconds: float) -> int:
    """The `width` with which a slow model takes so many seconds for a row on this machine."""
    trial, width = "v100", 4096
    add_trial(root, read_release(root).serving, trial, Trouble(sines=SINES, width=width))
    artifact = read_artifact(root, trial)
    runtime = load_runtime(artifact)
    row = np.array([[one.example for one in artifact.manifest.inputs]], runtime.dtype)
    times, end = [], time.monotonic() + CALIBRATION_SECONDS  # long enough for a moment without other work
    while time.monotonic() < end:
        began = time.perf_counter()
        runtime.infer(row)
        times.append(time.perf_counter() - began)
    shutil.rmtree(root / trial)
    return math.ceil(width * seconds / min(times))


def release(root: Path, **changes: Any) -> None:
    """Change what is released: the running service follows the file."""
    write_release(root, read_release(root).model_copy(update=changes))


def until(condition: Callable[[], object], what: str, seconds: float = ALERT_SECONDS) -> None:
    """Wait for `condition`; if it does not hold in time, the day goes on and the table shows the gap."""
    if not wait_for(condition, seconds):
        say(f"  waited in vain for {what}")


@dataclass(frozen=True)
class Fault:
    """What is broken, and the alerts that have to fire before it is undone."""

    name: str
    alerts: tuple[str, ...] = ()
    release: dict[str, Any] = field(default_factory=dict)  # changes of release.json
    payloads: list[dict[str, Any]] | None = None  # instead of the usual ones
    during: Callable[[], AbstractContextManager[None]] = nullcontext
    seconds: float = 0  # that it lasts at least, after the alerts


class GameDay:
    """The faults, against a service that was started with BAD released."""

    def __init__(self, day: Day, watch: Watch, own: Running, artifacts: Path, served: str) -> None:
        self._day, self._watch, self._own, self._artifacts, self._served = day, watch, own, artifacts, served
        self.usual = usual(artifacts, served)
        self._traffic = Traffic(own.address, self.usual, CLIENTS, PAUSE_SECONDS)
        self._outputs = read_artifact(artifacts, served).manifest.outputs
        inputs = read_artifact(artifacts, served).manifest.inputs
        number = number_of(inputs)
        self._strange, limit = self.usual[0], -1.0
        if number and number.training_range:
            low, limit = number.training_range
            beyond = min(limit + (limit - low), math.inf if number.maximum is None else number.maximum)
            value = math.floor(beyond) if number.dtype == "int64" else beyond
            self._strange = {**self.usual[0], number.name: value}
        # Without a number to tell rows apart, it fails for all of them, and cannot pass a golden set.
        add_trial(artifacts, served, FAILING, Trouble(fails_above=limit), golden=number is not None)
        promised = tomllib.loads((ROOT / "slo.toml").read_text("utf-8"))["latency_p95_ms"] / 1000
        slow = Trouble(sines=SINES, width=width_for(artifacts, 2 * promised))
        add_trial(artifacts, served, SLOW, slow)
        version, self._first = {"model_version": served}, inputs[0].name
        moved = number.name if number else self._first
        culprits = {
            "HighInvalidInputRate": {"field": self._first},
            "FeatureDrift": {"feature": moved, **version},
            **dict.fromkeys(("PredictionShift", "LowConfidence", "AccuracyDrop"), version),
        }
        # A regressor has no confidence that could be low, and with few training rows there is no drift.
        trained = trained_features(artifacts, served)
        needs = {
            "LowConfidence": bool(self._outputs.labels),
            "FeatureDrift": moved in trained,
            "PredictionShift": PREDICTION in trained,
            # Nothing can miss until app/own/lookup.py is written; promtool and test_own_code.py prove it.
            "LookupMisses": False,
        }
        self.shipped = {  # with the labels that each must have
            Alert.of({"alertname": rule["name"], **rule["labels"]}): rule["labels"]
            | culprits.get(rule["name"], {})
            for rule in watch.shipped()
            if needs.get(rule["name"], True)
        }

    def lacks(self, query: str) -> bool:
        """Whether training was too small for what is asked."""
        names = {one.name for one in self.shipped}
        return ("feature:psi" in query and "FeatureDrift" not in names) or (
            "prediction:psi" in query and "PredictionShift" not in names
        )

    def faults(self) -> list[Fault]:
        """All faults, in the order in which they disturb each other least."""
        invalid = [*self.usual, *([{**self.usual[0], self._first: ["long"]}] * len(self.usual))]
        one_in_three = [*self.usual[:2], self._strange]
        beside = {"shadow": RULES, "canary": RULES, "canary_percent": 50}
        canary = {"canary": FAILING, "canary_percent": 50}
        failing = ("NonFiniteOutput", "AvailabilityBudgetBurn")
        slow, drifted = {"serving": SLOW}, ("FeatureDrift", "PredictionShift")
        return [
            Fault("a start with a version whose model was changed", ("ServingFallback",)),
            Fault("none, for a minute of usual traffic", seconds=60),
            # Early: its ticket compares slow requests with all requests of the day so far.
            Fault("a model that is too slow", ("LatencyBudgetBurn",), slow, seconds=TICKET_SECONDS),
            Fault("none: the rules beside the model, as its shadow and as a canary", (), beside, seconds=20),
            Fault("labels that contradict the predictions", ("AccuracyDrop",), during=self._feedback),
            Fault("a client that breaks the contract", ("HighInvalidInputRate",), {}, invalid),
            Fault("a worker is killed", ("WorkerRestarts",), during=self._kill),
            Fault("a released version whose model was changed", ("ModelReloadFailed",), {"serving": BAD}),
            Fault("inputs beyond those of training", (*drifted, "LowConfidence"), {}, [self._strange]),
            Fault("a model that answers NaN to one in three", failing, {"serving": FAILING}, one_in_three),
            Fault("a canary that answers NaN to one in three", ("CanaryStopped",), canary, one_in_three),
            Fault("more requests than a slow model can do", ("Saturation",), slow, during=self._flood),
            Fault("no client any more", ("NoTraffic",), payloads=[]),
            Fault("all workers frozen", ("ServiceNotReady",), during=self._freeze),
        ]

    def run(self) -> None:
        """Fault after fault, under traffic, and then without a fault until every alert has resolved."""
        with self._traffic:
            for fault in self.faults():
                self._inject(fault)
            self._day.begin(Fault("none: waiting until all is resolved"))
            until(
                lambda: all(self._day.status(one) == "resolved" for one in self.shipped),
                "every alert to resolve",
                RESOLVED_SECONDS,
            )

    def _inject(self, fault: Fault) -> None:
        self._day.begin(fault)
        self._fired: set[Alert] = set()
        self._release(fault.release)
        self._traffic.send(self.usual if fault.payloads is None else fault.payloads)
        with fault.during():
            until(self._alerted, ", ".join(fault.alerts))
            time.sleep(fault.seconds)
        self._traffic.send(self.usual)
        self._release({"serving": self._served, "shadow": None, "canary": None, "canary_percent": 0})

    def _alerted(self) -> bool:
        """Whether all that is due fires. Receivers get only the page of a page and a ticket with one name."""
        due = {one for one in self.shipped if one.name in self._day.fault.alerts}
        self._fired |= {Alert.of(one["labels"]) for one in self._watch.alerts() if one["state"] == "firing"}
        paged = {one.name for one in due if one.severity == "page"}
        told = {one for one in due if one.severity == "page" or one.name not in paged}
        return due <= self._fired and all(map(self._day.status, told))

    def _release(self, changes: dict[str, Any]) -> None:
        """Change release.json, and wait until both workers serve what it says, if that is possible."""
        release(self._artifacts, **changes)
        if (version := changes.get("serving", BAD)) != BAD:
            ready = f"{self._own.address}/ready"
            until(
                lambda: {httpx2.get(ready).json().get("model_version") for _ in range(10)} == {version},
                f"{version} to serve",
            )

    @contextmanager
    def _feedback(self) -> Iterator[None]:
        """Wrong labels after right ones, and in the end enough right ones."""
        self._label(30, wrong=False)
        self._label(30, wrong=True)
        yield
        self._label(400, wrong=False)

    def _label(self, count: int, *, wrong: bool) -> None:
        told: set[str] = set()
        while len(told) < count:
            for answer in self._traffic.answers:
                new = answer["prediction_id"] not in told and answer["model_version"] == self._served
                if new and len(told) < count:
                    body = {"prediction_id": answer["prediction_id"], "label": self._true(answer, wrong)}
                    self._traffic.post("/v1/feedback", body)
                    told.add(answer["prediction_id"])
            self._traffic.answers = []
            time.sleep(PAUSE_SECONDS)

    def _true(self, answer: dict[str, Any], wrong: bool) -> Any:
        labels: list[Any] = list(self._outputs.labels)
        if labels:
            return next(one for one in labels if (one != answer["label"]) == wrong)
        tolerance = self._outputs.feedback_tolerance
        return answer["value"] + wrong * 10 * (tolerance + abs(answer["value"]) + 1)

    @contextmanager
    def _kill(self) -> Iterator[None]:
        self._own.workers()[0].kill()
        yield

    @contextmanager
    def _flood(self) -> Iterator[None]:
        with Traffic(self._own.address, self.usual, FLOOD_CLIENTS, FLOOD_PAUSE_SECONDS):
            yield

    @contextmanager
    def _freeze(self) -> Iterator[None]:
        workers = self._own.workers()
        for worker in workers:
            worker.suspend()
        yield
        for worker in workers:
            worker.resume()


def alert_table(day: Day, shipped: dict[Alert, dict[str, str]]) -> tuple[str, bool]:
    """A line for each alert that ships, and whether all is as it should be."""
    rows, good = [], True
    for alert, expected in sorted(shipped.items()):
        name = f"{alert.name} ({', '.join(filter(None, alert[1:]))})"
        own = [event for event in day.events if event.alert == alert]
        firing = [event for event in own if event.message["status"] == "firing"]
        if not firing:
            good = False
            rows.append((name, "", "never", "", "", ""))
            continue
        # An earlier fault may have raised it too.
        first = next((event for event in firing if alert.name in event.fault.alerts), firing[0])
        last = own[-1]
        page = first.message["annotations"].get("runbook_url", "").rpartition("/")[2]
        found = bool(page) and (ROOT / "docs" / "runbooks" / page).is_file()
        right = any(expected.items() <= event.message["labels"].items() for event in firing)
        resolved = last.message["status"] == "resolved"
        good = good and found and right and resolved
        told = [f"{key}={value}" for key, value in expected.items() if key not in ("severity", "sign")]
        rows.append(
            (
                name,
                first.fault.name,
                f"{first.at - first.began:.0f} s",
                ("" if right else "not ") + ", ".join(told),
                "found" if found else "missing",
                f"{last.at - first.began:.0f} s" if resolved else "never",
            )
        )
    return table(("alert", "fault", "fired after", "labels", "runbook", "resolved after"), rows), good


def gameday(
    keep: Annotated[Path | None, typer.Option(help="Keep logs and configurations in this folder.")] = None,
) -> None:
    """Inject every fault; show that each alert fires, has its runbook, and resolves. Ten minutes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that all programs are stopped
    program("prometheus"), program("alertmanager")  # a missing one is better known before the slow work
    day, began = Day(Fault("none")), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gameday-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        artifacts = Path(shutil.copytree(ROOT / "artifacts", folder / "artifacts"))
        served = read_release(artifacts).serving
        add_trial(artifacts, served, BAD, SOUND)
        with (artifacts / BAD / "model.onnx").open("ab") as file:
            file.write(b"changed")
        release(artifacts, serving=BAD)
        settings = {
            "APP_ENV": "local",
            "APP_ARTIFACTS_DIR": str(artifacts),
            "APP_WORKERS": "2",
            "APP_BATCH_MAX_ROWS": "8",
            "APP_METRICS_ENABLED": "true",
            "APP_CANARY_HEADER": SESSION,
            "APP_FALLBACK_VERSION": RULES,
        }
        say(f"an hour passes in {3600 / SPEED:.0f} s; logs in {folder}")
        with (
            service(**settings) as own,
            watching(folder, own.address, SPEED, SAMPLE_MS, tell=day.notify) as watch,
        ):
            start = watch.now()
            game = GameDay(day, watch, own, artifacts, served)
            game.run()
            empty = [one for one in queries() if not (watch.has_data(one, start) or game.lacks(one))]
    lines, good = alert_table(day, game.shipped)
    print(f"\n{lines}\n")
    for query in empty:
        say(f"a panel shows nothing: {query}")
    good = good and not empty
    say(f"{'passed' if good else 'FAILED'} in {time.monotonic() - began:.0f} s")
    raise typer.Exit(not good)


if __name__ == "__main__":
    try:
        typer.run(gameday)
    except LifecycleError as error:
        sys.exit(f"gameday: {error}")
