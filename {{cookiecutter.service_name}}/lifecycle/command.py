"""Shared by the commands: the service's folder, the error class for people, tables and pictures.

pandas takes a second to import, so the functions that need it import it.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

ROOT = Path(__file__).resolve().parents[1]  # the service's folder
BINS = 10  # of the score
_NUMBER = re.compile(r"[-+]?\.?\d.*|-|n/a|")


class LifecycleError(Exception):
    """A command failed; `lifecycle.__main__` prints the message and exits with 1.

    The message is one line for people. It names the file, version or option that is wrong and, if possible,
    the command that helps.
    """


def sha256(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def door(package: str, name: str, modules: Mapping[str, str]) -> Any:
    """A function from a module of a package, for the package's `__getattr__`."""
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(f"{package}.{modules[name]}"), name)


def read_text(path: Path) -> str:
    """The text of a file; raises LifecycleError if it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise LifecycleError(f"{path.name}: is not UTF-8: save it as UTF-8") from None


def write_file(path: Path, content: bytes) -> None:
    """Replace a file atomically: a running service may read it at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(content)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with padded columns, without a final newline.

    `rows` has one cell per column; cells are converted by `str`. A column is aligned right if every cell is a
    number, empty, "-" or "n/a".
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    padded = []
    for name, *column in zip(*cells, strict=True):
        width = max(3, *map(len, (name, *column)))
        right = all(map(_NUMBER.fullmatch, column))
        rule = "-" * (width - 1) + ":" if right else "-" * width
        shown = [cell.rjust(width) if right else cell.ljust(width) for cell in (name, *column)]
        padded.append([shown[0], rule, *shown[1:]])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*padded, strict=True))


def save_picture(figure: Any, folder: Path, name: str) -> Path:
    """Write a matplotlib figure as SVG into `folder`; characters not allowed in file names become `_`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^\w.-]+", "_", name) + ".svg")
    figure.savefig(path)
    return path


def reliability(scores: ArrayLike, right: ArrayLike) -> Any:
    """A frame with a row per tenth of the score that occurs: count, mean score, share of right answers."""
    import pandas as pd

    rows = pd.DataFrame({"score": scores, "right": right})
    tenths = np.minimum((rows.score * BINS).astype(int), BINS - 1)
    return rows.groupby(tenths).agg(count=("score", "size"), score=("score", "mean"), right=("right", "mean"))


def calibration_error(bins: Any) -> float:
    """Expected calibration error: the distance of score and share of right answers, averaged over rows."""
    return float(np.average((bins.score - bins.right).abs(), weights=bins["count"]))


def plot_reliability(axes: Any, bins: Any) -> None:
    """Draw mean score against share of right answers; larger dots have more rows."""
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--")
    axes.plot(bins.score, bins.right)
    axes.scatter(bins.score, bins.right, 20 + 200 * bins["count"] / bins["count"].sum())
    axes.set(xlabel="score", ylabel="share of right answers", xlim=(0, 1.02), ylim=(-0.02, 1.05))
