"""Every runbook in one file for a wiki, once every link in them is known to lead somewhere.

docs/runbooks/*.md -> broken links, a line each, and exit 1; or build/runbooks.md with a table of contents

Links between runbooks are absolute, because a wiki keeps nothing else through a paste. Those below an address
of this project (`[project.urls]` of pyproject.toml) are looked up in its files; others are only listed.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lifecycle.files import ROOT

FOLDER = ROOT / "docs" / "runbooks"
INDEX = FOLDER / "README.md"
_LINK = re.compile(r"\]\(([^)]*)\)")
_ADDRESS = re.compile(r"(?<!\]\()https?://[^\s)>]+[\w/]")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a document outside its code blocks."""
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            yield number, line


def anchor(heading: str) -> str:
    """The fragment that a link to `heading` needs, as GitHub and most wikis make it."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def headings(text: str, level: int | None = None) -> list[str]:
    """The headings of a document, of one level or of all."""
    hashes = "#{1,6}" if level is None else "#" * level
    return [match[1] for _, line in prose(text) if (match := re.fullmatch(f"{hashes} (.+)", line))]


def own_addresses() -> dict[str, Path]:
    """Addresses of this project on the web, and their folders here; the longest first."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    folders = {f"{urls['Runbooks']}/": FOLDER, f"{urls['Repository']}/blob/main/": ROOT}
    return dict(sorted(folders.items(), key=lambda item: -len(item[0])))


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Line number and target of every link outside code."""
    for number, line in prose(page.read_text("utf-8")):
        text = re.sub(r"`[^`]*`", "", line)
        yield from ((number, found) for found in (*_LINK.findall(text), *_ADDRESS.findall(text)))


def target(page: Path, link: str) -> tuple[Path, str] | None:
    """The file here that a link in `page` means, and the heading in it; None for links out of the project."""
    for address, folder in own_addresses().items():
        if link.startswith(address):
            path, _, fragment = link.removeprefix(address).partition("#")
            return folder / path, fragment
    path, _, fragment = link.partition("#")
    return None if "://" in link else (page.parent / path if path else page, fragment)


def fault(page: Path, link: str) -> str | None:
    """What is wrong with a link in `page`; None if nothing is, or if it leads out of the project."""
    found = target(page, link)
    if found is None:
        return None
    if page.parent == FOLDER and not link.startswith(tuple(own_addresses())):
        return "is relative, so a paste into a wiki breaks it"
    file, heading = found
    if not file.exists():
        return "there is no such file"
    if heading and heading not in map(anchor, headings(file.read_text("utf-8"))):
        return "there is no such heading"
    return None


def broken(pages: list[Path]) -> list[str]:
    """One line for every link that leads nowhere."""
    return [
        f"{page.relative_to(ROOT).as_posix()}:{number}: {link}: {what}"
        for page in pages
        for number, link in links(page)
        if (what := fault(page, link))
    ]


def wiki() -> tuple[str, list[str], list[str]]:
    """All runbooks as one document; a line for each problem; the links that lead out of the project.

    The document is the index, then each other page as a chapter, with a table of contents.
    """
    pages = [INDEX, *sorted(set(FOLDER.glob("*.md")) - {INDEX})]
    title, _, rest = INDEX.read_text("utf-8").partition("\n")
    chapters = [rest.strip(), *(_deeper(page.read_text("utf-8")) for page in pages[1:])]
    body = "\n\n".join(chapters)
    contents = [f"- [{heading}](#{anchor(heading)})" for heading in headings(body, level=2)]
    document = "\n".join([title, "", *contents, "", body, ""])
    problems = broken(pages) + [f"{name}: the heading comes twice" for name in ambiguous(document)]
    outside = {link for page in pages for _, link in links(page) if target(page, link) is None}
    return document, problems, sorted(outside)


def ambiguous(document: str) -> list[str]:
    """Headings in the table of contents that share an anchor: wikis number these differently."""
    counts = Counter(map(anchor, headings(document)))
    return [heading for heading in headings(document, level=2) if counts[anchor(heading)] > 1]


def _deeper(text: str) -> str:
    """A document with each heading one level lower."""
    lines = text.strip().splitlines()
    for number, line in prose(text.strip()):
        if line.startswith("#"):
            lines[number - 1] = f"#{line}"
    return "\n".join(lines)
