"""Store and runtimes: what is refused and in which words, and that only verified bytes are loaded."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.errors import ArtifactError
from app.core.runtimes import RulesRuntime, load_runtime
from app.core.store import Artifact, read_artifact, read_release
from tests.conftest import ARTIFACTS, VERSIONS

FILES = [
    path.relative_to(ARTIFACTS).as_posix() for version in VERSIONS for path in (ARTIFACTS / version).iterdir()
]
MANIFEST, MODEL = "manifest.json", "model.onnx"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(ARTIFACTS, tmp_path / "artifacts"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def put(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and its entry in the manifest: what somebody with access to the folder would do."""
    (folder / name).write_bytes(content)
    entry = {"sha256": sha256(content).hexdigest(), "size": len(content)}
    edit(folder / MANIFEST, lambda manifest: manifest["files"].update({name: entry}))


def refused(read: Callable[[], object]) -> str:
    """The one line with which `read` refuses."""
    with pytest.raises(ArtifactError) as raised:
        read()
    (line,) = str(raised.value).splitlines()
    assert line.isprintable()
    return line


def load(root: Path, version: str = "v1") -> object:
    """Verify and load, as the service does."""
    return load_runtime(read_artifact(root, version))


@pytest.fixture(scope="module")
def flippable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which what is damaged is mended again."""
    return Path(shutil.copytree(ARTIFACTS, tmp_path_factory.mktemp("flip") / "artifacts"))


@contextmanager
def flipped(path: Path, position: float) -> Iterator[None]:
    """Change one bit, somewhere between the first (0) and the last (1), for a while."""
    original = path.read_bytes()
    changed, bit = bytearray(original), round(position * (8 * len(original) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(MANIFEST)])
@given(position=st.floats(0, 1))
def test_any_flipped_bit_is_refused(flippable: Path, name: str, position: float) -> None:
    """No bit of a file can change without the version being refused by that file's name."""
    with flipped(flippable / name, position):
        assert f"{name}: sha256 differs" in refused(lambda: read_artifact(flippable, Path(name).parent.name))


@pytest.mark.parametrize("version", VERSIONS)
@given(position=st.floats(0, 1))
def test_a_flipped_bit_in_the_manifest_never_changes_what_is_loaded(
    flippable: Path, version: str, position: float
) -> None:
    """A manifest that still reads after a bit has changed names the same bytes and the same contract."""
    before = read_artifact(flippable, version)
    with flipped(flippable / version / MANIFEST, position), suppress(ArtifactError):
        after = read_artifact(flippable, version)
        assert (after.files, after.sha256) == (before.files, before.sha256)
        assert after.manifest.contract_sha256 == before.manifest.contract_sha256
        assert after.manifest.outputs.labels == before.manifest.outputs.labels


def replace(path: Path, make: Callable[[Path], object] | None = None) -> None:
    """Move a file or folder away, and make something else in its place."""
    away = path.rename(path.parents[1] / "away")
    if make:
        make(path)
    else:
        path.symlink_to(away)


def keys(**values: Any) -> Callable[[Path], None]:
    """Set keys of the manifest."""
    return lambda v1: edit(v1 / MANIFEST, lambda manifest: manifest.update(values))


def listed(name: str) -> Callable[[Path], None]:
    """List one file more in the manifest."""
    entry = {"sha256": "0" * 64, "size": 1}
    return lambda v1: edit(v1 / MANIFEST, lambda manifest: manifest["files"].update({name: entry}))


def unlisted(v1: Path) -> None:
    """Take the model out of the folder and out of the manifest."""
    (v1 / MODEL).unlink()
    edit(v1 / MANIFEST, lambda manifest: manifest["files"].pop(MODEL))


REFUSALS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no folder": (shutil.rmtree, "v1", "no such version"),
    "a file for the folder": (lambda v1: replace(v1, Path.touch), "v1", "no such version"),
    "a link for the folder": (replace, "v1", "leads out"),
    "no manifest": (lambda v1: (v1 / MANIFEST).unlink(), MANIFEST, "No such file"),
    "a manifest of noise": (lambda v1: (v1 / MANIFEST).write_bytes(b"\x80\x04."), MANIFEST, "JSON"),
    "a manifest of another kind": (lambda v1: (v1 / MANIFEST).write_bytes(b"[]"), MANIFEST, "object"),
    "another version's manifest": (
        lambda v1: shutil.copy(v1.parent / "v0" / MANIFEST, v1), MANIFEST, "of version v0"),
    "a key that is not ours": (keys(**{"a\nb\x1b[2J": 1}), MANIFEST, "not permitted"),
    "a runtime that unpickles": (keys(runtime="joblib"), MANIFEST, "runtime"),
    "a path for a name": (listed("../v0/rules.json"), "rules.json", "missing"),
    "a file too few": (lambda v1: (v1 / MODEL).unlink(), MODEL, "missing"),
    "a file too many": (lambda v1: (v1 / "a\nb").touch(), "a", "not listed"),
    "a folder too many": (lambda v1: (v1 / "more").mkdir(), "more", "not listed"),
    "a byte too few": (lambda v1: os.truncate(v1 / MODEL, 100), MODEL, "size"),
    "a byte too many": (lambda v1: os.truncate(v1 / MODEL, 100_000), MODEL, "size"),
    "a folder for a file": (lambda v1: replace(v1 / MODEL, Path.mkdir), MODEL, "no regular file"),
    "a link for a file": (lambda v1: replace(v1 / MODEL), MODEL, "no regular file"),
    "no model among the files": (unlisted, MANIFEST, "lists no model.onnx"),
    "inputs that were not signed": (
        lambda v1: edit(v1 / MANIFEST, lambda one: one["inputs"].reverse()), MANIFEST, "contract_sha256"),
    "labels that were not signed": (
        lambda v1: edit(v1 / MANIFEST, lambda one: one["outputs"]["labels"].reverse()), MANIFEST, "contract"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "file", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_not_as_released_is_refused(
    root: Path, damage: Callable[[Path], object], file: str, reason: str
) -> None:
    """Whatever is wrong with a version, one printable line names the file and the reason."""
    damage(root / "v1")
    line = refused(lambda: read_artifact(root, "v1"))
    assert file in line
    assert reason in line


def test_a_pipe_in_the_place_of_a_file_holds_nothing_up(root: Path) -> None:
    """A file that would block whoever reads it is refused, not read."""
    os.mkfifo(root / "v1" / "pipe")
    listed("pipe")(root / "v1")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_artifact, root, "v1")
        try:
            assert isinstance(reading.exception(5), ArtifactError)
        finally:
            if not reading.done():
                os.close(os.open(root / "v1" / "pipe", os.O_WRONLY))  # let the reader go


