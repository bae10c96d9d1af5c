"""The documented life of a service: after each step its checks, tests, documents and answers agree.

render -> import -> hand-edit -> release -> next contract -> update, in several orders, as documented
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import commit, run
from tests.test_import import BIN, base, data_of, expected, fitted  # noqa: F401  # fixtures

pytestmark = [pytest.mark.models, pytest.mark.xdist_group("walk")]

# The tests of the owner that a step can break; those of alerts, image and generated requests run at the end.
TOUCHED = [f"tests/test_{one}.py" for one in ("contract", "documents", "golden", "promises", "server")]
UNTOUCHED = "not generated_requests and not load_test and not runbook and not commands_and_paths"
# Another model for the same columns: `python -c AGAIN train.csv model.joblib target again.joblib`.
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

    def make(self, *words: str, status: int = 0) -> str:
        """A recipe typed as documented, and what it said; by default it has to work."""
        ended = run("make", *words, cwd=self.folder)
        assert (ended.returncode == 0) == (status == 0), f"make {' '.join(words)}\n{ended.stdout[-8000:]}"
        return ended.stdout

    def python(self, *words: str | Path, status: int = 0) -> str:
        """A program of the service's environment, and what it said."""
        ended = run(self.folder / BIN / "python", *words, cwd=self.folder)
        assert (ended.returncode == 0) == (status == 0), f"{words}\n{ended.stdout[-8000:]}"
        return ended.stdout

    def bring(self, case: str, *more: str, model: str = "model.joblib") -> str:
        """Import a model of tests/models.py, with its holdout, and commit it."""
        given = self.models / case
        (held,) = given.glob("holdout.*")
        words = {
            "MODEL": given / model,
            "DATA": data_of(given),
            "TARGET": expected(given)["target"],
            "HOLDOUT": held,
        }
        said = self.make("import-model", *(f"{name}={value}" for name, value in words.items()), *more)
        self.commit(f"Import {case}")
        return said

    def again(self, case: str) -> str:
        """Fit another model for the same columns, beside the first."""
        given = self.models / case
        self.python(
            "-W",
            "ignore",
            "-c",
            AGAIN,
            data_of(given),
            given / "model.joblib",
            expected(given)["target"],
            given / "again.joblib",
        )
        return "again.joblib"

    def commit(self, message: str) -> None:
        """Record what changed, if anything did."""
        if run("git", "status", "--porcelain", cwd=self.folder).stdout:
            commit(self.folder, message)

    def served(self) -> str:
        """The version that release.json names."""
        version: str = json.loads((self.folder / "artifacts" / "release.json").read_bytes())["serving"]
        return version

    def agree(self, step: str, version: str) -> None:
        """Checks, tests, documents and the answer without a server are about the version that serves."""
        assert self.served() == version, step
        answer = json.loads(self.make("--silent", "predict"))
        assert answer["model_version"] == version, step
        tests = [self.folder / BIN / "python", "-m", "pytest", "-q", "--tb=short", *TOUCHED, "-k", UNTOUCHED]
        for command in (["make", "check"], tests):
            ended = run(*command, cwd=self.folder)
            assert ended.returncode == 0, f"after {step}:\n{ended.stdout[-8000:]}"
        self.commit(step)


@pytest.fixture
def life(base: Path, fitted: Path, tmp_path: Path) -> Life:  # noqa: F811
    """A copy of the render with its history; the environment is shared, and counts as set up."""
    folder = tmp_path / base.name
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(".venv", "__pycache__", ".*_cache"))
    (folder / ".venv").symlink_to(base / ".venv")
    with (folder / ".git" / "info" / "exclude").open("a") as exclude:
        exclude.write(".venv\n")
    for stamp in ("dev", "runtime"):
        (folder / ".venv" / f"{stamp}.stamp").touch()
    return Life(folder, fitted)


def test_release_and_go_back(life: Life) -> None:
    """Import, evaluate, promote, shadow, canary, roll back, then a regressor: every step leaves all green."""
    life.agree("the render", "v1")
    life.bring("economical")
    life.agree("the first import", "v2")
    life.bring("economical", model=life.again("economical"))
    life.agree("a second model of the same contract", "v2")
    life.make("evaluate", "VERSION=v3")
    life.agree("the evaluation", "v2")
    life.make("shadow", "VERSION=v3")
    life.agree("a shadow", "v2")
    life.make("canary", "VERSION=v3", "PERCENT=10")
    life.agree("a canary", "v2")
    life.make("promote", "VERSION=v3")
    life.agree("the promotion", "v3")
    life.make("rollback")
    life.agree("the roll-back", "v2")
    life.bring("beyond")
    life.agree("a model of another contract", "v4")
    life.make("test")
