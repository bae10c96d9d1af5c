"""The commands of a release: their arguments and what they print. The modules beside this do the work."""

from pathlib import Path
from typing import Annotated

import typer

from lifecycle import release
from lifecycle.files import ROOT
from lifecycle.operations.monitor import Prometheus, Scrape, Window
from lifecycle.printing import table
from lifecycle.release.checklist import folder_of
from lifecycle.release.promotion import Switched
from lifecycle.release.rollout import comparison, draw

Version = Annotated[str, typer.Argument(help="The version, like v2.")]
Beside = Annotated[str, typer.Option(envvar="VERSION", help="The version, like v2; empty ends it.")]
Root = Annotated[Path, typer.Option(help="The service's folder.", hidden=True)]
Artifacts = Annotated[Path, typer.Option(help="Folder of the versions and of release.json.")]


def evaluate(
    version: Version,
    data: Annotated[
        Path | None,
        typer.Option(envvar="DATA", help="Rows whose truth is known: .csv, .parquet, .jsonl or .arrow."),
    ] = None,
    target: Annotated[str | None, typer.Option(envvar="TARGET", help="The column with the truth.")] = None,
    root: Root = ROOT,
) -> None:
    """Hold a version to evaluation/thresholds.toml: golden set, quality, slices, and the served version."""
    found = release.evaluate(version, data=data, target=target, root=root)
    gates = [("ok" if one.passed else "FAILED", one.name, one.found, one.needed) for one in found.gates]
    typer.echo(table(("", "gate", "found", "needed"), gates))
    typer.echo(f"report: {root / 'build' / f'evaluation-{version}' / 'report.md'}")
    for line in found.failed:
        typer.echo(f"evaluate: {version}: {line}", err=True)
    if found.failed:
        raise typer.Exit(1)
    typer.echo(f"{version} passed: make promote VERSION={version}")


def promote(
    version: Version,
    limits: Annotated[
        str | None, typer.Option(envvar="LIMITS", help="Its known limits; else those of the model card.")
    ] = None,
    root: Root = ROOT,
) -> None:
    """Let an evaluated version serve: release.json, a changelog entry, and a commit of them."""
    _tell("promote", release.promote(version, limits=limits, root=root), "make rollback goes back")


def rollback(root: Root = ROOT) -> None:
    """Let the previous version serve again, at once: verified, but asked for nothing else."""
    _tell("rollback", release.rollback(root=root), "make rollback again undoes this")


def _tell(command: str, done: Switched, undo: str) -> None:
    typer.echo(f"{done.release.serving} serves in place of {done.release.previous} ({undo})")
    if done.failure:
        typer.echo(f"{command}: done, but not committed: {done.failure}", err=True)
    elif done.committed:
        typer.echo("committed, not pushed")
    else:
        typer.echo("no git here: the files are written, nothing is committed")


def shadow(version: Beside = "", artifacts: Artifacts = ROOT / "artifacts") -> None:
    """Ask VERSION what clients ask, after they got their answer; clients never see its answers."""
    release.shadow(version or None, artifacts=artifacts)
    typer.echo(f"shadow: {version or 'none'}; a running service follows within seconds")


def canary(
    version: Beside = "",
    percent: Annotated[int, typer.Option(envvar="PERCENT", min=0, max=100, help="Of the clients.")] = 10,
    artifacts: Artifacts = ROOT / "artifacts",
) -> None:
    """Let VERSION answer PERCENT of the clients, until it does worse than the served version."""
    after = release.canary(version or None, percent, artifacts=artifacts)
    share = f"{after.canary_percent}% of clients"
    typer.echo(f"canary: {version or 'none'}, {share}; a running service follows within seconds")


def compare(
    prometheus: Prometheus = "http://127.0.0.1:9090",
    metrics: Scrape = None,
    window: Window = "1h",
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = ROOT / "build" / "compare.svg",
) -> None:
    """Put served version, canary and shadow side by side: traffic, agreement, failures, latency, scores."""
    found = release.compare(prometheus, window, metrics)
    typer.echo(comparison(found))
    draw(found, picture)
    typer.echo(f"picture: {picture}")


def release_check(version: Version, root: Root = ROOT) -> None:
    """Run every line of the release checklist that can be run, and list the lines that people must sign."""
    rows = []
    for one in release.release_check(version, root=root):
        text = f"{one.command}: {one.text}" if one.command else one.text
        rows.append((one.outcome, f"{one.seconds:.0f} s" if one.command else "", text))
        if one.command:
            typer.echo(f"release-check: {one.outcome} {one.command}", err=True)
        if one.output:
            typer.echo(one.output, err=True)
    typer.echo(table(("", "took", "line"), rows))
    passed, failed, to_sign = ([row[0] for row in rows].count(one) for one in ("PASS", "FAIL", "SIGN"))
    copy = folder_of(version, root) / "release_checklist.md"
    typer.echo(f"{passed} passed, {failed} failed, {to_sign} to be signed in {copy}")
    if failed:
        raise typer.Exit(1)


def new_key(path: Annotated[Path, typer.Argument(help="Where to write the private key, in PEM.")]) -> None:
    """Make a key pair: a private key to sign versions with, and its public key for APP_TRUSTED_KEYS."""
    public = release.new_key(path)
    typer.echo(f"{path}: private key without a password; keep it secret, and out of git")
    typer.echo(f"APP_TRUSTED_KEYS={public}")


def sign(
    version: Version,
    key: Annotated[Path, typer.Option(help="The private key, as `new-key` writes it.")],
    root: Root = ROOT,
) -> None:
    """Sign a version with a private key, for services that run with APP_TRUSTED_KEYS."""
    public = release.sign(version, key, root=root)
    typer.echo(f"artifacts/{version}/manifest.sig: signed by {public}")
