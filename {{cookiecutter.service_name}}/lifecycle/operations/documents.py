"""Documents generated from the contract and the served version, and all runbooks in one file for a wiki.

    app/schemas/predict.py, artifacts/<served>/ -> docs/example.json, sections of docs/contract.md,
    of docs/model_card.md and of README.md; openapi.json only on request
    docs/runbooks/*.md -> broken links, a line each, and exit 1; or build/runbooks.md with a table of contents

Sections are found by their headings; people write the rest of these files. If the model card is about another
contract, its sentences about the model are removed, because they describe another model.

Links between runbooks are absolute, because relative links break when pasted into a wiki. Links below an
address of this project (`[project.urls]` of pyproject.toml) are checked; others are only listed.
"""

import itertools
import json
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from app.core.lookup import LOOKED_UP
from app.core.pipeline import Pipeline
from app.core.store import Input, Manifest, read_artifact, read_manifest, read_release
from app.schemas.contract import KEYS, label_key
from app.schemas.predict import Features, Prediction
from lifecycle.command import ROOT, LifecycleError, read_text

SERVICE = "http://127.0.0.1:8000"
POST = f"curl -s {SERVICE}/v1/predict -H 'content-type: application/json' -d "
PREDICTION_ID = "3aad39cc0382cba9767711fcf2ff892a"
DOCUMENTS = ("README.md", "docs/contract.md", "docs/model_card.md", "docs/example.json")
LISTED = 20  # categories and labels that a table names
TYPES = {"float64": "number", "int64": "whole number", "bool": "`true` or `false`", "string": "text"}
BY_PEOPLE = {  # sections of the model card for people to write
    "What it is for": "who decides what by its answers, and what it must not be used for",
    "Known limits": "where it is wrong or unsure, and what it was never trained on",
    "Quality": "how often it is right on rows it never saw, and how that was measured",
    "Data about people": "whose data it was trained on, on what ground, and how no group is served worse",
}
FOLDER = ROOT / "docs" / "runbooks"
INDEX = FOLDER / "README.md"
DEGRADES = "degraded" in {one.name for one in fields(Prediction)}
_LINK = re.compile(r"\]\(([^)]*)\)|(?<!\]\()(https?://[^\s)>]+[\w/])")


def docs(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if something differs.")] = False,
    openapi: Annotated[
        bool, typer.Option("--openapi", help="Also write openapi.json, even if that breaks clients.")
    ] = False,
) -> None:
    """Update the documents about the contract and the served version."""
    texts = documents() | ({"openapi.json": snapshot()} if openapi else {})
    there = {name: (ROOT / name).read_text("utf-8") for name in texts if (ROOT / name).exists()}
    differing = [name for name, text in texts.items() if there.get(name) != text]
    if check and differing:
        typer.echo(
            "\n".join(f"{name}: differs; python -m lifecycle docs writes it" for name in differing), err=True
        )
        raise typer.Exit(1)
    for name in differing:
        (ROOT / name).write_text(texts[name], "utf-8", newline="\n")
        typer.echo(f"{name}: written")


