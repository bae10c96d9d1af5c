"""Every call of the contract over real HTTP, with two workers: what is asked, what comes back."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx2
import pytest

from tests.service.conftest import (
    ANSWER,
    EXAMPLE,
    FIELD,
    INPUTS,
    LABELS,
    MANIFEST,
    NUMBER,
    OTHER,
    SERVED,
    Document,
    Service,
    about,
    assert_answers,
    golden_set,
    number,
    run,
    spelled,
    without,
    wrong,
)

PROBLEM = {"type", "title", "status", "detail", "code", "request_id", "errors", "error"}
ANSWERED = ("label", "score", "probabilities") if LABELS else ("value",)
KEYS = {"prediction_id", "model_version", "action", *ANSWERED}


def assert_problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The answer is a problem document of this status and code that keeps every promise; the document."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), (
        answer.text
    )
    assert len(answer.content) <= 8192
    document: dict[str, Any] = answer.json()
    assert document.keys() == PROBLEM
    assert (document["status"], document["code"]) == (status, code)
    assert document["request_id"] == answer.headers["x-request-id"]
    assert isinstance(document["error"], str)
    assert len(document["errors"]) <= 20
    assert all(one.keys() == {"loc", "msg", "type"} for one in document["errors"])
    return document


def test_a_prediction_has_label_score_and_action(service: Service) -> None:
    """One instance in, its answer out, with an id, the version that answered, and what to do with it."""
    answer = service.predict(EXAMPLE)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    body = answer.json()
    assert body.keys() == KEYS
    assert (body["action"], body["model_version"]) == ("accept", SERVED)
    assert_answers(body)
    if LABELS:
        assert body["score"] == body["probabilities"][spelled(ANSWER)] == max(body["probabilities"].values())
        assert sum(body["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_the_order_of_the_features_does_not_matter(service: Service) -> None:
    """Features are known by name, so a shuffled object gets the same answer."""
    shuffled = dict(reversed(OTHER.items()))
    expected, got = service.predict(OTHER).json(), service.predict(shuffled).json()
    assert {**got, "prediction_id": ""} == {**expected, "prediction_id": ""}
    assert got["prediction_id"] != expected["prediction_id"]


def test_a_batch_is_answered_in_order(service: Service) -> None:
    """Each instance of a batch gets the answer it gets alone, in its place, under an id of its own."""
    instances = [EXAMPLE, OTHER] * 20
    answer = service.client.post("/v1/predict/batch", json={"instances": instances})
    body = answer.json()
    assert body.keys() == {"model_version", "predictions"}
    for features, one in zip(instances, body["predictions"], strict=True):
        assert_answers(one, features)
    assert len({one["prediction_id"] for one in body["predictions"]}) == len(instances)
    alone = service.predict(OTHER).json()
    for key in ANSWERED[1:] or ANSWERED:
        assert body["predictions"][1][key] == about(alone[key], 1e-6)


def test_an_error_in_a_batch_names_the_index(service: Service) -> None:
    """One invalid instance fails the batch, and the error says which one and which feature."""
    instances = [EXAMPLE, without(FIELD), EXAMPLE]
    answer = service.client.post("/v1/predict/batch", json={"instances": instances})
    (error,) = assert_problem(answer, 422, "invalid_input")["errors"]
    assert error["loc"][-3:] == ["instances", 1, FIELD]


def test_a_batch_has_a_limit(service: Service) -> None:
    """256 instances are taken, one more is not."""
    full = service.client.post("/v1/predict/batch", json={"instances": [EXAMPLE] * 256})
    assert len(full.json()["predictions"]) == 256
    answer = service.client.post("/v1/predict/batch", json={"instances": [EXAMPLE] * 257})
    assert assert_problem(answer, 422, "invalid_input")["errors"][0]["loc"][-1] == "instances"


def test_health_ready_and_version_say_what_is_running(service: Service) -> None:
    """The process is alive, the model is ready, and it is the one whose manifest is in artifacts/."""
    assert service.client.get("/health").json() == {"status": "ok"}
    assert service.client.get("/ready").json() == {"status": "ready", "model_version": SERVED}
    document = service.client.get("/version").json()
    model = document["model"]
    assert document["api_version"] == "v1"
    assert model["version"] == SERVED
    assert model["sha256"] in [one["sha256"] for name, one in MANIFEST["files"].items() if "model." in name]
    files = [name for name in MANIFEST["files"] if name.startswith("model.") or name == "rules.json"]
    assert model["files"] == {name: MANIFEST["files"][name]["sha256"] for name in files}
    assert model["training_data_id"] == MANIFEST["training"]["data_sha256"]
    assert model["libraries"] == MANIFEST["libraries"]


def test_the_documentation_works_offline(service: Service) -> None:
    """/docs and all that it loads come from the service itself."""
    page = service.client.get("/docs")
    assert page.status_code == 200
    assert not re.search(r"https?:|[\"']//", page.text)
    loaded = re.findall(r"""(?:src|href)=["']([^"']+)""", page.text) + re.findall(
        r"url: '([^']+)'", page.text
    )
    assert len(loaded) >= 4  # script, style, icon, openapi.json
    for address in loaded:
        asset = service.client.get(urljoin(f"{service.url}/docs", address))
        assert asset.status_code == 200, address
        assert asset.content, address


