"""Every file of a render is the owner's or the template's, and updates follow docs/files.md."""

import re
import tomllib

from scripts.render import SERVICE
from tests.conftest import Bake, contents

ROW = re.compile(r"^\| `([^`]+)` \| (yours|template) \|", re.MULTILINE)


def rows() -> dict[str, str]:
    """Each path in docs/files.md, with its owner."""
    return dict(ROW.findall((SERVICE / "docs" / "files.md").read_text("utf-8")))


def test_every_file_has_an_owner(bake: Bake) -> None:
    """The longest path in docs/files.md that a file lies under says whose it is."""
    paths = rows()
    files = [name for name in contents(bake()) if not name.startswith(".github/")]
    assert [name for name in files if not any(name == path or name.startswith(path) for path in paths)] == []
    assert set(paths.values()) == {"yours", "template"}


def test_updates_skip_what_is_the_owner_s(bake: Bake) -> None:
    """The skip list of updates is the column of docs/files.md."""
    skipped = tomllib.loads((bake() / "pyproject.toml").read_text("utf-8"))["tool"]["cruft"]["skip"]
    assert skipped == [path.rstrip("/") for path, owner in rows().items() if owner == "yours"]
