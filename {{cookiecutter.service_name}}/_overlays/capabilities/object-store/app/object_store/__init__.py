"""The capability `object-store`: artifacts from an object store or a web server.

    APP_ARTIFACTS_DIR=s3://bucket/prefix -> a process that fetches -> private folder -> the usual verification

A separate process fetches, because the caller will fork and must have no threads, which obstore starts, and
because an alarm can end the process at any time.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from app.core.errors import ArtifactError
from app.object_store.settings import Settings

REFUSED = 3  # exit code of the process: its last line is the reason, otherwise the object it was fetching


def install(app: Any, service: Any) -> None:
    """Add nothing to the application: artifacts are read before it is created."""


@contextmanager
def local_folder(settings: Settings, version: str | None) -> Iterator[Path]:
    """A temporary private copy of `version`, or of the version that release.json names.

    Raises ArtifactError; errors raised inside get the address in place of the copy's path.
    """
    place = str(settings.artifacts_dir).rstrip("/")
    with TemporaryDirectory(prefix="artifacts-") as folder:  # readable only by this user
        flags = [str(int(settings.artifacts_allow_private)), str(int(bool(settings.trusted_keys)))]
        command = [sys.executable, "-m", "app.object_store.fetch", place, version or "", folder, *flags]
        project = Path(__file__).resolve().parents[2]
        # Pass on only our own messages: those of libraries and servers may hold credentials.
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            said = (done.stdout.splitlines() or [""])[-1]
            late = done.returncode == -signal.SIGALRM
            reason = f"{said}: {'takes too long' if late else 'cannot be fetched'}"
            raise ArtifactError(f"{place}/{said if done.returncode == REFUSED else reason}")
        try:
            yield Path(folder)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(folder, place)) from None
