"""Bring your own model: imported into a rendered service, served, and equal to the original row by row."""

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from scripts.demo import free_port
from scripts.render import ROOT
from tests.conftest import ENVIRONMENT, Render, commit, run

pytestmark = pytest.mark.models

BIN = Path(".venv", "Scripts" if os.name == "nt" else "bin")
PATIENCE_SECONDS = 120
# Each kind of model with what is special about it; tests/models.py fits them.
KINDS = [
    "logistic", "boosting", "histogram", "pipeline", "line", "wide", "lightgbm", "lightgbm_regressor",
    "xgboost", "onnx",
]  # fmt: skip

# The tests of the machinery that another contract can break; `make prove` has all.
OF_THE_CONTRACT = [f"tests/service/{one}" for one in ("contract", "golden", "integration/test_http.py")]
OF_THE_MODEL = ["tests/service/unit", "tests/service/integration/test_load_gate.py"]
PROVED = {
    "economical": [*OF_THE_CONTRACT, *OF_THE_MODEL],
    "beyond": [*OF_THE_CONTRACT, *OF_THE_MODEL],
    "forest": OF_THE_CONTRACT,
}


TORCH_KINDS = ["torch_module", "torch_regressor", "torch_program"]
# One worker installs it.
with_torch = pytest.mark.xdist_group("torch")


@pytest.fixture(scope="module")
def base(render: Render) -> Path:
    """A default render under git, with its development environment and what models are fitted with."""
    folder = render().folder
    setup = run("make", "setup", cwd=folder)
    assert setup.returncode == 0, setup.stdout
    install(folder, "models.txt")
    commit(folder, "As rendered")
    return folder