def test_head_is_answered_as_get_without_a_body(service: Service) -> None:
    """Load balancers probe with HEAD: status and headers as for GET, and no body; counted as HEAD."""
    for path in ("/health", "/ready", "/metrics", "/version", "/docs", "/openapi.json", "/v1/predict"):
        get, head = (service.client.request(method, path) for method in ("GET", "HEAD"))
        assert (head.status_code, head.content) == (get.status_code, b""), path
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.headers["x-request-id"]
    connection = service.connection()
    for method in ("HEAD", "GET", "HEAD"):  # a body after HEAD would be taken for the next answer
        connection.request(method, "/health")
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (200, method == "GET")
    connection.close()
    counted = service.metrics()
    assert counted['http_requests_total{handler="/health",method="HEAD",status="200"}'] >= 3


def test_the_service_works_behind_a_prefix(start: Callable[..., Service]) -> None:
    """Whether the proxy strips APP_ROOT_PATH or not; the OpenAPI document names it, so clients keep it."""
    service = start(workers=1, root_path="/team/iris")
    for prefix in ("", "/team/iris"):  # as the service sees the paths
        for path in ("/health", "/ready", "/version", "/metrics", "/docs", "/docs/assets/swagger-ui.css"):
            assert service.client.get(prefix + path).status_code == 200, prefix + path
        assert service.client.get(prefix + "/openapi.json").json()["servers"] == [{"url": "/team/iris"}]
        assert service.client.post(prefix + "/v1/predict", json=EXAMPLE).status_code == 200
    for path in ("/team/irises/health", "/team/iris", "/team", "/iris/health", "/team/iris/team/iris/health"):
        assert_problem(service.client.get(path), 404, "not_found")
    handlers = {key for key in service.metrics() if key.startswith("http_requests_total")}
    assert not [key for key in handlers if "iris" in key]


def test_a_prefix_may_look_like_a_part_of_the_path(start: Callable[..., Service]) -> None:
    """With /v1 for a prefix both kinds of proxies reach the prediction."""
    service = start(workers=1, root_path="/v1")
    for path in ("/v1/predict", "/v1/v1/predict"):
        assert service.client.post(path, json=EXAMPLE).status_code == 200


def test_an_unknown_path_is_a_problem_document(service: Service) -> None:
    """404 comes in the same shape as every other error, also below /v1 and beside a known path."""
    for path in ("/", "/nothing", "/v1/nothing", "/v1/predict/", "/v2/models", "/docs/assets/none.js"):
        assert_problem(service.client.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/predict", "POST"), ("PUT", "/v1/predict/batch", "POST"), ("POST", "/health", "GET"),
     ("DELETE", "/ready", "GET"), ("POST", "/metrics", "GET"), ("PROPFIND", "/version", "GET")],
)  # fmt: skip
def test_a_wrong_method_names_the_right_one(service: Service, method: str, path: str, allowed: str) -> None:
    """405 says in Allow what the path takes."""
    answer = service.client.request(method, path)
    assert_problem(answer, 405, "method_not_allowed")
    assert allowed in answer.headers["allow"]


