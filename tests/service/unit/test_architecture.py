"""The shape of the code: which part knows which, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.where import ROOT
WEB = {"fastapi", "starlette", "uvicorn", "uvicorn_worker", "gunicorn", "prometheus_fastapi_instrumentator"}
MODEL_LIBRARIES = {"onnxruntime", "numpy"}
# Not pandas: an estimator that was fitted on a frame is served one.
TRAINING = {"lifecycle", "onnx", "skl2onnx", "sklearn"}

# Each part of app/ with the parts it may know. Arrows point one way: schemas <- core <- api <- main.
KNOWS = {
    "schemas": {"schemas"},
    "observability": {"observability"},
    "settings": set(),
    "core": {"core", "schemas", "observability"},
    "api": {"api", "core", "schemas", "observability", "settings"},
    "protocol": {"core"},
    "main": {"api", "core", "schemas", "observability", "settings"},
    "__main__": {"main", "api", "core", "schemas", "observability", "settings"},
}
# Libraries that a part must do without.
SHUNS = {
    "schemas": WEB | MODEL_LIBRARIES,
    "observability": WEB | MODEL_LIBRARIES - {"numpy"},  # rows are counted as the arrays they come in
    "settings": WEB | MODEL_LIBRARIES,
    "core": WEB,
    "api": {"gunicorn", "onnxruntime", "uvicorn", "uvicorn_worker"},
    "protocol": (WEB | MODEL_LIBRARIES) - {"uvicorn"},
    "main": {"gunicorn", "onnxruntime", "uvicorn", "uvicorn_worker"},
    "__main__": WEB,
}

# Everything the modules lean on is imported first; what happens after that is theirs.
IMPORTING = """
import importlib, logging, os, sys
libraries, modules = sys.argv[1].split(","), sys.argv[2].split(",")
for name in libraries:
    importlib.import_module(name)
from pydantic import BaseModel
type("Warm", (BaseModel,), {})
seen, environment, handlers = [], dict(os.environ), list(logging.getLogger().handlers)

def watch(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc", ".so")):
        seen.append(f"opens {arguments[0]}")
    elif event.startswith(("socket.", "subprocess.", "os.mkdir", "os.remove", "tempfile.", "_thread.start")):
        seen.append(event)

sys.addaudithook(watch)
for name in modules:
    importlib.import_module(name)
assert not seen, seen
assert dict(os.environ) == environment
assert logging.getLogger().handlers == handlers
"""


def modules(package: str) -> dict[str, Path]:
    """The modules of a package by dotted name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports, also inside functions unless told otherwise."""
    tree = ast.parse(path.read_text("utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(name: str) -> str:
    """`core` of `app.core.store`; empty for `app` itself and what is not app."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "app" else ""


APP = {name: path for name, path in modules("app").items() if part(name)}


@pytest.mark.parametrize("name", APP)
def test_arrows_point_one_way(name: str) -> None:
    """A module imports only from the parts of app/ that its own part may know."""
    assert {part(one) for one in imports(APP[name])} - {""} <= KNOWS[part(name)]


@pytest.mark.parametrize("name", APP)
def test_a_part_does_without_what_is_not_its_business(name: str) -> None:
    """Inference knows no web framework, HTTP no model library, the service nothing of training."""
    libraries = {one.partition(".")[0] for one in imports(APP[name])}
    assert not libraries & (SHUNS[part(name)] | TRAINING)


@pytest.mark.parametrize("name", modules("lifecycle"))
def test_the_lifecycle_uses_the_core_and_the_contract(name: str) -> None:
    """What runs outside the service shares its inference and its contract, and nothing of its HTTP."""
    # A pipeline needs somebody who counts; and the API is documented from the application itself.
    more = {"main", "settings"} if name == "lifecycle.operations.docs" else set()
    known = {"core", "schemas", "observability"} | more
    assert {part(one) for one in imports(modules("lifecycle")[name])} - {""} <= known


def test_importing_opens_reads_and_configures_nothing() -> None:
    """Every module of app/ can be imported without a file, a socket, a thread or a changed setting."""
    everything = {one for path in APP.values() for one in imports(path, top_level_only=True)}
    libraries = {one.rpartition(".")[0] or one for one in everything if not one.startswith("app.")}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, ",".join(sorted(libraries)), ",".join(APP)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
