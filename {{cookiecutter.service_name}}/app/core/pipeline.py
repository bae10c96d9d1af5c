"""From validated instances to predictions, with the model of one version.

    predict(instances) -> rows -> [inline | micro-batched | micro-batched in a thread] -> Prediction each

`Pipeline.load` is for the service: it chooses one of the three by the model's measured cost on this machine.
`Pipeline.offline` is for code without a server: commands, evaluation, import.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from app.core.batcher import HTTP_SECONDS, Batch, Batcher, Observer, Pace, Row
from app.core.errors import ArtifactError, ServiceError
from app.core.lookup import Lookup
from app.core.runtimes import Matrix, Runtime, load_runtime
from app.core.store import Artifact
from app.schemas.contract import KEYS, label_key
from app.schemas.predict import Features, Prediction

# Untyped, because a service has the fields either of a classifier or of a regressor.
_prediction: Any = Prediction

Flags = NDArray[np.bool_]
Execution = Literal["inline", "batch", "thread"]

ROUNDING = 1e-4  # a sum in float32 may leave the range 0 to 1 by this much
GOLDEN = "golden.jsonl"
WARM_UP_CALLS, WARM_UP_SECONDS = 20, 0.25
MAX_LOOP_SECONDS = 0.002  # a call that holds the event loop longer than this goes to the thread
MAX_CALL_SECONDS = 0.05  # limit of a joined call: longer calls save nothing and delay others
MOST_INTEGER = 2.0**53  # floats cannot hold every integer beyond it
MOST_INT64 = float(np.nextafter(2.0**63, 0))
FAR = 20  # times the width of the training range: a failure beyond it is blamed on the input
UNREADABLE = {"msg": "text that the model cannot read", "type": "unreadable"}
TOO_LARGE = "larger than the model can compute with", "too_large"
OUT_OF_RANGE = "outside the range seen in training", "out_of_range"
MIN_BATCH_GAIN = 1.25  # batching must save this factor per row, else rows run as they arrive


@dataclass(frozen=True, slots=True)
class Policy:
    """Decisions that an operator may change without a new model; None leaves one to manifest or warm-up."""

    review_threshold: float | None = None
    out_of_range: Literal["accept", "review", "reject"] = "review"
    batch_max_rows: int = 64
    batch_max_wait_seconds: float = 0.0
    execution: Execution | None = None


class Costs(NamedTuple):
    """Seconds of a call with one row, and per row of a full call."""

    per_call: float = 0.0
    per_row: float = 0.0


def rows_of(instances: Iterable[BaseModel]) -> list[Row]:
    """The values of validated instances, in the order of the model's columns."""
    if KEYS:
        return [tuple(v for name, v in one.__dict__.items() if name not in KEYS) for one in instances]
    return [tuple(one.__dict__.values()) for one in instances]


