"""Writes into the documents what follows from the contract and from the served version.

    app/schemas/predict.py, artifacts/<served>/ -> docs/example.json, sections of docs/contract.md,
    of docs/model_card.md and of README.md; openapi.json only on request

Sections are found by their headings; the rest of these files belongs to people. If the model card is about
another contract, its sentences about the model are removed, because they describe another model.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from app.core.store import MANIFEST, RELEASE, Input, Manifest
from app.schemas.contract import contract_outputs
from app.schemas.predict import Features
from lifecycle.files import ROOT

SERVICE = "http://127.0.0.1:8000"
POST = f"curl -s {SERVICE}/v1/predict -H 'content-type: application/json' -d "
PREDICTION_ID = "3aad39cc0382cba9767711fcf2ff892a"
LISTED = 20  # categories and labels that a table names
TYPES = {"float64": "number", "int64": "whole number", "bool": "`true` or `false`", "string": "text"}
BY_PEOPLE = {  # sections of the model card that only people can write
    "What it is for": "who decides what by its answers, and what it must not be used for",
    "Known limits": "where it is wrong or unsure, and what it was never trained on",
    "Quality": "how often it is right on rows it never saw, and how that was measured",
    "Data about people": "whose data it was trained on, on what ground, and how no group is served worse",
}


def documents(root: Path = ROOT) -> dict[str, str]:
    """Path below `root` and the text that it should have."""
    manifest = _served(root)
    example, *_ = _examples(manifest)
    answer = _answer(root, manifest, example)
    names = ("README.md", "docs/contract.md", "docs/model_card.md")
    readme, contract, card = ((root / name).read_text("utf-8") for name in names)
    block = f"```json\n{_json(answer)}\n```\n"
    readme = re.sub(r"```json\n.*?\n```\n", lambda _: block, readme, count=1, flags=re.DOTALL)
    for heading, text in _api(manifest, example, answer).items():
        contract = replaced(contract, heading, text)
    old = re.search(r"^\| contract \| `(\w+)` \|$", card, re.MULTILINE)
    if old and old[1] != manifest.contract_sha256[:12]:
        for heading, what in BY_PEOPLE.items():
            words = f"Nobody has said so far: {what}. Whoever answers for the model writes it here."
            card = replaced(card, heading, words)
    card = replaced(card, "Facts", _facts(manifest))
    texts = {"README.md": readme, "docs/contract.md": contract, "docs/model_card.md": card}
    return texts | {"docs/example.json": _json(example) + "\n"}


def replaced(text: str, heading: str, words: str) -> str:
    """The document with other words under one heading, down to the next heading of any level."""
    pattern = rf"(^## {re.escape(heading)}\n).*?(?=^## |\Z)"
    new, found = re.subn(
        pattern, lambda match: f"{match[1]}{words.strip()}\n\n", text, flags=re.MULTILINE | re.DOTALL
    )
    if found != 1:
        raise ValueError(f"there must be one heading: ## {heading}")
    return new.rstrip("\n") + "\n"


def snapshot() -> str:
    """The text of openapi.json."""
    from app.main import create_app
    from app.settings import Settings

    app = create_app(Settings(_env_file=None, env="local", api_keys=(), docs_enabled=True))
    return json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n"


def refresh(root: Path = ROOT, *, check: bool = False, openapi: bool = False) -> list[str]:
    """Write the files that differ, or with `check` only name them; `openapi` includes the API's snapshot.

    After the contract was rewritten, call it in a new process.
    """
    texts = documents(root) | ({"openapi.json": snapshot()} if openapi else {})
    differing = [name for name, text in texts.items() if _read(root / name) != text]
    for name in [] if check else differing:
        (root / name).write_text(texts[name], "utf-8", newline="\n")
    return differing


def _read(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def _served(root: Path) -> Manifest:
    serving = json.loads((root / "artifacts" / RELEASE).read_bytes())["serving"]
    return Manifest.model_validate_json((root / "artifacts" / serving / MANIFEST).read_bytes())


def _examples(manifest: Manifest) -> list[dict[str, Any]]:
    """The contract's examples, their features in order."""
    examples = Features.model_json_schema()["examples"]
    return [{one.name: example[one.name] for one in manifest.inputs} for example in examples]


