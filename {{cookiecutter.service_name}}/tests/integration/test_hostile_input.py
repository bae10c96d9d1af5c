"""Input made to break a service: a short answer, and the service goes on."""

import json

import pytest

from tests.conftest import SETOSA, Service
from tests.integration.test_http import assert_problem

DEPTH = 100_000
CANARY = "c4n4ry"  # a value that no answer may repeat


def instance(petal_width: str) -> bytes:
    """A complete instance with this text as the value of one feature."""
    return json.dumps(SETOSA).replace("0.2", petal_width).encode("utf-8", "surrogatepass")


MALFORMED = {
    "empty": b"",
    "blank": b"  ",
    "truncated": json.dumps(SETOSA).encode()[:-1],
    "trailing text": json.dumps(SETOSA).encode() + b"}",
    "two documents": json.dumps(SETOSA).encode() * 2,
    "NaN": instance("NaN"),
    "Infinity": instance("Infinity"),
    "-Infinity": instance("-Infinity"),
    "leading zero": instance("00.2"),
    "hexadecimal": instance("0x1"),
    "comment": instance("0.2 /* c4n4ry */"),
    "single quotes": json.dumps(SETOSA).replace('"', "'").encode(),
    "lone surrogate, escaped": instance(r'"c4n4ry \ud800"'),
    "lone surrogate, encoded": instance('"c4n4ry \ud800"'),
    "lone surrogate in a name": b'{"\\udfff": 1}',
    "lone surrogate in a batch": b'{"instances": [{"\\ud83d": "\\ud83d"}]}',
    "not UTF-8": instance('"c4n4ry'.replace("c", "\u00e7")).decode().encode("latin-1"),
    "UTF-16": json.dumps(SETOSA).encode("utf-16"),
    "UTF-16 without mark": json.dumps(SETOSA).encode("utf-16-le"),
    "UTF-32": json.dumps(SETOSA).encode("utf-32"),
    "binary": bytes(range(256)),
    "control character": instance('"c4n4ry\x00"'),
    "deep arrays": b"[" * DEPTH + b"]" * DEPTH,
    "deep arrays, unclosed": b"[" * DEPTH,
    "deep objects": b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
    "deep value": instance("[" * DEPTH + "]" * DEPTH),
    "deep unknown field": b'{"instances":[],"x":' + b"[" * DEPTH + b"]" * DEPTH + b"}",
}

OVERFLOWING = {
    "1e999": instance("1e999"),
    "-1e999": instance("-1e999"),
    "five thousand digits": instance("9" * 5000),
    "1e999 in a batch": b'{"instances": [' + instance("1e999") + b"]}",
}

INVALID = {
    "a string": instance('"c4n4ry"'),
    "a string of 80 KB": instance(f'"{CANARY * 13_000}"'),
    "a name of 80 KB": json.dumps({**SETOSA, "x" * 80_000: CANARY}).encode(),
    "80 KB of names": json.dumps({f"name{index}": CANARY for index in range(4000)}).encode(),
    "80 KB of bad instances": json.dumps({"instances": [CANARY] * 8000}).encode(),
    "names that swell in JSON": json.dumps(
        {"\x01" * 60 + str(index): CANARY for index in range(200)}
    ).encode(),
    "names of emoji": json.dumps({"\U0001f600" * 60 + str(index): CANARY for index in range(200)}).encode(),
    "a feature twice": b'{"petal_width": 1, ' + json.dumps(SETOSA).encode()[1:],
    "an array": b"[]",
    "null": b"null",
    "a number": b"1",
    "instances of the wrong kind": b'{"instances": {"0": "c4n4ry"}}',
}


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict/batch"])
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_what_is_not_json_is_400(service: Service, path: str, body: bytes) -> None:
    """Broken, misencoded or bottomless bodies get a short problem document that repeats none of them."""
    answer = service.client.post(path, content=body)
    assert_problem(answer, 400, "invalid_json")
    assert CANARY not in answer.text
    assert service.client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict/batch"])
@pytest.mark.parametrize("body", INVALID.values(), ids=INVALID)
def test_what_breaks_the_contract_is_422(service: Service, path: str, body: bytes) -> None:
    """However much is wrong, the answer is short, lists at most twenty faults and repeats no value."""
    answer = service.client.post(path, content=body)
    assert_problem(answer, 422, "invalid_input")
    assert CANARY not in answer.text
    assert service.client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict/batch"])
@pytest.mark.parametrize("body", OVERFLOWING.values(), ids=OVERFLOWING)
def test_a_number_no_float_can_hold_is_refused(service: Service, path: str, body: bytes) -> None:
    """Such a number is JSON to some and not to others; it is the client's error to all."""
    answer = service.client.post(path, content=body)
    status = 400 if answer.status_code == 400 else 422
    assert_problem(answer, status, "invalid_json" if status == 400 else "invalid_input")


def test_hostile_input_ends_no_worker(service: Service) -> None:
    """After all of it the same two workers are there, and a prediction is a prediction."""
    for body in (*MALFORMED.values(), *OVERFLOWING.values(), *INVALID.values()):
        service.client.post("/v1/predict", content=body)
    booted = [line for line in service.lines() if str(line["event"]).startswith("Booting worker")]
    assert len(booted) == 2
    assert not [line for line in service.lines() if line["level"] in ("error", "critical")]
    assert service.predict().json()["label"] == "setosa"