def test_a_body_too_large_is_refused_before_it_is_read(service: Service) -> None:
    """Content-Length alone decides; not a byte of the body has been sent when 413 comes back."""
    connection = service.connection()
    connection.putrequest("POST", "/v1/predict")
    connection.putheader("Content-Length", "1048577")
    connection.endheaders()
    answer = connection.getresponse()
    document = json.loads(answer.read())
    connection.close()
    assert (answer.status, document["code"]) == (413, "body_too_large")


def test_a_body_that_grows_too_large_is_refused(service: Service) -> None:
    """A chunked body has no length to look at, so it is counted while it is read."""
    answer = service.predict(content=(b" " * 65536 for _ in range(32)))
    assert_problem(answer, 413, "body_too_large")


def test_a_body_of_the_largest_size_is_taken(service: Service) -> None:
    """Exactly 1 MiB is not too large."""
    assert service.predict(content=json.dumps(EXAMPLE).encode().ljust(1_048_576)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"},
     {"content-type": "*/*"}, {"content-type": "application/json", "content-encoding": "gzip"}],
    ids=str,
)  # fmt: skip
def test_another_media_type_is_refused(service: Service, headers: dict[str, str]) -> None:
    """What is declared to be something other than plain JSON is not guessed at."""
    assert_problem(
        service.predict(content=json.dumps(EXAMPLE).encode(), headers=headers), 415, "unsupported_media_type"
    )


@pytest.mark.parametrize("content_type", [None, "application/json; charset=utf-8", "Application/JSON"])
def test_json_is_taken_under_its_names(service: Service, content_type: str | None) -> None:
    """JSON may come with a charset, in capitals, or without a name."""
    headers = {"content-type": content_type} if content_type else {}
    assert service.predict(content=json.dumps(EXAMPLE).encode(), headers=headers).status_code == 200


def breaches() -> dict[str, tuple[Document, str | None]]:
    """For each kind of feature that the contract has, what it does not allow, and the kind of breach."""
    found: dict[str, tuple[Document, str | None]] = {
        "unknown": ({"a feature nobody knows": 1}, "extra_forbidden")
    }
    for name, one in INPUTS.items():
        kind = (one["categories"] and "category") or one["dtype"]
        other: dict[str, Any] = {"list": [EXAMPLE[name]], "object": {}}
        if one["dtype"] != "string":
            other |= {"string": "0.2", "word": "long"}
        if one["dtype"] != "bool":
            other["bool"] = True
        if one["dtype"] in ("string", "bool"):
            other["number"] = 1
        if one["dtype"] == "int64":
            other["fraction"] = 0.5
        if one["categories"]:
            other["category"] = "no such category"
        if not one["nullable"]:
            other["null"] = None
        found |= {f"{word} for {kind}": ({name: value}, None) for word, value in other.items()}
        whole = one["dtype"] == "int64"
        for limit, word, beyond in (("minimum", "greater_than_equal", -1), ("maximum", "less_than_equal", 1)):
            if one[limit] is not None:
                outside = one[limit] + beyond * (1 if whole else 0.1)
                found[f"below or above {limit} of {kind}"] = {name: int(outside) if whole else outside}, word
    return found


@pytest.mark.parametrize(("change", "kind"), breaches().values(), ids=breaches())
def test_a_breach_of_the_contract_names_the_field(
    service: Service, change: dict[str, Any], kind: str | None
) -> None:
    """Wrong type, out of bounds, unknown category or field, null: 422 that names the field."""
    (error,) = assert_problem(service.predict({**EXAMPLE, **change}), 422, "invalid_input")["errors"]
    assert error["loc"][-1] == next(iter(change))
    assert kind in (None, error["type"])


NULLABLE = [name for name, one in INPUTS.items() if one["nullable"]]


