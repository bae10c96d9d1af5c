"""What holds for the repository itself."""

import json
import re
import sys
from pathlib import Path

import pytest

from scripts.render import ROOT, SERVICE, tracked_files
from tests.conftest import run

TEXT_FILES = [file for file in tracked_files() if b"\0" not in (ROOT / file).read_bytes()]
WORKFLOWS = {
    "template": ROOT / ".github" / "workflows" / "ci.yml",
    "service": SERVICE / "_overlays" / "ci_github" / ".github" / "workflows" / "ci.yml",
}
# Written so that the pattern does not find itself.
REGISTRY_HOSTS = r"(pypi|pythonhosted|npmjs|debian)[.](org|com|net|io)"


def read(name: str) -> str:
    """Gives the text of a file of this repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def test_python_files_are_plain_python() -> None:
    """No Python file of the service holds template text, so it runs before it is rendered."""
    for file in SERVICE.rglob("*.py"):
        if ".venv" not in file.parts:
            assert not re.search(r"\{\{ *cookiecutter|\{%", file.read_text(encoding="utf-8")), file


def test_no_addresses_of_registries_or_machines() -> None:
    """No file names a package registry's host or a path of one machine, so mirrors and air gaps work."""
    for file in TEXT_FILES:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not re.search(REGISTRY_HOSTS, text), file
        assert not re.search(r"(^|[^\w./-])/(root|work|home)/", text, re.MULTILINE), file


def test_no_large_files() -> None:
    """No tracked file is over 1 MiB, so a clone stays quick."""
    assert [file for file in tracked_files() if (ROOT / file).stat().st_size > 1024 * 1024] == []


def test_every_option_is_documented() -> None:
    """docs/options.md names every question and every choice."""
    questions = json.loads(read("cookiecutter.json"))
    text = read("docs/options.md")
    names = [name for name in questions if not name.startswith("_")]
    choices = [choice for allowed in questions["_choices"].values() for choice in allowed]
    assert [name for name in names + choices if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", ["README.md", f"{SERVICE.name}/docs/threat_model.md"])
def test_claims_name_their_tests(name: str) -> None:
    """Every test that README and threat model point to as proof exists, in the template or in the service."""
    claimed = set(re.findall(r"[`:](test_\w+)`", read(name)))
    sources = [*(ROOT / "tests").rglob("*.py"), *(SERVICE / "tests").rglob("*.py")]
    defined = {
        name for file in sources for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))
    }
    assert claimed
    assert claimed <= defined, claimed - defined


@pytest.mark.parametrize(
    "name", [str(file) for file in TEXT_FILES if file.suffix == ".md" and SERVICE.name not in str(file)]
)
def test_links_in_documents_resolve(name: str) -> None:
    """Every relative link in the template's documents leads to a file of this repository."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", read(name))
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("workflow", WORKFLOWS.values(), ids=WORKFLOWS)
def test_workflows_pass_their_linters(workflow: Path) -> None:
    """Each workflow is one that GitHub takes, and hands out no more rights than it uses."""
    programs = Path(sys.executable).parent
    commands: tuple[list[str | Path], ...] = (
        [programs / "check-jsonschema", "--builtin-schema", "vendor.github-workflows"],
        [programs / "zizmor", "--offline", "--no-config", "--no-progress", "--persona", "auditor"],
    )
    for command in commands:
        lint = run(*command, workflow, cwd=ROOT)
        assert lint.returncode == 0, lint.stdout


@pytest.mark.parametrize("workflow", WORKFLOWS.values(), ids=WORKFLOWS)
def test_actions_are_named_by_commit(workflow: Path) -> None:
    """Every action is pinned to a commit, with its version for people, so that no tag can move it."""
    used = re.findall(r"uses: *(.*)", workflow.read_text(encoding="utf-8"))
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action)] == []


def test_the_service_s_workflow_calls_what_exists() -> None:
    """The generated workflow checks, tests, audits and builds, all with targets of the generated Makefile."""
    called = set(re.findall(r"run: make ([\w-]+)", WORKFLOWS["service"].read_text(encoding="utf-8")))
    targets = re.findall(r"^([\w-]+):", (SERVICE / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"check", "test", "sbom", "audit", "image"} <= called <= set(targets)
