"""Refuses answers that cannot be used, before any file is written.

answers as JSON -> the first problem -> one line that says what to type instead, a command to paste, exit 1
"""

import difflib
import json
import os
import re
import shlex
import subprocess
import sys
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


def unknown_names(known: list[str]) -> Iterator[Problem]:
    """Yields the `name=value` words of the command line that are no question.

    Cookiecutter drops them without a word, and the wrong service comes out. Only Linux tells a hook the
    command that started it; elsewhere nothing is found.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return
    programs = [Path(word).name for word in words]
    arguments = words[programs.index("cookiecutter") + 1 :] if "cookiecutter" in programs else []
    for name, equals, value in (word.partition("=") for word in arguments):
        if equals and name.isidentifier() and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            yield Problem(name, f"the questions are {', '.join(known)}", dict.fromkeys(near, value))


def unusable(answers: dict[str, Any], typed: dict[str, Any]) -> Iterator[Problem]:
    """Yields the answers that break their rule."""
    for name, rule in rules(answers).items():
        answer, raw = str(answers[name]), str(typed.get(name, ""))
        if re.search(TEMPLATE_TEXT, re.sub(REFERENCE, "", raw)):
            answer, advice = raw, "write it without curly braces, which would run as template code"
        elif not re.fullmatch(rule.pattern, answer) or not answer.isprintable():
            advice = rule.advice
        else:
            continue
        shown = answer if len(answer) < 60 else f"{answer[:57]}..."
        yield Problem(f"{name} {shown!r}", advice, {name: rule.correct(answer)})


def corrected_command(answers: dict[str, Any], typed: dict[str, Any], instead: dict[str, str]) -> str:
    """Gives the command that asks for the same service with usable answers."""
    # The defaults are out of reach when the template was named by a relative path: then all are repeated.
    shipped = Path(answers.get("_repo_dir", ""), "cookiecutter.json")
    defaults = json.loads(shipped.read_text(encoding="utf-8")) if shipped.is_file() else {}
    chosen = {}
    for name in rules(answers):
        raw = str(typed.get(name, ""))
        derived = re.sub(REFERENCE, lambda reference: str(answers[reference[1]]), raw)
        if answers[name] != defaults.get(name) and (raw == derived or answers[name] != derived):
            chosen[name] = str(answers[name])
    for problem in unusable(answers, typed):
        chosen.update({name: value for name, value in problem.instead.items() if name in chosen})
    words = ["cookiecutter", str(answers.get("_template", "TEMPLATE")), "--no-input"]
    words += [f"{name}={value}" for name, value in {**chosen, **instead}.items()]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def main() -> int:
    """Says what is wrong with the first unusable answer, if there is one."""
    answers, typed = json.loads(ANSWERS), json.loads(TYPED)
    # cookiecutter.json swaps a name that could not be a folder for one that can, until this has refused it.
    answers["service_name"] = answers["__answered_service_name"]
    found = [*unknown_names(list(rules(answers))), *unusable(answers, typed)]
    if found:
        print(f"{found[0].what} cannot be used: {found[0].advice}.", file=sys.stderr)
        print(f"Try: {corrected_command(answers, typed, found[0].instead)}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
# {% endraw %}
