"""Imports the corpus by the one command, and compares what is served with the originals.

case -> fitted (cases.py) -> `import-model` into a copy of a rendered service -> asked (ask.py) -> Result:
    equal    every answer is the original's, alone and in batches, gaps and unseen words included
    refused  in one line
    wrong    taken, and an answer is another; or a refusal that is no line

`python -m tests.corpus.run SERVICE [CASE...]` prints the results; SERVICE is a render with its environment,
and in it what requirements/models.txt locks. With --document, docs/models.md is written anew.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DOCUMENT = ROOT / "docs" / "models.md"
BIN = Path(".venv", "Scripts" if os.name == "nt" else "bin")
CASES, FIELD = (
    re.findall(r'(?m)^def (\w+)\(\) -> Case:\n    """(.*)"""', (HERE / name).read_text("utf-8"))
    for name in ("cases.py", "field.py")
)
LIMIT = 300  # characters of a refusal


@dataclass
class Result:
    """How a case went."""

    name: str
    verdict: str  # equal, refused, wrong
    said: str  # the last line of the import, or what is wrong
    runtime: str = ""
    served: float = 0.0  # rows a second at one row a call
    original: float = 0.0
    seconds: float = 0.0  # of the import
    output: str = ""


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command's end, with both streams as they came."""
    kept = {name: one for name, one in os.environ.items() if not name.startswith(("APP_", "MAKE", "MFLAGS"))}
    # One thread each, so that neither cases nor the two sides of a comparison disturb each other.
    env = kept | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8", errors="backslashreplace",
    )  # fmt: skip


def try_case(base: Path, name: str, work: Path, libraries: str = "") -> Result:
    """Fit, import and ask one case; `libraries` is a PYTHONPATH for those that the environment lacks."""
    python = base / BIN / "python"
    more = {"PYTHONPATH": libraries} if libraries else {}
    if not (work / "models" / name / "asked.json").is_file():
        fitted = run(python, HERE / "cases.py", work / "models", name, cwd=work, **more)
        if fitted.returncode:
            raise RuntimeError(f"{name} cannot be fitted: {fitted.stdout[-2_000:]}")
    case = work / "models" / name
    asked = json.loads((case / "asked.json").read_text("utf-8"))
    service = work / "services" / name
    shutil.rmtree(service, ignore_errors=True)
    ignored = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", ".import")
    shutil.copytree(base, service, ignore=ignored)
    (service / ".venv").symlink_to(base / ".venv")
    if asked["own"]:
        shutil.copyfile(HERE / "own.py", service / "app" / "own" / "features.py")
    (model,), (data,) = case.glob("model.*"), case.glob("train.*")
    start = time.monotonic()
    given: list[str | Path] = ["--model", model, "--data", data, "--target", asked["target"]]
    for held in case.glob("holdout.*"):
        given += ["--holdout", held]
    ended = run(python, "-m", "lifecycle", "import-model", *given, cwd=service, **more)
    result = Result(name, "equal", "", seconds=time.monotonic() - start, output=ended.stdout)
    result.original = asked["rows_a_second"]
    lines = ended.stdout.strip().splitlines() or [""]
    if ended.returncode:
        result.said = lines[-1].removeprefix("import-model: ")
        plain = "Traceback" not in ended.stdout and lines[-1].startswith("import-model: ")
        result.verdict = "refused" if plain and len(lines[-1]) <= LIMIT else "wrong"
        return result
    answered = run(python, HERE / "ask.py", case, cwd=service, PYTHONPATH=str(service))
    try:
        found: dict[str, Any] = json.loads(answered.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        result.verdict, result.said = "wrong", f"cannot be asked: {answered.stdout[-1_500:]}"
        return result
    result.runtime, result.served = found["runtime"], found["rows_a_second"]
    if found["wrong"]:
        result.verdict, result.said = "wrong", f"{len(found['wrong'])} answers: {found['wrong'][0]}"
    shutil.rmtree(service)
    return result


def document(results: list[Result]) -> str:
    """docs/models.md."""
    described, counts = dict(CASES), Counter(one.verdict for one in results)
    lines = [
        "# Models that were tried",
        "",
        f"{len(results)} models as people write them ([cases.py](../tests/corpus/cases.py)) were imported "
        "by the one command, without options, and asked alone and in batches, with every gap and unseen word "
        f"that columns can have. {counts['equal']} answer as the original does, {counts['refused']} are "
        f"refused with the reason, and {counts['wrong']} were taken and answer otherwise.",
        "",
        "Rows a second are of processor time, at one row a call: the service's pipeline with its checks, "
        "without HTTP, and the original's own `predict_proba` or `predict` on a DataFrame of one row. Only "
        "the ratio says something about another machine.",
        "",
        "In the template, `make corpus ARGS=--document` writes this page.",
        "",
        "| model | what it is | runtime | rows/s | original | times |",
        "|---|---|---|--:|--:|--:|",
    ]
    for one in results:
        if one.verdict == "equal":
            speeds = (
                f"{one.runtime} | {one.served:,.0f} | {one.original:,.0f} | {one.served / one.original:,.0f}"
            )
        else:
            speeds = f"{one.verdict} | | {one.original:,.0f} |"
        lines.append(f"| {one.name} | {described[one.name]} | {speeds} |")
    lines += ["", "## Refused", "", "| model | the line |", "|---|---|"]
    lines += [
        f"| {one.name} | {one.said.replace('|', chr(92) + '|')} |"
        for one in results
        if one.verdict != "equal"
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Try the cases; 1 if one was taken and answers otherwise."""
    parser = argparse.ArgumentParser(description="Import the corpus and compare.")
    parser.add_argument("service", type=Path)
    parser.add_argument("cases", nargs="*")
    parser.add_argument(
        "--torch", default="", help="a folder with torch in it; without, its cases are left out"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=Path, help="keep fitted models in this folder")
    parser.add_argument("--document", action="store_true", help=f"write {DOCUMENT.name}")
    asked = parser.parse_args()
    names = asked.cases or [name for name, _ in CASES if asked.torch or not name.startswith("torch")]
    with tempfile.TemporaryDirectory() as folder:
        work = (asked.work or Path(folder)).absolute()
        work.mkdir(exist_ok=True, parents=True)

        def attempt(name: str) -> Result:
            libraries = asked.torch if name.startswith("torch") else ""
            result = try_case(asked.service.absolute(), name, work, libraries)
            print(
                f"{result.verdict:8}{name:28}{result.runtime:6}{result.seconds:6.1f} s  {result.said}",
                flush=True,
            )
            return result

        with ThreadPoolExecutor(asked.jobs) as pool:
            results = list(pool.map(attempt, names))
    print(dict(Counter(one.verdict for one in results)))
    if asked.document:
        DOCUMENT.write_text(document(results), "utf-8")
    return int(any(one.verdict == "wrong" for one in results))


if __name__ == "__main__":
    sys.exit(main())
