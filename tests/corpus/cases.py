"""Models as people write them, each a function: `python cases.py FOLDER CASE...` fits them.

They come from scikit-learn's documentation, from questions about its converters and from notebooks; the
tables are those of scikit-learn, palmerpenguins and vega_datasets. For each case: FOLDER/<case>/model.*, the
training data, and asked.json: rows as a client sends them, and what the original answers. Runs in a rendered
service's environment, with what requirements/models.txt locks.
"""

import importlib.util
import json
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor, make_column_selector
from sklearn.cross_decomposition import PLSRegression
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingRegressor,
    ExtraTreesClassifier,
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
)  # fmt: skip
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.feature_selection import SelectFromModel, SelectKBest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import (
    ElasticNet,
    HuberRegressor,
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
)  # fmt: skip
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    RandomizedSearchCV,
    TunedThresholdClassifierCV,
)  # fmt: skip
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import ComplementNB, GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline, make_union
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    LabelEncoder,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    SplineTransformer,
    StandardScaler,
    TargetEncoder,
)  # fmt: skip
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from vega_datasets import data as vega

ROWS = 40  # asked, of each case, besides the peculiar ones
STRANGER = "a word that no row has"
HERE = Path(__file__).parent
Frame = Any


@dataclass
class Case:
    """A fitted model, the table it was fitted on, and how it is saved and asked."""

    model: Any
    rows: Frame
    target: Any
    name: str  # of the target's column
    suffix: str = ".csv"  # of the data file
    given: Callable[[Frame], Any] = lambda rows: rows  # from a table to what the model takes
    save: Callable[[Any, Path], None] = lambda model, folder: _joblib(model, folder)
    answer: Any = None  # the estimator to compare with, if the model itself cannot be asked
    labels: Sequence[str] = ()  # words of the file, where the model was fitted on their numbers


def _joblib(model: Any, folder: Path) -> None:
    joblib.dump(model, folder / "model.joblib")


def _bytes(name: str) -> Callable[[bytes, Path], None]:
    def save(content: bytes, folder: Path) -> None:
        (folder / name).write_bytes(content)

    return save


def own() -> Any:
    """The module of own code, under the name that it has in the service."""
    if "app.own.features" not in sys.modules:
        for name in ("app", "app.own"):
            sys.modules[name] = types.ModuleType(name)
        spec = importlib.util.spec_from_file_location("app.own.features", HERE / "own.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["app.own.features"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["app.own.features"])
    return sys.modules["app.own.features"]


# --- tables ----------------------------------------------------------------------------------------------


def iris() -> tuple[Frame, Any]:
    """150 flowers of three species; names with spaces and brackets."""
    bunch = load_iris(as_frame=True)
    return bunch.data, pd.Series(bunch.target_names[bunch.target], name="species")


def wine() -> tuple[Frame, Any]:
    """178 wines of three cultivars, 13 columns."""
    bunch = load_wine(as_frame=True)
    return bunch.data, bunch.target


def cancer() -> tuple[Frame, Any]:
    """569 tumours, 30 columns, labels 0 and 1."""
    bunch = load_breast_cancer(as_frame=True)
    return bunch.data, bunch.target


def digits() -> tuple[Frame, Any]:
    """1,797 pictures of 64 whole numbers, ten labels."""
    bunch = load_digits(as_frame=True)
    return bunch.data.astype("int64"), bunch.target


def diabetes() -> tuple[Frame, Any]:
    """442 patients, ten columns, a number to predict."""
    bunch = load_diabetes(as_frame=True, scaled=False)
    return bunch.data, bunch.target


def penguins(*, complete: bool = False) -> tuple[Frame, Any]:
    """344 penguins: words and numbers with gaps."""
    from palmerpenguins import load_penguins

    table = load_penguins()
    table = table.dropna().reset_index(drop=True) if complete else table
    return table.drop(columns="species"), table["species"]


MEASURES = ["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"]
WORDS = ["island", "sex"]


def cars() -> Frame:
    """398 cars: words, open text, whole numbers, gaps."""
    table = vega.cars().dropna(subset="Miles_per_Gallon").reset_index(drop=True)
    return table.assign(brand=table["Name"].str.split().str[0]).drop(columns="Year")


def mileage(*columns: str) -> tuple[Frame, Any]:
    """Some columns of the cars, and how far they drive."""
    table = cars()
    return table[list(columns)], table["Miles_per_Gallon"]


def origin(*columns: str) -> tuple[Frame, Any]:
    """Some columns of the cars, and where they come from."""
    table = cars()
    return table[list(columns)], table["Origin"]


def weather() -> tuple[Frame, Any]:
    """1,461 days in Seattle, of five kinds; the date as text."""
    table = pd.read_csv(vega.seattle_weather.filepath)
    return table.drop(columns="weather"), table["weather"]


def airports() -> tuple[Frame, Any]:
    """Names and places of 1,000 airports, and whether they are in the west."""
    table = vega.airports().dropna()[:1000].reset_index(drop=True)
    west = pd.Series(np.where(table["longitude"] < -95, "west", "east"), name="half")
    return table[["iata", "name", "city", "state", "latitude"]], west


def barley() -> tuple[Frame, Any]:
    """120 fields: three columns of categories, one of them a number."""
    table = vega.barley()
    return table[["variety", "year", "site"]], table["yield"]


def textbook(final: Any, words: Sequence[str] = WORDS, numbers: Sequence[str] = MEASURES) -> Any:
    """Impute and scale numbers, impute and encode words: the pipeline of scikit-learn's own examples."""
    numeric = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    text = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    prepare = ColumnTransformer([("num", numeric, list(numbers)), ("cat", text, list(words))])
    return make_pipeline(prepare, final)


# --- numbers alone ---------------------------------------------------------------------------------------


def logistic_scaled() -> Case:
    """Scaled, then logistic; names with spaces, text labels."""
    rows, target = iris()
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, target)
    return Case(model, rows, target, "species")


def logistic_array() -> Case:
    """Fitted on an array without names; labels -1 and 1."""
    rows, target = cancer()
    signs = target * 2 - 1
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows.to_numpy(), signs.to_numpy())
    return Case(model, rows, signs, "sign", given=np.asarray)


def logistic_single_column() -> Case:
    """One feature, a boolean label."""
    rows, target = cancer()
    rows, benign = rows[["worst radius"]], target == 1
    return Case(LogisticRegression().fit(rows, benign), rows, benign, "benign", ".parquet")


def svc_calibrated() -> Case:
    """What the documentation advises in place of probability=True."""
    rows, target = wine()
    model = CalibratedClassifierCV(make_pipeline(StandardScaler(), SVC()), ensemble=False).fit(rows, target)
    return Case(model, rows, target, "cultivar")


