"""Your code and its image: app/own depends on little, and the image gets what was tested.

app/own/*.py -> imports of the file; a new process that imports it and watches
Dockerfile, .dockerignore, compose.yaml, requirements/*.txt -> files, releases, rights
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, environment, read

OWN = sorted((ROOT / "app" / "own").glob("*.py"))

# Libraries are loaded first; later events come from the module itself.
WATCH = """
import importlib, os, sys
module, *libraries = sys.argv[1:]
for library in libraries:
    importlib.import_module(library)
seen, before = [], dict(os.environ)

def watch(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc", ".so")):
        seen.append(f"opens {arguments[0]}")
    elif event.startswith(("socket.", "subprocess.", "os.mkdir", "os.remove", "tempfile.", "_thread.start")):
        seen.append(event)

sys.addaudithook(watch)
importlib.import_module(module)
sys.exit("; ".join(seen + ["changes the environment"] * (dict(os.environ) != before)) or 0)
"""


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_own_code_knows_only_the_contract(path: Path) -> None:
    """It imports libraries, app.own and app.schemas: training has no server, and the image no training."""
    of_service = {name for name in imported(path) if name.split(".")[0] in ("app", "server", "lifecycle")}
    wrong = {name for name in of_service if not name.startswith(("app.own", "app.schemas"))}
    assert not wrong, f"app/own/{path.name} imports {wrong}, which training or the image does not have"


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_importing_own_code_does_nothing(path: Path, tmp_path: Path) -> None:
    """Importing it opens no file or connection, starts nothing and changes no variable."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    libraries = sorted(name for name in imported(path) if not name.startswith("app.own"))
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCH, module, *libraries],  # -B: the interpreter itself would write
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"import {module}: {done.stderr.strip()}; move this into a function"


DOCKERFILE = read("Dockerfile")


def locked(lock: str) -> set[str]:
    """The lines of a lock: a release with its hashes, without the platforms that it is for."""
    lines = read(f"requirements/{lock}.txt").replace("\\\n", "").splitlines()
    return {re.sub(r" ;.*?(?=--hash)", " ", line) for line in lines}


def test_the_image_gets_what_was_tested() -> None:
    """The releases in the image, by hash, are those that development and these tests use."""
    for line in locked("dev"):
        assert re.match(r"\S+==\S+ .*--hash=sha256:", line), f"make lock writes hashes; this has none: {line}"
    assert locked("runtime") < locked("dev"), "make lock makes the two agree"
    assert "--require-hashes" in DOCKERFILE


def test_the_engine_is_sent_what_the_image_copies() -> None:
    """`.dockerignore` lets through each file that the Dockerfile copies, and no other; all of them exist."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    copied = sorted(file for line in lines for file in line.split())
    assert copied == sorted(re.findall(r"^!(.+)$", read(".dockerignore"), re.MULTILINE))
    for file in copied:
        assert list(ROOT.glob(file)), f"the Dockerfile copies {file}, which is not there"


def test_containers_get_no_rights() -> None:
    """Compose drops capabilities, limits memory and opens local ports only; the image's user is not root."""
    for path in ROOT.glob("compose*.yaml"):
        for name, service in yaml.safe_load(read(path))["services"].items():
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            assert service["mem_limit"], name
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
            assert not {"privileged", "cap_add", "network_mode", "pid"} & service.keys(), name
            for volume in service.get("volumes", []):
                host = volume.partition(":")[0]
                assert not host.startswith(".") or (ROOT / host).exists(), f"{name} mounts {host}"
    users = re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    assert not re.search(r"API_KEY|SECRET|TOKEN|^ADD|https?:", DOCKERFILE, re.MULTILINE)
