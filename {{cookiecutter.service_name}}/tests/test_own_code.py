"""Code in app/own is shared by training and serving, so it may depend on little and do nothing when imported.

app/own/*.py -> imports of the file; a new process that imports it and watches
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

OWN = sorted((ROOT / "app" / "own").glob("*.py"))

# Libraries are loaded first; everything that happens afterwards is done by the module itself.
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
        [sys.executable, "-c", WATCH, module, *libraries],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"import {module}: {done.stderr.strip()}; move this into a function"
