"""Models as people write them are imported by one command and answer as they did, or are refused in one line.

One case of each kind; `make corpus` tries all and writes docs/models.md.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.corpus.run import CASES, DOCUMENT, HERE, LIMIT, run, try_case
from tests.test_import import BIN, base  # noqa: F401  # a fixture

pytestmark = pytest.mark.models

# Cases that are refused, with words of the line that says why and what to do.
REFUSED = {
    "hard_votes": "no `predict_proba`",
    "notebook_lambda": "app/own/features.py",
    "lightgbm_booster": "LGBM",
}
# One of each kind, for every change; the whole corpus takes half an hour.
TRIED = [
    "textbook_gaps", "textbook_complete_first", "scaled_forest", "tuned_threshold", "infrequent", "codes",
    "histogram_pandas_categories", "text_series", "own_transformer", "own_classifier", "catboost_numbers",
    "catboost_words", "lightgbm_categories", "unused_hashes", "unused_mixtures", "open_text_encoded",
    "coded_labels_held_out", *REFUSED,
]  # fmt: skip
GROUPS = [TRIED[0::2], TRIED[1::2]]


@pytest.fixture(scope="module")
def fitted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:  # noqa: F811
    """Fits a group of cases in one process, once, and gives the folder to work in."""
    folder, done = tmp_path_factory.mktemp("corpus"), set[str]()

    def fit(names: list[str]) -> Path:
        if missing := [name for name in names if name not in done]:
            python = base / BIN / "python"
            made = run(python, "-W", "ignore", HERE / "cases.py", folder / "models", *missing, cwd=folder)
            assert made.returncode == 0, made.stdout
            done.update(missing)
        return folder

    return fit


@pytest.mark.parametrize(
    ("name", "group"),
    [
        pytest.param(name, index, marks=pytest.mark.xdist_group(f"corpus {index}"))
        for index, names in enumerate(GROUPS)
        for name in names
    ],
)
def test_model_answers_as_its_original_or_is_refused_in_a_line(
    base: Path,  # noqa: F811
    fitted: Callable[[list[str]], Path],
    name: str,
    group: int,
) -> None:
    """Alone, in batches, with gaps and unseen words; a refusal says what to do; nothing is taken wrongly."""
    result = try_case(base, name, fitted(GROUPS[group]))
    if name in REFUSED:
        assert result.verdict == "refused", (result.said, result.output)
        assert REFUSED[name] in result.said
    else:
        assert result.verdict == "equal", (result.said, result.output)


def test_the_page_has_every_case() -> None:
    """docs/models.md is of the corpus as it stands, with at least 60 models."""
    page, names = DOCUMENT.read_text("utf-8"), [name for name, _ in CASES]
    assert len(names) >= 60
    assert [name for name in names if f"| {name} |" not in page and not name.startswith("torch")] == []


def test_nine_of_ten_are_served_and_none_wrongly() -> None:
    """In docs/models.md at least 90 % answer as their original, and each refusal is one short line."""
    tried, refused = DOCUMENT.read_text("utf-8").split("## Refused")
    ends = dict(re.findall(r"(?m)^\| (\w+) \| .* \| (onnx|skops|refused|wrong) \|", tried))
    lines = dict(re.findall(r"(?m)^\| (\w+) \| (.+) \|$", refused.partition("|---|---|")[2]))
    assert len(ends) == len(re.findall(r"(?m)^\| \w+ \|", tried)) - 1
    assert "wrong" not in ends.values()
    assert sorted(lines) == sorted(name for name, end in ends.items() if end == "refused")
    assert len(lines) <= len(ends) / 10
    assert max(map(len, lines.values())) <= LIMIT
    assert {*REFUSED} <= {*lines}
