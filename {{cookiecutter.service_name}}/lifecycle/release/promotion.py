"""Changes of the served version: promote an evaluated version, roll back, sign, run the release checklist.

promote: verdict, files, golden set -> CHANGELOG.md, documents, release.json -> one commit
rollback: files -> CHANGELOG.md, documents, release.json -> one commit
release_check: docs/release_checklist.md -> each command is run, the other lines are for people
new_key, sign: a private key -> artifacts/v2/manifest.sig, for services that run with APP_TRUSTED_KEYS

The running service follows release.json. A promotion or rollback needs no network and pushes nothing. Without
git, the files are written but not committed.
"""

import json
import os
import re
import shlex
import subprocess
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from pydantic import ValidationError

from app.core.errors import ArtifactError
from app.core.pipeline import Pipeline
from app.core.store import MANIFEST, RELEASE, SIGNATURE, Manifest, Release, read_artifact, read_release
from lifecycle.command import ROOT, LifecycleError, read_text, sha256, table, write_file
from lifecycle.operations.documents import DOCUMENTS, documents
from lifecycle.package import write_release
from lifecycle.release.evaluation import THRESHOLDS, Root, Verdict, Version

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

CHANGELOG = "CHANGELOG.md"
CARD = "docs/model_card.md"
LIMITS = "## Known limits"
CHECKLIST = "docs/release_checklist.md"
LINE = re.compile(r"- \[ \] (?:Run `([^`]+)`|Sign): (.+)")
COMMITTED = "committed, not pushed"
WITHOUT_GIT = "no git here: the files are written, nothing is committed"
LAST_LINES = 15  # of the output of a failed command


def promote(
    version: Version,
    *,
    limits: Annotated[
        str | None, typer.Option(envvar="LIMITS", help="Known limits; by default from the model card.")
    ] = None,
    root: Root = ROOT,
) -> None:
    """Let an evaluated version serve: update release.json, changelog and documents, and commit them.

    Refused unless the version passed an evaluation with the present files, thresholds and rows against the
    present served version. If it is refused or the commit fails, nothing is changed.
    """
    release = read_release(root / "artifacts")
    manifest, verdict = check(root, version, release)
    texts, in_git = told(root, version), has_git(root)
    if in_git:
        paths = [f"artifacts/{RELEASE}", CHANGELOG, f"evaluation/{THRESHOLDS}", *texts]
        if changed := git(root, "status", "--porcelain", "--", *paths).split():
            raise LifecycleError(f"{changed[1]} has changes that are not committed: commit them first")
    text = entry(manifest, verdict, release.serving, limits or known_limits(root))
    with undone_on_failure(root / CHANGELOG, root / "artifacts" / RELEASE, *(root / name for name in texts)):
        switch(root, Release(serving=version, previous=release.serving), text, texts)
        if in_git:
            message = f"Release model {version} in place of {release.serving}"
            commit(root, message, f"artifacts/{version}", f"evaluation/{version}.json", *texts)
    typer.echo(f"{version} serves in place of {release.serving} (make rollback goes back)")
    typer.echo(COMMITTED if in_git else WITHOUT_GIT)


def rollback(
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Also to a stub without rules.")] = False,
    root: Root = ROOT,
) -> None:
    """Let the previous version serve again at once: it is verified, but not evaluated.

    If the commit fails, the rollback still holds: the served version matters more than its record.
    """
    release = read_release(root / "artifacts")
    now, before = release.previous, release.serving
    if now is None:
        raise LifecycleError(f"artifacts/{RELEASE} names no previous version")
    artifact = read_artifact(root / "artifacts", now)
    if not yes and "rules.json" in artifact.files and not json.loads(artifact.files["rules.json"])["rules"]:
        raise LifecycleError(
            f"{now} is a stub without rules: it gives every request the same answer; if that is better than "
            f"{before}: make rollback CONFIRM=yes"
        )
    try:
        texts, untold = told(root, now), ""
    except (LifecycleError, ArtifactError, OSError) as error:
        texts, untold = {}, f"rollback: done, but not in the documents: {error}"
    in_git = has_git(root)
    # A document with other uncommitted changes is left out of this commit.
    own = [name for name in texts if in_git and not git(root, "status", "--porcelain", "--", name)]
    text = f"## Model {now} again, {datetime.now(UTC).date()}\n- Rolled back from `{before}`.\n"
    switch(root, Release(serving=now, previous=before), text, texts)
    typer.echo(f"{now} serves in place of {before} (make rollback again undoes this)")
    if untold:
        typer.echo(untold, err=True)
    if not in_git:
        typer.echo(WITHOUT_GIT)
        return
    try:
        commit(root, f"Roll back to model {now} from {before}", *own)
        typer.echo(COMMITTED)
    except (LifecycleError, OSError) as error:
        typer.echo(f"rollback: done, but not committed: {error}", err=True)


