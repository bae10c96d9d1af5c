"""Which version serves: release one that was evaluated, or go back to the one before.

promote: verdict, files, golden set -> CHANGELOG.md, release.json -> one commit
rollback: files -> CHANGELOG.md, release.json -> one commit

The running service follows release.json. Neither needs a network, and nothing is pushed. Without git the
files are written all the same.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from app.core.pipeline import Pipeline
from app.core.store import MANIFEST, RELEASE, Manifest, Release, read_artifact, read_release
from lifecycle.errors import LifecycleError
from lifecycle.files import ROOT, sha256, write_file
from lifecycle.package import write_release
from lifecycle.release.documents import THRESHOLDS, Verdict

CHANGELOG = "CHANGELOG.md"
CARD = "docs/model_card.md"
LIMITS = "## Known limits"


@dataclass(frozen=True)
class Switched:
    """A release that was written; `committed` is False without git, or if the commit failed."""

    release: Release
    committed: bool
    failure: str = ""  # of the commit


def promote(version: str, *, limits: str | None = None, root: Path = ROOT) -> Switched:
    """Let `version` serve in `root`: writes release.json and a changelog entry, and commits them.

    `limits` are its known limits, by default those in the model card. Raises ArtifactError or LifecycleError
    unless the version passed an evaluation of these very files, thresholds and rows against what serves now;
    then, and if the commit fails, nothing is changed.
    """
    release, repository = read_release(root / "artifacts"), Repository(root)
    manifest, verdict = check(root, version, release)
    in_git = repository.found
    if in_git:
        repository.demand_clean(f"artifacts/{RELEASE}", CHANGELOG, f"evaluation/{THRESHOLDS}")
    text = entry(manifest, verdict, release.serving, limits or known_limits(root))
    after = Release(serving=version, previous=release.serving)
    with undone_on_failure(root / CHANGELOG, root / "artifacts" / RELEASE):
        switch(root, after, text)
        if in_git:
            paths = [f"artifacts/{RELEASE}", CHANGELOG, f"artifacts/{version}", f"evaluation/{version}.json"]
            repository.commit(f"Release model {version} in place of {release.serving}", paths)
    return Switched(after, in_git)


def rollback(*, root: Path = ROOT) -> Switched:
    """Let the previous version serve again, once its files are verified; nothing else is asked of it.

    A commit that fails takes nothing back: what serves matters more than its record. Raises ArtifactError or
    LifecycleError if there is no previous version, or not a whole one.
    """
    release, repository = read_release(root / "artifacts"), Repository(root)
    if release.previous is None:
        raise LifecycleError(f"artifacts/{RELEASE} names no previous version")
    read_artifact(root / "artifacts", release.previous)
    after = Release(serving=release.previous, previous=release.serving)
    switch(
        root, after, f"## Model {after.serving} again, {today()}\n- Rolled back from `{after.previous}`.\n"
    )
    if not repository.found:
        return Switched(after, committed=False)
    try:
        message = f"Roll back to model {after.serving} from {after.previous}"
        repository.commit(message, [f"artifacts/{RELEASE}", CHANGELOG])
    except (LifecycleError, OSError) as error:
        return Switched(after, committed=False, failure=str(error))
    return Switched(after, committed=True)


def check(root: Path, version: str, release: Release) -> tuple[Manifest, Verdict]:
    """Manifest and verdict of a version that may be promoted; raises ArtifactError or LifecycleError."""
    if release.serving == version:
        raise LifecycleError(f"{version} serves already")
    artifact = read_artifact(root / "artifacts", version)
    verdict = read_verdict(root, version)
    if verdict.served not in (None, release.serving):
        raise LifecycleError(
            f"{version} was compared with {verdict.served}, and {release.serving} serves now: "
            f"make evaluate VERSION={version}"
        )
    Pipeline.offline(artifact).model.replay()
    return artifact.manifest, verdict


def read_verdict(root: Path, version: str) -> Verdict:
    """The verdict on `version`, if it passed with these files, thresholds and rows; else LifecycleError."""
    again = f"make evaluate VERSION={version}"
    try:
        verdict = Verdict.model_validate_json((root / "evaluation" / f"{version}.json").read_bytes())
    except FileNotFoundError:
        raise LifecycleError(f"{version} was never evaluated: {again}") from None
    except (ValidationError, OSError):
        raise LifecycleError(f"evaluation/{version}.json cannot be read: {again}") from None
    known = [
        ("its manifest", verdict.manifest_sha256, root / "artifacts" / version / MANIFEST),
        (f"evaluation/{THRESHOLDS}", verdict.thresholds_sha256, root / "evaluation" / THRESHOLDS),
    ]
    data = root / verdict.data.file
    if data.is_file():  # rows that are kept elsewhere cannot be compared
        known.append((verdict.data.file, verdict.data.sha256, data))
    for name, then, path in known:
        if sha256(path) != then:
            raise LifecycleError(f"{version} was evaluated before {name} changed: {again}")
    if not verdict.passed:
        raise LifecycleError(f"{version} failed its evaluation: {(*verdict.failed, 'see its report')[0]}")
    return verdict


def known_limits(root: Path) -> str:
    """The section "Known limits" of the model card, in one line."""
    card = root / CARD
    _, _, section = (card.read_text("utf-8") if card.is_file() else "").partition(f"\n{LIMITS}\n")
    lines = section.partition("\n## ")[0].splitlines()
    return " ".join(line.lstrip("-* ").strip() for line in lines if line.strip()) or "none stated."


def entry(manifest: Manifest, verdict: Verdict, before: str, limits: str) -> str:
    """The changelog entry of a release."""
    training, data, theirs = manifest.training, verdict.data, verdict.served_metrics
    if training is None:
        trained = "none; its rules are its own source."
    else:
        window = " to ".join(training.date_range) if training.date_range else training.query
        trained = (
            f"{training.rows:,} rows, {window or 'dates not recorded'}; data `{training.data_sha256[:12]}`, "
            f"target `{training.target}`, code `{training.code_revision[:19]}`."
        )
    figures = ", ".join(
        f"{name} {value:.4g}" + (f" ({before}: {theirs[name]:.4g})" if name in theirs else "")
        for name, value in verdict.metrics.items()
    )
    return (
        f"## Model {manifest.version}, {today()}\n"
        f"- Serves in place of `{before}`.\n"
        f"- Training: {trained}\n"
        f"- Quality on {data.rows:,} rows of `{data.file}` (`{data.sha256[:12]}`): {figures}.\n"
        f"- Known limits: {' '.join(limits.split())}\n"
    )


def today() -> str:
    """The date, as a changelog has it."""
    return datetime.now(UTC).date().isoformat()


def switch(root: Path, release: Release, text: str) -> None:
    """Put the entry above all others in the changelog, then write release.json; both, or neither."""
    path = root / CHANGELOG
    old = path.read_bytes().decode() if path.exists() else "# Changelog\n"
    head, found, rest = old.partition("\n## ")
    older = f"\n## {rest}" if found else ""
    with undone_on_failure(path):
        write_file(path, f"{head.rstrip()}\n\n{text}{older}".encode())
        write_release(root / "artifacts", release)


@contextmanager
def undone_on_failure(*paths: Path) -> Iterator[None]:
    """Put these files back as they are now if what is done meanwhile fails."""
    before = {path: path.read_bytes() for path in paths if path.exists()}
    try:
        yield
    except BaseException:
        for path, content in before.items():
            write_file(path, content)
        raise


@dataclass(frozen=True)
class Repository:
    """The git work tree that holds the service's folder."""

    root: Path

    def git(self, *arguments: str) -> str:
        """The output of git; raises LifecycleError with its complaint."""
        done = subprocess.run(  # noqa: S603  # only arguments from this module
            ["git", "--no-optional-locks", *arguments],  # noqa: S607  # wherever it is installed
            cwd=self.root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            raise LifecycleError(f"git {arguments[0]}: {said[:200]}")
        return done.stdout.strip()

    @property
    def found(self) -> bool:
        """Whether there is git, and a work tree that does not ignore this folder."""
        try:
            inside = self.git("rev-parse", "--is-inside-work-tree") == "true"
        except (LifecycleError, OSError):
            return False
        try:
            self.git("check-ignore", "--quiet", f"artifacts/{RELEASE}")
        except LifecycleError:  # it is not ignored
            return inside
        return False

    def demand_clean(self, *paths: str) -> None:
        """Raise LifecycleError if one of these files has changes that are not committed."""
        changed = self.git("status", "--porcelain", "--", *paths).splitlines()
        if changed:
            raise LifecycleError(
                f"{changed[0].split()[-1]} has changes that are not committed: commit them first"
            )

    def commit(self, message: str, paths: list[str]) -> None:
        """Commit these paths, and nothing else that is staged; on failure the index is as before."""
        index = self.root / self.git("rev-parse", "--git-path", "index")
        before = index.read_bytes() if index.exists() else None
        try:
            self.git("add", "--", *paths)
            self.git("commit", "--quiet", "--only", "--message", message, "--", *paths)
        except LifecycleError:
            if before is not None:
                index.write_bytes(before)
            raise
