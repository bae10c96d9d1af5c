"""From a fitted model and its training data to a served version, or to one line that says why not.

    data -> types, ranges, categories of all rows -> a sample        (lifecycle/tables.py)
    model, sample -> ONNX or skops, the same answers as the original (lifecycle/convert.py, another process)
    columns -> app/schemas/predict.py                                (lifecycle/contract_writer.py)
    all of it -> artifacts/vN, v0, openapi.json, docs                (lifecycle/assemble.py, another process)
    -> moved into the repository as a whole, or not at all

Whatever is written is written into `.import` first, beside what it is to replace.

Nothing here reads the clock or the machine: the same inputs give the same bytes.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import typer

from app.core.errors import ArtifactError
from app.core.manifest import Manifest
from app.core.store import MANIFEST, RELEASE, read_manifest, read_release
from app.schemas.contract import contract_inputs, contract_outputs, served_contract_sha256
from app.schemas.predict import Features
from lifecycle import package
from lifecycle.importing.contract_writer import Feature, source
from lifecycle.importing.convert import REQUEST, RESULT, SAMPLE
from lifecycle.tables import Column, Refusal, Table, fingerprint, profile, read_sample, sample

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS, PREDICT = Path("artifacts"), Path("app/schemas/predict.py")
DOCUMENTS = (
    "openapi.json", "README.md", "docs/contract.md", "docs/model_card.md", "docs/example.json",
    "evaluation/thresholds.toml",
)  # fmt: skip
HOLDOUT = "evaluation/holdout"
REVIEW_THRESHOLD = 0.6
WORK, JOURNAL = ".import", "journal.json"
MAX_CATEGORIES, ROWS_A_CATEGORY = 50, 2
MANY_ROWS = 20  # in fewer, all values of a column differ by chance
LABEL_LIKE = re.compile(r"(?i)^(y|label|class|target|outcome|ground_?truth|prediction|y_.*)$")
PERSONAL = re.compile(
    r"(?i)(^|[^a-z])(e-?mail|(first|last|full|sur)_?name|name|phone|mobile|ssn|social_?security|passport|iban"
    r"|birth(day|date)?|dob|street|address|postcode|zip|ip(_?address)?|nationality|religion|ethnicity|race"
    r"|gender|sex)($|[^a-z])"
)
PERSONAL_TEXT = r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}|\+?[0-9][0-9 ()/-]{8,}[0-9]"


@dataclass(frozen=True)
class Wish:
    """What was asked for on the command line."""

    model: Path
    data: Path
    target: str
    runtime: str
    trust: list[str]
    trust_all: bool
    bounds: dict[str, tuple[float | None, float | None]]
    review_threshold: float | None
    feedback_tolerance: float | None
    holdout: Path | None


def import_model(
    model: Annotated[
        Path, typer.Option(help="A fitted estimator from joblib or pickle, a torch module, or an ONNX file.")
    ],
    data: Annotated[Path, typer.Option(help="Its training data: .csv, .parquet, .jsonl or .arrow.")],
    target: Annotated[str, typer.Option(help="The column that the model predicts.")],
    runtime: Annotated[
        str, typer.Option(help="`onnx`, or `skops`: scikit-learn itself, for what has no ONNX form.")
    ] = "onnx",
    trust: Annotated[
        str, typer.Option(help="Types of your own that skops may load, by full name, with commas.")
    ] = "",
    trust_listed: Annotated[
        bool, typer.Option("--trust-listed", help="Trust every type that the model is made of.")
    ] = False,
    bounds: Annotated[
        list[str] | None,
        typer.Option(help="Refuse values beyond these: --bounds 'age=0:120'. May be repeated."),
    ] = None,
    review_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Below this score, `action` is `review` (0.6).")
    ] = None,
    feedback_tolerance: Annotated[
        float | None, typer.Option(min=0, help="A value so close to the truth counts as correct.")
    ] = None,
    holdout: Annotated[
        Path | None,
        typer.Option(help="Rows with their truth that training never saw, for `make evaluate`."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the repository differs.")
    ] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Then serve exactly this version.")] = False,
) -> None:
    """Bring your own model: from MODEL, its training DATA and the TARGET column to a served version.

    The contract (names, types, missing values, categories, ranges) is inferred from all rows. The model is
    converted to ONNX and has to give the answers of the original on the data. Then the next version folder
    is written, with a golden set and a drift baseline, and the API description and documents follow.

    If the inputs or labels are new, app/schemas/predict.py is rewritten, v0 becomes a stub, and the version
    is released; otherwise `make promote` releases it. The same inputs give the same bytes, and any failure
    leaves the repository as it was.
    """
    try:
        wish = Wish(
            model, data, target, one_of(runtime), [one for one in trust.split(",") if one], trust_listed,
            parsed_bounds(bounds or []), review_threshold, feedback_tolerance, holdout,
        )  # fmt: skip
        with alone(ROOT):
            recover(ROOT)
            version, changes = run(wish, check=check)
    except (Refusal, ArtifactError) as refusal:
        typer.echo(f"import-model: {refusal}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        typer.echo(f"import-model: {error.strerror or error}{where}; nothing was changed", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("import-model: stopped; nothing was changed", err=True)
        raise typer.Exit(130) from None
    if check and changes:
        typer.echo(f"import-model: differs from what these inputs make: {', '.join(changes)}", err=True)
        raise typer.Exit(1)
    for name in changes:
        typer.echo(f"{name}: {'written' if (ROOT / name).exists() else 'removed'}")
    if not changes:
        typer.echo(f"{ARTIFACTS / version}: unchanged")
    if serve:
        serve_version(version)


def serve_version(version: str) -> None:
    """Become the server, with this very version."""
    typer.echo(
        f"serving {version}; docs: http://127.0.0.1:{os.environ.get('APP_PORT', 8000)}/docs   stop: Ctrl-C"
    )
    own = {"APP_MODEL_VERSION": version, "APP_LOG_FORMAT": os.environ.get("APP_LOG_FORMAT", "console")}
    os.chdir(ROOT)
    command = [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py", "app.main:create_app()"]
    os.execve(sys.executable, command, {**os.environ, **own})  # noqa: S606  # no shell


def one_of(runtime: str) -> str:
    """The runtime asked for."""
    if runtime not in ("onnx", "skops"):
        raise Refusal(f"--runtime is onnx or skops, not {runtime}")
    return runtime


def parsed_bounds(given: Sequence[str]) -> dict[str, tuple[float | None, float | None]]:
    """`age=0:120` by name; either side may be left out."""
    found = {}
    for text in given:
        name, _, limits = text.rpartition("=")
        match = re.fullmatch(r"([^:]*):([^:]*)", limits)
        try:
            if not name or not match:
                raise ValueError
            found[name] = (float(match[1]) if match[1] else None, float(match[2]) if match[2] else None)
        except ValueError:
            raise Refusal(f"--bounds {text}: write name=least:greatest, like age=0:120") from None
    return found


def say(words: str) -> None:
    """Tell the person what is going on."""
    typer.echo(f"import-model: {words}", err=True)


class Counting:
    """Says how far a long piece of work is, every five seconds."""

    def __init__(self, what: str) -> None:
        self._what, self._last = what, time.monotonic()

    def __call__(self, rows: int) -> None:
        """So many rows are done."""
        if time.monotonic() - self._last > 5:
            self._last = time.monotonic()
            say(f"{self._what}: {rows:,} rows")


def run(wish: Wish, *, check: bool) -> tuple[str, list[str]]:
    """Import; the version, and the files that changed, or would with `check`. Raises Refusal or OSError."""
    for path in filter(None, (wish.model, wish.data, wish.holdout)):
        if not path.is_file():
            raise Refusal(f"{path}: there is no such file")
    if wish.holdout and fingerprint(wish.holdout) == fingerprint(wish.data):
        raise Refusal(f"{wish.holdout.name}: has the training rows, on which any model looks good")
    table = profile(wish.data, Counting(f"reading {wish.data.name}"))
    candidates = usable(table, wish.target)
    work = ROOT / WORK
    work.mkdir()
    try:
        rows = sample(table, work / SAMPLE, Counting(f"sampling {wish.data.name}"))
        of_all = "all of them" if rows == table.rows else f"a sample of {rows:,}, drawn with seed 0"
        say(f"{table.rows:,} rows, {len(table.columns)} columns; answers are compared on {of_all}")
        result = converted(work, wish, table, candidates)
        version, new_contract, rewritten = prepare(work, wish, table, result)
        child("assemble", work, cwd=work / "repository")
        refused(work)
        changes = changed(work / "repository", version, check=check)
        changes += [] if wish.holdout is None and not rewritten else outdated(work / "repository")
        point_out(table, result["names"], wish.target, work / SAMPLE)
        made = not check and any((ARTIFACTS / version) in path.parents for path in changes)
        report(result, version, new_contract=new_contract, rows=rows, changed=made)
        if rewritten and wish.holdout is None and not check:
            say(
                "`make evaluate` needs rows that the model never saw: repeat with HOLDOUT=rows.csv, or give "
                "it DATA=rows.csv"
            )
        if not check:
            apply(ROOT, work, changes)
        return version, [path.as_posix() for path in changes]
    finally:
        with unstopped():
            recover(ROOT)


def usable(table: Table, target: str) -> list[Column]:
    """The columns that a model could take; raises Refusal where the target is none of the data's."""
    if target not in table.columns:
        close = ", ".join(map(repr, list(table.columns)[:8]))
        more = " and more" if len(table.columns) > 8 else ""
        raise Refusal(f"{table.path.name}: has no column {target!r}, only {close}{more}")
    if table.columns[target].dtype is None:
        raise Refusal(f"{table.path.name}: the target {target!r} has no value in any row")
    return [one for one in table.columns.values() if one.name != target]


