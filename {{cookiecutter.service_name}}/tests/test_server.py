"""The running service answers as docs/contract.md says: examples, errors, operations, feedback, logs."""

import json
import re
from typing import Any

import httpx2
import pytest

from tests.conftest import EXAMPLE, INPUTS, LABELS, SERVED, Document, Service, read, recorded

PROBLEM = {"type", "title", "status", "detail", "code", "request_id", "errors", "error"}
JSON = {"content-type": "application/json"}
BODY = json.dumps(EXAMPLE).encode()

# Mistake of a client -> request, status, code.
MISTAKES: dict[str, tuple[Document, int, str]] = {
    "truncated JSON": ({"content": BODY[:-1], "headers": JSON}, 400, "invalid_json"),
    "NaN": ({"content": b'{"x": NaN}', "headers": JSON}, 400, "invalid_json"),
    "an unknown path": ({"url": "/v1/nothing", "content": BODY}, 404, "not_found"),
    "a wrong method": ({"method": "PUT", "content": BODY}, 405, "method_not_allowed"),
    "a large body": ({"content": b" " * 2**21, "headers": JSON}, 413, "body_too_large"),
    "a form": ({"data": {"x": "1"}}, 415, "unsupported_media_type"),
    "no features": ({"json": {}}, 422, "invalid_input"),
    "an unknown feature": ({"json": EXAMPLE | {"unheard of": 1}}, 422, "invalid_input"),
    "a list for a feature": ({"json": EXAMPLE | {next(iter(INPUTS)): [1]}}, 422, "invalid_input"),
    "an empty batch": ({"url": "/v1/predict/batch", "json": {"instances": []}}, 422, "invalid_input"),
    "feedback without a label": ({"url": "/v1/feedback", "json": {}}, 422, "invalid_input"),
    "feedback for an unknown prediction": (
        {"url": "/v1/feedback", "json": {"prediction_id": "0" * 32, "label": (LABELS or [1.0])[0]}},
        404,
        "not_found",
    ),
}


@pytest.mark.parametrize("page", ["README.md", "docs/contract.md"])
def test_the_documented_example_is_true(page: str, service: Service) -> None:
    """The request in the document, sent unchanged, gets the answer below it."""
    body = re.search(r"-d '(\{[^\n]*\})'\n```\n```json", read(page))
    sent = json.loads(body[1].replace("'\"'\"'", "'") if body else read("docs/example.json"))
    block = re.search(r"```json\n(.*?)```", read(page), re.DOTALL)
    assert block, f"{page} has no answer as a json block: python -m lifecycle docs writes it"
    shown, got = json.loads(block[1]), service.predict(sent).json()
    assert shown.keys() == got.keys()
    near = {
        key: pytest.approx(value, abs=1e-3, rel=1e-3)
        for key, value in recorded(shown).items()
        if key != "label"
    }
    assert recorded(got) == recorded(shown) | near, f"python -m lifecycle docs writes {page} again"


@pytest.mark.parametrize(("sent", "status", "code"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_its_documented_problem(
    sent: Document, status: int, code: str, service: Service
) -> None:
    """Each mistake is answered by a problem document with the status and code that docs/contract.md lists."""
    request: Document = {"method": "POST", "url": "/v1/predict"} | sent
    response = service.client.request(**request)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert problem.keys() == PROBLEM
    assert problem["request_id"] == response.headers["x-request-id"]
    assert re.search(
        rf"^\| [\d, ]*\b{status}\b[\d, ]* \| [^|]*`{code}`", read("docs/contract.md"), re.MULTILINE
    )


def test_keys_are_needed_for_predictions_only(service: Service) -> None:
    """Without a key a prediction is refused with the way to authenticate; probes and metrics answer."""
    refused = httpx2.post(f"{service.url}/v1/predict", json=EXAMPLE)
    assert refused.status_code == 401
    assert "www-authenticate" in refused.headers
    assert service.predict(headers={"x-api-key": "another"}).status_code in (401, 403)
    for path in ("/health", "/ready"):
        assert httpx2.get(f"{service.url}{path}").status_code == 200


def test_an_error_names_the_feature(service: Service) -> None:
    """A missing feature is named by its column name, in a batch with the index of its instance."""
    name = next(iter(INPUTS))
    incomplete = {key: value for key, value in EXAMPLE.items() if key != name}
    (alone,) = service.predict(incomplete).json()["errors"]
    batch = service.client.post("/v1/predict/batch", json={"instances": [EXAMPLE, incomplete]})
    (among,) = batch.json()["errors"]
    assert alone["loc"][-1] == name
    assert among["loc"][-2:] == [1, name]


def test_operations_say_what_runs(service: Service) -> None:
    """Probes and /version name the served version; /metrics counts; the documentation is there."""
    get = service.client.get
    assert get("/health").json() == {"status": "ok"}
    assert get("/ready").json() == {"status": "ready", "model_version": SERVED}
    version = get("/version").json()
    assert (version["api_version"], version["model"]["version"]) == ("v1", SERVED)
    assert service.predict().status_code == 200
    metrics = get("/metrics").text
    assert "predictions_total{" in metrics
    assert f'model_version="{SERVED}"' in metrics
    assert get("/docs").status_code == get("/openapi.json").status_code == 200


def test_feedback_counts_once(service: Service) -> None:
    """Feedback for a prediction is accepted, also when it is repeated; a different label is refused."""

    def feedback(label: Any) -> int:
        body = {"prediction_id": prediction["prediction_id"], "label": label}
        return service.client.post("/v1/feedback", json=body).status_code

    prediction = service.predict().json()
    truth = LABELS[0] if LABELS else 1.0
    other = LABELS[-1] if LABELS else 2.0
    assert [feedback(truth), feedback(truth), feedback(other)] == [202, 202, 409]


def test_a_request_is_logged_without_its_payload(service: Service) -> None:
    """Each request has one line with its ids; neither features nor rejected values are in the log."""
    marker = "a-value-that-must-not-be-logged"
    response = service.predict(headers={"x-request-id": "of-the-tests"})
    service.predict(EXAMPLE | {next(iter(INPUTS)): [marker]}, headers={"x-request-id": "invalid"})
    line = service.log_line("of-the-tests")
    assert line["event"] == "request"
    assert (line["status"], line["model_version"]) == (200, SERVED)
    assert line["prediction_id"] == response.json()["prediction_id"]
    assert not line.keys() & INPUTS.keys()
    assert service.log_line("invalid")["status"] == 422
    assert marker not in service.log.read_text("utf-8")
