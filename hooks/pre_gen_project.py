"""Refuses answers that cannot be used, before any file is written; copies aside what an owner may want kept.

answers as JSON -> the first problem -> one line that says what to type instead, a command to paste, exit 1
"""

import sys

# Hooks run from the folder for temporary files: anybody's module there would be imported first.
sys.path.pop(0)

import difflib
import json
import os
import re
import shlex
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Cookiecutter renders this file. `tojson` writes every answer as ASCII JSON, which never has three double
# quotes in a row, so inside a raw string any answer stays data. `_cookiecutter` (absent when cruft renders)
# has the answers as they were typed, before cookiecutter rendered them as templates.
ANSWERS = r"""{{ cookiecutter | tojson }}"""
TYPED = r"""{{ _cookiecutter | default({}) | tojson }}"""
# Nothing below is rendered: {% raw %}

# Windows opens its devices under these names, and no image may be called scratch.
RESERVED = r"con|prn|aux|nul|com\d|lpt\d|scratch"
SLUG = rf"(?=.{{3,40}}$)(?!({RESERVED})$)[a-z][a-z0-9]*(-[a-z0-9]+)*"
SENTENCE = r"(?=.{1,200}$)[^\s{}]([^{}]*[^\s{}])?"
TEAM = r"(?=.{1,60}$)@?\w([\w .@/&-]*\w)?"
ADDRESS = r"(?=.{1,200}$)https://[A-Za-z0-9-]+([.][A-Za-z0-9-]+)*(:[0-9]+)?(/[A-Za-z0-9._~%+@-]+)*"
GRAFANA = ADDRESS.replace("https", "https?")
SWAPPED = "service-name-refused"  # what cookiecutter.json puts in the place of a name that is no folder name
# A default may refer to another answer; any other template text in an answer would run as code.
REFERENCE = r"\{\{ cookiecutter\.(\w+) \}\}"
TEMPLATE_TEXT = r"\{[{%#]"


class Rule(NamedTuple):
    """What an answer must match, how to say so, and how to find the nearest usable answer."""

    pattern: str
    advice: str
    correct: Callable[[str], str]


class Problem(NamedTuple):
    """An answer that cannot be used, why, and answers that can stand in its place."""

    what: str
    advice: str
    instead: dict[str, str]


def slug(text: str) -> str:
    """Gives the nearest usable service name."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = "-".join(re.findall("[a-z0-9]+", ascii_text)).lstrip("0123456789-")[:40].strip("-")
    return name if re.fullmatch(SLUG, name) else f"{name}-service".lstrip("-")


def sentence(text: str) -> str:
    """Gives the text on one line, without braces and characters that cannot be printed."""
    printable = "".join(char if char.isprintable() else " " for char in text if char not in "{}")
    return " ".join(printable.split())[:200].strip() or "Predicts one thing from others."


def team(text: str) -> str:
    """Gives the text without the characters that a label or a Markdown table could not carry."""
    plain = " ".join(re.sub(r"[^\w .@/&-]", " ", text).split())[:60]
    return re.sub(r"^[^\w@]+|\W+$", "", plain) or "ml-platform"


def address(text: str) -> str:
    """Gives the web address that belongs to a clone address or to plain http."""
    text = re.sub(r"^git@([^:/]+):", r"https://\1/", text.strip())
    text = text.replace("http://", "https://", 1).rstrip("/")
    return text if re.fullmatch(ADDRESS, text) else "https://git.example.com/my-service"


def local(_text: str) -> str:
    """Gives the address of the Grafana that Compose starts."""
    return "http://127.0.0.1:3000"


def one_of(choices: list[str]) -> Rule:
    """Makes the rule of a question that has only these answers."""

    def nearest(text: str) -> str:
        return (difflib.get_close_matches(text.strip().lower(), choices, n=1) or choices)[0]

    return Rule("|".join(choices), f"choose {' or '.join(choices)}", nearest)


def some_of(names: list[str]) -> Rule:
    """Makes the rule of a question that takes several of these names, in any order, or none of them."""

    def nearest(text: str) -> str:
        words = re.split(r"[\s,;]+", text.strip().lower())
        near = [match for word in words for match in difflib.get_close_matches(word, names, n=1)]
        return " ".join(dict.fromkeys(near)) or "none"

    one = "|".join(names)
    advice = f"use none, or names with spaces between them, of {', '.join(names)}"
    return Rule(f" *(none|({one})( +({one}))*) *", advice, nearest)


def rules(answers: dict[str, Any]) -> dict[str, Rule]:
    """Makes the rule of every question, in the order they are asked."""
    link = Rule(ADDRESS, "use an https:// address without a query or a slash at the end", address)
    return {
        "service_name": Rule(
            SLUG,
            "use 3 to 40 small letters, digits and single hyphens, a letter first, no name Windows reserves",
            slug,
        ),
        "description": Rule(
            SENTENCE, "use one line of 1 to 200 printable characters without curly braces", sentence
        ),
        "owner_team": Rule(TEAM, "use 1 to 60 letters, digits, spaces or . _ - / @ & between them", team),
        **{name: one_of(allowed) for name, allowed in answers["_choices"].items()},
        "capabilities": some_of(answers["_capabilities"]),
        "repo_url": link,
        "runbook_base_url": link,
        "dashboard_base_url": Rule(GRAFANA, link.advice.replace("an https", "an http:// or https"), local),
    }


def command_line() -> list[str]:
    """Gives what was typed after `cookiecutter`. Only Linux tells a hook; elsewhere it is empty."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    programs = [Path(word).name for word in words]
    return words[programs.index("cookiecutter") + 1 : -1] if "cookiecutter" in programs else []


