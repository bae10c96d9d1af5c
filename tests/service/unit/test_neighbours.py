"""The answer of a row is its own: whatever rows stand beside it, in whatever order and number.

NEIGHBOUR_TABLES=10000 asks so many random tables of each version in place of a few.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import skops.io
from hypothesis import given, settings
from hypothesis import strategies as st
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from app.core.errors import ServiceError
from app.core.pipeline import Model, Policy
from app.core.runtimes import load_runtime, skops_types
from app.core.store import Artifact, Input, Manifest, Outputs
from lifecycle.package import canonical_json
from tests.service.conftest import LABELS

TABLES = int(os.environ.get("NEIGHBOUR_TABLES", "30"))
# What matrix products of another height differ by: they are summed up in another order.
ROUNDING = 1e-6 if LABELS else 1e-5  # a regressor's values here reach some tens, in single precision
WORDS = ["red", "green", "blue"]
CLASSES = ["no", "perhaps", "yes"] if LABELS else []
INPUTS = [
    Input(name="the colour", dtype="string", nullable=True, example="red"),
    Input(name="shape", dtype="string", categories=["round", "square"], example="round"),
    Input(name="size", dtype="float64", nullable=True, training_range=(0.0, 9.0), example=1.0),
    Input(name="weight", dtype="float64", training_range=(-5.0, 5.0), example=1.0),
    Input(name="n", dtype="int64", training_range=(0.0, 50.0), example=1),
    Input(name="m", dtype="int64", nullable=True, training_range=(0.0, 50.0), example=None),
    Input(name="flag", dtype="bool", example=True),
    Input(name="maybe", dtype="bool", nullable=True, example=None),
]
NAMES = [one.name for one in INPUTS]
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "the colour": st.none() | st.sampled_from([*WORDS, "", "nan", "None", "unseen"]) | st.text(max_size=4),
    "shape": st.sampled_from(["round", "square"]),
    "size": st.none() | st.floats(-1e6, 1e6) | st.floats(0, 9),
    "weight": st.floats(-1e6, 1e6) | st.floats(-5, 5),
    "n": st.integers(-10, 100),
    "m": st.none() | st.integers(-10, 100),
    "flag": st.booleans(),
    "maybe": st.none() | st.booleans(),
}
ROWS = st.lists(st.tuples(*VALUES.values()), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the service: threads that wait for each other on a busy machine take minutes."""
    with threadpool_limits(1):
        yield


@cache
def training() -> tuple[pd.DataFrame, Any]:
    """A frame as the import makes one of the contract's columns, with gaps, and an answer for each row."""
    draw = np.random.default_rng(0)
    rows = 200
    numbers = {"size": draw.uniform(0, 9, rows), "weight": draw.uniform(-5, 5, rows)}
    frame = pd.DataFrame(
        {
            "the colour": pd.Series([[*WORDS, np.nan][at] for at in draw.integers(0, 4, rows)], dtype=object),
            "shape": pd.Series(draw.choice(["round", "square"], rows), dtype=object),
            "size": np.where(draw.random(rows) < 0.2, np.nan, numbers["size"]),
            "weight": numbers["weight"],
            "n": draw.integers(0, 50, rows),
            "m": np.where(draw.random(rows) < 0.2, np.nan, draw.integers(0, 50, rows)),
            "flag": draw.random(rows) < 0.5,
            "maybe": pd.Series([[True, False, np.nan][at] for at in draw.integers(0, 3, rows)], dtype=object),
        }
    )
    value = numbers["weight"] + numbers["size"] + 3 * (frame["the colour"] == "red") + 2 * frame["flag"]
    return frame, np.digitize(value, [3, 6]) if CLASSES else value.to_numpy()


def model_of(
    runtime: Any,
    files: dict[str, bytes],
    *,
    classes: list[Any] | None = None,
    inputs: list[Input] = INPUTS,
    policy: Policy | None = None,
    outputs: dict[str, Any] | None = None,
    **fields: Any,
) -> Model:
    """A version in memory, loaded as the service loads one."""
    content = files.get("model.skops")
    sizes = {
        name: {"sha256": hashlib.sha256(one).hexdigest(), "size": len(one)} for name, one in files.items()
    }
    needed = ("numpy", "scikit-learn", "skops")
    manifest = Manifest.model_validate(
        {
            "name": "neighbours",
            "version": "v1",
            "task": "classification" if CLASSES else "regression",
            "runtime": runtime,
            "files": sizes,
            "inputs": inputs,
            "outputs": Outputs.model_validate(
                {"labels": CLASSES, "classes": (classes or []) if CLASSES else [], **(outputs or {})}
            ),
            "training": None,
            "libraries": {name: __import__("importlib.metadata").metadata.version(name) for name in needed},
            "trusted_types": sorted(skops_types(content)) if content else [],
            "contract_sha256": "0" * 64,
            **fields,
        }
    )
    artifact = Artifact(manifest, files)
    return Model(artifact, load_runtime(artifact), policy or Policy())


