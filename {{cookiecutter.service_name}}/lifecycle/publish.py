"""From bytes to a version folder, whole or not at all.

    files -> .v1.new beside it -> rename -> artifacts/v1

A version that is there is never changed: other bytes need another version, or `force` before release.
"""

import json
import shutil
from pathlib import Path


def canonical_json(value: object) -> bytes:
    """JSON as versions hold it: sorted, indented, one newline at the end, the same bytes every time."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def differing(folder: Path, files: dict[str, bytes]) -> list[str]:
    """Names of files in `folder` that differ from `files`, are missing or are too many; [] if equal."""
    present = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
    return sorted(name for name in present.keys() | files.keys() if present.get(name) != files.get(name))


def publish(root: Path, version: str, files: dict[str, bytes]) -> None:
    """Write `files` as `root`/`version`, in place of what is there; on any failure what is there stays."""
    target, new, old = root / version, root / f".{version}.new", root / f".{version}.old"
    root.mkdir(parents=True, exist_ok=True)
    if old.exists() and not target.exists():  # killed between the two renames
        old.rename(target)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
        if target.exists():  # a folder cannot be renamed over a full one
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def start_release(root: Path, serving: str, previous: str) -> bool:
    """Write `release.json` if there is none; what serves afterwards changes by promotion only."""
    path = root / "release.json"
    if path.exists():
        return False
    release = {"serving": serving, "previous": previous, "shadow": None, "canary": None, "canary_percent": 0}
    new = root / ".release.new"
    new.write_bytes(canonical_json(release))
    new.replace(path)
    return True
