"""Store and runtimes: what is refused and in which words, and that only verified bytes are loaded."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import skops.io
from hypothesis import given
from hypothesis import strategies as st
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType, Int64TensorType, StringTensorType
from sklearn.base import is_classifier
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from app.core.errors import ArtifactError
from app.core.runtimes import OnnxRuntime, RulesRuntime, SkopsRuntime, load_runtime, skops_types
from app.core.store import STARTS, Artifact, Input, own_code, read_artifact, read_release
from app.schemas.contract import contract_inputs
from tests.service.conftest import ARTIFACTS, EXAMPLE, LABELS, VERSIONS, copied_artifacts

FILES = [
    path.relative_to(ARTIFACTS).as_posix() for version in VERSIONS for path in (ARTIFACTS / version).iterdir()
]
MANIFEST, MODEL = "manifest.json", "model.onnx"
NAMES = [one["name"] for one in contract_inputs()]
COLUMNS, WIDTH = len(NAMES), len(LABELS) or 1


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy to damage."""
    return copied_artifacts(tmp_path)


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


def otherwise(*way: str) -> Callable[[Path], None]:
    """Put a list of the manifest in another order; where that changes nothing, let it be longer."""

    def change(document: Any) -> None:
        for key in way:
            document = document[key]
        document.reverse()
        if len(document) < 2:
            document += document or ["another"]

    return lambda v1: edit(v1 / MANIFEST, change)


REFUSALS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no folder": (shutil.rmtree, "v1", "no such version"),
    "a link beside the folder": (
        lambda v1: v1.symlink_to(v1.rename(v1.with_name("v2")), target_is_directory=True), "v1", "leads out"),
    "a link for the manifest": (lambda v1: replace(v1 / MANIFEST), MANIFEST, "no regular file"),
    "a link for a file that is not loaded": (
        lambda v1: replace(v1 / "golden.jsonl"), "golden.jsonl", "no regular file"),
    "a manifest without an end": (
        lambda v1: os.truncate(v1 / MANIFEST, 2**25), MANIFEST, "JSON"),
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
    "a file too few": (lambda v1: (v1 / MODEL).unlink(), MODEL, "missing; if it was never committed, `git"),
    "a file too many": (lambda v1: (v1 / "a\nb").touch(), "a", "not listed"),
    "a folder too many": (lambda v1: (v1 / "more").mkdir(), "more", "not listed"),
    "a byte too few": (lambda v1: os.truncate(v1 / MODEL, 100), MODEL, "size"),
    "a byte too many": (lambda v1: os.truncate(v1 / MODEL, 100_000), MODEL, "size"),
    "a folder for a file": (lambda v1: replace(v1 / MODEL, Path.mkdir), MODEL, "no regular file"),
    "a link for a file": (lambda v1: replace(v1 / MODEL), MODEL, "no regular file"),
    "no model among the files": (unlisted, MANIFEST, "lists no model.onnx"),
    "inputs that were not signed": (otherwise("inputs"), MANIFEST, "contract_sha256"),
    "labels that were not signed": (otherwise("outputs", "labels"), MANIFEST, "contract"),
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


@pytest.mark.parametrize("version", ["v0", "v1"])
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


COMPRESSED = (bytes, zlib.compress, gzip.compress, bz2.compress, lzma.compress)
PICKLES = [
    compress(pickle.dumps(value, protocol))
    for compress in COMPRESSED
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    for value in (LogisticRegression(), {"a": 1}, [1], (), "text", 1, None, Bomb(Path("trace")))
]


@pytest.mark.parametrize("suffix", STARTS)
def test_no_pickle_starts_like_a_file_of_a_version(suffix: str) -> None:
    """Whatever is pickled, by whatever protocol and compressed or not, none of it passes for a known file."""
    assert not [content for content in PICKLES if content.startswith(STARTS[suffix])]


