"""Starts what `tests.service.gameday.programs` starts; skips where the programs are missing, but not in CI.

ops/, in the template with its answers filled in -> Prometheus, Alertmanager, a receiver -> Watch
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lifecycle.command import LifecycleError
from tests.service.conftest import (
    ANSWER,
    EXAMPLE,
    FIELD,
    NUMBER,
    OTHER,
    SERVED,
    Service,
    answer_of,
    golden_set,
    number,
    wrong,
)
from tests.service.gameday import programs as real
from tests.service.gameday.programs import Watch
from tests.service.where import ROOT

SAMPLE_MS = 1000


def program(name: str) -> str:
    """Where one of the programs is."""
    try:
        return real.program(name)
    except LifecycleError as missing:
        if "CI" in os.environ:
            raise
        pytest.skip(str(missing))


def prepare(folder: Path) -> Path:
    """A copy of `ops/` in `folder` that real programs read; in the template, with its answers filled in."""
    copy = shutil.copytree(ROOT / "ops", folder / "filled")
    for path in [*copy.rglob("*.yml")]:
        text = path.read_text("utf-8")
        text = re.sub(r"\{\% (end)?raw \%\}", "", text)
        text = re.sub(r"\{\{ cookiecutter\W(\w+_url) \}\}", r"https://git.example.com/\1", text)
        path.write_text(re.sub(r"\{\{ cookiecutter\W(\w+) \}\}", r"\1", text), "utf-8")
    return copy


@dataclass
class Told(Watch):
    """A watch that keeps the messages of Alertmanager, each with the receiver's path."""

    received: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def silenced(self, **labels: str) -> bool:
        """Whether Alertmanager holds back an alert with these labels because another says more."""
        found = httpx2.get(f"{self.alertmanager}/api/v2/alerts").json()
        return any(one["status"]["inhibitedBy"] for one in found if labels.items() <= one["labels"].items())

    def told(self, status: str, **labels: str) -> list[tuple[str, dict[str, Any]]]:
        """The alerts with this status and these labels that receivers got, each with the receiver's path."""
        return [
            (path, alert)
            for path, message in self.received
            for alert in message["alerts"]
            if alert["status"] == status and labels.items() <= alert["labels"].items()
        ]


@contextmanager
def watching(folder: Path, service: str, speed: float = 60) -> Iterator[Told]:
    """Prometheus and Alertmanager, watching the service at this URL."""
    program("prometheus"), program("alertmanager")
    received: list[tuple[str, dict[str, Any]]] = []

    def tell(path: str, message: dict[str, Any]) -> None:
        received.append((path, message))

    with real.watching(folder, service, speed, SAMPLE_MS, prepare(folder), tell=tell) as watch:
        yield Told(watch.prometheus, watch.alertmanager, watch.speed, received)


def traffic(service: Service) -> None:
    """Something of everything that clients do: rows alone and together, sure and unsure, wrong, labels."""
    golden = golden_set(SERVED)
    unsure = min(golden, key=lambda row: max(row.get("probabilities", {"": 0}).values()))["features"]
    strange = {**EXAMPLE, NUMBER: number(2)} if NUMBER else OTHER
    answers = {str(answer_of(row)): row["features"] for row in golden}  # one of each
    rows = ([EXAMPLE, OTHER, *answers.values()] * 33)[:99]
    batch = service.client.post("/v1/predict/batch", json={"instances": [*rows, unsure, strange]})
    assert batch.status_code == 200, batch.text
    for features in (EXAMPLE, OTHER, unsure):
        answer = service.predict(features)
        service.client.post(
            "/v1/feedback", json={"prediction_id": answer.json()["prediction_id"], "label": ANSWER}
        )
    for _ in range(2):  # on one connection, so at one worker, which knows it again
        service.predict(headers={"idempotency-key": "sent again"})
    assert service.predict({**EXAMPLE, FIELD: wrong()}).status_code == 422
    assert service.predict(content=b"{").status_code == 400
