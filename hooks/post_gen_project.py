"""Lays the overlays of the answers over the base, removes the others, says what to do next.

_overlays/<option>_<choice>/ may replace files of the base; _overlays/capabilities/<name>/ only adds files.
"""

import json
import shutil
from pathlib import Path

# Inside a raw string any answer stays data; hooks/pre_gen_project.py says why.
ANSWERS = r"""{{ cookiecutter | tojson }}"""


def main() -> None:
    """Runs in the folder that was just rendered."""
    answers = json.loads(ANSWERS)
    overlays = Path("_overlays")
    layers = [overlays / f"{option}_{answers[option]}" for option in answers["_choices"]]
    layers += [overlays / "capabilities" / name for name in sorted(set(answers["capabilities"].split()))]
    for layer in layers:
        if layer.is_dir():  # the base itself, which is a choice or no capability, has no overlay
            shutil.copytree(layer, ".", dirs_exist_ok=True)
    shutil.rmtree(overlays)

    print(f"\n{answers['service_name']} is ready. Next:\n\n  cd {Path.cwd()}\n  make run\n  make test\n")


if __name__ == "__main__":
    main()
