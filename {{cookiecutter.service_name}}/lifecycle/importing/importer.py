"""From a fitted model and its training data to a served version, or to one line that says why not.

    data -> types, ranges, categories of all rows -> a sample        (lifecycle/tables.py)
    model, sample -> ONNX or skops, the same answers as the original (convert.py, another process)
    columns -> app/schemas/predict.py                                (contract_writer.py)
    all of it -> artifacts/vN, v0, openapi.json, docs                (assemble.py, another process)
    -> moved into the repository as a whole, or not at all           (journal.py)

Everything is written into `.import` first, beside the files that it replaces. Nothing here reads the clock or
the machine: the same inputs give the same bytes.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from app.core.errors import ArtifactError
from app.core.store import MANIFEST, RELEASE, Input, Manifest, Outputs, Training, read_manifest, read_release
from app.schemas.contract import contract_inputs, contract_sha256, served_contract_sha256
from app.schemas.predict import Features
from lifecycle import package
from lifecycle.errors import LifecycleError
from lifecycle.files import ROOT, sha256
from lifecycle.importing import steps
from lifecycle.importing.contract_writer import Feature, source
from lifecycle.importing.documents import SAMPLE, Assembly, Conversion, Converted, Runtime
from lifecycle.importing.findings import point_out
from lifecycle.importing.journal import WORK, alone, apply, recover, unstopped
from lifecycle.importing.steps import Progress, say
from lifecycle.tables import Column, Table, profile, read_sample, sample

ARTIFACTS, PREDICT = Path("artifacts"), Path("app/schemas/predict.py")
DOCUMENTS = (
    "openapi.json", "README.md", "docs/contract.md", "docs/model_card.md", "docs/example.json",
    "evaluation/thresholds.toml",
)  # fmt: skip
HOLDOUT = "evaluation/holdout"
REVIEW_THRESHOLD = 0.6
MAX_CATEGORIES, ROWS_A_CATEGORY = 50, 2


Bounds = Mapping[str, tuple[float | None, float | None]]  # least and greatest value by column


@dataclass(frozen=True)
class Request:
    """A model to import: its file, its training data, and the column that it predicts."""

    model: Path
    data: Path
    target: str
    runtime: Runtime = "onnx"
    trust: Sequence[str] = ()  # types of your own that skops may load
    trust_listed: bool = False  # trust every type that the model is made of
    bounds: Bounds = field(default_factory=dict)
    review_threshold: float | None = None  # of the served version, else 0.6
    feedback_tolerance: float | None = None
    holdout: Path | None = None  # rows that training never saw


@dataclass(frozen=True)
class Imported:
    """The version that an import made, or found made already."""

    version: str
    changes: list[str]  # files that were written or removed, or would be with `check`
    new_contract: bool


def import_model(request: Request, *, check: bool = False) -> Imported:
    """Make the next version of a model; with `check` nothing is written. Progress goes to stderr.

    Raises LifecycleError, one line for a person; then the repository is as it was.
    """
    try:
        with alone(ROOT):
            recover(ROOT)
            return _import(request, check=check)
    except ArtifactError as error:
        raise LifecycleError(str(error)) from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise LifecycleError(f"{error.strerror or error}{where}; nothing was changed") from None


def _import(request: Request, *, check: bool) -> Imported:
    for path in filter(None, (request.model, request.data, request.holdout)):
        if not path.is_file():
            raise LifecycleError(f"{path}: there is no such file")
    if request.holdout and sha256(request.holdout) == sha256(request.data):
        raise LifecycleError(f"{request.holdout.name}: has the training rows, on which any model looks good")
    table = profile(request.data, Progress(f"reading {request.data.name}"))
    candidates = usable(table, request.target)
    work = ROOT / WORK
    work.mkdir()
    try:
        rows = sample(table, work / SAMPLE, Progress(f"sampling {request.data.name}"))
        of_all = "all of them" if rows == table.rows else f"a sample of {rows:,}, drawn with seed 0"
        say(f"{table.rows:,} rows, {len(table.columns)} columns; answers are compared on {of_all}")
        made = convert(work, request, candidates)
        assembly = prepare(work, request, table, made)
        steps.run("assemble", work, cwd=work / "repository")
        changes = changed(work / "repository", assembly.version, check=check)
        changes += outdated(work / "repository") if request.holdout or assembly.rewritten else []
        point_out(table, made.names, request.target, read_sample(work / SAMPLE))
        compared = "labels equal, scores" if made.labels else "values"
        say(
            f"{made.described} as {made.form}: {compared} within {made.tolerance:.1g} of the original on "
            f"{rows:,} rows (at most {made.gap:.1g} away)"
        )
        if not check:
            announce(request, made, assembly, changes)
            apply(ROOT, work, changes)
        return Imported(assembly.version, [path.as_posix() for path in changes], assembly.new_contract)
    finally:
        with unstopped():
            recover(ROOT)


def usable(table: Table, target: str) -> list[Column]:
    """The columns that a model could take; raises LifecycleError where the data lacks the target."""
    if target not in table.columns:
        close = ", ".join(map(repr, list(table.columns)[:8]))
        more = " and more" if len(table.columns) > 8 else ""
        raise LifecycleError(f"{table.path.name}: has no column {target!r}, only {close}{more}")
    if table.columns[target].dtype is None:
        raise LifecycleError(f"{table.path.name}: the target {target!r} has no value in any row")
    return [one for one in table.columns.values() if one.name != target]


def convert(work: Path, request: Request, columns: Sequence[Column]) -> Converted:
    """The model opened, converted and compared, in another process; raises LifecycleError."""
    if request.model.suffix != ".onnx":
        say(f"opening {request.model.name} runs whatever code it holds: done in a process of its own")
    Conversion(
        model=request.model.resolve(),
        target=request.target,
        runtime=request.runtime,
        trust=list(request.trust),
        trust_listed=request.trust_listed,
        inputs=[
            Input.model_validate({"name": one.name, "dtype": one.dtype, "nullable": one.nullable})
            for one in columns
            if one.dtype and not one.unusable
        ],
        unusable={
            one.name: f"is of type {one.unusable}, which JSON has no like of"
            if one.unusable
            else "has no value in any row"
            for one in columns
            if one.unusable or not one.dtype
        },
    ).write(work)
    steps.run("convert", work)
    return Converted.read(work)


def prepare(work: Path, request: Request, table: Table, made: Converted) -> Assembly:
    """Write the copy of the repository and the document that `assemble` needs; raises LifecycleError.

    The contract can be new without being rewritten: where a person changed a unit or a bound in predict.py.
    """
    features = [feature(table.columns[name], request.bounds) for name in made.names]
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
    there = manifests()
    current = None if rewritten else there.get(read_release(ROOT / ARTIFACTS).serving)
    version = version_for(there, training, made.runtime, "" if rewritten else contract)
    earlier = there.get(version)
    said = current.outputs if current else Outputs(review_threshold=REVIEW_THRESHOLD)
    threshold, tolerance = request.review_threshold, request.feedback_tolerance
    assembly = Assembly(
        version=version,
        name=current.name if current else slug(request.model.stem),
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
        # Words may change at any time, and a version never.
        words={
            one.name: one.model_dump(include={"description", "example"})
            for one in (earlier.inputs if earlier else ())
        },
    )  # fmt: skip
    copy = copy_repository(work, version)
    if rewritten:
        kept = [one.name for one in features if one.title or one.description or one.unit]
        if kept:
            say(f"title, description and unit are kept as {PREDICT} had them: {', '.join(map(repr, kept))}")
        text = source(features, made.labels, examples(work, made.names), request.target)
        (copy / PREDICT).write_text(text, "utf-8", newline="\n")
    if request.holdout and assembly.holdout:
        shutil.copyfile(request.holdout, copy / assembly.holdout)
    assembly.write(work)
    return assembly


def feature(column: Column, bounds: Bounds) -> Feature:
    """A column as the contract has it; the words and bounds that a person added to predict.py stay."""
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
    complete = rows.drop_null()
    rows = complete if complete.num_rows else rows
    return rows.take(sorted({0, rows.num_rows // 2})).to_pylist()  # type: ignore[no-any-return]


def manifests() -> dict[str, Manifest]:
    """Every version in artifacts/, by name; raises LifecycleError where a manifest cannot be read."""
    folders = [path.parent for path in (ROOT / ARTIFACTS).glob(f"v*/{MANIFEST}")]
    return {folder.name: read_manifest(folder) for folder in folders}


def version_for(there: Mapping[str, Manifest], training: Training, runtime: str, contract: str) -> str:
    """The version that these inputs made for this contract before, or the next number."""
    for name, one in sorted(there.items(), key=lambda pair: int(pair[0][1:])):
        if (one.contract_sha256, one.runtime, one.training) == (contract, runtime, training):
            return name
    return f"v{max((int(name[1:]) for name in there), default=0) + 1}"


def slug(text: str) -> str:
    """A name of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "model"


