"""The commands of a release: their arguments and what they print. The modules beside this do the work."""

from pathlib import Path
from typing import Annotated

import typer

from lifecycle.files import ROOT
from lifecycle.release.signing import new_key as make_key
from lifecycle.release.signing import sign as sign_version

Version = Annotated[str, typer.Argument(help="The version, like v2.")]
Root = Annotated[Path, typer.Option(help="The service's folder.", hidden=True)]


def new_key(path: Annotated[Path, typer.Argument(help="Where to write the private key, in PEM.")]) -> None:
    """Make a key pair: the private key to sign versions with, the public key for APP_TRUSTED_KEYS."""
    public = make_key(path)
    typer.echo(
        f"{path}: private key without a password; keep it secret, and out of git\nAPP_TRUSTED_KEYS={public}"
    )


def sign(
    version: Version,
    key: Annotated[Path, typer.Option(help="The private key, as `new-key` writes it.")],
    root: Root = ROOT,
) -> None:
    """Sign a version with a private key, for services that run with APP_TRUSTED_KEYS."""
    public = sign_version(version, key, root)
    typer.echo(f"artifacts/{version}/manifest.sig: signed by {public}")