class Model:
    """An artifact, the runtime loaded from it, and the policy for its answers."""

    def __init__(self, artifact: Artifact, runtime: Runtime, policy: Policy) -> None:
        inputs, outputs = artifact.manifest.inputs, artifact.manifest.outputs
        self.artifact, self.version, self.runtime = artifact, artifact.manifest.version, runtime
        self._example: Row = tuple(entry.example for entry in inputs)
        self._labels: list[Any] = list(outputs.labels)
        self._keys = [label_key(label) for label in outputs.labels]
        rule = outputs.threshold  # of a binary classifier
        self._least = (self._labels.index(rule.label), rule.least) if rule else None
        own = policy.review_threshold
        self._threshold = outputs.review_threshold if own is None else own
        self._review, self._reject = policy.out_of_range == "review", policy.out_of_range == "reject"
        # For the audit log.
        self.thresholds = {"review": self._threshold, "out_of_range": policy.out_of_range}
        # Numbers are compared in the model's precision; without a training range, up to its largest numbers.
        self._numeric = [index for index, entry in enumerate(inputs) if entry.dtype in ("float64", "int64")]
        self._every = len(self._numeric) == len(inputs) and runtime.dtype is not np.object_
        exact = np.float64 if runtime.dtype is np.object_ else runtime.dtype
        integer = MOST_INT64 if runtime.dtype is np.object_ else MOST_INTEGER
        numbers = [inputs[index] for index in self._numeric]
        self._names = [entry.name for entry in numbers]
        texts = (index for index, entry in enumerate(inputs) if entry.dtype == "string")
        self._texts = {inputs[index].name: index for index in texts if not inputs[index].categories}
        self._open = np.array([entry.minimum is None or entry.maximum is None for entry in numbers], np.bool_)
        most = [integer if entry.dtype == "int64" else float(np.finfo(exact).max) for entry in numbers]
        ranges = [entry.training_range or (-own, own) for entry, own in zip(numbers, most, strict=True)]
        self._most = np.array(most, exact)
        self._low, self._high = np.array(ranges, exact).reshape(-1, 2).T

    @np.errstate(over="ignore")  # as a decorator it costs half
    def matrix(self, rows: Sequence[Row]) -> Matrix:
        """Rows, None for a missing value, in the runtime's type: in a float matrix None becomes NaN."""
        return np.asarray(rows, self.runtime.dtype)

    def run(self, rows: Sequence[Row]) -> Batch:
        """One call of the model; the answer of a bad row is its error."""
        start = perf_counter()
        matrix, beyond = self._judged(rows)
        refused: dict[int, ServiceError] = {}
        outside, counts = set[int](), dict[str, int]()
        if beyond.any():
            refused = self._violations(np.abs(self._numbers(matrix)) > self._most, *TOO_LARGE)
            kept = [index for index in range(len(rows)) if index not in refused]
            matrix, beyond = matrix[kept], beyond[kept]
            counts = {name: n for name, n in zip(self._names, beyond.sum(axis=0).tolist(), strict=True) if n}
            outside = set(np.flatnonzero(beyond.any(axis=1)).tolist()) if self._review else outside
        ready = perf_counter()
        outputs = self._infer(matrix) if len(matrix) else []
        inferred = perf_counter()
        answers = [self._answer(output, index in outside) for index, output in enumerate(outputs)]
        if any(isinstance(one, ServiceError) for one in answers):
            self._explain(answers, matrix, beyond)
        for index, failure in refused.items():
            answers.insert(index, failure)
        stages = (ready - start, inferred - ready, perf_counter() - inferred)
        return Batch(answers, stages, counts, matrix, self.version, rows)

    def reject(self, rows: Sequence[Row], single: bool) -> None:
        """Raise ServiceError for values outside the training range, if the policy is `reject`."""
        if self._reject and (refused := self._violations(self._judged(rows)[1], *OUT_OF_RANGE)):
            raise located(refused, single)

    def try_example(self, rows: int = 1) -> None:
        """Raise ArtifactError unless the model answers this many copies of the manifest's example."""
        if any(isinstance(answer, ServiceError) for answer in self.run([self._example] * rows).answers):
            raise ArtifactError(f"{self.version}: the model cannot predict the manifest's own example")

    def warm_up(self, max_rows: int) -> Costs:
        """Measure calls with one row and with `max_rows`; the fastest of several has the least noise."""
        best = {}
        for rows in (1, max_rows):
            matrix = np.asarray([self._example] * rows, self.runtime.dtype)
            began, times = perf_counter(), [math.inf]
            while len(times) <= WARM_UP_CALLS and perf_counter() - began < WARM_UP_SECONDS:
                start = perf_counter()
                self._infer(matrix)
                times.append(perf_counter() - start)
            self.try_example(rows)
            best[rows] = min(times) / rows
        return Costs(best[1], best[max_rows])

    def replay(self) -> None:
        """Raise ArtifactError unless every golden row gets the answer that was recorded at the import."""
        lines = [json.loads(line) for line in self.artifact.files.get(GOLDEN, b"").splitlines()]
        rows = rows_of(Features.model_validate(line["features"]) for line in lines)
        answers = self.run(rows).answers if rows else []
        for index, (line, answer) in enumerate(zip(lines, answers, strict=True), 1):
            if isinstance(answer, ServiceError) or not self._as_recorded(answer, line):
                raise ArtifactError(f"{self.version}/{GOLDEN}: line {index} has another answer than recorded")

    def _as_recorded(self, answer: Any, line: dict[str, Any]) -> bool:
        """Whether numbers are within the tolerance, and the label is the same unless rounding decides it."""
        recorded, tolerance = line.get("probabilities") or {"value": line["value"]}, line["tolerance"]
        own = getattr(answer, "probabilities", None) or {"value": answer.value}
        near = all(abs(own[key] - number) <= tolerance for key, number in recorded.items())
        if not self._labels or answer.label == line["label"]:
            return near
        if self._least is None:
            apart = recorded.get(label_key(line["label"]), math.inf) - recorded[label_key(answer.label)]
        else:
            apart = recorded[self._keys[self._least[0]]] - self._least[1]
        return near and abs(apart) <= 2 * tolerance

    def _judged(self, rows: Sequence[Row]) -> tuple[Matrix, Flags]:
        """The matrix, and a flag for each number outside the training range, [rows, numbers]."""
        try:
            matrix = self.matrix(rows)
            numbers = self._numbers(matrix)
        except OverflowError:  # an integer beyond all floats
            return self._judged([tuple(map(_held, row)) for row in rows])
        return matrix, (numbers < self._low) | (numbers > self._high)  # a missing value, NaN, is inside

    def _numbers(self, matrix: Matrix) -> Matrix:
        return matrix if self._every else matrix[:, self._numeric].astype(self._low.dtype)

    def _violations(self, wrong: Flags, message: str, kind: str) -> dict[int, ServiceError]:
        found: dict[int, ServiceError] = {}
        for row, column in np.argwhere(wrong).tolist():
            failure = found.setdefault(row, ServiceError("invalid_input"))
            failure.errors.append({"loc": [self._names[column]], "msg": message, "type": kind})
        return found

    def _explain(self, answers: list[Any], matrix: Matrix, beyond: Flags) -> None:
        """Blame the client for a number without bounds far outside the training range, and for a text."""
        for index, one in enumerate(answers):
            if isinstance(one, ServiceError) and (names := self._unreadable(matrix[index])):
                answers[index] = ServiceError("invalid_input")
                answers[index].errors += [{"loc": [name], **UNREADABLE} for name in names]
        failed = np.array([[isinstance(one, ServiceError)] for one in answers])
        numbers, low, high = self._numbers(matrix), self._low, self._high
        with np.errstate(over="ignore"):
            outside = np.maximum(numbers - high, low - numbers)
            far = (beyond & (outside / FAR > high - low)) | (np.abs(numbers) > MOST_INTEGER)
        for index, failure in self._violations(failed & far & self._open, *TOO_LARGE).items():
            answers[index] = failure

    def _unreadable(self, row: NDArray[Any]) -> list[str]:
        """Columns whose text makes the model fail when it is put into the example, which it can answer."""
        names, at = list(self._texts), list(self._texts.values())
        trials = self.matrix([self._example] * (len(names) + 1))
        trials[np.arange(len(names)), at] = row[at]
        *failed, broken = [isinstance(one, ServiceError) for one in self._infer(trials)] if names else [True]
        return [] if broken else [name for name, fails in zip(names, failed, strict=True) if fails]

    def _infer(self, matrix: Matrix) -> list[Any]:
        """The model's output per row; if it raises, the rows are halved until the bad row is found."""
        try:
            rows = self.runtime.infer(matrix)
            if len(rows) != len(matrix) or len(rows[0]) != max(len(self._labels), 1):
                raise ValueError("the model answered in another shape than it was asked")
            return rows
        except Exception as error:  # any exception of a model becomes the answer of its row
            if len(matrix) == 1:
                failure = ServiceError("model_error")
                failure.__cause__ = error
                return [failure]
            half = len(matrix) // 2
            return self._infer(matrix[:half]) + self._infer(matrix[half:])

    def _answer(self, output: Any, outside: bool) -> Any:
        """The prediction of a row: from the value of a regressor or the probabilities of a classifier."""
        if isinstance(output, ServiceError):
            return output
        if not math.isfinite(sum(output)):  # NaN or infinite if any of them is
            return ServiceError("non_finite_output")
        if not self._labels:
            return _prediction("", self.version, output[0], "review" if outside else "accept")
        if self._least is None:
            at = output.index(max(output))
        else:
            at, least = self._least
            at = at if output[at] >= least else 1 - at
        if 1.0 < max(output) < 1.0 + ROUNDING or -ROUNDING < min(output) < 0.0:
            output = [min(max(one, 0.0), 1.0) for one in output]
        by_label = dict(zip(self._keys, output, strict=True))
        action = "review" if outside or output[at] < self._threshold else "accept"
        return _prediction("", self.version, self._labels[at], output[at], by_label, action)


