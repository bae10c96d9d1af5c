"""Signed manifests: an Ed25519 signature over the bytes of manifest.json, kept beside it in manifest.sig.

manifest.json, manifest.sig, APP_TRUSTED_KEYS -> True or False

A manifest names the sha256 of every other file, so its signature covers the whole version. A public key and a
signature are text: the base64 of 32 and of 64 bytes. cryptography is imported only when keys are set.
"""

from base64 import b64decode
from collections.abc import Sequence
from contextlib import suppress

SIGNATURE = "manifest.sig"
MAX_SIGNATURE_BYTES = 256  # base64 of 64 bytes, and a line end


def verify(manifest: bytes, signature: bytes, trusted: Sequence[str]) -> bool:
    """Whether `signature`, the content of manifest.sig, was made of these very bytes by a trusted key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        raw = b64decode(signature.strip(), validate=True)
    except ValueError:
        return False
    for key in trusted:
        with suppress(InvalidSignature):
            Ed25519PublicKey.from_public_bytes(b64decode(key)).verify(raw, manifest)
            return True
    return False
