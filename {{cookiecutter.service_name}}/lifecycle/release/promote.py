"""Which version serves: release one that was evaluated, or go back to the one before.

    promote: verdict, bytes, golden set -> CHANGELOG.md, release.json -> one commit
    rollback: bytes -> CHANGELOG.md, release.json -> one commit

The running service follows release.json. Neither needs a network; nothing is pushed. Where there is no git,
the files are written all the same.
"""

import json
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from app.core.errors import ArtifactError
from app.core.manifest import Manifest
from app.core.store import MANIFEST, RELEASE, Release, read_artifact, read_release
from lifecycle.package import write_release
from lifecycle.release.evaluate import ROOT, THRESHOLDS, golden_gate, load, sha256, write

CHANGELOG = "CHANGELOG.md"
CARD = "docs/model_card.md"
LIMITS = "## Known limits"


class RefusedError(Exception):
    """Not released; one line."""


def read_verdict(root: Path, version: str) -> dict[str, Any]:
    """The verdict on `version`, if it is of these very bytes, thresholds and rows; raises RefusedError."""
    again = f"make evaluate VERSION={version}"
    try:
        verdict: dict[str, Any] = json.loads((root / "evaluation" / f"{version}.json").read_bytes())
        data = root / verdict["data"]["file"]
        known = {
            "its manifest": (verdict["manifest_sha256"], root / "artifacts" / version / MANIFEST),
            f"evaluation/{THRESHOLDS}": (verdict["thresholds_sha256"], root / "evaluation" / THRESHOLDS),
            # Rows that are kept elsewhere are not here to compare.
            **({verdict["data"]["file"]: (verdict["data"]["sha256"], data)} if data.is_file() else {}),
        }
        changed = [name for name, (then, path) in known.items() if sha256(path) != then]
        failed, passed = verdict["failed"], verdict["passed"]
    except FileNotFoundError:
        raise RefusedError(f"{version} was never evaluated: {again}") from None
    except (ValueError, KeyError, TypeError, OSError):
        raise RefusedError(f"evaluation/{version}.json cannot be read: {again}") from None
    if changed:
        raise RefusedError(f"{version} was evaluated before {changed[0]} changed: {again}")
    if passed is not True:
        reason = failed[0] if failed else "see its report"
        raise RefusedError(f"{version} failed its evaluation: {reason}")
    return verdict


def check(root: Path, version: str, release: Release) -> dict[str, Any]:
    """Every gate of a promotion; the verdict, or RefusedError, or ArtifactError."""
    if release.serving == version:
        raise RefusedError(f"{version} serves already")
    artifact = read_artifact(root / "artifacts", version)
    verdict = read_verdict(root, version)
    if verdict["served"] not in (None, release.serving):
        raise RefusedError(
            f"{version} was compared with {verdict['served']}, and {release.serving} serves now: "
            f"make evaluate VERSION={version}"
        )
    golden = golden_gate(load(artifact))
    if not golden.passed:
        raise RefusedError(golden.found)
    return verdict


def known_limits(root: Path) -> str:
    """What the model card says under "Known limits", in one line."""
    try:
        _, _, section = (root / CARD).read_text("utf-8").partition(f"\n{LIMITS}\n")
    except OSError:
        section = ""
    lines = section.partition("\n## ")[0].splitlines()
    return " ".join(line.lstrip("-* ").strip() for line in lines if line.strip()) or "none stated."


def entry(manifest: Manifest, verdict: dict[str, Any], before: str, limits: str) -> str:
    """What the changelog says of a release."""
    training, data = manifest.training, verdict["data"]
    if training is None:
        trained = "none; its rules are its own source."
    else:
        window = " to ".join(training.date_range) if training.date_range else training.query
        trained = (
            f"{training.rows:,} rows, {window or 'dates not recorded'}; data `{training.data_sha256[:12]}`, "
            f"target `{training.target}`, code `{training.code_revision[:19]}`."
        )
    theirs = verdict["served_metrics"]
    figures = ", ".join(
        f"{name} {value:.4g}" + (f" ({before}: {theirs[name]:.4g})" if name in theirs else "")
        for name, value in verdict["metrics"].items()
    )
    return (
        f"## Model {manifest.version}, {today()}\n"
        f"- Serves in place of `{before}`.\n"
        f"- Training: {trained}\n"
        f"- Quality on {data['rows']:,} rows of `{data['file']}` (`{data['sha256'][:12]}`): {figures}.\n"
        f"- Known limits: {' '.join(limits.split())}\n"
    )


def today() -> str:
    """The date, as a changelog has it."""
    return datetime.now(UTC).date().isoformat()


def with_entry(changelog: str, text: str) -> str:
    """The changelog with an entry above all others."""
    head, found, rest = changelog.partition("\n## ")
    return f"{head.rstrip()}\n\n{text}\n{found[1:]}{rest}" if found else f"{head.rstrip()}\n\n{text}"