def _held(value: Any) -> Any:
    return math.inf if isinstance(value, int) and abs(value) > MOST_INT64 else value


def located(failures: Mapping[int, ServiceError], single: bool) -> ServiceError:
    """One error for a request with failed rows, given by index: the first row's, with all violations."""
    (at, first), *_ = failures.items()
    errors = [
        {**error, "loc": ["body", *([] if single else ["instances", index]), *error["loc"]]}
        for index, failure in failures.items()
        for error in failure.errors
    ]
    detail = first.detail if single or errors else f"the model failed on instance {at}"
    found = ServiceError(first.code, detail, errors)
    found.__cause__ = first.__cause__
    return found


OFFLINE = Policy(batch_max_rows=256)


def choose_execution(costs: Costs, max_rows: int) -> Execution:
    """How to run a model whose full call has `max_rows`."""
    if max(costs.per_call, costs.per_row * max_rows) > MAX_LOOP_SECONDS:
        return "thread"
    return "batch" if costs.per_call > MIN_BATCH_GAIN * costs.per_row else "inline"


def rows_of_a_call(seconds_per_row: float, max_rows: int) -> int:
    """The maximum number of rows per call, from the seconds per row of a full call."""
    return max(1, min(max_rows, int(MAX_CALL_SECONDS / max(seconds_per_row, 1e-9))))


