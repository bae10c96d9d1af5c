"""Batcher, pipeline and admission without a server: fake models that can be held, fail, or work long."""

import asyncio
import json
import math
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields
from datetime import date
from functools import wraps
from time import perf_counter
from typing import Any, Literal, ParamSpec, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, create_model

from app.core.batcher import (
    BODY_FACTOR,
    MAX_BYTES,
    REQUEST_BYTES,
    Admission,
    Batch,
    Batcher,
    Observer,
    Pace,
    Row,
)
from app.core.errors import ArtifactError, ServiceError
from app.core.pipeline import Costs, Execution, Pipeline, Policy, choose_execution, pace_of, rows_of_a_call
from app.core.pipeline import Model as PipelineModel
from app.core.runtimes import Matrix, Runtime, load_runtime
from app.core.store import Artifact, Input, Manifest, Outputs, read_artifact
from app.schemas.contract import label_key
from app.schemas.predict import Features, Prediction
from tests.service.conftest import ARTIFACTS, EXAMPLE, LABELS, NUMBER, SERVED, VERSIONS, golden_set, number

PATIENCE_SECONDS = 20.0  # only what is broken takes as long
V1 = read_artifact(ARTIFACTS, SERVED)
# Columns of its own: only the task is the served contract's, because it decides what an answer is made of.
RANGES = {"first": (4.3, 7.9), "second": (2.0, 4.4), "third": (1.0, 6.9), "fourth": (0.1, 2.5)}
COLUMNS = [
    Input(name=name, dtype="float64", training_range=one, example=one[1]) for name, one in RANGES.items()
]
ROW: Any = create_model("Row", **dict.fromkeys(RANGES, (float, ...)))  # type: ignore[call-overload]
ANSWERS = ["one", "two", "three"] if LABELS else []
WIDTH = len(ANSWERS) or 1
OWN = V1.manifest.model_copy(
    update={"version": "v1", "inputs": COLUMNS, "outputs": Outputs(labels=[*ANSWERS], review_threshold=0.6)}
)
EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
BOTH = pytest.mark.parametrize("threaded", [False, True], ids=["on the loop", "in a thread"])
P = ParamSpec("P")


def on_a_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on an event loop of its own."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), PATIENCE_SECONDS))

    return run


def soon(seconds: float = PATIENCE_SECONDS) -> float:
    """A deadline that many seconds away."""
    return perf_counter() + seconds


async def outcomes(*work: Awaitable[Any]) -> list[Any]:
    """What each gave or raised, all of them concurrent."""
    return list(await asyncio.gather(*work, return_exceptions=True))


