"""Signed versions: a service with trusted keys reads nothing that none of them signed."""

import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from typer.testing import CliRunner

from app.core.errors import ArtifactError
from app.core.store import read_artifact
from app.settings import SettingsError, load_settings
from lifecycle.__main__ import commands
from lifecycle.command import LifecycleError
from lifecycle.package import differing
from lifecycle.release import new_key, sign
from tests.service.conftest import copied_artifacts
from tests.service.integration.test_artifacts import edit, flip, rewrite
from tests.service.where import ROOT


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A service's folder with a copy of the artifacts, in which v1 serves."""
    copied_artifacts(tmp_path)
    return tmp_path


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, str]:
    """A private key's file and the public key."""
    path = tmp_path / "key.pem"
    return path, new_key(path)


def test_a_version_is_read_only_with_a_signature_by_a_trusted_key(place: Path, key: tuple[Path, str]) -> None:
    """Signed by the trusted key a version is read; signed by a stranger's key it is refused by name."""
    stranger = place / "stranger.pem"
    other = new_key(stranger)
    assert sign("v1", stranger, place) == other
    with pytest.raises(
        ArtifactError, match=r"v1/manifest\.sig: does not sign this manifest\.json with a key"
    ):
        read_artifact(place / "artifacts", "v1", [key[1]])
    assert sign("v1", key[0], place) == key[1]
    assert read_artifact(place / "artifacts", "v1", [key[1]]).manifest.version == "v1"


def test_without_trusted_keys_a_signature_is_allowed_and_ignored(place: Path, key: tuple[Path, str]) -> None:
    """manifest.sig may lie in the folder, whatever it holds; it is no difference to the version's files."""
    before = read_artifact(place / "artifacts", "v1")
    files = {path.name: path.read_bytes() for path in (place / "artifacts" / "v1").iterdir()}
    sign("v1", key[0], place)
    assert differing(place / "artifacts" / "v1", files) == []
    (place / "artifacts" / "v1" / "manifest.sig").write_bytes(b"nonsense")
    assert read_artifact(place / "artifacts", "v1") == before


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda v1: (v1 / "manifest.sig").unlink(), r"v1/manifest\.sig: is missing, and APP_TRUSTED_KEYS"),
        (lambda v1: (v1 / "manifest.sig").write_bytes(b""), r"v1/manifest\.sig: does not sign"),
        (lambda v1: (v1 / "manifest.sig").write_bytes(b"\xff\x00"), r"v1/manifest\.sig: does not sign"),
        (lambda v1: (v1 / "manifest.sig").write_bytes(b"A" * 10_000), r"v1/manifest\.sig: does not sign"),
        (lambda v1: flip(v1 / "manifest.sig"), r"v1/manifest\.sig: does not sign"),
        (lambda v1: edit(v1 / "manifest.json", lambda one: None), r"v1/manifest\.sig: does not sign"),
        (lambda v1: (v1 / "manifest.json").write_text("{"), r"v1/manifest\.sig: does not sign"),
        (lambda v1: rewrite(v1, "model.onnx", b"\x08other"), r"v1/manifest\.sig: does not sign"),
        (lambda v1: shutil.copy(v1.parent / "v0/manifest.sig", v1), r"v1/manifest\.sig: does not sign"),
        (
            lambda v1: [shutil.copy(v1.parent / "v0" / f"manifest.{one}", v1) for one in ("sig", "json")],
            r"v1/manifest\.json: is of version v0",
        ),
        (lambda v1: flip(v1 / "model.onnx"), r"v1/model\.onnx: sha256 differs"),
    ],
    ids=[
        "missing", "empty", "no text", "too long", "altered", "manifest written again", "manifest is no JSON",
        "model and manifest altered", "of another version", "with the manifest of another version",
        "model altered",
    ],
)  # fmt: skip
def test_what_was_not_signed_is_refused(
    place: Path, key: tuple[Path, str], spoil: Callable[[Path], object], reason: str
) -> None:
    """A missing, altered or foreign signature, and any change of signed bytes, is refused by name."""
    sign("v0", key[0], place)
    sign("v1", key[0], place)
    spoil(place / "artifacts" / "v1")
    with pytest.raises(ArtifactError, match=reason):
        read_artifact(place / "artifacts", "v1", [key[1]])