@pytest.mark.parametrize(
    "name", [MODEL, "golden.jsonl", "baseline.json", "other.skops", "model.joblib", "noend"]
)
def test_a_listed_pickle_is_refused_under_any_name(root: Path, tmp_path: Path, name: str) -> None:
    """Being in the manifest, hash and all, makes no pickle welcome, even where nobody would load it."""
    put(root / "v1", name, pickle.dumps(Bomb(tmp_path / "trace")))
    assert f"v1/{name}: cannot be loaded" in refused(lambda: read_artifact(root, "v1"))
    assert not (tmp_path / "trace").exists()


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
    put(root / "v1", MODEL, onnx_model(COLUMNS, WIDTH))
    load(root)
    for columns, labels, inputs in (
        (COLUMNS - 1 or 3, WIDTH, 1),
        (COLUMNS + 1, WIDTH, 1),
        (COLUMNS + 1, WIDTH, 2),
        (COLUMNS, WIDTH, 2),
    ):
        put(root / "v1", MODEL, onnx_model(columns, labels, inputs))
        assert "v1/model.onnx: cannot be loaded" in refused(lambda: load(root))


Move = Callable[[onnx.TensorProto], onnx.TensorProto]


def outside(tensor: onnx.TensorProto, location: str, offset: int = 0) -> onnx.TensorProto:
    """The tensor with its numbers in another file, or at an address in memory."""
    moved = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    moved.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": len(tensor.raw_data)}.items():
        moved.external_data.add(key=key, value=str(value))
    return moved


def with_weights(place: str, move: Move) -> bytes:
    """`onnx_model` with its weights in one of the places where ONNX has tensors, moved by `move`."""
    numbers, make = np.ones((COLUMNS, WIDTH), np.float32), onnx.numpy_helper.from_array
    weights = make(numbers, "weights")
    model = onnx.load_from_string(onnx_model(COLUMNS, WIDTH))
    graph, opset, (multiply,) = model.graph, model.opset_import, model.graph.node
    attribute = onnx.AttributeProto
    if place in READ:
        graph.ClearField("initializer")
    if place.startswith("sparse"):
        values, indices = make(numbers.ravel(), "weights"), make(np.arange(numbers.size), "indices")
        sparse = onnx.helper.make_sparse_tensor(values, indices, numbers.shape)
        part = sparse.indices if place.endswith("indices") else sparse.values
        part.CopyFrom(move(part))
        if "initializer" in place:
            graph.sparse_initializer.append(sparse)
        elif "constant" in place:
            graph.node.insert(0, onnx.helper.make_node("Constant", [], ["weights"], sparse_value=sparse))
        else:
            multiply.attribute.add(name="more", type=attribute.SPARSE_TENSORS).sparse_tensors.append(sparse)
        return bytes(model.SerializeToString())
    tensor = move(weights)
    constant = onnx.helper.make_node("Constant", [], ["weights"], value=tensor)
    if place == "initializer":
        graph.initializer.append(tensor)
    elif place == "constant":
        graph.node.insert(0, constant)
    elif place == "branch":
        output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
        branch = onnx.helper.make_graph([multiply], "branch", [], [output], [tensor])
        graph.initializer.append(make(np.array(True), "yes"))
        multiply.CopyFrom(onnx.helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch))
    elif place == "attribute":
        multiply.attribute.add(name="more", type=attribute.TENSOR).t.CopyFrom(tensor)
    elif place == "list":
        multiply.attribute.add(name="more", type=attribute.TENSORS).tensors.append(tensor)
    elif place == "graphs":
        branch = onnx.helper.make_graph([], "branch", [], [], [tensor])
        multiply.attribute.add(name="more", type=attribute.GRAPHS).graphs.append(branch)
    elif place == "training":
        training = model.training_info.add()
        training.initialization.CopyFrom(onnx.helper.make_graph([], "first", [], [], [tensor]))
        training.algorithm.CopyFrom(onnx.helper.make_graph([constant], "step", [], []))
    else:  # a function; its node is the model's, unless none calls it
        model.opset_import.append(onnx.helper.make_opsetid("own", 1))
        function = model.functions.add()
        if "default" in place:
            constant = onnx.helper.make_node("Constant", [], ["weights"])
            constant.attribute.add(name="value", ref_attr_name="weights", type=attribute.TENSOR)
        function.CopyFrom(
            onnx.helper.make_function("own", "Score", ["x0"], ["y"], [constant, multiply], opset[:1])
        )
        if "default" in place:
            ours = tensor if place == "default" else weights
            function.attribute_proto.add(name="weights", type=attribute.TENSOR).t.CopyFrom(ours)
        if place == "default of a list":
            function.attribute_proto.add(name="more", type=attribute.TENSORS).tensors.append(tensor)
        if place != "function that none calls":
            multiply.CopyFrom(onnx.helper.make_node("Score", ["x0"], ["y"], domain="own"))
    return bytes(model.SerializeToString())