class Seen(Observer):
    """An observer that remembers."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.waits: list[float] = []
        self.reasons: list[str] = []

    def batch(self, batch: Batch, waits: Sequence[float]) -> None:
        """Keep the call."""
        self.batches.append(batch)
        self.waits += waits

    def shed(self, reason: str) -> None:
        """Keep the reason."""
        self.reasons.append(reason)


class Mirror:
    """What a batcher runs: answers every row with the row, once it is let."""

    def __init__(self) -> None:
        self.calls: list[list[Row]] = []
        self.threads: set[int] = set()
        self.entered, self.let = threading.Event(), threading.Event()
        self.let.set()

    def __call__(self, rows: list[Row]) -> Batch:
        """Answers in order."""
        self.calls.append(rows)
        self.threads.add(threading.get_ident())
        self.entered.set()
        self.let.wait(PATIENCE_SECONDS)
        if (row := ("raise",)) in rows:
            raise ValueError(row)
        return Batch(list(rows), (0.0, 0.0, 0.0), {})

    async def hold(self, batcher: Batcher, row: Row, deadline: float) -> "asyncio.Task[list[Any]]":
        """Submit a row and stop in the middle of its call."""
        self.let.clear()
        self.entered.clear()
        task = asyncio.create_task(batcher.submit([row], deadline))
        assert await asyncio.to_thread(self.entered.wait, PATIENCE_SECONDS)
        return task


def batcher_of(run: Mirror, seen: Seen, *, max_rows: int = 64, threaded: bool = True) -> Batcher:
    """A batcher as the pipeline makes it."""
    return Batcher(
        run, seen, max_rows=max_rows, max_wait_seconds=0.0, threaded=threaded, pace=Pace(0.0, 1e-4)
    )


@pytest.fixture
def run() -> Iterator[Mirror]:
    """Never left holding a thread."""
    run = Mirror()
    yield run
    run.let.set()


@BOTH
@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30), max_rows=st.integers(1, 8))
def test_every_caller_gets_its_own_rows(threaded: bool, sizes: list[int], max_rows: int) -> None:
    """However requests are joined, each gets its own rows back, and no call takes more than allowed."""
    run, seen = Mirror(), Seen()
    jobs = [[(job, row) for row in range(size)] for job, size in enumerate(sizes)]

    @on_a_loop
    async def scenario() -> None:
        batcher = batcher_of(run, seen, max_rows=max_rows, threaded=threaded)
        assert await asyncio.gather(*(batcher.submit(job, soon()) for job in jobs)) == jobs
        assert batcher.waiting == batcher.abandoned == 0
        batcher.close()

    scenario()
    assert [row for call in run.calls for row in call] == [row for job in jobs for row in job]
    assert max(map(len, run.calls)) <= max_rows
    assert [len(batch.answers) for batch in seen.batches] == [len(call) for call in run.calls]
    assert (threading.get_ident() in run.threads) is not threaded


@on_a_loop
async def test_requests_that_are_ready_together_share_a_call() -> None:
    """On the loop, too, what is there when the model's turn comes is one batch."""
    run = Mirror()
    batcher = batcher_of(run, Seen(), threaded=False)
    await asyncio.gather(*(batcher.submit([(index,)], soon()) for index in range(40)))
    assert [len(call) for call in run.calls] == [40]


@on_a_loop
async def test_what_arrives_while_a_batch_runs_is_the_next_batch(run: Mirror) -> None:
    """Nothing waits for a timer, and the loop is free while the model works."""
    seen = Seen()
    batcher = batcher_of(run, seen)
    first = await run.hold(batcher, ("first",), soon())
    rest = [asyncio.create_task(batcher.submit([(index,)], soon())) for index in range(3)]
    await asyncio.sleep(0)
    assert batcher.waiting == 3
    run.let.set()
    assert await asyncio.gather(first, *rest) == [[("first",)], [(0,)], [(1,)], [(2,)]]
    assert run.calls == [[("first",)], [(0,), (1,), (2,)]]
    assert len(seen.waits) == 4
    batcher.close()


@on_a_loop
async def test_a_caller_that_leaves_disturbs_nobody(run: Mirror) -> None:
    """Cancelled in the queue a row is never run; cancelled while it runs, it counts until the call ends."""
    seen = Seen()
    batcher = batcher_of(run, seen)
    running = await run.hold(batcher, ("running",), soon())
    queued, stays = (asyncio.create_task(batcher.submit([(name,)], soon())) for name in ("queued", "stays"))
    await asyncio.sleep(0)
    running.cancel()
    queued.cancel()
    await asyncio.wait((running, queued))
    assert batcher.abandoned == 1
    run.let.set()
    assert await stays == [("stays",)]
    assert batcher.abandoned == 0
    assert run.calls == [[("running",)], [("stays",)]]
    assert seen.reasons == []
    batcher.close()


@on_a_loop
async def test_what_expires_in_the_queue_is_never_run(run: Mirror) -> None:
    """A waiting request is answered at its own deadline, even if one with more time came before it."""
    seen = Seen()
    batcher = batcher_of(run, seen)
    first = await run.hold(batcher, ("first",), soon())
    patient = asyncio.create_task(batcher.submit([("patient",)], soon()))
    with pytest.raises(ServiceError) as raised:
        await batcher.submit([("hurried",)], soon(0.02))
    assert (raised.value.code, seen.reasons, run.let.is_set()) == ("model_timeout", ["deadline"], False)
    run.let.set()
    assert await outcomes(first, patient) == [[("first",)], [("patient",)]]
    assert run.calls == [[("first",)], [("patient",)]]
    batcher.close()


