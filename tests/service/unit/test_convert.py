"""Models of every kind as ONNX, equal to the original on gaps, extremes, every category and unseen words."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pyarrow as pa
import pytest
import skops.io
from sklearn.base import is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import SelectFromModel, SelectKBest
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor, Ridge, SGDClassifier
from sklearn.model_selection import GridSearchCV, HalvingRandomSearchCV, TunedThresholdClassifierCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    QuantileTransformer,
    RobustScaler,
    SplineTransformer,
    StandardScaler,
    TargetEncoder,
)
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier

from app.core.runtimes import OnnxRuntime, skops_types
from app.core.store import Input
from lifecycle.importing.convert import candidates
from lifecycle.importing.original import Candidate
from tests.service.conftest import of_others

ROWS = 240
WORDS, NUMBERS = ["island", "sex"], ["bill", "flipper", "mass"]
KINDS = {"f": "float64", "i": "int64", "b": "bool"}
Make = Callable[[], Any]


def penguins(*, gaps: bool = False) -> tuple[pd.DataFrame, pd.Series, pd.Series, pd.Series]:
    """Columns, a target of three labels, one of two, and one of numbers."""
    random = np.random.default_rng(3)
    frame = pd.DataFrame(
        {
            "island": random.choice(["Biscoe", "Dream", "Torgersen"], ROWS, p=[0.6, 0.35, 0.05]),
            "sex": random.choice(["male", "female"], ROWS),
            "bill": random.normal(44, 5, ROWS).round(1),
            "flipper": random.integers(170, 230, ROWS).astype(float),
            "mass": random.normal(4200, 800, ROWS).round(-1),
        }
    ).astype({"island": object, "sex": object})
    three = pd.Series(np.digitize(frame.bill + random.normal(0, 3, ROWS), [41, 47])).map(
        dict(enumerate("abc"))
    )
    two = (frame.mass + random.normal(0, 300, ROWS) > 4200).astype(int)
    value = frame.mass + 10 * frame.bill + random.normal(0, 100, ROWS)
    if gaps:
        for name in frame:
            frame.loc[random.random(ROWS) < 0.1, name] = np.nan
    return frame, three, two, value


def peculiar(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows, then one for each gap alone, extreme, and word that nobody has written."""
    rows = [frame.iloc[[0]].assign(**{name: [np.nan]}) for name in frame if frame[name].isna().any()]
    for name in frame:
        if frame[name].dtype.kind == "f":
            rows += [frame.iloc[[1]].assign(**{name: [end]}) for end in (-1e6, 0.0, 1e6)]
    return pd.concat([frame, *rows], ignore_index=True).astype(frame.dtypes.to_dict())


def inputs(frame: pd.DataFrame) -> list[Input]:
    """The contract of the columns."""
    return [
        Input(
            name=str(name), dtype=KINDS.get(column.dtype.kind, "string"), nullable=bool(column.isna().any())
        )
        for name, column in frame.items()
    ]


def forms(estimator: Any, frame: pd.DataFrame) -> list[Candidate]:
    """All candidates of a fitted estimator."""
    plain = {
        str(name): [None if one != one else one for one in column.astype(object)]
        for name, column in frame.items()
    }
    task = "classification" if is_classifier(estimator) else "regression"
    original: Any = SimpleNamespace(estimator=estimator, task=task, libraries={"scikit-learn"})
    found = []
    for one in candidates(original, inputs(frame), pa.table(plain)):
        found.append(one)
        with suppress(
            Exception
        ):  # as an import does: the next form is only asked for where one is not proven
            one.make()
    return found


def matrix(frame: pd.DataFrame, runtime: OnnxRuntime) -> Any:
    """Rows as the service hands them to the runtime."""
    if runtime.dtype is np.object_:
        rows = frame.astype(object)
        return rows.where(rows.notna(), None).to_numpy()
    return frame.to_numpy(runtime.dtype)


