"""From a fitted model and its training data to a served version, or to one line that says why not.

    data -> types, ranges, categories of all rows -> a sample         (lifecycle/tables.py)
    model, sample -> the fastest form with the original's answers     (proof.py, another process)
    columns -> app/schemas/predict.py                                 (contract_writer.py)
    all of these -> artifacts/vN, v0, openapi.json, docs, loaded with
    only the packages of the image                                    (assemble.py, another process)
    -> moved into the repository completely, or not at all            (steps.py)

Everything is written into `.import` first, beside the files that it replaces. This module reads no clock and
no machine data: the same inputs give the same bytes.
"""

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import typer

from app.core.store import MANIFEST, RELEASE, Input, Manifest, Outputs, Training, read_manifest, read_release
from app.schemas.contract import contract_inputs, contract_sha256, served_contract_sha256
from app.schemas.predict import Features
from app.settings import SettingsError, load_settings
from lifecycle import package
from lifecycle.command import ROOT, LifecycleError, sha256
from lifecycle.importing import steps
from lifecycle.importing.contract_writer import Feature, source
from lifecycle.importing.serving import LOCALE, RUNTIME_IN, add, lacking
from lifecycle.importing.steps import (
    SAMPLE,
    TEXT,
    UNFIT,
    WORK,
    Assembly,
    Conversion,
    Converted,
    Progress,
    Runtime,
    quoted,
    say,
)
from lifecycle.tables import MAX_DISTINCT, Column, Table, profile, read_sample, sample

ARTIFACTS, PREDICT = Path("artifacts"), Path("app/schemas/predict.py")
DOCUMENTS = (
    "openapi.json", "README.md", "docs/contract.md", "docs/model_card.md", "docs/example.json",
    "evaluation/thresholds.toml",
)  # fmt: skip
HOLDOUT = "evaluation/holdout"
REVIEW_THRESHOLD = 0.6
MANY_ROWS = 20  # with fewer, all values of a column may differ by chance
LABEL_LIKE = re.compile(r"(?i)^(y|label|class|target|outcome|ground_?truth|prediction|y_.*)$")
PERSONAL = re.compile(
    r"(?i)(^|[^a-z])(e-?mail|(first|last|full|sur)_?name|name|phone|mobile|ssn|social_?security|passport|iban"
    r"|birth(day|date)?|dob|street|address|postcode|zip|ip(_?address)?|nationality|religion|ethnicity|race"
    r"|gender|sex)($|[^a-z])"
)
PERSONAL_TEXT = r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}|\+?[0-9][0-9 ()/-]{8,}[0-9]"
MAX_CATEGORIES, ROWS_A_CATEGORY = 50, 2


Bounds = Mapping[str, tuple[float | None, float | None]]  # smallest and largest value by column


@dataclass(frozen=True)
class Request:
    """A model to import: its file, its training data, and the column that it predicts."""

    model: Path
    data: Path
    target: str
    runtime: Runtime | None = None  # None: the fastest that is proven
    trust: Sequence[str] = ()  # own types that skops may load
    trust_listed: bool = False  # trust every type that the model is made of
    bounds: Bounds = field(default_factory=dict)
    review_threshold: float | None = None  # default: the served version's, else 0.6
    feedback_tolerance: float | None = None
    holdout: Path | None = None  # rows that training never saw
    add_requirements: bool = False  # add missing packages of the image to requirements/runtime.in


