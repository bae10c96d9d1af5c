"""What may be answered: hostile text is refused with what to type instead, or comes out as it was typed."""

import json
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import ENVIRONMENT, Bake, Render, contents

DESCRIPTIONS = {
    "quotes": """Says "yes" or 'no', or neither: \"\"\" ''' `""",
    "backslashes": r"Reads C:\new\table and ends in \\",
    "accents": "Prédit l'espèce d'une fleur, à coup sûr — Größe, 花, 🌸",
    "yaml": "yes: - [no, null] # 1.0 & *anchor !tag | > %",
    "toml": 'x" = 1 # [tool] \\u0041',
    "html": "<script>alert(1)</script> &amp; $HOME $(id) `id`",
    "number": "007",
    "200 characters": "ä" * 200,
}
REFUSED = {
    "path upwards": ({"service_name": "../evil"}, "service_name=evil"),
    "path downwards": ({"service_name": "a/b/c"}, "service_name=a-b-c"),
    "backslash path": ({"service_name": r"..\evil"}, "service_name=evil"),
    "absolute path": ({"service_name": "/evil/place"}, "service_name=evil-place"),
    "this folder": ({"service_name": "."}, "service_name=service"),
    "folder above": ({"service_name": ".."}, "service_name=service"),
    "empty name": ({"service_name": ""}, "service_name=service"),
    "two letters": ({"service_name": "ab"}, "service_name=ab-service"),
    "capitals and spaces": ({"service_name": "My Model"}, "service_name=my-model"),
    "accents in the name": ({"service_name": "Prédit_Espèce"}, "service_name=predit-espece"),
    "leading digit": ({"service_name": "3d-model"}, "service_name=d-model"),
    "newline in the name": ({"service_name": "iris\nclassifier"}, "service_name=iris-classifier"),
    "quotes in the name": ({"service_name": "iris'\"; rm -rf ."}, "service_name=iris-rm-rf"),
    "Windows device": ({"service_name": "con"}, "service_name=con-service"),
    "reserved image name": ({"service_name": "scratch"}, "service_name=scratch-service"),
    "200 characters": ({"service_name": "a" * 200}, "service_name=" + "a" * 40),
    "longer than any file name": ({"service_name": "a" * 5000}, "service_name=" + "a" * 40),
    "two lines": ({"description": "one\ntwo"}, "description=one two"),
    "control characters": ({"description": "red \x1b[31malert\x07"}, "description=red [31malert"),
    "201 characters": ({"description": "ä" * 201}, "description=" + "ä" * 200),
    "empty description": ({"description": ""}, "description=Predicts one thing from others."),
    "braces": ({"description": "{a: {b: 1}}"}, "description=a: b: 1"),
    "expression": ({"description": "{{ 7 * 7 }}"}, "description=7 * 7"),
    "statement": ({"description": "{% set x = 1 %}hello"}, "description=% set x = 1 %hello"),
    "expression in a choice": ({"slo": "{{ 'strict' }}"}, "slo=strict"),
    "quotes in the team": ({"owner_team": 'a" severity="page'}, "owner_team=a severity page"),
    "newline in the team": ({"owner_team": "a\nb"}, "owner_team=a b"),
    "61 characters": ({"owner_team": "a" * 61}, "owner_team=" + "a" * 60),
    "unknown level": ({"slo": "Strikt"}, "slo=strict"),
    "unknown CI": ({"ci": "githib"}, "ci=github"),
    "misspelt capability": (
        {"capabilities": "traceing objectstore"},
        "capabilities=tracing object-store",
    ),
    "comma between capabilities": (
        {"capabilities": "tracing,object-store"},
        "capabilities=tracing object-store",
    ),
    "capability and none": ({"capabilities": "none tracing"}, "capabilities=tracing"),
    "unknown capability": ({"capabilities": "mainframe"}, "capabilities=none"),
    "empty capabilities": ({"capabilities": ""}, "capabilities=none"),
    "capability as a path": ({"capabilities": "../slo_strict"}, "capabilities=none"),
    "clone address": (
        {"repo_url": "git@example.com:team/iris.git"},
        "repo_url=https://example.com/team/iris.git",
    ),
    "plain http": ({"repo_url": "http://example.com/iris/"}, "repo_url=https://example.com/iris"),
    "script address": (
        {"runbook_base_url": "javascript:alert(1)"},
        "runbook_base_url=https://git.example.com/my-service",
    ),
    "query in an address": (
        {"dashboard_base_url": "http://grafana.example.com/?orgId=1"},
        "dashboard_base_url=http://127.0.0.1:3000",
    ),
    "quote in an address": (
        {"repo_url": 'https://example.com/"x'},
        "repo_url=https://git.example.com/my-service",
    ),
}
if sys.platform == "linux":  # the only system that tells a hook what was typed
    REFUSED["mistyped question"] = ({"servicename": "churn-model"}, "service_name=churn-model")