# Where onnxruntime reads tensors; where it refuses any; and where it reads none.
READ = ("initializer", "constant", "branch", "function", "default", "sparse initializer",
        "sparse initializer's indices", "sparse constant", "sparse constant's indices")  # fmt: skip
REFUSED = ("attribute", "list", "graphs", "sparse list", "sparse list's indices")
IGNORED = ("training", "function that none calls", "default of a list")


@pytest.fixture
def move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Move]:
    """Moves numbers into files, inside and outside of the working directory, that a path refers to."""
    folder = tmp_path / "working"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    monkeypatch.chdir(folder)
    location = {"relative": "w.bin", "absolute": str(tmp_path / "w.bin"), "parent": "../w.bin",
                "link": "link.bin", "missing": "none.bin"}  # fmt: skip

    def moved(kind: str, tensor: onnx.TensorProto) -> onnx.TensorProto:
        for path in (tmp_path / "w.bin", folder / "w.bin"):
            path.write_bytes(tensor.raw_data)
        return outside(tensor, location[kind])

    return lambda kind: partial(moved, kind)


def inside(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The tensor as it is."""
    return tensor


KINDS = pytest.mark.parametrize("kind", ["relative", "absolute", "parent", "link", "missing"])


@pytest.mark.parametrize("place", READ)
@KINDS
def test_data_outside_of_the_file_is_refused_wherever_it_is_referred_to(
    root: Path, move: Callable[[str], Move], place: str, kind: str
) -> None:
    """A model is its own verified bytes: a tensor that lies in another file stops the load."""
    put(root / "v1", MODEL, with_weights(place, inside))
    load(root)
    put(root / "v1", MODEL, with_weights(place, move(kind)))
    assert refused(lambda: load(root)) == "v1/model.onnx: refers to data outside of the file"


@pytest.mark.parametrize("place", REFUSED)
@KINDS
def test_tensors_that_no_operator_takes_are_refused(
    root: Path, move: Callable[[str], Move], place: str, kind: str
) -> None:
    """Attributes that the operator does not have stop the load, and no operator has lists of tensors."""
    for way in (inside, move(kind)):
        put(root / "v1", MODEL, with_weights(place, way))
        assert refused(lambda: load(root)).startswith("v1/model.onnx: ")


@pytest.mark.parametrize("place", IGNORED)
@KINDS
def test_data_outside_of_the_file_that_is_referred_to_in_vain_is_not_read(
    root: Path, move: Callable[[str], Move], place: str, kind: str
) -> None:
    """What onnxruntime leaves out of a model it does not look up: a missing file goes unnoticed as well."""
    row = np.array([[*range(COLUMNS)]], np.float32)
    for way in (inside, move(kind)):
        put(root / "v1", MODEL, with_weights(place, way))
        runtime = load_runtime(read_artifact(root, "v1"))
        assert runtime.infer(row) == [[row.sum()] * WIDTH]


@pytest.mark.parametrize("place", READ)
def test_a_model_cannot_read_memory(root: Path, place: str) -> None:
    """Onnxruntime's own mark for an address in memory is refused in a file."""
    kept = []

    def move(tensor: onnx.TensorProto) -> onnx.TensorProto:
        kept.append(np.frombuffer(tensor.raw_data, np.uint8))
        return outside(tensor, "*/_ORT_MEM_ADDR_/*", kept[-1].ctypes.data)

    put(root / "v1", MODEL, with_weights(place, move))
    assert "v1/model.onnx: " in refused(lambda: load(root))


@pytest.mark.parametrize(
    "tag", [b"\x3a", b"\xba\x00", b"\xba\x80\x80\x80\x10"], ids=["short", "long", "over"]
)
def test_no_spelling_of_a_field_hides_data_outside(
    root: Path, move: Callable[[str], Move], tag: bytes
) -> None:
    """A field's number may be written in several ways, and one that is too long is cut off by parsers."""
    model = onnx.load_from_string(with_weights("initializer", move("relative")))
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    size = bytes([len(graph) & 0x7F | 0x80, len(graph) >> 7])
    put(root / "v1", MODEL, model.SerializeToString() + tag + size + graph)
    assert refused(lambda: load(root)).startswith("v1/model.onnx: ")


def rows_and_answers(columns: int = COLUMNS, labels: Any = LABELS) -> tuple[Any, Any]:
    """Rows of so many numbers, and for each a label, or for a regressor a number."""
    data = np.random.default_rng(0).uniform(0, 9, (150, columns))
    answers = np.array(labels)[np.arange(150) % len(labels)] if len(labels) else data.sum(axis=1)
    return data, answers


def fitted(step: Any = None, columns: int = COLUMNS, labels: Any = LABELS) -> Any:
    """A model under the contract, behind a step that changes nothing unless another is given."""
    last = LogisticRegression(max_iter=1000) if len(labels) else LinearRegression()
    return make_pipeline(step or FunctionTransformer(), last).fit(*rows_and_answers(columns, labels))


def in_order(model: Any, probabilities: Any) -> Any:
    """Columns as the contract orders its labels."""
    return probabilities[:, [model.classes_.tolist().index(label) for label in LABELS]]


def asked(model: Any, rows: Any) -> Any:
    """What scikit-learn answers."""
    return (
        in_order(model, model.predict_proba(rows)).tolist()
        if LABELS
        else model.predict(rows)[:, None].tolist()
    )


def put_skops(version: Path, model: Any, **changes: Any) -> None:
    """Make a version one that is served through skops, by a model or by the bytes of its file."""
    content = model if isinstance(model, bytes) else skops.io.dumps(model)
    (version / MODEL).unlink(missing_ok=True)
    edit(version / MANIFEST, lambda manifest: manifest["files"].pop(MODEL, None))
    put(version, "model.skops", content)
    own = {
        "runtime": "skops",
        "libraries": {name: installed(name) for name in ("numpy", "scikit-learn", "skops")},
        "trusted_types": [] if model is content else sorted(skops_types(content)),
    }
    edit(version / MANIFEST, lambda manifest: manifest.update(own | changes))


def test_a_skops_model_answers_as_before_it_was_saved() -> None:
    """Probabilities are scikit-learn's own, as floats, in the order of the manifest's labels."""
    model, rows = fitted(), rows_and_answers()[0].astype(np.float32)
    content, inputs = skops.io.dumps(model), numbers(*NAMES)  # numbers, whatever the contract has
    types = sorted(skops_types(content))
    answers = SkopsRuntime(skops.io, content, types, inputs, LABELS).infer(rows)
    assert answers == asked(model, rows)
    assert {type(value) for answer in answers for value in answer} == {float}
    other = SkopsRuntime(skops.io, content, types, inputs, LABELS[::-1])
    assert other.infer(rows) == [answer[::-1] for answer in answers]


def test_only_listed_types_are_loaded(root: Path, tmp_path: Path) -> None:
    """Each type in a skops file must be listed in the manifest, also those that skops itself trusts."""
    content = skops.io.dumps(fitted(FunctionTransformer(np.sqrt)))
    needed = skops_types(content)
    own = "_logistic.LogisticRegression" if LABELS else "_base.LinearRegression"
    assert {f"sklearn.linear_model.{own}", "numpy.ndarray", "numpy.sqrt"} <= needed
    for one in sorted(needed):
        put_skops(root / "v1", content, trusted_types=sorted(needed - {one}))
        line = refused(lambda: load(root))
        assert line == f"v1/model.skops: holds a {one}, which manifest.json does not list among trusted_types"
    put_skops(root / "v1", content, trusted_types=sorted(needed))
    load(root)


def test_a_function_that_was_not_listed_is_not_called(root: Path, tmp_path: Path) -> None:
    """A model that would do something when it is loaded or asked does not get that far."""
    archive, trace = io.BytesIO(), tmp_path / "trace"
    text = {"__class__": "str", "__module__": "builtins", "__loader__": "JsonNode", "content": f'"{trace}"'}
    call = {"__class__": "mkdir", "__module__": "posix", "__loader__": "ConstructorFromReduceNode"}
    words = {"__class__": "tuple", "__module__": "builtins", "__loader__": "TupleNode", "content": [text]}
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("schema.json", json.dumps({**call, "content": words, "protocol": 2}))
    put_skops(root / "v1", archive.getvalue(), trusted_types=["builtins.str", "builtins.tuple"])
    assert "holds a posix.mkdir" in refused(lambda: load(root))
    assert not trace.exists()
    put_skops(
        root / "v1", archive.getvalue(), trusted_types=["builtins.str", "builtins.tuple", "posix.mkdir"]
    )
    refused(lambda: load(root))
    assert trace.exists()  # so it was the list that kept it shut


@pytest.mark.parametrize(
    ("libraries", "reason"),
    [
        ({"scikit-learn": "1.0"}, "was made with scikit-learn 1.0, and "),
        ({"numpy": "1.0"}, "was made with numpy 1.0, and "),
        ({"skops": "0.1"}, "add skops==0.1 to requirements/runtime.in"),
        ({"xgboost": "3.0.0"}, "was made with xgboost 3.0.0, and none is installed"),
        ({"skops": None}, "manifest.json does not say with which skops"),
    ],
    ids=str,
)
def test_libraries_of_other_versions_are_refused(
    root: Path, libraries: dict[str, str | None], reason: str
) -> None:
    """A skops model runs on the very libraries it was made with; the line says what to install."""
    put_skops(root / "v1", b"PK\x03\x04, and nothing that could be loaded")
    own = json.loads((root / "v1" / MANIFEST).read_bytes())["libraries"] | libraries
    known = {name: version for name, version in own.items() if version}
    edit(root / "v1" / MANIFEST, lambda manifest: manifest.update(libraries=known))
    line = refused(lambda: load(root))
    assert line.startswith("v1/model.skops: ")
    assert reason in line


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (fitted(columns=COLUMNS + 1), "takes other columns"),
        *[(fitted(labels=[f"other {one}" for one in LABELS]), "answers with other labels")] * bool(LABELS),
        (b"PK\x03\x04, and no archive", "cannot be loaded"),
        (pickle.dumps(LogisticRegression()), "cannot be loaded"),
        (b"", "cannot be loaded"),
    ],
    ids=["columns", *["labels"] * bool(LABELS), "no archive", "pickle", "empty"],
)
def test_a_skops_file_that_does_not_fit_is_refused(root: Path, model: Any, reason: str) -> None:
    """A model for other columns or labels, or none at all, is refused with the reason."""
    put_skops(root / "v1", model)
    line = refused(lambda: load(root))
    assert "v1/model.skops: " in line
    assert reason in line


