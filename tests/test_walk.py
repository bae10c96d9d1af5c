"""The documented life of a service: after each step its checks, tests, documents and answers agree.

render -> import -> hand-edit -> release -> next contract -> update, in several orders, as documented
"""

import json
import shutil
from pathlib import Path

import pytest

from scripts.render import SERVICE
from tests.conftest import commit, run
from tests.test_clone import CRUFT
from tests.test_import import BIN, base, data_of, expected, fitted  # noqa: F401  # fixtures

pytestmark = [pytest.mark.models, pytest.mark.xdist_group("walk")]

# The tests of the owner that a step of a release can break; after an import and an edit they run in full.
OF_A_RELEASE = [
    "test_documents.py::test_documents_say_what_the_contract_says",
    "test_golden.py::test_the_served_version_is_one_of_this_contract",
    "test_golden.py::test_the_server_repeats_the_golden_answers",
    "test_golden.py::test_predict_without_a_server_equals_the_server",
    "test_promises.py::test_verdicts_are_about_the_versions_that_are_there",
    "test_promises.py::test_a_version_is_whole",
    "test_server.py::test_the_documented_example_is_true",
    "test_server.py::test_operations_say_what_runs",
]
# Another model for the same columns.
AGAIN = """
import sys, joblib, pandas
data, model, target, made = sys.argv[1:]
rows = pandas.read_csv(data)
model = joblib.load(model).set_params(logisticregression__C=0.5)
joblib.dump(model.fit(rows.drop(columns=target), rows[target]), made)
"""


class Life:
    """A service under git, and what its owner does to it."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder, self.models = folder, models

    def make(self, *words: str, refused: bool = False) -> str:
        """A recipe typed as documented, and what it said; it has to work, or to be refused in one line."""
        ended = run("make", *words, cwd=self.folder)
        assert (ended.returncode != 0) == refused, f"make {' '.join(words)}\n{ended.stdout[-8000:]}"
        assert "Traceback" not in ended.stdout
        return ended.stdout

    def python(self, *words: str | Path) -> str:
        """A program of the service's environment, which has to work."""
        ended = run(self.folder / BIN / "python", *words, cwd=self.folder)
        assert ended.returncode == 0, f"{words}\n{ended.stdout[-8000:]}"
        return ended.stdout

    def bring(self, case: str, model: str = "model.joblib") -> None:
        """Import a model of tests/models.py with its holdout."""
        given = self.models / case
        (held,) = given.glob("holdout.*")
        words = {
            "MODEL": given / model,
            "DATA": data_of(given),
            "TARGET": expected(given)["target"],
            "HOLDOUT": held,
        }
        self.make("import-model", *(f"{name}={value}" for name, value in words.items()))

    def bring_another(self, case: str) -> None:
        """Fit another model for the same columns, and import it."""
        given = self.models / case
        model, target = given / "model.joblib", expected(given)["target"]
        self.python("-W", "ignore", "-c", AGAIN, data_of(given), model, target, given / "again.joblib")
        self.bring(case, "again.joblib")

    def replace(self, file: str, text: str, other: str) -> None:
        """Edit a file by hand."""
        path = self.folder / file
        before = path.read_text("utf-8")
        assert text in before
        path.write_text(before.replace(text, other, 1), "utf-8")

    def agree(self, step: str, version: str, *, whole: bool = False) -> None:
        """What is released, served, predicted, documented and tested is that version; then commit it."""
        released = json.loads((self.folder / "artifacts" / "release.json").read_bytes())
        assert released["serving"] == version, step
        assert json.loads(self.make("--silent", "predict"))["model_version"] == version, step
        if whole:
            self.make("check")
        tests = ["tests"] if whole else [f"tests/{one}" for one in OF_A_RELEASE]
        ended = run(self.folder / BIN / "python", "-m", "pytest", "-q", "--tb=short", *tests, cwd=self.folder)
        assert ended.returncode == 0, f"after {step}:\n{ended.stdout[-8000:]}"
        if run("git", "status", "--porcelain", cwd=self.folder).stdout:
            commit(self.folder, step)


