"""Signatures of versions, for services that run with APP_TRUSTED_KEYS.

new_key -> private key (PEM), public key for APP_TRUSTED_KEYS
sign: a whole version, private key -> artifacts/v2/manifest.sig, the base64 of an Ed25519 signature
"""

import os
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING

from app.core.store import MANIFEST, SIGNATURE, read_artifact
from lifecycle.errors import LifecycleError
from lifecycle.files import write_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def new_key(path: Path) -> str:
    """Write a private key to `path`, which must not exist; returns the public key for APP_TRUSTED_KEYS."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    return public_key(key)


def sign(version: str, key: Path, root: Path) -> str:
    """Sign the manifest of `version` in `root`/artifacts, after its files were verified.

    `key` is a PEM file with an Ed25519 private key. An older signature is replaced. Returns the public key.
    Raises ArtifactError for a version that is not whole, LifecycleError for a file that holds no such key.
    """
    folder = root / "artifacts" / version
    read_artifact(root / "artifacts", version)
    private = read_key(key)
    signature = private.sign((folder / MANIFEST).read_bytes())
    write_file(folder / SIGNATURE, b64encode(signature) + b"\n")
    return public_key(private)


def read_key(path: Path) -> "Ed25519PrivateKey":
    """The private key in a PEM file without a password; raises LifecycleError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError):  # no PEM, or one with a password
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise LifecycleError(f"{path}: holds no Ed25519 private key in PEM without a password")
    return key


def public_key(private: "Ed25519PrivateKey") -> str:
    """The public key as APP_TRUSTED_KEYS takes it: the base64 of its 32 bytes."""
    return b64encode(private.public_key().public_bytes_raw()).decode()