def linear_svc_calibrated() -> Case:
    """The calibrated classifier at the end of a pipeline; sigmoids of five folds."""
    rows, target = cancer()
    model = make_pipeline(StandardScaler(), CalibratedClassifierCV(LinearSVC())).fit(rows, target)
    return Case(model, rows, target, "benign")


def forest_isotonic() -> Case:
    """A forest calibrated by steps."""
    rows, target = cancer()
    inner = RandomForestClassifier(20, random_state=0)
    model = CalibratedClassifierCV(inner, method="isotonic", cv=3).fit(rows, target)
    return Case(model, rows, target, "benign", ".parquet")


def mlp_wide() -> Case:
    """64 columns of whole numbers, a small network, ten labels."""
    rows, target = digits()
    model = make_pipeline(MinMaxScaler(), MLPClassifier((32,), max_iter=60, random_state=0)).fit(rows, target)
    return Case(model, rows, target, "digit", ".parquet")


def pca_logistic() -> Case:
    """Components, then logistic, chosen by a grid search around the pipeline."""
    rows, target = digits()
    steps = Pipeline([("scale", StandardScaler()), ("pca", PCA()), ("logistic", LogisticRegression(C=0.1))])
    model = GridSearchCV(steps, {"pca__n_components": [8, 16]}, cv=2).fit(rows, target)
    return Case(model, rows, target, "digit", ".parquet")


def lda() -> Case:
    """Linear discriminants."""
    rows, target = wine()
    return Case(LinearDiscriminantAnalysis().fit(rows, target), rows, target, "cultivar")


def qda() -> Case:
    """Quadratic discriminants."""
    rows, target = wine()
    model = QuadraticDiscriminantAnalysis(reg_param=0.1).fit(rows, target)
    return Case(model, rows, target, "cultivar")


def naive_bayes() -> Case:
    """Gaussian naive Bayes."""
    rows, target = iris()
    return Case(GaussianNB().fit(rows, target), rows, target, "species")


def naive_bayes_counts() -> Case:
    """Counts, ten labels."""
    rows, target = digits()
    return Case(MultinomialNB().fit(rows, target), rows, target, "digit", ".parquet")


def neighbours() -> Case:
    """Five neighbours, weighted by distance."""
    rows, target = iris()
    model = make_pipeline(StandardScaler(), KNeighborsClassifier(weights="distance")).fit(rows, target)
    return Case(model, rows, target, "species")


def neighbours_regressor() -> Case:
    """The mean of neighbours."""
    rows, target = diabetes()
    model = make_pipeline(StandardScaler(), KNeighborsRegressor(8)).fit(rows, target)
    return Case(model, rows, target, "progression")


def ridge_polynomial() -> Case:
    """All products of two columns."""
    rows, target = diabetes()
    model = make_pipeline(StandardScaler(), PolynomialFeatures(2), Ridge()).fit(rows, target)
    return Case(model, rows, target, "progression")


def elastic_robust() -> Case:
    """Scaled by medians and quartiles."""
    rows, target = diabetes()
    model = make_pipeline(RobustScaler(), ElasticNet(0.1)).fit(rows, target)
    return Case(model, rows, target, "progression", ".jsonl")


def svr() -> Case:
    """A support vector regressor whose target is scaled too."""
    rows, target = diabetes()
    inner = make_pipeline(StandardScaler(), SVR())
    model = TransformedTargetRegressor(inner, transformer=StandardScaler()).fit(rows, target)
    return Case(model, rows, target, "progression")


def gaussian_process() -> Case:
    """A Gaussian process."""
    rows, target = diabetes()
    process = GaussianProcessRegressor(RBF(3.0) + WhiteKernel(), normalize_y=True, random_state=0)
    model = make_pipeline(StandardScaler(), process).fit(rows[:150], target[:150])
    return Case(model, rows[:150], target[:150], "progression")


def huber_power() -> Case:
    """Yeo and Johnson's transformation, then a robust regression."""
    rows, target = diabetes()
    model = make_pipeline(PowerTransformer(), HuberRegressor(max_iter=500)).fit(rows, target)
    return Case(model, rows, target, "progression")


def quantile_ridge() -> Case:
    """Quantiles of normal distributions."""
    rows, target = diabetes()
    scaler = QuantileTransformer(n_quantiles=100, output_distribution="normal", random_state=0)
    return Case(make_pipeline(scaler, Ridge()).fit(rows, target), rows, target, "progression")


def binned() -> Case:
    """Numbers cut into five bins each."""
    rows, target = iris()
    bins = KBinsDiscretizer(5, quantile_method="averaged_inverted_cdf")
    model = make_pipeline(bins, LogisticRegression()).fit(rows, target)
    return Case(model, rows, target, "species")


def splines() -> Case:
    """Splines of each column; five labels."""
    rows, target = weather()
    rows = rows.drop(columns="date")
    model = make_pipeline(SplineTransformer(n_knots=4), StandardScaler(), LogisticRegression(max_iter=2_000))
    return Case(model.fit(rows, target), rows, target, "weather")


def poisson() -> Case:
    """Counts to predict, on whole numbers."""
    rows, target = mileage("Cylinders", "Displacement", "Weight_in_lbs")
    model = make_pipeline(MaxAbsScaler(), PoissonRegressor()).fit(rows, target)
    return Case(model, rows, target, "Miles_per_Gallon")


def sgd() -> Case:
    """Stochastic descent with the logistic loss, three labels."""
    rows, target = wine()
    model = make_pipeline(StandardScaler(), SGDClassifier(loss="log_loss", random_state=0)).fit(rows, target)
    return Case(model, rows, target, "cultivar")


def kernel_map() -> Case:
    """An approximate kernel map before a linear model."""
    rows, target = cancer()
    model = make_pipeline(StandardScaler(), Nystroem(n_components=40, random_state=0), LogisticRegression())
    return Case(model.fit(rows, target), rows, target, "benign")


def partial_least_squares() -> Case:
    """A regressor that answers with a column."""
    rows, target = diabetes()
    return Case(PLSRegression(4).fit(rows, target), rows, target, "progression")


def selected() -> Case:
    """The best ten columns."""
    rows, target = cancer()
    model = make_pipeline(SelectKBest(k=10), StandardScaler(), LogisticRegression()).fit(rows, target)
    return Case(model, rows, target, "benign")


def selected_by_trees() -> Case:
    """The columns that trees find important."""
    rows, target = wine()
    chooser = SelectFromModel(ExtraTreesClassifier(20, random_state=0))
    model = make_pipeline(chooser, Normalizer(), LogisticRegression()).fit(rows, target)
    return Case(model, rows, target, "cultivar")


