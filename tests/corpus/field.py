"""Cases that people reported, of models and files that are odd in one way: fitted like those of cases.py.

Their expected ends stand in tests/test_corpus.py. Most reports are about a kind of model, and those are cases
of cases.py; here are those about files, and about what is saved.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from cases import MEASURES, Case, _bytes, cancer, diabetes, iris, mileage, penguins
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import LabelEncoder, StandardScaler

Frame = Any


def _flowers() -> tuple[Any, Frame, Any]:
    rows, target = iris()
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, target), rows, target


def _with_columns(added: Any) -> Any:
    """Saves the model, and the flowers as JSON lines with further columns that the model does not know."""

    def save(model: Any, folder: Path) -> None:
        joblib.dump(model, folder / "model.joblib")
        rows, target = iris()
        records = rows.assign(species=target).to_dict("records")
        lines = [json.dumps({**record, **added(index)}) for index, record in enumerate(records)]
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")

    return save


def unused_hashes() -> Case:
    """Hashes of 64 bits beside the model's columns, in JSON lines."""
    model, rows, target = _flowers()
    return Case(
        model,
        rows,
        target,
        "species",
        ".jsonl",
        save=_with_columns(lambda index: {"hash": 2**64 - 1 - index}),
    )


def unused_mixtures() -> Case:
    """Lists, objects, whole numbers beyond all bounds and mixed types beside the model's columns."""

    def added(index: int) -> dict[str, Any]:
        return {
            "reference": index if index % 2 else f"A{index}",
            "tags": ["a", 1] if index % 3 else [2],
            "meta": {"site": "x" if index % 2 else 3},
            "huge": 2**70 + index,
            "flag": True if index % 2 else 0,
            "nested": {"deep": {"n": index}},
        }

    model, rows, target = _flowers()
    return Case(model, rows, target, "species", ".jsonl", save=_with_columns(added))


def unused_hashes_parquet() -> Case:
    """The same hashes in Parquet, and dates, times and bytes beside them."""
    model, rows, target = _flowers()

    def save(made: Any, folder: Path) -> None:
        joblib.dump(made, folder / "model.joblib")
        more = {
            "hash": np.arange(len(rows), dtype="uint64") + np.uint64(2**63),
            "at": pd.date_range("2026-01-01", periods=len(rows), freq="h", tz="UTC"),
            "took": pd.to_timedelta(np.arange(len(rows)), unit="s"),
            "raw": [b"\x00\xff"] * len(rows),
        }
        rows.assign(species=target, **more).to_parquet(folder / "train.parquet", index=False)

    return Case(model, rows, target, "species", ".parquet", save=save)


def thousands() -> Case:
    """Numbers with a comma between thousands."""
    rows, target = mileage("Displacement", "Weight_in_lbs")
    model = LinearRegression().fit(rows, target)

    def save(made: Any, folder: Path) -> None:
        joblib.dump(made, folder / "model.joblib")
        text = rows["Weight_in_lbs"].map("{:,}".format)
        rows.assign(Weight_in_lbs=text, Miles_per_Gallon=target).to_csv(folder / "train.csv", index=False)

    return Case(model, rows, target, "Miles_per_Gallon", save=save)


def decimal_commas() -> Case:
    """Semicolons between columns and commas in numbers, as many spreadsheets write them."""
    model, rows, target = _flowers()

    def save(made: Any, folder: Path) -> None:
        joblib.dump(made, folder / "model.joblib")
        rows.assign(species=target).to_csv(folder / "train.csv", index=False, sep=";", decimal=",")

    return Case(model, rows, target, "species", save=save)


def index_column() -> Case:
    """Pandas' index as a column without a name, and an empty line before the header."""
    model, rows, target = _flowers()

    def save(made: Any, folder: Path) -> None:
        joblib.dump(made, folder / "model.joblib")
        (folder / "train.csv").write_text("\n" + rows.assign(species=target).to_csv(), "utf-8")

    return Case(model, rows, target, "species", save=save)


def float_labels_held_out() -> Case:
    """Labels 0.0 and 1.0 in CSV, with rows held out."""
    rows, target = cancer()
    target = target.astype(float)
    seen = rows.index % 5 > 0
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows[seen], target[seen])

    def save(made: Any, folder: Path) -> None:
        joblib.dump(made, folder / "model.joblib")
        rows[~seen].assign(target=target[~seen]).to_csv(folder / "holdout.csv", index=False)

    return Case(model, rows[seen], target[seen], "target", save=save)


