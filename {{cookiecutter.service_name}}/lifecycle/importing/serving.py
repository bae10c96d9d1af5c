"""The environment in which a version will serve: its missing packages, and imports limited to it.

requirements/*.txt but dev.txt -> locked() -> lacking(libraries) -> add() to runtime.in, on request
the packages of the lock, missing packages and their dependencies -> Only(): any other import fails
"""

import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from lifecycle.command import ROOT

RUNTIME_IN = Path("requirements/runtime.in")
# The C locale without any other, as in a slim image.
LOCALE = {"LC_ALL": "C", "LANG": "C", "LOCPATH": "/nonexistent"}


def plain(name: str) -> str:
    """A distribution's normalised name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> set[tuple[str, str]]:
    """Names and versions of the packages in the image."""
    texts = [path.read_text("utf-8") for path in (ROOT / "requirements").glob("*.txt") if path.stem != "dev"]
    found = re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", "\n".join(texts), re.MULTILINE)
    return {(plain(name), version) for name, version in found}


def lacking(libraries: Mapping[str, str]) -> list[str]:
    """Requirements that the image lacks for a model made with these libraries."""
    there = locked()
    return [
        f"{name}=={version}" for name, version in libraries.items() if (plain(name), version) not in there
    ]


def add(requirements: Iterable[str], why: str) -> str:
    """The text of requirements/runtime.in with these requirements, replacing other versions of them."""
    names = {plain(one.partition("==")[0]) for one in requirements}
    lines = (ROOT / RUNTIME_IN).read_text("utf-8").splitlines()
    kept = [line for line in lines if plain(re.split(r"[^\w.-]", line, maxsplit=1)[0]) not in names]
    return "\n".join([*kept, *(f"{one} # {why}" for one in requirements)]) + "\n"


class Only:
    """A context in which only packages of the image can be imported: its lock, and these requirements."""

    def __init__(self, requirements: Iterable[str]) -> None:
        pending = [name for name, _ in locked()] + [one.partition("==")[0] for one in requirements]
        self._allowed, known = {*sys.stdlib_module_names, "app", "lifecycle"}, set[str]()
        while pending:
            name = plain(pending.pop())
            if name in known:
                continue
            known.add(name)
            with suppress(metadata.PackageNotFoundError):  # packages for other systems
                found = metadata.distribution(name)
                needed = [one for one in found.requires or () if "extra ==" not in one]
                pending += [re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in needed]
                files = [one for one in found.files or () if one.suffix in (".py", ".so", ".pyd")]
                self._allowed |= {one.parts[0].partition(".")[0] for one in files}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse an import that the image could not do; the import system calls this first."""
        known = name.partition(".")[0] in self._allowed or name.startswith(
            "_sysconfigdata"
        )  # of Python itself
        if path is None and not known:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def __enter__(self) -> None:
        modules = sys.modules.items()
        self._loaded = {name: one for name, one in modules if name.partition(".")[0] not in self._allowed}
        self._loaded.pop("__main__", None)
        for name in self._loaded:
            del sys.modules[name]
        sys.meta_path.insert(0, self)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        sys.modules.update(self._loaded)
