"""The commands of operations: their arguments and what they print. The modules beside this do the work."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lifecycle import operations
from lifecycle.errors import LifecycleError
from lifecycle.files import ROOT
from lifecycle.operations.sources import Prometheus, Scrape, Window

BUILD = ROOT / "build"
Pictures = Annotated[Path, typer.Option(help="Where pictures go.")]


def drift(
    prometheus: Prometheus = "http://127.0.0.1:9090",
    metrics: Scrape = None,
    logs: Annotated[
        Path | None, typer.Option(envvar="LOGS", help="Or read the `drift` lines of a log.")
    ] = None,
    window: Window = "1h",
    artifacts: Annotated[Path, typer.Option(help="Folder of the versions.")] = ROOT / "artifacts",
    pictures: Pictures = BUILD,
) -> None:
    """Say how far inputs and predictions have moved from training (PSI), and draw what drifted."""
    from lifecycle.operations.drift import draw, drift_table

    found = operations.moved(prometheus, window, metrics=metrics, logs=logs, artifacts=artifacts)
    typer.echo(drift_table(found))
    for one in found:
        if one.verdict == "drifted":
            typer.echo(f"picture: {draw(one, pictures)}")


def quality(
    logs: Annotated[Path | None, typer.Option(envvar="LOGS", help="The service's log.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            envvar="LABELS", help="CSV or JSON lines: prediction_id, label; else feedback in the log."
        ),
    ] = None,
    pictures: Pictures = BUILD,
) -> None:
    """Say how often each version was right, and whether its scores mean what they say."""
    from lifecycle.operations.quality import draw, report

    if logs is None:
        raise LifecycleError("say which log: LOGS=service.log")
    for version, known in operations.judged(logs, labels).items():
        typer.echo(f"{report(version, known)}\n\npicture: {draw(version, known, pictures)}\n")


def size(
    seconds: Annotated[float, typer.Option(help="How long each of the four steps takes.")] = 2.0,
) -> None:
    """Say how many workers this model and this machine carry, from a measurement."""
    from app.rollout.fleet import machine
    from lifecycle.operations.size import report

    typer.echo(report(operations.measure(seconds), machine()))


def sbom(
    output: Annotated[Path, typer.Option(help="Where it is written.")] = BUILD / "sbom.json",
) -> None:
    """Write down what the image is made of, as a CycloneDX bill of materials."""
    bill = operations.bill_of_materials()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(bill, ensure_ascii=False, indent=1) + "\n", "utf-8")
    models = sum(one["type"] == "machine-learning-model" for one in bill["components"])
    typer.echo(f"{output}: {len(bill['components']) - models} packages, {models} models")


def runbooks(
    output: Annotated[Path, typer.Option(help="Where to write it.")] = BUILD / "runbooks.md",
) -> None:
    """Write all runbooks into one file for a wiki; fails, a line each, where a link leads nowhere."""
    document, problems, unchecked = operations.wiki()
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(document, "utf-8", newline="\n")
    for link in unchecked:
        typer.echo(f"not checked, because it leads elsewhere: {link}")
    typer.echo(f"{output}: every link to a page of this project leads somewhere")


def docs(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if something differs.")] = False,
    openapi: Annotated[
        bool, typer.Option("--openapi", help="Write openapi.json too, whatever clients that breaks.")
    ] = False,
) -> None:
    """Write what the documents say of the contract and of the served version."""
    differing = operations.refresh(check=check, openapi=openapi)
    for name in differing:
        words = "differs; python -m lifecycle docs writes it" if check else "written"
        typer.echo(f"{name}: {words}", err=check)
    if check and differing:
        raise typer.Exit(1)


def gameday(
    keep: Annotated[Path | None, typer.Option(help="Keep logs and configurations in this folder.")] = None,
) -> None:
    """Inject every fault; show that each alert fires, has its runbook, and resolves. Ten minutes."""
    raise typer.Exit(0 if operations.hold_gameday(keep) else 1)