def union() -> Case:
    """Components beside chosen columns."""
    rows, target = wine()
    parts = FeatureUnion([("pca", PCA(3)), ("best", SelectKBest(k=3))])
    model = make_pipeline(StandardScaler(), parts, LogisticRegression()).fit(rows, target)
    return Case(model, rows, target, "cultivar")


# --- trees and ensembles ---------------------------------------------------------------------------------


def tree() -> Case:
    """One tree."""
    rows, target = cancer()
    return Case(DecisionTreeClassifier(max_depth=5, random_state=0).fit(rows, target), rows, target, "benign")


def scaled_forest() -> Case:
    """A scaler before a forest, which does not need it, as many write it."""
    rows, target = penguins(complete=True)
    rows = rows[MEASURES]
    model = make_pipeline(StandardScaler(), RandomForestClassifier(50, random_state=1)).fit(rows, target)
    return Case(model, rows, target, "species")


def imputed_scaled_forest() -> Case:
    """Gaps filled, then scaled, then a forest of regressors."""
    rows, target = mileage("Horsepower", "Weight_in_lbs", "Acceleration")
    steps = (SimpleImputer(), StandardScaler(), RandomForestRegressor(30, random_state=0))
    return Case(make_pipeline(*steps).fit(rows, target), rows, target, "Miles_per_Gallon")


def extra_trees_scaled() -> Case:
    """Extra trees behind a scaler to 0..1."""
    rows, target = wine()
    model = make_pipeline(MinMaxScaler(), ExtraTreesClassifier(30, random_state=0)).fit(rows, target)
    return Case(model, rows, target, "cultivar")


def gradient_boosting() -> Case:
    """Booleans as labels."""
    rows, target = cancer()
    model = GradientBoostingClassifier(n_estimators=20, random_state=0).fit(rows, target == 1)
    return Case(model, rows, target == 1, "benign", ".jsonl")


def histogram() -> Case:
    """Histogram boosting of five labels."""
    rows, target = weather()
    rows = rows.drop(columns="date")
    model = HistGradientBoostingClassifier(max_iter=20, random_state=0).fit(rows, target)
    return Case(model, rows, target, "weather")


def histogram_gaps() -> Case:
    """Histogram boosting of two labels, to which missing values are values."""
    rows, target = penguins()
    rows, adelie = rows[MEASURES], target == "Adelie"
    model = HistGradientBoostingClassifier(max_iter=20, random_state=0).fit(rows, adelie)
    return Case(model, rows, adelie, "adelie")


def histogram_categories() -> Case:
    """Words encoded as numbers, and told to the trees as categories."""
    rows, target = mileage("Origin", "brand", "Horsepower", "Weight_in_lbs")
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, min_frequency=5)
    prepare = ColumnTransformer([("words", encoder, ["Origin", "brand"])], remainder="passthrough")
    boosting = HistGradientBoostingRegressor(categorical_features=[0, 1], max_iter=30, random_state=0)
    return Case(make_pipeline(prepare, boosting).fit(rows, target), rows, target, "Miles_per_Gallon")


def histogram_pandas_categories() -> Case:
    """Categories that are pandas' own."""
    rows, target = penguins()
    rows = rows.astype(dict.fromkeys(WORDS, "category"))
    model = HistGradientBoostingClassifier(max_iter=20, random_state=0).fit(rows, target)
    return Case(model, rows, target, "species", ".parquet")


def histogram_poisson() -> Case:
    """The Poisson loss, whose answers are exponentials."""
    rows, target = mileage("Cylinders", "Displacement", "Horsepower")
    model = HistGradientBoostingRegressor(loss="poisson", max_iter=30, random_state=0).fit(rows, target)
    return Case(model, rows, target, "Miles_per_Gallon", ".parquet")


def ada_boost() -> Case:
    """Stumps in sequence."""
    rows, target = iris()
    return Case(
        AdaBoostClassifier(n_estimators=20, random_state=0).fit(rows, target), rows, target, "species"
    )


def bagging() -> Case:
    """Ten pipelines, each on a sample."""
    rows, target = diabetes()
    inner = make_pipeline(StandardScaler(), Ridge())
    model = BaggingRegressor(inner, random_state=0, max_features=0.7).fit(rows, target)
    return Case(model, rows, target, "progression")


def one_against_rest() -> Case:
    """A classifier for each label."""
    rows, target = wine()
    model = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression())).fit(rows, target)
    return Case(model, rows, target, "cultivar")


def voting_soft() -> Case:
    """Three kinds that vote by probability, with weights."""
    rows, target = iris()
    members = [
        ("logistic", make_pipeline(StandardScaler(), LogisticRegression())),
        ("forest", RandomForestClassifier(10, random_state=0)),
        ("bayes", GaussianNB()),
    ]
    model = VotingClassifier(members, voting="soft", weights=[2, 1, 1]).fit(rows, target)
    return Case(model, rows, target, "species")


def voting_regressor() -> Case:
    """The mean of two kinds."""
    rows, target = diabetes()
    members = [("line", LinearRegression()), ("forest", RandomForestRegressor(20, random_state=0))]
    return Case(VotingRegressor(members).fit(rows, target), rows, target, "progression")


def stacking() -> Case:
    """Logistic on what a forest and a support vector machine say."""
    rows, target = cancer()
    members = [
        ("forest", RandomForestClassifier(10, random_state=0)),
        ("svc", make_pipeline(StandardScaler(), LinearSVC())),
    ]
    model = StackingClassifier(members, LogisticRegression(), cv=3).fit(rows, target)
    return Case(model, rows, target, "benign")


def stacking_regressor() -> Case:
    """A ridge on what neighbours, boosting and a line say."""
    rows, target = mileage("Displacement", "Weight_in_lbs", "Acceleration")
    members = [
        ("near", make_pipeline(StandardScaler(), KNeighborsRegressor())),
        ("boost", GradientBoostingRegressor(n_estimators=20, random_state=0)),
        ("line", LinearRegression()),
    ]
    model = StackingRegressor(members, Ridge(), cv=3).fit(rows, target)
    return Case(model, rows, target, "Miles_per_Gallon")


# --- decisions -------------------------------------------------------------------------------------------


def tuned_threshold() -> Case:
    """A threshold tuned for F1 in place of one half."""
    rows, target = cancer()
    inner = make_pipeline(StandardScaler(), LogisticRegression())
    model = TunedThresholdClassifierCV(inner, scoring="f1", random_state=0).fit(rows, target)
    return Case(model, rows, target, "target")


def fixed_threshold() -> Case:
    """A threshold of a fifth, because misses are dear."""
    rows, target = cancer()
    inner = make_pipeline(StandardScaler(), LogisticRegression())
    model = FixedThresholdClassifier(inner, threshold=0.2).fit(rows, target)
    return Case(model, rows, target, "target")


