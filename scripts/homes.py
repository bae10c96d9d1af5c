"""Makes the services that the machinery has to work in, for `make prove`: `python -m scripts.homes`.

render -> build/homes/default, build/homes/all-capabilities
render, import a model of tests/models.py -> build/homes/classifier, build/homes/regressor
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.render import ROOT, render

BIN = Path(".venv", "Scripts" if os.name == "nt" else "bin")
ALL = json.loads((ROOT / "cookiecutter.json").read_text("utf-8"))["_capabilities"]
HOMES = ROOT / "build" / "homes"
# Booleans with nulls, closed text and odd names; a regressor below zero.
IMPORTED = {"classifier": "economical", "regressor": "beyond"}


def run(folder: Path, *command: str | Path) -> None:
    """Runs a command of the service, which has to work."""
    subprocess.run(command, cwd=folder, check=True)


def make() -> None:
    """Makes all of them anew, with one environment for those that need the same packages."""
    shutil.rmtree(HOMES, ignore_errors=True)
    render(HOMES, "service_name=default")
    render(HOMES, "service_name=all-capabilities", f"capabilities={' '.join(ALL)}")
    default = HOMES / "default"
    for folder in (default, HOMES / "all-capabilities"):
        run(folder, "make", "setup")
    uv = shutil.which("uv")
    install: list[str | Path] = (
        [uv, "pip", "install", "--python", BIN / "python"] if uv else [BIN / "python", "-m", "pip", "install"]
    )
    run(default, *install, "--require-hashes", "--requirement", ROOT / "requirements" / "models.txt")
    for name, case in IMPORTED.items():
        render(HOMES, f"service_name={name}")
        folder, given = HOMES / name, HOMES / "models" / case
        (folder / ".venv").symlink_to(default / ".venv")
        run(folder, BIN / "python", "-W", "ignore", ROOT / "tests" / "models.py", given.parent, case)
        (model,), (data,), (held,) = (given.glob(f"{one}.*") for one in ("model", "train", "holdout"))
        target = json.loads((given / "expected.json").read_text("utf-8"))["target"]
        imported: list[str | Path] = ["--model", model, "--data", data, "--target", target, "--holdout", held]
        run(folder, BIN / "python", "-m", "lifecycle", "import-model", *imported)


if __name__ == "__main__":
    try:
        make()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
