"""Lays the overlays of the chosen options over the base, removes the others, says what to do next."""

import json
import shutil
from pathlib import Path

# Inside a raw string any answer stays data; hooks/pre_gen_project.py says why.
ANSWERS = r"""{{ cookiecutter | tojson }}"""


def main() -> None:
    """Runs in the folder that was just rendered."""
    answers = json.loads(ANSWERS)
    overlays = Path("_overlays")
    for option in answers["_choices"]:
        layer = overlays / f"{option}_{answers[option]}"
        if layer.is_dir():  # the choice that is the base has no overlay
            shutil.copytree(layer, ".", dirs_exist_ok=True)
    shutil.rmtree(overlays)

    print(f"\n{answers['service_name']} is ready. Next:\n\n  cd {Path.cwd()}\n  make run\n  make test\n")


if __name__ == "__main__":
    main()