def last() -> Any:
    """A linear model of the contract's task."""
    return LogisticRegression(max_iter=500) if CLASSES else LinearRegression()


@cache
def onnx_of_words_and_numbers() -> Model:
    """Words and numbers as tensors of a column each."""
    frame, target = training()
    words = ["the colour", "shape"]
    numbers = [name for name in NAMES if name not in words]
    kept = frame.astype(dict.fromkeys(numbers, float)).fillna({"the colour": ""})
    pipeline = make_pipeline(
        make_column_transformer(
            (OneHotEncoder(handle_unknown="ignore"), words),
            (make_pipeline(SimpleImputer(), StandardScaler()), numbers),
        ),
        last(),
    ).fit(kept, target)
    declared = [
        (name, StringTensorType([None, 1]) if name in words else FloatTensorType([None, 1])) for name in NAMES
    ]
    options = {id(pipeline): {"zipmap": False}} if CLASSES else None
    content = to_onnx(
        pipeline, initial_types=declared, options=options, target_opset={"": 18, "ai.onnx.ml": 3}
    )
    return model_of("onnx", {"model.onnx": content.SerializeToString()})


def imputing_pipeline() -> Any:
    """The pipeline of the textbooks: words with gaps, imputed and one-hot encoded, and scaled numbers."""
    frame, target = training()
    words, numbers = ["the colour", "shape", "maybe"], ["size", "weight", "n", "m", "flag"]
    encoded = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    scaled = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    return make_pipeline(make_column_transformer((encoded, words), (scaled, numbers)), last()).fit(
        frame, target
    )


@cache
def skops_pipeline() -> Model:
    """The textbook's pipeline, served by scikit-learn, whose classes are numbers."""
    return model_of("skops", {"model.skops": skops.io.dumps(imputing_pipeline())}, classes=[0, 1, 2])


@cache
def split_pipeline() -> Model:
    """The same in two files: scikit-learn prepares the rows, ONNX answers."""
    pipeline = imputing_pipeline()
    width = pipeline[0].transform(training()[0][:1]).shape[1]
    options = {id(pipeline[-1]): {"zipmap": False}} if CLASSES else None
    kind = [("features", FloatTensorType([None, width]))]
    content = to_onnx(
        pipeline[-1], initial_types=kind, options=options, target_opset={"": 18, "ai.onnx.ml": 3}
    )
    files = {"model.skops": skops.io.dumps(pipeline[0]), "model.onnx": content.SerializeToString()}
    return model_of("skops", files, stages=["model.skops", "model.onnx"])


@cache
def categories_of_pandas() -> Model:
    """Gradient boosting on columns of pandas categories, as LightGBM and XGBoost take them too."""
    frame, target = training()
    colours, shapes = sorted(WORDS), ["square", "round"]
    kinds = {"the colour": pd.CategoricalDtype(colours), "shape": pd.CategoricalDtype(shapes)}
    kept = frame.astype(kinds | {"maybe": float})
    kind = HistGradientBoostingClassifier if CLASSES else HistGradientBoostingRegressor
    boosting = kind(max_iter=5, categorical_features="from_dtype", random_state=0).fit(kept, target)
    dtypes = {"the colour": colours, "shape": shapes, "maybe": "float64"}
    return model_of(
        "skops", {"model.skops": skops.io.dumps(boosting)}, classes=[0, 1, 2], takes="frame", dtypes=dtypes
    )


@cache
def rules() -> Model:
    """A decision list."""
    verdicts = [{"label": one, "score": 0.9} for one in CLASSES] or [
        {"value": one} for one in (1.0, 2.0, 3.0)
    ]
    listed = [{"when": {"the colour": {"==": "red"}, "size": {"<": 3}}, **verdicts[0]},
              {"when": {"m": {">=": 7}, "flag": {"==": True}}, **verdicts[1]}]  # fmt: skip
    return model_of("rules", {"rules.json": canonical_json({"rules": listed, "otherwise": verdicts[2]})})


def numbers_of(answer: Any) -> list[float]:
    """An answer as numbers; an error is none."""
    if isinstance(answer, ServiceError):
        return []
    return [*answer.probabilities.values()] if CLASSES else [answer.value]


EXACT: dict[Callable[[], Model], float] = {rules: 0.0, categories_of_pandas: 0.0}


