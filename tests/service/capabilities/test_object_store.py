"""The capability `object-store`: artifacts come from a bucket or a web server, and from nowhere else."""

import hmac
import json
import os
import ssl
import stat
import subprocess
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pytest

from app.object_store.fetch import Unavailable, check_address
from tests.service.conftest import EXAMPLE, Service, assert_answers, copied_artifacts, refusal, run, until

Start = Callable[..., Service]
RELEASE, MANIFEST, MODEL = "release.json", "v1/manifest.json", "v1/model.onnx"


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """A copy to serve from elsewhere."""
    return copied_artifacts(tmp_path)


class Place(ThreadingHTTPServer):
    """A server with the artifacts below `prefix`: what it was asked for, and how it answers wrongly."""

    daemon_threads = True

    def __init__(self, root: Path, prefix: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root, self.prefix = root, prefix
        self.asked: list[str] = []
        self.instead: dict[str, Callable[[Answer, bytes], object]] = {}
        self.allows: Callable[[Answer], bool] = lambda _answer: True
        self.over = threading.Event()  # nobody waits for an answer any longer
        self.folders: set[int] = set()  # modes of the folders that were downloaded to meanwhile
        self.temporary = root.parent / "temporary"

    def handle_error(self, *_: object) -> None:
        """Clients hang up on us: that is what is tested."""


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Place

    def do_GET(self) -> None:
        """Answer rightly, unless told otherwise for this object."""
        path = urlsplit(self.path).path
        self.server.asked.append(path)
        self.server.folders |= {stat.S_IMODE(one.stat().st_mode) for one in self.server.temporary.iterdir()}
        name = path.removeprefix(self.server.prefix + "/")
        file = self.server.root / name
        if not self.server.allows(self):
            self.reply(403)
        elif not path.startswith(self.server.prefix + "/") or not file.is_file():
            self.reply(404)
        else:
            self.server.instead.get(name, type(self).whole)(self, file.read_bytes())

    def whole(self, content: bytes) -> None:
        """The object."""
        self.reply(200, content)

    def reply(self, status: int, content: bytes = b"", length: int | None = None, **headers: str) -> None:
        """An answer; `length` is announced, whatever is sent."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def place(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A server with a copy of the artifacts, so far without encryption."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    with Place(artifacts, "/some/models") as server:
        server.temporary.mkdir()
        monkeypatch.setenv("TMPDIR", str(server.temporary))
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of one's own for localhost, with its key."""
    file = tmp_path_factory.mktemp("certificate") / "localhost.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    key = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(file), "-out", str(file.with_suffix(".crt"))]
    subprocess.run(["openssl", "req", "-x509", *key, *subject], check=True, capture_output=True)
    with file.open("ab") as whole:
        whole.write(file.with_suffix(".crt").read_bytes())
    return file


@pytest.fixture
def url(place: Place, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The place over https, its certificate trusted."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    place.socket = context.wrap_socket(place.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    return f"https://localhost:{place.server_port}/some/models"


def test_artifacts_are_served_from_a_web_server(place: Place, url: str, start: Start) -> None:
    """What serves is fetched, once, into a private folder that is gone when the service is ready."""
    service = start(artifacts_dir=url, artifacts_allow_private="true")
    assert_answers(service.predict().json(), version="v1", artifacts=place.root)
    files = json.loads((place.root / MANIFEST).read_bytes())["files"]
    served = [RELEASE, MANIFEST, *(f"v1/{name}" for name in files)]
    assert place.asked == [f"/some/models/{name}" for name in served]
    assert place.folders - {0o755} == {0o700}
    left = [path for path in place.temporary.iterdir() if not path.name.startswith("metrics-")]
    assert left == []


def test_a_replaced_worker_needs_the_server_no_more(place: Place, url: str, start: Start) -> None:
    """What was verified at the start is what later workers serve, wherever it came from."""
    service = start(workers=1, artifacts_dir=url, artifacts_allow_private="true")
    asked = len(place.asked)
    service.kill(service.workers()[0])
    until(lambda: sum(line["event"] == "ready" for line in service.lines()) == 2, "another worker")
    assert_answers(service.predict().json(), version="v1", artifacts=place.root)
    assert len(place.asked) == asked


def test_the_golden_path_and_a_pinned_version_come_from_there_too(
    place: Place, url: str, tmp_path: Path
) -> None:
    """`python -m app predict` fetches as the service does, and a pinned version without release.json."""
    settings: dict[str, Any] = {"artifacts_dir": url + "/", "artifacts_allow_private": "true"}
    given = json.dumps(EXAMPLE).encode()
    done = run(tmp_path, "app", "predict", stdin=given, **settings, model_version="v0")
    assert json.loads(done.stdout)["model_version"] == "v0", done.stderr
    assert place.asked[0] == "/some/models/v0/manifest.json"


def drip(answer: Answer, content: bytes) -> None:
    """Send a byte now and then."""
    answer.reply(200, length=len(content))
    for byte in content:
        answer.wfile.write(bytes([byte]))
        if answer.server.over.wait(0.2):
            return


# How an object is answered for instead, and the reason that must be given.
ANSWERS: dict[str, tuple[str, Callable[[Answer, bytes], object], str]] = {
    "redirected release": (
        RELEASE, lambda answer, _: answer.reply(302, Location="/some/models/v0/x.json"), "redirect (302)"),
    "redirected model": (
        MODEL, lambda answer, _: answer.reply(307, Location="/some/models/v0/rules.json"), "redirect (307)"),
    "missing release": (RELEASE, lambda answer, _: answer.reply(404), "no such object (404)"),
    "missing model": (MODEL, lambda answer, _: answer.reply(404), "no such object (404)"),
    "denied manifest": (MANIFEST, lambda answer, _: answer.reply(403), "access is denied (403)"),
    "failing server": (MODEL, lambda answer, _: answer.reply(503), "error (503)"),
    "truncated model": (MODEL, lambda answer, own: answer.reply(200, own[:300], len(own)), "ends early"),
    "truncated manifest": (MANIFEST, lambda answer, own: answer.reply(200, own[:30], len(own)), "ends early"),
    "shorter model": (MODEL, lambda answer, own: answer.reply(200, own[:300]), "size differs"),
    "empty manifest": (MANIFEST, lambda answer, _: answer.reply(200), "Invalid JSON"),
    "altered model": (MODEL, lambda answer, own: answer.reply(200, own[:-1] + b"!"), "sha256 differs"),
    "larger model": (MODEL, lambda answer, own: answer.reply(200, own * 2), "larger than"),
    "enormous release": (RELEASE, lambda answer, _: answer.reply(200, b" " * 2**25), "larger than"),
    "no answer to a release": (RELEASE, lambda answer, _: answer.server.over.wait(), "takes too long"),
    "slow model": (MODEL, drip, "takes too long"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "instead", "reason"), ANSWERS.values(), ids=ANSWERS)
def test_a_server_that_answers_otherwise_stops_the_start(
    place: Place, url: str, tmp_path: Path, name: str, instead: Callable[[Answer, bytes], object], reason: str
) -> None:
    """Redirected, missing, truncated, altered, too large, too slow: one line, within ten seconds."""
    place.instead[name] = instead
    line = refusal(tmp_path, artifacts_dir=url, artifacts_allow_private="true")
    assert f"{url}/{name}: " in line
    assert reason in line
    assert place.asked[-1] == f"/some/models/{name}" or "differs" in reason
    assert not list(place.temporary.glob("artifacts-*"))


def test_a_private_address_is_refused_by_default(place: Place, url: str, tmp_path: Path) -> None:
    """A name that resolves to an address inside is not spoken to unless that is allowed."""
    line = refusal(tmp_path, artifacts_dir=url)
    assert f"{url}/{RELEASE}: is at a private address" in line
    assert "APP_ARTIFACTS_ALLOW_PRIVATE" in line
    assert place.asked == []


def test_a_server_without_a_known_certificate_is_refused(
    place: Place, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fetched from a server that cannot prove its name."""
    monkeypatch.delenv("SSL_CERT_FILE")
    line = refusal(tmp_path, artifacts_dir=url, artifacts_allow_private="true")
    assert f"{url}/{RELEASE}: cannot be fetched (SSLCertVerificationError)" in line
    assert place.asked == []


def test_a_server_that_is_not_there_is_refused(place: Place, tmp_path: Path) -> None:
    """No connection, no start."""
    url = "https://localhost:1/models"
    line = refusal(tmp_path, artifacts_dir=url, artifacts_allow_private="true")
    assert f"{url}/{RELEASE}: cannot be fetched (ConnectionRefusedError)" in line


def test_only_listed_plain_names_are_fetched(place: Place, url: str, tmp_path: Path) -> None:
    """A manifest that lists a path makes nobody ask for it."""
    file = place.root / MANIFEST
    manifest = json.loads(file.read_bytes())
    manifest["files"]["../v0/rules.json"] = manifest["files"]["model.onnx"]
    file.write_text(json.dumps(manifest))
    line = refusal(tmp_path, artifacts_dir=url, artifacts_allow_private="true")
    assert "rules.json: listed in manifest.json but missing" in line
    assert not [path for path in place.asked if "rules" in path]


KEY_ID, SECRET, TOKEN = "AKIDEXAMPLE", "canary-secret", "canary-token"
AWS = {
    "AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN,
    "AWS_REGION": "eu-west-1",
}  # fmt: skip


def signed_by_us(answer: Answer) -> bool:
    """Whether an address carries the signature (AWS version 4) that only our secret can have made."""
    path, query = urlsplit(answer.path).path, dict(parse_qsl(urlsplit(answer.path).query))
    signature, moment = query.pop("X-Amz-Signature", ""), query.get("X-Amz-Date", "")
    scope = f"{moment[:8]}/eu-west-1/s3/aws4_request"
    host = f"host:{answer.headers['Host']}\n"
    parameters = urlencode(sorted(query.items()), quote_via=quote, safe="")
    request = "\n".join(["GET", path, parameters, host, "host", "UNSIGNED-PAYLOAD"])
    text = "\n".join(["AWS4-HMAC-SHA256", moment, scope, sha256(request.encode()).hexdigest()])
    key = f"AWS4{SECRET}".encode()
    for part in (*scope.split("/"), text):
        key = hmac.digest(key, part.encode(), "sha256")
    right = (
        query.get("X-Amz-Credential") == f"{KEY_ID}/{scope}" and query.get("X-Amz-Security-Token") == TOKEN
    )
    return right and hmac.compare_digest(key.hex(), signature)


@pytest.fixture
def bucket(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An object store that speaks the one call of S3 that is needed, and checks its signature."""
    place.prefix, place.allows = "/bucket/some/models", signed_by_us
    for name, value in {**AWS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{place.server_port}"}.items():
        monkeypatch.setenv(name, value)
    return place


def test_artifacts_are_served_from_a_bucket(bucket: Place, start: Start) -> None:
    """The credentials of the environment sign each request, and appear in no log line."""
    service = start(
        artifacts_dir="s3://bucket/some/models", artifacts_allow_private="true", log_level="DEBUG"
    )
    assert_answers(service.predict().json(), version="v1", artifacts=bucket.root)
    files = json.loads((bucket.root / MANIFEST).read_bytes())["files"]
    assert len(bucket.asked) == 2 + len(files)
    log = service.log.read_text()
    assert not [one for one in (KEY_ID, SECRET, TOKEN, "X-Amz") if one in log]


@pytest.mark.parametrize(
    ("place_name", "variables", "reason"),
    [
        ("s3://other/some/models", {}, "no such object (404)"),
        ("s3://bucket/models", {}, "no such object (404)"),
        ("s3://bucket/some/models", {"AWS_SECRET_ACCESS_KEY": "canary-other"}, "access is denied (403)"),
        ("s3://bucket/some/models", {"AWS_REGION": "us-east-1"}, "access is denied (403)"),
        ("gs://bucket/some/models", {"GOOGLE_SERVICE_ACCOUNT_KEY": '{"private_key": "canary"}'}, "signed"),
        ("az://bucket/some/models", {"AZURE_STORAGE_ACCOUNT_KEY": "canary"}, "signed"),
    ],
    ids=["bucket", "prefix", "secret", "region", "google", "azure"],
)
def test_a_wrong_environment_stops_the_start(
    bucket: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place_name: str,
    variables: dict[str, str],
    reason: str,
) -> None:
    """Another bucket, region or secret, or half a credential: one line says so, and holds no credential."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = refusal(tmp_path, artifacts_dir=place_name, artifacts_allow_private="true")
    assert f"{place_name}/{RELEASE}: " in line
    assert reason in line
    assert not [one for one in (KEY_ID, "canary", "X-Amz") if one in line]


def test_a_bucket_at_a_private_address_is_refused_by_default(bucket: Place, tmp_path: Path) -> None:
    """The endpoint of a bucket is looked at like any other address."""
    line = refusal(tmp_path, artifacts_dir="s3://bucket/some/models")
    assert "s3://bucket/some/models/release.json: is at a private address (127.0.0.1)" in line
    assert bucket.asked == []


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_other_clouds_are_signed_for_too(
    place: Place, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """gs:// and az:// are fetched with the credentials of their SDKs' variables."""
    endpoint = f"http://127.0.0.1:{place.server_port}"
    account = {
        "private_key": certificate.read_text().partition("-----BEGIN CERT")[0], "private_key_id": "1",
        "client_email": "a@b.c", "gcs_base_url": endpoint,
    }  # fmt: skip
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", b64encode(b"k" * 32).decode())
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
    place.prefix = "/bucket/some/models"
    place.allows = lambda answer: {"gs": "X-Goog-Signature=", "az": "sig="}[scheme] in answer.path
    settings: dict[str, Any] = {
        "artifacts_dir": f"{scheme}://bucket/some/models",
        "artifacts_allow_private": "true",
    }
    done = run(tmp_path, "app", "predict", stdin=json.dumps(EXAMPLE).encode(), **settings)
    assert done.returncode == 0, done.stderr
    assert_answers(json.loads(done.stdout), version="v1", artifacts=place.root)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "2002:0a00:0001::",
    ],
)  # fmt: skip
def test_private_addresses_are_refused_unless_allowed(address: str) -> None:
    """Loopback, private, shared and link-local addresses, however they are written, need permission."""
    with pytest.raises(Unavailable, match=r"private address .*APP_ARTIFACTS_ALLOW_PRIVATE"):
        check_address(address, secure=True, allow_private=False)
    check_address(address, secure=False, allow_private=True)


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8"])
def test_public_addresses_are_spoken_to_under_encryption(address: str) -> None:
    """What crosses a network that is not one's own is encrypted, permission for private addresses or not."""
    check_address(address, secure=True, allow_private=False)
    with pytest.raises(Unavailable, match="without encryption"):
        check_address(address, secure=False, allow_private=True)
