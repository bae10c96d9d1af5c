"""What an import finds out of an estimator, what it asks it, and what it takes for proven."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import StackingRegressor, VotingClassifier, VotingRegressor
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeClassifier, SGDClassifier
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV, TunedThresholdClassifierCV
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.svm import LinearSVC

from app.core import store
from app.core.store import Input
from lifecycle.command import ROOT, LifecycleError
from lifecycle.importing import proof, serving
from lifecycle.importing.original import (
    AsText,
    Original,
    fitted_names,
    open_model,
    open_onnx,
    original_answers,
)
from lifecycle.importing.steps import Conversion
from tests.service.conftest import of_others

DRAW = np.random.default_rng(0)
FRAME = pd.DataFrame(
    {
        "length": DRAW.normal(5, 2, 120).round(1),
        "kind": DRAW.choice(["a", "b", "c"], 120),
        "code": DRAW.choice(["01", "08", "11"], 120),
    }
)
LABELS = np.where(FRAME.length + (FRAME.kind == "a") > 5, "yes", "no")
DTYPES = {"length": "float64", "kind": "string", "code": "string", "y": "string"}


def table(truth: Any, **columns: Any) -> Any:
    """The sample of an import: the frame with other columns in it, and the target `y`."""
    return pa.Table.from_pandas(FRAME.assign(**columns, y=truth), preserve_index=False)


def opened(
    folder: Path, estimator: Any, truth: Any, names: list[str], **dtypes: str
) -> tuple[Original, list[Input], Any]:
    """The estimator as an import finds it, its columns, and the sample."""
    joblib.dump(estimator, folder / "model.joblib")
    inputs = {name: Input(name=name, dtype={**DTYPES, **dtypes}[name]) for name in names}
    rows = table(truth)
    original = open_model(folder / "model.joblib", inputs, {}, rows, "y")
    return original, [inputs[name] for name in original.names], rows.select(original.names)


def refusal(call: Callable[[], object]) -> str:
    """The line of the LifecycleError."""
    with pytest.raises(LifecycleError) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 280
    return str(refused.value)


def logistic() -> Any:
    """A pipeline for the one column of numbers."""
    return make_pipeline(StandardScaler(), LogisticRegression())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: FixedThresholdClassifier(inner, threshold=0.3, pos_label="yes"),
        lambda inner: FixedThresholdClassifier(inner, threshold=0.3, pos_label="no"),
        lambda inner: TunedThresholdClassifierCV(inner, scoring="balanced_accuracy", random_state=0),
        lambda inner: make_pipeline(
            StandardScaler(), FixedThresholdClassifier(inner, threshold=0.8, pos_label="yes")
        ),
        lambda inner: GridSearchCV(
            FixedThresholdClassifier(inner, pos_label="yes"), {"threshold": [0.2, 0.25]}, cv=3
        ),
    ],
)
def test_a_threshold_is_read_from_the_estimator(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    """Fixed or tuned, in a pipeline or a search, of either label: the kept rule chooses as `predict` does."""
    model = wrap(logistic()).fit(FRAME[["length"]], LABELS)
    original, entries, rows = opened(tmp_path, model, LABELS, ["length"])
    scores = original_answers(original, rows, entries)
    chosen = np.array(original.labels)[original.chosen(scores)]
    assert original.outputs["threshold"]["label"] in ("yes", "no")
    assert chosen.tolist() == model.predict(FRAME[["length"]]).tolist()
    assert (scores.argmax(axis=1) != original.chosen(scores)).any()


def test_a_threshold_on_other_numbers_is_refused(tmp_path: Path) -> None:
    """Answers have probabilities, so a threshold on decision_function is refused with what to change."""
    model = FixedThresholdClassifier(LogisticRegression(), threshold=0.5, response_method="decision_function")
    model.fit(FRAME[["length"]], LABELS == "yes")
    line = refusal(lambda: opened(tmp_path, model, LABELS == "yes", ["length"]))
    assert "response_method='predict_proba'" in line


def test_words_stand_for_the_numbers_of_a_label_encoder(tmp_path: Path) -> None:
    """0 and 1 become the target's words where those in their order are right; otherwise it is refused."""
    model = logistic().fit(FRAME[["length"]], (LABELS == "yes").astype(int))
    original, entries, rows = opened(tmp_path, model, LABELS, ["length"])
    assert (original.labels, original.outputs["classes"]) == (["no", "yes"], [0, 1])
    answers = original_answers(original, rows, entries)
    proof.check_words(original, answers, pa.array(LABELS), "y")
    swapped = pa.array(np.where(LABELS == "yes", "no", "yes"))
    assert "do not match them" in refusal(lambda: proof.check_words(original, answers, swapped, "y"))