def runbooks(
    output: Annotated[Path, typer.Option(help="Where to write it.")] = ROOT / "build" / "runbooks.md",
) -> None:
    """Write all runbooks into one file for a wiki; fails with a line for each broken link."""
    pages = [INDEX, *sorted(set(FOLDER.glob("*.md")) - {INDEX})]
    title, _, rest = INDEX.read_text("utf-8").partition("\n")
    body = "\n\n".join([rest.strip(), *(_deeper(page.read_text("utf-8")) for page in pages[1:])])
    contents = [f"- [{heading}](#{anchor(heading)})" for heading in headings(body, level=2)]
    document = "\n".join([title, "", *contents, "", body, ""])
    # Wikis number headings that share an anchor differently.
    anchors = Counter(map(anchor, headings(document)))
    twice = [one for one in headings(document, level=2) if anchors[anchor(one)] > 1]
    if problems := broken(pages) + [f"{name}: the heading comes twice" for name in twice]:
        typer.echo("\n".join(problems), err=True)
        raise typer.Exit(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(document, "utf-8", newline="\n")
    for link in sorted({link for page in pages for _, link, fault in checked(page) if fault is None}):
        typer.echo(f"not checked, because it is external: {link}")
    typer.echo(f"{output}: every link to a page of this project works")


def documents(root: Path = ROOT, version: str = "") -> dict[str, str]:
    """Path below `root` and text of each document, about `version` or else the served version."""
    folder = root / "artifacts" / (version or read_release(root / "artifacts").serving)
    manifest = read_manifest(folder)
    golden = [json.loads(line) for line in (folder / "golden.jsonl").read_bytes().splitlines()]
    example, *_ = _examples(manifest)
    row = next((row for row in golden if row["features"] == example), None)
    if row is None:  # the example is not a golden row
        pipeline = Pipeline.offline(read_artifact(root / "artifacts", manifest.version))
        row = asdict(pipeline.answers([Features.model_validate(example)])[0])  # type: ignore[arg-type]  # it was loaded
    answer = _answer(manifest, row)
    readme, contract, card = (read_text(root / name) for name in DOCUMENTS[:3])
    block = f"```json\n{_json(answer)}\n```\n"
    readme = re.sub(r"```json\n.*?\n```\n", lambda _: block, readme, count=1, flags=re.DOTALL)
    for heading, text in api(manifest, example, answer).items():
        contract = replaced(contract, heading, text)
    old = re.search(r"^\| contract \| `(\w+)` \|$", card, re.MULTILINE)
    if old and old[1] != manifest.contract_sha256[:12]:
        for heading, what in BY_PEOPLE.items():
            words = f"Not written yet: {what}. The model's owner writes it here."
            card = replaced(card, heading, words)
    card = replaced(card, "Facts", _facts(manifest))
    texts = (readme, contract, card, _json(example) + "\n")
    return dict(zip(DOCUMENTS, texts, strict=True))


def replaced(text: str, heading: str, words: str) -> str:
    """The document with new text under a heading, up to the next heading of the same level."""
    pattern = rf"(^## {re.escape(heading)}\n).*?(?=^## |\Z)"
    new, found = re.subn(
        pattern, lambda match: f"{match[1]}{words.strip()}\n\n", text, flags=re.MULTILINE | re.DOTALL
    )
    if found != 1:
        raise LifecycleError(f"a document needs one heading `## {heading}`; write it again")
    return new.rstrip("\n") + "\n"


def snapshot() -> str:
    """The text of openapi.json."""
    from app.main import create_app
    from app.settings import Settings

    app = create_app(Settings(_env_file=None, env="local", api_keys=(), docs_enabled=True))
    return json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n"


def _examples(manifest: Manifest) -> list[dict[str, Any]]:
    """The contract's examples, their features in order."""
    examples = Features.model_json_schema()["examples"]
    return [{one.name: example[one.name] for one in manifest.inputs} for example in examples]


def _answer(manifest: Manifest, row: dict[str, Any]) -> dict[str, Any]:
    """The answer for a document, rounded so that all machines write the same digits."""
    said = {"prediction_id": PREDICTION_ID, "model_version": manifest.version}
    degraded = {"degraded": False} if DEGRADES else {}
    if "value" in row:
        return said | {"value": float(f"{row['value']:.6g}"), "action": "accept"} | degraded
    rounded = {label: round(one, 3) for label, one in row["probabilities"].items()}
    score = rounded[label_key(row["label"])]
    action = "accept" if score >= manifest.outputs.review_threshold else "review"
    return (
        said | {"label": row["label"], "score": score, "probabilities": rounded, "action": action} | degraded
    )


def api(manifest: Manifest, example: dict[str, Any], answer: dict[str, Any]) -> dict[str, str]:
    """The sections of docs/contract.md that depend on the contract, by heading."""
    others = _examples(manifest)[1:2] or [example]
    true = _json(answer.get("label", answer.get("value")))
    told = f'{{"prediction_id": "\\1", "label": {true}}}'
    told = re.sub(r"[/&]|\\(?!1)", lambda found: "\\" + found[0], told)  # escaped for sed
    script = shlex.quote(rf's/.*"prediction_id":"\([0-9a-f]*\)".*/{told}/')
    batch = _quoted({"instances": [example, *others]})
    lines = ",\n".join(f"  {_json(key)}: {_json(value)}" for key, value in answer.items())
    said = "" if manifest.outputs.labels else "`label` is the true value. "
    return {
        "Predict": f"```sh\n{POST}{_quoted(example)}\n```\n```json\n{{\n{lines}\n}}\n```",
        "Features": (
            f"{_table(('input', 'type', 'unit', 'allowed', 'seen in training'), map(_row, manifest.inputs))}"
            f"\n\nAll inputs{_optional()} are required, each in its own JSON type (a number is not a string "
            "or a boolean). `null` is accepted only if the table says so. Other names are refused."
        ),
        "Answer": _outputs(manifest),
        "Predict several": (
            "Answers come in the order of the instances. The batch is validated as a whole: one invalid "
            "instance fails it, and the error names its index.\n"
            f"```sh\n{POST.replace('/predict', '/predict/batch')}{batch}\n```"
        ),
        "Say what was right": (
            "When the truth is known, seconds or months later, send it with the id of the prediction; the "
            f"answer is 202.\n```sh\n{POST}@docs/example.json | sed {script} | "
            f"curl -s {SERVICE}/v1/feedback -H 'content-type: application/json' -d @-\n```\n{said}"
            "The same label sent again changes nothing. The first label counts: another label for the same "
            "prediction is refused with 409. An id that this service cannot have issued is 404."
        ),
    }


def _optional() -> str:
    """The inputs that may be left out, and what the service does then, for a sentence about all inputs."""
    columns = {name: f"`{field.alias or name}`" for name, field in Features.model_fields.items()}
    optional, keys = (", ".join(columns[one] for one in columns if one in some) for some in (LOOKED_UP, KEYS))
    if not optional:
        return ""
    written = re.search(r"(?m)^async def lookup\(", read_text(ROOT / "app" / "own" / "lookup.py"))
    how = (
        f"looks up{f' by {keys}, sent beside the inputs' if keys else ''}" if written else "has defaults for"
    )
    return f" but {optional} (which the service {how})"


def _outputs(manifest: Manifest) -> str:
    outputs = manifest.outputs
    rows = {
        "prediction_id": "32 characters that name this prediction; keep it for questions and for feedback, "
        "and do not interpret it",
        "model_version": "the version that answered",
    }
    if outputs.labels:
        rule = "the most probable one"
        if threshold := outputs.threshold:
            rule = f"{_listed([threshold.label])} if its probability is at least {threshold.least:g}"
        rows |= {
            "label": f"one of {_listed(outputs.labels)}: {rule}",
            "score": "the model's probability of `label`, from 0 to 1",
            "probabilities": "every label with its probability; they sum to 1",
        }
    else:
        rows["value"] = outputs.value or "what the model predicts"
    low = "the score is below the review threshold, or " if outputs.labels else ""
    rows["action"] = (
        f"`accept`; or `review`, when a person should look: {low}a value lies outside the range seen in "
        "training"
    )
    if DEGRADES:
        rows["degraded"] = "`true` if defaults stand in for features that were not found"
    return _table(("output", "meaning"), ((f"`{key}`", words) for key, words in rows.items()))


def _row(one: Input) -> tuple[str, ...]:
    """A feature's line in the table."""
    bounds = {
        (False, False): "{:g} to {:g}", (False, True): "from {:g}", (True, False): "up to {1:g}",
        (True, True): "any",
    }[one.minimum is None, one.maximum is None]  # fmt: skip
    allowed = _listed(one.categories) if one.categories else bounds.format(one.minimum, one.maximum)
    seen = "{:g} to {:g}".format(*one.training_range) if one.training_range else ""
    null = ", or `null`" if one.nullable else ""
    return f"`{one.name}`", TYPES[one.dtype], one.unit or "", allowed + null, seen


def _facts(manifest: Manifest) -> str:
    """The manifest's facts, as a table for people."""
    training, outputs = manifest.training, manifest.outputs
    rows = {
        "version": f"`{manifest.version}`, served as {manifest.runtime}",
        "contract": f"`{manifest.contract_sha256[:12]}`",
        "task": manifest.task,
        "answers": _listed(outputs.labels) if outputs.labels else outputs.value or "a number",
        "features": f"{len(manifest.inputs)}: {_listed([one.name for one in manifest.inputs])}",
    }
    if training:
        dates = f", {' to '.join(training.date_range)}" if training.date_range else ""
        rows |= {
            "trained on": f"{training.rows:,} rows{dates}; sha256 `{training.data_sha256[:12]}`",
            "target": f"`{training.target}`",
            "source": training.query or "",
        }
    if outputs.labels:
        rows |= {"score": outputs.score, "review": f"a score below {outputs.review_threshold:g}"}
    rows |= {"libraries": ", ".join(f"{name} {one}" for name, one in sorted(manifest.libraries.items()))}
    return _table(("", ""), ((key, value) for key, value in rows.items() if value))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without padding, so that a change of one row is a change of one line."""
    cells = ([" ".join(text.split()).replace("|", "\\|") for text in row] for row in rows)
    top = "|" + "|".join(f" {name} " if name else " " for name in head) + "|"
    return "\n".join([top, "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in cells)])


def _listed(values: Sequence[Any]) -> str:
    """Values as Markdown code, only the first if there are many."""
    named = [f"`{value if isinstance(value, str) else json.dumps(value)}`" for value in values[:LISTED]]
    return ", ".join(named) + (f" and {len(values) - LISTED} more" if len(values) > LISTED else "")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _quoted(value: Any) -> str:
    """JSON as an argument in a shell, always in quotes."""
    return "'" + _json(value).replace("'", "'\"'\"'") + "'"


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a document outside its code blocks."""
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            yield number, line


def anchor(heading: str) -> str:
    """The fragment of a link to `heading`, as in GitHub and most wikis."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def headings(text: str, level: int | None = None) -> list[str]:
    """The headings of a document, of one level or of all."""
    hashes = "#{1,6}" if level is None else "#" * level
    return [match[1] for _, line in prose(text) if (match := re.fullmatch(f"{hashes} (.+)", line))]


def checked(page: Path) -> Iterator[tuple[str, str, str | None]]:
    """Place, target and fault of every link outside code: "" if it works, None if it is external."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    own = {f"{urls['Runbooks']}/": FOLDER, f"{urls['Repository']}/blob/main/": ROOT}
    for number, line in prose(page.read_text("utf-8")):
        for found in _LINK.finditer(re.sub(r"`[^`]*`", "", line)):
            link = found[1] or found[2] or ""
            fault: str | None = ""
            address = next(filter(link.startswith, own), "")
            path, _, heading = link.removeprefix(address).partition("#")
            file = own.get(address, page.parent) / path if address or path else page
            if not address and "://" in link:
                fault = None
            elif not address and page.parent == FOLDER:
                fault = "is relative, so a paste into a wiki breaks it"
            elif not file.exists():
                fault = "there is no such file"
            elif heading and heading not in map(anchor, headings(file.read_text("utf-8"))):
                fault = "there is no such heading"
            yield f"{page.relative_to(ROOT).as_posix()}:{number}", link, fault


def broken(pages: list[Path]) -> list[str]:
    """One line for every broken link."""
    found = itertools.chain.from_iterable(map(checked, pages))
    return [f"{place}: {link}: {fault}" for place, link, fault in found if fault]


def _deeper(text: str) -> str:
    """A document with each heading one level lower."""
    lines = text.strip().splitlines()
    for number, line in prose(text.strip()):
        if line.startswith("#"):
            lines[number - 1] = f"#{line}"
    return "\n".join(lines)