def pace_of(costs: Costs, max_rows: int, http_seconds: float) -> Pace:
    """The duration of calls by number of rows, from those with one row and with `max_rows`."""
    full = costs.per_row * max_rows
    each = max(0.0, (full - costs.per_call) / (max_rows - 1)) if max_rows > 1 else costs.per_row
    return Pace(max(1e-6, costs.per_call - each), each + http_seconds)


class Pipeline:
    """A model behind one `async predict(instances)`. Made by `load` or `offline`."""

    def __init__(
        self, model: Model, policy: Policy, costs: Costs, observer: Observer, lookup: Lookup | None = None
    ) -> None:
        self.model, self.artifact, self.version = model, model.artifact, model.version
        self.costs, self._max_rows = costs, policy.batch_max_rows
        self._observer, self._lookup = observer, lookup
        self.execution = policy.execution or choose_execution(costs, policy.batch_max_rows)
        self.batcher = Batcher(
            model.run,
            observer,
            max_rows=rows_of_a_call(costs.per_row, policy.batch_max_rows),
            max_wait_seconds=policy.batch_max_wait_seconds,
            threaded=self.execution == "thread",
            pace=pace_of(costs, policy.batch_max_rows, 0.0 if self.execution == "thread" else HTTP_SECONDS),
        )

    @classmethod
    def load(
        cls,
        artifact: Artifact,
        observer: Observer,
        policy: Policy,
        runtime: Runtime | None = None,
        lookup: Lookup | None = None,
    ) -> Self:
        """Load a verified version, warm it up and replay its golden set; raises ArtifactError."""
        model = Model(artifact, runtime or load_runtime(artifact), policy)
        costs = model.warm_up(policy.batch_max_rows)
        model.replay()
        return cls(model, policy, costs, observer, lookup)

    @classmethod
    def offline(cls, artifact: Artifact, policy: Policy = OFFLINE, runtime: Runtime | None = None) -> Self:
        """Load without batching, thread or measurement, for `answers`; raises ArtifactError."""
        model = Model(artifact, runtime or load_runtime(artifact), policy)
        model.try_example()
        return cls(model, replace(policy, execution="inline"), Costs(), Observer())

    def answers(self, instances: Sequence[BaseModel]) -> list[Prediction | ServiceError]:
        """Per instance its prediction, without an id, or its error; needs no event loop.

        Raises ServiceError for values outside the training range if the policy is `reject`.
        """
        rows = rows_of(instances)
        self.model.reject(rows, single=False)
        parts = (rows[at : at + self._max_rows] for at in range(0, len(rows), self._max_rows))
        return [answer for part in parts for answer in self.model.run(part).answers]

    async def predict(
        self, instances: Sequence[BaseModel], ids: Sequence[str], deadline: float, *, single: bool = False
    ) -> list[Prediction]:
        """One prediction per validated instance, in order; `deadline` is a time of `perf_counter`.

        Raises ServiceError; if several rows fail, the error of the first.
        """
        defaulted: Iterable[int] = ()
        if self._lookup is not None:
            instances, defaulted = await self._lookup.complete(instances, deadline)
        rows = rows_of(instances)
        self.model.reject(rows, single)
        if self.execution == "inline" and len(rows) <= self._max_rows:
            batch = self.model.run(rows)
            self._observer.batch(batch, (0.0,))
            answers = batch.answers
        else:
            answers = await self.batcher.submit(rows, deadline)
        if failures := {at: one for at, one in enumerate(answers) if isinstance(one, ServiceError)}:
            raise located(failures, single)
        for answer, prediction_id in zip(answers, ids, strict=True):
            answer.prediction_id = prediction_id
        for at in defaulted:
            answers[at].action, answers[at].degraded = "review", True
        return answers