def test_keys_are_rotated_with_two_of_them(place: Path, key: tuple[Path, str]) -> None:
    """While both keys are trusted, versions signed by either are read; then only those of the new key."""
    old, new = key[1], new_key(place / "new.pem")
    sign("v0", key[0], place)
    sign("v1", place / "new.pem", place)
    for version in ("v0", "v1"):
        assert read_artifact(place / "artifacts", version, [old, new])
    assert read_artifact(place / "artifacts", "v1", [new])
    with pytest.raises(ArtifactError, match=r"v0/manifest\.sig: does not sign"):
        read_artifact(place / "artifacts", "v0", [new])
    sign("v0", place / "new.pem", place)
    assert read_artifact(place / "artifacts", "v0", [new])


def test_the_commands_make_a_key_and_a_signature(place: Path) -> None:
    """`new-key` prints the public key as APP_TRUSTED_KEYS takes it, and never overwrites; `sign` uses it."""
    made = CliRunner().invoke(commands, ["new-key", str(place / "key.pem")])
    assert made.exit_code == 0
    setting, _, public = made.output.splitlines()[-1].partition("=")
    assert setting == "APP_TRUSTED_KEYS"
    if sys.platform != "win32":
        assert stat.S_IMODE((place / "key.pem").stat().st_mode) == 0o600
    again = CliRunner().invoke(commands, ["new-key", str(place / "key.pem")])
    assert (again.exit_code, again.output) == (1, f"new-key: {place / 'key.pem'}: File exists\n")
    given = ["sign", "v1", "--key", str(place / "key.pem"), "--root", str(place)]
    assert CliRunner().invoke(commands, given).exit_code == 0
    assert read_artifact(place / "artifacts", "v1", [public])


@pytest.mark.parametrize(
    "content",
    [
        b"no key",
        Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password")
        ),
        Ed25519PrivateKey.generate().private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()),
    ],
    ids=["no PEM", "with a password", "raw"],
)
def test_a_file_without_a_private_key_signs_nothing(place: Path, content: bytes) -> None:
    """One line names the file."""
    (place / "key.pem").write_bytes(content)
    with pytest.raises(LifecycleError, match=r"key\.pem: holds no Ed25519 private key"):
        sign("v1", place / "key.pem", place)
    assert not (place / "artifacts/v1/manifest.sig").exists()


def test_a_damaged_version_is_not_signed(place: Path, key: tuple[Path, str]) -> None:
    """A signature says that the version is whole: one with a damaged file gets none."""
    flip(place / "artifacts/v1/model.onnx")
    with pytest.raises(ArtifactError, match="sha256 differs"):
        sign("v1", key[0], place)
    assert not (place / "artifacts/v1/manifest.sig").exists()


@pytest.mark.parametrize("keys", ["s3cr3t", ",", "c2hvcnQ=", f"{'A' * 43}=,s3cr3t", f"{'!' * 43}="])
def test_a_setting_that_holds_no_public_keys_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: str
) -> None:
    """One line names APP_TRUSTED_KEYS and hides its value; a list without a key is not the same as none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APP_TRUSTED_KEYS", keys)
    with pytest.raises(SettingsError, match=r"^APP_TRUSTED_KEYS: (must be|is set)") as refused:
        load_settings()
    assert not any(part in str(refused.value) for part in keys.split(",") if part)


def test_a_comma_after_the_last_key_adds_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A list that ends in a comma has the keys before it, so it still refuses what they did not sign."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APP_TRUSTED_KEYS", f"{'A' * 43}=,")
    assert load_settings().trusted_keys == (f"{'A' * 43}=",)


def test_cryptography_is_loaded_only_for_trusted_keys() -> None:
    """A service without APP_TRUSTED_KEYS does not wait for the import of cryptography."""
    program = (
        "import sys; from pathlib import Path; from app.core.store import read_artifact, read_release;"
        "read_artifact(Path('artifacts'), read_release(Path('artifacts')).serving);"
        "print('cryptography' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
