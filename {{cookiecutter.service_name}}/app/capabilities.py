"""Capabilities: folders that the template adds to the service; the base finds them, and works without them.

    pyproject.toml, [tool.service] capabilities = "object-store tracing"
      -> app/object_store/, app/tracing/: settings.py for their variables, install(app, service) for the rest

A capability may also have `local_folder(settings, version)`, for artifacts that lie somewhere else.
"""

import re
import tomllib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT_FILE = Path(__file__).resolve().parents[1] / "pyproject.toml"
# The variables of each capability there is, so that the settings can say which one a name belongs to.
VARIABLES = {
    "object-store": ("APP_ARTIFACTS_ALLOW_PRIVATE",),
    "tracing": ("APP_TRACING_ENDPOINT",),
}


@cache
def project() -> dict[str, Any]:
    """The content of pyproject.toml."""
    return tomllib.loads(PROJECT_FILE.read_text("utf-8"))


@cache
def installed() -> tuple[str, ...]:
    """The capabilities that this service was rendered with; none where it was not rendered at all."""
    named = project().get("tool", {}).get("service", {}).get("capabilities", "").split()
    return tuple(name for name in named if re.fullmatch("[a-z][a-z0-9-]*", name) and name != "none")


def part(capability: str, name: str = "") -> ModuleType:
    """The package of a capability, or a module of it."""
    return import_module(f"app.{capability.replace('-', '_')}{name and f'.{name}'}")


def local_folder(settings: Any, version: str | None) -> AbstractContextManager[Path]:
    """The folder to read artifacts from: APP_ARTIFACTS_DIR, or a copy of the served version while in use.

    `version` is the one to copy, None for the one in release.json. Raises ArtifactError.
    """
    place = settings.artifacts_dir
    if isinstance(place, Path):
        return nullcontext(place)
    opener = next(one for one in map(part, installed()) if hasattr(one, "local_folder"))
    folder: AbstractContextManager[Path] = opener.local_folder(settings, version)
    return folder


def install(app: Any, service: Any) -> None:
    """Let every installed capability add its part to the application."""
    for name in installed():
        part(name).install(app, service)
