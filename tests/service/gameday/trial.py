"""Models that misbehave on purpose, and instances such as training had them: for the game day and for tests.

    manifest -> an ONNX graph that answers by one feature -> slow, failing or hanging -> a version folder
    baseline.json -> values of each feature by its bins -> what the model answers to them
    -> weights by which every feature, the answers and the scores have the shares of training -> instances

The models are not copies of the served one, which may be of a kind that cannot be taken apart. Their golden
set has the rows of the served version with their own answers, so they can be released like any other version.
The instances stand for training's own rows, which are not at hand. Features are drawn one by one, so what
they had to do with each other is lost but for what the weights keep.
"""

import json
import math
import random
import shutil
from bisect import bisect_left
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
from numpy.typing import NDArray

from app.core.pipeline import Pipeline
from app.core.runtimes import load_runtime
from app.core.store import MANIFEST, Input, Manifest, read_artifact
from app.schemas.contract import label_key
from app.schemas.predict import Features
from lifecycle.package import canonical_json

MODEL, GOLDEN, BASELINE = "model.onnx", "golden.jsonl", "baseline.json"
DRAWN, ROUNDS, SEED = 3000, 50, 0
SURE, SPREAD = 0.9, 0.05  # the first label's probability at the feature's minimum, and how much it grows


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a model; by default nothing."""

    sines: int = 0  # steps of useless work a row, each on `width` numbers
    width: int = 4096
    fails_above: float = math.inf  # where the feature is larger, the answer is NaN
    loops: int = 0  # turns of a useless loop a call
    hangs_at: float = math.inf  # where the feature is as large as this, the call never ends


SOUND = Trouble()


def number_of(inputs: list[Input]) -> Input | None:
    """The feature that a trial model looks at: a number with a range, one without nulls if there is one."""
    ranged = [one for one in inputs if one.training_range and one.training_range[0] < one.training_range[1]]
    numbers = [one for kind in ("float64", "int64") for one in ranged if one.dtype == kind]
    return min(numbers, key=lambda one: one.nullable, default=None)


def trial_model(manifest: Manifest, trouble: Trouble) -> bytes:
    """An ONNX file that takes one matrix, or, where the contract has text, a tensor a column."""
    inputs, feature = manifest.inputs, number_of(manifest.inputs)
    at = inputs.index(feature) if feature else 0
    low, high = (feature and feature.training_range) or (0.0, 1.0)
    if any(one.dtype == "string" for one in inputs):
        kinds = ("string" if one.dtype == "string" else "float" for one in inputs)
        taken = ", ".join(f"{kind}[N,1] column{index}" for index, kind in enumerate(kinds))
        given = [f"given = Identity (column{at})"]
    else:
        taken = f"float[N,{len(inputs)}] features"
        given = [f"which = {_constant('int64[1]', at)}", "given = Gather <axis = 1> (features, which)"]
    if feature:
        given += ["null = IsNaN (given)", "x = Where (null, low, given)"]
    else:
        given += ["shape = Shape (given)", "x = ConstantOfShape (shape)"]
    width = max(len(manifest.outputs.labels), 1)
    nodes = [f"low = {_constant('float[1]', low)}", *given, *_loop(trouble)]
    nodes += _answer(high - low, width) if manifest.outputs.labels else ["right = Identity (looped)"]
    nodes += [*_work(trouble, width), *_failure(trouble)]
    graph = f"trial ({taken}) => (float[N,{width}] answer) {{ {' '.join(nodes)} }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
    return bytes(model.SerializeToString())


def _constant(kind: str, *values: float) -> str:
    return f"Constant <value = {kind} {{{', '.join(map(repr, values))}}}> ()"


def _answer(span: float, width: int) -> list[str]:
    """The first label is likely, and more so the larger the feature; the others share the rest."""
    share = 1 / max(width - 1, 1)
    return [
        f"scale = {_constant('float[1]', 1 / span)}",
        f"spread = {_constant(f'float[1,{width}]', SPREAD, *[-SPREAD * share] * (width - 1))}",
        f"base = {_constant(f'float[1,{width}]', SURE, *[(1 - SURE) * share] * (width - 1))}",
        "above = Sub (looped, low) scaled = Mul (above, scale) bounded = Tanh (scaled)",
        "more = MatMul (bounded, spread) right = Add (more, base)",
    ]


def _loop(trouble: Trouble) -> list[str]:
    """Turns that do nothing: so many, or without an end where the feature says so."""
    if not trouble.loops and trouble.hangs_at == math.inf:
        return ["looped = Identity (x)"]
    forever = min(trouble.hangs_at, float(np.finfo(np.float32).max))
    return [
        f"yes = {_constant('bool', 1)} nothing = {_constant('float', 0)}",
        f"endless = {_constant('int64', 2**62)}",
        f"turns = {_constant('int64', trouble.loops or 1)} forever = {_constant('float', forever)}",
        "largest = ReduceMax <keepdims = 0> (x) ends = Less (largest, forever)",
        "last = Where (ends, turns, endless)",
        "result = Loop <body = turn (int64 turn, bool go, float before) => (bool again, float after)"
        " { again = Less (turn, last) after = Identity (before) }> (last, yes, nothing)",
        "looped = Add (x, result)",
    ]


def _work(trouble: Trouble, width: int) -> list[str]:
    """Sines of nothing, a row after the other, which change nothing but take their time."""
    if not trouble.sines:
        return ["late = Identity (right)"]
    names = [f"sine{step}" for step in range(trouble.sines + 1)]
    return [
        f"wide = {_constant('int64[2]', width, trouble.width)} widen = ConstantOfShape (wide)",
        f"thin = {_constant('int64[2]', trouble.width, width)} narrow = ConstantOfShape (thin)",
        "sine0 = MatMul (right, widen)",
        *(f"{after} = Sin ({before})" for before, after in pairwise(names)),
        f"zero = MatMul ({names[-1]}, narrow) late = Add (right, zero)",
    ]


def _failure(trouble: Trouble) -> list[str]:
    """NaN where the feature is beyond the limit."""
    if trouble.fails_above == math.inf:
        return ["answer = Identity (late)"]
    return [
        f"limit = {_constant('float[1]', trouble.fails_above)} negative = {_constant('float[1]', -1.0)}",
        "nan = Log (negative) beyond = Greater (x, limit) answer = Where (beyond, nan, late)",
    ]


def make_trial(folder: Path, trouble: Trouble = SOUND, *, golden: bool = True) -> None:
    """Put a trial model into the version in `folder`: with its own golden answers, or none; no baseline."""
    document = json.loads((folder / MANIFEST).read_bytes())
    for name in [name for name in document["files"] if name.startswith("model.")] + [BASELINE]:
        document["files"].pop(name, None)
        (folder / name).unlink(missing_ok=True)
    document |= {"runtime": "onnx"}
    document.pop("trusted_types", None)
    manifest = Manifest.model_validate(document)
    _write(folder, document, MODEL, trial_model(manifest, SOUND))
    rows = [json.loads(line) for line in (folder / GOLDEN).read_bytes().splitlines()]
    runtime = load_runtime(read_artifact(folder.parent, folder.name))
    values = [[row["features"][one.name] for one in manifest.inputs] for row in rows]
    labels = list(manifest.outputs.labels)
    for row, answer in zip(rows, runtime.infer(np.array(values, runtime.dtype)), strict=True):
        if labels:
            row["label"] = labels[int(np.argmax(answer))]
            row["probabilities"] = dict(zip(row["probabilities"], answer, strict=True))
        else:
            row["value"] = answer[0]
            row["tolerance"] = max(row["tolerance"], 1e-5 * abs(answer[0]))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write(folder, document, GOLDEN, lines.encode())
    if not golden:
        document["files"].pop(GOLDEN)
        (folder / GOLDEN).unlink()
    _write(folder, document, MODEL, trial_model(manifest, trouble))


def add_trial(root: Path, source: str, version: str, trouble: Trouble, *, golden: bool = True) -> None:
    """Add a version beside `source`, of the same contract, with a trial model."""
    folder = Path(shutil.copytree(root / source, root / version))
    document = json.loads((folder / MANIFEST).read_bytes()) | {"version": version}
    (folder / MANIFEST).write_bytes(canonical_json(document))
    make_trial(folder, trouble, golden=golden)


def _write(folder: Path, manifest: dict[str, Any], name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    manifest["files"][name] = {"sha256": sha256(content).hexdigest(), "size": len(content)}
    (folder / MANIFEST).write_bytes(canonical_json(manifest))


def usual(artifacts: Path, version: str, count: int = 1000) -> list[dict[str, Any]]:
    """So many instances with the shares of the baseline of `version`; the same each time."""
    artifact, chance = read_artifact(artifacts, version), random.Random(SEED)  # no secret
    baseline = json.loads(artifact.files["baseline.json"])
    inputs = artifact.manifest.inputs
    known = [json.loads(line)["features"] for line in artifact.files["golden.jsonl"].splitlines()]
    spreads = {one.name: baseline["features"][one.name] for one in inputs}
    drawn = known + [
        {one.name: _drawn(spreads[one.name], one, chance) for one in inputs} for _ in range(DRAWN)
    ]
    answers: list[Any] = Pipeline.offline(artifact).answers([Features.model_validate(row) for row in drawn])
    dimensions = [(spread, [row[name] for row in drawn]) for name, spread in spreads.items()]
    if "values" in baseline:
        dimensions.append((baseline["values"], [one.value for one in answers]))
    else:
        labels = {"categories": [*baseline["labels"]], "counts": [*baseline["labels"].values()]}
        dimensions.append((labels, [label_key(one.label) for one in answers]))
        dimensions.append((baseline["scores"], [one.score for one in answers]))
    # Raking: weights by which the shares of every dimension's bins are those of its counts.
    weights = np.full(len(drawn), 1 / len(drawn))
    binned = [(_counts(spread), [_bin(spread, value) for value in values]) for spread, values in dimensions]
    for _ in range(ROUNDS):
        for counts, bins in binned:
            there = np.bincount(bins, weights, len(counts))
            factors = np.divide(counts / counts.sum(), there, out=np.ones(len(counts)), where=there > 0)
            weights = weights * factors[bins]
    return chance.choices(drawn, weights.tolist(), k=count)


def _counts(feature: dict[str, Any]) -> NDArray[np.float64]:
    """Training's rows by bin; after the bins come those that are in none, and those that are missing."""
    return np.array([*feature["counts"], feature.get("other", 0), feature.get("missing", 0)], float)


def _drawn(feature: dict[str, Any], one: Input, chance: random.Random) -> Any:
    """A value of a feature, each bin as often as in training."""
    counts = _counts(feature).tolist()
    (at,) = chance.choices(range(len(counts)), counts)
    if at == len(counts) - 1:
        return None
    if "categories" in feature:
        strangers = [name for name in one.categories or () if name not in feature["categories"]]
        return [*feature["categories"], chance.choice(strangers or ["something else"])][at]
    least, most = one.training_range or (0.0, 1.0)
    edges = [least, *feature["edges"], most]
    low, high = max(edges[at], least), min(edges[at + 1], most)
    if one.dtype == "bool":
        return high > 0
    if one.dtype == "int64":
        return chance.randint(min(math.floor(low) + (at > 0), math.floor(high)), math.floor(high))
    return high - chance.random() * (high - low) if at else low + chance.random() * (high - low)


def _bin(feature: dict[str, Any], value: Any) -> int:
    """The bin of a value, as an index into `_counts`."""
    bins = len(feature["counts"])
    if value is None:
        return bins + 1
    if "categories" in feature:
        known = feature["categories"]
        return known.index(value) if value in known else bins
    return bisect_left(feature["edges"], value)
