"""Fits the models that tests/test_import.py brings along: `python models.py FOLDER [CASE...]`.

For each case: FOLDER/<case>/model.*, the training data as a file, and expected.json: rows as a client sends
them, and what the original estimator answers to them. Runs in a rendered service's environment; the data are
what scikit-learn and vega_datasets ship. The cases of torch are made only when named.
"""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from lightgbm import LGBMClassifier, LGBMRegressor
from skl2onnx import to_onnx
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC
from vega_datasets import data as vega
from xgboost import XGBClassifier

ROWS = 40  # asked over HTTP, of each case
Frame = Any


def save(folder: Path, model: Any, rows: Frame, target: Any, name: str, suffix: str, **extra: Any) -> None:
    """The model, its data in the format of `suffix`, and what it answers to some of the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    joblib.dump(model, folder / "model.joblib")
    table = rows.assign(**{name: target})
    path = folder / f"train{suffix}"
    if suffix == ".csv":
        table.to_csv(path, index=False)
    elif suffix == ".parquet":
        table.to_parquet(path, index=False)
    elif suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True, double_precision=15)
    else:
        table.to_feather(path, compression="uncompressed")
    if "held" in extra:
        extra["held"].to_csv(folder / "holdout.csv", index=False)
    asked = rows.iloc[np.linspace(0, len(rows) - 1, ROWS).astype(int)]
    missing = rows[rows.isna().any(axis=1)][:5]
    asked = pd.concat([asked, missing, *([extra["more"]] if "more" in extra else [])], ignore_index=True)
    given = extra.get("matrix", lambda frame: frame)(asked)
    answers: dict[str, Any] = {"target": name, "rows": as_json(asked)}
    if hasattr(model, "predict_proba"):
        answers["labels"] = [plain(label) for label in model.classes_]
        answers["probabilities"] = model.predict_proba(given).astype(float).tolist()
        answers["predicted"] = [plain(label) for label in model.predict(given)]
    else:
        answers["values"] = model.predict(given).astype(float).tolist()
    (folder / "expected.json").write_text(json.dumps(answers), "utf-8")


def plain(value: Any) -> Any:
    """A NumPy scalar as JSON has it."""
    return value.item() if hasattr(value, "item") else value


def as_json(frame: Frame) -> list[dict[str, Any]]:
    """Rows as a client sends them: missing values as null, whole numbers where training had such."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{name: plain(value) for name, value in row.items()} for row in rows]


def cars() -> Frame:
    """406 cars: text, whole numbers, missing horsepower."""
    frame = vega.cars().dropna(subset="Miles_per_Gallon").reset_index(drop=True)
    frame["Name"] = frame["Name"].astype(object)
    frame["Origin"] = frame["Origin"].astype(object)
    return frame.drop(columns="Year")


def weather() -> Frame:
    """1,461 days in Seattle, of five kinds of weather."""
    return pd.read_csv(vega.seattle_weather.filepath).drop(columns="date")


def logistic(folder: Path) -> None:
    """Text labels; names with spaces and letters that are not ASCII."""
    iris = load_iris(as_frame=True)
    rows = iris.data.set_axis(["Sepal Length", "sepal width (cm)", "花瓣 长度", "largeur_du_pétale"], axis=1)
    names = iris.target_names[iris.target]
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, names)
    save(folder, model, rows, names, "espèce", ".csv")


def forest(folder: Path) -> None:
    """Whole numbers as labels, from Parquet."""
    wine = load_wine(as_frame=True)
    seen = wine.data.index % 5 > 0
    model = RandomForestClassifier(30, random_state=0).fit(wine.data[seen], wine.target[seen])
    held = wine.data[~seen].assign(cultivar=wine.target[~seen])
    save(folder, model, wine.data[seen], wine.target[seen], "cultivar", ".parquet", held=held)


def boosting(folder: Path) -> None:
    """Booleans as labels, from JSON lines; fitted on an array without names."""
    cancer = load_breast_cancer(as_frame=True)
    model = GradientBoostingClassifier(n_estimators=30, random_state=0)
    model.fit(cancer.data.to_numpy(), cancer.target.to_numpy() == 1)
    target = cancer.target == 1
    save(folder, model, cancer.data, target, "benign", ".jsonl", matrix=lambda frame: frame.to_numpy())


