"""What is installed: written down whole by `make sbom`, looked up by `make audit`. No registry is asked."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement

from tests.service.where import ROOT

LOCK = ROOT / "requirements" / "runtime.txt"
# Of the image: runtime.txt, and the lock of each capability.
LOCKS = [path for path in (ROOT / "requirements").glob("*.txt") if path.stem != "dev"]


def make(folder: Path, target: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a target of the Makefile in `folder` with the programs of this environment, to its end."""
    # A make around these tests would hand its flags and variables down.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    given = {"BIN": str(Path(sys.executable).parent), **variables}
    return subprocess.run(
        ["make", "--old-file=.venv/dev.stamp", target, *(f"{name}={value}" for name, value in given.items())],
        cwd=folder, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip


def bill(file: Path) -> bytes:
    """What `make sbom` writes."""
    ended = make(ROOT, "sbom", ARGS=f"--output {file}")
    assert ended.returncode == 0, ended.stdout
    return file.read_bytes()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bill of materials."""
    return bill(tmp_path_factory.mktemp("sbom") / "sbom.json")


@pytest.fixture(scope="module")
def components(written: bytes) -> dict[str, dict[str, Any]]:
    """What the bill lists, by package URL or, what has none, by name and version."""
    listed = json.loads(written)["components"]
    return {one.get("purl", f"{one['name']} {one['version']}"): one for one in listed}


def locked_here() -> set[str]:
    """The package URLs of the locked packages that the image's Python gets."""
    text = "\n".join(lock.read_text("utf-8") for lock in LOCKS)
    lines = [line.partition(" \\")[0] for line in text.splitlines() if "==" in line]
    wanted = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate()]
    return {f"pkg:pypi/{one.name}@{next(iter(one.specifier)).version}" for one in wanted}


def test_the_bill_of_materials_is_valid(written: bytes) -> None:
    """`make sbom` writes CycloneDX that holds to its schema."""
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(written.decode()) is None


def test_the_bill_lists_what_the_image_installs(components: dict[str, dict[str, Any]]) -> None:
    """Every locked package is in the bill of materials, with its version, and no development tool is."""
    assert {purl for purl in components if purl.startswith("pkg:")} == locked_here()
    assert len(locked_here()) > 20
    assert components[next(purl for purl in components if "/fastapi@" in purl)]["licenses"]


def test_the_bill_says_who_needs_whom(written: bytes) -> None:
    """The service needs what `runtime.in` asks for and the models; every package is needed by somebody."""
    edges = {edge["ref"]: set(edge.get("dependsOn", [])) for edge in json.loads(written)["dependencies"]}
    direct = {ref.partition("==")[0] for ref in edges.pop("root-component")}
    assert {"fastapi", "onnxruntime", "uvicorn-worker", "model v0"} <= direct
    assert "starlette" not in direct
    needed = {ref.partition("==")[0] for needs in edges.values() for ref in needs} | direct
    assert {ref.partition("==")[0] for ref in edges} <= needed


def test_the_bill_lists_the_models(components: dict[str, dict[str, Any]]) -> None:
    """Every version in artifacts/ is in the bill as a model, with the sha256 that its manifest promises."""
    listed = {
        one["version"]: one["hashes"][0]["content"]
        for one in components.values()
        if one["type"] == "machine-learning-model"
    }
    promised = {}
    for file in (ROOT / "artifacts").glob("*/manifest.json"):
        manifest = json.loads(file.read_bytes())
        (promised[file.parent.name],) = (
            entry["sha256"]
            for name, entry in manifest["files"].items()
            if name.startswith(("model.", "rules."))
        )
    assert listed == promised


def test_the_bill_is_the_same_every_time(written: bytes, tmp_path: Path) -> None:
    """Writing the bill of materials again gives the same bytes, so that two releases can be compared."""
    assert bill(tmp_path / "elsewhere" / "sbom.json") == written


@contextmanager
def advisories(known: dict[str, str]) -> Iterator[str]:
    """The address of a service that knows these weaknesses, package -> name, and speaks as OSV does."""

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]
            weakness = {"id": known.get(asked["name"]), "affected": [{"package": asked}]}
            body = json.dumps({"vulns": [weakness]} if asked["name"] in known else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


Audit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    """`audit(lock, known, more)`: `make audit` of this lock by a service that knows these weaknesses."""

    def audit(lock: str, known: dict[str, str], more: str = "") -> subprocess.CompletedProcess[str]:
        shutil.copy(ROOT / "Makefile", tmp_path)
        (tmp_path / "requirements").mkdir()
        (tmp_path / "requirements" / "dev.txt").write_text(lock, "utf-8")
        with advisories(known) as address:
            asking = f"--vulnerability-service osv --osv-url {address} --cache-dir {tmp_path}"
            return make(tmp_path, "audit", ARGS=f"{asking} --progress-spinner off {more}")

    return audit


def test_what_is_locked_can_be_audited(audit: Audit) -> None:
    """`make audit` takes the whole lock as it is, and passes when no weakness is known."""
    ended = audit((ROOT / "requirements" / "dev.txt").read_text("utf-8"), {})
    assert ended.returncode == 0, ended.stdout
    assert "No known vulnerabilities found" in ended.stdout


def test_a_known_weakness_fails_the_audit(audit: Audit) -> None:
    """A locked package with a known weakness fails `make audit`, which names both."""
    ended = audit(LOCK.read_text("utf-8"), {"starlette": "EXAMPLE-2026-1"})
    assert ended.returncode != 0
    assert "EXAMPLE-2026-1" in ended.stdout
    assert "starlette" in ended.stdout


def test_a_weakness_can_be_accepted_by_name(audit: Audit) -> None:
    """A weakness that does not matter here is let through by its name, and only that one."""
    ended = audit(LOCK.read_text("utf-8"), {"starlette": "EXAMPLE-2026-1"}, "--ignore-vuln EXAMPLE-2026-1")
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize(
    "line",
    [
        "private @ https://127.0.0.1:1/private-1.0-py3-none-any.whl --hash=sha256:" + "0" * 64,
        "h11==0.16.0",
        "h11>=0.16.0 --hash=sha256:" + "0" * 64,
    ],
    ids=["from an address", "without a hash", "without a version"],
)
def test_what_cannot_be_audited_fails_the_audit(audit: Audit, line: str) -> None:
    """A package that would be skipped, because nobody can say what it is, fails `make audit` instead."""
    ended = audit(f"{line}\n", {})
    assert ended.returncode != 0
    assert "No known vulnerabilities found" not in ended.stdout
    assert "ERROR" in ended.stdout