def searched_threshold() -> Case:
    """A threshold inside of a pipeline, below a search; text labels."""
    rows, target = penguins()
    rows, other = rows[MEASURES], np.where(target == "Adelie", "Adelie", "other")
    chosen = TunedThresholdClassifierCV(LogisticRegression(), cv=3, random_state=0)
    steps = Pipeline([("fill", SimpleImputer()), ("scale", StandardScaler()), ("model", chosen)])
    model = GridSearchCV(steps, {"model__estimator__C": [0.01, 0.1]}, cv=2).fit(rows, other)
    return Case(model, rows, pd.Series(other), "species")


def searched_forest() -> Case:
    """A random search around a forest."""
    rows, target = wine()
    search = RandomizedSearchCV(
        RandomForestClassifier(20, random_state=0),
        {"max_depth": [2, 3, 4, 5]},
        n_iter=2,
        cv=2,
        random_state=0,
    )
    return Case(search.fit(rows, target), rows, target, "cultivar", ".parquet")


def float_labels() -> Case:
    """Labels 0.0 and 1.0, as a spreadsheet gives them."""
    rows, target = cancer()
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, target.astype(float))
    return Case(model, rows, target.astype(float), "target")


def hard_votes() -> Case:
    """Votes without probabilities."""
    rows, target = iris()
    members = [("bayes", GaussianNB()), ("tree", DecisionTreeClassifier(random_state=0))]
    return Case(VotingClassifier(members).fit(rows, target), rows, target, "species")


def ridge_classifier() -> Case:
    """A classifier that knows no probabilities."""
    rows, target = iris()
    return Case(RidgeClassifier().fit(rows, target), rows, target, "species")


# --- words and gaps --------------------------------------------------------------------------------------


def textbook_gaps() -> Case:
    """Words with gaps, imputed and encoded, then logistic; a column of the table is left out."""
    rows, target = penguins()
    return Case(textbook(LogisticRegression(max_iter=1_000)).fit(rows, target), rows, target, "species")


def textbook_complete_first() -> Case:
    """The same with the complete rows first."""
    rows, target = penguins()
    order = rows.isna().sum(axis=1).sort_values(kind="stable").index
    rows, target = rows.loc[order, [*WORDS, *MEASURES]].reset_index(drop=True), target.loc[order]
    model = textbook(LogisticRegression(max_iter=1_000)).fit(rows, target)
    return Case(model, rows, target.reset_index(drop=True), "species")


def textbook_forest() -> Case:
    """The same preparation before a forest; the numbers are scaled."""
    rows, target = penguins()
    rows = rows[[*WORDS, *MEASURES]]
    model = textbook(RandomForestClassifier(50, random_state=0)).fit(rows, target)
    return Case(model, rows, target, "species", ".parquet")


def textbook_histogram() -> Case:
    """The same preparation before histogram boosting."""
    rows, target = penguins()
    rows = rows[[*WORDS, *MEASURES]]
    prepare = textbook(HistGradientBoostingClassifier(max_iter=20, random_state=0))
    prepare.steps[0][1].set_params(sparse_threshold=0)
    return Case(prepare.fit(rows, target), rows, target, "species")


def constant_fill() -> Case:
    """Gaps of words become a word of their own."""
    rows, target = penguins()
    rows = rows[[*WORDS, *MEASURES]]
    text = make_pipeline(
        SimpleImputer(strategy="constant", fill_value="missing"), OneHotEncoder(handle_unknown="ignore")
    )
    rest = make_pipeline(SimpleImputer(), StandardScaler())
    prepare = ColumnTransformer([("words", text, WORDS)], remainder=rest)
    model = make_pipeline(prepare, LogisticRegression()).fit(rows, target)
    return Case(model, rows, target, "species")


def gaps_as_category() -> Case:
    """An encoder that takes a missing word for a category."""
    rows, target = penguins()
    rows = rows[[*WORDS, "body_mass_g"]]
    prepare = ColumnTransformer(
        [("words", OneHotEncoder(handle_unknown="ignore"), WORDS)], remainder=SimpleImputer()
    )
    model = make_pipeline(prepare, StandardScaler(with_mean=False), LogisticRegression(max_iter=500))
    return Case(model.fit(rows, target), rows, target, "species")


def ordinal_forest() -> Case:
    """Words as ranks, unknown ones as -1, before a forest."""
    rows, target = penguins()
    rows = rows[["sex", *MEASURES, "island"]]
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2)
    prepare = ColumnTransformer([("words", encoder, WORDS)], remainder=SimpleImputer(strategy="median"))
    model = make_pipeline(prepare, RandomForestClassifier(30, random_state=0)).fit(rows, target)
    return Case(model, rows, target, "species")


def indicator() -> Case:
    """Gaps filled, and a column that says so."""
    rows, target = mileage("Horsepower", "Weight_in_lbs", "Cylinders")
    model = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler(), Ridge()).fit(rows, target)
    return Case(model, rows, target, "Miles_per_Gallon", ".parquet")


def neighbour_imputer() -> Case:
    """Gaps filled from neighbours."""
    rows, target = penguins()
    rows = rows[MEASURES]
    model = make_pipeline(StandardScaler(), KNNImputer(), LogisticRegression()).fit(rows, target)
    return Case(model, rows, target, "species")


