"""Starts what `lifecycle.operations.watching` starts; skips where the programs are missing, but not in CI.

ops/, in the template with its answers filled in -> Prometheus, Alertmanager, a receiver -> Watch
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer

from lifecycle.operations import watching as real
from lifecycle.operations.watching import Watch
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
from tests.service.where import ROOT

SAMPLE_MS = 1000


def program(name: str) -> str:
    """Where one of the programs is."""
    try:
        return real.program(name)
    except typer.BadParameter as missing:
        if "CI" in os.environ:
            raise
        pytest.skip(missing.message)


def prepare(folder: Path) -> Path:
    """A copy of `ops/` in `folder` that real programs read; in the template, with its answers filled in."""
    copy = shutil.copytree(ROOT / "ops", folder / "filled")
    for path in [*copy.rglob("*.yml")]:
        text = path.read_text("utf-8")
        text = re.sub(r"\{\% (end)?raw \%\}", "", text)
        text = re.sub(r"\{\{ cookiecutter\W(\w+_url) \}\}", r"https://git.example.com/\1", text)
        path.write_text(re.sub(r"\{\{ cookiecutter\W(\w+) \}\}", r"\1", text), "utf-8")
    return copy


@contextmanager
def watching(folder: Path, service: str, speed: float = 60) -> Iterator[Watch]:
    """Prometheus and Alertmanager, watching the service at this URL."""
    program("prometheus"), program("alertmanager")
    with real.watching(folder, service, speed, SAMPLE_MS, prepare(folder)) as watch:
        yield watch


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
