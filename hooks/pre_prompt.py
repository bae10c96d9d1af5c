"""Refuses what cookiecutter answers with a traceback, or writes to disk before pre_gen_project.py can look.

command line, user's configuration, replay file -> answers as they were given -> the rules of every answer

A choice that is none, and a name in a replay file that leads out of the output folder. Only Linux tells a
hook the command line; elsewhere cookiecutter refuses the choice itself, and pre_gen_project.py the name.
"""

import argparse
import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from pre_gen_project import REFERENCE, command_line, refuse, typed_answers, unknown_names, unusable


def typed_path(name: str) -> Path:
    """Gives a path as cookiecutter sees it, whose working folder is another."""
    return Path(f"/proc/{os.getppid()}/cwd", name)


def options(words: list[str]) -> argparse.Namespace:
    """Gives the options of cookiecutter's command line that have a value, and `words`, the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("-c", "--checkout"), ("-o", "--output-dir"), ("--directory",)):
        parser.add_argument(*names)
    parser.add_argument("--config-file")
    parser.add_argument("--replay-file")
    parser.add_argument("--default-config", action="store_true")
    parser.add_argument("words", nargs="*")
    return parser.parse_known_intermixed_args(words)[0]


def configured(given: argparse.Namespace) -> dict[str, Any]:
    """Gives the answers in the user's configuration; none where it cannot be read: cookiecutter says why."""
    from cookiecutter.config import get_user_config

    try:
        file = str(typed_path(given.config_file)) if given.config_file else None
        found = get_user_config(config_file=file, default_config=given.default_config)
    except Exception:
        return {}
    return dict(found["default_context"])


def main() -> None:
    """Runs in a copy of the template, before the first question."""
    words = command_line()
    if not words or {"-h", "--help", "-V", "--version"} & set(words):
        return
    given = options(words)
    shipped = json.loads(Path("cookiecutter.json").read_text(encoding="utf-8"))
    questions = {name: value for name, value in shipped.items() if not name.startswith("_")}
    template = {"_template": given.words[0] if given.words else "TEMPLATE", "_repo_dir": str(Path.cwd())}
    if given.replay_file:
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            replayed = json.loads(typed_path(given.replay_file).read_text(encoding="utf-8"))["cookiecutter"]
            typed = {name: value for name, value in replayed.items() if not name.startswith("_")}
            answers = {**shipped, **typed, **template}
            refuse([*unknown_names(typed, list(questions)), *unusable(answers, typed)], answers, typed)
        return
    typed = typed_answers(words)
    config = {name: value for name, value in configured(given).items() if name in questions}
    wrong = [
        name
        for name, allowed in shipped["_choices"].items()
        for source in (config, typed)
        if name in source and source[name] not in allowed
    ]
    # Cookiecutter would take a list for choices, and write a blank name into the answers that refer to it.
    wrong += [name for name, value in config.items() if not isinstance(value, str)]
    if wrong:
        usual = {name: value[0] if isinstance(value, list) else value for name, value in questions.items()}
        raw = usual | config | {name: value for name, value in typed.items() if name in questions}
        answers = {**shipped, **template}
        for name, value in raw.items():
            answers[name] = value
            if isinstance(value, str):
                answers[name] = re.sub(REFERENCE, lambda reference: str(answers[reference[1]]), value)
        refuse([*unknown_names(typed, list(questions)), *unusable(answers, raw)], answers, raw)


if __name__ == "__main__":
    main()
