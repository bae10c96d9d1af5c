"""Artifacts that are not what their manifest says stop the start, with one line that says which and why."""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ARTIFACTS, SETOSA, refusal, run

Damage = Callable[[Path], object]


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def rewrite(version: Path, name: str, content: bytes) -> None:
    """Replace a file of a version, manifest included: what a careful stranger would do."""
    (version / name).write_bytes(content)
    entry = {"sha256": sha256(content).hexdigest(), "size": len(content)}
    edit(version / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))


def flip(path: Path) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    """Put a symbolic link in the place of a file or folder, to the very same content."""
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def pipe(path: Path) -> None:
    """Put a pipe in the place of a file: whoever reads it waits for ever."""
    path.unlink()
    os.mkfifo(path)


def release(**changes: str) -> Damage:
    """Other entries in release.json."""
    return lambda root: edit(root / "release.json", lambda document: document.update(changes))


def manifest(change: Callable[[Any], object]) -> Damage:
    """Another manifest of v1."""
    return lambda root: edit(root / "v1/manifest.json", change)


RELEASE, MANIFEST, MODEL = "release.json", "v1/manifest.json", "v1/model.onnx"

# What is done, the file that the line must name, and the reason it must give.
DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "no artifacts": (shutil.rmtree, RELEASE, "No such file"),
    "no release": (lambda root: (root / RELEASE).unlink(), RELEASE, "No such file"),
    "broken release": (lambda root: (root / RELEASE).write_text("{"), RELEASE, "Invalid JSON"),
    "release of the latest": (release(serving="latest"), RELEASE, "serving"),
    "release with a path": (release(serving="../v1"), RELEASE, "serving"),
    "release with a typing error": (release(sevring="v1"), RELEASE, "sevring"),
    "no version": (lambda root: shutil.rmtree(root / "v1"), "v1", "no such version"),
    "linked version": (lambda root: link(root / "v1"), "v1", "leads out"),
    "no manifest": (lambda root: (root / MANIFEST).unlink(), MANIFEST, "No such file"),
    "broken manifest": (lambda root: (root / MANIFEST).write_text("[]"), MANIFEST, "object"),
    "manifest of v0": (
        lambda root: shutil.copy(root / "v0/manifest.json", root / MANIFEST), MANIFEST, "of version v0"),
    "manifest with an unknown key": (manifest(lambda own: own.update(pickle="x")), MANIFEST, "pickle"),
    "manifest that lists a path": (
        manifest(lambda own: own["files"].update({"../v0/rules.json": own["files"]["model.onnx"]})),
        "rules.json", "missing"),
    "no model": (lambda root: (root / MODEL).unlink(), MODEL, "missing"),
    "empty model": (lambda root: (root / MODEL).write_bytes(b""), MODEL, "size"),
    "truncated model": (lambda root: os.truncate(root / MODEL, 600), MODEL, "size"),
    "flipped bit": (lambda root: flip(root / MODEL), MODEL, "sha256"),
    "linked model": (lambda root: link(root / MODEL), MODEL, "link"),
    "pipe for a model": (lambda root: pipe(root / MODEL), MODEL, "pipe"),
    "unlisted model": (manifest(lambda own: own["files"].pop("model.onnx")), MODEL, "not listed"),
    "unlisted file": (lambda root: (root / "v1/model.pkl").write_bytes(b"x"), "v1/model.pkl", "not listed"),
    "unlisted folder": (lambda root: (root / "v1/more").mkdir(), "v1/more", "not listed"),
    "flipped bit elsewhere": (lambda root: flip(root / "v1/golden.jsonl"), "v1/golden.jsonl", "sha256"),
    "another contract": (manifest(lambda own: own["inputs"].pop()), MANIFEST, "contract"),
    "another signature": (manifest(lambda own: own.update(contract_sha256="0" * 64)), MANIFEST, "contract"),
    "no model at all, well listed": (
        lambda root: rewrite(root / "v1", "model.onnx", b"not a model"), MODEL, "cannot be loaded"),
}  # fmt: skip


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(ARTIFACTS, tmp_path / "artifacts"))


@pytest.mark.parametrize(("damage", "file", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_artifact_stops_the_start(
    artifacts: Path, tmp_path: Path, damage: Damage, file: str, reason: str
) -> None:
    """Within ten seconds the service ends with an error, and one line says which file and why."""
    damage(artifacts)
    line = refusal(tmp_path, artifacts_dir=artifacts)
    assert file in line.replace("\\", "/")
    assert reason in line


def test_a_version_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    """APP_MODEL_VERSION names a version that exists, or the service does not start."""
    assert "v7" in refusal(tmp_path, model_version="v7")


def test_the_golden_path_refuses_damage_too(artifacts: Path, tmp_path: Path) -> None:
    """`python -m app predict` does not load what the service would not."""
    flip(artifacts / "v1" / "model.onnx")
    done = run(tmp_path, "app", "predict", stdin=json.dumps(SETOSA).encode(), artifacts_dir=artifacts)
    assert done.returncode != 0
    assert done.stdout == ""


def test_versions_that_do_not_serve_are_not_looked_at(artifacts: Path, tmp_path: Path) -> None:
    """A damaged v1 does not keep v0, the way back, from serving."""
    flip(artifacts / "v1" / "model.onnx")
    instance = json.dumps(SETOSA).encode()
    done = run(tmp_path, "app", "predict", stdin=instance, artifacts_dir=artifacts, model_version="v0")
    assert json.loads(done.stdout)["model_version"] == "v0"