def typed_answers(words: list[str]) -> dict[str, str]:
    """Gives the `name=value` words of a command line."""
    pairs = (word.partition("=") for word in words)
    return {name: value for name, equals, value in pairs if equals and name.isidentifier()}


def unknown_names(given: dict[str, Any], known: list[str]) -> Iterator[Problem]:
    """Yields the given answers that no question asks for: cookiecutter drops them without a word."""
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            yield Problem(name, f"the questions are {', '.join(known)}", dict.fromkeys(near, str(value)))


def altered(answers: dict[str, Any], shipped: dict[str, Any]) -> Iterator[Problem]:
    """Yields the template's own entries that a replay file has in another form: rules could be weaker."""
    for name, value in shipped.items():
        if re.match("_[^_]", name) and name in answers and answers[name] != value:
            yield Problem(name, "it is not this template's; delete it from the replay file", {})


def unusable(answers: dict[str, Any], typed: dict[str, Any]) -> Iterator[Problem]:
    """Yields the answers that break their rule."""
    for name, rule in rules(answers).items():
        given, raw = answers.get(name), str(typed.get(name, ""))
        answer = "" if given is None else str(given)
        if not isinstance(typed.get(name, ""), str | list) or not isinstance(given, str | None):
            advice = "leave it out, or write a text in quotes"
        elif re.search(TEMPLATE_TEXT, re.sub(REFERENCE, "", raw)):
            answer, advice = raw, "write it without curly braces, which would run as template code"
        elif not re.fullmatch(rule.pattern, answer) or not answer.isprintable():
            advice = rule.advice
        else:
            continue
        shown = answer if len(answer) < 60 else f"{answer[:57]}..."
        yield Problem(f"{name} {shown!r}", advice, {name: rule.correct(answer)})


def corrected_command(answers: dict[str, Any], typed: dict[str, Any], instead: dict[str, str]) -> str:
    """Gives the command that asks for the same service with usable answers."""
    defaults, chosen = shipped_with(answers), {}
    for name in rules(answers):
        raw, default = str(typed.get(name, "")), defaults.get(name)
        derived = re.sub(REFERENCE, lambda reference: str(answers.get(reference[1])), raw)
        usual = default[0] if isinstance(default, list) else default
        if answers.get(name) not in (None, usual) and (raw == derived or answers[name] != derived):
            chosen[name] = str(answers[name])
    for problem in unusable(answers, typed):
        chosen.update({name: value for name, value in problem.instead.items() if name in chosen})
    words = ["cookiecutter", str(answers.get("_template", "TEMPLATE")), "--no-input"]
    words += [f"{name}={value}" for name, value in {**chosen, **instead}.items()]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def shipped_with(answers: dict[str, Any]) -> dict[str, Any]:
    """Gives cookiecutter.json; nothing where it is out of reach, as with cruft and relative paths."""
    file = Path(str(answers.get("_repo_dir", "")), "cookiecutter.json")
    questions: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return questions


def refuse(problems: list[Problem], answers: dict[str, Any], typed: dict[str, Any]) -> None:
    """Ends with the first problem in one line, and a command to paste."""
    if problems:
        print(f"{problems[0].what} cannot be used: {problems[0].advice}.", file=sys.stderr)
        print(f"Try: {corrected_command(answers, typed, problems[0].instead)}", file=sys.stderr)
        sys.exit(1)


def keep(answers: dict[str, Any]) -> None:
    """Copies aside the files that are there and that rendering would write.

    Cookiecutter overwrites some of them, and overlays do, also with --skip-if-file-exists: then the hook
    after rendering brings them back.
    """
    overlays = Path("_overlays")
    shutil.rmtree(overlays, ignore_errors=True)
    base = Path(str(answers.get("_repo_dir", "")), "{{cookiecutter.service_name}}")
    if not any(Path().iterdir()) or not base.is_dir():
        return
    layers = [base, *(base / overlays).glob("*_*"), *(base / overlays / "capabilities").glob("*")]
    for layer in layers:
        for path in layer.rglob("*"):
            file = path.relative_to(layer)
            if file.is_file() and file.parts[0] not in ("_overlays", ".venv", ".git"):
                (overlays / "kept" / file.parent).mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, overlays / "kept" / file)
    if overlays.is_dir():
        (overlays / "kept.txt").write_text("kept\n", encoding="utf-8", newline="\n")


def main() -> None:
    """Checks the answers that cookiecutter has, however they came: typed, configured, replayed."""
    answers, typed = json.loads(ANSWERS), json.loads(TYPED)
    if answers["service_name"] == SWAPPED and not re.fullmatch(SLUG, answers["__answered_service_name"]):
        answers["service_name"] = answers["__answered_service_name"]
    shipped = shipped_with(answers)
    problems = list(altered(answers, shipped))
    answers.update({name: value for name, value in shipped.items() if name.startswith("_")})
    known = list(rules(answers))
    given = typed | typed_answers(command_line())
    problems += [*unknown_names(given, known), *unusable(answers, typed)]
    refuse(problems, answers, typed)
    keep(answers)


if __name__ == "__main__":
    main()
# {% endraw %}