@dataclass(frozen=True)
class Repository:
    """The git work tree that holds the service's folder."""

    root: Path

    def git(self, *arguments: str) -> str:
        """What git answers; raises RefusedError with its complaint."""
        done = subprocess.run(  # noqa: S603  # no words but ours
            ["git", "--no-optional-locks", *arguments],  # noqa: S607  # wherever it is installed
            cwd=self.root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            raise RefusedError(f"git {arguments[0]}: {said[:200]}")
        return done.stdout.strip()

    @property
    def here(self) -> bool:
        """Whether there is git, and a work tree that does not ignore this folder."""
        try:
            inside = self.git("rev-parse", "--is-inside-work-tree") == "true"
        except (RefusedError, OSError):
            return False
        try:
            self.git("check-ignore", "--quiet", f"artifacts/{RELEASE}")
        except RefusedError:  # it is not ignored
            return inside
        return False

    def demand_clean(self, *paths: str) -> None:
        """Raise RefusedError where a release would carry, or rest on, what nobody has committed."""
        changed = self.git("status", "--porcelain", "--", *paths).splitlines()
        if changed:
            raise RefusedError(
                f"{changed[0].split()[-1]} has changes that are not committed: commit them first"
            )

    def commit(self, message: str, paths: list[str]) -> None:
        """Commit these paths and nothing else that may be staged; on failure the index is as before."""
        index = self.root / self.git("rev-parse", "--git-path", "index")
        before = index.read_bytes() if index.exists() else None
        try:
            self.git("add", "--", *paths)
            self.git("commit", "--quiet", "--only", "--message", message, "--", *paths)
        except RefusedError:
            if before is not None:
                index.write_bytes(before)
            raise


def switch(root: Path, release: Release, text: str) -> dict[Path, bytes]:
    """Add the entry, then let release.json name the version; what the files held before."""
    changelog, path = root / CHANGELOG, root / "artifacts" / RELEASE
    before = {one: one.read_bytes() for one in (changelog, path) if one.exists()}
    try:
        old = before.get(changelog, b"# Changelog\n").decode()
        write(changelog, with_entry(old, text).encode())
        write_release(root / "artifacts", release)
    except BaseException:
        restore(before)
        raise
    return before


def restore(before: dict[Path, bytes]) -> None:
    """Put files back."""
    for path, content in before.items():
        write(path, content)


def promote(
    version: Annotated[str, typer.Argument(help="The version to release, like v2.")],
    limits: Annotated[
        str | None, typer.Option(envvar="LIMITS", help="Its known limits; else those of the model card.")
    ] = None,
    root: Annotated[Path, typer.Option(help="The service's folder.", hidden=True)] = ROOT,
) -> None:
    """Let an evaluated version serve: release.json, a changelog entry, and a commit of them."""
    repository = Repository(root)
    try:
        release = read_release(root / "artifacts")
        verdict = check(root, version, release)
        manifest = read_artifact(root / "artifacts", version).manifest
        in_git = repository.here
        if in_git:
            repository.demand_clean(f"artifacts/{RELEASE}", CHANGELOG, f"evaluation/{THRESHOLDS}")
        text = entry(manifest, verdict, release.serving, limits or known_limits(root))
        before = switch(root, Release(serving=version, previous=release.serving), text)
        if in_git:
            paths = [f"artifacts/{RELEASE}", CHANGELOG, f"artifacts/{version}", f"evaluation/{version}.json"]
            try:
                repository.commit(f"Release model {version} in place of {release.serving}", paths)
            except BaseException:
                restore(before)
                raise
    except (ArtifactError, RefusedError, OSError) as error:
        typer.echo(f"promote: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{version} serves, {release.serving} is the one to go back to (make rollback)")
    typer.echo(
        "committed, not pushed" if in_git else "no git here: the files are written, nothing is committed"
    )


def rollback(
    root: Annotated[Path, typer.Option(help="The service's folder.", hidden=True)] = ROOT,
) -> None:
    """Let the version before serve again, at once: verified, but asked for nothing else."""
    repository = Repository(root)
    try:
        release = read_release(root / "artifacts")
        version = release.previous
        if version is None:
            raise RefusedError(f"artifacts/{RELEASE} names no previous version")
        read_artifact(root / "artifacts", version)
        text = f"## Model {version} again, {today()}\n- Rolled back from `{release.serving}`.\n"
        switch(root, Release(serving=version, previous=release.serving), text)
    except (ArtifactError, RefusedError, OSError) as error:
        typer.echo(f"rollback: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{version} serves, {release.serving} is the one before (make rollback again undoes this)")
    if not repository.here:
        typer.echo("no git here: the files are written, nothing is committed")
        return
    try:
        repository.commit(
            f"Roll back to model {version} from {release.serving}", [f"artifacts/{RELEASE}", CHANGELOG]
        )
        typer.echo("committed, not pushed")
    except (RefusedError, OSError) as error:  # what serves matters more than its record
        typer.echo(f"rollback: done, but not committed: {error}", err=True)