def answers(estimator: Any, frame: Any) -> Any:
    """The original's probabilities or values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_classifier(estimator):
            return estimator.predict_proba(frame)
        return np.asarray(estimator.predict(frame)).reshape(-1, 1)


def alike(given: Any, wanted: Any, deviation: float | None = None) -> None:
    """Within a tenth of what an import allows, and the same label in each row; values have a deviation."""
    given = np.asarray(given)
    assert given.shape == wanted.shape
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5 * deviation if deviation else 1e-6)
    if deviation is None:
        second, first = np.sort(wanted, axis=1)[:, -2:].T
        decided = (first == second) | (first - second > 1e-7)  # else rounding decides
        assert (given.argmax(axis=1) == wanted.argmax(axis=1))[decided].all()


def prove(estimator: Any, frame: pd.DataFrame) -> OnnxRuntime:
    """The first form is ONNX as a whole and answers as the estimator does, in a batch and alone."""
    (first, *_) = forms(estimator, frame)
    runtime = OnnxRuntime(onnxruntime, first.make()["model.onnx"], len(frame.columns))
    rows = peculiar(frame)
    wanted = answers(estimator, rows)
    deviation = None if is_classifier(estimator) else float(wanted.std())
    alike(runtime.infer(matrix(rows, runtime)), wanted, deviation)
    for at in [*range(10), *range(len(frame), len(rows))]:
        part = rows.iloc[[at]]
        alike(runtime.infer(matrix(part, runtime)), wanted[[at]], deviation)
    assert first.make() == first.make()
    return runtime


def prepared(encoder: Any, numbers: Any = None) -> Any:
    """Words by an encoder, numbers by an imputer or another step."""
    return ColumnTransformer([("words", encoder, WORDS), ("numbers", numbers or SimpleImputer(), NUMBERS)])


def imputed(strategy: str, **settings: Any) -> Any:
    """Words imputed, then encoded."""
    return make_pipeline(SimpleImputer(strategy=strategy, **settings), OneHotEncoder(handle_unknown="ignore"))


GAPS: dict[str, Make] = {
    "most frequent word": lambda: prepared(
        imputed("most_frequent"), make_pipeline(SimpleImputer(), StandardScaler())
    ),
    "constant word": lambda: prepared(imputed("constant", fill_value="none")),
    "a gap is a category": lambda: prepared(OneHotEncoder(handle_unknown="ignore")),
    "indicators": lambda: prepared(
        imputed("most_frequent"), SimpleImputer(strategy="median", add_indicator=True)
    ),
    "first dropped": lambda: prepared(OneHotEncoder(drop="first", handle_unknown="ignore")),
    "infrequent": lambda: prepared(OneHotEncoder(min_frequency=40, handle_unknown="infrequent_if_exist")),
    "ordinal": lambda: prepared(
        OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2)
    ),
    "by target": lambda: prepared(TargetEncoder(random_state=0)),
}


@pytest.mark.parametrize("case", GAPS)
def test_words_with_gaps(case: str) -> None:
    """Words are imputed and encoded as the original does, and unseen words too."""
    frame, three, two, _ = penguins(gaps=True)
    for model, target in ((LogisticRegression(max_iter=500), three), (RandomForestClassifier(10), two)):
        estimator = make_pipeline(GAPS[case](), model).fit(frame, target)
        runtime = prove(estimator, frame)
        unseen = frame.iloc[[5]].assign(island=["Atlantis"])
        alike(runtime.infer(matrix(unseen, runtime)), answers(estimator, unseen))


def test_flags_and_counts_are_encoded() -> None:
    """Booleans and integers may be categories as well."""
    frame, three, _, _ = penguins()
    frame = frame.assign(flag=frame.bill > 40, count=(frame.mass // 1000).astype(int))[
        ["flag", "count", "bill"]
    ]
    encoder = ColumnTransformer(
        [("c", OneHotEncoder(handle_unknown="ignore"), ["flag", "count"])], remainder="passthrough"
    )
    prove(make_pipeline(encoder, LogisticRegression(max_iter=900)).fit(frame, three), frame)


def test_unknown_category_is_no_answer() -> None:
    """An encoder that refuses unseen words makes no number of them; the contract refuses them first."""
    frame, _, _, value = penguins()
    estimator = make_pipeline(prepared(OneHotEncoder()), Ridge()).fit(frame, value)
    runtime = prove(estimator, frame)
    assert np.isnan(runtime.infer(matrix(frame.iloc[[5]].assign(island=["Atlantis"]), runtime))).all()


FOREST = RandomForestClassifier(20, random_state=0)
CLASSIFIERS: dict[str, Any] = {
    "scaled forest": make_pipeline(StandardScaler(), RandomForestClassifier(100, random_state=1)),
    "tree": DecisionTreeClassifier(max_depth=4),
    "histogram": HistGradientBoostingClassifier(max_iter=20),
    "boosting": GradientBoostingClassifier(n_estimators=10),
    "discriminant": LinearDiscriminantAnalysis(),
    "descent": make_pipeline(StandardScaler(), SGDClassifier(loss="log_loss")),
    "network": make_pipeline(StandardScaler(), MLPClassifier(max_iter=50)),
    "ada": AdaBoostClassifier(n_estimators=5),
    "bag of features": BaggingClassifier(n_estimators=4, max_features=2),
    "one against the rest": OneVsRestClassifier(make_pipeline(StandardScaler(), LogisticRegression())),
    "votes": VotingClassifier(
        [("a", LinearDiscriminantAnalysis()), ("b", FOREST)], voting="soft", weights=[2, 1]
    ),
    "stack": StackingClassifier(
        [("a", make_pipeline(StandardScaler(), LinearSVC())), ("b", FOREST)],
        make_pipeline(StandardScaler(), LogisticRegression()),
        passthrough=True,
        cv=3,
    ),
    "calibrated by sigmoid": CalibratedClassifierCV(make_pipeline(StandardScaler(), LinearSVC()), cv=3),
    "calibrated step by step": CalibratedClassifierCV(FOREST, method="isotonic", cv=3),
    "calibrated as one": CalibratedClassifierCV(GaussianNB(), ensemble=False, cv=3),
    "calibrated by temperature": CalibratedClassifierCV(
        HistGradientBoostingClassifier(max_iter=5), method="temperature", cv=3
    ),
    "calibrated vectors": CalibratedClassifierCV(make_pipeline(StandardScaler(), SVC()), cv=3),
    "searched": GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression()), {"logisticregression__C": [1, 2]}, cv=2
    ),
    "halving search of a calibration": HalvingRandomSearchCV(
        CalibratedClassifierCV(GaussianNB(), cv=2),
        {"method": ["sigmoid", "isotonic"]},
        random_state=0,
        cv=2,
        n_candidates=2,
        min_resources=120,
    ),
    "logarithms": make_pipeline(FunctionTransformer(np.log1p), StandardScaler(), LogisticRegression()),
    "square roots of names": make_pipeline(
        FunctionTransformer(np.sqrt, feature_names_out="one-to-one"), GaussianNB()
    ),
    "polynomials": make_pipeline(MinMaxScaler(), PolynomialFeatures(2), LogisticRegression()),
    "bins": make_pipeline(KBinsDiscretizer(4), LogisticRegression()),
    "components": make_pipeline(RobustScaler(), PCA(2, whiten=True), LogisticRegression()),
    "selected": make_pipeline(SelectKBest(k=2), StandardScaler(), LogisticRegression()),
    "selected by trees": make_pipeline(
        SelectFromModel(FOREST, threshold="mean"), LinearDiscriminantAnalysis()
    ),
    "union": make_pipeline(
        FeatureUnion([("a", StandardScaler()), ("b", MinMaxScaler())]), "passthrough", LogisticRegression()
    ),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classifiers(case: str) -> None:
    """Classifiers of three and of two labels, extremes included."""
    frame, three, two, _ = penguins()
    positive = "logarithms" in case or "roots" in case
    for target in (three, two):
        estimator = CLASSIFIERS[case].fit(frame[NUMBERS], target)
        if positive:
            rows = frame[NUMBERS]
            (first, *_) = forms(estimator, rows)
            runtime = OnnxRuntime(onnxruntime, first.make()["model.onnx"], len(NUMBERS))
            alike(runtime.infer(matrix(rows, runtime)), answers(estimator, rows))
        else:
            prove(estimator, frame[NUMBERS])


def test_ratios_of_vanishing_probabilities() -> None:
    """Far from all that was seen, each label against the rest is near 0; their shares stay the original's."""
    frame, three, _, _ = penguins()
    estimator = SGDClassifier(loss="log_loss", random_state=0).fit(frame[NUMBERS], three)
    estimator.coef_, estimator.intercept_ = np.zeros_like(estimator.coef_), np.array([-700.0, -698.0, -705.0])
    runtime = prove(estimator, frame[NUMBERS])
    assert np.max(runtime.infer(matrix(frame[NUMBERS].iloc[[0]], runtime))) < 0.9


