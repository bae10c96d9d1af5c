"""Features that the service looks up by key if the client does not send them: fields with a default.

    instances -> app/own/lookup.py, one call for all that lack a feature -> the contract -> instances, misses

A miss fails the request or, with APP_LOOKUP_ON_MISS=degrade, leaves the contract's defaults in place.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from importlib import import_module
from inspect import iscoroutinefunction
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from app.core.errors import ArtifactError, ServiceError
from app.observability.metrics import Metrics
from app.schemas.contract import KEYS
from app.schemas.predict import Features, Prediction

if TYPE_CHECKING:
    from app.observability.logging import Logger  # slow to import, and `make rollback` imports this module

Instance = dict[str, Any]
Function = Callable[[list[Instance], float], Awaitable[list[Instance | None]]]

SHARE = 0.5  # of the remaining time; the model has the rest
LOG_SECONDS = 60.0
NAMES = {name: field.alias or name for name, field in Features.model_fields.items()}
LOOKED_UP = {name for name, field in Features.model_fields.items() if not field.is_required()} - KEYS


def own_lookup(degrade: bool) -> Function | None:
    """The function in app/own/lookup.py, None until it is written; raises ArtifactError if unfit."""
    try:
        function: Function | None = getattr(import_module("app.own.lookup"), "lookup", None)
    except Exception as error:  # own code may raise anything
        words = " ".join(str(error).split())[:120]
        raise ArtifactError(f"app/own/lookup.py: {type(error).__name__}: {words}") from error
    if function is None:
        return None
    if not iscoroutinefunction(function):
        raise ArtifactError("app/own/lookup.py: write `async def lookup(instances, deadline)`")
    if not LOOKED_UP:
        raise ArtifactError("app/schemas/predict.py: give each feature that lookup.py finds a default")
    if degrade and "degraded" not in {field.name for field in fields(Prediction)}:
        needs = "needs `degraded: bool = False` as the last field of Prediction"
        raise ArtifactError(f"app/schemas/predict.py: APP_LOOKUP_ON_MISS=degrade {needs}")
    return function


class Lookup:
    """Own code that completes instances before the model sees them."""

    def __init__(self, function: Function, degrade: bool, metrics: Metrics, log: "Logger") -> None:
        self._function, self._degrade, self._metrics, self._log = function, degrade, metrics, log
        self._next_line = 0.0

    async def complete(self, instances: Sequence[Any], deadline: float) -> tuple[list[Any], dict[int, str]]:
        """Instances with all features, and per index of an instance with defaults the reason.

        `deadline` is a time of `perf_counter`. Raises ServiceError for a miss, unless set to degrade.
        """
        complete, misses, cause = list(instances), dict[int, str](), None
        lacking = [at for at, one in enumerate(instances) if LOOKED_UP - one.model_fields_set]
        if not lacking:
            return complete, misses
        began = perf_counter()
        until = began + SHARE * (deadline - began)
        try:
            async with asyncio.timeout(until - began):
                found = await self._function([_sent(instances[at]) for at in lacking], until)
            for at, instance in zip(lacking, found, strict=True):
                complete[at], misses[at] = _checked(instances[at], instance)
        except Exception as error:  # own code may raise anything
            reason, cause = "timeout" if isinstance(error, TimeoutError) else "error", error
            complete, misses = list(instances), dict.fromkeys(lacking, reason)
        self._metrics.stage.labels("lookup").observe(perf_counter() - began)
        misses = {at: reason for at, reason in misses.items() if reason}
        for reason, count in Counter(misses.values()).items():
            self._metrics.lookup_misses.labels(reason).inc(count)
            if not self._degrade:
                raise ServiceError("features_unavailable", f"features were not found: {reason}") from cause
            if perf_counter() >= self._next_line:
                self._next_line = perf_counter() + LOG_SECONDS
                self._log.error("lookup degraded", reason=reason, exc_info=cause)
        return complete, misses


def _sent(instance: BaseModel) -> Instance:
    """The values that the client sent, keys included, by column name."""
    sent = instance.model_fields_set
    return {column: getattr(instance, name) for name, column in NAMES.items() if name in sent}


def _checked(instance: Any, found: Instance | None) -> tuple[Any, str]:
    """The completed instance, and the reason if it is a miss, else an empty string."""
    try:
        completed = Features.model_validate(found) if found is not None else instance
    except ValidationError:
        return instance, "invalid"
    return completed, "missing" if LOOKED_UP - completed.model_fields_set else ""
