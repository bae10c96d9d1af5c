"""From the artifacts folder to verified bytes. Only JSON is parsed here.

    release.json -> version -> manifest, its signature -> every file read once, checked -> Artifact (bytes)

The runtime later loads these same bytes, so a file that changes on disk afterwards has no effect.
"""

import hashlib
import operator
import re
import stat
from base64 import b64decode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.core.errors import ArtifactError
from app.schemas.contract import contract_outputs, contract_sha256, served_contract_sha256

RELEASE, MANIFEST = "release.json", "manifest.json"
OWN = Path(__file__).parents[1] / "own"
MAX_JSON_BYTES = 2**24  # of release.json and manifest.json, whose sizes are not recorded
# First bytes by file name. No pickle, in any protocol or compression, starts with any of these.
STARTS: dict[str, bytes | tuple[bytes, ...]] = {
    ".onnx": b"\x08", ".skops": b"PK\x03\x04", ".json": (b"{", b"["), ".jsonl": b"{",
}  # fmt: skip
SIGNATURE, MAX_SIGNATURE_BYTES = "manifest.sig", 256  # base64 of 64 bytes, and a line end
VERSION_PATTERN = r"^v[0-9]{1,9}$"
_EXACT = re.compile(r"[0-9]+(\.[0-9]+)+[0-9A-Za-z.+-]*")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Document = TypeVar("_Document", bound=BaseModel)
_Value = TypeVar("_Value")
_Optional = Annotated[_Value, Field(exclude_if=operator.not_)]  # left out of the JSON if empty


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """One file of the version folder."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0, description="bytes")]


class Input(_Strict):
    """One feature, in the model's order."""

    name: str
    dtype: Literal["float64", "int64", "string", "bool"]
    unit: str | None = None
    description: str = ""
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None
    training_range: tuple[float, float] | None = None
    categories: list[bool | int | str] | None = None
    example: Any = None


class Threshold(_Strict):
    """The answer of a binary classifier is `label` where its probability is at least `least`."""

    label: bool | int | str
    least: Annotated[float, Field(ge=0, le=1)]


