"""What a render consists of: exact file lists for every choice, byte for byte where bytes matter."""

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.render import ROOT, SERVICE
from tests.conftest import ENVIRONMENT, Bake, Render, commit, contents, cookiecutter, run

QUESTIONS = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))
CHOICES = {option: list(choices) for option, choices in QUESTIONS["_choices"].items()}
OTHER_CHOICES = [(option, choice) for option, choices in CHOICES.items() for choice in choices[1:]]
CAPABILITIES: list[str] = QUESTIONS["_capabilities"]
RENDERED = "pyproject.toml"  # names the capabilities
ADDED = SERVICE / "_overlays" / "capabilities"
LISTS = Path(__file__).parent / "files"


def committed_list(config: pytest.Config, name: str, lines: list[str]) -> list[str]:
    """Gives the committed list, after writing `lines` there when asked to (`make files`)."""
    file = LISTS / f"{name}.txt"
    if config.getoption("--refresh-files"):
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return file.read_text(encoding="utf-8").splitlines()


def test_default_files(bake: Bake, pytestconfig: pytest.Config) -> None:
    """A default render has exactly the files of tests/files/default.txt."""
    files = sorted(contents(bake()))
    assert files == committed_list(pytestconfig, "default", files)


@pytest.mark.parametrize(("option", "choice"), OTHER_CHOICES)
def test_choice_changes_exactly_its_files(
    bake: Bake, pytestconfig: pytest.Config, option: str, choice: str
) -> None:
    """Another choice adds (+), replaces (~) and leaves out (-) exactly the files of its list."""
    changes = changed(contents(bake()), contents(bake(**{option: choice})))
    assert changes == committed_list(pytestconfig, f"{option}_{choice}", changes)


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """Each file that was added (+), replaced (~) or left out (-), by name."""
    return [
        f"{'+' if name not in before else '-' if name not in after else '~'} {name}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_capability_only_adds_files(bake: Bake, pytestconfig: pytest.Config, name: str) -> None:
    """A capability adds exactly the files of its list; the base stays, but for the line naming it."""
    changes = changed(contents(bake()), contents(bake(capabilities=name)))
    assert [line for line in changes if not line.startswith("+ ")] == [f"~ {RENDERED}"]
    assert changes == committed_list(pytestconfig, f"capabilities_{name}", changes)


def test_capabilities_combine_without_a_matrix_of_cases(bake: Bake) -> None:
    """All capabilities together are the files of each, byte for byte: no two touch the same file."""
    together = contents(bake(capabilities=" ".join(CAPABILITIES)))
    each = [contents(bake(capabilities=name)) for name in CAPABILITIES]
    added = [files.keys() - contents(bake()).keys() for files in each]
    assert sum(map(len, added)) == len(set().union(*added))
    expected = {name: content for files in each for name, content in files.items() if name != RENDERED}
    assert {name: content for name, content in together.items() if name != RENDERED} == expected


def test_capabilities_never_touch_the_same_file() -> None:
    """No file of a capability has the path of a file of the base, of an option or of another capability."""
    folders = [folder for folder in (SERVICE / "_overlays").iterdir() if folder != ADDED]
    taken = {
        path.relative_to(folder)
        for folder in (SERVICE, *folders)
        for path in folder.rglob("*")
        if path.is_file() and not {".venv", "_overlays"} & set(path.relative_to(folder).parts)
    }
    for folder in ADDED.iterdir():
        own = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        own = {path for path in own if "__pycache__" not in path.parts}
        assert not own & taken, folder.name
        taken |= own


def test_the_base_knows_the_variables_of_each_capability() -> None:
    """`VARIABLES` in app/settings.py names exactly what the capabilities' settings.py declare."""
    base = (SERVICE / "app" / "settings.py").read_text(encoding="utf-8")
    (table,) = re.findall(r"^VARIABLES = (\{.*?^\})", base, re.MULTILINE | re.DOTALL)
    declared = {}
    for name in CAPABILITIES:
        module = (ADDED / name / "app" / name.replace("-", "_") / "settings.py").read_text(encoding="utf-8")
        fields = re.findall(r"^    ([a-z_]+): (?!ClassVar)", module, re.MULTILINE)
        declared[name] = tuple(f"APP_{field.upper()}" for field in fields)
    assert ast.literal_eval(table) == declared


def test_overlays_are_choices() -> None:
    """Every overlay belongs to a choice, and every choice but the defaults has its file list."""
    overlays = {folder.name for folder in (SERVICE / "_overlays").iterdir()} - {"capabilities", "kept.txt"}
    assert overlays <= {f"{option}_{choice}" for option, choices in CHOICES.items() for choice in choices}
    assert sorted(folder.name for folder in (SERVICE / "_overlays/capabilities").iterdir()) == CAPABILITIES
    lists = {"default", *(f"{option}_{choice}" for option, choice in OTHER_CHOICES)}
    lists |= {f"capabilities_{name}" for name in CAPABILITIES}
    assert {file.stem for file in LISTS.iterdir()} == lists


def test_questions_have_words() -> None:
    """Every question and choice has a prompt in plain words, and the menu is the list that is checked."""
    questions = {name for name in QUESTIONS if not name.startswith("_")}
    assert set(QUESTIONS["__prompts__"]) == questions
    for option, choices in CHOICES.items():
        assert QUESTIONS[option] == choices
        assert list(QUESTIONS["__prompts__"][option]) == ["__prompt__", *choices]


def test_all_choices_together(bake: Bake) -> None:
    """Choices of different options do not disturb each other."""
    both = contents(bake(slo="strict", ci="none"))
    promises = ("slo.toml", "ops/prometheus/slo_rules.yml")
    strict = contents(bake(slo="strict"))
    assert both == {**contents(bake(ci="none")), **{name: strict[name] for name in promises}}


def test_nothing_of_the_template_is_left(bake: Bake) -> None:
    """No template text is left; double braces stand only where other tools want them."""
    for name, content in contents(bake()).items():
        if b"\0" in content:
            continue
        text = content.decode("utf-8")
        assert "cookiecutter." not in text, name
        assert "{%" not in text, name
        # GitHub's expressions, Prometheus' labels, Grafana's legends and Python's f-strings have them too.
        assert "{{" not in text or name.startswith((".github/", "ops/")) or name.endswith(".py"), name
        assert "\r" not in text, name


def test_checksummed_files_are_copied(bake: Bake, template: Path) -> None:
    """Artifacts, dashboards and Python files come out byte for byte as they stand in the template."""
    copied = ("artifacts/", "ops/grafana/dashboards/")
    originals = {
        name: content
        for name, content in contents(template / SERVICE.name).items()
        if name.startswith(copied) or (name.endswith(".py") and not name.startswith("_overlays/"))
    }
    assert len(originals) > 10
    rendered = contents(bake())
    assert {name: rendered[name] for name in originals} == originals


def test_same_answers_same_bytes(bake: Bake, render: Render) -> None:
    """Rendering twice gives the same bytes, so an update shows only what the template changed."""
    again = render()
    assert contents(again.folder) == contents(bake())


def test_rendering_over_an_earlier_render(bake: Bake, render: Render) -> None:
    """Rendering over a service replaces the template's files and keeps the ones its owners added."""
    folder = render(slo="strict").folder
    model = folder / "artifacts" / "v2" / "model.onnx"
    model.parent.mkdir()
    model.write_bytes(b"trained at home")
    again = render("--overwrite-if-exists", into=folder.parent)
    assert again.status == 0, again.said
    assert contents(folder) == {**contents(bake()), "artifacts/v2/model.onnx": b"trained at home"}


@pytest.mark.parametrize(
    "file", ["slo.toml", "app/schemas/predict.py", "artifacts/v0/rules.json", "README.md"]
)
def test_skipping_existing_files_keeps_them(render: Render, file: str) -> None:
    """With --skip-if-file-exists nothing that is there changes, neither by overlays nor by copied files."""
    folder = render(slo="strict").folder
    (folder / file).write_text("ours\n", "utf-8")
    (folder / "Makefile").unlink()
    before = contents(folder)
    again = render("-f", "-s", into=folder.parent, slo="strict")
    assert again.status == 0, again.said
    assert contents(folder).items() - before.items() == {("Makefile", contents(folder)["Makefile"])}


def test_next_commands(render: Render) -> None:
    """A render ends with the next three commands to type."""
    rendering = render(service_name="churn-model")
    commands = [line.strip() for line in rendering.said.splitlines() if line.startswith("  ")]
    assert commands == [f"cd {rendering.folder}", "make run", "make test"]


@pytest.mark.parametrize("folder", ["Мои модели", "o'hara & sons; $HOME", "plain"])
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_printing_never_fails_a_render(template: Path, tmp_path: Path, folder: str, encoding: str) -> None:
    """Whatever the terminal can show, the render stays; the folder is quoted, so that `cd` can be pasted."""
    into = tmp_path / folder
    into.mkdir()
    ended = subprocess.run(
        cookiecutter(template, into, tmp_path),
        env=ENVIRONMENT | {"PYTHONIOENCODING": f"{encoding}:strict"},
        capture_output=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert (into / "iris-classifier" / "Makefile").is_file()
    (line,) = [line for line in ended.stdout.decode(encoding).splitlines() if line.startswith("  cd ")]
    if encoding == "utf-8" or folder.isascii():
        assert shlex.split(line) == ["cd", str(into / "iris-classifier")]


@pytest.mark.parametrize("output", ["closed", "full"])
def test_a_terminal_that_takes_nothing_does_not_fail_a_render(
    template: Path, tmp_path: Path, output: str
) -> None:
    """With standard output closed, or on a full disk, the render stays."""
    command = cookiecutter(template, tmp_path, tmp_path)
    redirect = ">&-" if output == "closed" else ">/dev/full"
    ended = subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *command], env=ENVIRONMENT, capture_output=True
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "iris-classifier" / "Makefile").is_file()