def test_labels_that_the_target_does_not_have_are_refused(tmp_path: Path) -> None:
    """A model of other labels than the target's is refused with both."""
    model = logistic().fit(FRAME[["length"]], np.where(LABELS == "yes", 7, 9))
    assert "its labels are 7, 9" in refusal(lambda: opened(tmp_path, model, LABELS, ["length"]))


def by_code(encoder: Any, columns: Any = ("code",)) -> Any:
    """A regressor with an encoder of the codes."""
    columns = [*columns] if isinstance(columns, tuple) else columns
    return make_pipeline(ColumnTransformer([("e", encoder, columns)], remainder="passthrough"), Ridge())


def by_category_encoders(name: str) -> Any:
    """An encoder of category_encoders, where it is installed."""
    return make_pipeline(getattr(of_others("category_encoders"), name)(cols=["code"]), Ridge())


def catboost() -> Any:
    """CatBoost on categories, where it is installed."""
    kind = of_others("catboost").CatBoostRegressor
    return kind(iterations=2, verbose=0, allow_writing_files=False, cat_features=["code"])


CODED: dict[str, Callable[[], Any]] = {
    "one-hot": lambda: by_code(make_pipeline(FunctionTransformer(), OneHotEncoder())),
    "ordinal": lambda: by_code(make_pipeline(FunctionTransformer(), OrdinalEncoder())),
    "union": lambda: by_code(make_union(OneHotEncoder(), OrdinalEncoder())),
    "vectoriser": lambda: by_code(CountVectorizer(), "code"),
    "votes": lambda: VotingRegressor([("a", by_code(OneHotEncoder()))]),
    "stack": lambda: StackingRegressor([("a", by_code(OneHotEncoder()))], Ridge(), cv=2),
    "target": lambda: TransformedTargetRegressor(by_code(OneHotEncoder()), transformer=StandardScaler()),
    "CatBoost": catboost,
    **{
        name: partial(by_category_encoders, name)
        for name in ("TargetEncoder", "OrdinalEncoder", "OneHotEncoder", "CountEncoder", "BinaryEncoder",
                     "LeaveOneOutEncoder")
    },
}  # fmt: skip


@pytest.mark.parametrize("make", CODED.values(), ids=CODED)
def test_columns_that_it_knows_as_text_are_asked_for(make: Callable[[], Any], tmp_path: Path) -> None:
    """Codes like 08 that the file shows as numbers, of which an encoder at any depth was fitted on words."""
    model = make().fit(FRAME[["code", "length"]], FRAME.length)
    with pytest.raises(AsText) as asked:
        opened(tmp_path, model, FRAME.length, ["code", "length"], code="int64")
    assert asked.value.args == ("code",)


@pytest.mark.parametrize("text", ["3 504", "3'504", "3\xa0504", "$3,504", "3504 lbs", "12%", "n.a.", "?"])
def test_text_where_the_model_takes_numbers_is_named(text: str, tmp_path: Path) -> None:
    """Column, row and value are told, however the value is written, with what to write instead."""
    model = LinearRegression().fit(FRAME[["length"]], FRAME.length)
    rows = pa.table({"length": ["1.5", text], "y": [1.0, 2.0]})
    inputs = {"length": Input(name="length", dtype="string")}
    joblib.dump(model, tmp_path / "model.joblib")
    original = open_model(tmp_path / "model.joblib", inputs, {}, rows, "y")
    line = refusal(lambda: original_answers(original, rows.select(["length"]), [*inputs.values()]))
    assert f"column 'length' is text where the model takes numbers: row 2 holds {text!r}; write" in line