def import_model(
    model: Annotated[
        Path, typer.Option(help="A fitted estimator from joblib or pickle, a torch module, or an ONNX file.")
    ],
    data: Annotated[Path, typer.Option(help="Its training data: .csv, .parquet, .jsonl or .arrow.")],
    target: Annotated[str, typer.Option(help="The column that the model predicts.")],
    runtime: Annotated[
        Runtime | None,
        typer.Option(help="Only `onnx` or only `skops`; by default the fastest that is proven to be equal."),
    ] = None,
    trust: Annotated[
        str, typer.Option(help="Your own types that skops may load: full names, separated by commas.")
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
        float | None, typer.Option(min=0, help="Values within this distance of the truth are correct.")
    ] = None,
    holdout: Annotated[
        Path | None, typer.Option(help="Rows with their truth that training never saw, for `make evaluate`.")
    ] = None,
    add_requirements: Annotated[
        bool, typer.Option("--add-requirements", help="Add what the image lacks to requirements/runtime.in.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the repository differs.")
    ] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Then serve exactly this version.")] = False,
) -> None:
    """Bring your own model: from MODEL, its training DATA and the TARGET column to a served version.

    The contract (names, types, missing values, categories, ranges) is inferred from all rows. The model is
    served in its fastest form that gives the answers of the original: ONNX, partly ONNX, or scikit-learn
    itself. Then the next version folder is written, with a golden set and a drift baseline, and the API
    description and documents are updated.

    If the inputs or labels are new, app/schemas/predict.py is rewritten, v0 becomes a stub, and the version
    is released; otherwise `make promote` releases it. The same inputs give the same bytes, and any failure
    leaves the repository as it was.
    """
    own = [name for name in trust.split(",") if name]
    request = Request(
        model, data, target, runtime, own, trust_listed, parsed_bounds(bounds or []), review_threshold,
        feedback_tolerance, holdout, add_requirements,
    )  # fmt: skip
    try:
        with steps.alone(ROOT):
            steps.recover(ROOT)
            version, changes = made_version(request, check=check)
    except KeyboardInterrupt:
        typer.echo("import-model: stopped; nothing was changed", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise LifecycleError(f"{error.strerror or error}{where}; nothing was changed") from None
    if check and changes:
        raise LifecycleError(f"differs from what these inputs make: {', '.join(changes)}")
    for name in changes:
        typer.echo(f"{name}: {'written' if (ROOT / name).exists() else 'removed'}")
    if not changes:
        typer.echo(f"{ARTIFACTS / version}: unchanged")
    if serve:
        serve_version(version)


def serve_version(version: str) -> None:
    """Replace this process by the server, with this version."""
    os.chdir(ROOT)
    try:
        address = load_settings().address
    except SettingsError as problem:
        raise LifecycleError(str(problem)) from None
    typer.echo(f"serving {version}; docs: {address}   stop: Ctrl-C")
    command = [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py", "app.main:create_app()"]
    os.execve(sys.executable, command, {**os.environ, "APP_MODEL_VERSION": version})  # noqa: S606  # no shell


def parsed_bounds(given: Sequence[str]) -> dict[str, tuple[float | None, float | None]]:
    """Bounds by column from texts like `age=0:120`; either side may be empty."""
    found = {}
    for text in given:
        name, _, limits = text.rpartition("=")
        match = re.fullmatch(r"([^:]*):([^:]*)", limits)
        try:
            if not name or not match:
                raise ValueError
            found[name] = (float(match[1]) if match[1] else None, float(match[2]) if match[2] else None)
        except ValueError:
            raise LifecycleError(f"--bounds {text}: write name=least:greatest, like age=0:120") from None
    return found


def made_version(request: Request, *, check: bool) -> tuple[str, list[str]]:
    """Make the next version of a model; returns its name, and the files that were written or removed.

    With `check` nothing is written. If it raises LifecycleError, the repository is unchanged.
    """
    for path in filter(None, (request.model, request.data, request.holdout)):
        if not path.is_file():
            raise LifecycleError(f"{path}: there is no such file")
    if request.holdout and sha256(request.holdout) == sha256(request.data):
        raise LifecycleError(f"{request.holdout.name}: has the training rows, on which any model looks good")
    table = profile(request.data, Progress(f"reading {request.data.name}"))
    if request.target not in table.columns:
        raise LifecycleError(
            f"{request.data.name}: has no column {request.target!r}, only {quoted(list(table.columns))}"
        )
    if why := unusable(table.columns[request.target]):
        raise LifecycleError(f"{request.data.name}: the target {request.target!r} {why}")
    work = ROOT / WORK
    work.mkdir()
    try:
        rows = sample(table, work / SAMPLE, Progress(f"sampling {request.data.name}"))
        of_all = "all of them" if rows == table.rows else f"a sample of {rows:,}, drawn with seed 0"
        say(f"{table.rows:,} rows, {len(table.columns)} columns; answers are compared on {of_all}")
        if request.model.suffix != ".onnx":
            say(f"opening {request.model.name} runs any code in it; a separate process opens it")
        unfit: dict[str, str] = {}  # proven forms that the image cannot load
        while True:
            made = convert(work, request, table, unfit)
            assembly = prepare(work, request, table, made)
            steps.run(
                "assemble", work, cwd=work / "repository", environment=LOCALE | {"PYTHONPATH": str(ROOT)}
            )
            if not (work / UNFIT).is_file():
                break
            unfit[made.form] = (work / UNFIT).read_text("utf-8")
            (work / UNFIT).unlink()
            shutil.rmtree(work / "repository")
        changes = changed(work / "repository", assembly.version, check=check)
        if request.holdout or assembly.rewritten:  # remove rows of another contract or format
            there = sorted(path.relative_to(ROOT) for path in ROOT.glob(f"{HOLDOUT}.*"))
            changes += [path for path in there if not (work / "repository" / path).is_file()]
        point_out(table, made.names, request.target, read_sample(work / SAMPLE))
        compared = "labels equal, scores" if made.labels else "values"
        say(
            f"{made.described} as {made.form}: {compared} within {made.tolerance:.1g} of the original on "
            f"{rows:,} rows (at most {made.gap:.1g} away); {made.rate:,} rows a second here, one a call "
            f"(the original: {made.original_rate:,})"
        )
        if made.advice:
            say(made.advice)
        if not check:
            announce(request, made, assembly, changes)
            steps.apply(ROOT, work, changes)
        return assembly.version, [path.as_posix() for path in changes]
    except LifecycleError as refusal:
        story = work / steps.LOG  # the terminal shows only the first line
        told = f"{refusal}\n{story.read_text('utf-8')}" if story.is_file() else str(refusal)
        raise LifecycleError(told) from None
    finally:
        with steps.unstopped():
            steps.recover(ROOT)


def unusable(column: Column) -> str | None:
    """Why a column cannot be used, or None."""
    return column.unusable or (None if column.dtype else "has no value in any row")


def convert(work: Path, request: Request, table: Table, unfit: Mapping[str, str]) -> Converted:
    """Open, convert and compare the model in another process; raises LifecycleError.

    If the model knows columns as text (codes like 08), the data is read again with these columns as text.
    """
    columns = [one for one in table.columns.values() if one.name != request.target]
    Conversion(
        model=request.model.resolve(),
        target=request.target,
        runtime=request.runtime,
        trust=list(request.trust),
        trust_listed=request.trust_listed,
        inputs=[
            Input.model_validate({"name": one.name, "dtype": one.dtype, "nullable": one.nullable})
            for one in columns
            if not unusable(one)
        ],
        unusable={one.name: why for one in columns if (why := unusable(one))},
        unfit=dict(unfit),
    ).write(work)
    steps.run("proof", work)
    if not (work / TEXT).is_file():
        return Converted.read(work)
    names = (work / TEXT).read_text("utf-8").splitlines()
    (work / TEXT).unlink()
    say(f"read as text, because the model was fitted on text: {', '.join(map(repr, names))}")
    again = profile(request.data, Progress(f"reading {request.data.name}"), dict.fromkeys(names, "string"))
    table.columns.update(again.columns)
    sample(table, work / SAMPLE, Progress(f"sampling {request.data.name}"))
    return convert(work, request, table, unfit)


def prepare(work: Path, request: Request, table: Table, made: Converted) -> Assembly:
    """Write the copy of the repository and the document that `assemble` needs; raises LifecycleError.

    The contract can be new without being rewritten, if someone changed a unit or a bound in predict.py.
    """
    features = [
        feature(table.columns[name], request.bounds, closed=name in made.closed) for name in made.names
    ]
    if unknown := sorted(request.bounds.keys() - set(made.names)):
        raise LifecycleError(f"--bounds: the model takes no column {unknown[0]!r}")
    for one in features:
        low, high = table.columns[one.name].low, table.columns[one.name].high
        broken = ""
        if low is not None and one.minimum is not None and low < one.minimum:
            broken = f"{low:g} in the data is below the bound {one.minimum:g}"
        if high is not None and one.maximum is not None and high > one.maximum:
            broken = f"{high:g} in the data is above the bound {one.maximum:g}"
        if broken:
            raise LifecycleError(f"column {one.name!r}: {broken}")
    contract = contract_sha256([asdict(one) for one in features], made.model_dump(include={"task", "labels"}))
    rewritten = contract != served_contract_sha256()
    training = Training(
        data_sha256=sha256(request.data),
        rows=table.rows,
        target=request.target,
        query=f"{request.data.name}, all rows",
        code_revision=f"sha256:{sha256(request.model)}",
    )
    folders = [path.parent for path in (ROOT / ARTIFACTS).glob(f"v*/{MANIFEST}")]
    there = {folder.name: read_manifest(folder) for folder in folders}
    current = None if rewritten else there.get(read_release(ROOT / ARTIFACTS).serving)
    version = version_for(there, training, made.runtime, "" if rewritten else contract)
    earlier = there.get(version)
    said = current.outputs if current else Outputs(review_threshold=REVIEW_THRESHOLD)
    threshold, tolerance = request.review_threshold, request.feedback_tolerance
    stem = re.sub("[^a-z0-9]+", "-", request.model.stem.lower()).strip("-")
    assembly = Assembly(
        version=version,
        name=current.name if current else stem or "model",
        target=request.target,
        new_contract=not current or current.contract_sha256 != contract,
        rewritten=rewritten,
        training=training,
        ranges={
            name: (column.low, column.high)
            for name in made.names
            if (column := table.columns[name]).low is not None and column.high is not None
            and column.dtype in ("float64", "int64")
        },
        review_threshold=said.review_threshold if threshold is None else threshold,
        feedback_tolerance=said.feedback_tolerance if tolerance is None else tolerance,
        holdout=f"{HOLDOUT}{request.holdout.suffix.lower()}" if request.holdout else None,
        # Descriptions in predict.py may change at any time, but those of a version never.
        words={
            one.name: one.model_dump(include={"description", "example"})
            for one in (earlier.inputs if earlier else ())
        },
        requirements=lacking(made.manifest["libraries"]) if made.runtime == "skops" else [],
    )  # fmt: skip
    copy = copy_repository(work, version)
    if rewritten:
        kept = [one.name for one in features if one.title or one.description or one.unit]
        if kept:
            say(f"title, description and unit are kept as {PREDICT} had them: {', '.join(map(repr, kept))}")
        text = source(features, made.labels, examples(work, made.names), request.target)
        (copy / PREDICT).write_text(text, "utf-8", newline="\n")
    if request.add_requirements and assembly.requirements:
        (copy / RUNTIME_IN).parent.mkdir()
        (copy / RUNTIME_IN).write_text(
            add(assembly.requirements, f"artifacts/{version}"), "utf-8", newline="\n"
        )
    if request.holdout and assembly.holdout:
        shutil.copyfile(request.holdout, copy / assembly.holdout)
    assembly.write(work)
    return assembly


def feature(column: Column, bounds: Bounds, *, closed: bool) -> Feature:
    """A column for the contract; descriptions and bounds that people added to predict.py are kept.

    Text is `closed` if the model fails on unknown words. Raises LifecycleError.
    """
    if closed and not column.counts:
        raise LifecycleError(
            f"column {column.name!r} has more than {MAX_DISTINCT:,} words, and the model fails on any other: "
            "fit it with an encoder that takes unknown words (handle_unknown='ignore')"
        )
    served = {entry["name"]: entry for entry in contract_inputs()}.get(column.name)
    fields = {field.alias or name: field for name, field in Features.model_fields.items()}
    words = fields.get(column.name)
    own = served if served and served["dtype"] == column.dtype else None
    minimum, maximum = bounds.get(column.name, (own["minimum"], own["maximum"]) if own else (None, None))
    categories = None
    few = len(column.counts or ()) <= min(MAX_CATEGORIES, column.present // ROWS_A_CATEGORY)
    if column.dtype == "string" and column.counts and (few or closed):
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
    """Two rows of the data, without missing values if possible."""
    rows = read_sample(work / SAMPLE).select(names)
    complete = rows.drop_null()
    rows = complete if complete.num_rows else rows
    return rows.take(sorted({0, rows.num_rows // 2})).to_pylist()  # type: ignore[no-any-return]


def version_for(there: Mapping[str, Manifest], training: Training, runtime: str, contract: str) -> str:
    """The version that was made earlier from these inputs for this contract, or the next number."""
    for name, one in sorted(there.items(), key=lambda pair: int(pair[0][1:])):
        if (one.contract_sha256, one.runtime, one.training) == (contract, runtime, training):
            return name
    return f"v{max((int(name[1:]) for name in there), default=0) + 1}"


def copy_repository(work: Path, version: str) -> Path:
    """Copy the files that an import may change, and the served version, which the documents describe."""
    copy = work / "repository"
    shutil.copytree(ROOT / "app", copy / "app", ignore=shutil.ignore_patterns("__pycache__"))
    names: list[Path | str] = ["pyproject.toml", "slo.toml", ARTIFACTS / RELEASE, *DOCUMENTS]
    serving = read_release(ROOT / ARTIFACTS).serving
    if serving != version:
        names += [path.relative_to(ROOT) for path in (ROOT / ARTIFACTS / serving).iterdir()]
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, copy / name)
    return copy


def changed(copy: Path, version: str, *, check: bool) -> list[Path]:
    """Files that differ between copy and repository; raises LifecycleError if an old version would change."""
    there, made = ROOT / ARTIFACTS / version, copy / ARTIFACTS / version
    differing = package.differing(there, {path.name: path.read_bytes() for path in made.iterdir()})
    if there.is_dir() and differing and not check:
        raise LifecycleError(
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


def announce(request: Request, made: Converted, assembly: Assembly, changes: list[Path]) -> None:
    """Report the changes for the service, and the rows that an evaluation still needs."""
    version = assembly.version
    new = any((ARTIFACTS / version) in path.parents for path in changes)
    if new and assembly.new_contract:
        say(
            f"the inputs or labels are new, see {PREDICT}: v0 is a stub, {version} serves; other versions "
            "only fit the old contract"
        )
    elif new:
        say(f"the contract is unchanged: {version} does not serve until it is promoted")
    if made.closed:
        say(
            f"words that are not in the data are refused (422), because the model fails on them: "
            f"{', '.join(made.closed)}"
        )
    if new and made.runtime == "skops":
        say(f"the manifest trusts these types: {', '.join(made.manifest['trusted_types'])}")
    if assembly.requirements:
        how = "added to" if request.add_requirements else "repeat with --add-requirements, or add them to"
        wanted = ", ".join(assembly.requirements)
        say(f"the image needs {wanted}: {how} requirements/runtime.in; then run `make lock`")
    if assembly.rewritten and request.holdout is None:
        say("`make evaluate` needs rows that the model never saw: HOLDOUT=rows.csv, or later DATA=rows.csv")


def point_out(table: Table, names: list[str], target: str, rows: Any) -> None:
    """Warn about columns that look like a label, an id, or personal data; `rows` is the sample."""
    unused = [name for name in table.columns if name not in (*names, target)]
    if unused:
        say(f"not used by the model: {', '.join(unused)}")
    for name in names:
        values = rows.column(name)
        present = values.drop_null()
        distinct = len(present) >= MANY_ROWS and pc.count_distinct(present).as_py() == len(present)
        if LABEL_LIKE.match(name) or one_to_one(values, rows.column(target)):
            say(f"check {name!r}: it gives away the target; is it known at the time of a prediction?")
        if distinct and table.columns[name].dtype in ("string", "int64"):
            say(f"check {name!r}: every row has a different value, as in an id")
        text = pa.types.is_string(values.type)
        if PERSONAL.search(name) or (
            text and pc.any(pc.match_substring_regex(present, PERSONAL_TEXT)).as_py()
        ):
            say(f"check {name!r}: it may be personal data; golden.jsonl and predict.py hold real rows")


def one_to_one(values: Any, target: Any) -> bool:
    """Whether values and target values correspond one to one."""
    if pa.types.is_floating(values.type) or pa.types.is_floating(target.type):
        return bool(values.type == target.type and values.equals(target))
    pairs = len(pa.table({"one": values, "other": target}).group_by(["one", "other"]).aggregate([]))
    count = pc.count_distinct(values).as_py()
    return bool(1 < count == pairs == pc.count_distinct(target).as_py())