def test_a_module_in_the_folder_for_temporary_files_is_not_run(template: Path, tmp_path: Path) -> None:
    """Hooks run from the folder for temporary files; somebody's types.py there changes nothing."""
    for name in ("types", "json", "shutil"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run by a hook')\n", "utf-8")
    ended = subprocess.run(
        cookiecutter(template, tmp_path / "out", tmp_path, "-P"),
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path)},
        capture_output=True,
    )
    assert ended.returncode == 0, ended.stderr


def test_mounted_files_can_be_read_by_containers(template: Path, tmp_path: Path) -> None:
    """Whatever the umask of clone and render, what Compose mounts can be read by other users."""
    clone = shutil.copytree(template, tmp_path / "clone")
    for path in clone.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    ended = subprocess.run(
        cookiecutter(clone, tmp_path / "out", tmp_path),
        env=ENVIRONMENT,
        capture_output=True,
        umask=0o077,
    )
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "out" / "iris-classifier"
    mounted = [folder / "ops", *(folder / "ops").rglob("*")]
    assert {oct(path.stat().st_mode & 0o077) for path in mounted} == {oct(0o055), oct(0o044)}


@pytest.mark.parametrize("ignored", ["*.onnx\n*.csv\n*.json\n*.jsonl\n", "artifacts/\nevaluation/\n"])
def test_a_gitignore_above_leaves_nothing_out(bake: Bake, tmp_path: Path, ignored: str) -> None:
    """In a repository that ignores models and data, the model, its contract and its data are committed."""
    (tmp_path / ".gitignore").write_text(ignored, "utf-8")
    shutil.copytree(bake(), tmp_path / "iris-classifier")
    commit(tmp_path, "As rendered")
    tracked = run("git", "ls-files", cwd=tmp_path / "iris-classifier").stdout.splitlines()
    needed = [
        name for name in contents(bake()) if name.startswith(("artifacts/", "evaluation/", "app/", "ops/"))
    ]
    assert [name for name in [*needed, "openapi.json", "docs/example.json"] if name not in tracked] == []