REGRESSORS: dict[str, Any] = {
    "forest": make_pipeline(StandardScaler(), RandomForestRegressor(10)),
    "extra trees": ExtraTreesRegressor(10),
    "boosting": GradientBoostingRegressor(n_estimators=10),
    "histogram": HistGradientBoostingRegressor(max_iter=10),
    "counts": HistGradientBoostingRegressor(loss="poisson", max_iter=10),
    "votes": VotingRegressor([("a", LinearRegression()), ("b", RandomForestRegressor(5))]),
    "stack": StackingRegressor([("a", Ridge()), ("b", RandomForestRegressor(5))], cv=3),
    "standardised target": TransformedTargetRegressor(RandomForestRegressor(5), transformer=StandardScaler()),
    "quantiles of the target": TransformedTargetRegressor(
        RandomForestRegressor(5), transformer=QuantileTransformer(n_quantiles=20)
    ),
    "normal target": TransformedTargetRegressor(
        RandomForestRegressor(5),
        transformer=QuantileTransformer(n_quantiles=20, output_distribution="normal"),
    ),
}


@pytest.mark.parametrize("case", REGRESSORS)
def test_regressors(case: str) -> None:
    """Regressors, and targets that were transformed, extremes included."""
    frame, _, _, value = penguins()
    prove(REGRESSORS[case].fit(frame[NUMBERS], value), frame[NUMBERS])


