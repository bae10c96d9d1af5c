"""What the image is made of, as a CycloneDX bill of materials; the base image has one of its own.

    requirements/runtime.txt, <capability>.txt -> what this environment knows of each package: licence, what it needs
    artifacts/v* -> each model file with its sha256 -> build/sbom.json

The lock holds for several Pythons and systems, the bill for the ones it is made with. It holds nothing
random and no time, so the same revision gives the same bytes; set SOURCE_DATE_EPOCH to have a time in it.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.core.manifest import Manifest
from app.core.store import MANIFEST, Artifact

ROOT = Path(__file__).resolve().parents[2]
SERVICE = "root-component"  # the service itself, as cyclonedx-py calls it


def requirements(file: Path) -> list[Requirement]:
    """The lines of a requirements file that hold here, `.in` or locked `.txt`."""
    lines = file.read_text("utf-8").replace("\\\n", " ").splitlines()
    bare = [line.partition(" #")[0].partition(" --hash")[0].strip() for line in lines]
    wanted = [Requirement(line) for line in bare if line and line[0] not in "#-"]
    return [one for one in wanted if one.marker is None or one.marker.evaluate()]


def image_locks() -> list[Path]:
    """What the image installs: runtime.txt, and the lock of each capability."""
    elsewhere = {"dev.txt", "train.txt"}
    return sorted(path for path in (ROOT / "requirements").glob("*.txt") if path.name not in elsewhere)


def installed() -> Any:
    """Everything in this environment, as a bill of materials."""
    # It takes twenty times as long to validate as to do all the rest: a test does that.
    options = ["--output-reproducible", "--short-PURLs", "--no-validate"]
    options += ["--pyproject", str(ROOT / "pyproject.toml"), sys.executable]
    made = subprocess.run(  # noqa: S603  # nothing in it comes from outside
        [sys.executable, "-m", "cyclonedx_py", "environment", *options], capture_output=True, encoding="utf-8"
    )
    if made.returncode:
        sys.exit(made.stderr)
    return json.loads(made.stdout)


def model(folder: Path) -> dict[str, Any]:
    """A version in artifacts/, with the sha256 of its model file as it stands there."""
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    content = (folder / Artifact(manifest, {}).model_file).read_bytes()
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model {manifest.version}",
        "name": manifest.name,
        "version": manifest.version,
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}],
        "modelCard": {"modelParameters": {"task": manifest.task}},
    }


def sbom(
    output: Annotated[Path, typer.Option(help="Where it is written.")] = ROOT / "build" / "sbom.json",
) -> None:
    """Write down what the image is made of, as a CycloneDX bill of materials."""
    bill = installed()
    present = {component["purl"]: component for component in bill["components"]}
    locked = {
        f"pkg:pypi/{canonicalize_name(one.name)}@{str(one.specifier).removeprefix('==')}"
        for lock in image_locks()
        for one in requirements(lock)
    }
    if absent := sorted(locked - present.keys()):
        sys.exit(f"{absent[0]} is locked but not installed here: run `make setup`")

    models = [model(file.parent) for file in sorted((ROOT / "artifacts").glob(f"*/{MANIFEST}"))]
    packages = [present[purl] for purl in sorted(locked)]
    asked_for = {
        canonicalize_name(one.name) for lock in image_locks() for one in requirements(lock.with_suffix(".in"))
    }
    direct = [one["bom-ref"] for one in packages if canonicalize_name(one["name"]) in asked_for]
    kept = {one["bom-ref"] for one in packages}
    edges = {edge["ref"]: edge.get("dependsOn", []) for edge in bill["dependencies"]}
    bill["components"] = packages + models
    bill["dependencies"] = [
        {"ref": SERVICE, "dependsOn": direct + [one["bom-ref"] for one in models]},
        *({"ref": ref, "dependsOn": [to for to in edges[ref] if to in kept]} for ref in sorted(kept)),
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(bill, ensure_ascii=False, indent=1) + "\n", "utf-8")
    typer.echo(f"{output}: {len(packages)} packages, {len(models)} models")
