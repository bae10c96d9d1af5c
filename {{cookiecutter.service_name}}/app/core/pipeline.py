"""From validated instances to predictions, by the model of one version.

    predict(instances) -> rows -> [inline | micro-batched | micro-batched in a thread] -> Prediction each

`Pipeline.load` is for the service: it chooses one of the three by what the model costs on this machine.
`Pipeline.offline` is for everything that has no server: commands, evaluation, import.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

from pydantic import BaseModel

from app.core.batcher import Batcher, Observer, Silent
from app.core.errors import ServiceError
from app.core.model import Costs, Execution, Model, Policy, rows_of
from app.core.runtimes import Runtime, load_runtime
from app.core.store import Artifact
from app.schemas.predict import Prediction

MAX_LOOP_SECONDS = 0.002  # a call that holds the event loop longer than this goes to the thread
MAX_CALL_SECONDS = 0.05  # rows are joined up to this: longer calls save nothing and keep others waiting
MIN_BATCH_GAIN = 1.25  # batching must save this factor per row, or rows are run as they come
OFFLINE = Policy(batch_max_rows=256)


def choose_execution(costs: Costs, max_rows: int) -> Execution:
    """How to run a model that costs so much, when a full call has `max_rows`."""
    if max(costs.per_call, costs.per_row * max_rows) > MAX_LOOP_SECONDS:
        return "thread"
    return "batch" if costs.per_call > MIN_BATCH_GAIN * costs.per_row else "inline"


def rows_of_a_call(seconds_per_row: float, max_rows: int) -> int:
    """How many rows to join at most, of a model that costs so much per row of a full call."""
    return max(1, min(max_rows, int(MAX_CALL_SECONDS / max(seconds_per_row, 1e-9))))


class Pipeline:
    """A model behind one `async predict(instances)`. Made by `load` or `offline`."""

    def __init__(
        self,
        model: Model,
        policy: Policy,
        costs: Costs,
        observer: Observer,
        on_call: Callable[[float, int], None] | None = None,
    ) -> None:
        self.model, self.artifact, self.version = model, model.artifact, model.version
        self.costs, self._max_rows, self._observer = costs, policy.batch_max_rows, observer
        self.execution = policy.execution or choose_execution(costs, policy.batch_max_rows)
        self.batcher = Batcher(
            model.run,
            observer,
            max_rows=rows_of_a_call(costs.per_row, policy.batch_max_rows),
            max_wait_seconds=policy.batch_max_wait_seconds,
            threaded=self.execution == "thread",
            on_call=on_call,
        )

    @classmethod
    def load(
        cls,
        artifact: Artifact,
        observer: Observer,
        policy: Policy,
        runtime: Runtime | None = None,
        on_call: Callable[[float, int], None] | None = None,
    ) -> Self:
        """Load a verified version, warm it up and replay its golden set; raises ArtifactError.

        `observer` is told of every call of the model and `on_call` of every call in the thread, both on the
        event loop. `runtime` is loaded from the artifact unless given. Takes up to a second of the thread
        that it is called in.
        """
        model = Model(artifact, runtime or load_runtime(artifact), policy)
        costs = model.warm_up(policy.batch_max_rows)
        model.replay()
        return cls(model, policy, costs, observer, on_call)

    @classmethod
    def offline(cls, artifact: Artifact, policy: Policy = OFFLINE, runtime: Runtime | None = None) -> Self:
        """The same answers without a server; raises ArtifactError if the model fails on its own example.

        No batching, no thread, no metrics, no measuring. Ask it with `answers`; `model.replay()` compares
        with the golden set. `policy` says what is reviewed, `runtime` is loaded unless given:

            pipeline = Pipeline.offline(read_artifact(root, "v1"))
            for answer in pipeline.answers(instances): ...
        """
        model = Model(artifact, runtime or load_runtime(artifact), policy)
        model.try_example()
        return cls(model, replace(policy, execution="inline"), Costs(), Silent())

    def answers(self, instances: Sequence[BaseModel]) -> list[Prediction | ServiceError]:
        """Per instance its prediction, without an id, or the error that is its own; needs no event loop.

        Raises ServiceError for values outside the training range if the policy is to reject them.
        """
        rows = rows_of(instances)
        self.model.reject(rows, single=False)
        parts = (rows[at : at + self._max_rows] for at in range(0, len(rows), self._max_rows))
        return [answer for part in parts for answer in self.model.run(part).answers]

    async def predict(
        self, instances: Sequence[BaseModel], ids: Sequence[str], deadline: float, *, single: bool = False
    ) -> list[Prediction]:
        """One prediction per validated instance, in order; `deadline` is a time of `perf_counter`.

        Raises ServiceError; where several rows fail, the first one's.
        """
        rows = rows_of(instances)
        self.model.reject(rows, single)
        answers: list[Any]
        if self.execution == "inline" and len(rows) <= self._max_rows:
            batch = self.model.run(rows)
            self._observer.batch(batch, (0.0,))
            answers = batch.answers
        else:
            answers = await self.batcher.submit(rows, deadline)
        for answer, prediction_id in zip(answers, ids, strict=True):
            if isinstance(answer, ServiceError):
                raise answer
            answer.prediction_id = prediction_id
        return answers
