"""Fetches a version into a folder; `local_folder` runs it in a separate process.

    release.json -> v1/manifest.json, and its signature if required -> the listed files

obstore knows the clouds: the address of a bucket, and the credentials in the variables of the SDKs. But it
follows redirects and connects to any address that a name resolves to. So it only signs the address of each
object, and this module fetches the object.
"""

import http.client
import re
import shutil
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import timedelta
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from app.core.errors import ArtifactError
from app.core.store import (
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_SIGNATURE_BYTES,
    RELEASE,
    SIGNATURE,
    read_manifest,
    read_release,
)
from app.object_store import REFUSED

SECONDS = 4  # in total, plus the time for the files at this minimum speed:
BYTES_PER_SECOND = 2**20
CONNECT_SECONDS = 3
SIGNED_FOR = timedelta(minutes=5)
PLAIN = re.compile(r"\w[\w.-]*")


class Unavailable(Exception):
    """An object cannot be fetched; the message is the reason, in our own words."""


def fetch_version(place: str, version: str, folder: Path, allow_private: bool, signed: bool) -> None:
    """Fetch `version`, or the served version, into `folder`; an alarm ends a process that takes too long."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    started, address = monotonic(), addresses(place)

    def fetch(name: str, limit: int) -> None:
        print(name, flush=True)  # noqa: T201  # the parent reports it if this process is ended
        try:
            _fetch(address(name), folder / name, limit, allow_private)
        except Unavailable as error:
            raise ArtifactError(f"{name}: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            raise ArtifactError(f"{name}: cannot be fetched ({type(error).__name__})") from None

    if not version:
        fetch(RELEASE, MAX_JSON_BYTES)
        version = read_release(folder).serving
    (folder / version).mkdir()
    fetch(f"{version}/{MANIFEST}", MAX_JSON_BYTES)
    if signed:
        fetch(f"{version}/{SIGNATURE}", MAX_SIGNATURE_BYTES)
    listed = read_manifest(folder / version).files.items()
    # Skip unsafe names; verification then reports them missing.
    sizes = {
        name: entry.size
        for name, entry in listed
        if PLAIN.fullmatch(name) and name not in (MANIFEST, SIGNATURE)
    }
    total = sum(sizes.values())
    if total > shutil.disk_usage(folder).free:
        raise ArtifactError(f"{version}/{MANIFEST}: lists more than there is room for")
    left = SECONDS + total / BYTES_PER_SECOND - (monotonic() - started)
    signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))
    for name, size in sizes.items():
        fetch(f"{version}/{name}", size)


def addresses(place: str) -> Callable[[str], SplitResult]:
    """A function from an object's name to its address, signed if necessary."""
    if place.startswith("https:"):
        return lambda name: urlsplit(f"{place}/{quote(name)}")
    import obstore
    from obstore.store import from_url

    def signed(name: str) -> SplitResult:
        try:
            store: Any = from_url(place, retry_config={"max_retries": 0})
            return urlsplit(obstore.sign(store, "GET", name, SIGNED_FOR))
        except Exception as error:
            reason = f"cannot be signed for ({type(error).__name__}): see the credentials in the environment"
            raise Unavailable(reason) from None

    return signed


def _fetch(address: SplitResult, target: Path, limit: int, allow_private: bool) -> None:
    """GET `address` into `target`, at most `limit` bytes."""
    secure = address.scheme == "https"
    host, port = address.hostname or "", address.port or (443 if secure else 80)
    protocol = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    with closing(protocol(host, port)) as connection:
        connection.sock = _connect(host, port, secure, allow_private)
        connection.request("GET", address.path + (f"?{address.query}" if address.query else ""))
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise Unavailable(_status(response.status))
        left = limit + 1
        with target.open("xb") as file:
            while left and (chunk := response.read(min(left, 2**20))):
                file.write(chunk)
                left -= len(chunk)
        if not left:
            raise Unavailable(f"is larger than the {limit} bytes it may have")
        if response.length:
            raise Unavailable("ends early")


def _status(status: int) -> str:
    if status in (301, 302, 303, 307, 308):
        return f"is answered with a redirect ({status}), which is not followed"
    words = {401: "access is denied", 403: "access is denied", 404: "there is no such object"}
    return f"{words.get(status, 'is answered with an error')} ({status})"


def _connect(host: str, port: int, secure: bool, allow_private: bool) -> socket.socket:
    """A connection to a checked address; a second DNS look-up could give another address."""
    found = dict.fromkeys(str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    for one in found:
        check_address(one, secure, allow_private)
    plain = _first_open(found, port)
    plain.settimeout(None)  # the alarm ends this process
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain


def _first_open(found: Iterable[str], port: int) -> socket.socket:
    failure = OSError()
    for one in found:
        try:
            return socket.create_connection((one, port), CONNECT_SECONDS)
        except OSError as error:
            failure = error
    raise failure


def check_address(address: str, secure: bool, allow_private: bool) -> None:
    """Raise Unavailable for a private address, unless allowed, and for a public one without encryption."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    if not ip.is_global and not allow_private:
        raise Unavailable(f"is at a private address ({ip}), and APP_ARTIFACTS_ALLOW_PRIVATE is not set")
    if ip.is_global and not secure:
        raise Unavailable("is offered without encryption by a public address")


if __name__ == "__main__":
    url, wanted, into, private, with_signature = sys.argv[1:]
    try:
        fetch_version(url, wanted, Path(into), private == "1", with_signature == "1")
    except ArtifactError as refusal:
        print(str(refusal).removeprefix(f"{into}/"))  # noqa: T201
        sys.exit(REFUSED)
