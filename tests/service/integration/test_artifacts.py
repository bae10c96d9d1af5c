"""Artifacts that are not what their manifest says stop the start, with one line that says which and why."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import pytest

from tests.service.conftest import (
    EXAMPLE,
    Service,
    copied_artifacts,
    refusal,
    run,
)
from tests.service.unit.test_artifacts import Bomb, fitted, put_skops

Damage = Callable[[Path], object]
Start = Callable[..., Service]


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


def bomb(root: Path, pack: Callable[[Any], bytes] = pickle.dumps) -> bytes:
    """A pickle that leaves a trace beside the artifacts when it is loaded."""
    return pack(Bomb(root.parent / "unpickled"))


def joblibbed(value: Any) -> bytes:
    """What joblib writes."""
    file = io.BytesIO()
    joblib.dump(value, file)
    return file.getvalue()


def refer_outside(root: Path) -> None:
    """Put the weights of the model where a server finds them: in the folder in which it is started."""
    model = onnx.load_model(root / MODEL)
    answer = model.graph.output[-1]
    for node in model.graph.node:
        node.output[:] = ["unweighted" if name == answer.name else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Add", ["unweighted", "weights"], [answer.name]))
    kind = onnx.helper.tensor_dtype_to_np_dtype(answer.type.tensor_type.elem_type)
    tensor = model.graph.initializer.add()
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, kind), "weights"))
    (root.parent / "weights.bin").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")
    rewrite(root / "v1", "model.onnx", model.SerializeToString())


def pickled_rules(root: Path) -> None:
    """Let v0 serve, a pickle in the place of its rules."""
    rewrite(root / "v0", "rules.json", bomb(root))
    release(serving="v0")(root)


def skops_version(**changes: Any) -> Damage:
    """A v1 that is served through skops."""
    return lambda root: put_skops(root / "v1", fitted(), **changes)


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
    "linked release": (lambda root: link(root / RELEASE), RELEASE, "link"),
    "linked manifest": (lambda root: link(root / MANIFEST), MANIFEST, "link"),
    "linked golden set": (lambda root: link(root / "v1/golden.jsonl"), "v1/golden.jsonl", "link"),
    "pickle for a model": (
        lambda root: rewrite(root / "v1", "model.onnx", bomb(root)), MODEL, "cannot be loaded"),
    "pickle for a golden set": (
        lambda root: rewrite(root / "v1", "golden.jsonl", bomb(root)), "v1/golden.jsonl", "cannot be loaded"),
    "pickle, well listed": (
        lambda root: rewrite(root / "v1", "model.pkl", bomb(root)), "v1/model.pkl", "cannot be loaded"),
    "joblib file, well listed": (
        lambda root: rewrite(root / "v1", "model.joblib", bomb(root, joblibbed)),
        "v1/model.joblib", "cannot be loaded"),
    "pickle for rules": (pickled_rules, "v0/rules.json", "cannot be loaded"),
    "pickle for a skops model": (
        lambda root: put_skops(root / "v1", bomb(root)), "v1/model.skops", "cannot be loaded"),
    "weights outside of the model": (refer_outside, MODEL, "refers to data outside"),
    "skops of another scikit-learn": (
        skops_version(libraries={"numpy": np.__version__, "scikit-learn": "1.0", "skops": "0.16.0"}),
        "v1/model.skops", "scikit-learn==1.0"),
    "skops with a library that is not installed": (
        skops_version(libraries={"lightgbm": "4.6.0", "numpy": "2", "scikit-learn": "1", "skops": "0"}),
        "v1/model.skops", "lightgbm==4.6.0"),
    "skops without trust": (skops_version(trusted_types=[]), "v1/model.skops", "does not list"),
}  # fmt: skip


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """A copy to damage."""
    return copied_artifacts(tmp_path)


@pytest.mark.parametrize(("damage", "file", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_artifact_stops_the_start(
    artifacts: Path, tmp_path: Path, damage: Damage, file: str, reason: str
) -> None:
    """Within ten seconds the service ends with an error, and one line says which file and why."""
    damage(artifacts)
    line = refusal(tmp_path, artifacts_dir=artifacts)
    assert file in line.replace("\\", "/")
    assert reason in line
    assert not (tmp_path / "unpickled").exists()


def test_a_version_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    """APP_MODEL_VERSION names a version that exists, or the service does not start."""
    assert "v7" in refusal(tmp_path, model_version="v7")


def test_the_golden_path_refuses_damage_too(artifacts: Path, tmp_path: Path) -> None:
    """`python -m app predict` does not load what the service would not."""
    flip(artifacts / "v1" / "model.onnx")
    done = run(tmp_path, "app", "predict", stdin=json.dumps(EXAMPLE).encode(), artifacts_dir=artifacts)
    assert done.returncode != 0
    assert done.stdout == ""


def test_versions_that_do_not_serve_are_not_looked_at(artifacts: Path, tmp_path: Path) -> None:
    """A damaged v1 does not keep v0, the way back, from serving."""
    flip(artifacts / "v1" / "model.onnx")
    instance = json.dumps(EXAMPLE).encode()
    done = run(tmp_path, "app", "predict", stdin=instance, artifacts_dir=artifacts, model_version="v0")
    assert json.loads(done.stdout)["model_version"] == "v0"