def test_links() -> None:
    """The exponential of a linear value, by a model and by a target's own function."""
    frame, _, _, value = penguins()
    rows = frame[NUMBERS]
    log = TransformedTargetRegressor(
        make_pipeline(StandardScaler(), Ridge()), func=np.log1p, inverse_func=np.expm1
    )
    for estimator in (make_pipeline(StandardScaler(), PoissonRegressor()), log):
        (first, *_) = forms(estimator.fit(rows, value), rows)
        runtime = OnnxRuntime(onnxruntime, first.make()["model.onnx"], len(NUMBERS))
        alike(runtime.infer(matrix(rows, runtime)), answers(estimator, rows), float(value.std()))


def test_gaps_and_categories_of_trees() -> None:
    """Trees that know missing values and categories: of numbers, of pandas, and in pipelines."""
    frame, three, two, _ = penguins(gaps=True)
    prove(DecisionTreeClassifier().fit(frame[NUMBERS], three), frame[NUMBERS])
    prove(HistGradientBoostingClassifier(max_iter=20).fit(frame[NUMBERS], two), frame[NUMBERS])
    coded = make_pipeline(
        prepared(OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan), "passthrough"),
        HistGradientBoostingClassifier(categorical_features=[0, 1], max_iter=20),
    )
    prove(coded.fit(frame, three), frame)
    categories = frame.astype(dict.fromkeys(WORDS, "category"))
    pandas = HistGradientBoostingClassifier(categorical_features="from_dtype", max_iter=20).fit(
        categories, three
    )
    (first, *_) = forms(pandas, frame)
    runtime = OnnxRuntime(onnxruntime, first.make()["model.onnx"], len(frame.columns))
    alike(runtime.infer(matrix(frame, runtime)), answers(pandas, categories))


def test_wrappers_at_any_depth() -> None:
    """Searches, thresholds and frozen estimators within each other are looked through."""
    frame, _, two, _ = penguins()
    rows = frame[NUMBERS]
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression()), {"logisticregression__C": [1, 2]}, cv=2
    )
    for estimator in (
        TunedThresholdClassifierCV(search, cv=2),
        CalibratedClassifierCV(FrozenEstimator(search.fit(rows, two))),
        GridSearchCV(TunedThresholdClassifierCV(search, cv=2), {"store_cv_results": [True]}, cv=2),
    ):
        prove(estimator.fit(rows, two), rows)


def test_text_is_vectorised_by_scikit_learn() -> None:
    """What ONNX cannot do in every locale stays in scikit-learn, and the forest after it is ONNX."""
    frame, three, _, _ = penguins()
    frame = frame.assign(text=frame.island + " " + frame.sex)[["text", "bill"]]
    vectors = ColumnTransformer([("t", TfidfVectorizer(), "text"), ("n", StandardScaler(), ["bill"])])
    estimator = make_pipeline(vectors, RandomForestClassifier(10)).fit(frame, three)
    whole, split, *_ = forms(estimator, frame)
    with pytest.raises(Exception, match="TfidfVectorizer of text has no ONNX form"):
        whole.make()
    assert split.manifest == {"stages": ["model.skops", "model.onnx"]}
    assert split.advice.startswith("TfidfVectorizer of text has no ONNX form")
    files = split.make()
    head = skops.io.loads(files["model.skops"], trusted=sorted(skops_types(files["model.skops"])))
    features = head.transform(frame)
    runtime = OnnxRuntime(onnxruntime, files["model.onnx"], None)
    alike(runtime.infer(np.asarray(features)), answers(estimator, frame))


