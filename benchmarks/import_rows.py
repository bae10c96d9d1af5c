"""How `make import-model` grows with the data: `python -m benchmarks.import_rows`.

render -> its environment -> 100,000 and 1,000,000 rows of 30 columns, the same linear model -> import each
       -> seconds, and the most memory that any of its processes had -> benchmarks/import_rows.md

The rows are those of the breast cancer set that scikit-learn ships, repeated with a jitter of a hundredth of
each column's deviation, as Parquet.
"""

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

from scripts.demo import say
from scripts.render import ROOT, render

WORK = ROOT / "build" / "benchmark-import"
REPORT = ROOT / "benchmarks" / "import_rows.md"
SIZES = (100_000, 1_000_000)
MIB = 2**20

DATA = """
import sys
import joblib, numpy as np, pyarrow as pa, pyarrow.parquet as pq
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

cancer, draw = load_breast_cancer(as_frame=True), np.random.default_rng(0)
rows, target, names = cancer.data.to_numpy(), cancer.target.to_numpy(), list(cancer.data.columns)
joblib.dump(make_pipeline(StandardScaler(), LogisticRegression()).fit(cancer.data, target), "model.joblib")
for size in map(int, sys.argv[1:]):
    writer = None
    for start in range(0, size, 50_000):
        chosen = draw.integers(0, len(rows), min(50_000, size - start))
        part = np.abs(rows[chosen] + draw.normal(0, 0.01, (len(chosen), 30)) * rows.std(axis=0))
        table = pa.table({**dict(zip(names, part.T)), "benign": target[chosen]})
        writer = writer or pq.ParquetWriter(f"{size}.parquet", table.schema)
        writer.write_table(table)
    writer.close()
"""


def prepare() -> Path:
    """A rendered service with its development environment, and the data beside it."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    render(WORK)
    folder = WORK / "iris-classifier"
    subprocess.run(["make", "setup"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    python = folder / ".venv" / "bin" / "python"
    subprocess.run([python, "-c", DATA, *map(str, SIZES)], cwd=WORK, check=True)
    return folder


def measure(service: Path, size: int) -> tuple[float, float, str]:
    """Seconds, MiB of the largest process, and what was said of the rows compared."""
    project = WORK / f"project-{size}"
    shutil.copytree(service, project, ignore=shutil.ignore_patterns(".venv"))
    command: list[str | Path] = [service / ".venv" / "bin" / "python", "-m", "lifecycle", "import-model"]
    given: list[str | Path] = [
        "--model",
        WORK / "model.joblib",
        "--data",
        WORK / f"{size}.parquet",
        "--target",
        "benign",
    ]
    began = time.perf_counter()
    with (WORK / f"{size}.log").open("wb") as log:
        process = subprocess.Popen([*command, *given], cwd=project, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)  # which has the largest of its own children in it
    seconds = time.perf_counter() - began
    lines = (WORK / f"{size}.log").read_text("utf-8").splitlines()
    if status:
        raise SystemExit("\n".join(lines))
    (compared,) = (line.partition("compared on ")[2] for line in lines if "compared on" in line)
    return seconds, usage.ru_maxrss * 1024 / MIB, compared


def report(measured: dict[int, tuple[float, float, str]]) -> str:
    """The figures as Markdown."""
    small, large = (measured[size] for size in SIZES)
    lines = [
        "# Importing a model: rows, seconds, memory",
        "",
        f"Written by `python -m benchmarks.import_rows`: 30 columns of Parquet, a linear model, "
        f"{os.cpu_count()} processors, Python {platform.python_version()}. Memory is the largest process's.",
        "",
        "| rows | seconds | MiB | answers compared on |",
        "|--:|--:|--:|---|",
        *(
            f"| {size:,} | {seconds:.1f} | {memory:.0f} | {compared} |"
            for size, (seconds, memory, compared) in measured.items()
        ),
        "",
        f"Ten times the rows: {large[0] / small[0]:.1f} times as long, "
        f"{large[1] / small[1]:.2f} times the memory. The aim is at most ten times, and flat.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and keep the figures."""
    say("rendering, setting up, making data")
    service = prepare()
    measured = {}
    for size in SIZES:
        say(f"importing {size:,} rows")
        measured[size] = measure(service, size)
    text = report(measured)
    REPORT.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