def pipeline(folder: Path) -> None:
    """Text, open and closed, whole numbers and missing values through a ColumnTransformer; a regressor."""
    frame = cars()
    rows, target = frame.drop(columns="Miles_per_Gallon"), frame["Miles_per_Gallon"]
    numbers = ["Cylinders", "Displacement", "Horsepower", "Weight_in_lbs", "Acceleration"]
    prepare = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
            ("text", OneHotEncoder(handle_unknown="ignore"), ["Name", "Origin"]),
        ]
    )
    model = make_pipeline(prepare, Ridge()).fit(rows, target)
    more = rows[:1].assign(Name="a car that nobody has built")
    save(folder, model, rows, target, "Miles_per_Gallon", ".arrow", more=more)


def economical(folder: Path) -> None:
    """Booleans as labels; whole numbers of which some are missing, closed text, spaces and other letters."""
    frame = cars()
    power, target = "puissance du moteur 馬力", "économe"
    named = {"Horsepower": power, "Weight_in_lbs": "Weight (lbs)"}
    rows = frame.drop(columns=["Name", "Acceleration", "Miles_per_Gallon"]).rename(columns=named)
    economic = frame["Miles_per_Gallon"] > 23
    prepare = ColumnTransformer(
        [("text", OneHotEncoder(handle_unknown="ignore"), ["Origin"])],
        remainder=make_pipeline(SimpleImputer(strategy="median"), StandardScaler()),
    )
    seen = rows.index % 5 > 0
    model = make_pipeline(prepare, LogisticRegression()).fit(rows[seen], economic[seen])
    held = rows[~seen].assign(**{target: economic[~seen]})
    whole = rows[seen].astype({power: "Int64"})
    save(
        folder, model, whole, economic[seen], target, ".csv", held=held,
        matrix=lambda asked: asked.astype({power: float}),
    )  # fmt: skip


def beyond(folder: Path) -> None:
    """A regressor with answers below zero, of missing values and closed text."""
    frame = cars()
    rows = frame.drop(columns=["Name", "Miles_per_Gallon"])
    target, name = frame["Miles_per_Gallon"] - frame["Miles_per_Gallon"].mean(), "mpg beyond the mean"
    prepare = ColumnTransformer(
        [("text", OneHotEncoder(handle_unknown="ignore"), ["Origin"])],
        remainder=make_pipeline(SimpleImputer(strategy="median"), StandardScaler()),
    )
    seen = rows.index % 5 > 0
    model = make_pipeline(prepare, Ridge()).fit(rows[seen], target[seen])
    held = rows[~seen].assign(**{name: target[~seen]})
    save(folder, model, rows[seen], target[seen], name, ".parquet", held=held)


def line(folder: Path) -> None:
    """A single column, and answers below zero."""
    diabetes = load_diabetes(as_frame=True, scaled=False)
    rows, target = diabetes.data[["bmi"]], diabetes.target - diabetes.target.mean()
    save(folder, LinearRegression().fit(rows, target), rows, target, "beyond the mean", ".csv")


def wide(folder: Path) -> None:
    """200 columns: the pixels of digits, and products of neighbours."""
    digits = load_digits(as_frame=True)
    pixels = digits.data
    products = {
        f"{pixels.columns[index]} x {pixels.columns[index + step]}": pixels.iloc[:, index]
        * pixels.iloc[:, index + step]
        for step in (1, 8, 9)
        for index in range(64 - step)
    }
    rows = pd.concat([pixels, pd.DataFrame(products)], axis=1).iloc[:, :200].astype("int64")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, C=0.01)).fit(rows, digits.target)
    save(folder, model, rows, digits.target, "digit", ".parquet")


def lightgbm(folder: Path) -> None:
    """LightGBM, text labels."""
    frame = weather()
    rows, target = frame.drop(columns="weather"), frame["weather"]
    model = LGBMClassifier(n_estimators=20, num_leaves=7, verbose=-1, n_jobs=1).fit(rows, target)
    save(folder, model, rows, target, "weather", ".csv")


def lightgbm_regressor(folder: Path) -> None:
    """LightGBM, with missing values that reach the trees."""
    frame = cars().drop(columns=["Name", "Origin"])
    rows, target = frame.drop(columns="Miles_per_Gallon"), frame["Miles_per_Gallon"]
    model = LGBMRegressor(n_estimators=30, num_leaves=7, verbose=-1, n_jobs=1).fit(rows, target)
    save(folder, model, rows, target, "Miles_per_Gallon", ".parquet")


