"""The golden sets that come with the artifacts, and what it means to agree with them."""

import json
from pathlib import Path
from typing import Any

import pytest

ARTIFACTS = Path(__file__).resolve().parents[2] / "artifacts"
VERSIONS = sorted(path.parent.name for path in ARTIFACTS.glob("v*/golden.jsonl"))


def golden_set(version: str) -> list[dict[str, Any]]:
    """Rows with `features`, `label`, `probabilities`, `tolerance`."""
    return [json.loads(line) for line in (ARTIFACTS / version / "golden.jsonl").read_bytes().splitlines()]


def assert_golden(row: dict[str, Any], label: str, probabilities: dict[str, float]) -> None:
    """The answer is the recorded one: the same label, each probability within the row's tolerance."""
    recorded: Any = pytest.approx(row["probabilities"], abs=row["tolerance"], rel=0)
    assert (row["features"], label, probabilities) == (row["features"], row["label"], recorded)
