"""Opens a model in a separate process, and takes its first form with the same answers.

Conversion -> original.py: the model; its answers to the sample, and to rows with one unusual value
-> convert.py: candidates, the fastest first -> each in the runtime that will serve it
-> the same label and scores for every row, alone and in batches of several sizes and orders?
-> files of the form, answers.npy (of the original), Converted
"""

import ast
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from app.core.pipeline import Model, Policy
from app.core.runtimes import load_runtime, skops_types
from app.core.store import OWN as OWN_FOLDER
from app.core.store import Artifact, FileEntry, Input, Manifest, Outputs, own_code
from lifecycle.command import LifecycleError
from lifecycle.importing.convert import candidates
from lifecycle.importing.original import (
    BOOSTERS,
    MOVE,
    SCORE_TOLERANCE,
    Answers,
    AsText,
    Candidate,
    Original,
    Unanswered,
    fitted_on_text,
    open_model,
    open_onnx,
    original_answers,
    parts,
)
from lifecycle.importing.steps import (
    ANSWERS,
    SAMPLE,
    TEXT,
    Conversion,
    Converted,
    Progress,
    log,
    quoted,
    step,
)
from lifecycle.tables import read_sample

VALUE_TOLERANCE = 1e-4  # share of the standard deviation of the values
PECULIAR_ROWS, ROWS_ALONE, WORDS, TIES = 600, 40, 60, 6
UNSEEN, NEW_WORD = "no row has this", "of a new word"
SECONDS_MEASURED = 0.1
# Types of these libraries are trusted; the user must trust all others.
KNOWN = tuple(
    f"{name}." for name in ("sklearn", "numpy", "scipy", "pandas", "imblearn", "catboost", *BOOSTERS)
)
OWN = "app.own."
KNOWN_BUILTINS = {
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "set", "slice", "str",
                                      "tuple", "type", "complex", "frozenset", "range", "bytearray")),
    "collections.OrderedDict", "collections.defaultdict", "functools.partial",
}  # fmt: skip


class Refused(LifecycleError):
    """A candidate that needs an action of the user first; this reason is reported before all others."""


def prove(folder: Path) -> None:
    """Open, convert, prove; writes the converted model and a `Converted`. Raises LifecycleError."""
    request = Conversion.read(folder)
    table = read_sample(folder / SAMPLE)
    try:
        original = opened(request, table)
    except AsText as text:
        (folder / TEXT).write_text("\n".join(text.args), "utf-8")
        return
    entries = [entry for name in original.names for entry in request.inputs if entry.name == name]
    rows = table.select(original.names)
    answers = original_answers(original, rows, entries)
    np.save(folder / ANSWERS, answers)
    if "classes" in original.outputs:
        check_words(original, answers, table.column(request.target), request.target)
    strange, closed = peculiar(original, entries, rows)
    proof = Proof(original, entries, rows, answers, strange)
    candidate, made, gap = taken(request, proof)
    manifest = made.artifact.manifest
    for name, content in made.artifact.files.items():
        (folder / name).write_bytes(content)
    Converted(
        task=original.task,
        labels=original.labels,
        names=original.names,
        described=original.described,
        runtime=candidate.runtime,
        form=candidate.form,
        advice=candidate.advice,
        files=list(made.artifact.files),
        tolerance=proof.tolerance,
        gap=gap,
        rate=rows_a_second(partial(made.runtime.infer, made.matrix(tuples(rows.slice(0, 1))))),
        original_rate=rows_a_second(original.call(rows.slice(0, 1))),
        closed=closed,
        outputs=original.outputs,
        manifest=manifest.model_dump(
            include={"libraries", "trusted_types", "code", "takes", "dtypes", "stages"}
        ),
    ).write(folder)


def opened(request: Conversion, table: Any) -> Original:
    """The model in the file; raises LifecycleError, or AsText."""
    inputs = {entry.name: entry for entry in request.inputs}
    if request.model.suffix == ".onnx":
        return open_onnx(request.model, inputs, table, request.target)
    if request.model.suffix in (".pt", ".pth", ".pt2"):
        from lifecycle.importing.torch import open_torch

        return open_torch(request.model, inputs, request.unusable, table, request.target)
    return open_model(request.model, inputs, request.unusable, table, request.target)