@pytest.mark.parametrize(
    "name", NULLABLE or [pytest.param("", marks=pytest.mark.skip("no feature may be null"))]
)
def test_null_is_answered_where_training_had_none(service: Service, name: str) -> None:
    """A feature with missing values in training takes null, and the golden set has the answer."""
    assert service.predict({**EXAMPLE, name: None}).status_code == 200
    rows = [row["features"] for row in golden_set(SERVED) if row["features"][name] is None]
    assert rows
    assert_answers(service.predict(rows[0]).json(), rows[0])


def test_every_missing_feature_is_named(service: Service) -> None:
    """An empty object is told all that it lacks at once, up to the twenty errors that are listed."""
    errors = assert_problem(service.predict({}), 422, "invalid_input")["errors"]
    assert [error["loc"][-1] for error in errors] == [*INPUTS][:20]
    assert {error["type"] for error in errors} == {"missing"}


@pytest.mark.parametrize("request_id", ["a", "order-66.b_C", "x" * 128])
def test_a_well_formed_request_id_is_kept(service: Service, request_id: str) -> None:
    """The caller's id comes back, on answers and on errors."""
    headers = {"x-request-id": request_id}
    for answer in (service.predict(headers=headers), service.client.get("/nothing", headers=headers)):
        assert answer.headers.get_list("x-request-id") == [request_id]


@pytest.mark.parametrize("request_id", ["", "x" * 129, "two words", "semi;colon", "<b>", "é"])
def test_any_other_request_id_is_replaced(service: Service, request_id: str) -> None:
    """What could not stand in a log line unharmed gives way to a fresh id."""
    answer = service.predict(headers={"x-request-id": request_id.encode()})
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", answer.headers["x-request-id"])
    assert answer.headers["x-request-id"] != request_id


def test_no_answer_tells_what_software_gave_it(service: Service) -> None:
    """There is no Server banner, whoever answers."""
    for path in ("/health", "/nothing", "/docs", "/metrics"):
        assert "server" not in service.client.get(path).headers
    assert "server" not in service.predict().headers


def test_a_retry_is_recognised_by_its_key(service: Service) -> None:
    """With Idempotency-Key the prediction's id depends on key and body alone, whichever worker answers."""

    def identified(key: str, features: Document) -> str:
        # A connection each, so that both workers get their share.
        headers = {"idempotency-key": key}
        answer: str = httpx2.post(f"{service.url}/v1/predict", json=features, headers=headers).json()[
            "prediction_id"
        ]
        return answer

    assert len({identified("one", EXAMPLE) for _ in range(8)}) == 1
    assert len({identified("one", EXAMPLE), identified("one", OTHER), identified("two", EXAMPLE)}) == 3


def test_the_golden_path_gives_the_same_answer(service: Service, tmp_path: Path) -> None:
    """`python -m app predict` answers as the server does, one instance or many, without a server."""
    (tmp_path / "one.json").write_text(json.dumps(OTHER))
    many = json.dumps(
        {"instances": [EXAMPLE, OTHER, {**EXAMPLE, **({NUMBER: number(9)} if NUMBER else {})}]}
    ).encode()
    one = run(tmp_path, "app", "predict", "one.json")
    several = run(tmp_path, "app", "predict", stdin=many)
    batch = service.client.post("/v1/predict/batch", content=many).json()
    answers = [service.predict(OTHER).json(), *batch["predictions"]]
    lines = [json.loads(line) for line in (one.stdout + several.stdout).splitlines()]
    for line, answer in zip(lines, answers, strict=True):
        assert {**line, "prediction_id": ""} == {**answer, "prediction_id": ""}


def test_the_golden_path_refuses_what_the_server_refuses(tmp_path: Path) -> None:
    """Invalid input ends the command with an error that names the field, and nothing on standard output."""
    done = run(tmp_path, "app", "predict", stdin=json.dumps({FIELD: wrong()}).encode())
    assert (done.returncode, done.stdout) == (1, "")
    assert FIELD in done.stderr
    assert "Traceback" not in done.stderr