def _answer(root: Path, manifest: Manifest, example: dict[str, Any]) -> dict[str, Any]:
    """What the example gets; from the golden set, so that every machine writes the same digits."""
    golden = (root / "artifacts" / manifest.version / "golden.jsonl").read_bytes().splitlines()
    rows = [json.loads(line) for line in golden]
    row = next((row for row in rows if row["features"] == example), rows[0])
    said = {"prediction_id": PREDICTION_ID, "model_version": manifest.version}
    if "value" in row:
        return said | {"value": float(f"{row['value']:.6g}"), "action": "accept"}
    rounded = {label: round(one, 3) for label, one in row["probabilities"].items()}
    score = max(rounded.values())
    action = "accept" if score >= manifest.outputs.review_threshold else "review"
    return said | {"label": row["label"], "score": score, "probabilities": rounded, "action": action}


def _api(manifest: Manifest, example: dict[str, Any], answer: dict[str, Any]) -> dict[str, str]:
    """The sections of docs/contract.md that depend on the contract."""
    others = _examples(manifest)[1:2] or [example]
    true = _json(answer.get("label", answer.get("value")))
    told = f'{{"prediction_id": "\\1", "label": {true}}}'
    told = re.sub(r"[/&]|\\(?!1)", lambda found: "\\" + found[0], told)  # as sed wants it
    script = shlex.quote(rf's/.*"prediction_id":"\([0-9a-f]*\)".*/{told}/')
    batch = _quoted({"instances": [example, *others]})
    lines = ",\n".join(f"  {_json(key)}: {_json(value)}" for key, value in answer.items())
    table = "\n".join(_row(one) for one in manifest.inputs)
    feedback = (
        "Sent again, the same label changes nothing. The first label counts: another one for the same "
        "prediction is refused with 409. An id that no version here can have given out is 404."
    )
    if contract_outputs()["task"] == "regression":
        feedback = "`label` is the true value. " + feedback
    return {
        "Predict": f"```sh\n{POST}{_quoted(example)}\n```\n```json\n{{\n{lines}\n}}\n```",
        "Features": (
            "| input | type | unit | allowed | seen in training |\n|---|---|---|---|---|\n"
            f"{table}\n\nEvery one is required and has its own JSON type (a number is no string and no "
            "boolean); `null` is taken only where the table says so, and nothing else may stand beside them."
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
            f"curl -s {SERVICE}/v1/feedback -H 'content-type: application/json' -d @-\n```\n{feedback}"
        ),
    }


def _outputs(manifest: Manifest) -> str:
    outputs, labels = manifest.outputs, _listed(list(manifest.outputs.labels))
    answers = {
        "label": f"one of {labels}: the most probable one",
        "score": "the model's probability of `label`, from 0 to 1",
        "probabilities": "every label with its probability; they sum to 1",
    }
    review = "the score is below the review threshold, or a value"
    if contract_outputs()["task"] == "regression":
        answers, review = (
            {"value": _cell(outputs.value) or "what the model predicts"},
            "a value",
        )
    rows = {
        "prediction_id": "32 characters that name this prediction; keep it for questions and for feedback, "
        "and read nothing from it",
        "model_version": "the version that answered",
        **answers,
        "action": f"`accept`; or `review`, when a person should look: {review} lies outside the range seen "
        "in training",
    }
    return "| output | meaning |\n|---|---|\n" + "\n".join(
        f"| `{key}` | {words} |" for key, words in rows.items()
    )


def _row(one: Input) -> str:
    """A feature's line in the table."""
    least, most = one.minimum, one.maximum
    if least is None:
        allowed = "any" if most is None else f"up to {most:g}"
    else:
        allowed = f"from {least:g}" if most is None else f"{least:g} to {most:g}"
    if one.categories:
        allowed = _listed(one.categories)
    seen = "{:g} to {:g}".format(*one.training_range) if one.training_range else ""
    null = ", or `null`" if one.nullable else ""
    cells = (f"`{one.name}`", TYPES[one.dtype], one.unit or "", allowed + null, seen)
    return f"| {' | '.join(map(_cell, cells))} |"


def _facts(manifest: Manifest) -> str:
    """What the manifest says, for people."""
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
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value]
    return "| | |\n|---|---|\n" + "\n".join(lines)


def _listed(values: list[Any]) -> str:
    """Values as code, the first of them where there are many."""
    named = [f"`{value if isinstance(value, str) else json.dumps(value)}`" for value in values[:LISTED]]
    return ", ".join(named) + (f" and {len(values) - LISTED} more" if len(values) > LISTED else "")


def _cell(text: str) -> str:
    """A text that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _quoted(value: Any) -> str:
    """JSON as an argument in a shell, always in quotes."""
    return "'" + _json(value).replace("'", "'\"'\"'") + "'"
