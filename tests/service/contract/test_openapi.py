"""What the service says of itself: valid, as committed, kind to old clients, and true."""

import json
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate

from tests.service.conftest import INPUTS, LABELS, Service, moderate_numbers
from tests.service.contract.compatibility import breaks
from tests.service.where import ROOT

UPDATE = "to accept it: make contract"


@pytest.fixture(scope="module")
def live(service: Service) -> dict[str, Any]:
    """The document that is served."""
    document: dict[str, Any] = service.client.get("/openapi.json").json()
    return document


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    """The document that clients were written for."""
    document: dict[str, Any] = json.loads((ROOT / "openapi.json").read_text("utf-8"))
    return document


def test_the_document_is_valid(live: dict[str, Any]) -> None:
    """Any OpenAPI tool can read /openapi.json."""
    validate(live)


def test_old_clients_keep_working(committed: dict[str, Any], live: dict[str, Any]) -> None:
    """Nothing that the committed openapi.json promises was taken away."""
    broken = breaks(committed, live)
    assert not broken, "\n".join(["clients would break:", *broken])


def test_the_document_is_the_committed_one(committed: dict[str, Any], live: dict[str, Any]) -> None:
    """A change of the API shows in the diff of openapi.json."""
    assert live == committed, f"the API is not what openapi.json says; {UPDATE}"


def test_every_call_documents_the_errors_it_can_give(live: dict[str, Any]) -> None:
    """A client's author can read every error of a prediction, and that it is a problem document."""
    for path in ("/v1/predict", "/v1/predict/batch"):
        answers = live["paths"][path]["post"]["responses"]
        assert answers.keys() == {"200", "400", "401", "413", "415", "422", "429", "500", "503"}
        assert all(
            "application/problem+json" in one["content"] for code, one in answers.items() if code != "200"
        )
    assert "application/problem+json" in live["paths"]["/ready"]["get"]["responses"]["503"]["content"]


def test_the_document_teaches(live: dict[str, Any]) -> None:
    """It has examples that predict, units, bounds, and a sentence on what the score means."""
    schemas = live["components"]["schemas"]
    assert schemas["Features"]["examples"]
    for name, one in schemas["Features"]["properties"].items():
        said = {key for part in (one, *one.get("anyOf", [])) for key in part}
        keys = ("description", "unit", "minimum", "maximum")
        assert {key for key in keys if INPUTS[name][key] not in (None, "")} <= said, name
    answer = schemas["Prediction"]["properties"]
    assert "probability" in answer["score"]["description"] if LABELS else answer["value"]["description"]


def test_the_examples_are_accepted(live: dict[str, Any], service: Service) -> None:
    """Whoever copies an example from the documentation gets a prediction."""
    for example in live["components"]["schemas"]["Features"]["examples"]:
        assert service.predict(example).status_code == 200


def test_generated_requests_find_no_fault(start: Callable[..., Service], tmp_path: Path) -> None:
    """Hundreds of generated requests, valid and not, get answers as documented, and no 5xx."""
    service = start(api_keys=sha256(b"a key").hexdigest())
    before = service.metrics()  # the fixture asked /ready until it was: those 503 are right
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json",
         "--header", "X-API-Key: a key", "--checks", "all", "--max-examples", "100", "--seed", "1",
         "--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-color"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=moderate_numbers(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {
        name: count - before.get(name, 0)
        for name, count in service.metrics().items()
        if name.startswith("http_requests_total")
    }
    assert sum(counts.values()) >= 300
    assert not [name for name, count in counts.items() if count and 'status="5' in name]