@pytest.mark.parametrize(
    "version", [onnx_of_words_and_numbers, skops_pipeline, split_pipeline, categories_of_pandas, rules]
)
@settings(max_examples=TABLES)
@given(rows=ROWS, data=st.data())
def test_an_answer_does_not_depend_on_the_rows_beside_it(
    version: Callable[[], Model], rows: list[Any], data: st.DataObject
) -> None:
    """A row alone, in its table, in another order and in parts of it gets the same answer."""
    model, tolerance = version(), EXACT.get(version, ROUNDING)
    alone = [model.run([row]).answers[0] for row in rows]
    order = data.draw(st.permutations(range(len(rows))))
    cut = data.draw(st.integers(0, len(rows)))
    for part in (range(len(rows)), order[:cut], order[cut:]):
        for at, answer in zip(
            part, model.run([rows[at] for at in part]).answers if part else (), strict=True
        ):
            expected = numbers_of(alone[at])
            assert numbers_of(answer) == pytest.approx(expected, rel=tolerance, abs=tolerance), rows[at]


@pytest.mark.parametrize("version", [skops_pipeline, split_pipeline, categories_of_pandas])
def test_a_column_that_is_missing_in_every_row_has_the_type_it_had_in_training(
    version: Callable[[], Model],
) -> None:
    """Of a call whose rows all lack a word, scikit-learn sees a column of objects, as when it was fitted."""
    model = version()
    full = ("red", "round", 1.0, 2.0, 3, 4, True, False)
    for at, entry in enumerate(INPUTS):
        if entry.nullable:
            lacking = (*full[:at], None, *full[at + 1 :])
            (alone,) = model.run([lacking]).answers
            beside = model.run([full, lacking, full]).answers[1]
            assert numbers_of(alone) == pytest.approx(numbers_of(beside), rel=ROUNDING, abs=ROUNDING) != []


def test_the_frame_is_the_one_of_training() -> None:
    """Each column's type in the frame that a pipeline is asked with is that of the frame it was fitted on."""
    runtime: Any = skops_pipeline().runtime
    frame, _ = training()
    empty = runtime._rows(np.array([[None, "round", None, 1.0, 2, None, True, None]], object))
    assert list(empty.dtypes) == list(frame.dtypes)
    assert [value is np.nan or value != value for value in empty.iloc[0]] == [
        entry.nullable for entry in INPUTS
    ]


@pytest.mark.skipif(not LABELS, reason="a regressor has no score")
def test_one_text_column_goes_in_as_a_series() -> None:
    """A vectoriser that was fitted on a Series of texts gets a row of texts, "" where one is missing."""
    texts = ["chevrolet chevelle malibu", "buick skylark", "toyota corona", "datsun pl510", "vw 1131"]
    target = ["no", "no", "yes", "yes", "perhaps"]
    fitted = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(pd.Series(texts), target)
    text = [Input(name="Name", dtype="string", nullable=True, example="buick")]
    model = model_of("skops", {"model.skops": skops.io.dumps(fitted)}, inputs=text, takes="column")
    answers = model.run([(one,) for one in [*texts, None]]).answers
    assert np.array([numbers_of(one) for one in answers]) == pytest.approx(fitted.predict_proba([*texts, ""]))


@pytest.mark.skipif(not LABELS, reason="a regressor has no score")
@pytest.mark.parametrize(("rule", "label"), [(None, "no"), (("yes", 0.4848), "yes"), (("no", 0.52), "yes")])
def test_a_threshold_decides_in_place_of_the_most_probable_label(
    rule: tuple[str, float] | None, label: str
) -> None:
    """A tuned threshold is part of the model: 0.487 of `yes` is enough where 0.4848 is asked."""
    verdict = {"label": "no", "score": 0.513}
    threshold = {"label": rule[0], "least": rule[1]} if rule else None
    model = model_of(
        "rules", {"rules.json": canonical_json({"rules": [], "otherwise": verdict})},
        outputs={"labels": ["no", "yes"], "threshold": threshold},
    )  # fmt: skip
    (answer,) = model.run([tuple(entry.example for entry in INPUTS)]).answers
    assert (answer.label, answer.score) == (label, answer.probabilities[label])


@pytest.mark.parametrize(
    ("column", "value"),
    [("size", 1e40), ("weight", -1e300), ("n", 2**63), ("n", 2**53 + 1), ("m", -(2**70)), ("n", 10**400)],
)
@pytest.mark.parametrize("version", [onnx_of_words_and_numbers, skops_pipeline, rules])
def test_a_number_beyond_what_the_model_computes_with_is_the_clients(
    version: Callable[[], Model], column: str, value: Any
) -> None:
    """A finite number never fails as the service's error: it is answered, or 422 names the field."""
    model = version()
    good = ("red", "round", 1.0, 2.0, 3, 4, True, False)
    bad = tuple(value if name == column else one for name, one in zip(NAMES, good, strict=True))
    before, answer, after = model.run([good, bad, good]).answers
    assert numbers_of(before) == numbers_of(after) != []
    if isinstance(answer, ServiceError):
        assert (answer.code, [one["loc"] for one in answer.errors]) == ("invalid_input", [[column]])
    assert isinstance(answer, ServiceError) or abs(value) < 2**63 or column in ("size", "weight")