@on_a_loop
async def test_a_slot_is_free_only_when_its_work_has_ended(run: Mirror) -> None:
    """A running row is answered at its deadline, and stays on the books until the model lets go of it."""
    seen = Seen()
    batcher = batcher_of(run, seen)
    with pytest.raises(ServiceError, match="model_timeout"):
        await (await run.hold(batcher, ("late",), soon(0.3)))
    assert (batcher.abandoned, seen.reasons) == (1, ["deadline"])
    run.let.set()
    assert await batcher.submit([("next",)], soon()) == [("next",)]
    assert (batcher.abandoned, seen.reasons) == (0, ["deadline"])
    batcher.close()


@on_a_loop
async def test_an_expired_request_is_not_run_on_the_loop_either() -> None:
    """A deadline that has passed when the turn comes is a timeout, and its neighbour gets its answer."""
    run, seen = Mirror(), Seen()
    batcher = batcher_of(run, seen, threaded=False)
    late, fine = await outcomes(batcher.submit([("late",)], soon(-1)), batcher.submit([("fine",)], soon()))
    assert (late.code, late.headers["retry-after"], seen.reasons) == ("model_timeout", "1", ["deadline"])
    assert (fine, run.calls) == ([("fine",)], [[("fine",)]])


@BOTH
@on_a_loop
async def test_a_call_that_breaks_takes_only_its_own_requests_with_it(threaded: bool) -> None:
    """Whatever goes wrong in one call, its requests get an error and the next ones an answer."""
    batcher = batcher_of(Mirror(), Seen(), threaded=threaded)
    broken = await outcomes(*(batcher.submit([("raise",)], soon()) for _ in range(3)))
    assert all(isinstance(one if isinstance(one, Exception) else one[0], ServiceError) for one in broken)
    assert await batcher.submit([("fine",)], soon()) == [("fine",)]
    batcher.close()


class Model:
    """A runtime whose first probability is the first feature, and that fails on request."""

    FAILURES = {"raises": 61.0, "nan": 62.0, "inf": 63.0, "-inf": 64.0}  # noqa: RUF012  # only read
    dtype: Any = np.float32

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """See `Runtime`."""
        if self.FAILURES["raises"] in matrix[:, 0]:
            raise RuntimeError("of all rows, this one")
        kinds = {value: kind for kind, value in self.FAILURES.items()}
        return [
            [float(kinds[row[0]]) if row[0] in kinds else row[0] / 100, row[1] / 100, 0.0][:WIDTH]
            for row in matrix.tolist()
        ]


class Working:
    """A runtime that really works so much per row and per call, and answers alike."""

    dtype: Any = np.float32

    def __init__(self, per_row: int = 0, per_call: int = 0) -> None:
        self._per_row, self._per_call = per_row, per_call

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """See `Runtime`."""
        sum(range(self._per_row * len(matrix) + self._per_call))
        return [[0.5, 0.25, 0.25][:WIDTH]] * len(matrix)


def row(first: float, second: float = 0.0) -> BaseModel:
    """An instance of which a `Model` reads the first two features."""
    made: BaseModel = ROW(first=first, second=second, third=2.0, fourth=1.0)
    return made


def outputs(prediction: Prediction) -> list[float]:
    """What the model gave for it: probabilities, or a value."""
    answer = asdict(prediction)
    return [*answer["probabilities"].values()] if LABELS else [answer["value"]]


def pipeline_of(
    runtime: Runtime, seen: Seen | None = None, *, manifest: Manifest = OWN, **policy: Any
) -> Pipeline:
    """A pipeline of v1, its model replaced."""
    return Pipeline.load(Artifact(manifest, {}), seen or Seen(), Policy(**policy), runtime)


async def ask(pipeline: Pipeline, *instances: BaseModel) -> list[Prediction]:
    """One request's predictions."""
    return await pipeline.predict(instances, [""] * len(instances), soon())


