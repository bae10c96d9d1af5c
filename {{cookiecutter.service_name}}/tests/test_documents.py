"""Documents name what exists: files, commands, settings, links, and the facts of the contract and the model.

README.md, CHANGELOG.md, docs/**/*.md <-> the files of the service, the Makefile, the contract, the alerts
"""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from app.settings import load_settings, redacted
from tests.conftest import ROOT, read, run
from tests.test_alerts import ALERTS

RUNBOOKS = [path for path in sorted((ROOT / "docs" / "runbooks").glob("*.md")) if path.stem != "README"]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "app|artifacts|docs|evaluation|lifecycle|load|ops|server|tests"
OF_TEMPLATE = "tests/service/"  # tests of the machinery stay in the template
SECTIONS = [
    "TL;DR", "Is it real", "Impact", "First three actions", "Ranked causes",
    "Roll back the model / the image", "Escalate", "Silence", "After",
]  # fmt: skip
# The address of the runbooks in alerts: links below it are links to docs/runbooks.
BASES = {rule["annotations"]["runbook_url"].rpartition("/")[0] for rule in ALERTS.values()}


def name(path: Path) -> str:
    """A path for messages."""
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> str:
    """The code blocks of one language."""
    return "\n".join(re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL))


def code(text: str) -> str:
    """All code for a shell: blocks, and words in back ticks."""
    return "\n".join([blocks(text, "sh"), *re.findall(r"`([^`\n]+)`", text)])


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as Git hosts make them."""
    headings = re.findall(r"^#+ (.*)$", read(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def fault(page: Path, link: str) -> str:
    """The fault of a link, or nothing; links to other sites are not checked."""
    address, _, anchor = link.partition("#")
    base, _, file = address.rpartition("/")
    if base in BASES:
        target = ROOT / "docs" / "runbooks" / file
    elif "://" in address or address.startswith("mailto:"):
        return ""
    else:
        target = page.parent / address if address else page
    if not target.exists():
        return f"{name(page)} links to {link}: there is no such file"
    if anchor and anchor not in anchors(target):
        return f"{name(page)} links to {link}: there is no such heading"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link to a document leads to an existing file and heading."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", read(page), flags=re.DOTALL)
    faults = [fault(page, link) for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert not any(faults), "\n".join(filter(None, faults))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_paths_exist(page: Path) -> None:
    """Commands, paths and containers in documents exist in this project."""
    written = code(read(page))
    recipes = "".join(path.read_text("utf-8") for path in [ROOT / "Makefile", *ROOT.glob("make/*.mk")])
    targets = set(re.findall(r"^([a-z-]+):", recipes, re.MULTILINE))
    unknown = set(re.findall(r"\bmake ([a-z-]+)\b", written)) - targets
    assert not unknown, f"{name(page)} names make targets that the Makefile lacks: {unknown}"
    paths = re.findall(rf"(?:^|(?<=[\s@=`]))((?:{FOLDERS})/[\w./-]*\w/?)", written, re.MULTILINE)
    missing = {path for path in paths if not (path.startswith(OF_TEMPLATE) or (ROOT / path).exists())}
    assert not missing, f"{name(page)} names files that are not there: {missing}"
    composed = "".join(path.read_text("utf-8") for path in ROOT.glob("compose*.yaml"))
    services = set(re.findall(r"^  ([a-z]+):$", composed, re.MULTILINE))
    asked = r"docker compose (?:up|logs|exec|run|ps|top)(?: --[a-z-]+(?: [0-9]+[mh]?)?)* ([a-z]+)\b"
    assert set(re.findall(asked, written)) <= services


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_in_documents_exist(page: Path) -> None:
    """No document speaks of an APP_ variable that the service would refuse."""
    known = set(redacted(load_settings()))
    unknown = set(re.findall(r"\bAPP_[A-Z_]+[A-Z]\b", read(page))) - known
    assert not unknown, f"{name(page)} names settings that app/settings.py lacks: {unknown}"


def test_documents_say_what_the_contract_says(tmp_path: Path) -> None:
    """README, API page, model card and example have the facts of the contract and of the served version."""
    done = run(tmp_path, "lifecycle", "docs", "--check")
    assert done.returncode == 0, done.stderr + "python -m lifecycle docs writes them again"


def test_every_file_is_explained() -> None:
    """`docs/files.md` names everything in the service's folder, and nothing that is not there."""
    named = set(re.findall(r"^\| `([^`]+)` ", read("docs/files.md"), re.MULTILINE))
    made = ["_overlays", *re.findall(r"^([\w.*]+)/?$", read(".gitignore"), re.MULTILINE)]
    paths = [path for path in ROOT.iterdir() if not any(fnmatch(path.name, pattern) for pattern in made)]
    present = {path.name + "/" * path.is_dir() for path in paths}
    unexplained = {path for path in present - named if not path.startswith(".")}
    assert not unexplained, f"give each a row in docs/files.md: {unexplained}"
    gone = {path for path in named if not (ROOT / path).exists()}
    assert not gone, f"docs/files.md explains what is not there: {gone}"


def test_alerts_and_runbooks_have_the_same_names() -> None:
    """Each alert has its runbook, each runbook its alert, and the index leads to all of them."""
    pages = {path.stem for path in RUNBOOKS}
    assert pages == set(ALERTS), "name docs/runbooks/*.md after the alerts in ops/prometheus/*rules.yml"
    # The page of a capability, docs/<capability>.md, links to its runbooks.
    index = "".join(read(page) for page in [ROOT / "docs/runbooks/README.md", *(ROOT / "docs").glob("*.md")])
    linked = set(re.findall(r"\[(\w+)\]\([^)]*\1\.md\)", index))
    assert pages <= linked, f"docs/runbooks/README.md does not lead to {pages - linked}"


@pytest.mark.parametrize("page", RUNBOOKS, ids=name)
def test_a_runbook_can_be_followed_at_night(page: Path) -> None:
    """It has the sections of all runbooks, three actions, a query, and the way to silence its alert."""
    text = read(page)
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert text.startswith(f"# {page.stem}\n")
    assert list(sections) == SECTIONS
    assert [heading for heading, part in sections.items() if len(part.strip()) < 40] == []
    assert re.findall(r"^(\d)\. ", sections["First three actions"], re.MULTILINE) == ["1", "2", "3"]
    assert blocks(sections["Is it real"], "promql")
    assert f"silence add alertname={page.stem} " in sections["Silence"]
