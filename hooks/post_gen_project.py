"""Lays the overlays of the answers over the base, removes the others, says what to do next.

_overlays/<option>_<choice>/ may replace files of the base; _overlays/capabilities/<name>/ only adds files.
"""

import sys

# Hooks run from the folder for temporary files: anybody's module there would be imported first.
sys.path.pop(0)

import json
import os
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

# Inside a raw string any answer stays data; hooks/pre_gen_project.py says why.
ANSWERS = r"""{{ cookiecutter | tojson }}"""
OVERLAYS = Path("_overlays")


def lay(answers: dict[str, str]) -> None:
    """Puts the overlays of the answers into place."""
    layers = [OVERLAYS / f"{option}_{answers[option]}" for option in answers["_choices"]]
    layers += [OVERLAYS / "capabilities" / name for name in sorted(set(answers["capabilities"].split()))]
    # Where existing files are to be skipped, cookiecutter skipped this one too, and says nothing else of it.
    if (OVERLAYS / "kept.txt").read_text("utf-8") == "kept\n":
        layers.append(OVERLAYS / "kept")
    for layer in layers:
        if layer.is_dir():  # the base itself, which is a choice or no capability, has no overlay
            shutil.copytree(layer, ".", dirs_exist_ok=True)
    shutil.rmtree(OVERLAYS)


def let_others_read(folder: Path) -> None:
    """Makes readable what Compose mounts: its containers run as other users, whatever this one's umask."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))


def say(text: str) -> None:
    """Prints what the terminal can show; a terminal that can show or take nothing changes nothing."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    with suppress(OSError):
        os.write(1, text.encode(encoding, "backslashreplace"))


def main() -> None:
    """Runs in the folder that was just rendered."""
    answers = json.loads(ANSWERS)
    lay(answers)
    let_others_read(Path("ops"))
    folder = str(Path.cwd())
    pasted = subprocess.list2cmdline([folder]) if os.name == "nt" else shlex.quote(folder)
    say(f"\n{answers['service_name']} is ready. Next:\n\n  cd {pasted}\n  make run\n  make test\n")


if __name__ == "__main__":
    main()
