"""From the artifacts folder to verified bytes. Nothing is deserialised here but JSON.

    release.json -> version -> manifest, its signature -> every file read once, checked -> Artifact (bytes)

What is loaded later are these same bytes, so a file that changes on disk afterwards changes nothing.
"""

import hashlib
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.core.errors import ArtifactError
from app.core.manifest import VERSION_PATTERN, Manifest
from app.core.signatures import MAX_SIGNATURE_BYTES, SIGNATURE, verify
from app.schemas.contract import contract_outputs, contract_sha256, served_contract_sha256

RELEASE, MANIFEST = "release.json", "manifest.json"
MAX_JSON_BYTES = 2**24  # of release.json and of a manifest, the two files whose size nothing states
# How a file starts, by its name. No pickle, of whatever protocol or compression, starts like any of these.
STARTS: dict[str, bytes | tuple[bytes, ...]] = {
    ".onnx": b"\x08", ".skops": b"PK\x03\x04", ".json": (b"{", b"["), ".jsonl": b"{",
}  # fmt: skip


class Release(BaseModel):
    """`release.json`: which version serves, and which one to go back to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    serving: str = Field(pattern=VERSION_PATTERN)
    previous: str | None = Field(default=None, pattern=VERSION_PATTERN)
    shadow: str | None = Field(default=None, pattern=VERSION_PATTERN)
    canary: str | None = Field(default=None, pattern=VERSION_PATTERN)
    canary_percent: int = Field(default=0, ge=0, le=100)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified version: its manifest and the very bytes that were verified."""

    manifest: Manifest
    files: dict[str, bytes]

    @property
    def model_file(self) -> str:
        """The file the runtime loads."""
        runtime = self.manifest.runtime
        return "rules.json" if runtime == "rules" else f"model.{runtime}"

    @property
    def sha256(self) -> str:
        """sha256 of the model file, hex."""
        return self.manifest.files[self.model_file].sha256


def read_release(root: Path) -> Release:
    """The release that `root` names; raises ArtifactError."""
    path = root / RELEASE
    try:
        return Release.model_validate_json(_read(path))
    except ValidationError as error:
        raise ArtifactError(f"{path}: {_first(error)}") from None


def read_artifact(root: Path, version: str, trusted_keys: Sequence[str] = ()) -> Artifact:
    """Read and verify one version below `root`; raises ArtifactError, which names file and reason.

    With `trusted_keys`, the manifest must be signed by one of them; that is checked before it is parsed.
    """
    if not re.fullmatch(VERSION_PATTERN, version):
        raise ArtifactError(f"{root}: {version[:20]!r} is not a version name like v1")
    folder = root / version
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: there is no such version")
    if folder.resolve() != root.resolve() / version:
        raise ArtifactError(f"{folder}: is a link that leads out of its place in {root}")
    content = _read(folder / MANIFEST)
    if trusted_keys:
        _check_signature(folder, content, trusted_keys)
    manifest = _parse(folder, content)
    if manifest.version != version:
        raise ArtifactError(f"{folder / MANIFEST}: is of version {manifest.version}")
    files = _verified_files(folder, manifest)
    artifact = Artifact(manifest, files)
    if artifact.model_file not in files:
        raise ArtifactError(
            f"{folder / MANIFEST}: lists no {artifact.model_file}, which runtime {manifest.runtime} needs"
        )
    _check_contract(folder, manifest)
    return artifact


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the version in `folder`, not verified yet; raises ArtifactError."""
    return _parse(folder, _read(folder / MANIFEST))


def _parse(folder: Path, content: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(f"{folder / MANIFEST}: {_first(error)}") from None


def _check_signature(folder: Path, manifest: bytes, trusted_keys: Sequence[str]) -> None:
    path = folder / SIGNATURE
    if not path.exists():
        raise ArtifactError(f"{path}: is missing, and APP_TRUSTED_KEYS asks for a signature")
    if not verify(manifest, _read(path, size=MAX_SIGNATURE_BYTES), trusted_keys):
        raise ArtifactError(f"{path}: does not sign this {MANIFEST} with a key in APP_TRUSTED_KEYS")


def _verified_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    present = {path.name for path in folder.iterdir()} - {MANIFEST, SIGNATURE}
    if unlisted := sorted(present - manifest.files.keys()):
        raise ArtifactError(f"{folder / unlisted[0]}: not listed in {MANIFEST}")
    files = {}
    for name, entry in sorted(manifest.files.items()):
        if name not in present:
            raise ArtifactError(f"{folder / Path(name).name}: listed in {MANIFEST} but missing")
        content = _read(folder / name, size=entry.size)
        if len(content) != entry.size:
            raise ArtifactError(f"{folder / name}: size differs from the {entry.size} bytes in {MANIFEST}")
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise ArtifactError(f"{folder / name}: sha256 differs from {MANIFEST}")
        suffix = Path(name).suffix
        if suffix not in STARTS:
            raise ArtifactError(f"{folder / name}: cannot be loaded: a version holds {', '.join(STARTS)}")
        if not content.startswith(STARTS[suffix]):
            raise ArtifactError(f"{folder / name}: cannot be loaded: does not start like {suffix}")
        files[name] = content
    return files


def _check_contract(folder: Path, manifest: Manifest) -> None:
    outputs = {"task": manifest.task, "labels": manifest.outputs.labels}
    own = contract_sha256([entry.model_dump() for entry in manifest.inputs], outputs)
    if own != manifest.contract_sha256:
        raise ArtifactError(f"{folder / MANIFEST}: contract_sha256 does not match its own inputs and outputs")
    if own != served_contract_sha256():
        served = contract_outputs()["labels"]
        what = "labels differ" if served != manifest.outputs.labels else "inputs differ"
        raise ArtifactError(
            f"{folder / MANIFEST}: made for another contract than app/schemas/predict.py ({what})"
        )


def _read(path: Path, size: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a regular file; at most one more than `size`, enough to show that it is wrong."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ArtifactError(f"{path}: is no regular file but a link, a folder or a pipe")
        with path.open("rb") as file:
            return file.read(size + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or 'cannot be read'}") from None


def _first(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
