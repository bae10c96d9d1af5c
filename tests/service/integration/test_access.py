"""Who may call, how often, and from where: decided from the headers alone."""

import json
import re
import signal
import socket
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
import pytest

from app.api.security import FAILURES, MAX_CLIENTS, Guard, Limit, Windows
from app.settings import Settings
from tests.service.conftest import EXAMPLE, PATIENCE_SECONDS, Service, until
from tests.service.integration.test_http import assert_problem

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


def test_a_key_is_replaced_without_a_restart(start: Start, tmp_path: Path) -> None:
    """With the keys in `.env`, SIGHUP takes a change over: the new key opens, the old one no longer does."""
    first, second = (f"APP_API_KEYS={digest}" for digest in DIGESTS.split(","))
    old, new = ({"x-api-key": key} for key in KEYS)
    (tmp_path / ".env").write_text(first)
    service = start(workers=1)
    assert [service.predict(headers=one).status_code for one in (old, new)] == [200, 401]
    (tmp_path / ".env").write_text(second)
    service.process.send_signal(signal.SIGHUP)
    until(lambda: service.predict(headers=old).status_code == 401, "the old key to be of no use")
    assert service.predict(headers=new).status_code == 200


def test_no_key_and_a_wrong_one_are_401(guarded: Service) -> None:
    """Both say with WWW-Authenticate what would be accepted; only a key that was sent is `invalid_token`."""
    wrong = [{"x-api-key": KEYS[0] + "x"}, {"x-api-key": ""}, {"authorization": "Basic Zmlyc3Qga2V5"}]
    wrong += [{"authorization": "Bearer nonsense"}, {"authorization": "bearer"}]
    for path in ("/v1/predict", "/v1/predict/batch"):
        for headers, shown in zip(({}, *wrong), (False, True, False, False, True, False), strict=True):
            answer = guarded.client.post(path, content=b"{", headers=headers)
            assert_problem(answer, 401, "unauthorized")
            challenge = answer.headers["www-authenticate"]
            assert challenge.startswith("Bearer ")
            assert ('error="invalid_token"' in challenge) is shown


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


def test_the_decision_comes_before_the_body(guarded: Service) -> None:
    """Who waits for `100 Continue` gets the refusal instead, and so does who has sent half a body."""
    address = httpx2.URL(guarded.url)
    for key, status in (("", 401), ("X-API-Key: wrong\r\n", 401)):
        head = f"POST /v1/predict HTTP/1.1\r\nHost: here\r\n{key}Content-Length: 1000000\r\n"
        for rest in ("Expect: 100-continue\r\n\r\n", '\r\n{"a feature": '):
            with socket.create_connection((address.host, address.port), PATIENCE_SECONDS) as connection:
                connection.sendall((head + rest).encode())
                assert connection.recv(1024).startswith(f"HTTP/1.1 {status} ".encode())


