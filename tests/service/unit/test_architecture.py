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

# Each part of app/ with the parts that it may import. The arrows point one way:
# schemas <- core <- rollout, monitoring <- api <- main <- server; observability imports none of them.
EVERYWHERE = {"schemas", "core", "observability", "settings", "capabilities"}
KNOWS = {
    "schemas": {"schemas"},
    "observability": {"observability"},
    "settings": set(),
    "core": {"core", "schemas", "observability"},
    "rollout": {"rollout", "monitoring", *EVERYWHERE},  # a fleet shares the labels that came back
    "monitoring": {"monitoring", *EVERYWHERE},
    "api": {"api", "rollout", "monitoring", *EVERYWHERE},
    "own": {"own", "schemas"},
    "main": {"api", "rollout", "monitoring", *EVERYWHERE},
    "__main__": {"main", "api", "rollout", "monitoring", *EVERYWHERE},
}
CAPABILITY = {"main", "api", "rollout", "monitoring", *EVERYWHERE}  # a folder that a capability adds
OUTSIDE = {"server", "lifecycle", "load"}  # app/ imports none of these
# Libraries that a part must do without.
SHUNS = {
    "schemas": WEB | MODEL_LIBRARIES,
    "observability": WEB | MODEL_LIBRARIES - {"numpy"},  # rows are counted as the arrays they come in
    "settings": WEB | MODEL_LIBRARIES,
    "core": WEB,
    "rollout": WEB,
    "monitoring": WEB,
    "api": {"gunicorn", "onnxruntime", "uvicorn", "uvicorn_worker"},
    "own": WEB,
    "main": {"gunicorn", "onnxruntime", "uvicorn", "uvicorn_worker"},
    "__main__": WEB,
}

# Monitoring, because a baseline is recorded with the bins that the service counts in.
USED_BY_THE_LIFECYCLE = {"core", "rollout", "schemas", "monitoring", "observability", "own"}
# The API is documented from the application itself.
MORE_OF_THE_LIFECYCLE = {
    "lifecycle.operations.documents": {"main", "settings"},
    "lifecycle.importing.importer": {"settings"},  # says where the imported version is served
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


SERVER = modules("server")
STATEFUL = {**APP, **SERVER, "gunicorn.conf": ROOT / "gunicorn.conf.py"}


@pytest.mark.parametrize("name", APP)
def test_arrows_point_one_way(name: str) -> None:
    """A module imports only parts of app/ that its own part may know, nothing of server or lifecycle."""
    assert {part(one) for one in imports(APP[name])} - {""} <= KNOWS.get(
        part(name), CAPABILITY | {part(name)}
    )
    assert not {one.partition(".")[0] for one in imports(APP[name])} & OUTSIDE


@pytest.mark.parametrize("name", APP)
def test_a_part_does_without_what_is_not_its_business(name: str) -> None:
    """Inference knows no web framework, HTTP no model library, the service nothing of training."""
    libraries = {one.partition(".")[0] for one in imports(APP[name])}
    # Own estimators are made of scikit-learn's classes.
    training = TRAINING - ({"sklearn"} if part(name) == "own" else set())
    assert not libraries & (SHUNS.get(part(name), set()) | training)


@pytest.mark.parametrize("name", [*SERVER, "gunicorn.conf"])
def test_the_server_knows_no_model_library_and_no_lifecycle(name: str) -> None:
    """The outermost ring may import all of app/, but runs no model and needs nothing of the lifecycle."""
    file = SERVER.get(name, ROOT / f"{name}.py")
    libraries = {one.partition(".")[0] for one in imports(file)}
    assert not libraries & (MODEL_LIBRARIES | TRAINING | {"load", "fastapi", "starlette"})


@pytest.mark.parametrize("name", modules("lifecycle"))
def test_the_lifecycle_uses_the_core_and_the_contract(name: str) -> None:
    """The lifecycle shares inference, releases and contract with the service, and nothing of its HTTP."""
    found = imports(modules("lifecycle")[name])
    more = MORE_OF_THE_LIFECYCLE.get(name, set())
    assert {part(one) for one in found} - {""} <= USED_BY_THE_LIFECYCLE | more
    assert "server" not in {one.partition(".")[0] for one in found}


# Module-level names of app/ and server/ that change after the import, each with its reason.
MUTABLE = {
    "app.observability.metrics.samples": "ValueClass, as below: a process without a master counts alone",
    "app.observability.logging.threading": "excepthook: Python's own place for logging a thread's exception",
    "server.fleet.sys": "excepthook: Python's own place for logging an exception",
    "server.metric_files.values": "ValueClass: prometheus_client's own place for how the processes count",
    "server.fleet.base": "WorkerTmp: gunicorn's file for heartbeats, which needs a folder",
}
CHANGING = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft",
    "remove", "setdefault", "update",
}  # fmt: skip


def changed_names(path: Path) -> set[str]:
    """The module-level names that functions of a file change; imported ones where an attribute is set."""
    tree = ast.parse(path.read_text("utf-8"))
    targets = (
        target
        for node in tree.body
        for target in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
    )
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    imported = {alias.asname or alias.name for node in tree.body
                if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}  # fmt: skip
    changed: set[str] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = function.args
        own = {one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        own |= {node.id for node in ast.walk(function)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}  # fmt: skip
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                changed |= set(node.names)
                continue
            target: ast.AST | None = None
            if isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
                target = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                target = node.func.value if node.func.attr in CHANGING else None
            known = names | imported if isinstance(node, ast.Attribute) else names
            if isinstance(target, ast.Name) and target.id in known - own:
                changed.add(target.id)
    return changed


@pytest.mark.parametrize("name", STATEFUL)
def test_no_state_at_module_level(name: str) -> None:
    """State belongs to objects: no function of app/ or server/ changes a module-level name."""
    assert [one for one in sorted(changed_names(STATEFUL[name])) if f"{name}.{one}" not in MUTABLE] == []


def test_listed_exceptions_exist() -> None:
    """Each exception to the rule on module-level state is still needed."""
    changed = {f"{name}.{one}" for name, path in STATEFUL.items() for one in changed_names(path)}
    assert set(MUTABLE) <= changed


def test_importing_opens_reads_and_configures_nothing() -> None:
    """Every module of app/ can be imported without a file, a socket, a thread or a changed setting."""
    everything = {one for path in APP.values() for one in imports(path, top_level_only=True)}
    libraries = {one.rpartition(".")[0] or one for one in everything if not one.startswith("app.")}
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORTING, ",".join(sorted(libraries)), ",".join(APP)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