def check(root: Path, version: str, release: Release) -> tuple[Manifest, Verdict]:
    """Manifest and verdict of a version that may be promoted; raises ArtifactError or LifecycleError.

    It must have passed an evaluation with these files, thresholds and rows, against the served version.
    """
    if release.serving == version:
        raise LifecycleError(f"{version} serves already")
    artifact, again = read_artifact(root / "artifacts", version), f"make evaluate VERSION={version}"
    try:
        verdict = Verdict.model_validate_json((root / "evaluation" / f"{version}.json").read_bytes())
    except FileNotFoundError:
        raise LifecycleError(f"{version} was never evaluated: {again}") from None
    except (ValidationError, OSError):
        raise LifecycleError(f"evaluation/{version}.json cannot be read: {again}") from None
    known = [
        ("its manifest", verdict.manifest_sha256, root / "artifacts" / version / MANIFEST),
        (f"evaluation/{THRESHOLDS}", verdict.thresholds_sha256, root / "evaluation" / THRESHOLDS),
        (verdict.data.file, verdict.data.sha256, root / verdict.data.file),
    ]
    for name, then, path in known:
        # Rows outside the repository cannot be compared.
        if (name != verdict.data.file or path.is_file()) and sha256(path) != then:
            raise LifecycleError(f"{version} was evaluated before {name} changed: {again}")
    if not verdict.passed:
        raise LifecycleError(f"{version} failed its evaluation: {(*verdict.failed, 'see its report')[0]}")
    if verdict.served not in (None, release.serving):
        raise LifecycleError(
            f"{version} was compared with {verdict.served}, and {release.serving} serves now: {again}"
        )
    Pipeline.offline(artifact).model.replay()
    return artifact.manifest, verdict


def known_limits(root: Path) -> str:
    """The section "Known limits" of the model card, in one line."""
    card = root / CARD
    _, _, section = (read_text(card) if card.is_file() else "").partition(f"\n{LIMITS}\n")
    lines = section.partition("\n## ")[0].splitlines()
    return " ".join(line.lstrip("-* ").strip() for line in lines if line.strip()) or "none stated."


def entry(manifest: Manifest, verdict: Verdict, before: str, limits: str) -> str:
    """The changelog entry of a release."""
    training, data, theirs = manifest.training, verdict.data, verdict.served_metrics
    trained = "none; its rules are its own source."
    if training:
        window = " to ".join(training.date_range or ()) or training.query or "dates not recorded"
        trained = (
            f"{training.rows:,} rows, {window}; data `{training.data_sha256[:12]}`, "
            f"target `{training.target}`, code `{training.code_revision[:19]}`."
        )
    figures = ", ".join(
        f"{name} {value:.4g}" + (f" ({before}: {theirs[name]:.4g})" if name in theirs else "")
        for name, value in verdict.metrics.items()
    )
    return (
        f"## Model {manifest.version}, {datetime.now(UTC).date()}\n"
        f"- Serves in place of `{before}`.\n"
        f"- Training: {trained}\n"
        f"- Quality on {data.rows:,} rows of `{data.file}` (`{data.sha256[:12]}`): {figures}.\n"
        f"- Known limits: {' '.join(limits.split())}\n"
    )


def told(root: Path, version: str) -> dict[str, str]:
    """The documents that change when `version` serves, and their new text; raises LifecycleError."""
    if not all((root / name).is_file() for name in DOCUMENTS):
        return {}
    texts = documents(root, version)
    return {name: text for name, text in texts.items() if read_text(root / name) != text}


def switch(root: Path, release: Release, text: str, texts: Mapping[str, str]) -> None:
    """Add the entry at the top of the changelog, then write documents and release.json; all or nothing."""
    path = root / CHANGELOG
    old = path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else "# Changelog\n"
    head, found, rest = old.partition("\n## ")
    older = f"\n## {rest}" if found else ""
    with undone_on_failure(path, *(root / name for name in texts)):
        write_file(path, f"{head.rstrip()}\n\n{text}{older}".encode("utf-8", "surrogateescape"))
        for name, words in texts.items():
            write_file(root / name, words.encode())
        write_release(root / "artifacts", release)


@contextmanager
def undone_on_failure(*paths: Path) -> Iterator[None]:
    """Restore these files if the block fails."""
    before = {path: path.read_bytes() for path in paths if path.exists()}
    try:
        yield
    except BaseException:
        for path, content in before.items():
            write_file(path, content)
        raise