@pytest.mark.parametrize("execution", EXECUTIONS)
@on_a_loop
async def test_a_thousand_callers_get_a_thousand_answers(execution: Execution) -> None:
    """Of 1,000 concurrent requests with distinct inputs each gets its own answer, under its own id."""
    seen = Seen()
    pipeline = pipeline_of(Model(), seen, execution=execution)
    answers = await asyncio.gather(
        *(pipeline.predict([row(n / 20, 50 - n / 20)], [f"id{n}"], soon()) for n in range(1000))
    )
    for n, (answer,) in enumerate(answers):
        assert answer.prediction_id == f"id{n}"
        expected = [n / 2000, 0.5 - n / 2000, 0][:WIDTH]
        assert outputs(answer) == pytest.approx(expected, abs=1e-6)
    assert sum(len(batch.answers) for batch in seen.batches) == 1000
    assert max(len(batch.answers) for batch in seen.batches) <= 64
    pipeline.batcher.close()


@pytest.mark.parametrize("execution", ["batch", "thread"])
@pytest.mark.parametrize("failure", Model.FAILURES)
@on_a_loop
async def test_a_poisoned_row_fails_alone(execution: Execution, failure: str) -> None:
    """Of eight requests in one batch seven get their answers and one its error."""
    seen = Seen()
    pipeline = pipeline_of(Model(), seen, execution=execution)
    values = [10.0, 11.0, 12.0, Model.FAILURES[failure], 14.0, 15.0, 16.0, 17.0]
    answers = await outcomes(*(ask(pipeline, row(one)) for one in values))
    error = answers.pop(3)
    assert isinstance(error, ServiceError)
    assert error.code == ("model_error" if failure == "raises" else "non_finite_output")
    assert isinstance(error.__cause__, RuntimeError) is (failure == "raises")  # for the log
    firsts = [outputs(one)[0] for (one,) in answers]
    assert firsts == pytest.approx([0.10, 0.11, 0.12, 0.14, 0.15, 0.16, 0.17])
    assert [len(batch.answers) for batch in seen.batches] == [8]
    pipeline.batcher.close()


@settings(deadline=None)
@given(kinds=st.lists(st.sampled_from(["fine", *Model.FAILURES]), min_size=1, max_size=20))
def test_any_number_of_poisoned_rows_fail_alone(kinds: list[str]) -> None:
    """Every row of a batch gets its own answer or its own error, wherever the bad ones stand."""
    pipeline = pipeline_of(Model(), execution="batch")

    @on_a_loop
    async def scenario() -> None:
        rows = [row(Model.FAILURES.get(kind, index)) for index, kind in enumerate(kinds)]
        answers = await outcomes(*(ask(pipeline, one) for one in rows))
        for index, (kind, answer) in enumerate(zip(kinds, answers, strict=True)):
            if kind == "fine":
                assert outputs(answer[0])[0] == pytest.approx(index / 100)
            else:
                assert answer.code == ("model_error" if kind == "raises" else "non_finite_output")

    scenario()


@pytest.mark.parametrize("execution", EXECUTIONS)
@on_a_loop
async def test_one_request_with_a_poisoned_row_fails_as_one(execution: Execution) -> None:
    """Instances sent together are answered together or not at all; others in the same call are answered."""
    pipeline = pipeline_of(Model(), execution=execution)
    poisoned = row(Model.FAILURES["raises"])
    mixed, (fine,) = await outcomes(ask(pipeline, row(1), poisoned), ask(pipeline, row(3)))
    assert mixed.code == "model_error"
    assert outputs(fine)[0] == pytest.approx(0.03)
    assert asdict(fine).get("label", "one") == "one"
    pipeline.batcher.close()


class Odd:
    """A runtime that gives back other rows, or other columns, than it was asked for."""

    dtype: Any = np.float32

    def __init__(self, rows: int = 0, columns: int = WIDTH) -> None:
        self._rows, self._columns = rows, columns

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """See `Runtime`; one row alone is answered well, as at warm-up."""
        rows = len(matrix) + self._rows if len(matrix) > 1 else 1
        return [[float(value) / 100] * self._columns for value in matrix[:rows, 0].tolist()]


class Broken:
    """A runtime that answers nothing."""

    dtype: Any = np.float32

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """See `Runtime`."""
        raise RuntimeError(len(matrix))


class Tied:
    """A runtime that finds the first two labels equally probable."""

    dtype: Any = np.object_

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """See `Runtime`."""
        return [[0.5, 0.5, *[0.0] * (len(LABELS) - 2)]] * len(matrix)