@pytest.mark.parametrize("name", ["latest", "v", "V1", "v1/", "../v1", "v1\n", "v1234567890", ""])
def test_only_version_names_are_looked_up(root: Path, name: str) -> None:
    """A version is v and a number; anything else reaches no path, in the call or in `release.json`."""
    assert "version" in refused(lambda: read_artifact(root, name))
    edit(root / "release.json", lambda release: release.update(serving=name))
    assert "release.json: serving" in refused(lambda: read_release(root))


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._trace),)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("content", ["pickle", "noise", "empty", "text"])
def test_what_is_no_model_is_refused_and_never_unpickled(
    root: Path, tmp_path: Path, version: str, content: str
) -> None:
    """A well-signed file that is not what its name says cannot be loaded, and a pickle stays shut."""
    trace = tmp_path / "trace"
    contents = {"pickle": pickle.dumps(Bomb(trace)), "noise": bytes(range(256)), "empty": b"", "text": b"[1]"}
    model = read_artifact(root, version).model_file
    put(root / version, model, contents[content])
    assert f"{version}/{model}: cannot be loaded" in refused(lambda: load(root, version))
    put(root / version, "model.pkl", contents["pickle"])
    refused(lambda: load(root, version))
    assert not trace.exists()


def onnx_model(columns: int, labels: int, inputs: int = 1) -> bytes:
    """A model that takes and gives so many columns."""
    taken = [f"x{index}" for index in range(inputs)]
    kind, vector = onnx.TensorProto.FLOAT, np.ones((columns, labels), np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", [taken[0], "weights"], ["y"])],
        "model",
        [onnx.helper.make_tensor_value_info(name, kind, [None, columns]) for name in taken],
        [onnx.helper.make_tensor_value_info("y", kind, [None, labels])],
        [onnx.numpy_helper.from_array(vector, "weights")],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    return bytes(onnx.helper.make_model(graph, ir_version=8, opset_imports=opset).SerializeToString())


def test_a_model_of_another_shape_is_refused(root: Path) -> None:
    """A model for another number of columns or inputs cannot be loaded; the right shape can."""
    put(root / "v1", MODEL, onnx_model(4, 3))
    load(root)
    for columns, labels, inputs in ((3, 3, 1), (5, 3, 1), (4, 3, 2)):
        put(root / "v1", MODEL, onnx_model(columns, labels, inputs))
        assert "v1/model.onnx: cannot be loaded" in refused(lambda: load(root))


def rules(*conditions: dict[str, dict[str, float]]) -> RulesRuntime:
    """A decision list over `a` and `b`, each rule with a label of its own, else `none`."""
    labels = [f"rule {index}" for index in range(len(conditions))]
    listed = [
        {"when": when, "label": label, "score": 0.75} for when, label in zip(conditions, labels, strict=True)
    ]
    document = {"rules": listed, "otherwise": {"label": "none", "score": 0.5}}
    return RulesRuntime(document, ["a", "b"], [*labels, "none"])


@given(bound=st.floats(-1e6, 1e6, width=64))
def test_a_bound_means_the_value_that_clients_can_send(bound: float) -> None:
    """Values come as float32, so a bound is one, too: a value equal to it is neither below nor above."""
    row = np.array([[bound, 0.0]], np.float32)
    for symbol, holds in {"<": False, "<=": True, ">": False, ">=": True, "==": True}.items():
        (answer,) = rules({"a": {symbol: bound}}).infer(row)
        assert answer == ([0.75, 0.25] if holds else [0.5, 0.5])


def test_the_first_rule_that_holds_decides() -> None:
    """All conditions of a rule must hold, earlier rules win, and the other labels share what is left."""
    runtime = rules({"a": {">": 1, "<": 2}}, {"a": {">": 1}, "b": {">": 1}})
    rows = np.array([[1.5, 2], [2, 2], [2, 1], [np.nan, np.nan]], np.float32)
    first, second, neither = [0.75, 0.125, 0.125], [0.125, 0.75, 0.125], [0.25, 0.25, 0.5]
    assert runtime.infer(rows) == [first, second, neither, neither]


def test_what_is_loaded_is_what_was_verified(root: Path) -> None:
    """A file that changes on disk after it was checked changes nothing."""
    artifact: Artifact = read_artifact(root, "v1")
    shutil.rmtree(root)
    (answer,) = load_runtime(artifact).infer(np.array([[5.1, 3.5, 1.4, 0.2]], np.float32))
    assert sum(answer) == pytest.approx(1)
    assert {type(value) for value in answer} == {float}
