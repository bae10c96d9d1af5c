"""What a person does with a clone: run the demo, make a service with cruft, update it later."""

import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from scripts.render import SERVICE
from tests.conftest import Bake, commit, contents, run

pytestmark = pytest.mark.slow

CRUFT = Path(sys.executable).parent / "cruft"


def test_demo_from_an_empty_clone(repository: Path) -> None:
    """`make demo` in a fresh clone predicts over HTTP, refuses bad input, and ends without a terminal."""
    demo = run("make", "demo", cwd=repository)
    assert demo.returncode == 0, demo.stdout
    assert '"label": "setosa"' in demo.stdout
    assert '"model_version": "v1"' in demo.stdout
    assert re.search(r"petal_width\": NaN\}\n  400 \{", demo.stdout)
    assert re.search(r"\n  422 \{", demo.stdout)
    (docs,) = re.findall(r"http://127\.0\.0\.1:\d+/docs", demo.stdout)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(docs, timeout=5)

    # What just served was installed from requirements/runtime.txt alone.
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = repository / "build" / "iris-classifier" / ".venv" / scripts / "python"
    absent = run(python, "-c", "import sklearn", cwd=repository)
    assert "No module named 'sklearn'" in absent.stdout


def test_update_keeps_what_the_owners_changed(repository: Path, tmp_path: Path) -> None:
    """`cruft update` brings a change of the template into a service and keeps its owners' changes."""
    upstream = shutil.copytree(
        repository, tmp_path / "upstream", ignore=shutil.ignore_patterns(".venv", "build")
    )
    created = run(
        CRUFT,
        "create",
        str(upstream),
        "--no-input",
        "--extra-context",
        json.dumps({"ci": "none"}),
        cwd=tmp_path,
    )
    assert created.returncode == 0, created.stdout
    service = tmp_path / "iris-classifier"
    with (service / "app" / "main.py").open("a", encoding="utf-8") as module:
        module.write("# ours\n")
    commit(service, "Ours")

    for name in ("Makefile", "slo.toml", "app/schemas/predict.py"):
        file = upstream / SERVICE.name / name
        file.write_text("# theirs\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    # The example changes; what was made of a model of their own must not.
    example = ("openapi.json", "artifacts/v0/rules.json", "artifacts/v1/golden.jsonl", "docs/example.json")
    for name in example:
        file = upstream / SERVICE.name / name
        file.write_text(file.read_text(encoding="utf-8").replace("petal", "blossom"), encoding="utf-8")
    (upstream / SERVICE.name / "artifacts" / "v7").mkdir()
    (upstream / SERVICE.name / "artifacts" / "v7" / "golden.jsonl").write_text("{}\n", encoding="utf-8")
    commit(upstream, "Theirs")
    updated = run(CRUFT, "update", "--skip-apply-ask", cwd=service)
    assert updated.returncode == 0, updated.stdout
    assert (service / "Makefile").read_text(encoding="utf-8").startswith("# theirs\n")
    for name in ("slo.toml", "app/schemas/predict.py"):  # the owner's, as docs/files.md says
        assert not (service / name).read_text(encoding="utf-8").startswith("# theirs\n"), name
    assert not [name for name in example if "blossom" in (service / name).read_text(encoding="utf-8")]
    assert not (service / "artifacts" / "v7").exists()
    assert (service / "app" / "main.py").read_text(encoding="utf-8").endswith("# ours\n")
    assert not (service / ".github").exists()


def test_an_update_adds_and_removes_capabilities(repository: Path, bake: Bake, tmp_path: Path) -> None:
    """`cruft update` with another answer gives a render with it, also after the old question `deploy`."""
    created = run(CRUFT, "create", str(repository), "--no-input", cwd=tmp_path)
    assert created.returncode == 0, created.stdout
    service = tmp_path / "iris-classifier"
    state = json.loads((service / ".cruft.json").read_text(encoding="utf-8"))
    state["context"]["cookiecutter"]["deploy"] = "compose"  # an answer to a question that is gone
    (service / ".cruft.json").write_text(json.dumps(state), encoding="utf-8")
    commit(service, "As rendered")

    for answer in ("object-store tracing", "tracing", "none"):
        variables = json.dumps({"capabilities": answer})
        command = (CRUFT, "update", "--skip-apply-ask", "--variables-to-update", variables)
        updated = run(*command, cwd=service)
        assert updated.returncode == 0, updated.stdout
        files = contents(service)
        assert "deploy" not in json.loads(files.pop(".cruft.json"))["context"]["cookiecutter"]
        kept = {name: content for name, content in files.items() if not name.startswith(".git/")}
        assert kept == contents(bake(capabilities=answer))
        commit(service, answer)

    misspelt = (*command[:-1], json.dumps({"capabilities": "traceing"}))
    refused = run(*misspelt, cwd=service)
    assert refused.returncode != 0
    assert "capabilities=tracing" in refused.stdout
    assert contents(service).keys() - contents(bake()).keys() >= {".cruft.json"}


def test_cruft_renders_the_same(repository: Path, bake: Bake, tmp_path: Path) -> None:
    """Cruft renders what cookiecutter renders, byte for byte."""
    created = run(CRUFT, "create", str(repository), "--no-input", cwd=tmp_path)
    assert created.returncode == 0, created.stdout
    files = contents(tmp_path / "iris-classifier")
    del files[".cruft.json"]
    assert files == contents(bake())
