"""The contents of the image as a CycloneDX bill of materials, without those of its base image.

    requirements/runtime.txt, <capability>.txt -> licence and dependencies of each package, as installed
    artifacts/v* -> each model file with its sha256 -> build/sbom.json

The lock covers several Pythons and systems, the bill only those of this environment. The same revision gives
the same bytes; the bill holds a time only if SOURCE_DATE_EPOCH is set.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.core.store import MANIFEST, Artifact, Manifest
from lifecycle.command import ROOT, LifecycleError, sha256

SERVICE = "root-component"  # the service itself, as cyclonedx-py calls it


def sbom(
    output: Annotated[Path, typer.Option(help="Where it is written.")] = ROOT / "build" / "sbom.json",
) -> None:
    """Write the contents of the image as a CycloneDX bill of materials."""
    bill = bill_of_materials()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(bill, ensure_ascii=False, indent=1) + "\n", "utf-8")
    models = sum(one["type"] == "machine-learning-model" for one in bill["components"])
    typer.echo(f"{output}: {len(bill['components']) - models} packages, {models} models")


def requirements(file: Path) -> list[Requirement]:
    """The requirements of a file, `.in` or locked `.txt`, that apply to this environment."""
    lines = file.read_text("utf-8").replace("\\\n", " ").splitlines()
    bare = [line.partition(" #")[0].partition(" --hash")[0].strip() for line in lines]
    wanted = [Requirement(line) for line in bare if line and line[0] not in "#-"]
    return [one for one in wanted if one.marker is None or one.marker.evaluate()]


def bill_of_materials(root: Path = ROOT) -> dict[str, Any]:
    """The locked packages of this environment, and the models; LifecycleError if a package is missing."""
    # Everything in this environment. Only a test validates it, because that takes twenty times as long.
    options = ["--output-reproducible", "--short-PURLs", "--no-validate"]
    options += ["--pyproject", str(ROOT / "pyproject.toml"), sys.executable]
    made = subprocess.run(  # noqa: S603  # nothing in it comes from outside
        [sys.executable, "-m", "cyclonedx_py", "environment", *options], capture_output=True, encoding="utf-8"
    )
    if made.returncode:
        raise LifecycleError(made.stderr)
    bill: dict[str, Any] = json.loads(made.stdout)
    present = {component["purl"]: component for component in bill["components"]}
    # The image installs runtime.txt and the lock of each capability.
    files = sorted((root / "requirements").glob("*.txt"))
    locks = [file for file in files if file.name != "dev.txt"]
    locked = {
        f"pkg:pypi/{canonicalize_name(one.name)}@{str(one.specifier).removeprefix('==')}"
        for lock in locks
        for one in requirements(lock)
    }
    if absent := sorted(locked - present.keys()):
        raise LifecycleError(f"{absent[0]} is locked but not installed here: run `make setup`")
    models = []
    for file in sorted((root / "artifacts").glob(f"*/{MANIFEST}")):
        manifest = Manifest.model_validate_json(file.read_bytes())
        model_sha256 = sha256(file.with_name(Artifact(manifest, {}).model_file))
        models.append({
            "type": "machine-learning-model", "bom-ref": f"model {manifest.version}", "name": manifest.name,
            "version": manifest.version, "hashes": [{"alg": "SHA-256", "content": model_sha256}],
            "modelCard": {"modelParameters": {"task": manifest.task}},
        })  # fmt: skip
    packages = [present[purl] for purl in sorted(locked)]
    own = {canonicalize_name(one.name) for lock in locks for one in requirements(lock.with_suffix(".in"))}
    direct = [one["bom-ref"] for one in packages if canonicalize_name(one["name"]) in own]
    kept = {one["bom-ref"] for one in packages}
    edges = {edge["ref"]: edge.get("dependsOn", []) for edge in bill["dependencies"]}
    bill["components"] = packages + models
    bill["dependencies"] = [
        {"ref": SERVICE, "dependsOn": direct + [one["bom-ref"] for one in models]},
        *({"ref": ref, "dependsOn": [to for to in edges[ref] if to in kept]} for ref in sorted(kept)),
    ]
    return bill