@pytest.fixture
def life(base: Path, fitted: Path, tmp_path: Path) -> Life:  # noqa: F811
    """A copy of the render with its history; the environment is shared, and counts as set up."""
    folder = tmp_path / base.name
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(".venv", "__pycache__", ".*_cache"))
    (folder / ".venv").symlink_to(base / ".venv")
    with (folder / ".git" / "info" / "exclude").open("a") as exclude:
        exclude.write(".venv\n")
    for stamp in ("made", "dev", "runtime"):
        (folder / ".venv" / f"{stamp}.stamp").touch()
    return Life(folder, fitted)


def test_releases_and_the_next_contract(life: Life) -> None:
    """Two models of one contract, tried, released, taken back; then a regressor: all stays green."""
    life.bring("economical")
    life.agree("the first import", "v2", whole=True)
    life.bring_another("economical")
    life.agree("a second model of the contract", "v2")
    life.make("evaluate", "VERSION=v3")
    life.agree("the evaluation", "v2")
    life.make("shadow", "VERSION=v3")
    life.make("canary", "VERSION=v3", "PERCENT=10")
    life.agree("a shadow and a canary", "v2")
    life.make("promote", "VERSION=v3")
    life.agree("the promotion", "v3")
    life.make("rollback")
    life.agree("the roll-back", "v2")
    life.make("rollback")
    life.agree("the roll-back of the roll-back", "v3")
    life.bring("beyond")
    life.agree("a model of another contract", "v4", whole=True)


def test_words_signatures_and_an_update(life: Life, repository: Path, tmp_path: Path) -> None:
    """Words edited by hand, the stub and back, a signed release, an update that changes the example."""
    life.bring("economical")
    words = 'alias="Weight (lbs)", description="Of the car, empty."'
    life.replace("app/schemas/predict.py", 'alias="Weight (lbs)"', words)
    life.make("contract")
    life.python("-m", "lifecycle", "docs")
    life.agree("words edited by hand", "v2", whole=True)
    life.make("rollback", refused=True)
    life.make("rollback", "CONFIRM=yes")
    life.agree("the stub", "v0")
    life.make("rollback")
    life.agree("the model again", "v2")

    said = life.python("-m", "lifecycle", "new-key", "key.pem")
    trusted = said.partition("APP_TRUSTED_KEYS=")[2].split()[0]
    (life.folder / ".env").write_text(f"APP_TRUSTED_KEYS={trusted}\n", "utf-8")
    life.make("sign", "VERSION=v2", "KEY=key.pem")
    life.agree("the signature", "v2")
    life.bring_another("economical")
    life.make("evaluate", "VERSION=v3")
    life.make("sign", "VERSION=v3", "KEY=key.pem")
    life.make("promote", "VERSION=v3")
    life.agree("a signed release", "v3")

    upstream = shutil.copytree(repository, tmp_path / "upstream")
    linked = run(CRUFT, "link", str(upstream), "--no-input", cwd=life.folder)
    assert linked.returncode == 0, linked.stdout
    commit(life.folder, "Follow the template")
    for name in ("Makefile", "app/schemas/predict.py", "evaluation/thresholds.toml"):
        file = upstream / SERVICE.name / name
        file.write_text("# theirs\n" + file.read_text("utf-8"), "utf-8")
    for name in ("openapi.json", "artifacts/v0/rules.json", "artifacts/v1/golden.jsonl", "docs/example.json"):
        file = upstream / SERVICE.name / name
        file.write_text(file.read_text("utf-8").replace("petal", "blossom"), "utf-8")
    commit(upstream, "Another example")
    updated = run(CRUFT, "update", "--skip-apply-ask", cwd=life.folder)
    assert updated.returncode == 0, updated.stdout
    assert (life.folder / "Makefile").read_text("utf-8").startswith("# theirs\n")
    for stamp in ("dev", "runtime"):
        (life.folder / ".venv" / f"{stamp}.stamp").touch()
    life.agree("an update that changes the example", "v3", whole=True)