def iterative_imputer() -> Case:
    """Gaps filled by regressions, which is experimental."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    rows, target = penguins()
    rows = rows[MEASURES]
    model = make_pipeline(IterativeImputer(random_state=0), LogisticRegression(max_iter=3_000))
    return Case(model.fit(rows, target), rows, target, "species")


def target_encoder() -> Case:
    """Many brands, each as the mean of its target."""
    rows, target = mileage("brand", "Origin", "Weight_in_lbs")
    prepare = ColumnTransformer(
        [("words", TargetEncoder(random_state=0), ["brand", "Origin"])], remainder=StandardScaler()
    )
    return Case(make_pipeline(prepare, Ridge()).fit(rows, target), rows, target, "Miles_per_Gallon")


def infrequent() -> Case:
    """Rare brands together."""
    rows, target = origin("brand", "Cylinders", "Weight_in_lbs")
    encoder = OneHotEncoder(min_frequency=10, handle_unknown="infrequent_if_exist")
    prepare = ColumnTransformer([("brand", encoder, ["brand"])], remainder=StandardScaler())
    return Case(make_pipeline(prepare, LogisticRegression()).fit(rows, target), rows, target, "Origin")


def open_text_encoded() -> Case:
    """Open text one-hot encoded, by an encoder that raises on an unknown word."""
    rows, target = mileage("Name", "Cylinders", "Weight_in_lbs")
    prepare = ColumnTransformer([("name", OneHotEncoder(), ["Name"])], remainder=StandardScaler())
    return Case(make_pipeline(prepare, Ridge()).fit(rows, target), rows, target, "Miles_per_Gallon")


def dropped_first() -> Case:
    """One column less for each word; whole numbers as categories."""
    rows, target = barley()
    model = make_pipeline(OneHotEncoder(drop="first"), LinearRegression()).fit(rows, target)
    return Case(model, rows, target, "yield")


def selector() -> Case:
    """Columns chosen by their type."""
    rows, target = penguins()
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    words = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    prepare = ColumnTransformer(
        [
            ("numbers", numbers, make_column_selector(dtype_include=np.number)),
            ("words", words, make_column_selector(dtype_exclude=np.number)),
        ]
    )
    model = make_pipeline(prepare, LogisticRegression(max_iter=500)).fit(rows, target)
    return Case(model, rows, target, "species")


def pandas_output() -> Case:
    """Steps that hand on DataFrames."""
    rows, target = penguins()
    rows = rows[[*WORDS, *MEASURES]]
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    words = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    prepare = ColumnTransformer([("n", numbers, MEASURES), ("w", words, WORDS)]).set_output(
        transform="pandas"
    )
    model = make_pipeline(prepare, LogisticRegression(max_iter=500)).fit(rows, target)
    return Case(model, rows, target, "species", ".parquet")


def riots() -> Case:
    """A small table full of words, with gaps; chosen columns of eleven."""
    table = pd.read_csv(vega.la_riots.filepath)
    rows, target = table[["gender", "race", "type", "age"]], table["longitude"]
    keep = target.notna()
    rows, target = rows[keep].reset_index(drop=True), target[keep].reset_index(drop=True)
    model = textbook(Ridge(), ["gender", "race", "type"], ["age"]).fit(rows, target)
    return Case(model, rows, target, "longitude")


def flags_with_gaps() -> Case:
    """Booleans, of which some are missing, as a spreadsheet has them."""
    table = cars()
    strong = (table["Horsepower"] > 120).astype(object).where(table["Horsepower"].notna(), np.nan)
    rows = pd.DataFrame({"strong": strong, "heavy": table["Weight_in_lbs"] > 3_000, "brand": table["brand"]})
    words = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    model = make_pipeline(words, LogisticRegression()).fit(rows.astype(object), table["Origin"])
    return Case(model, rows, table["Origin"], "Origin", given=lambda rows: rows.astype(object))


def codes() -> Case:
    """Codes with leading zeros, fitted as text."""
    rows, target = mileage("Cylinders", "Weight_in_lbs")
    rows = rows.assign(Cylinders=rows["Cylinders"].map("{:02d}".format))
    prepare = ColumnTransformer(
        [("code", OneHotEncoder(handle_unknown="ignore"), ["Cylinders"])], remainder=StandardScaler()
    )
    return Case(make_pipeline(prepare, Ridge()).fit(rows, target), rows, target, "Miles_per_Gallon")


# --- text ------------------------------------------------------------------------------------------------


def text_series() -> Case:
    """One column of text, handed over as a Series."""
    rows, target = airports()
    rows = rows[["name"]]
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(rows["name"], target)
    return Case(model, rows, target, "half", given=lambda rows: rows["name"])


def text_and_numbers() -> Case:
    """Text beside a number in a ColumnTransformer."""
    rows, target = origin("Name", "Horsepower")
    keep = rows["Horsepower"].notna()
    rows, target = rows[keep].reset_index(drop=True), target[keep].reset_index(drop=True)
    prepare = ColumnTransformer(
        [("text", TfidfVectorizer(), "Name"), ("number", StandardScaler(), ["Horsepower"])]
    )
    return Case(make_pipeline(prepare, LogisticRegression()).fit(rows, target), rows, target, "Origin")


def text_letters() -> Case:
    """Pieces of words, counted, before naive Bayes."""
    rows, target = airports()
    rows = rows[["name"]]
    counter = CountVectorizer(analyzer="char_wb", ngram_range=(2, 3), min_df=3)
    model = make_pipeline(counter, ComplementNB()).fit(rows["name"], target)
    return Case(model, rows, target, "half", given=lambda rows: rows["name"])


def text_topics() -> Case:
    """Two columns of text, reduced to topics."""
    rows, target = airports()
    rows = rows[["name", "city"]]
    prepare = ColumnTransformer(
        [
            (
                "name",
                make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), TruncatedSVD(20, random_state=0)),
                "name",
            ),
            ("city", TfidfVectorizer(stop_words="english"), "city"),
        ]
    )
    return Case(make_pipeline(prepare, LogisticRegression()).fit(rows, target), rows, target, "half")


def text_hashed() -> Case:
    """Hashed words before stochastic descent."""
    rows, target = airports()
    rows = rows[["name"]]
    model = make_pipeline(HashingVectorizer(n_features=256), SGDClassifier(loss="log_loss", random_state=0))
    return Case(model.fit(rows["name"], target), rows, target, "half", given=lambda rows: rows["name"])


# --- functions and own code ------------------------------------------------------------------------------


def function_log() -> Case:
    """A logarithm of some columns."""
    rows, target = mileage("Displacement", "Weight_in_lbs", "Acceleration")
    prepare = ColumnTransformer(
        [("log", FunctionTransformer(np.log1p), ["Displacement", "Weight_in_lbs"])], remainder="passthrough"
    )
    return Case(make_pipeline(prepare, Ridge()).fit(rows, target), rows, target, "Miles_per_Gallon")


def function_imputed_root() -> Case:
    """Gaps filled, a root, a scaler: a pipeline in a ColumnTransformer, with names that stay."""
    rows, target = mileage("Horsepower", "Weight_in_lbs")
    steps = make_pipeline(
        SimpleImputer(strategy="median"),
        FunctionTransformer(np.sqrt, feature_names_out="one-to-one"),
        StandardScaler(),
    )
    prepare = ColumnTransformer([("all", steps, list(rows.columns))])
    return Case(make_pipeline(prepare, Ridge()).fit(rows, target), rows, target, "Miles_per_Gallon")


def target_log() -> Case:
    """A target whose logarithm is predicted."""
    rows, target = diabetes()
    inner = make_pipeline(StandardScaler(), Ridge())
    model = TransformedTargetRegressor(inner, func=np.log1p, inverse_func=np.expm1).fit(rows, target)
    return Case(model, rows, target, "progression")


def target_quantiles() -> Case:
    """A target mapped to a normal distribution; words in the data."""
    rows, target = mileage("Origin", "Weight_in_lbs", "Horsepower")
    normal = QuantileTransformer(n_quantiles=100, output_distribution="normal")
    inner = textbook(Ridge(), ["Origin"], ["Weight_in_lbs", "Horsepower"])
    model = TransformedTargetRegressor(inner, transformer=normal).fit(rows, target)
    return Case(model, rows, target, "Miles_per_Gallon")


def own_transformer() -> Case:
    """A class of one's own at the start."""
    rows, target = mileage("Displacement", "Horsepower", "Weight_in_lbs")
    keep = rows["Horsepower"].notna()
    rows, target = rows[keep].reset_index(drop=True), target[keep].reset_index(drop=True)
    model = make_pipeline(own().Ratios(), StandardScaler(), Ridge()).fit(rows, target)
    return Case(model, rows, target, "Miles_per_Gallon")