def test_columns_are_those_of_the_frame_it_was_fitted_on(root: Path) -> None:
    """A model that remembers the names of its columns is refused when the manifest orders them otherwise."""
    model = fitted()
    model[0].feature_names_in_ = np.array(["another", *NAMES[:0:-1]], dtype=object)
    content = skops.io.dumps(model)
    with pytest.raises(Exception, match="takes other columns"):
        SkopsRuntime(skops.io, content, sorted(skops_types(content)), numbers(*NAMES), LABELS)


def test_a_model_runs_on_one_thread(root: Path) -> None:
    """Whatever a model was trained with, serving scales by workers and not by threads of threads."""
    kind = RandomForestClassifier if LABELS else RandomForestRegressor
    forest = kind(3, n_jobs=-1, random_state=0).fit(*rows_and_answers())
    put_skops(root / "v1", forest)
    runtime: Any = load_runtime(read_artifact(root, "v1"))
    assert runtime._model.n_jobs == 1


def numbers(*names: str) -> list[Input]:
    """Inputs that are numbers."""
    return [Input(name=name, dtype="float64") for name in names]


def rules(*conditions: dict[str, dict[str, float]]) -> RulesRuntime:
    """A decision list over `a` and `b`, each rule with a label of its own, else `none`."""
    labels = [f"rule {index}" for index in range(len(conditions))]
    listed = [
        {"when": when, "label": label, "score": 0.75} for when, label in zip(conditions, labels, strict=True)
    ]
    document = {"rules": listed, "otherwise": {"label": "none", "score": 0.5}}
    return RulesRuntime(document, numbers("a", "b"), [*labels, "none"])


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
    runtime = load_runtime(artifact)
    (answer,) = runtime.infer(np.array([[*EXAMPLE.values()]], runtime.dtype))
    assert len(answer) == WIDTH
    assert not LABELS or sum(answer) == pytest.approx(1)
    assert {type(value) for value in answer} == {float}