def relabelled(artifact: Artifact, **changes: Any) -> Artifact:
    """The artifact with other words in the first line of its golden set."""
    first, *rest = artifact.files["golden.jsonl"].splitlines()
    line = json.dumps(json.loads(first) | changes).encode()
    return Artifact(artifact.manifest, artifact.files | {"golden.jsonl": b"\n".join([line, *rest])})


@pytest.mark.skipif(not LABELS, reason="a regressor has no labels")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_replay_compares_labels_too(version: str) -> None:
    """In every runtime: the same probabilities with another label are another answer."""
    artifact = read_artifact(ARTIFACTS, version)
    runtime = load_runtime(artifact)
    PipelineModel(artifact, runtime, Policy()).replay()
    recorded = json.loads(artifact.files["golden.jsonl"].splitlines()[0])["label"]
    for other in [one for one in LABELS if one != recorded]:
        with pytest.raises(ArtifactError, match="line 1 has another answer"):
            PipelineModel(relabelled(artifact, label=other), runtime, Policy()).replay()


@pytest.mark.skipif(not LABELS, reason="a regressor has no labels")
def test_a_label_that_rounding_decides_may_be_the_other_one() -> None:
    """Of two labels with the same probability either is taken, and no third one."""
    outputs = V1.manifest.outputs.model_copy(update={"threshold": None})
    manifest = V1.manifest.model_copy(update={"outputs": outputs})
    first = V1.files["golden.jsonl"].splitlines()[0]
    tied = Artifact(manifest, V1.files | {"golden.jsonl": first})
    probabilities = dict.fromkeys(map(label_key, LABELS), 0.0)
    probabilities |= dict.fromkeys(map(label_key, LABELS[:2]), 0.5)
    for label in LABELS:
        changed = relabelled(tied, label=label, probabilities=probabilities)
        model = PipelineModel(changed, Tied(), Policy())
        with nullcontext() if label in LABELS[:2] else pytest.raises(ArtifactError):
            model.replay()


class Dates:
    """A runtime that fails on a text that is no date, and on every row once it is broken."""

    dtype: Any = np.object_
    broken = False

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """See `Runtime`."""
        if self.broken:
            raise RuntimeError("of no row")
        return [[date.fromisoformat(text).month / 12, 0.0, 0.0][:WIDTH] for text in matrix[:, 4]]


@on_a_loop
async def test_a_text_that_the_model_cannot_read_is_the_clients_mistake() -> None:
    """The error names the column; a model that fails on its own example as well is what is broken."""
    columns = [*COLUMNS, Input(name="when", dtype="string", example="2012-01-31")]
    kind: Any = create_model("Dated", __base__=ROW, when=(str, ...))
    runtime = Dates()
    pipeline = pipeline_of(runtime, manifest=OWN.model_copy(update={"inputs": columns}), execution="batch")
    numbers = dict.fromkeys(RANGES, 2.0)
    rows = [kind(**numbers, when=when) for when in ("2012-03-31", "yesterday", "2013-06-01")]
    first, wrong, last = await outcomes(*(ask(pipeline, one) for one in rows))
    assert [outputs(one[0])[0] for one in (first, last)] == [3 / 12, 6 / 12]
    assert (wrong.code, wrong.errors[0]["loc"], len(wrong.errors)) == (
        "invalid_input",
        ["body", "instances", 0, "when"],
        1,
    )
    runtime.broken = True
    (broken,) = await outcomes(ask(pipeline, rows[0]))
    assert broken.code == "model_error"


@on_a_loop
async def test_a_model_that_loses_rows_never_makes_answers_cross() -> None:
    """Where a call gives back fewer rows than it got, nobody is given somebody else's answer."""
    pipeline = pipeline_of(Odd(rows=-1), execution="batch")
    answers = await outcomes(*(ask(pipeline, row(n)) for n in range(8)))
    for n, answer in enumerate(answers):
        if not isinstance(answer, ServiceError):
            assert outputs(answer[0])[0] == pytest.approx(n / 100)