@pytest.mark.parametrize("shape", [[None, None], [None, 1]])
def test_an_onnx_model_takes_the_width_of_the_data(shape: list[Any], tmp_path: Path) -> None:
    """An ONNX file may leave open how many columns it takes; what is served has the data's."""
    model = logistic().fit(FRAME[["length"]].to_numpy(np.float32), LABELS)
    kind = [("X", FloatTensorType(shape))]
    made = to_onnx(model, initial_types=kind, options={"zipmap": False}, target_opset=18)
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    inputs = {"length": Input(name="length", dtype="float64")}
    original = open_onnx(tmp_path / "model.onnx", inputs, table(LABELS), "y")
    answers = original_answers(original, table(LABELS).select(["length"]), [*inputs.values()])
    assert answers == pytest.approx(model.predict_proba(FRAME[["length"]].to_numpy()), abs=1e-6)


@pytest.mark.parametrize("vectoriser", [TfidfVectorizer, CountVectorizer])
def test_a_series_of_text_is_what_a_vectoriser_takes(vectoriser: type, tmp_path: Path) -> None:
    """Fitted on a Series, it gets one, whatever else the data holds."""
    model = make_pipeline(vectoriser(analyzer="char"), LogisticRegression()).fit(FRAME.kind, LABELS)
    original, entries, rows = opened(tmp_path, model, LABELS, ["length", "kind"])
    assert (original.names, original.takes) == (["kind"], {"takes": "column"})
    assert original_answers(original, rows, entries).tolist() == model.predict_proba(FRAME.kind).tolist()


def test_peculiar_rows_are_asked_too(tmp_path: Path) -> None:
    """Extremes, neighbours, every category and a new word; a column that fails on such is told."""
    encode = ColumnTransformer(
        [("strict", OneHotEncoder(), ["kind"]), ("open", OneHotEncoder(handle_unknown="ignore"), ["code"])],
        remainder="passthrough",
    )
    columns = ["length", "kind", "code"]
    model = make_pipeline(encode, Ridge()).fit(FRAME[columns], FRAME.length)
    original, entries, rows = opened(tmp_path, model, FRAME.length, columns)
    strange, closed = proof.peculiar(original, entries, rows)
    assert closed == ["kind"]
    assert {one.split("'")[2] for one in strange.told} >= {
        " of a new word", " of each kind", " at its least", " far above", " between two neighbours"
    }  # fmt: skip
    assert len(strange.answers) == strange.rows.num_rows == len(strange.told)


class Beside(FunctionTransformer):  # type: ignore[misc]  # scikit-learn has no types
    """Takes the mean of the rows that come together off: what no service may do."""

    def transform(self, rows: Any) -> Any:
        """Rows beside each other change each other."""
        return rows - rows.mean()


def test_answers_that_change_with_their_neighbours_are_refused(tmp_path: Path) -> None:
    """A row has one answer: an estimator that answers otherwise alone than in a batch is refused."""
    model = make_pipeline(Beside(), LogisticRegression()).fit(FRAME[["length"]], LABELS)
    original, entries, rows = opened(tmp_path, model, LABELS, ["length"])
    answers = original_answers(original, rows, entries)
    strange, _ = proof.peculiar(original, entries, rows)
    line = refusal(lambda: proof.Proof(original, entries, rows, answers, strange))
    assert "asked alone" in line


def request(**more: Any) -> Conversion:
    """A request that trusts nothing beyond the usual."""
    given = {"trust": [], "trust_listed": False, "inputs": [], "unusable": {}, "runtime": None} | more
    return Conversion(model=Path("model.joblib"), target="y", **given)