def test_splits_and_the_whole() -> None:
    """The part that converts is ONNX, before or after the rest; the last form is scikit-learn itself."""
    frame, three, _, _ = penguins()
    rows = frame[NUMBERS]
    neighbours = make_pipeline(StandardScaler(), KNeighborsClassifier()).fit(rows, three)
    _, split, last = forms(neighbours, rows)
    assert split.manifest == {"stages": ["model.onnx", "model.skops"]}
    assert list(last.make()) == ["model.skops"]
    assert last.libraries >= {"scikit-learn", "skops"}
    splines = make_pipeline(SplineTransformer(), LogisticRegression()).fit(rows, three)
    assert [one.manifest.get("stages", [""])[0] for one in forms(splines, rows)] == ["", "model.skops", ""]


BOOSTERS: dict[str, Callable[[Any], Any]] = {
    "lightgbm.LGBMClassifier": lambda kind: kind(n_estimators=10, min_child_samples=5, verbose=-1),
    "xgboost.XGBClassifier": lambda kind: kind(n_estimators=10, max_cat_to_onehot=1, enable_categorical=True),
    "catboost.CatBoostClassifier": lambda kind: kind(iterations=10, verbose=0, allow_writing_files=False),
}


@pytest.mark.parametrize("name", BOOSTERS)
def test_boosters(name: str) -> None:
    """Boosters on gaps, names with spaces and pandas' categories, where they are installed."""
    library, _, kind = name.partition(".")
    module = of_others(library)
    frame, three, two, _ = penguins(gaps=True)
    numbers = frame[NUMBERS].rename(columns={"bill": "bill length (mm)"})
    for target in (three.map({"a": 0, "b": 1, "c": 2}), two):
        estimator = BOOSTERS[name](getattr(module, kind))
        prove(estimator.fit(numbers, target), numbers)
        if library != "catboost":
            categories = frame.astype(dict.fromkeys(WORDS, "category"))
            estimator.fit(categories, target)
            (first, *_) = forms(estimator, frame)
            runtime = OnnxRuntime(onnxruntime, first.make()["model.onnx"], len(frame.columns))
            alike(runtime.infer(matrix(frame, runtime)), answers(estimator, categories))


def test_wrapped_boosters() -> None:
    """A booster below searches and in pipelines is looked for at any depth, where it is installed."""
    xgboost, lightgbm = of_others("xgboost"), of_others("lightgbm")
    frame, _, two, value = penguins()
    rows = frame[NUMBERS].rename(columns={"mass": "mass (g)"})
    boosting = xgboost.XGBRegressor(n_estimators=5)
    prove(GridSearchCV(boosting, {"max_depth": [2, 3]}, cv=2).fit(rows, value), rows)
    steps = make_pipeline(StandardScaler(), boosting)
    prove(TransformedTargetRegressor(steps, transformer=StandardScaler()).fit(rows, value), rows)
    prove(GridSearchCV(make_pipeline(StandardScaler(), lightgbm.LGBMClassifier(n_estimators=5, verbose=-1)),
                       {"lgbmclassifier__max_depth": [2, 3]}, cv=2).fit(rows, two), rows)  # fmt: skip


def test_resampling_pipelines() -> None:
    """imbalanced-learn's pipelines answer without their samplers, where it is installed."""
    imblearn = of_others("imblearn.pipeline")
    over, under = (of_others(f"imblearn.{one}_sampling") for one in ("over", "under"))
    frame, three, two, _ = penguins()
    rows = frame[NUMBERS]
    smote = imblearn.make_pipeline(StandardScaler(), over.SMOTE(random_state=0), LogisticRegression())
    prove(smote.fit(rows, two), rows)
    words = imblearn.make_pipeline(
        prepared(OneHotEncoder()), under.RandomUnderSampler(random_state=0), LogisticRegression(max_iter=900)
    )
    assert forms(words.fit(frame, three), frame)[-1].libraries >= {"scikit-learn", "skops"}
    prove(GridSearchCV(words, {"logisticregression__C": [1]}, cv=2).fit(frame, three), frame)


@pytest.mark.parametrize(
    "name", ["TargetEncoder", "OrdinalEncoder", "OneHotEncoder", "CountEncoder", "WOEEncoder"]
)
def test_encoders_of_others(name: str) -> None:
    """category_encoders becomes a table of what it makes of each word, where it is installed."""
    encoders = of_others("category_encoders")
    frame, _, two, _ = penguins(gaps=True)
    estimator = make_pipeline(
        getattr(encoders, name)(), SimpleImputer(), StandardScaler(), LogisticRegression()
    )
    prove(estimator.fit(frame, two), frame)