@pytest.mark.parametrize("runtime", [Broken(), Odd(columns=2), Odd(columns=4)], ids=["raises", "two", "four"])
def test_a_model_that_cannot_answer_its_own_example_is_not_served(runtime: Runtime) -> None:
    """Warm-up asks what the manifest gives as the example; a model that fails there stops the start."""
    with pytest.raises(ArtifactError, match="v1"):
        pipeline_of(runtime)


@pytest.mark.parametrize(
    ("per_call", "per_row", "execution"),
    [(20e-6, 1e-6, "batch"), (20e-6, 18e-6, "inline"), (900e-6, 800e-6, "thread"), (5e-3, 1e-4, "thread")],
    ids=["fast and vectorised", "fast row by row", "slow rows", "slow calls"],
)
def test_how_it_runs_follows_from_what_the_model_costs(
    per_call: float, per_row: float, execution: Execution
) -> None:
    """A quick model pays for no thread, nor for batching it gains nothing from; a slow one gets a thread."""
    assert choose_execution(Costs(per_call, per_row), 64) == execution


@pytest.mark.parametrize(
    ("policy", "value", "action", "counted"),
    [
        ("accept", 4.2, "accept", {"first": 1}),
        ("review", 4.2, "review", {"first": 1}),
        ("review", 4.3, "accept", {}),  # the edges themselves, although float32 has no 4.3
        ("review", 7.9, "accept", {}),
        ("review", 8.0, "review", {"first": 1}),
    ],
)
@on_a_loop
async def test_values_not_seen_in_training(
    policy: Literal["accept", "review"], value: float, action: str, counted: dict[str, int]
) -> None:
    """A value beyond the training range's edges is counted by feature, and reviewed if so configured."""
    seen = Seen()
    pipeline = pipeline_of(Model(), seen, out_of_range=policy, review_threshold=0.0, execution="inline")
    (answer,) = await ask(pipeline, row(value, 3))
    assert (answer.action, seen.batches[-1].out_of_range) == (action, counted)


@on_a_loop
async def test_values_not_seen_in_training_can_be_rejected() -> None:
    """`reject` answers 422 and names every such value by instance and feature, before the model is asked."""
    seen = Seen()
    pipeline = pipeline_of(Model(), seen, out_of_range="reject")
    odd = row(4.2, 3)
    with pytest.raises(ServiceError, match="invalid_input") as batch:
        await ask(pipeline, row(5, 3), odd)
    assert [one["loc"] for one in batch.value.errors] == [["body", "instances", 1, "first"]]
    with pytest.raises(ServiceError, match="invalid_input") as single:
        await pipeline.predict([odd], [""], soon(), single=True)
    assert [one["loc"] for one in single.value.errors] == [["body", "first"]]
    assert seen.batches == []


@pytest.mark.skipif(not LABELS, reason="a regressor has no score")
@pytest.mark.parametrize(("threshold", "action"), [(None, "review"), (0.5, "accept"), (0.51, "review")])
@on_a_loop
async def test_a_score_below_the_threshold_is_reviewed(threshold: float | None, action: str) -> None:
    """The manifest's threshold holds (0.6 here) unless the operator sets one; a score at it is accepted."""
    pipeline = pipeline_of(Working(), review_threshold=threshold, out_of_range="accept", execution="inline")
    (answer,) = await ask(pipeline, row(5))
    assert (outputs(answer)[0], answer.action) == (0.5, action)


@pytest.mark.skipif(not LABELS, reason="a regressor has no score")
@on_a_loop
async def test_a_probability_is_never_beyond_0_or_1() -> None:
    """Sums in float32 end a hair above 1 or below 0, as a forest's do; clients get 1 and 0."""
    (answer,) = await ask(pipeline_of(Model(), execution="inline"), row(100.0000305, -0.00001))
    assert outputs(answer)[:2] == [1.0, 0.0]
    assert asdict(answer)["score"] == 1.0