def test_a_form_that_does_not_load_where_it_serves_gives_way(tmp_path: Path) -> None:
    """Proven, and refused by the service: the next form is taken; the reason is told where there is none."""
    model = logistic().fit(FRAME[["length"]], LABELS)
    original, entries, rows = opened(tmp_path, model, LABELS, ["length"])
    answers = original_answers(original, rows, entries)
    strange, _ = proof.peculiar(original, entries, rows)
    proven = proof.Proof(original, entries, rows, answers, strange)
    unfit = {"ONNX": "it needs a locale"}
    assert proof.taken(request(), proven)[0].form == "ONNX"
    assert proof.taken(request(unfit=unfit), proven)[0].form == "scikit-learn itself"
    line = refusal(partial(proof.taken, request(unfit=unfit, runtime="onnx"), proven))
    assert line == "the model cannot be served: ONNX: it needs a locale"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (VotingClassifier([("a", LogisticRegression())]), "voting='soft'"),
        (make_pipeline(StandardScaler(), VotingClassifier([("a", LogisticRegression())])), "voting='soft'"),
        (SGDClassifier(), "loss='log_loss'"),
        (GridSearchCV(SGDClassifier(), {"alpha": [0.1, 1]}), "loss='log_loss'"),
        (RidgeClassifier(), "CalibratedClassifierCV"),
        (LinearSVC(), "CalibratedClassifierCV"),
    ],
)
def test_labels_without_scores_are_refused_with_what_gives_them(
    model: Any, said: str, tmp_path: Path
) -> None:
    """A setting of the model's own where there is one, a calibration where there is none."""
    model.fit(FRAME[["length"]], LABELS)
    assert said in refusal(lambda: opened(tmp_path, model, LABELS, ["length"]))