def own_dates() -> Case:
    """Dates, as text, turned into numbers; then a forest."""
    rows, target = weather()
    prepare = ColumnTransformer([("date", own().CalendarParts(), ["date"])], remainder="passthrough")
    model = make_pipeline(prepare, RandomForestClassifier(20, max_depth=6, random_state=0)).fit(rows, target)
    return Case(model, rows, target, "weather")


def own_function() -> Case:
    """A function of one's own on words with gaps, before an encoder."""
    rows, target = origin("Name", "Weight_in_lbs")
    words = make_pipeline(
        FunctionTransformer(own().first_word), OneHotEncoder(handle_unknown="ignore", min_frequency=3)
    )
    prepare = ColumnTransformer([("name", words, ["Name"])], remainder=StandardScaler())
    return Case(make_pipeline(prepare, LogisticRegression()).fit(rows, target), rows, target, "Origin")


def own_inside_union() -> Case:
    """A function and a class of one's own, deep inside; gaps that pass through both."""
    rows, target = mileage("Horsepower", "Weight_in_lbs")
    parts = make_union(FunctionTransformer(own().power_to_weight), own().Winsorizer())
    model = make_pipeline(parts, SimpleImputer(), StandardScaler(), Ridge()).fit(rows, target)
    return Case(model, rows, target, "Miles_per_Gallon", ".parquet")


def own_classifier() -> Case:
    """A classifier of one's own at the end."""
    rows, target = wine()
    return Case(make_pipeline(StandardScaler(), own().Sceptic()).fit(rows, target), rows, target, "cultivar")


def notebook_lambda() -> Case:
    """A lambda of a notebook, saved by cloudpickle."""
    import cloudpickle

    rows, target = diabetes()
    model = make_pipeline(FunctionTransformer(lambda table: np.asarray(table) ** 2), Ridge()).fit(
        rows, target
    )
    content = cloudpickle.dumps(model)
    return Case(content, rows, target, "progression", save=_bytes("model.pkl"), answer=model)


# --- other libraries -------------------------------------------------------------------------------------


def xgboost_gaps() -> Case:
    """XGBoost, with gaps that reach the trees."""
    from xgboost import XGBClassifier

    rows, target = penguins()
    rows, coded = rows[MEASURES], LabelEncoder().fit_transform(target)
    model = XGBClassifier(n_estimators=15, max_depth=3, n_jobs=1).fit(rows, coded)
    return Case(model, rows, pd.Series(coded), "species")


def xgboost_searched() -> Case:
    """XGBoost below a search, names with spaces."""
    from xgboost import XGBRegressor

    rows, target = mileage("Displacement", "Horsepower", "Weight_in_lbs")
    rows = rows.rename(columns={"Weight_in_lbs": "Weight (lbs)"})
    search = GridSearchCV(XGBRegressor(n_estimators=15, n_jobs=1), {"max_depth": [2, 3]}, cv=2)
    return Case(search.fit(rows, target), rows, target, "Miles_per_Gallon")


def xgboost_pipeline() -> Case:
    """XGBoost behind imputed and encoded words."""
    from xgboost import XGBClassifier

    rows, target = penguins()
    rows, coded = rows[[*WORDS, *MEASURES]], LabelEncoder().fit_transform(target)
    model = textbook(XGBClassifier(n_estimators=15, max_depth=3, n_jobs=1)).fit(rows, coded)
    return Case(model, rows, pd.Series(coded), "species")


def xgboost_categories() -> Case:
    """XGBoost on pandas' categories."""
    from xgboost import XGBRegressor

    rows, target = mileage("Origin", "Horsepower", "Weight_in_lbs")
    rows = rows.astype({"Origin": "category"})
    model = XGBRegressor(n_estimators=15, max_depth=3, enable_categorical=True, n_jobs=1).fit(rows, target)
    return Case(model, rows, target, "Miles_per_Gallon", ".parquet")


def xgboost_coded_labels() -> Case:
    """XGBoost on coded labels, words in the file."""
    from xgboost import XGBClassifier

    rows, target = penguins(complete=True)
    rows, coded = rows[MEASURES], LabelEncoder().fit_transform(target)
    model = XGBClassifier(n_estimators=15, max_depth=3, n_jobs=1).fit(rows, coded)
    return Case(model, rows, target, "species", labels=sorted(set(target)))


def xgboost_booster() -> Case:
    """XGBoost's own object, which is no estimator."""
    import xgboost

    rows, target = diabetes()
    booster = xgboost.train({"max_depth": 3, "nthread": 1}, xgboost.DMatrix(rows, target), 10)
    return Case(booster, rows, target, "progression", given=xgboost.DMatrix)


def lightgbm_spaces() -> Case:
    """LightGBM on names with spaces."""
    from lightgbm import LGBMClassifier

    rows, target = iris()
    model = LGBMClassifier(n_estimators=10, verbose=-1, n_jobs=1).fit(rows, target)
    return Case(model, rows, target, "species")


def lightgbm_gaps() -> Case:
    """LightGBM, with gaps that reach the trees; a regressor."""
    from lightgbm import LGBMRegressor

    rows, target = mileage("Displacement", "Horsepower", "Weight_in_lbs")
    model = LGBMRegressor(n_estimators=20, verbose=-1, n_jobs=1).fit(rows, target)
    return Case(model, rows, target, "Miles_per_Gallon", ".parquet")


def lightgbm_categories() -> Case:
    """LightGBM on pandas' categories."""
    from lightgbm import LGBMClassifier

    rows, target = penguins(complete=True)
    rows = rows.astype(dict.fromkeys(WORDS, "category"))
    model = LGBMClassifier(n_estimators=10, verbose=-1, n_jobs=1).fit(rows, target)
    return Case(model, rows, target, "species", ".parquet")


def lightgbm_pipeline() -> Case:
    """LightGBM behind imputed and encoded words, two labels."""
    from lightgbm import LGBMClassifier

    rows, target = penguins()
    rows, adelie = rows[[*WORDS, *MEASURES]], target == "Adelie"
    model = textbook(LGBMClassifier(n_estimators=10, verbose=-1, n_jobs=1)).fit(rows, adelie)
    return Case(model, rows, adelie, "adelie")


