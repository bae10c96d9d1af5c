"""The command `import-model`: reads the command line, calls `lifecycle.importing.import_model`, prints."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lifecycle.errors import LifecycleError
from lifecycle.files import ROOT
from lifecycle.importing.documents import Runtime
from lifecycle.importing.importer import ARTIFACTS, Request
from lifecycle.importing.importer import import_model as run


def import_model(
    model: Annotated[
        Path, typer.Option(help="A fitted estimator from joblib or pickle, a torch module, or an ONNX file.")
    ],
    data: Annotated[Path, typer.Option(help="Its training data: .csv, .parquet, .jsonl or .arrow.")],
    target: Annotated[str, typer.Option(help="The column that the model predicts.")],
    runtime: Annotated[
        Runtime, typer.Option(help="`onnx`, or `skops`: scikit-learn itself, for what has no ONNX form.")
    ] = "onnx",
    trust: Annotated[
        str, typer.Option(help="Types of your own that skops may load, by full name, with commas.")
    ] = "",
    trust_listed: Annotated[
        bool, typer.Option("--trust-listed", help="Trust every type that the model is made of.")
    ] = False,
    bounds: Annotated[
        list[str] | None,
        typer.Option(help="Refuse values beyond these: --bounds 'age=0:120'. May be repeated."),
    ] = None,
    review_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Below this score, `action` is `review` (0.6).")
    ] = None,
    feedback_tolerance: Annotated[
        float | None, typer.Option(min=0, help="A value so close to the truth counts as correct.")
    ] = None,
    holdout: Annotated[
        Path | None,
        typer.Option(help="Rows with their truth that training never saw, for `make evaluate`."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the repository differs.")
    ] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Then serve exactly this version.")] = False,
) -> None:
    """Bring your own model: from MODEL, its training DATA and the TARGET column to a served version.

    The contract (names, types, missing values, categories, ranges) is inferred from all rows. The model is
    converted to ONNX and has to give the answers of the original on the data. Then the next version folder
    is written, with a golden set and a drift baseline, and the API description and documents follow.

    If the inputs or labels are new, app/schemas/predict.py is rewritten, v0 becomes a stub, and the version
    is released; otherwise `make promote` releases it. The same inputs give the same bytes, and any failure
    leaves the repository as it was.
    """
    own = [name for name in trust.split(",") if name]
    request = Request(
        model, data, target, runtime, own, trust_listed, parsed_bounds(bounds or []), review_threshold,
        feedback_tolerance, holdout,
    )  # fmt: skip
    try:
        made = run(request, check=check)
    except KeyboardInterrupt:
        typer.echo("import-model: stopped; nothing was changed", err=True)
        raise typer.Exit(130) from None
    if check and made.changes:
        raise LifecycleError(f"differs from what these inputs make: {', '.join(made.changes)}")
    for name in made.changes:
        typer.echo(f"{name}: {'written' if (ROOT / name).exists() else 'removed'}")
    if not made.changes:
        typer.echo(f"{ARTIFACTS / made.version}: unchanged")
    if serve:
        serve_version(made.version)


def serve_version(version: str) -> None:
    """Become the server, with this very version."""
    address = f"http://127.0.0.1:{os.environ.get('APP_PORT', 8000)}/docs"
    typer.echo(f"serving {version}; docs: {address}   stop: Ctrl-C")
    own = {"APP_MODEL_VERSION": version, "APP_LOG_FORMAT": os.environ.get("APP_LOG_FORMAT", "console")}
    os.chdir(ROOT)
    command = [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py", "app.main:create_app()"]
    os.execve(sys.executable, command, {**os.environ, **own})  # noqa: S606  # no shell


def parsed_bounds(given: Sequence[str]) -> dict[str, tuple[float | None, float | None]]:
    """`age=0:120` by name; either side may be left out."""
    found = {}
    for text in given:
        name, _, limits = text.rpartition("=")
        match = re.fullmatch(r"([^:]*):([^:]*)", limits)
        try:
            if not name or not match:
                raise ValueError
            found[name] = (float(match[1]) if match[1] else None, float(match[2]) if match[2] else None)
        except ValueError:
            raise LifecycleError(f"--bounds {text}: write name=least:greatest, like age=0:120") from None
    return found
