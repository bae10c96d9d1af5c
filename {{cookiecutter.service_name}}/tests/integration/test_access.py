"""Who may call, how often, and from where: decided from the headers alone."""

import json
from collections.abc import Callable
from hashlib import sha256

import pytest

from tests.conftest import SETOSA, Service
from tests.integration.test_http import assert_problem

KEYS = ("first key", "second key")
DIGESTS = ",".join(sha256(key.encode()).hexdigest() for key in KEYS)
Start = Callable[..., Service]


@pytest.fixture
def guarded(start: Start) -> Service:
    """A service that takes two keys."""
    return start(api_keys=DIGESTS)


def test_a_key_opens_either_way(guarded: Service) -> None:
    """Each key is accepted as X-API-Key and as a bearer token."""
    for key in KEYS:
        assert guarded.predict(headers={"x-api-key": key}).status_code == 200
        assert guarded.predict(headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_no_key_is_401_and_a_wrong_one_403(guarded: Service) -> None:
    """Both say with WWW-Authenticate what would be accepted, on both calls, for any body."""
    wrong = {"x-api-key": KEYS[0] + "x"}, {"x-api-key": ""}, {"authorization": "Basic Zmlyc3Qga2V5"}
    expected = (403, "forbidden"), (401, "unauthorized"), (401, "unauthorized")
    for path in ("/v1/predict", "/v1/predict/batch"):
        for headers, (status, code) in zip(({}, *wrong), ((401, "unauthorized"), *expected), strict=True):
            answer = guarded.client.post(path, content=b"{", headers=headers)
            assert_problem(answer, status, code)
            assert answer.headers["www-authenticate"]


def test_a_stranger_s_body_is_not_read(guarded: Service) -> None:
    """401 comes back although not a byte of the body has been sent."""
    connection = guarded.connection()
    connection.putrequest("POST", "/v1/predict")
    connection.putheader("Content-Length", "100")
    connection.endheaders()
    answer = connection.getresponse()
    code = json.loads(answer.read())["code"]
    connection.close()
    assert (answer.status, code) == (401, "unauthorized")


def test_probes_and_metrics_need_no_key(guarded: Service) -> None:
    """An orchestrator and Prometheus hold no key."""
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert guarded.client.get(path).status_code == 200


def test_keys_are_documented_and_never_logged(guarded: Service) -> None:
    """OpenAPI names both ways to send a key; the log names the client by a hash."""
    assert guarded.client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]["security"]
    answers = [guarded.predict(headers={"x-api-key": key}) for key in KEYS]
    clients = {guarded.line(answer.headers["x-request-id"])["client"] for answer in answers}
    assert len(clients) == 2
    assert not [secret for secret in (*KEYS, *DIGESTS.split(",")) if secret in guarded.log.read_text()]


def test_a_client_s_quota_is_its_own(start: Start) -> None:
    """Past its quota a client gets 429 with Retry-After; another client and the probes notice nothing."""
    service = start(workers=1, api_keys=DIGESTS, rate_limit="3/hour")
    first, second = ({"x-api-key": key} for key in KEYS)
    assert [service.predict(headers=first).status_code for _ in range(3)] == [200] * 3
    answer = service.client.post("/v1/predict/batch", json={"instances": [SETOSA]}, headers=first)
    assert_problem(answer, 429, "rate_limited")
    assert 0 < int(answer.headers["retry-after"]) <= 3600
    assert service.predict(headers=second).status_code == 200
    assert all(service.client.get("/health").status_code == 200 for _ in range(5))
    assert service.metrics()['requests_shed_total{reason="rate_limit"}'] == 1


def test_production_hides_the_documentation(start: Start) -> None:
    """In production /docs and /openapi.json are off unless asked for, predictions as everywhere."""
    service = start(env="production", auth_disabled="true", workers=1)
    assert service.predict().status_code == 200
    for path in ("/docs", "/openapi.json", "/docs/assets/swagger-ui.css"):
        assert_problem(service.client.get(path), 404, "not_found")


def test_a_browser_may_call_from_the_origins_named(start: Start) -> None:
    """CORS is answered for APP_CORS_ORIGINS, on answers and errors, and for nobody else."""
    service = start(workers=1, cors_origins="https://shop.example,https://desk.example")
    ours, other = {"origin": "https://desk.example"}, {"origin": "https://evil.example"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    preflight = service.client.options("/v1/predict", headers=ours | asked)
    assert preflight.status_code == 200
    for answer in (preflight, service.predict(headers=ours), service.predict({}, headers=ours)):
        assert answer.headers["access-control-allow-origin"] == ours["origin"]
    assert "access-control-allow-origin" not in service.predict(headers=other).headers