class Outputs(_Strict):
    """Answers of the model."""

    labels: list[bool | int | str] = []
    # The model's own name for each label, if different: 0, 1 and 2 of a LabelEncoder.
    classes: _Optional[list[bool | int | str]] = []
    threshold: _Optional[Threshold | None] = None  # None: the most probable label, the first one of a tie
    score: str = ""  # its meaning, in a sentence
    value: _Optional[str] = ""  # a regressor's: meaning, unit
    review_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    # Maximum distance between a regressor's value and the fed back truth to count as correct.
    feedback_tolerance: Annotated[float, Field(ge=0, exclude_if=operator.not_)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.classes and len(self.classes) != len(self.labels):
            raise ValueError("classes: not as many as labels")
        if self.threshold and (self.threshold.label not in self.labels or len(self.labels) != 2):
            raise ValueError("threshold: not of one of two labels")
        return self


class Training(_Strict):
    """Where the model came from. `time` is the time of the data, so that a re-run gives the same bytes."""

    data_sha256: Sha256
    rows: int
    date_range: tuple[str, str] | None = None
    query: str | None = None
    target: str
    code_revision: str
    time: str | None = None


class Manifest(_Strict):
    """`manifest.json`."""

    name: str
    version: Annotated[str, Field(pattern=VERSION_PATTERN)]
    task: Literal["classification", "regression"]
    runtime: Literal["onnx", "skops", "rules"]
    files: dict[str, FileEntry]
    inputs: list[Input]
    outputs: Outputs
    training: Training | None
    libraries: dict[str, str]
    # Types that a skops model may contain; others are refused.
    trusted_types: _Optional[list[str]] = []
    # sha256 of the files in app/own that this version was made with; a service with other files refuses it.
    code: _Optional[dict[str, Sha256]] = {}
    # The input of a skops model: a DataFrame, a 2-d array, or its only column as a 1-d array.
    takes: _Optional[Literal["frame", "array", "column"] | None] = None
    # Unusual pandas types of a frame's columns; a list holds the categories in order.
    dtypes: _Optional[dict[str, str | list[bool | int | str]]] = {}
    # The two files of a split model, in the order in which they run.
    stages: _Optional[list[Literal["model.skops", "model.onnx"]]] = []
    contract_sha256: Sha256

    @property
    def unpinned(self) -> str:
        """The missing part to trace or rebuild the model, or ""; a rules model is its own source."""
        if self.runtime == "rules":
            return ""
        if self.training is None:
            return "`training`"
        exact = bool(self.libraries) and all(_EXACT.fullmatch(one) for one in self.libraries.values())
        return "" if exact else "`libraries`, each of one exact version"


def verify(manifest: bytes, signature: bytes, trusted: Sequence[str]) -> bool:
    """Whether `signature`, the content of manifest.sig, is a trusted key's signature of `manifest`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    for key in trusted:
        with suppress(InvalidSignature, ValueError):  # ValueError: not base64
            raw = b64decode(signature.strip(), validate=True)
            Ed25519PublicKey.from_public_bytes(b64decode(key)).verify(raw, manifest)
            return True
    return False


class Release(_Strict):
    """`release.json`: the versions that serve, that a rollback restores, and that are tried."""

    serving: str = Field(pattern=VERSION_PATTERN)
    previous: str | None = Field(default=None, pattern=VERSION_PATTERN)
    shadow: str | None = Field(default=None, pattern=VERSION_PATTERN)
    canary: str | None = Field(default=None, pattern=VERSION_PATTERN)
    canary_percent: int = Field(default=0, ge=0, le=100)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified version: its manifest and the bytes that were verified."""

    manifest: Manifest
    files: dict[str, bytes]

    @property
    def model_files(self) -> Sequence[str]:
        """The files that the runtime loads, in the order in which they run."""
        runtime = self.manifest.runtime
        return self.manifest.stages or ["rules.json" if runtime == "rules" else f"model.{runtime}"]

    @property
    def model_file(self) -> str:
        """The file that gives the answers."""
        return self.model_files[-1]

    @property
    def sha256(self) -> str:
        """sha256 of the file that gives the answers, hex."""
        return self.manifest.files[self.model_file].sha256


def read_release(root: Path) -> Release:
    """The content of release.json in `root`; raises ArtifactError."""
    return _parse(Release, root / RELEASE, _read(root / RELEASE))


def read_artifact(root: Path, version: str, trusted_keys: Sequence[str] = ()) -> Artifact:
    """Read and verify a version below `root`; raises ArtifactError, which names file and reason.

    With `trusted_keys`, one of them must have signed the manifest; this is checked before parsing it.
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
        path = folder / SIGNATURE
        if not path.exists():
            raise ArtifactError(f"{path}: is missing, and APP_TRUSTED_KEYS asks for a signature")
        if not verify(content, _read(path, size=MAX_SIGNATURE_BYTES), trusted_keys):
            raise ArtifactError(f"{path}: does not sign this {MANIFEST} with a key in APP_TRUSTED_KEYS")
    manifest = _parse(Manifest, folder / MANIFEST, content)
    if manifest.version != version:
        raise ArtifactError(f"{folder / MANIFEST}: is of version {manifest.version}")
    artifact = Artifact(manifest, _verified_files(folder, manifest))
    if reason := _mismatch(artifact):
        raise ArtifactError(f"{folder / MANIFEST}: {reason}")
    served = own_code() if manifest.code else {}
    if differing := sorted(name for name, sha256 in manifest.code.items() if served.get(name) != sha256):
        reason = f"is not what {version} was made with: restore it, or import the model again"
        raise ArtifactError(f"app/own/{differing[0]}: {reason}")
    return artifact


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the version in `folder`, not verified yet; raises ArtifactError."""
    return _parse(Manifest, folder / MANIFEST, _read(folder / MANIFEST))


def _verified_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    present = {path.name for path in folder.iterdir()} - {MANIFEST, SIGNATURE}
    if unlisted := sorted(present - manifest.files.keys()):
        raise ArtifactError(f"{folder / unlisted[0]}: not listed in {MANIFEST}")
    files = {}
    for name, entry in sorted(manifest.files.items()):
        path = folder / Path(name).name
        if name not in present:
            advice = f"if it was never committed, `git check-ignore -v {path}` says why"
            raise ArtifactError(f"{path}: listed in {MANIFEST} but missing; {advice}")
        content = _read(path, size=entry.size)
        if len(content) != entry.size:
            raise ArtifactError(f"{path}: size differs from the {entry.size} bytes in {MANIFEST}")
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise ArtifactError(f"{path}: sha256 differs from {MANIFEST}")
        if not content.startswith(STARTS.get(path.suffix, ())):
            known = ", ".join(STARTS)
            reason = f"does not start like one of the files that a version holds: {known}"
            raise ArtifactError(f"{path}: cannot be loaded: {reason}")
        files[name] = content
    return files


def own_code() -> dict[str, str]:
    """sha256 of each file in app/own that models use, by path."""
    shared = (path for path in sorted(OWN.rglob("*.py")) if path != OWN / "lookup.py")
    contents = {path.relative_to(OWN).as_posix(): path.read_text("utf-8").encode() for path in shared}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _mismatch(artifact: Artifact) -> str:
    """Why a manifest does not fit its files, itself or the contract, or an empty string."""
    manifest = artifact.manifest
    if missing := [name for name in artifact.model_files if name not in artifact.files]:
        return f"lists no {missing[0]}, which runtime {manifest.runtime} needs"
    outputs = {"task": manifest.task, "labels": manifest.outputs.labels}
    own = contract_sha256([entry.model_dump() for entry in manifest.inputs], outputs)
    if own != manifest.contract_sha256:
        return "contract_sha256 does not match its own inputs and outputs"
    if own != served_contract_sha256():
        what = "inputs" if contract_outputs()["labels"] == manifest.outputs.labels else "labels"
        return f"made for another contract than app/schemas/predict.py ({what} differ)"
    return ""


def _read(path: Path, size: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file; at most `size` + 1 bytes, enough to see that it is too large."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ArtifactError(f"{path}: is no regular file but a link, a folder or a pipe")
        with path.open("rb") as file:
            return file.read(size + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or 'cannot be read'}") from None


def _parse(kind: type[_Document], path: Path, content: bytes) -> _Document:
    """The content of a JSON file; raises ArtifactError with the first violation."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {where}{': ' if where else ''}{first['msg']}") from None