def git(root: Path, *arguments: str) -> str:
    """The output of git in the service's folder; raises LifecycleError with git's error message."""
    done = subprocess.run(  # noqa: S603  # only arguments from this module
        ["git", "--no-optional-locks", *arguments],  # noqa: S607  # found by PATH
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise LifecycleError(f"git {arguments[0]}: {said[:200]}")
    return done.stdout.strip()


def has_git(root: Path) -> bool:
    """Whether git is installed, and a work tree contains and does not ignore this folder."""
    try:
        said = git(root, "status", "--porcelain", "--ignored", "--", f"artifacts/{RELEASE}")
    except (LifecycleError, OSError):
        return False
    return not said.startswith("!!")


def commit(root: Path, message: str, *more: str) -> None:
    """Commit only release.json, the changelog and `more`; on failure, restore the index."""
    paths = [f"artifacts/{RELEASE}", CHANGELOG, *more]
    with undone_on_failure(root / git(root, "rev-parse", "--git-path", "index")):
        git(root, "add", "--", *paths)
        git(root, "commit", "--quiet", "--only", "--message", message, "--", *paths)


class Line(NamedTuple):
    """A line of the checklist; a line without a command is for people."""

    number: int  # in the file
    command: str | None
    text: str


def parse(document: str) -> list[Line]:
    """The lines to tick, in order; raises LifecycleError for a line with neither Run nor Sign."""
    lines = []
    for number, text in enumerate(document.splitlines(), 1):
        if found := LINE.fullmatch(text):
            lines.append(Line(number, found[1], found[2]))
        elif text.lstrip().startswith("- ["):
            needed = "neither `- [ ] Run `command`: ...` nor `- [ ] Sign: ...`"
            raise LifecycleError(f"{CHECKLIST}: line {number} is {needed}")
    return lines


def release_check(version: Version, *, root: Root = ROOT) -> None:
    """Run the commands in the release checklist, and list the lines that people must sign.

    A ticked copy and the output of each command go to build/; keep the copy with the release.
    """
    read_artifact(root / "artifacts", version)
    document = read_text(root / CHECKLIST).replace("$VERSION", version)
    folder, copy, rows = root / "build" / f"release-check-{version}", document.splitlines(), []
    for number, command, text in parse(document):
        box, item = copy[number - 1][:5], copy[number - 1][6:]
        if command is None:
            rows.append(("SIGN", "", text))
            copy[number - 1] = f"{box} {item} Name: ____ Date: ____"
            continue
        began = perf_counter()
        passed, said = _run(command, root)
        write_file(folder / f"{number}.log", said)
        outcome = "PASS" if passed else "FAIL"
        rows.append((outcome, f"{perf_counter() - began:.0f} s", f"{command}: {text}"))
        copy[number - 1] = f"- [x] {item}" if passed else f"{box} **FAILED** {item}"
        last = said.decode("utf-8", "replace").splitlines()[-LAST_LINES:]
        typer.echo("\n".join([f"release-check: {outcome} {command}", *([] if passed else last)]), err=True)
    ticked = folder / Path(CHECKLIST).name
    write_file(ticked, ("\n".join(copy) + "\n").encode())
    typer.echo(table(("", "took", "line"), rows))
    passes, failures, to_sign = ([row[0] for row in rows].count(one) for one in ("PASS", "FAIL", "SIGN"))
    typer.echo(f"{passes} passed, {failures} failed, {to_sign} to be signed in {ticked}")
    if failures:
        raise LifecycleError(f"{version} is not ready")


def _run(command: str, root: Path) -> tuple[bool, bytes]:
    """Run a command of the checklist without a shell; returns whether it passed, and its output."""
    # Without the flags of an outer make.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    try:
        done = subprocess.run(  # noqa: S603  # a command in the repository's own document
            shlex.split(command), cwd=root, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        return False, f"{command}: {error.strerror}\n".encode()
    return not done.returncode, done.stdout


def new_key(path: Annotated[Path, typer.Argument(help="Where to write the private key, in PEM.")]) -> str:
    """Make a key pair: a private key to sign versions with, and its public key for APP_TRUSTED_KEYS."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    typer.echo(f"{path}: private key without a password; keep it secret, and out of git")
    typer.echo(f"APP_TRUSTED_KEYS={public_key(key)}")
    return public_key(key)


def sign(
    version: Version,
    key: Annotated[Path, typer.Option(help="The private key, as `new-key` writes it.")],
    root: Root = ROOT,
) -> str:
    """Sign a version with a private key, for services that run with APP_TRUSTED_KEYS.

    Its files are verified first; an older signature is replaced.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    folder = root / "artifacts" / version
    read_artifact(root / "artifacts", version)
    try:
        private = load_pem_private_key(key.read_bytes(), password=None)
    except (ValueError, TypeError):  # not PEM, or with a password
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise LifecycleError(f"{key}: holds no Ed25519 private key in PEM without a password")
    signature = private.sign((folder / MANIFEST).read_bytes())
    write_file(folder / SIGNATURE, b64encode(signature) + b"\n")
    typer.echo(f"artifacts/{version}/{SIGNATURE}: signed by {public_key(private)}")
    return public_key(private)


def public_key(private: "Ed25519PrivateKey") -> str:
    """The public key for APP_TRUSTED_KEYS: the base64 of its 32 bytes."""
    return b64encode(private.public_key().public_bytes_raw()).decode()