def test_every_key_costs_the_same_comparisons() -> None:
    """Whether the first key matches, the last one or none, all of them are compared, in constant time."""
    guard = Guard(Settings(api_keys=DIGESTS, _env_file=None), Any, int)  # type: ignore[arg-type]
    compared: list[int] = []

    def count(_frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and "compare_digest" in function.__name__:
            compared[-1] += 1

    for key in (*KEYS, "wrong"):
        compared.append(0)
        sys.setprofile(count)
        guard.identify(key.encode(), b"", "192.0.2.1")
        sys.setprofile(None)
    assert compared == [len(KEYS)] * 3


def test_a_key_in_the_url_is_refused(guarded: Service) -> None:
    """Even a right one, and even beside a right header: the answer names the header, and no log the key."""
    right = {"x-api-key": KEYS[0]}
    for name in ("api_key", "X-API-Key", "apikey", "access_token", "api%5Fkey", "AUTH"):
        for headers in ({}, right):
            url = f"/v1/predict?page=1&{name}=first%20key"
            answer = guarded.client.post(url, json=EXAMPLE, headers=headers)
            assert "X-API-Key" in assert_problem(answer, 401, "unauthorized")["detail"]
            guarded.line(answer.headers["x-request-id"])
    assert "first" not in guarded.log.read_text()
    assert guarded.predict(params={"page": 1}, headers=right).status_code == 200


def test_a_word_is_no_key(guarded: Service) -> None:
    """Names that only look like those of keys are let through."""
    words = ("author", "keyword", "monkey", "max_tokens", "keys", "secretary", "authority", "tokenizer")
    for word in words:
        answer = guarded.predict(params={word: "iris"}, headers={"x-api-key": KEYS[0]})
        assert answer.status_code == 200, word


def test_a_client_has_one_name_however_its_address_is_written() -> None:
    """IPv4 over a socket of IPv6 is the same client, another one is not; IPv6 counts by its /64."""
    guard = Guard(Settings(_env_file=None), Any, int)  # type: ignore[arg-type]

    def names(*addresses: str) -> int:
        return len({guard.identify(None, b"", address)[0] for address in addresses})

    assert names("192.0.2.7", "::ffff:192.0.2.7", "::ffff:c000:207", "0:0:0:0:0:FFFF:192.0.2.7") == 1
    assert names("::ffff:192.0.2.7", "::ffff:192.0.2.8", "192.0.2.9") == 3
    assert names("2001:db8::1", "2001:db8:0:0:ffff::2", "2001:DB8::3") == 1
    assert names("2001:db8::1", "2001:db8:0:1::1", "not an address", "") == 4


def test_repeated_failures_are_throttled(start: Start) -> None:
    """An address that fails too often gets 429 with Retry-After; a right key from there is still accepted."""
    service = start(workers=1, api_keys=DIGESTS)
    wrong = {"x-api-key": "wrong"}
    statuses = [service.predict(headers=wrong).status_code for _ in range(FAILURES.amount)]
    assert set(statuses) == {401}
    answer = service.predict(headers=wrong)
    assert_problem(answer, 429, "rate_limited")
    assert 0 < int(answer.headers["retry-after"]) <= FAILURES.seconds
    assert service.predict(headers={"x-api-key": KEYS[0]}).status_code == 200
    with httpx2.Client(transport=httpx2.HTTPTransport(local_address="127.0.0.2")) as other:
        assert other.post(f"{service.url}/v1/predict", headers=wrong).status_code == 401


def test_a_million_addresses_take_bounded_memory() -> None:
    """However many clients come, a worker remembers the latest ones only."""
    windows, limit = Windows(), Limit.parse("1/day")
    assert [windows.hit(limit, str(client)) for client in range(2 * MAX_CLIENTS)] == [0.0] * 2 * MAX_CLIENTS
    assert len(windows._hits) == MAX_CLIENTS
    assert windows.hit(limit, str(2 * MAX_CLIENTS - 1)) > 0


def test_nobody_s_x_forwarded_for_is_believed_by_default(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands in it, the client is the one who connected, not even this host being trusted."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    service = start(workers=1, rate_limit="3/hour")
    chains = ["203.0.113.1", "203.0.113.2, 127.0.0.1", "203.0.113.3", "203.0.113.4"]
    statuses = [service.predict(headers={"x-forwarded-for": chain}).status_code for chain in chains]
    assert statuses == [200, 200, 200, 429]


def test_x_forwarded_for_is_believed_from_trusted_proxies(start: Start) -> None:
    """From a trusted proxy the client is the last address that is not a proxy's: what it made up is not."""
    service = start(workers=1, rate_limit="2/hour", trusted_proxies="127.0.0.0/30,10.0.0.0/8")

    def status(chain: str, via: str = "127.0.0.1") -> int:
        with httpx2.Client(transport=httpx2.HTTPTransport(local_address=via)) as client:
            headers = {"x-forwarded-for": chain}
            return client.post(f"{service.url}/v1/predict", json=EXAMPLE, headers=headers).status_code

    assert [status("203.0.113.1") for _ in range(3)] == [200, 200, 429]
    assert status("203.0.113.2") == 200
    for chain in (
        "198.51.100.1, 203.0.113.1",
        "10.9.9.9, 203.0.113.1, 10.1.2.3",
        "nonsense,203.0.113.1:4711",
    ):
        assert status(chain) == 429
    assert [status(f"203.0.113.{last}", via="127.0.0.9") for last in range(10, 13)] == [200, 200, 429]
    assert [status(f"2001:db8::{last}") for last in range(1, 4)] == [200, 200, 429]


def test_every_answer_has_the_same_safe_headers(start: Start) -> None:
    """No kind of answer is stored, sniffed, open to other origins, or tells what software gave it."""
    service = start(workers=1, api_keys=DIGESTS, max_body_bytes=500)
    own = {"x-api-key": KEYS[0], "origin": "https://evil.example"}
    asked = {**own, "access-control-request-method": "POST"}
    answers = [
        service.predict(headers=own),
        service.predict({}, headers=own),
        service.predict(content=b"{", headers=own),
        service.predict(content=b" " * 501, headers=own),
        service.predict(headers={**own, "content-type": "text/plain"}),
        service.predict(headers=own | {"x-api-key": "wrong"}),
        service.predict(),
        service.client.get("/nowhere", headers=own),
        service.client.get("/v1/predict", headers=own),
        service.client.options("/v1/predict", headers=asked),
        *(service.client.get(path, headers=own) for path in ("/health", "/ready", "/version", "/metrics")),
        *(service.client.get(path, headers=own) for path in ("/docs", "/openapi.json")),
    ]
    assert {answer.status_code for answer in answers} == {200, 400, 401, 404, 405, 413, 415, 422}
    for answer in answers:
        assert answer.headers.get_list("cache-control") == ["no-store"]
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
        assert "server" not in answer.headers
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    address = httpx2.URL(service.url)
    with socket.create_connection((address.host, address.port), PATIENCE_SECONDS) as connection:
        connection.sendall(b"BREW / coffee\r\n\r\n")
        broken = connection.recv(4096).lower()
    assert broken.startswith(b"http/1.1 400 ")
    assert b"cache-control: no-store" in broken
    assert b"x-content-type-options: nosniff" in broken
    assert b"\r\nserver:" not in broken


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
    answer = service.client.post("/v1/predict/batch", json={"instances": [EXAMPLE]}, headers=first)
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
    """CORS is answered for APP_CORS_ORIGINS only, on answers and errors; a preflight has a request id too."""
    service = start(workers=1, cors_origins="https://shop.example,https://desk.example")
    ours, other = {"origin": "https://desk.example"}, {"origin": "https://evil.example"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    preflight = service.client.options("/v1/predict", headers=ours | asked)
    assert preflight.status_code == 200
    for answer in (preflight, service.predict(headers=ours), service.predict({}, headers=ours)):
        assert answer.headers["access-control-allow-origin"] == ours["origin"]
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    traced = asked | {"access-control-request-headers": "content-type,traceparent, tracestate,baggage"}
    assert service.client.options("/v1/predict", headers=ours | traced).status_code == 200
    for given, kept in (("shop-1", True), ("not well formed", False)):
        marked = service.client.options("/v1/predict", headers=other | asked | {"x-request-id": given})
        assert (marked.headers["x-request-id"] == given) is kept
    assert "access-control-allow-origin" not in service.predict(headers=other).headers


def test_browsers_may_send_the_headers_named(start: Start) -> None:
    """APP_CORS_HEADERS adds to what pages may send; anything else is refused, with a request id."""
    service = start(workers=1, cors_origins="https://shop.example", cors_headers="X-Shop, x-desk_2")
    asked = {"origin": "https://shop.example", "access-control-request-method": "POST"}
    for names, status in (("x-shop,X-DESK_2,traceparent,b3", 200), ("x-other", 400), ("cookie", 400)):
        answer = service.client.options(
            "/v1/predict", headers=asked | {"access-control-request-headers": names}
        )
        assert answer.status_code == status
        assert answer.headers["x-request-id"]
