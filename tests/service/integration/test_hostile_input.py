"""Input made to break a service: a short answer that tells nothing, and the service goes on."""

import http.client
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select

import httpx2
import pytest

from tests.service.conftest import (
    EXAMPLE,
    FIELD,
    NUMBER,
    PATIENCE_SECONDS,
    WITH_NUMBER,
    Service,
    assert_answers,
    copied_artifacts,
    number,
    until,
    wrong,
)
from tests.service.gameday.trial import Trouble, make_trial
from tests.service.integration.test_http import assert_problem
from tests.service.where import ROOT

Start = Callable[..., Service]

DEPTH = 100_000
CANARY = "c4n4ry"  # a value that no answer may repeat
BODY = json.dumps(EXAMPLE).encode()
LENGTH, CHUNKED = b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked"
# What would tell how an answer came about: a traceback, a module, a folder, an exception, an address.
TELLTALE = re.compile(
    r"Traceback|\.py\b|-packages|/(?:home|usr|opt|root|tmp|srv|service|app)/|[a-z](?:Error|Exception)\b|0x[0-9a-f]{6}"
)
TOO_SOON = 1  # seconds a client has in these tests; nobody measures them


def assert_refused(answer: httpx2.Response, status: int, code: str) -> None:
    """A short problem document of this status and code that repeats nothing and tells nothing."""
    assert_problem(answer, status, code)
    seen = answer.text + str(answer.headers)
    assert CANARY not in seen
    assert str(ROOT) not in seen
    assert not TELLTALE.search(seen), seen
    assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == (
        "no-store",
        "nosniff",
    )


def request(*headers: bytes, body: bytes = b"", line: bytes = b"POST /v1/predict HTTP/1.1") -> bytes:
    """A request, byte for byte."""
    return b"\r\n".join((line, b"Host: localhost", *headers, b"", body))


@contextmanager
def connected(service: Service) -> Iterator[socket.socket]:
    """A connection without a client library that would know better."""
    address = httpx2.URL(service.url)
    with socket.create_connection((address.host, address.port), PATIENCE_SECONDS) as connection:
        yield connection


def answer_on(connection: socket.socket, method: str = "POST") -> httpx2.Response:
    """The next answer; raises ConnectionError where the connection ends without one."""
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    return httpx2.Response(response.status, headers=response.getheaders(), content=response.read())


def ask(service: Service, content: bytes, method: str = "POST") -> httpx2.Response:
    """The answer to these bytes, read once all of them are on their way, as clients do."""
    with connected(service) as connection:
        connection.sendall(content)
        return answer_on(connection, method)


