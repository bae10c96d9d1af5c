"""Renders the template as it stands in this work tree: `python -m scripts.render FOLDER [name=answer ...]`.

files git knows or would add -> a clean copy -> cookiecutter -> FOLDER/<service_name>
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVICE = ROOT / "{{cookiecutter.service_name}}"


def tracked_files(root: Path = ROOT) -> list[Path]:
    """Gives the files that git tracks or would add, relative to `root`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True, encoding="utf-8")
    # A file that was removed but is not committed yet is still listed.
    return [Path(name) for name in sorted(set(listed.stdout.split("\0"))) if (root / name).is_file()]


def copy_template(target: Path) -> Path:
    """Copies the template without what working in it leaves behind.

    Cookiecutter renders everything it finds in the service folder, also the environment and the caches that
    are there once its tests ran in place.
    """
    for file in tracked_files():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, target / file)
    return target


def render(into: Path, *answers: str) -> None:
    """Renders into the folder `into`, over what an earlier render left there."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        template = copy_template(Path(folder, "template"))
        command = [sys.executable, "-m", "cookiecutter", "--no-input", "--overwrite-if-exists"]
        subprocess.run([*command, "--output-dir", into, template, *answers], check=True)


if __name__ == "__main__":
    try:
        render(Path(sys.argv[1]), *sys.argv[2:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