def lightgbm_calibrated() -> Case:
    """LightGBM below a calibration."""
    from lightgbm import LGBMClassifier

    rows, target = cancer()
    inner = LGBMClassifier(n_estimators=10, verbose=-1, n_jobs=1)
    model = CalibratedClassifierCV(inner, cv=3).fit(rows, target)
    return Case(model, rows, target, "benign")


def lightgbm_booster() -> Case:
    """LightGBM's own object, which is no estimator."""
    import lightgbm

    rows, target = diabetes()
    settings = {"verbose": -1, "num_threads": 1}
    return Case(lightgbm.train(settings, lightgbm.Dataset(rows, target), 10), rows, target, "progression")


def catboost_numbers() -> Case:
    """CatBoost on numbers with gaps, three labels."""
    from catboost import CatBoostClassifier

    rows, target = penguins()
    rows = rows[MEASURES]
    model = CatBoostClassifier(iterations=15, verbose=0, thread_count=1, allow_writing_files=False)
    return Case(model.fit(rows, target), rows, target, "species")


def catboost_regressor() -> Case:
    """CatBoost, a regressor in a pipeline."""
    from catboost import CatBoostRegressor

    rows, target = diabetes()
    boosting = CatBoostRegressor(iterations=15, verbose=0, thread_count=1, allow_writing_files=False)
    return Case(make_pipeline(StandardScaler(), boosting).fit(rows, target), rows, target, "progression")


def catboost_words() -> Case:
    """CatBoost on words, which it encodes itself."""
    from catboost import CatBoostClassifier

    rows, target = penguins(complete=True)
    rows = rows[[*WORDS, *MEASURES]]
    model = CatBoostClassifier(
        iterations=15, verbose=0, thread_count=1, allow_writing_files=False, cat_features=WORDS
    )
    return Case(model.fit(rows, target), rows, target, "species")


def resampled() -> Case:
    """imbalanced-learn's pipeline: synthetic rows while fitting, nothing while predicting."""
    from imblearn.over_sampling import SMOTE
    from imblearn.pipeline import Pipeline as Resampling

    rows, target = cancer()
    steps = [("scale", StandardScaler()), ("smote", SMOTE(random_state=0)), ("model", LogisticRegression())]
    return Case(Resampling(steps).fit(rows, target), rows, target, "benign")


def undersampled_words() -> Case:
    """imbalanced-learn behind words with gaps."""
    from imblearn.pipeline import make_pipeline as resampling
    from imblearn.under_sampling import RandomUnderSampler

    rows, target = penguins()
    rows = rows[[*WORDS, *MEASURES]]
    prepare = textbook(None).steps[0][1]
    model = resampling(prepare, RandomUnderSampler(random_state=0), LogisticRegression()).fit(rows, target)
    return Case(model, rows, target, "species")


def balanced_forest() -> Case:
    """imbalanced-learn's forest."""
    from imblearn.ensemble import BalancedRandomForestClassifier

    rows, target = cancer()
    model = BalancedRandomForestClassifier(20, random_state=0).fit(rows, target)
    return Case(model, rows, target, "benign")


def encoded_by_target() -> Case:
    """category_encoders' target encoder at the start."""
    from category_encoders import TargetEncoder as ByTarget

    rows, target = mileage("Origin", "Cylinders", "Weight_in_lbs")
    model = make_pipeline(ByTarget(cols=["Origin"]), Ridge()).fit(rows, target)
    return Case(model, rows, target, "Miles_per_Gallon")


def encoded_by_count() -> Case:
    """category_encoders' counts of words."""
    from category_encoders import CountEncoder

    rows, target = origin("brand", "Weight_in_lbs")
    model = make_pipeline(CountEncoder(cols=["brand"]), StandardScaler(), LogisticRegression())
    return Case(model.fit(rows, target), rows, target, "Origin")


def encoded_binary() -> Case:
    """category_encoders' binary digits of words, inside of a ColumnTransformer."""
    from category_encoders import BinaryEncoder

    rows, target = penguins(complete=True)
    rows = rows[[*WORDS, *MEASURES]]
    prepare = ColumnTransformer([("words", BinaryEncoder(), WORDS)], remainder=StandardScaler())
    return Case(make_pipeline(prepare, LogisticRegression()).fit(rows, target), rows, target, "species")


# --- ONNX and torch --------------------------------------------------------------------------------------


def onnx_open_shape() -> Case:
    """An ONNX file whose input says neither rows nor columns."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    rows, target = wine()
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows.to_numpy(), target)
    made = to_onnx(
        model,
        initial_types=[("X", FloatTensorType([None, None]))],
        options={"zipmap": False},
        target_opset=18,
    )
    content = made.SerializeToString()
    return Case(content, rows, target, "cultivar", given=np.asarray, save=_bytes("model.onnx"), answer=model)


def onnx_maps() -> Case:
    """An ONNX file with the list of maps that skl2onnx writes by default; text labels."""
    from skl2onnx import to_onnx

    rows, target = iris()
    model = RandomForestClassifier(20, random_state=0).fit(rows.to_numpy(np.float32), target)
    made = to_onnx(model, rows.to_numpy(np.float32)[:1], target_opset=18)
    content = made.SerializeToString()

    def given(rows: Frame) -> Any:
        return rows.to_numpy(np.float32)

    return Case(content, rows, target, "species", given=given, save=_bytes("model.onnx"), answer=model)


def onnx_columns() -> Case:
    """An ONNX file with an input for each column, words among them; a regressor."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType

    rows, target = mileage("Origin", "Displacement", "Weight_in_lbs")
    prepare = ColumnTransformer(
        [("words", OneHotEncoder(handle_unknown="ignore"), ["Origin"])], remainder=StandardScaler()
    )
    model = make_pipeline(prepare, Ridge()).fit(rows, target)
    kinds = {"Origin": StringTensorType, "Displacement": FloatTensorType, "Weight_in_lbs": FloatTensorType}
    made = to_onnx(
        model, initial_types=[(name, kind([None, 1])) for name, kind in kinds.items()], target_opset=18
    )
    content = made.SerializeToString()
    return Case(content, rows, target, "Miles_per_Gallon", save=_bytes("model.onnx"), answer=model)


class Network:
    """A torch module, asked as an estimator of probabilities or of a value is."""

    def __init__(self, module: Any, labels: Any = None) -> None:
        self.module = module.eval()
        if labels is not None:
            self.classes_ = np.unique(labels)
            self.predict_proba = self._probabilities

    def outputs(self, rows: Frame) -> Any:
        """What the module itself answers."""
        import torch

        with torch.no_grad():
            return self.module(torch.tensor(rows.to_numpy("float32"))).double().numpy()

    def _probabilities(self, rows: Frame) -> Any:
        scores = np.exp(self.outputs(rows))
        return scores / scores.sum(axis=1, keepdims=True)

    def predict(self, rows: Frame) -> Any:
        """The value, or the most probable label, of each row."""
        if hasattr(self, "classes_"):
            return self.classes_[self.outputs(rows).argmax(axis=1)]
        return self.outputs(rows).squeeze(1)