def install(project: Path, lock: str, *more: str | Path) -> None:
    """What a file of the template's requirements/ locks, for a render's Python."""
    python, uv = project / BIN / "python", shutil.which("uv")
    pip: list[str | Path] = (
        [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install", "--no-compile"]
    )
    locked = ROOT / "requirements" / lock
    installed = run(*pip, "--require-hashes", *more, "--requirement", locked, cwd=project)
    assert installed.returncode == 0, installed.stdout


@pytest.fixture(scope="module")
def fitted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model with its data and answers, as a user would have them lying about."""
    folder = tmp_path_factory.mktemp("fitted")
    made = run(base / BIN / "python", "-W", "ignore", ROOT / "tests" / "models.py", folder, cwd=folder)
    assert made.returncode == 0, made.stdout
    return folder


@pytest.fixture(scope="module")
def torch(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with torch in it, for PYTHONPATH: 4 GB, of which Linux needs most for the import alone."""
    folder = tmp_path_factory.mktemp("torch")
    install(base, "torch.txt", "--no-deps", "--target", folder)
    return folder


@pytest.fixture(scope="module")
def torch_fitted(base: Path, torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The torch modules with their data and answers."""
    folder = tmp_path_factory.mktemp("torch_fitted")
    command: list[str | Path] = [base / BIN / "python", "-W", "ignore", ROOT / "tests" / "models.py", folder]
    made = run(*command, *TORCH_KINDS, "torch_bad", cwd=folder, PYTHONPATH=str(torch))
    assert made.returncode == 0, made.stdout
    return folder


@pytest.fixture
def project(base: Path, tmp_path: Path) -> Path:
    """A copy of the render with its history; the environment is shared."""
    folder = tmp_path / base.name
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(".venv", "__pycache__", ".*_cache"))
    (folder / ".venv").symlink_to(base / ".venv")
    return folder


def data_of(folder: Path) -> Path:
    """The training data beside a model."""
    (path,) = folder.glob("train.*")
    return path


def bring(
    project: Path, model: Path, data: Path, target: str, *more: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python -m lifecycle import-model`; the output has both streams."""
    given: list[str | Path] = ["--model", model, "--data", data, "--target", target, *more]
    return run(project / BIN / "python", "-m", "lifecycle", "import-model", *given, cwd=project, **variables)


def bring_case(project: Path, case: Path, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The import of what `tests/models.py` left in a folder."""
    (model,) = case.glob("model.*")
    return bring(project, model, data_of(case), expected(case)["target"], *more, **variables)


def expected(case: Path) -> Any:
    """What the original estimator answers."""
    return json.loads((case / "expected.json").read_text("utf-8"))


def status(project: Path) -> list[str]:
    """Files that git finds changed or new, but for the link to the shared environment."""
    said = run("git", "-c", "core.quotepath=off", "status", "--short", "-uall", cwd=project).stdout
    return [line for line in said.splitlines() if not line.endswith(" .venv")]


@contextmanager
def serving(project: Path, *command: str | Path, **variables: str) -> Iterator[str]:
    """The service, with one worker, at an address, once it is ready."""
    port = free_port()
    own = {"APP_HOST": "127.0.0.1", "APP_PORT": str(port), "APP_WORKERS": "1", **variables}
    command = command or (project / BIN / "gunicorn", "--config", "gunicorn.conf.py", "app.main:create_app()")
    log = project / "build" / "service.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=project,
            env={**ENVIRONMENT, **own},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not ready(address):
            assert process.poll() is None, log.read_text("utf-8")
            assert time.monotonic() < give_up, log.read_text("utf-8")
            time.sleep(0.05)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # make does not hand a signal on
        process.wait(PATIENCE_SECONDS)


def ready(address: str) -> bool:
    """Whether /ready gives 200."""
    try:
        with urllib.request.urlopen(f"{address}/ready", timeout=5):
            return True
    except OSError:
        return False


def post(address: str, body: Any) -> Any:
    """The parsed answer."""
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def assert_as_original(answers: list[Any], wanted: Any, tolerance: float) -> None:
    """Every answer is the original's: the label and its type, every probability or the value."""
    assert len(answers) == len(wanted["rows"])
    for index, answer in enumerate(answers):
        if "values" in wanted:
            assert answer["value"] == pytest.approx(wanted["values"][index], abs=tolerance), index
            continue
        label = wanted["predicted"][index]
        assert (answer["label"], type(answer["label"])) == (label, type(label)), index
        keys = [one if isinstance(one, str) else json.dumps(one) for one in wanted["labels"]]
        probabilities = dict(zip(keys, wanted["probabilities"][index], strict=True))
        assert answer["probabilities"] == pytest.approx(probabilities, abs=tolerance), index


def assert_served(project: Path, case: Path, version: str = "v2") -> None:
    """The served model answers over HTTP, in batches and without a server as the original does."""
    wanted = expected(case)
    golden = (project / "artifacts" / version / "golden.jsonl").read_text("utf-8").splitlines()
    tolerance = json.loads(golden[0])["tolerance"]
    with serving(project) as address:
        singles = [post(f"{address}/v1/predict", row) for row in wanted["rows"]]
        batch = post(f"{address}/v1/predict/batch", {"instances": wanted["rows"]})
    assert batch["model_version"] == version
    assert_as_original(singles, wanted, tolerance)
    assert_as_original(batch["predictions"], wanted, tolerance)
    (project / "build" / "rows.json").write_text(json.dumps({"instances": wanted["rows"]}), "utf-8")
    offline = subprocess.run(
        [project / BIN / "python", "-m", "app", "predict", "build/rows.json"],
        cwd=project, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert_as_original(list(map(json.loads, offline.stdout.splitlines())), wanted, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_imported_model_answers_as_the_original(project: Path, fitted: Path, kind: str) -> None:
    """Imported in one command, it answers single, in batches and offline as the original, row by row."""
    ended = bring_case(project, fitted / kind)
    assert ended.returncode == 0, ended.stdout
    assert_served(project, fitted / kind)


@with_torch
@pytest.mark.parametrize("kind", TORCH_KINDS)
def test_torch_module_answers_as_the_original(
    project: Path, torch: Path, torch_fitted: Path, kind: str
) -> None:
    """What torch.save and torch.export.save write is imported, and served without torch."""
    case = torch_fitted / kind
    path = os.pathsep.join(map(str, (torch, case)))
    ended = bring_case(project, case, PYTHONPATH=path)
    assert ended.returncode == 0, ended.stdout
    assert_served(project, case)
    again = bring_case(project, case, "--check", PYTHONPATH=path)
    assert again.returncode == 0, again.stdout


@with_torch
@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ("weights.pt", "complete.csv", "holds weights, and not the module"),
        ("module.pt", "with text.csv", "column 'Name' holds text"),
        ("module.pt", "missing.csv", "column 'Horsepower' has missing values"),
        ("wide.pt", "complete.csv", "the data's 5 columns"),
        ("rows together.pt", "complete.csv", "away from the original"),
    ],
)
def test_torch_module_that_cannot_be_served_is_refused_in_one_line(
    project: Path, torch: Path, torch_fitted: Path, model: str, data: str, said: str
) -> None:
    """Weights alone, text, missing values it has no answer to, other columns, answers that hang together."""
    bad = torch_fitted / "torch_bad"
    ended = bring(project, bad / model, bad / data, "Miles_per_Gallon", PYTHONPATH=str(torch))
    assert ended.returncode == 1, ended.stdout
    assert said in ended.stdout.splitlines()[-1]
    assert not status(project)


@pytest.mark.parametrize("shape", PROVED)
def test_nothing_else_needs_editing(project: Path, fitted: Path, shape: str) -> None:
    """After an import the service's own checks, tests and gates pass, whatever the shape of the contract.

    Booleans with nulls, closed text and odd names; a regressor below zero; three whole numbers as labels.
    """
    case = fitted / shape
    (held,) = case.glob("holdout.*")
    ended = bring_case(project, case, "--holdout", str(held))
    assert ended.returncode == 0, ended.stdout
    commit(project, "A model of our own")
    assert_served(project, case)
    for program, *words in (
        ("ruff", "format", "--check"),
        ("ruff", "check"),
        ("mypy",),
        ("python", "-m", "pytest", "--quiet"),
        ("python", "-m", "lifecycle", "evaluate", "v2"),
    ):
        ended = run(project / BIN / program, *words, cwd=project)
        assert ended.returncode == 0, ended.stdout
    tests: list[str | Path] = [project / BIN / "python", "-m", "pytest", "--quiet", *PROVED[shape]]
    proved = run(*tests, "-p", "no:cacheprovider", cwd=ROOT, PROVE_SERVICE=str(project))
    assert proved.returncode == 0, proved.stdout[-20_000:]
    assert not [line for line in status(project) if not line.endswith("evaluation/v2.json")]


def test_model_without_onnx_form_is_served_by_scikit_learn(project: Path, fitted: Path) -> None:
    """Asked for as skops: the import says what the image lacks, and adds it if told to."""
    ended = bring_case(project, fitted / "histogram", "--runtime", "skops", "--add-requirements")
    assert ended.returncode == 0, ended.stdout
    assert "the image needs scikit-learn==" in ended.stdout
    assert "skops==" in (project / "requirements" / "runtime.in").read_text("utf-8")
    assert_served(project, fitted / "histogram")


def test_one_command_imports_and_serves(project: Path, fitted: Path) -> None:
    """`make run MODEL=... DATA=... TARGET=...` serves exactly the imported version."""
    case = fitted / "logistic"
    given = [f"MODEL={case / 'model.joblib'}", f"DATA={data_of(case)}", f"TARGET={expected(case)['target']}"]
    for stamp in ("dev", "runtime"):
        (project / ".venv" / f"{stamp}.stamp").touch()
    with serving(project, "make", "run", *given) as address:
        answer = post(f"{address}/v1/predict", expected(case)["rows"][0])
    assert (answer["model_version"], answer["label"]) == ("v2", "setosa")


def test_importing_again_changes_nothing(project: Path, fitted: Path) -> None:
    """The same inputs give the same bytes: `unchanged`, and --check agrees until a committed file differs."""
    case = fitted / "pipeline"
    assert bring_case(project, case).returncode == 0
    commit(project, "A model of our own")
    again = bring_case(project, case)
    assert again.returncode == 0, again.stdout
    assert again.stdout.splitlines()[-1].endswith("unchanged")
    assert not status(project)
    assert bring_case(project, case, "--check").returncode == 0
    (project / "docs" / "example.json").write_text("{}\n", "utf-8")
    checked = bring_case(project, case, "--check")
    assert checked.returncode == 1
    assert "docs/example.json" in checked.stdout.splitlines()[-1]
    assert status(project) == [" M docs/example.json"]


def test_words_that_a_person_adds_are_kept(project: Path, fitted: Path) -> None:
    """Titles and descriptions change no version, a unit makes the next one; all outlive a new contract."""
    case, predict = fitted / "logistic", project / "app" / "schemas" / "predict.py"
    assert bring_case(project, case).returncode == 0
    commit(project, "A model of our own")
    name = 'alias="Sepal Length"'
    words = f'{name}, title="Length", description="Of the sepal."'
    predict.write_text(predict.read_text("utf-8").replace(name, words), "utf-8")
    assert bring_case(project, case).returncode == 0
    assert status(project) == [" M app/schemas/predict.py", " M openapi.json"]
    assert bring_case(project, case, "--check").returncode == 0
    unit = f'{words}, json_schema_extra={{"unit": "cm"}}'
    predict.write_text(predict.read_text("utf-8").replace(words, unit), "utf-8")
    ended = bring_case(project, case)
    assert ended.returncode == 0, ended.stdout
    assert json.loads((project / "artifacts" / "release.json").read_bytes())["serving"] == "v3"
    assert bring_case(project, case, "--check").returncode == 0
    ended = bring_case(project, case, "--bounds", "Sepal Length=0:20")
    assert ended.returncode == 0, ended.stdout
    assert "kept as app/schemas/predict.py had them: 'Sepal Length'" in ended.stdout
    properties = json.loads((project / "openapi.json").read_bytes())["components"]["schemas"]["Features"]
    kept = properties["properties"]["Sepal Length"]
    assert [kept[one] for one in ("title", "description", "unit", "maximum")] == [
        "Length", "Of the sepal.", "cm", 20,
    ]  # fmt: skip


def test_same_contract_adds_a_version_beside_the_served_one(project: Path, fitted: Path) -> None:
    """A model for the contract that is served becomes the next version; what serves stays."""
    case = fitted / "lightgbm"
    assert bring_case(project, case).returncode == 0
    commit(project, "A model of our own")
    ended = bring(
        project, fitted / "histogram" / "model.joblib", data_of(case), "weather", "--runtime", "skops"
    )
    assert ended.returncode == 0, ended.stdout
    assert {line[3:].split("/")[1] for line in status(project)} == {"v3"}


@pytest.mark.parametrize(
    ("model", "data", "target", "said"),
    [
        ("good/model.joblib", "good/train.csv", "species", "has no column 'species'"),
        ("good/model.joblib", "a column less.csv", "espèce", "model and data columns differ"),
        ("good/model.joblib", "empty.csv", "espèce", "is empty"),
        ("good/model.joblib", "no rows.csv", "espèce", "has no rows"),
        ("good/model.joblib", "nothing in a column.csv", "espèce", "'Sepal Length' has no value in any row"),
        ("good/model.joblib", "twice.csv", "espèce", "2 columns are called 'Sepal Length'"),
        ("good/model.joblib", "nowhere.csv", "espèce", "there is no such file"),
        ("torn.joblib", "good/train.csv", "espèce", "cannot be read as a model"),
        ("text.pkl", "good/train.csv", "espèce", "cannot be read as a model"),
        ("dictionary.pkl", "good/train.csv", "espèce", "not an estimator"),
        ("scaler.joblib", "good/train.csv", "espèce", "not an estimator"),
        ("unfitted.joblib", "good/train.csv", "espèce", "is not fitted"),
        ("no scores.joblib", "good/train.csv", "espèce", "no `predict_proba`"),
        ("module.pt", "good/train.csv", "espèce", "install torch"),
        ("old.pkl", "good/train.csv", "espèce", "install scikit-learn==0.9.9"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    project: Path, fitted: Path, model: str, data: str, target: str, said: str
) -> None:
    """What no service can be made of is refused in one clear line, and nothing changes on disk."""
    ended = bring(project, fitted / "bad" / model, fitted / "bad" / data, target)
    assert ended.returncode == 1, ended.stdout
    *progress, line = ended.stdout.splitlines()
    assert said in line
    assert all(one.startswith("import-model: ") for one in (*progress, line)), ended.stdout
    assert not status(project)


def test_a_full_disk_leaves_everything_as_it_was(project: Path, fitted: Path) -> None:
    """When a file cannot be written, the import says so in a line, and the repository is as before."""
    case = fitted / "wide"
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from lifecycle.__main__ import commands; commands(sys.argv[1:])"
    )
    given: list[str | Path] = ["--model", case / "model.joblib", "--data", data_of(case), "--target", "digit"]
    ended = run(project / BIN / "python", "-c", program, "import-model", *given, cwd=project)
    assert ended.returncode == 1, ended.stdout
    assert "nothing was changed" in ended.stdout.splitlines()[-1]
    assert not status(project)


def reading(process: int, project: Path, data: Path) -> bool:
    """Whether it has the data open."""
    with suppress(OSError):  # a file that was closed meanwhile
        return any(path.readlink() == data for path in Path(f"/proc/{process}/fd").iterdir())
    return False


def converting(process: int, project: Path, data: Path) -> bool:
    """Whether the step that opens the model is at work."""
    return (project / ".import" / "conversion.json").is_file()


def writing(process: int, project: Path, data: Path) -> bool:
    """Whether files are being made, to be moved."""
    return (project / ".import" / "repository").is_dir()


@contextmanager
def importing(
    project: Path, case: Path, data: Path, until: Callable[[int, Path, Path], bool]
) -> Iterator[subprocess.Popen[str]]:
    """An import as a terminal would start it, once it has come so far."""
    given = ["--model", case / "model.joblib", "--data", data, "--target", expected(case)["target"]]
    process = subprocess.Popen(
        [project / BIN / "python", "-m", "lifecycle", "import-model", *given],
        cwd=project, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding="utf-8", start_new_session=True,
        # Where the tests themselves run in the background, it would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not until(process.pid, project, data):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < give_up
            time.sleep(0.001)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stage", [reading, converting, writing])
def test_ctrl_c_leaves_everything_as_it_was(
    project: Path, fitted: Path, stage: Callable[[int, Path, Path], bool]
) -> None:
    """Stopped while it reads, converts or writes, an import says so in a line and has changed nothing."""
    case, data = fitted / "logistic", project / "build" / "long.csv"
    header, *rows = data_of(case).read_text("utf-8").splitlines(keepends=True)
    data.parent.mkdir()
    data.write_text("".join([header, *rows * (4_000 if stage is reading else 1)]), "utf-8")
    with importing(project, case, data, stage) as process:
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=PATIENCE_SECONDS)[0].splitlines()
    assert (process.returncode, said[-1]) == (130, "import-model: stopped; nothing was changed")
    assert all(line.startswith("import-model: ") for line in said), said
    assert not status(project)
    assert not (project / ".import").exists()


def test_a_second_import_at_the_same_time_is_refused(project: Path, fitted: Path) -> None:
    """While one import is at work in a service, another says so in a line; the first comes to its end."""
    case = fitted / "wide"
    with importing(project, case, data_of(case), converting) as first:
        second = bring_case(project, fitted / "line")
        first.communicate(timeout=PATIENCE_SECONDS)
    assert (second.returncode, second.stdout) == (
        1, "import-model: another import is at work in this service; wait until it has ended\n",
    )  # fmt: skip
    assert first.returncode == 0
    assert (project / "artifacts" / "v2" / "model.onnx").is_file()