def coded_labels_held_out() -> Case:
    """Labels that were coded before fitting, words in the files, with rows held out."""
    rows, target = penguins(complete=True)
    rows, seen = rows[MEASURES], rows.index % 5 > 0
    coded = LabelEncoder().fit_transform(target)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows[seen], coded[seen])

    def save(made: Any, folder: Path) -> None:
        joblib.dump(made, folder / "model.joblib")
        rows[~seen].assign(species=target[~seen]).to_csv(folder / "holdout.csv", index=False)

    return Case(model, rows[seen], target[seen], "species", save=save, labels=sorted(set(target)))


def coded_labels_without_order() -> Case:
    """Labels coded in an order that is nobody's but the model's author's."""
    rows, target = penguins(complete=True)
    rows, codes = rows[MEASURES], {"Gentoo": 0, "Adelie": 1, "Chinstrap": 2}
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, target.map(codes))
    return Case(model, rows, target, "species", labels=list(codes))


def module_beside() -> Case:
    """A transformer from a module of one's own, which no service has."""
    source = (
        "import numpy as np\nfrom sklearn.base import BaseEstimator, TransformerMixin\n\n\n"
        "class Doubled(TransformerMixin, BaseEstimator):\n"
        "    def fit(self, X, y=None):\n        self.n_features_in_ = X.shape[1]\n        return self\n\n"
        "    def transform(self, X):\n        return np.asarray(X, float) * 2\n"
    )
    module = types.ModuleType("mysteps")
    sys.modules["mysteps"] = module
    exec(source, vars(module))  # noqa: S102  # a module of this file's own
    module.Doubled.__module__ = "mysteps"
    rows, target = diabetes()
    return Case(make_pipeline(module.Doubled(), Ridge()).fit(rows, target), rows, target, "progression")


class Halved(TransformerMixin, BaseEstimator):
    """A class as a notebook has it."""

    def fit(self, X: Any, y: Any = None) -> "Halved":
        """Learns the width."""
        self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X: Any) -> Any:
        """[rows, columns] -> the same shape."""
        return np.asarray(X, float) / 2


def notebook_class() -> Case:
    """A class of a notebook, saved by cloudpickle, so that it opens everywhere."""
    import cloudpickle

    Halved.__module__ = Halved.fit.__module__ = Halved.transform.__module__ = "__main__"
    rows, target = diabetes()
    model = make_pipeline(Halved(), Ridge()).fit(rows, target)
    content = cloudpickle.dumps(model)
    return Case(content, rows, target, "progression", save=_bytes("model.pkl"), answer=model)


def notebook_pickle() -> Case:
    """The same by joblib, which does not open anywhere else."""
    Halved.__module__ = "__main__"
    sys.modules["__main__"].Halved = Halved  # type: ignore[attr-defined]
    rows, target = diabetes()
    return Case(make_pipeline(Halved(), Ridge()).fit(rows, target), rows, target, "progression")


def lightgbm_text() -> Case:
    """The text that a LightGBM booster saves."""
    import lightgbm

    rows, target = diabetes()
    booster = lightgbm.train({"verbose": -1, "num_threads": 1}, lightgbm.Dataset(rows, target), 5)
    content = booster.model_to_string().encode()
    return Case(content, rows, target, "progression", save=_bytes("model.txt"), answer=booster)


def catboost_file() -> Case:
    """CatBoost's own format."""
    from catboost import CatBoostRegressor

    rows, target = diabetes()
    model = CatBoostRegressor(iterations=5, verbose=0, thread_count=1, allow_writing_files=False)
    model.fit(rows, target)
    return Case(
        model, rows, target, "progression", save=lambda made, folder: made.save_model(folder / "model.cbm")
    )


def xgboost_file() -> Case:
    """XGBoost's own format."""
    from xgboost import XGBRegressor

    rows, target = diabetes()
    model = XGBRegressor(n_estimators=5, n_jobs=1).fit(rows, target)
    return Case(
        model, rows, target, "progression", save=lambda made, folder: made.save_model(folder / "model.ubj")
    )