def _network(rows: Frame, width: int, target: Any, loss: Any) -> Any:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    scale = torch.nn.BatchNorm1d(rows.shape[1], momentum=None)
    hidden = torch.nn.Sequential(torch.nn.Linear(rows.shape[1], 16), torch.nn.ReLU(), torch.nn.Dropout(0.1))
    module = torch.nn.Sequential(scale, hidden, torch.nn.Linear(16, width))
    given, optimizer = torch.tensor(rows.to_numpy("float32")), torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss(module(given), target).backward()
        optimizer.step()
    return module


def _torch(module: Any, folder: Path) -> None:
    import torch

    torch.save(module, folder / "model.pt")


def torch_classifier() -> Case:
    """A torch module of three labels, normalised in batches, saved while in training."""
    import torch

    rows, target = iris()
    coded = torch.tensor(np.unique(target, return_inverse=True)[1])
    module = _network(rows, 3, coded, torch.nn.functional.cross_entropy)
    network = Network(module, target)
    return Case(module.train(), rows, target, "species", save=_torch, answer=network)


def torch_regressor() -> Case:
    """A torch module of one value."""
    import torch

    rows, target = diabetes()
    wanted = torch.tensor(target.to_numpy("float32"))[:, None] / 100
    module = _network(rows, 1, wanted, torch.nn.functional.mse_loss)
    return Case(module, rows, target, "progression", ".parquet", save=_torch, answer=Network(module))


# --- fitting and asking ----------------------------------------------------------------------------------


def fit(case: Case, folder: Path) -> None:
    """Write model, data, and the original's answers to rows that a client might send."""
    folder.mkdir(parents=True, exist_ok=True)
    write(case.rows.assign(**{case.name: np.asarray(case.target)}), folder / f"train{case.suffix}")
    original = case.answer or case.model
    if isinstance(original, Network):
        original.module.eval()
    asked = pd.concat([rows_to_ask(case.rows), undecided(original, case)], ignore_index=True)
    answers = [answer(original, case, asked.iloc[[index]]) for index in range(len(asked))]
    document = {
        "target": case.name,
        "rows": as_json(asked),
        "answers": answers,
        # Where a row has a word that was never seen, a contract may refuse it.
        "strange": (asked == STRANGER).any(axis=1).tolist(),
        "rows_a_second": speed(original, case.given, asked.iloc[[0]]),
        "own": "app.own.features" in sys.modules,
    }
    (folder / "asked.json").write_text(json.dumps(document), "utf-8")
    case.model = case.model.train() if isinstance(original, Network) else case.model
    case.save(case.model, folder)


def write(table: Frame, path: Path) -> None:
    """The training data as a file."""
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True, double_precision=15)


def rows_to_ask(rows: Frame) -> Frame:
    """Rows from all over the table, then one for each gap, strange word and extreme of a column."""
    parts = [rows.iloc[np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).astype(int)]]
    whole = rows.dropna()[:1] if len(rows.dropna()) else rows[:1]
    with_gaps = [name for name in rows if rows[name].isna().any()]
    every = [with_gaps] if len(with_gaps) > 1 else []
    parts += [changed(whole, dict.fromkeys(names)) for names in [*([name] for name in with_gaps), *every]]
    for name in rows:
        if pd.api.types.is_bool_dtype(rows[name]) or {type(one) for one in rows[name].dropna()} <= {bool}:
            continue
        if pd.api.types.is_numeric_dtype(rows[name]):
            if rows.shape[1] <= 15:
                parts += [rows.loc[[rows[name].idxmin()]], rows.loc[[rows[name].idxmax()]]]
        elif not isinstance(rows[name].dtype, pd.CategoricalDtype):
            parts.append(changed(whole, {name: STRANGER}))
    return pd.concat(parts, ignore_index=True).astype(rows.dtypes)


def undecided(original: Any, case: Case) -> Frame:
    """The rows whose label is nearest to another one, and some whose label is not the most probable."""
    if not hasattr(original, "predict_proba"):
        return case.rows[:0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = case.given(case.rows)
        scores, labels = (
            np.asarray(original.predict_proba(given)),
            np.asarray(original.predict(given)).ravel(),
        )
    second, first = np.sort(scores, axis=1)[:, -2:].T
    other = np.flatnonzero(np.asarray(original.classes_)[scores.argmax(axis=1)] != labels)
    return case.rows.iloc[[*np.argsort(first - second)[:3], *other[:5]]]


def changed(row: Frame, values: dict[str, Any]) -> Frame:
    """The row with other values."""
    row = row.copy()
    for name, value in values.items():
        missing = np.nan if row[name].dtype == object else value  # as pandas reads a gap
        row[name] = pd.Series([missing if value is None else value], index=row.index, dtype=row[name].dtype)
    return row


def answer(original: Any, case: Case, row: Frame) -> dict[str, Any]:
    """What the original says to one row alone; what it cannot answer is `refused`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            given = case.given(row)
            predicted = np.asarray(original.predict(given)).ravel().tolist()[0]
            if not hasattr(original, "predict_proba"):
                return {"value": predicted}
            scores = np.asarray(original.predict_proba(given), float)[0].tolist()
        except Exception as error:
            return {"refused": f"{type(error).__name__}: {error}"[:200]}
    labels = case.labels or list(map(key, np.asarray(original.classes_).tolist()))
    label = case.labels[predicted] if case.labels else predicted
    return {"label": label, "probabilities": dict(zip(labels, scores, strict=True))}


def key(label: Any) -> str:
    """A label as a key of JSON."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return label if isinstance(label, str) else json.dumps(label)


def speed(original: Any, given: Callable[[Frame], Any], row: Frame) -> float:
    """Rows a second of processor time, at one row a call."""
    ask = getattr(original, "predict_proba", original.predict)
    given_row, calls = given(row), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ask(given_row)
        start = time.process_time()
        while (passed := time.process_time() - start) < 0.3:
            ask(given_row)
            calls += 1
    return calls / passed


def as_json(frame: Frame) -> list[dict[str, Any]]:
    """Rows as a client sends them: null for a gap."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{name: one.item() if hasattr(one, "item") else one for name, one in row.items()} for row in rows]


if __name__ == "__main__":
    import field

    for name in sys.argv[2:]:
        sys.modules.pop("app.own.features", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit((vars(field).get(name) or globals()[name])(), Path(sys.argv[1], name))
