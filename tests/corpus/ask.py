"""Asks an imported model through the service's own application: `python ask.py CASE`, in its folder.

asked.json -> each row alone, all in one batch, shuffled in small batches, three times over -> a line of JSON:
what went wrong (`wrong`, empty if every answer is the original's), the runtime, and rows a second
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from app.core.pipeline import Pipeline
from app.core.store import read_artifact, read_release
from app.main import create_app
from app.schemas.predict import Features

TOLERANCE = 1e-4
Answer = dict[str, Any]


def differs(found: Answer, wanted: Answer) -> bool:
    """Whether the service says something else than the original."""
    if "value" in wanted:
        return abs(found["value"] - wanted["value"]) > TOLERANCE * max(1.0, abs(wanted["value"]))
    own, expected = found["probabilities"], wanted["probabilities"]
    return (
        found["label"] != wanted["label"]
        or own.keys() != expected.keys()
        or any(abs(own[name] - expected[name]) > TOLERANCE for name in own)
    )


def shown(answer: Answer) -> str:
    """An answer in a few words."""
    return json.dumps(answer.get("value", answer.get("label"))) + f" {answer.get('probabilities', '')}"


def ask(client: Any, asked: dict[str, Any]) -> list[str]:
    """Every way in which an answer is not the original's."""
    taken = {one.alias or name for name, one in Features.model_fields.items()}
    rows = [{name: one for name, one in row.items() if name in taken} for row in asked["rows"]]
    wrong, valid = [], []
    for index, (row, wanted) in enumerate(zip(rows, asked["answers"], strict=True)):
        response = client.post("/v1/predict", json=row)
        if response.status_code == 422 and ("refused" in wanted or asked["strange"][index]):
            continue
        if response.status_code != 200:
            wrong.append(f"row {index} alone: {response.status_code} {response.text[:300]}")
        elif "refused" in wanted:
            wrong.append(f"row {index} alone: {shown(response.json())}, and the original refuses it")
        else:
            valid.append(index)
            if differs(response.json(), wanted):
                wrong.append(f"row {index} alone: {shown(response.json())}, not {shown(wanted)} {row}")
    shuffled = random.Random(0).sample(valid, len(valid))  # noqa: S311  # any order will do
    batches = [valid, *(shuffled[at : at + 7] for at in range(0, len(valid), 7)), valid[::-1] * 3]
    for batch in batches:
        response = client.post(
            "/v1/predict/batch", json={"instances": [rows[index] for index in batch[:256]]}
        )
        if response.status_code != 200:
            wrong.append(f"a batch of {len(batch)}: {response.status_code} {response.text[:300]}")
            continue
        for index, found in zip(batch, response.json()["predictions"], strict=False):
            if differs(found, wanted := asked["answers"][index]):
                wrong.append(
                    f"row {index} of {len(batch)}: {shown(found)}, not {shown(wanted)} {rows[index]}"
                )
    return wrong


def speed(row: dict[str, Any]) -> float:
    """Rows a second of processor time, of the service without HTTP, at one row a call."""
    root = Path("artifacts")
    pipeline = Pipeline.offline(read_artifact(root, read_release(root).serving))
    instance, calls = [Features.model_validate(row)], 0
    pipeline.answers(instance)
    start = time.process_time()
    while (passed := time.process_time() - start) < 0.3:
        pipeline.answers(instance)
        calls += 1
    return calls / passed


def main(case: Path) -> None:
    """Ask, and say how it went."""
    asked = json.loads((case / "asked.json").read_text("utf-8"))
    taken = {one.alias or name for name, one in Features.model_fields.items()}
    manifest = read_artifact(Path("artifacts"), read_release(Path("artifacts")).serving).manifest
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        give_up = time.monotonic() + 60
        while client.get("/ready").status_code != 200 and time.monotonic() < give_up:
            time.sleep(0.02)
        wrong = ask(client, asked)
    row = {name: one for name, one in asked["rows"][0].items() if name in taken}
    found = {"wrong": wrong, "runtime": manifest.runtime, "rows_a_second": speed(row)}
    print(json.dumps(found), file=sys.__stdout__)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main(Path(sys.argv[1]))
