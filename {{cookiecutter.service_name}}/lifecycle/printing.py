"""How commands show tables: Markdown that a terminal shows in columns and a pull request renders."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"[-+]?\.?\d.*|-|n/a|")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with padded columns, without a final newline.

    `rows` has one cell per column; cells are converted by `str`. A column in which every cell is a number,
    empty, "-" or "n/a" is aligned right.
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    columns = list(zip(*cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [all(map(_NUMBER.fullmatch, column[1:])) for column in columns]
    rule = ["-" * (width - 1) + ":" if one else "-" * width for width, one in zip(widths, right, strict=True)]
    padded = [
        [
            cell.rjust(width) if one else cell.ljust(width)
            for cell, width, one in zip(row, widths, right, strict=True)
        ]
        for row in cells
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:]))


def save_picture(figure: Any, folder: Path, name: str) -> Path:
    """Write a matplotlib figure as SVG into `folder`; characters that file names may not have become `_`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^\w.-]+", "_", name) + ".svg")
    figure.savefig(path)
    return path