def xgboost(folder: Path) -> None:
    """XGBoost, with missing values; the labels are whole numbers."""
    frame = cars()
    rows = frame.drop(columns=["Name", "Origin"])
    target = frame["Origin"].map({"USA": 0, "Europe": 1, "Japan": 2})
    model = XGBClassifier(n_estimators=20, max_depth=3, n_jobs=1).fit(rows, target)
    save(folder, model, rows, target, "origin", ".csv")


def histogram(folder: Path) -> None:
    """What has no ONNX form."""
    frame = weather()
    rows, target = frame.drop(columns="weather"), frame["weather"]
    model = HistGradientBoostingClassifier(max_iter=20, random_state=0).fit(rows, target)
    save(folder, model, rows, target, "weather", ".csv")


def onnx(folder: Path) -> None:
    """An ONNX file, as skl2onnx makes it when asked for nothing special: with a ZipMap at its end."""
    wine = load_wine(as_frame=True)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(wine.data.to_numpy(), wine.target)
    save(folder, model, wine.data, wine.target, "cultivar", ".csv", matrix=lambda frame: frame.to_numpy())
    (folder / "model.joblib").unlink()
    content = to_onnx(model, wine.data.to_numpy()[:1].astype(np.float32), target_opset=18).SerializeToString()
    (folder / "model.onnx").write_bytes(content)


def bad(folder: Path) -> None:
    """Models and data that nothing can be made of."""
    logistic(folder / "good")
    good = folder / "good"
    table = pd.read_csv(good / "train.csv")
    table.iloc[:0].to_csv(folder / "no rows.csv", index=False)
    (folder / "empty.csv").write_bytes(b"")
    table.assign(**{"Sepal Length": np.nan}).to_csv(folder / "nothing in a column.csv", index=False)
    table.drop(columns="Sepal Length").to_csv(folder / "a column less.csv", index=False)
    lines = (good / "train.csv").read_text("utf-8").splitlines(keepends=True)
    header = lines[0].replace("sepal width (cm)", "Sepal Length")
    (folder / "twice.csv").write_text("".join([header, *lines[1:]]), "utf-8")
    (folder / "torn.joblib").write_bytes((good / "model.joblib").read_bytes()[:400])
    (folder / "text.pkl").write_bytes(b"this is no pickle")
    (folder / "module.pt").write_bytes(b"for torch")
    (folder / "dictionary.pkl").write_bytes(pickle.dumps({"coef": 1}))
    joblib.dump(LogisticRegression(), folder / "unfitted.joblib")
    iris = load_iris()
    joblib.dump(LinearSVC().fit(iris.data, iris.target), folder / "no scores.joblib")
    joblib.dump(StandardScaler().fit(iris.data), folder / "scaler.joblib")
    model = joblib.load(good / "model.joblib")
    state = pickle.dumps(model)
    from sklearn import __version__

    old = f"{'0.9.9':{len(__version__)}}"
    (folder / "old.pkl").write_bytes(state.replace(__version__.encode(), old.encode()))


# --- torch, where it is installed ------------------------------------------------------------------------

NET = '''
import torch


class Net(torch.nn.Module):
    """Logits of three labels; a missing value counts as the mean."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(len(mean), 16), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(16, 3)
        )

    def forward(self, rows):
        return self.layers(torch.nan_to_num((rows - self.mean) / self.deviation))
'''


class Valued:
    """A torch module behind what `save` asks of an estimator: a regressor of one value."""

    def __init__(self, module: Any) -> None:
        self.module = module.eval()

    def predict(self, rows: Frame) -> Any:
        """What the module itself answers."""
        import torch

        with torch.no_grad():
            return self.module(torch.tensor(rows.to_numpy("float32"))).double().numpy().squeeze()


class Labelled(Valued):
    """The same of a classifier by logits: of each label, or of the second of two."""

    def __init__(self, module: Any, labels: Any) -> None:
        super().__init__(module)
        self.classes_ = np.sort(np.unique(labels))

    def predict_proba(self, rows: Frame) -> Any:
        """Softmax or sigmoid."""
        logits = super().predict(rows)
        logits = logits if logits.ndim == 2 else np.column_stack([np.zeros(len(logits)), logits])
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    def predict(self, rows: Frame) -> Any:
        """The most probable label."""
        return self.classes_[self.predict_proba(rows).argmax(axis=1)]