def test_types_are_trusted_by_where_they_are_from() -> None:
    """Own code and known libraries are; a notebook's never; others of a package when they are named."""
    types = ["sklearn.linear_model._base.LinearRegression", "app.own.features.Ratio", "builtins.dict"]
    assert proof.trusted(request(), types) == {"scikit-learn"}
    for strange in ("__main__.Ratio", "ownsteps.Ratio"):
        line = refusal(partial(proof.trusted, request(trust_listed=True), [strange]))
        assert "move it to app/own/features.py" in line
    assert "--trust pytest.Item" in refusal(lambda: proof.trusted(request(), ["pytest.Item"]))
    assert proof.trusted(request(trust=["pytest.Item"]), ["pytest.Item"]) == {"pytest"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cownsteps\nRatio\n.", "if it is your own code, move it to app/own/features.py"),
        (b"ccloudpickle.cloudpickle\n_make\n.", "app/own/features.py"),
        (b"capp.own.features\nNotThere\n.", "not where it was"),
    ],
)
def test_code_that_is_not_here_is_told_where_to_go(content: bytes, said: str, tmp_path: Path) -> None:
    """A module or a class that cannot be imported: what it is, and where to move it."""
    (tmp_path / "model.pkl").write_bytes(content)
    assert said in refusal(lambda: open_model(tmp_path / "model.pkl", {}, {}, table(LABELS), "y"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.cbm", b"CBM1P-\0\0\x14\0", "CatBoostClassifier or CatBoostRegressor"),
        ("model.json", b'{\n  "features_info":\n    {\n', "CatBoostClassifier or CatBoostRegressor"),
        ("model.ubj", b"{L\0\0\0\0\0\0\0\x07learner{L\0", "XGBClassifier or XGBRegressor"),
        ("model.json", b'{"learner":{"attributes":{}', "XGBClassifier or XGBRegressor"),
        ("model.model", b"{L\0\0\0\0\0\0\0\x07learner{L\0", "XGBClassifier or XGBRegressor"),
        ("model.txt", b"tree\nversion=v4\nnum_class=1\n", "LGBMClassifier or LGBMRegressor"),
        ("model.txt", b"tree\r\nversion=v4\r\n", "LGBMClassifier or LGBMRegressor"),
        ("model.json", b'{"name": "tree", "version": "v4"', "LGBMClassifier or LGBMRegressor"),
    ],
)
def test_a_file_of_a_library_of_its_own_is_refused_with_what_to_save(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    """Whatever its suffix: the first bytes tell which library wrote it."""
    (tmp_path / name).write_bytes(content)
    line = refusal(lambda: open_model(tmp_path / name, {}, {}, table(LABELS), "y"))
    assert said in line
    assert "joblib.dump" in line


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("lightgbm.basic.Booster", "LGBMClassifier"),
        ("xgboost.core.Booster", "XGBClassifier"),
        ("catboost.core.CatBoost", "CatBoostClassifier"),
    ],
)
def test_a_bare_booster_is_refused_with_what_to_save(
    kind: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library's own object knows neither labels nor columns as an estimator does."""
    module, _, name = kind.rpartition(".")
    made = type(name, (), {"__module__": module})
    monkeypatch.setitem(sys.modules, module.partition(".")[0], ModuleType(module.partition(".")[0]))
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    setattr(sys.modules[module], name, made)
    joblib.dump(made(), tmp_path / "model.joblib")
    assert said in refusal(lambda: open_model(tmp_path / "model.joblib", {}, {}, table(LABELS), "y"))


def test_packages_that_own_code_imports_belong_to_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever in the file they are imported; without own types in the model they do not count."""
    content = "import os\nfrom . import other\n\n\ndef one(x):\n    import pandas.api.types as kinds\n"
    (tmp_path / "features.py").write_text(f"{content}    from scipy import stats\n", "utf-8")
    monkeypatch.setattr(store, "OWN", tmp_path)
    monkeypatch.setattr(proof, "OWN_FOLDER", tmp_path)
    assert proof.trusted(request(), ["app.own.features.one"]) == {"pandas", "scipy"}
    assert proof.trusted(request(), ["builtins.dict"]) == set()


def test_only_the_packages_of_the_image_are_found() -> None:
    """Under `Only`, training libraries are missing even if they were imported; what is asked for is there."""
    program = (
        "import sys, sklearn, pyarrow; from lifecycle.importing.serving import Only, lacking\n"
        "with Only([]):\n"
        "    import numpy, onnxruntime, fastapi\n"
        "    for name in ('sklearn', 'pandas', 'pyarrow', 'skops.io'):\n"
        "        try: __import__(name); raise SystemExit(name)\n"
        "        except ModuleNotFoundError: pass\n"
        "with Only(['scikit-learn==1', 'skops==1']):\n"
        "    import sklearn.linear_model, scipy.stats, skops.io\n"
        "import pandas\n"
    )
    done = subprocess.run(  # in a process of its own, because modules are taken out of it
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_the_image_lacks_is_said_and_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Libraries that the lock does not hold in that version, however their names are spelled."""
    (tmp_path / "requirements").mkdir()
    lock = "numpy==2.4.0 \\\n    --hash=sha256:00\nScikit_Learn==1.9.1 ; python_version > '3'\n"
    (tmp_path / "requirements" / "runtime.txt").write_text(lock, "utf-8")
    (tmp_path / "requirements" / "runtime.in").write_text("numpy>=2 # arrays\nskops>=0.1\n", "utf-8")
    (tmp_path / "requirements" / "dev.txt").write_text("skops==0.16.0\n", "utf-8")
    monkeypatch.setattr(serving, "ROOT", tmp_path)
    found = serving.lacking({"numpy": "2.4.0", "scikit-learn": "1.9.1", "skops": "0.16.0"})
    assert found == ["skops==0.16.0"]
    assert serving.add(found, "artifacts/v2") == "numpy>=2 # arrays\nskops==0.16.0 # artifacts/v2\n"


def test_names_of_a_booster_are_those_of_the_data() -> None:
    """LightGBM writes underscores for spaces; CatBoost keeps names elsewhere; numbers are none."""
    inputs = {name: Input(name=name, dtype="float64") for name in ("sepal length (cm)", "other")}
    booster = SimpleNamespace(feature_names_in_=["other", "sepal_length_(cm)"])
    assert fitted_names(booster, inputs) == ["other", "sepal length (cm)"]
    assert fitted_names(SimpleNamespace(feature_names_=["other", "unknown"]), inputs) == ["other", "unknown"]
    assert fitted_names(SimpleNamespace(feature_names_=["0", "1"]), inputs) is None
