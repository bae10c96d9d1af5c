"""Own code beside the model: features that are looked up in a real Redis, as docs/own_code.md shows."""

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from textwrap import dedent
from time import perf_counter
from typing import Any

import pytest
from redis import Redis as Client

from app.core import lookup as lookups
from app.core.errors import ServiceError
from app.core.lookup import Lookup
from app.observability.metrics import LOOKUP_MISSES, Metrics
from app.schemas.predict import Features
from tests.service.conftest import (
    EXAMPLE,
    NUMBER,
    Service,
    assert_answers,
    number,
    refusal,
    serving,
    until,
    without,
)
from tests.service.faults.test_quotas import Redis, redis
from tests.service.where import ROOT

__all__ = ["redis"]  # a fixture
pytestmark = pytest.mark.skipif(not NUMBER, reason="no feature of this contract is a number")

# A person edits the class; here the contract may be any, so its first number gets a default from outside.
CONTRACT = """
from copy import copy
from pydantic import create_model

_name = next(name for name, one in Features.model_fields.items() if (one.alias or name) == {name!r})
_field = copy(Features.model_fields[_name])
_field.default = {default!r}
Features = create_model(
    "Features", __base__=Features, customer=(str | None, Field(default=None, exclude=True)),
    **{{_name: (_field.annotation, _field)}},
)
"""
DEGRADED = """
@dataclass(slots=True)
class Prediction(Prediction):
    degraded: bool = False
"""
Start = Callable[..., Service]


def example() -> str:
    """The code of lookup.py in the documentation."""
    text = (ROOT / "docs/own_code.md").read_text("utf-8")
    (code,) = [
        one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "async def lookup" in one
    ]
    return dedent(code)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of the service's code whose contract lets one number be looked up."""
    for name in ("app", "server"):
        shutil.copytree(ROOT / name, tmp_path / "own" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "slo.toml"):
        shutil.copy(ROOT / name, tmp_path / "own" / name)
    predict = tmp_path / "own/app/schemas/predict.py"
    predict.write_text(predict.read_text() + CONTRACT.format(name=NUMBER, default=number(0.5)))
    (tmp_path / "own/app/own/lookup.py").write_text(example())
    return tmp_path / "own"


@pytest.fixture
def begin(place: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start the copy with the look-up of the documentation and a Redis that knows `anna`."""
    address = f"redis://127.0.0.1:{redis.port}"
    monkeypatch.setenv("FEATURES_URL", address)
    with Client.from_url(address) as client:
        client.set("features:anna", json.dumps({NUMBER: EXAMPLE[NUMBER]}))
        client.set("features:odd", json.dumps({NUMBER: "text"}))
        client.set("features:none", json.dumps({}))
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(serving(place, workers=1, **settings))


def of(customer: str) -> dict[str, Any]:
    """The example of the contract with a key in place of a number."""
    return without(NUMBER) | {"customer": customer}


def misses(service: Service) -> dict[str, float]:
    """How many there were by reason."""
    counted = service.metrics()
    return {
        one: count for one in LOOKUP_MISSES if (count := counted[f'lookup_misses_total{{reason="{one}"}}'])
    }


def test_features_are_looked_up_by_key(begin: Start) -> None:
    """A key in place of a feature gets the answer to the whole instance, alone and in a batch."""
    service = begin()
    assert_answers(service.predict(of("anna")).json())
    batch = {"instances": [of("anna"), EXAMPLE, of("anna")]}
    answers = service.client.post("/v1/predict/batch", json=batch).json()["predictions"]
    for answer in answers:
        assert_answers(answer)
        assert "degraded" not in answer
    assert_answers(service.predict().json())  # everything was sent: nothing is looked up
    assert service.metrics()['inference_stage_duration_seconds_count{stage="lookup"}'] == 2
    required = service.client.get("/openapi.json").json()["components"]["schemas"]["Features"]["required"]
    assert NUMBER not in required
    assert misses(service) == {}


@pytest.mark.parametrize(("customer", "reason"), [("odd", "invalid"), ("none", "missing"), ("x", "missing")])
def test_a_miss_fails_the_request(begin: Start, customer: str, reason: str) -> None:
    """Without the feature there is no answer, but 503 with Retry-After, and the reason is counted."""
    service = begin()
    answer = service.predict(of(customer))
    assert (answer.status_code, answer.json()["code"]) == (503, "features_unavailable")
    assert answer.headers["retry-after"]
    assert misses(service) == {reason: 1}


def test_a_miss_degrades_the_answer_if_so_configured(begin: Start, place: Path, redis: Redis) -> None:
    """The contract's default stands in, a person looks, and the answer says so; Redis itself may be gone."""
    predict = place / "app/schemas/predict.py"
    predict.write_text(predict.read_text() + DEGRADED)
    service = begin(lookup_on_miss="degrade")
    batch = {"instances": [of("anna"), of("x")]}
    known, unknown = service.client.post("/v1/predict/batch", json=batch).json()["predictions"]
    assert (known["degraded"], unknown["degraded"], unknown["action"]) == (False, True, "review")
    whole = service.predict({**EXAMPLE, NUMBER: number(0.5)}).json()
    number_of = "score" if "score" in whole else "value"
    assert unknown[number_of] == pytest.approx(whole[number_of], abs=1e-6)  # alone and in a batch
    audit = until(lambda: [one for one in service.lines() if one["event"] == "audit"], "the audit line")
    assert [one["degraded"] for one in audit[0]["predictions"]] == [False, True]
    redis.end()
    gone = service.predict(of("anna")).json()
    assert (gone["degraded"], gone["action"]) == (True, "review")
    assert misses(service) == {"missing": 1, "error": 1}


@pytest.mark.parametrize(
    ("code", "settings", "line"),
    [
        ("def lookup(instances, deadline): ...", {}, "write `async def lookup(instances, deadline)`"),
        ("import nothing_of_the_kind", {}, "app/own/lookup.py: ModuleNotFoundError: No module named"),
        (
            None,
            {"lookup_on_miss": "degrade"},
            "needs `degraded: bool = False` as the last field of Prediction",
        ),
    ],
)
def test_a_look_up_that_does_not_fit_stops_the_start(
    place: Path, code: str | None, settings: dict[str, Any], line: str
) -> None:
    """One line says what to write."""
    if code:
        (place / "app/own/lookup.py").write_text(code)
    assert line in refusal(place, **settings)


def test_a_look_up_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets half of the time that is left, so that the model can still answer with the defaults."""
    monkeypatch.setattr(lookups, "LOOKED_UP", {"another"})
    metrics, log = Metrics(), pytest.importorskip("structlog").get_logger()

    async def endless(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def scenario() -> None:
        one = Features.model_validate(EXAMPLE)
        deadline = perf_counter() + 0.05
        completed, missed = await Lookup(endless, True, metrics, log).complete([one, one], deadline)
        assert (completed, missed) == ([one, one], {0: "timeout", 1: "timeout"})
        with pytest.raises(ServiceError, match="features_unavailable"):
            await Lookup(endless, False, metrics, log).complete([one], perf_counter() + 0.05)

    asyncio.run(scenario())