def check_words(original: Original, answers: Answers, truth: Any, target: str) -> None:
    """Raise LifecycleError if the sorted words of the target do not match the model's numbers."""
    positions = np.array(
        [original.labels.index(one) if one in original.labels else -1 for one in truth.to_pylist()]
    )
    chosen = original.chosen(answers)
    counts = np.zeros((len(original.labels), len(original.labels)), int)
    np.add.at(counts, (chosen[positions >= 0], positions[positions >= 0]), 1)
    if (counts.argmax(axis=1) != np.arange(len(counts)))[counts.any(axis=1)].any():
        raise LifecycleError(
            f"the model's labels are {quoted(original.outputs['classes'])}, and the sorted words of "
            f"{target!r} do not match them: fit it on the words, or give data with its numbers"
        )


# --- unusual rows -----------------------------------------------------------------------------------------


class Strange(NamedTuple):
    """Rows with an unusual value in one column, and the original's answers to them."""

    rows: Any  # pyarrow table
    told: list[str]  # what is unusual about each row
    answers: Answers


def peculiar(original: Original, entries: Sequence[Input], rows: Any) -> tuple[Strange, list[str]]:
    """Unusual rows to compare in addition to the sample, and text columns whose encoder fails on new words.

    Each is an ordinary row with one value changed; rows that the original cannot answer are left out.
    """
    complete = rows.drop_null()
    complete = complete if complete.num_rows else rows
    ordinary = complete.slice(complete.num_rows // 2, 1).to_pylist()[0]
    nullable = {entry.name: None for entry in entries if entry.nullable}
    found = [(ordinary | nullable, "with every value missing that may be")] if nullable else []
    changes = {entry.name: list(unusual(entry, rows.column(entry.name))) for entry in entries}
    for turn in range(max(map(len, changes.values()))):  # the first change of every column first
        found += [
            (ordinary | {name: change[turn][0]}, f"with {name!r} {change[turn][1]}")
            for name, change in changes.items()
            if turn < len(change)
        ]
    found = found[:PECULIAR_ROWS]
    table = pa.Table.from_pylist([row for row, _ in found], schema=rows.schema)
    answered = dict(answerable(original, entries, table))
    # Only text of encoders is closed: other text, like dates, may have values that training never saw.
    known = fitted_on_text(original.estimator, original.names)
    failed = {told for at, (_, told) in enumerate(found) if at not in answered}
    closed = [name for name in original.names if name in known and f"with {name!r} {NEW_WORD}" in failed]
    shape = (len(answered), max(len(original.labels), 1))
    answers = np.array(list(answered.values()), np.float64).reshape(shape)
    return Strange(table.take(list(answered)), [found[at][1] for at in answered], answers), closed


def unusual(entry: Input, column: Any) -> Iterator[tuple[Any, str]]:
    """Unusual values of a column, each with its description."""
    if entry.nullable:
        yield None, "missing"
    present = column.unique().drop_null().sort()
    if entry.dtype in ("string", "bool"):
        if entry.dtype == "string":
            yield UNSEEN, NEW_WORD
        yield from ((value, "of each kind") for value in present[:WORDS].to_pylist())
        return
    low, high = present[0].as_py(), present[-1].as_py()
    yield from ((low, "at its least"), (high, "at its greatest"))
    yield from ((low - (high - low) - 1, "far below"), (high + (high - low) + 1, "far above"))
    for at in np.linspace(0, len(present) - 2, min(TIES, len(present) - 1)).astype(int).tolist():
        middle = (present[at].as_py() + present[at + 1].as_py()) / 2
        if entry.dtype == "float64" or middle.is_integer():
            yield type(low)(middle), "between two neighbours"


def answerable(
    original: Original, entries: Sequence[Input], table: Any, first: int = 0
) -> Iterator[tuple[int, Any]]:
    """Index and answer of the rows that the original can answer; others are found by halving the table."""
    try:
        yield from enumerate(original_answers(original, table, entries), first)
    except Unanswered:
        half = table.num_rows // 2
        if half:
            yield from answerable(original, entries, table.slice(0, half), first)
            yield from answerable(original, entries, table.slice(half), first + half)


# --- the proof --------------------------------------------------------------------------------------------


class Proof:
    """The rows, and the answers that a form of the model must give."""

    def __init__(
        self, original: Original, entries: list[Input], rows: Any, answers: Answers, strange: Strange
    ) -> None:
        self.original, self.entries, self.rows, self.answers = original, entries, rows, answers
        self.tolerance, self._largest = SCORE_TOLERANCE, 1.0
        if not original.labels:
            self._largest = max(float(np.abs(answers).max()), 1e-9)
            self.tolerance = VALUE_TOLERANCE * float(answers.std()) or 1e-6 * max(1.0, self._largest)
        self._strange, self._asked = strange, tuples(strange.rows)
        self._order = np.random.default_rng(0).permutation(len(self._asked)).tolist()
        for at, row in enumerate(parts(strange.rows.slice(0, ROWS_ALONE), 1)):
            self._compare(original_answers(original, row, entries), [at], "the model itself, asked alone,")

    def gap(self, model: Model) -> float:
        """The largest distance from the original's answers; raises LifecycleError beyond the tolerance."""

        def ask(rows: Sequence[Any]) -> Answers:
            return np.asarray(model.runtime.infer(model.matrix(rows)), np.float64)

        every = list(range(len(self._asked)))
        groups = [[at] for at in every[:ROWS_ALONE]]
        groups += [every[at : at + size] for size in (2, 7) for at in range(0, ROWS_ALONE * size // 2, size)]
        groups += [every, every[::-1], self._order]
        worst, first, progress = 0.0, 0, Progress("asking the converted model")
        for group in filter(None, groups):
            worst = max(worst, self._compare(ask([self._asked[at] for at in group]), group, "a row"))
        for part in parts(self.rows):
            given = ask(tuples(part))
            told = f"row {first + 1} to {first + len(given)}: one"
            worst = max(worst, self._judge(given, self.answers[first : first + len(given)], told, None))
            first += len(given)
            progress(first)
        return worst

    def _compare(self, given: Answers, group: list[int], told: str) -> float:
        return self._judge(
            given, self._strange.answers[group], told, [self._strange.told[at] for at in group]
        )

    def _judge(self, given: Answers, wanted: Answers, told: str, what: list[str] | None) -> float:
        """The largest gap; raises LifecycleError, which names the first row that is too far away."""
        if given.shape != wanted.shape:
            raise LifecycleError(
                f"gives {given.shape[1]} numbers a row where the original gives {wanted.shape[1]}"
            )
        gaps = np.nan_to_num(np.abs(given - wanted).max(axis=1), nan=np.inf)
        # For values far beyond the training rows, the tolerance grows with the value, as floats do.
        allowed = self.tolerance * np.maximum(1.0, np.abs(wanted).max(axis=1) / self._largest)
        far = gaps > allowed
        if self.original.labels:
            other = self.original.chosen(given) != self.original.chosen(wanted)
            far |= other & ~self.original.undecided(wanted)
        if far.any():
            at = int(far.argmax())
            row = f"{told} {what[at]}" if what else told
            away = (
                "gets another label"
                if gaps[at] <= allowed[at]
                else f"is {gaps[at]:.2g} away from the original"
            )
            raise LifecycleError(f"{row} {away}, allowed is {allowed[at]:.2g}")
        return float(gaps.max())


def tuples(table: Any) -> list[tuple[Any, ...]]:
    """Rows as tuples, as the service has them after validation."""
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def taken(request: Conversion, proof: Proof) -> tuple[Candidate, Model, float]:
    """The first proven candidate, its loaded model, and its distance; raises LifecycleError."""
    import onnxruntime

    original = proof.original
    onnxruntime.set_default_logger_severity(4)
    reasons: dict[str, str] = {}
    refused = ""
    for candidate in original.forms or candidates(original, proof.entries, proof.rows):
        if request.runtime not in (None, candidate.runtime):
            continue
        if why := request.unfit.get(candidate.form):
            reasons[why] = candidate.form
            continue
        try:
            model = loaded(request, proof, candidate)
            return candidate, model, proof.gap(model)
        except Refused as refusal:
            refused = str(refusal)
        except LifecycleError as refusal:
            reasons.setdefault(str(refusal), candidate.form)
        except Exception as error:  # converters and runtimes raise many types
            log(traceback.format_exc())
            cause = error.__cause__ or error
            reasons.setdefault(f"{type(cause).__name__}: {' '.join(str(cause).split())}", candidate.form)
        log(f"{candidate.form}: not taken: {refused or list(reasons)[-1]}")
    if refused:
        raise LifecycleError(refused)
    reason, form = next(reversed(reasons.items()), ("there is no form for this model", "any runtime"))
    raise LifecycleError(f"the model cannot be served: {form}: {reason}")


def loaded(request: Conversion, proof: Proof, candidate: Candidate) -> Model:
    """A candidate loaded as in the service; raises LifecycleError if its types are not trusted."""
    files = candidate.make()
    types = sorted(skops_types(files["model.skops"])) if "model.skops" in files else []
    original, libraries = proof.original, candidate.libraries | trusted(request, types)
    takes: dict[str, Any] = {}
    if types and candidate.manifest.get("stages", ["model.skops"])[0] == "model.skops":
        takes = original.takes
        frame = original.framed and any(one.dtype != "float64" for one in proof.entries)
        libraries |= {"pandas"} if takes.get("takes", "frame" if frame else "array") == "frame" else set()
    manifest = Manifest(
        name="model",
        version="v1",
        task=original.task,
        runtime=candidate.runtime,
        files={name: FileEntry(sha256=sha256(one).hexdigest(), size=len(one)) for name, one in files.items()},
        inputs=proof.entries,
        outputs=Outputs(labels=original.labels, **original.outputs),
        training=None,
        libraries={name: metadata.version(name) for name in sorted(libraries)},
        trusted_types=types,
        code=own_code() if any(one.startswith(OWN) for one in types) else {},
        contract_sha256="0" * 64,
        **takes,
        **candidate.manifest,
    )
    artifact = Artifact(manifest, files)
    return Model(artifact, load_runtime(artifact), Policy())


def trusted(request: Conversion, types: Sequence[str]) -> set[str]:
    """The distributions of these types; raises Refused if the service may not load one of them."""
    modules = {one.partition(".")[0] for one in types}
    if any(one.startswith(OWN) for one in types):
        modules |= own_imports()
    modules -= {"builtins", "app"}
    providers = metadata.packages_distributions() if modules else {}
    for one in types:
        module, _, kind = one.rpartition(".")
        top = module.partition(".")[0]
        if top == "__main__" or (top not in providers and top not in (*sys.stdlib_module_names, "app")):
            raise Refused(f"{kind} is defined in {module}, which no service has: {MOVE}")
    strange = [one for one in types if not one.startswith((*KNOWN, OWN)) and one not in KNOWN_BUILTINS]
    if untrusted := [one for one in strange if one not in request.trust and not request.trust_listed]:
        listed = ",".join(untrusted)
        more = f"--trust {listed}" if len(listed) < 100 else "--trust-listed"
        raise Refused(
            f"the model is made of types that are not trusted: {quoted(untrusted)}. If you know them: {more}"
        )
    return {providers[one][0] for one in modules if one in providers}


def own_imports() -> set[str]:
    """Packages that the own code of models imports, wherever in it."""
    nodes = [node for name in own_code() for node in ast.walk(ast.parse((OWN_FOLDER / name).read_bytes()))]
    names = [one.name for node in nodes if isinstance(node, ast.Import) for one in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def rows_a_second(call: Callable[[], Any]) -> int:
    """Calls with one row per second, measured on this machine, rounded to two digits."""
    calls, began = 0, perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while perf_counter() - began < SECONDS_MEASURED:
            call()
            calls += 1
    return int(float(f"{calls / (perf_counter() - began):.2g}"))


if __name__ == "__main__":
    step(prove)