def all_said(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection."""
    said = b""
    with suppress(ConnectionError):
        while more := connection.recv(65536):
            said += more
    return said


def ended(connection: socket.socket) -> bool:
    """Whether nothing more comes but the end."""
    return connection.recv(1) == b""


def instance(value: str) -> bytes:
    """A complete instance with this text as the value of one feature."""
    return json.dumps({**EXAMPLE, FIELD: "@"}).replace('"@"', value).encode("utf-8", "surrogatepass")


MALFORMED = {
    "empty": b"",
    "blank": b"  ",
    "truncated": json.dumps(EXAMPLE).encode()[:-1],
    "trailing text": json.dumps(EXAMPLE).encode() + b"}",
    "two documents": json.dumps(EXAMPLE).encode() * 2,
    "NaN": instance("NaN"),
    "Infinity": instance("Infinity"),
    "-Infinity": instance("-Infinity"),
    "leading zero": instance("00.2"),
    "hexadecimal": instance("0x1"),
    "comment": instance("0.2 /* c4n4ry */"),
    "single quotes": json.dumps(EXAMPLE).replace('"', "'").encode(),
    "lone surrogate, escaped": instance(r'"c4n4ry \ud800"'),
    "lone surrogate, encoded": instance('"c4n4ry \ud800"'),
    "lone surrogate in a name": b'{"\\udfff": 1}',
    "lone surrogate in a batch": b'{"instances": [{"\\ud83d": "\\ud83d"}]}',
    "not UTF-8": instance('"c4n4ry'.replace("c", "\u00e7")).decode().encode("latin-1"),
    "a byte order mark": json.dumps(EXAMPLE).encode("utf-8-sig"),
    "UTF-16": json.dumps(EXAMPLE).encode("utf-16"),
    "UTF-16 without mark": json.dumps(EXAMPLE).encode("utf-16-le"),
    "UTF-32": json.dumps(EXAMPLE).encode("utf-32"),
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

TWICE = json.dumps({FIELD: 1}, ensure_ascii=False).encode()[:-1] + b", " + json.dumps(EXAMPLE).encode()[1:]
INVALID = {
    "a string": instance(json.dumps(wrong("c4n4ry"))),
    "a string of 80 KB": instance(json.dumps(wrong(CANARY * 13_000))),
    "a name of 80 KB": json.dumps({**EXAMPLE, "x" * 80_000: CANARY}).encode(),
    "80 KB of names": json.dumps({f"name{index}": CANARY for index in range(4000)}).encode(),
    "80 KB of bad instances": json.dumps({"instances": [CANARY] * 8000}).encode(),
    "names that swell in JSON": json.dumps(
        {"\x01" * 60 + str(index): CANARY for index in range(200)}
    ).encode(),
    "names of emoji": json.dumps({"\U0001f600" * 60 + str(index): CANARY for index in range(200)}).encode(),
    "a feature twice": TWICE,
    "a feature twice, once escaped": TWICE.replace(FIELD[:1].encode(), b"\\u%04x" % ord(FIELD[0]), 1),
    "a feature twice in a batch": b'{"instances": [' + TWICE + b"]}",
    "instances twice": b'{"instances": [%s], "instances": [%s]}' % ((json.dumps(EXAMPLE).encode(),) * 2),
    "an array": b"[]",
    "null": b"null",
    "a number": b"1",
    "instances of the wrong kind": b'{"instances": {"0": "c4n4ry"}}',
}

MIB = b"x" * 2**20
TOO_MUCH = {
    "8 MB in a header": (431, request(b"X: " + MIB * 8)),
    "8 MB in a thousand headers": (431, request(*(b"X%d: %s" % (n, MIB[:8192]) for n in range(1000)))),
    "8 MB in the name of a header": (431, request(MIB * 8)),
    "20,000 headers": (431, request(*(b"X%d: c4n4ry" % n for n in range(20_000)))),
    "101 headers": (431, request(*(b"X%d: c4n4ry" % n for n in range(100)))),
    "8 MB of empty lines": (431, b"\r\n" * 2**22),
    "a URI of 9 KB": (414, request(line=b"GET /%s HTTP/1.1" % MIB[:9000])),
    "a URI of 8 MB": (414, request(line=b"GET /%s HTTP/1.1" % (MIB * 8))),
    "a query of 8 MB": (414, request(line=b"GET /health?%s HTTP/1.1" % (MIB * 8))),
    "a length over the limit": (413, request(b"Content-Length: 1048577")),
    "a length beyond all measure": (413, request(b"Content-Length: 1000000000000000000")),
    "4 MB behind their length": (413, request(b"Content-Length: 4194304", body=MIB * 4)),
    "4 MB in chunks": (413, request(CHUNKED, body=b"100000\r\n%s\r\n" % MIB * 4 + b"0\r\n\r\n")),
    "4 MB, and nothing after": (413, request(b"Content-Length: 4194304", b"Connection: close", body=MIB * 4)),
    "4 MB in HTTP/1.0": (
        413, request(b"Content-Length: 4194304", body=MIB * 4, line=b"POST /v1/predict HTTP/1.0")
    ),
    "16 MB after the last chunk": (
        413, request(CHUNKED, body=b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY) + b"a: c4n4ry\r\n" * 2**21)
    ),
}  # fmt: skip
TOO_MUCH_CODES = {413: "body_too_large", 414: "uri_too_long", 431: "headers_too_large"}

NOT_HTTP = {
    "two lengths": request(LENGTH, b"Content-Length: 5", body=BODY),
    "the same length twice": request(LENGTH, LENGTH, body=BODY),
    "a list of lengths": request(b"Content-Length: 5, 5", body=BODY),
    "a length and chunks": request(LENGTH, CHUNKED, body=b"0\r\n\r\n"),
    "chunks and a length": request(CHUNKED, LENGTH, body=b"0\r\n\r\n"),
    "a negative length": request(b"Content-Length: -1", body=BODY),
    "a length with a sign": request(b"Content-Length: +5", body=BODY),
    "a length in hexadecimal": request(b"Content-Length: 0x51", body=BODY),
    "an empty length": request(b"Content-Length:", body=BODY),
    "a length of 65 bits": request(b"Content-Length: 18446744073709551616", body=BODY),
    "a length of 5,000 digits": request(b"Content-Length: " + b"9" * 5000, body=BODY),
    "another transfer encoding": request(b"Transfer-Encoding: c4n4ry", body=BODY),
    "chunks within an encoding": request(b"Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n"),
    "chunked twice": request(CHUNKED, CHUNKED, body=b"0\r\n\r\n"),
    "a chunk without a size": request(CHUNKED, body=b"\r\nabcde"),
    "a chunk of a size that is none": request(CHUNKED, body=b"c4n4ry\r\n"),
    "a chunk of negative size": request(CHUNKED, body=b"-5\r\nabcde\r\n0\r\n\r\n"),
    "a chunk of 68 bits": request(CHUNKED, body=b"F" * 17 + b"\r\nabc"),
    "a chunk longer than its size": request(CHUNKED, body=b"5\r\nabcdefgh\r\n0\r\n\r\n"),
    "chunks without carriage returns": request(CHUNKED, body=b"5\nabcde\n0\n\n"),
    "NUL in a header": request(b"X: c4n4ry\0"),
    "NUL in the name of a header": request(b"X\0: c4n4ry"),
    "a control character in a header": request(b"X: c4n4ry\x01"),
    "a carriage return in a header": request(b"X: a\rX-API-Key: c4n4ry"),
    "a folded header": request(b"X: a\r\n c4n4ry"),
    "a header without a colon": request(b"c4n4ry"),
    "a header without a name": request(b": c4n4ry"),
    "a space before the colon": request(b"Content-Length : 5", body=BODY),
    "NUL in the URI": request(line=b"GET /c4n4ry\0 HTTP/1.1"),
    "a control character in the URI": request(line=b"GET /c4n4ry\x01 HTTP/1.1"),
    "a space in the URI": request(line=b"GET /c4n4ry /health HTTP/1.1"),
    "latin-1 in the URI": request(line=b"GET /c4n4ry\xff HTTP/1.1"),
    "latin-1 in the query": request(line=b"GET /health?c4n4ry\xff HTTP/1.1"),
    "a relative URI": request(line=b"GET c4n4ry HTTP/1.1"),
    "an absolute URI without a path": request(line=b"GET http://c4n4ry HTTP/1.1"),
    "an absolute URI that is broken": request(line=b"GET http://[::1/c4n4ry HTTP/1.1"),
    "no URI": request(line=b"GET  HTTP/1.1"),
    "a tunnel": request(line=b"CONNECT c4n4ry:443 HTTP/1.1"),
    "a method nobody knows": request(line=b"C4N4RY /health HTTP/1.1"),
    "a method in small letters": request(line=b"get /health HTTP/1.1"),
    "a version nobody knows": request(line=b"GET /health HTTP/9.9"),
    "another protocol": request(line=b"GET /health C4N4RY/1.1"),
    "lines without carriage returns": b"GET /health HTTP/1.1\nHost: c4n4ry\n\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("1603010200010001fc0303") + b"c4n4ry" * 80,
    "SSH": b"SSH-2.0-c4n4ry\r\n",
    "Redis": b"*1\r\n$6\r\nc4n4ry\r\n",
    "zeros": bytes(100),
}

ODD = {
    "HTTP/1.0": request(LENGTH, body=BODY, line=b"POST /v1/predict HTTP/1.0"),
    "an absolute URI": request(LENGTH, body=BODY, line=b"POST http://localhost/v1/predict HTTP/1.1"),
    "chunks of one byte": request(
        CHUNKED, body=b"".join(b"1\r\n%c\r\n" % one for one in BODY) + b"0\r\n\r\n"
    ),
    "a chunk with an extension": request(CHUNKED, body=b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "an unknown expectation": request(LENGTH, b"Expect: 200-ok", body=BODY),
    "latin-1 in a header": request(LENGTH, b"User-Agent: caf\xe9", body=BODY),
    "an offer of WebSockets": request(LENGTH, b"Connection: Upgrade", b"Upgrade: websocket", body=BODY),
    "an offer of HTTP/2, as Java's client makes it": request(
        LENGTH,
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAEAAEAA",
        body=BODY,
    ),
    "a hundred headers": request(LENGTH, *(b"X%d: x" % n for n in range(98)), body=BODY),
}


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict/batch"])
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_what_is_not_json_is_400(service: Service, path: str, body: bytes) -> None:
    """Broken, misencoded or bottomless bodies get a short problem document that repeats none of them."""
    answer = service.client.post(path, content=body)
    assert_refused(answer, 400, "invalid_json")
    assert service.client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict/batch"])
@pytest.mark.parametrize("body", INVALID.values(), ids=INVALID)
def test_what_breaks_the_contract_is_422(service: Service, path: str, body: bytes) -> None:
    """However much is wrong, the answer is short, lists at most twenty faults and repeats no value."""
    answer = service.client.post(path, content=body)
    assert_refused(answer, 422, "invalid_input")
    assert service.client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict/batch"])
@pytest.mark.parametrize("body", OVERFLOWING.values(), ids=OVERFLOWING)
def test_a_number_no_float_can_hold_is_refused(service: Service, path: str, body: bytes) -> None:
    """Such a number is JSON to some and not to others; it is the client's error to all."""
    answer = service.client.post(path, content=body)
    status = 400 if answer.status_code == 400 else 422
    assert_refused(answer, status, "invalid_json" if status == 400 else "invalid_input")


def test_hostile_input_ends_no_worker(service: Service) -> None:
    """After all of it the same two workers are there, and a prediction is a prediction."""
    for body in (*MALFORMED.values(), *OVERFLOWING.values(), *INVALID.values()):
        service.client.post("/v1/predict", content=body)
    booted = [line for line in service.lines() if str(line["event"]).startswith("Booting worker")]
    assert len(booted) == 2
    assert not [line for line in service.lines() if line["level"] in ("error", "critical")]
    assert_answers(service.predict().json())


@pytest.mark.parametrize(("status", "content"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_too_much_of_anything_is_refused(service: Service, status: int, content: bytes) -> None:
    """Headers, URI and body have limits, and who exceeds one reads so, even after sending all of it."""
    assert_refused(ask(service, content), status, TOO_MUCH_CODES[status])
    assert service.predict().status_code == 200


@pytest.mark.parametrize("content", NOT_HTTP.values(), ids=NOT_HTTP)
def test_what_is_not_http_is_400(service: Service, content: bytes) -> None:
    """What is not HTTP, or could be read in two ways, is refused like other faults; the connection ends."""
    with connected(service) as connection:
        connection.sendall(content)
        answer = answer_on(connection)
        assert_refused(answer, 400, "invalid_request")
        assert answer.headers["connection"] == "close"
        assert ended(connection)
    line = service.line(answer.headers["x-request-id"])
    assert (line["status"], line["route"]) == (400, "none")


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_what_is_odd_but_right_is_answered(service: Service, content: bytes) -> None:
    """HTTP allows more than most clients send; all of it gets its prediction."""
    answer = ask(service, content)
    assert answer.status_code == 200, answer.text
    assert_answers(answer.json())


@pytest.mark.parametrize("coding", [b"Content-Encoding: gzip", b"Transfer-Encoding: gzip, chunked"])
def test_a_compressed_body_is_refused(service: Service, coding: bytes) -> None:
    """Nothing is unpacked here, so nothing can swell."""
    framing = b"X: x" if b"chunked" in coding else LENGTH
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY) if b"chunked" in coding else BODY
    assert_refused(ask(service, request(coding, framing, body=chunk)), 415, "unsupported_media_type")


def test_fields_after_the_body_are_no_headers(service: Service) -> None:
    """A trailer passes proxies that check headers, so it is read as none."""
    chunk = b"%x\r\n%s\r\n0\r\nX-Request-ID: c4n4ry\r\n\r\n" % (len(BODY), BODY)
    answer = ask(service, request(CHUNKED, body=chunk))
    assert (answer.status_code, answer.headers["x-request-id"] != CANARY) == (200, True)


def test_a_connection_survives_a_body_too_large(service: Service) -> None:
    """The rest of a refused body is skipped, so that the next request on its connection is answered."""
    with connected(service) as connection:
        connection.sendall(request(b"Content-Length: 2097152", body=MIB))
        assert_refused(answer_on(connection), 413, "body_too_large")
        connection.sendall(MIB + request(LENGTH, body=BODY))
        assert_answers(answer_on(connection).json())


def test_requests_sent_ahead_are_answered_in_order(service: Service) -> None:
    """Pipelined requests get their answers in order; garbage behind them costs none of these."""
    with connected(service) as connection:
        health = request(line=b"GET /health HTTP/1.1")
        connection.sendall(request(LENGTH, body=BODY) + health * 10 + b"c4n4ry\r\n\r\n" + health)
        said = all_said(connection)
    assert re.findall(rb"HTTP/1\.1 (\d{3})", said) == [b"200"] * 11
    assert said.index(b"prediction_id") < said.index(b'"ok"')


def test_endless_requests_sent_ahead_are_cut_off(service: Service) -> None:
    """One connection cannot pile up work: at most a hundred requests wait on it, and are answered."""
    with connected(service) as connection:
        with suppress(ConnectionError):
            connection.sendall(request(line=b"GET /health HTTP/1.1") * 20_000)
        said = all_said(connection)
    assert {*re.findall(rb"HTTP/1\.1 (\d{3})", said)} == {b"200"}
    assert said.count(b"HTTP/1.1 200") <= 2000


def test_head_has_an_answer_without_a_body(service: Service) -> None:
    """HEAD is taken where GET is; elsewhere its answer says what is taken, and has no body either."""
    for path, status in ((b"/health", 200), (b"/v1/predict", 405), (b"/nowhere", 404)):
        answer = ask(service, request(line=b"HEAD %s HTTP/1.1" % path), "HEAD")
        assert (answer.status_code, answer.content) == (status, b"")
        assert (answer.headers.get("allow") == "POST") is (status == 405)


@pytest.mark.parametrize(
    "path",
    ["/docs/assets/%00", "/docs/assets/..%2f..%2f..%2fetc%2fpasswd", "/docs/assets/" + "c4n4ry" * 1000,
     "/%zz%0a%0d", "/%ff", "/%E2%80%AEc4n4ry", "/../app/main.py", "*"],
    ids=range(8),
)  # fmt: skip
def test_a_path_made_up_is_404(service: Service, path: str) -> None:
    """Whatever a path holds, it finds nothing and is not repeated."""
    answer = ask(service, request(line=b"GET %s HTTP/1.1" % path.encode()), "GET")
    assert_refused(answer, 404, "not_found")


def test_a_client_that_does_not_finish_is_left(start: Start) -> None:
    """Silence, half a head, a head in drops and half of a refused body end; others notice nothing."""
    service = start(workers=1, header_timeout_seconds=TOO_SOON)
    half = request(LENGTH, b"X: c4n4ry")[:-10]
    with connected(service) as idle, connected(service) as silent, connected(service) as slow:
        idle.sendall(request(LENGTH, body=BODY))
        assert answer_on(idle).status_code == 200
        slow.sendall(half)
        with connected(service) as dripping, connected(service) as refused:
            refused.sendall(request(b"Content-Length: 2097152", body=MIB))
            assert_refused(answer_on(refused), 413, "body_too_large")
            dripping.sendall(b"GET /health HTTP/1.1\r\nX: ")
            until(lambda: dripping.send(b"x") and spoken_to(dripping), "the end of patience")
            assert_refused(answer_on(dripping), 408, "request_timeout")
            assert ended(refused)
        assert ended(silent)
        assert_refused(answer_on(slow), 408, "request_timeout")
        assert ended(slow)
        idle.sendall(request(LENGTH, body=BODY))
        assert answer_on(idle).status_code == 200, "who has been answered may take a rest"
    assert service.predict().status_code == 200


def spoken_to(connection: socket.socket) -> bool:
    """Whether the service has said something."""
    return bool(select([connection], [], [], 0)[0])


def test_a_client_that_takes_no_answer_is_left(start: Start) -> None:
    """Who asks on and on and never reads is cut off, and what was kept for it is freed."""
    service = start(workers=1, header_timeout_seconds=TOO_SOON)
    with connected(service) as deaf:
        ask = request(line=b"GET /openapi.json HTTP/1.1")

        def cut_off() -> bool:
            try:
                deaf.send(ask)
            except OSError:
                return True
            return False

        until(cut_off, "the end of patience")
    assert service.predict().status_code == 200


HEADERS = (
    "X-Request-ID",
    "User-Agent",
    "Referer",
    "traceparent",
    "Idempotency-Key",
    "X-Forwarded-For",
    "X-API-Key",
)
INJECTED = b'%0a","level":"c4n4ry"} \\n\xe2\x80\xa8\xc2\x85'


@pytest.mark.parametrize("name", HEADERS)
def test_nothing_sent_forges_a_log_line(service: Service, name: str) -> None:
    """Quotes, escapes and line ends in headers, path and query leave one line of JSON, without them."""
    line = b"POST /v1/predict?a=%0a%22c4n4ry HTTP/1.1"
    answer = ask(service, request(LENGTH, b"%s: %s" % (name.encode(), INJECTED), body=BODY, line=line))
    unknown = ask(service, request(line=b"GET /%0a%0d%22c4n4ry%1b[2J%E2%80%A8 HTTP/1.1"), "GET")
    assert answer.status_code == (422 if name == "Idempotency-Key" else 200)
    assert unknown.status_code == 404
    for one in (answer, unknown):
        request_id = one.headers["x-request-id"]
        service.line(request_id)
        assert len([line for line in service.lines() if line.get("request_id") == request_id]) == 1
    assert CANARY not in service.log.read_text()


@WITH_NUMBER
def test_a_model_that_gives_no_number_is_500(start: Start, tmp_path: Path) -> None:
    """A NaN never leaves the service as an answer: its request gets 500 in valid JSON, the others theirs."""
    root = copied_artifacts(tmp_path)
    make_trial(root / "v1", Trouble(fails_above=number(1)))
    service = start(artifacts_dir=root)
    poisoned = {**EXAMPLE, NUMBER: number(2)}
    assert_refused(service.predict(poisoned), 500, "non_finite_output")
    batch = service.client.post("/v1/predict/batch", json={"instances": [EXAMPLE, poisoned]})
    assert_refused(batch, 500, "non_finite_output")
    assert_answers(service.predict().json(), version="v1", artifacts=root)