@pytest.mark.parametrize("version", VERSIONS)
@on_a_loop
async def test_no_numpy_type_leaves_the_pipeline(version: str) -> None:
    """Every field of an answer is of Python's own types, and the whole of it is JSON."""
    artifact = read_artifact(ARTIFACTS, version)
    pipeline = Pipeline.load(artifact, seen := Seen(), Policy(execution="inline"))
    instances = [Features.model_validate(row["features"]) for row in golden_set(version)]
    far = {NUMBER: number(2)} if NUMBER else {}
    for answer in await ask(pipeline, *instances, Features.model_validate({**EXAMPLE, **far})):
        types = {type(getattr(answer, field.name)) for field in fields(answer)}
        assert types == {str, float} | ({dict, *map(type, LABELS)} if LABELS else set())
        assert {type(value) for value in outputs(answer)} == {float}
        assert json.loads(json.dumps(asdict(answer))) == asdict(answer)
    assert {type(count) for count in seen.batches[-1].out_of_range.values()} <= {int}
    assert all(type(cost) is float for cost in pipeline.costs)


class Missing:
    """A runtime that says which rows have a missing value."""

    dtype: Any = np.float32

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """See `Runtime`."""
        return [
            ([1.0, 0.0, 0.0] if any(map(math.isnan, row)) else [0.0, 1.0, 0.0])[:WIDTH]
            for row in matrix.tolist()
        ]


@on_a_loop
async def test_null_reaches_the_model_as_missing() -> None:
    """A nullable feature's null is a NaN to the model, and no value outside the training range."""
    inputs = [entry.model_copy(update={"nullable": True}) for entry in COLUMNS]
    manifest = OWN.model_copy(update={"inputs": inputs})
    optional: Any = {entry.name: (float | None, ...) for entry in inputs}
    model = create_model("Nullable", **optional)
    seen = Seen()
    pipeline = pipeline_of(Missing(), seen, manifest=manifest)
    values = {entry.name: entry.example for entry in inputs}
    answers = await ask(pipeline, model(**values), model(**values | {"fourth": None}))
    assert [outputs(answer)[0] for answer in answers] == [0.0, 1.0]
    assert seen.batches[-1].out_of_range == {}


def test_one_too_many_is_refused_at_once() -> None:
    """With a bound so many may be inside; the next is told to come back, and every way out frees a place."""
    admission = Admission(10, 2)
    for _ in range(2):
        admission.enter(0.0, 100)
    for refuse in (admission.check, lambda wait: admission.enter(wait, 100)):
        with pytest.raises(ServiceError, match="overloaded") as refused:
            refuse(0.0)
        assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "1")
    assert admission.inside == 2
    for _ in range(2):
        admission.leave(100)
    assert (admission.inside, admission.bytes) == (0, 0)
    admission.check(0.0)


def test_work_that_goes_on_without_a_client_keeps_its_place() -> None:
    """A request that was answered while its rows still run counts until they have."""
    running = [None]
    admission = Admission(10, 2, lambda: len(running))
    admission.enter(0.0, 0)
    with pytest.raises(ServiceError, match="overloaded"):
        admission.check(0.0)
    running.clear()
    admission.enter(0.0, 0)


@given(deadline=st.floats(0.001, 600), wait=st.floats(0, 1000), inside=st.integers(0, 5000))
def test_time_decides_and_not_a_number(deadline: float, wait: float, inside: int) -> None:
    """Without a bound a request is refused if, and only if, it would wait beyond half of the deadline."""
    admission = Admission(deadline)
    for _ in range(inside):
        admission.enter(0.0, 50)
    if wait <= deadline / 2:
        admission.check(wait)
        return
    with pytest.raises(ServiceError, match="overloaded") as refused:
        admission.check(wait)
    assert int(refused.value.headers["retry-after"]) >= wait  # by then those before it have been answered


@given(sizes=st.lists(st.integers(0, 2_000_000), max_size=200))
def test_what_waits_is_bounded_in_bytes(sizes: list[int]) -> None:
    """However large bodies are, those inside hold at most the bound and one more; small ones find room."""
    admission, inside = Admission(10), []
    for size in sizes:
        with suppress(ServiceError):
            admission.enter(0.0, size)
            inside.append(size)
    largest = REQUEST_BYTES + BODY_FACTOR * max(sizes, default=0)
    assert admission.bytes <= MAX_BYTES + largest
    assert len(inside) == len(sizes) or admission.bytes > MAX_BYTES
    for size in inside:
        admission.leave(size)
    assert (admission.inside, admission.bytes) == (0, 0)


