"""The capability `object-store`: APP_ARTIFACTS_DIR takes addresses, without credentials in them.

docs/object-store.md <-> app/object_store/
"""

from pathlib import Path

import pytest

from app.settings import SettingsError, load_settings
from tests.conftest import ROOT, run


@pytest.mark.parametrize(
    "place", ["s3://bucket/models", "gs://bucket", "az://models/a", "https://host:8443/a"]
)
def test_artifacts_may_be_elsewhere(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """An address is kept as it was given, and a folder is still a folder."""
    monkeypatch.setenv("APP_ARTIFACTS_DIR", place)
    assert load_settings().artifacts_dir == place
    monkeypatch.setenv("APP_ARTIFACTS_DIR", "artifacts")
    assert load_settings().artifacts_dir == Path("artifacts")


@pytest.mark.parametrize(
    "place", ["https://user:secret@host/a", "https://host/a?sig=secret", "ftp://host/secret"]
)
def test_an_address_with_credentials_is_refused(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The message names the variable and does not show the address."""
    monkeypatch.setenv("APP_ARTIFACTS_DIR", place)
    with pytest.raises(SettingsError, match="APP_ARTIFACTS_DIR") as refused:
        load_settings()
    assert "secret" not in str(refused.value)


def test_a_private_address_is_refused_unless_allowed(tmp_path: Path) -> None:
    """Loopback, as an example of an address inside, is not connected to by default; one line says so."""
    done = run(
        tmp_path, "app", "predict", str(ROOT / "docs/example.json"), artifacts_dir="https://127.0.0.1:1/a"
    )
    assert done.returncode != 0
    assert "APP_ARTIFACTS_ALLOW_PRIVATE" in done.stderr
    assert "Traceback" not in done.stderr