def copy_repository(work: Path, version: str) -> Path:
    """The parts that an import may change, and the files these are made from: never the models."""
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
    """Files that the repository has not as they are in the copy; raises LifecycleError for an old version."""
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


def outdated(copy: Path) -> list[Path]:
    """Rows to evaluate on that are of another contract, or in another format than those that come now."""
    there = (path.relative_to(ROOT) for path in ROOT.glob(f"{HOLDOUT}.*"))
    return sorted(path for path in there if not (copy / path).is_file())


def announce(request: Request, made: Converted, assembly: Assembly, changes: list[Path]) -> None:
    """Say what a new version changes for the service, and which rows an evaluation still needs."""
    version = assembly.version
    new = any((ARTIFACTS / version) in path.parents for path in changes)
    if new and assembly.new_contract:
        say(
            f"the inputs or labels are new: they stand in {PREDICT}, v0 is a stub, {version} serves; other "
            "versions are of the old contract"
        )
    elif new:
        say(f"the contract stays: {version} stands beside the served version until it is promoted")
    if new and made.runtime == "skops":
        wanted = [f"{name}=={number}" for name, number in made.libraries.items() if name != "numpy"]
        say(f"the manifest trusts these types: {', '.join(made.trusted_types)}")
        say(f"the image needs {', '.join(wanted)}: add them to requirements/runtime.in and run `make lock`")
    if assembly.rewritten and request.holdout is None:
        say("`make evaluate` needs rows that the model never saw: HOLDOUT=rows.csv, or later DATA=rows.csv")