@pytest.mark.parametrize("description", DESCRIPTIONS.values(), ids=DESCRIPTIONS.keys())
def test_description_comes_out_as_typed(bake: Bake, description: str) -> None:
    """Whatever one line of text describes the service, every rendered file parses and says exactly that."""
    folder = bake(description=description)
    check_that_all_files_parse(folder)
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["description"] == description
    assert description in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("team", ["yes", "007", "Équipe R&D/données", "@org/ml-team", "a" * 60])
def test_team_comes_out_as_typed(bake: Bake, team: str) -> None:
    """Whatever team owns the service, every file parses and the model card names exactly that team."""
    folder = bake(owner_team=team)
    check_that_all_files_parse(folder)
    assert f"| owner | {team} |" in (folder / "docs" / "model_card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["class", "import", "json", "test", "a1-b2", "abc", "a" * 40])
def test_name_is_only_a_name(bake: Bake, name: str) -> None:
    """A service may be called like a Python keyword or module, because its name never becomes Python code."""
    folder = bake(service_name=name)
    check_that_all_files_parse(folder)
    assert tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"] == name
    python = {file: content for file, content in contents(folder).items() if file.endswith(".py")}
    assert python == {file: content for file, content in contents(bake()).items() if file.endswith(".py")}


@pytest.mark.parametrize(
    "answer", ["tracing object-store", "object-store tracing tracing", " tracing  object-store "]
)
def test_order_and_repeats_of_capabilities_do_not_matter(bake: Bake, answer: str) -> None:
    """However the same capabilities are written down, every file of the render is the same."""
    assert contents(bake(capabilities=answer)) == contents(bake(capabilities="object-store tracing"))


@pytest.mark.parametrize(("answers", "correction"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_advice(
    render: Render, tmp_path: Path, answers: dict[str, str], correction: str
) -> None:
    """A bad answer ends with one clear line and a command that works when pasted, and leaves no trace."""
    into = tmp_path / "out"
    into.mkdir()
    before = sorted(tmp_path.rglob("*"))
    refusal = render(into=into, **answers)
    assert refusal.status != 0
    assert sorted(tmp_path.rglob("*")) == before

    complaint, command = refusal.said.splitlines()[:2]
    (name,) = answers
    assert complaint.startswith(name)
    assert " cannot be used: " in complaint
    assert len(complaint) < 250
    program, _template, *words = shlex.split(command.removeprefix("Try: "))
    assert program == "cookiecutter"
    assert words == ["--no-input", correction]
    accepted = render(into=into, **dict([correction.split("=", 1)]))
    assert accepted.status == 0, accepted.said


def test_refusal_repeats_the_other_answers(render: Render) -> None:
    """The command to paste keeps what was answered well and corrects everything else at once."""
    good = {"description": "Says 'no'", "owner_team": "growth", "ci": "none"}
    refusal = render(service_name="Churn!", slo="strickt", **good)
    _program, _template, _flag, *words = shlex.split(refusal.said.splitlines()[1].removeprefix("Try: "))
    assert dict(word.split("=", 1) for word in words) == {"service_name": "churn", "slo": "strict", **good}


@pytest.mark.parametrize("description", ["{{", "{% if %}", "{{ cookiecutter.nothing }}"])
def test_broken_template_text_leaves_nothing(render: Render, tmp_path: Path, description: str) -> None:
    """Text that cookiecutter itself cannot take as a template stops it before anything is written."""
    refusal = render(into=tmp_path, description=description)
    assert refusal.status != 0
    assert list(tmp_path.iterdir()) == []


def check_that_all_files_parse(folder: Path) -> None:
    """Reads every structured file of a render with the parser of its format."""
    for name, content in contents(folder).items():
        if name.endswith(".json"):
            json.loads(content)
        elif name.endswith(".toml"):
            tomllib.loads(content.decode("utf-8"))
        elif name.endswith((".yml", ".yaml")):
            list(yaml.safe_load_all(content))


def cookiecutter(
    template: Path, into: Path, *words: str, typed: str = "", config: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs cookiecutter with what a person types at its questions and has in a configuration file."""
    home = into.parent / f"{into.name}-home"
    home.mkdir(exist_ok=True)
    (home / "config.yaml").write_text(f"replay_dir: {home.as_posix()}\n{config}", "utf-8")
    command: list[str | Path] = [sys.executable, "-m", "cookiecutter", template, *words, "--output-dir", into]
    return subprocess.run(
        [*command, "--config-file", home / "config.yaml"],
        cwd=home,
        env=ENVIRONMENT | {"PYTHONIOENCODING": "utf-8"} | variables,
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="backslashreplace",
    )


@pytest.mark.parametrize(
    ("typed", "rendered"),
    [("strikt\n2\n\n", {"slo": "strict"}), ("\ngitlab\n2\n", {"ci": "none"})],
    ids=["slo", "ci"],
)
def test_choices_are_asked_as_choices(
    template: Path, bake: Bake, tmp_path: Path, typed: str, rendered: dict[str, str]
) -> None:
    """At the prompt a choice is a number; another answer is asked for again, at once and not at the end."""
    asked = cookiecutter(template, tmp_path / "out", typed=f"\n\n\n{typed}\n\n\n\n")
    assert asked.returncode == 0, asked.stdout
    assert "Please select one of the available options" in asked.stdout
    assert contents(tmp_path / "out" / "iris-classifier") == contents(bake(**rendered))


# What a configuration file says of the answers -> the correction.
CONFIGURED = {
    "a blank team": ("owner_team:", "owner_team=ml-platform"),
    "a blank name": ("service_name:", "service_name=service"),
    "a team that YAML reads as a number": ("owner_team: 007", "owner_team=7"),
    "a team that YAML reads as true": ("owner_team: yes", "owner_team=True"),
    "a list": ("description: [a, b]", "description=['a', 'b']"),
    "a choice that is none": ("slo: strickt", "slo=strict"),
    "a blank choice": ("ci:", "ci=github"),
}


@pytest.mark.parametrize(("line", "correction"), CONFIGURED.values(), ids=CONFIGURED)
def test_configured_answers_are_held_to_the_same_rules(
    template: Path, tmp_path: Path, line: str, correction: str
) -> None:
    """What the user's configuration leaves blank, or YAML reads as no text, is refused in one line."""
    refused = cookiecutter(template, tmp_path / "out", "--no-input", config=f"default_context:\n  {line}\n")
    assert refused.returncode != 0
    complaint, command = refused.stdout.splitlines()[:2]
    assert complaint.startswith(correction.partition("=")[0])
    assert " cannot be used: " in complaint
    assert shlex.split(command)[-1] == correction
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def replay_file(folder: Path, **changes: object) -> Path:
    """What cookiecutter wrote down of the render before, with changes; None takes a line out."""
    (written,) = (folder / "out-home").glob("*.json")
    document = json.loads(written.read_text("utf-8"))
    document["cookiecutter"].update(changes)
    document["cookiecutter"] = {
        name: value for name, value in document["cookiecutter"].items() if value is not None
    }
    edited = folder / "edited.json"
    edited.write_text(json.dumps(document), "utf-8")
    return edited


@pytest.fixture
def replayed(template: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`replayed(**changes)`: a render, and one more from the edited file that the first left."""
    first = cookiecutter(template, tmp_path / "out", "--no-input")
    assert first.returncode == 0, first.stdout

    def again(**changes: object) -> subprocess.CompletedProcess[str]:
        file = replay_file(tmp_path, **changes)
        return cookiecutter(template, tmp_path / "again", "--replay-file", str(file))

    return again


# Edits of a replay file -> what the refusal begins with.
EDITED: dict[str, tuple[dict[str, object], str]] = {
    "a name that leads out": ({"service_name": "../escaped"}, "service_name '../escaped'"),
    "an absolute name": ({"service_name": "/escaped"}, "service_name '/escaped'"),
    "a name of several folders": ({"service_name": "a/b"}, "service_name 'a/b'"),
    "a name that is refused": ({"service_name": "Churn!"}, "service_name 'Churn!'"),
    "a choice that is none": ({"slo": "../capabilities/tracing"}, "slo '../capabilities/tracing'"),
    "rules of its own": ({"slo": "mine", "_choices": {"slo": ["mine"], "ci": ["github"]}}, "slo 'mine'"),
    "template code": ({"description": "{{ 7 * 7 }}"}, "description '{{ 7 * 7 }}'"),
    "a blank": ({"owner_team": ""}, "owner_team ''"),
    "no text": ({"owner_team": 7}, "owner_team '7'"),
    "other files to copy": ({"_copy_without_render": []}, "_copy_without_render"),
    "a question that is none": ({"servicename": "churn"}, "servicename"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), EDITED.values(), ids=EDITED)
def test_a_replay_file_is_held_to_the_same_rules(
    replayed: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    changes: dict[str, object],
    said: str,
) -> None:
    """An edited replay file is validated as if it was typed, and nothing is written, least of all outside."""
    before = sorted(path for path in tmp_path.iterdir())
    refused = replayed(**changes)
    assert refused.returncode != 0
    assert said in refused.stdout.splitlines()[0]
    assert " cannot be used: " in refused.stdout.splitlines()[0]
    left = {path for path in tmp_path.iterdir() if path not in before} - {tmp_path / "edited.json"}
    assert {path.name for path in left} <= {"again", "again-home"}
    assert not [path for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert not Path("/escaped").exists()


def test_a_replay_file_with_usable_answers_is_followed(
    replayed: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, bake: Bake
) -> None:
    """An edited name, description and capability come out as if they were typed: nothing derived is stale."""
    answers = {
        "service_name": "churn-model",
        "description": 'Says "no" \\ yes',
        "capabilities": "tracing object-store",
        "slo": "strict",
    }
    addresses = {
        "repo_url": "https://git.example.com/iris-classifier",
        "runbook_base_url": "https://git.example.com/iris-classifier/blob/main/docs/runbooks",
    }
    again = replayed(**answers)
    assert again.returncode == 0, again.stdout
    assert contents(tmp_path / "again" / "churn-model") == contents(bake(**answers, **addresses))