INPUTS = [
    Input(name="the colour", dtype="string"), Input(name="size", dtype="float64", nullable=True),
    Input(name="n", dtype="int64"),
]  # fmt: skip
ODD_ROWS = np.array([["red", None, 3], ["violet", 2.0, -1], ["blue", 0.5, 2**20]], object)


def on_columns(last: Any, target: list[Any]) -> tuple[Any, bytes, Any]:
    """A pipeline of `last` over INPUTS, as fitted and as ONNX, and ODD_ROWS as the frame it takes."""
    frame = pd.DataFrame(
        {"the colour": ["red", "blue", "red", "green"], "size": [1.5, np.nan, 2, 4], "n": range(4)}
    )
    text = (OneHotEncoder(handle_unknown="ignore"), ["the colour"])
    numbers_ = (make_pipeline(SimpleImputer(), StandardScaler()), ["size", "n"])
    model = make_pipeline(make_column_transformer(text, numbers_), last).fit(frame, target)
    kinds = zip(frame, (StringTensorType, FloatTensorType, Int64TensorType), strict=True)
    options = {"zipmap": False} if is_classifier(last) else None
    onnx_model = to_onnx(
        model, initial_types=[(name, kind([None, 1])) for name, kind in kinds], options=options
    )
    odd = pd.DataFrame({entry.name: ODD_ROWS.T[at].tolist() for at, entry in enumerate(INPUTS)})
    return model, onnx_model.SerializeToString(), odd


