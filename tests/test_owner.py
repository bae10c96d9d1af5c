"""An owner who breaks something of the rendered service is told by its own tests what to do.

a copy of a render -> one edit -> pytest of one test -> red, with the words that help
"""

import shutil
from pathlib import Path

import pytest

from tests.conftest import run
from tests.test_service import BIN, service  # noqa: F401  # a fixture

pytestmark = pytest.mark.slow

# What is broken -> file, text, other text, the test that notices, a part of its message.
EDITS = {
    "a unit": (
        *("app/schemas/predict.py", '"unit": "cm"', '"unit": "mm"'),
        *("test_golden.py::test_the_served_version_is_one_of_this_contract", "made for another contract"),
    ),
    "a description": (
        *("app/schemas/predict.py", "Length of the sepal.", "Sepal."),
        *("test_contract.py::test_the_api_is_the_committed_one", "to accept the change: make contract"),
    ),
    "a golden answer": (
        *("artifacts/v1/golden.jsonl", '"label": "setosa"', '"label": "virginica"'),
        *("test_golden.py::test_a_version_repeats_its_golden_answers", "golden.jsonl"),
    ),
    "the name of an alert": (
        *("ops/prometheus/rules.yml", "alert: Saturation", "alert: Overloaded"),
        *("test_documents.py::test_alerts_and_runbooks_have_the_same_names", "name docs/runbooks/*.md after"),
    ),
    "a link": (
        *("README.md", "docs/contract.md", "docs/contracts.md"),
        *("test_documents.py::test_links_lead_somewhere", "there is no such file"),
    ),
    "a promise": (
        *("slo.toml", "latency_p95_ms = 100", "latency_p95_ms = 200"),
        *("test_alerts.py::test_rules_and_load_gate_promise_the_same", "slo:latency:seconds"),
    ),
}


@pytest.mark.parametrize(("file", "text", "other", "test", "words"), EDITS.values(), ids=EDITS)
def test_a_breakage_is_told(
    file: str,
    text: str,
    other: str,
    test: str,
    words: str,
    service: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The test of the owner's service that is about the edited file fails, and says what is wrong."""
    ignored = shutil.ignore_patterns(".venv", ".git", "build", ".*_cache")
    folder = Path(shutil.copytree(service, tmp_path / service.name, ignore=ignored))
    edited = (folder / file).read_text("utf-8")
    assert text in edited
    (folder / file).write_text(edited.replace(text, other, 1), "utf-8")
    python = service / BIN / "python"
    ended = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{test}", cwd=folder)
    assert ended.returncode == 1, ended.stdout
    assert words in ended.stdout