def fit(module: Any, rows: Frame, target: Any, loss: Any) -> Any:
    """Some steps of training, in place."""
    import torch

    given, optimizer = torch.tensor(rows.to_numpy("float32")), torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        loss(module(given), target).backward()
        optimizer.step()
    return module


def scaled(rows: Frame) -> Any:
    """A first layer that standardises the columns."""
    import torch

    layer = torch.nn.Linear(rows.shape[1], rows.shape[1])
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor(1 / rows.std().to_numpy("float32"))))
        layer.bias.copy_(torch.tensor((-rows.mean() / rows.std()).to_numpy("float32")))
    return layer.requires_grad_(False)


def torch_module(folder: Path) -> None:
    """A class of one's own in a file beside it; missing values, text labels, saved while in training."""
    import torch

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "net.py").write_text(NET, "utf-8")
    sys.path.insert(0, str(folder))
    from net import Net

    frame = cars()
    rows, labels = frame.drop(columns=["Name", "Origin"]), frame["Origin"]
    mean, deviation = (torch.tensor(one.to_numpy("float32")) for one in (rows.mean(), rows.std()))
    target = torch.tensor(np.unique(labels, return_inverse=True)[1])
    module = fit(Net(mean, deviation), rows, target, torch.nn.functional.cross_entropy)
    save(folder, Labelled(module, labels), rows, labels, "Origin", ".parquet")
    (folder / "model.joblib").unlink()
    torch.save(module.train(), folder / "model.pt")


def torch_regressor(folder: Path) -> None:
    """A regressor of one value."""
    import torch

    torch.manual_seed(0)
    diabetes = load_diabetes(as_frame=True, scaled=False)
    rows, target = diabetes.data, torch.tensor(diabetes.target.to_numpy("float32"))[:, None]
    module = torch.nn.Sequential(scaled(rows), torch.nn.Linear(10, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    fit(module, rows, target, torch.nn.functional.mse_loss)
    save(folder, Valued(module), rows, diabetes.target, "progression", ".csv")
    (folder / "model.joblib").unlink()
    torch.save(module, folder / "model.pt")


def torch_program(folder: Path) -> None:
    """One logit a row, of a label that is true or false, as a torch.export program."""
    import torch

    torch.manual_seed(0)
    cancer = load_breast_cancer(as_frame=True)
    rows, benign = cancer.data, cancer.target == 1
    module = torch.nn.Sequential(scaled(rows), torch.nn.Linear(30, 1), torch.nn.Flatten(0))
    target = torch.tensor(benign.to_numpy("float32"))
    fit(module, rows, target, torch.nn.functional.binary_cross_entropy_with_logits)
    save(folder, Labelled(module, benign), rows, benign, "benign", ".jsonl")
    (folder / "model.joblib").unlink()
    example = torch.tensor(rows[:3].to_numpy("float32"))
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, folder / "model.pt2")


def torch_bad(folder: Path) -> None:
    """Modules that cannot be served, for data with missing values and text."""
    import torch

    folder.mkdir(parents=True)
    frame = cars()
    frame.to_csv(folder / "with text.csv", index=False)
    frame.drop(columns=["Name", "Origin"]).to_csv(folder / "missing.csv", index=False)
    frame.drop(columns=["Name", "Origin"]).dropna().to_csv(folder / "complete.csv", index=False)
    module = torch.nn.Linear(5, 1)
    torch.save(module, folder / "module.pt")
    torch.save(module.state_dict(), folder / "weights.pt")
    torch.save(torch.nn.Linear(6, 1), folder / "wide.pt")
    torch.save(torch.nn.Sequential(module, torch.nn.Softmax(0)), folder / "rows together.pt")


CASES: dict[str, Callable[[Path], None]] = {
    made.__name__: made
    for made in (
        logistic, forest, boosting, pipeline, economical, beyond, line, wide, lightgbm, lightgbm_regressor,
        xgboost, histogram,
        onnx, bad,
    )
}  # fmt: skip
TORCH = {made.__name__: made for made in (torch_module, torch_regressor, torch_program, torch_bad)}

if __name__ == "__main__":
    for name in sys.argv[2:] or CASES:
        (CASES | TORCH)[name](Path(sys.argv[1]) / name)