def test_calls_at_rest_say_how_fast_full_ones_are() -> None:
    """A model that takes 20 ms for one row and 26 ms for 64 answers 2,400 rows a second, however idle."""
    pace = pace_of(Costs(0.02, 0.026 / 64), 64, 0.0)
    for _ in range(50):
        pace.learn(0.02, 1, 1)
    assert pace.seconds(64) == pytest.approx(0.026, rel=0.01)


def test_the_pace_follows_the_model() -> None:
    """Slowed by neighbours, calls are expected to take longer until that is over; one call changes little."""
    pace = pace_of(Costs(0.02, 0.02), 64, 0.0)
    for _ in range(50):
        pace.learn(0.16, 4, 4)
    assert pace.seconds(1) == pytest.approx(0.04, rel=0.05)
    for _ in range(50):
        pace.learn(0.01, 1, 1)
    assert pace.seconds(1) == pytest.approx(0.01, rel=0.1)
    pace.learn(0.05, 1, 1)
    assert pace.seconds(1) < 0.02


@given(fixed=st.floats(0, 10), each=st.floats(0, 10), rows=st.integers(1, 1000))
def test_a_cost_of_any_kind_makes_a_pace(fixed: float, each: float, rows: int) -> None:
    """Whatever warm-up measured, calls of one row and full ones are expected to take what they took."""
    pace = pace_of(Costs(fixed + each, (fixed + each * rows) / rows), rows, 0.0)
    assert pace.seconds(rows) >= pace.seconds(1) > 0
    assert pace.seconds(rows) == pytest.approx(fixed + each * rows, rel=1e-3, abs=1e-5)


@on_a_loop
async def test_the_wait_is_that_of_the_rows_before(run: Mirror) -> None:
    """The queue's rows count while their callers are there, the present call once it is late."""
    batcher = Batcher(run, Seen(), max_rows=10, max_wait_seconds=0.0, threaded=True, pace=Pace(0.0, 1.0))
    assert batcher.wait == 0
    held = await run.hold(batcher, ("first",), soon())
    assert batcher.wait == 0
    waiting = [asyncio.create_task(batcher.submit([(at,), (at,)], soon())) for at in range(5)]
    await asyncio.sleep(0)
    assert batcher.wait == 10
    waiting[1].cancel()
    waiting[2].cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert batcher.wait == 6
    run.let.set()
    await outcomes(held, *waiting)
    assert batcher.wait == 0


@on_a_loop
async def test_a_model_that_hangs_is_noticed_before_its_call_ends(run: Mirror) -> None:
    """The longer a call is late, the longer a request has to wait; nothing of it stays when it ends."""
    batcher = Batcher(run, Seen(), max_rows=10, max_wait_seconds=0.0, threaded=True, pace=Pace(0.0, 1e-6))
    held = await run.hold(batcher, ("hangs",), soon())
    while batcher.wait < 0.05:  # no event tells
        await asyncio.sleep(0.001)
    run.let.set()
    await held
    assert batcher.wait == 0


@BOTH
@on_a_loop
async def test_nobody_is_counted_twice(run: Mirror, threaded: bool) -> None:
    """However requests end (answered, late, given up, failed), no row of theirs is waited for afterwards."""
    batcher = batcher_of(run, Seen(), max_rows=3, threaded=threaded)
    rows: list[list[Row]] = [[(at,)] * (at % 5 + 1) for at in range(30)] + [[("raise",)]]
    tasks = [
        asyncio.create_task(batcher.submit(one, soon(0 if at % 7 == 3 else PATIENCE_SECONDS)))
        for at, one in enumerate(rows)
    ]
    await asyncio.sleep(0)
    for task in tasks[::4]:
        task.cancel()
    await outcomes(*tasks)
    assert (batcher.wait, batcher.waiting) == (0, 0)


def test_calls_are_as_long_as_pays() -> None:
    """Rows of a slow model are joined for 50 ms at most: more saves nothing, and keeps others waiting."""
    assert rows_of_a_call(0.02, 64) == 2
    assert rows_of_a_call(0.2, 64) == 1
    assert rows_of_a_call(1e-5, 64) == 64