def child(name: str, work: Path, cwd: Path = ROOT) -> None:
    """Run a step in a process of its own; raises Refusal if it does not come to an end."""
    own = {key: value for key, value in os.environ.items() if not key.upper().startswith("APP_")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The converter goes through sets, whose order would otherwise differ each time, and with it the bytes.
    own |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", f"lifecycle.importing.{name}", str(work)]
    # In a group of its own, so that Ctrl-C reaches this process alone, which then ends the step.
    with subprocess.Popen(  # noqa: S603  # this package's own steps
        command, cwd=cwd, env=own, stdin=subprocess.DEVNULL, process_group=0, close_fds=False
    ) as step:
        try:
            status = step.wait()
        except BaseException:
            step.kill()
            raise
    if status:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        raise Refusal(f"the step `{name}` ended with {how}; nothing was changed")


def refused(work: Path) -> dict[str, Any]:
    """What a step found out; raises Refusal if that is a reason to stop."""
    result: dict[str, Any] = json.loads((work / RESULT).read_bytes())
    if "refused" in result:
        raise Refusal(result["refused"])
    return result


def converted(work: Path, wish: Wish, table: Table, columns: Sequence[Column]) -> dict[str, Any]:
    """The model opened, converted and compared, in another process; raises Refusal."""
    if wish.model.suffix != ".onnx":
        say(f"opening {wish.model.name} runs whatever code it holds: done in a process of its own")
    request = {
        "model": str(wish.model.resolve()),
        "target": wish.target,
        "runtime": wish.runtime,
        "trust": wish.trust,
        "trust_all": wish.trust_all,
        "inputs": [
            {"name": one.name, "dtype": one.dtype or "float64", "nullable": one.nullable}
            for one in columns
            if one.dtype and not one.unusable
        ],
        "unusable": {
            one.name: f"is of type {one.unusable}, which JSON has no like of"
            if one.unusable
            else "has no value in any row"
            for one in columns
            if one.unusable or not one.dtype
        },
    }
    (work / REQUEST).write_text(json.dumps(request), "utf-8")
    child("convert", work)
    return refused(work)


def prepare(work: Path, wish: Wish, table: Table, result: dict[str, Any]) -> tuple[str, bool, bool]:
    """Write what `assemble` needs; the version, whether its contract is new, and whether we have to write it.

    The contract is new without our writing where a person changed a unit or a bound in predict.py.
    """
    features = [feature(table.columns[name], wish.bounds) for name in result["names"]]
    if unknown := sorted(wish.bounds.keys() - set(result["names"])):
        raise Refusal(f"--bounds: the model takes no column {unknown[0]!r}")
    for one in features:
        column = table.columns[one.name]
        low, high = column.low, column.high
        if low is not None and one.minimum is not None and low < one.minimum:
            raise Refusal(f"column {one.name!r}: {low:g} in the data is below the bound {one.minimum:g}")
        if high is not None and one.maximum is not None and high > one.maximum:
            raise Refusal(f"column {one.name!r}: {high:g} in the data is above the bound {one.maximum:g}")
    served = [{key: entry[key] for key in entry} for entry in contract_inputs()]
    wanted = [
        {"name": one.name, "dtype": one.dtype, "unit": one.unit, "nullable": one.nullable,
         "minimum": one.minimum, "maximum": one.maximum, "categories": one.categories}
        for one in features
    ]  # fmt: skip
    rewritten = served != wanted or contract_outputs() != {"task": result["task"], "labels": result["labels"]}
    contract = "" if rewritten else served_contract_sha256()
    data_sha256, model_sha256 = fingerprint(wish.data), fingerprint(wish.model)
    training = {
        "data_sha256": data_sha256, "rows": table.rows, "target": wish.target,
        "query": f"{wish.data.name}, all rows", "code_revision": f"sha256:{model_sha256}",
    }  # fmt: skip
    current = None if rewritten else served_manifest()
    new = not current or current.contract_sha256 != contract
    threshold, tolerance = wish.review_threshold, wish.feedback_tolerance
    if threshold is None:
        threshold = current.outputs.review_threshold if current else REVIEW_THRESHOLD
    if tolerance is None:
        tolerance = current.outputs.feedback_tolerance if current else 0.0
    version = version_for(training, result["runtime"], contract)
    made = manifests().get(version)
    rows = wish.holdout and f"{HOLDOUT}{wish.holdout.suffix.lower()}"
    request = {
        "version": version,
        "name": current.name if current else slug(wish.model.stem),
        "target": wish.target,
        "new_contract": new,
        "rewritten": rewritten,
        "training": training,
        "ranges": {
            name: (column.low, column.high)
            for name in result["names"]
            if (column := table.columns[name]).dtype in ("float64", "int64")
        },
        "review_threshold": threshold,
        "feedback_tolerance": tolerance,
        "holdout": rows,
        # Words may change at any time, and a version never.
        "words": {
            one.name: {"description": one.description, "example": one.example}
            for one in (made.inputs if made else ())
        },
    }
    copy = copy_repository(work, version)
    if rewritten:
        kept = [one.name for one in features if one.title or one.description or one.unit]
        if kept:
            say(f"title, description and unit are kept as {PREDICT} had them: {', '.join(map(repr, kept))}")
        text = source(features, result["labels"], examples(work, result["names"]), wish.target)
        (copy / PREDICT).write_text(text, "utf-8", newline="\n")
    if wish.holdout and rows:
        shutil.copyfile(wish.holdout, copy / rows)
    (work / REQUEST).write_text(json.dumps(request), "utf-8")
    return version, new, rewritten


def feature(column: Column, bounds: dict[str, tuple[float | None, float | None]]) -> Feature:
    """A column as the contract has it; what a person added to it in predict.py stays."""
    served = {entry["name"]: entry for entry in contract_inputs()}.get(column.name)
    fields = {field.alias or name: field for name, field in Features.model_fields.items()}
    words = fields.get(column.name)
    own = served if served and served["dtype"] == column.dtype else None
    minimum, maximum = bounds.get(column.name, (own["minimum"], own["maximum"]) if own else (None, None))
    categories = None
    few = len(column.counts or ()) <= min(MAX_CATEGORIES, column.present // ROWS_A_CATEGORY)
    if column.dtype == "string" and column.counts and few:
        categories = sorted(column.counts)
    if own and own["categories"] and categories and set(own["categories"]) == set(categories):
        categories = own["categories"]
    return Feature(
        name=column.name,
        dtype=column.dtype or "float64",
        nullable=column.nullable,
        categories=categories,
        unit=served["unit"] if served else None,
        title=(words and words.title) or "",
        description=(words and words.description) or "",
        minimum=minimum,
        maximum=maximum,
    )


def examples(work: Path, names: list[str]) -> list[dict[str, Any]]:
    """Two rows of the data, complete where there are such."""
    rows = read_sample(work / SAMPLE).select(names)
    missing = sum((pc.cast(pc.is_null(column), pa.int32()).to_numpy() for column in rows.columns), start=0)
    first = int(missing.argmin())
    alike = [index for index in (missing == missing[first]).nonzero()[0].tolist() if index != first]
    chosen = [first, *alike[len(alike) // 2 :][:1]]
    return [rows.slice(index, 1).to_pylist()[0] for index in chosen]


def manifests() -> dict[str, Manifest]:
    """Every version that is there, by name, but the stub."""
    found = {}
    for path in (ROOT / ARTIFACTS).glob(f"v*/{MANIFEST}"):
        try:
            found[path.parent.name] = read_manifest(path.parent)
        except ArtifactError as error:
            raise Refusal(str(error)) from None
    return found


def served_manifest() -> Manifest | None:
    """The manifest of the served version."""
    try:
        return manifests().get(read_release(ROOT / ARTIFACTS).serving)
    except ArtifactError:
        return None


def version_for(training: dict[str, Any], runtime: str, contract: str) -> str:
    """The version that these inputs made for this contract before, or the next number."""
    there = manifests()
    for name, manifest in sorted(there.items(), key=lambda pair: int(pair[0][1:])):
        made = manifest.training
        alike = made and manifest.contract_sha256 == contract and manifest.runtime == runtime
        if alike and all(getattr(made, key) == value for key, value in training.items()):
            return name
    return f"v{max((int(name[1:]) for name in there), default=0) + 1}"


def slug(text: str) -> str:
    """A name of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "model"


def copy_repository(work: Path, version: str) -> Path:
    """The parts that an import may change, and what these are made from: never the models."""
    copy = work / "repository"
    shutil.copytree(ROOT / "app", copy / "app", ignore=shutil.ignore_patterns("__pycache__"))
    names: list[Path | str] = ["pyproject.toml", "slo.toml", ARTIFACTS / RELEASE, *DOCUMENTS]
    serving = read_release(ROOT / ARTIFACTS).serving
    if serving != version:
        names += [ARTIFACTS / serving / name for name in (MANIFEST, "golden.jsonl")]
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, copy / name)
    return copy


def changed(copy: Path, version: str, *, check: bool) -> list[Path]:
    """Files of the copy that the repository does not have as they are; raises Refusal for an old version."""
    there, made = ROOT / ARTIFACTS / version, copy / ARTIFACTS / version
    differing = package.differing(there, {path.name: path.read_bytes() for path in made.iterdir()})
    if there.is_dir() and differing and not check:
        raise Refusal(
            f"{ARTIFACTS / version} was made from these inputs and has other bytes ({', '.join(differing)}): "
            "other libraries or options, or edited. A version is never changed; delete the folder if it was "
            "never released"
        )
    files = sorted(path for path in copy.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    found = [path.relative_to(copy) for path in files]
    return [
        path
        for path in found
        if not (ROOT / path).is_file() or (ROOT / path).read_bytes() != (copy / path).read_bytes()
    ] + [ARTIFACTS / version / name for name in differing if not (made / name).is_file()]


def outdated(copy: Path) -> list[Path]:
    """Rows to evaluate on that are of another contract, or in another format than those that come now."""
    there = (path.relative_to(ROOT) for path in ROOT.glob(f"{HOLDOUT}.*"))
    return sorted(path for path in there if not (copy / path).is_file())


def point_out(table: Table, names: list[str], target: str, path: Path) -> None:
    """Say which columns look like a label, an id, or data about people."""
    rows = read_sample(path)
    unused = [name for name in table.columns if name not in (*names, target)]
    if unused:
        say(f"not used by the model: {', '.join(unused)}")
    for name in names:
        values = rows.column(name)
        present = values.drop_null()
        distinct = len(present) >= MANY_ROWS and pc.count_distinct(present).as_py() == len(present)
        if LABEL_LIKE.match(name) or one_to_one(values, rows.column(target)):
            say(f"look at {name!r}: it tells the target; will it be known when a prediction is wanted?")
        if distinct and table.columns[name].dtype in ("string", "int64"):
            say(f"look at {name!r}: every row has another value, like an id")
        text = pa.types.is_string(values.type)
        if PERSONAL.search(name) or (
            text and pc.any(pc.match_substring_regex(present, PERSONAL_TEXT)).as_py()
        ):
            say(f"look at {name!r}: it may be about people; golden.jsonl and predict.py hold real rows")


def one_to_one(values: Any, target: Any) -> bool:
    """Whether each value goes with one value of the target and the other way round."""
    if pa.types.is_floating(values.type) or pa.types.is_floating(target.type):
        return bool(values.type == target.type and values.equals(target))
    pairs = len(pa.table({"one": values, "other": target}).group_by(["one", "other"]).aggregate([]))
    count = pc.count_distinct(values).as_py()
    return bool(1 < count == pairs == pc.count_distinct(target).as_py())


def report(result: dict[str, Any], version: str, *, new_contract: bool, rows: int, changed: bool) -> None:
    """Say what was made and how it was proven."""
    what = "labels equal, scores" if result["labels"] else "values"
    say(
        f"{result['described']} as {result['form']}: {what} within {result['tolerance']:.1g} of the original "
        f"on {rows:,} rows (at most {result['gap']:.1g} away)"
    )
    if not changed:
        return
    if new_contract:
        say(
            f"the inputs or labels are new: they stand in {PREDICT}, v0 is a stub, {version} serves; other "
            "versions are of the old contract"
        )
    else:
        say(f"the contract stays: {version} stands beside the served version until it is promoted")
    if result["runtime"] == "skops":
        wanted = [f"{name}=={number}" for name, number in result["libraries"].items() if name != "numpy"]
        say(f"the manifest trusts these types: {', '.join(result['trusted_types'])}")
        say(
            f"the image needs what it runs on: add {', '.join(wanted)} to requirements/runtime.in and run "
            "`make lock`"
        )


# --- all or nothing --------------------------------------------------------------------------------------


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """While no other import works in this service; raises Refusal. The lock ends with its last process."""
    with (root / "pyproject.toml").open("r+b") as file:
        os.set_inheritable(file.fileno(), True)  # a step whose parent was killed may be at work yet
        try:
            if sys.platform == "win32":
                import msvcrt

                file.seek(2**30)  # beyond its end: others may read it
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refusal("another import is at work in this service; wait until it has ended") from None
        yield


@contextmanager
def unstopped() -> Iterator[list[int]]:
    """Ctrl-C waits for the end of this; the list says whether it was pressed."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def apply(root: Path, work: Path, changes: Sequence[Path]) -> None:
    """Move changed files into the repository; on any failure what was there comes back."""
    made, backup = work / "repository", work / "backup"
    for path in changes:  # what takes room on the disk comes first
        (backup / path).parent.mkdir(parents=True, exist_ok=True)
        if (root / path).is_file():
            shutil.copyfile(root / path, backup / path)
    journal = {path.as_posix(): (root / path).is_file() for path in changes}
    (work / "journal.new").write_text(json.dumps(journal), "utf-8")
    with unstopped() as pressed:
        try:
            (work / "journal.new").replace(work / JOURNAL)
            for path in changes:
                if pressed:
                    raise KeyboardInterrupt
                (root / path).parent.mkdir(exist_ok=True)
                if (made / path).is_file():
                    (made / path).replace(root / path)
                else:
                    (root / path).unlink()
        except BaseException:
            recover(root)
            raise
        (work / JOURNAL).unlink()


def recover(root: Path) -> None:
    """Undo what an import that did not come to its end had begun to move; as often as need be."""
    work = root / WORK
    journal = work / JOURNAL
    if journal.is_file():
        for name, there in json.loads(journal.read_bytes()).items():
            path, before = root / name, work / "backup" / name
            if before.is_file():
                before.replace(path)
            elif not there:
                with suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
            with suppress(OSError):
                path.parent.rmdir()  # if it is empty
        journal.unlink()
    shutil.rmtree(work, ignore_errors=True)