def test_columns_of_several_types_reach_the_model_as_they_are() -> None:
    """Text, gaps and whole numbers go in as sent, and what the model makes of unknown text is its own."""
    model, content, odd = on_columns(LogisticRegression(), [True, False, True, False])
    expected = model.predict_proba(odd)
    runtime = OnnxRuntime(onnxruntime, content, len(INPUTS))
    assert runtime.dtype is np.object_
    assert np.array(runtime.infer(ODD_ROWS)) == pytest.approx(expected, abs=1e-5)
    saved = skops.io.dumps(model)
    framed = SkopsRuntime(skops.io, saved, sorted(skops_types(saved)), INPUTS, [True, False])
    assert np.array(framed.infer(ODD_ROWS)) == pytest.approx(expected[:, ::-1])


def test_a_regressor_gives_a_value_a_row() -> None:
    """A value may be negative, and is a float, from ONNX, skops and rules alike."""
    model, content, odd = on_columns(LinearRegression(), [-3.5, 8.25, -4.0, 1.0])
    expected = [[value] for value in model.predict(odd).tolist()]
    onnx_answers = OnnxRuntime(onnxruntime, content, len(INPUTS)).infer(ODD_ROWS)
    assert np.array(onnx_answers) == pytest.approx(np.array(expected), rel=1e-4)
    saved = skops.io.dumps(model)
    assert SkopsRuntime(skops.io, saved, sorted(skops_types(saved)), INPUTS, []).infer(ODD_ROWS) == expected
    rule = {"when": {"the colour": {"==": "violet"}, "size": {"<": 3}}, "value": -1}
    by_rules = RulesRuntime({"rules": [rule], "otherwise": {"value": 2.5}}, INPUTS, [])
    assert by_rules.infer(ODD_ROWS) == [[2.5], [-1.0], [2.5]]


@pytest.mark.parametrize("name", ["features.py", "gone.py"])
def test_a_version_made_with_other_code_is_refused(root: Path, name: str) -> None:
    """Own code is part of the model: another file, or none, is named with the version it does not fit."""
    read_artifact(root, "v1")
    edit(root / "v1" / MANIFEST, lambda manifest: manifest.update(code=own_code()))
    read_artifact(root, "v1")
    edit(root / "v1" / MANIFEST, lambda manifest: manifest.update(code={name: "0" * 64}))
    line = refused(lambda: read_artifact(root, "v1"))
    assert line.startswith(f"app/own/{name}: is not what v1 was made with: ")


@pytest.mark.parametrize(
    "outputs",
    [{"classes": [1]}, {"threshold": {"label": "nothing", "least": 0.5}}],
    ids=["classes", "threshold"],
)
def test_decision_rules_that_do_not_fit_the_labels_are_refused(root: Path, outputs: dict[str, Any]) -> None:
    """A threshold is of one of two labels, and the model has a name of its own for each label or for none."""
    edit(root / "v1" / MANIFEST, lambda manifest: manifest["outputs"].update(outputs))
    assert f"manifest.json: outputs: Value error, {next(iter(outputs))}: " in refused(
        lambda: read_artifact(root, "v1")
    )
