"""APP_TRUSTED_KEYS in the running service: at start, at a release, beside it, and for the fallback."""

from pathlib import Path
from typing import Any

import pytest

from lifecycle.release import new_key, sign
from tests.service.conftest import copied_artifacts, refusal, until
from tests.service.integration.test_artifacts import edit
from tests.service.integration.test_release import FAILURES, Start, add, events
from tests.service.integration.test_rollout import release


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with artifacts in which v1 serves, signed by key.pem."""
    copied_artifacts(tmp_path)
    return tmp_path


def test_a_start_without_a_valid_signature_is_refused(place: Path) -> None:
    """No signature, a stranger's, and one from before a change each stop the start with one line."""
    public, key, artifacts = new_key(place / "key.pem"), place / "key.pem", place / "artifacts"
    settings = {"artifacts_dir": artifacts, "trusted_keys": public}
    assert "v1/manifest.sig: is missing, and APP_TRUSTED_KEYS" in refusal(place, **settings)
    new_key(place / "stranger.pem")
    sign("v1", place / "stranger.pem", place)
    assert "v1/manifest.sig: does not sign this manifest.json" in refusal(place, **settings)
    sign("v1", key, place)
    edit(artifacts / "v1/manifest.json", lambda manifest: manifest["outputs"].update(review_threshold=0.0))
    assert "v1/manifest.sig: does not sign this manifest.json" in refusal(place, **settings)
    # The fallback is no way around it.
    assert "v0/manifest.sig: is missing" in refusal(place, fallback_version="v0", **settings)


def test_a_version_without_a_signature_is_refused_while_the_service_runs(start: Start, place: Path) -> None:
    """As release, shadow or canary it is refused by name and the served version stays; signed, it is used."""
    public, artifacts = new_key(place / "key.pem"), place / "artifacts"
    other = new_key(place / "other.pem")
    sign("v1", place / "key.pem", place)
    service = start(workers=1, artifacts_dir=artifacts, trusted_keys=f"{public},{other}")
    add(artifacts, "v2")  # a copy of v1, with the signature of v1
    for change in ({"shadow": "v2"}, {"canary": "v2", "canary_percent": 100}, {"serving": "v2"}):
        before = service.metrics()[FAILURES]
        release(artifacts, **({"serving": "v1", "shadow": None, "canary": None} | change))
        until(lambda: service.metrics()[FAILURES] > before, "the refusal")  # noqa: B023  # called at once
        assert service.predict().json()["model_version"] == "v1"

    def refused() -> list[dict[str, Any]]:
        return [line for line in service.lines() if line["event"] == "release refused"]

    until(lambda: {line["role"] for line in refused()} == {"shadow", "canary", "serving"}, "their lines")
    assert all("v2/manifest.sig: does not sign this manifest.json" in line["reason"] for line in refused())
    assert service.client.get("/ready").json()["model_version"] == "v1"
    sign("v2", place / "other.pem", place)
    until(lambda: events(service, "ready", "v2") == 1, "v2, signed by the second key")
    assert service.predict().json()["model_version"] == "v2"


def test_a_signed_fallback_stands_in(start: Start, place: Path) -> None:
    """A version without a signature at start is replaced by APP_FALLBACK_VERSION if that is signed."""
    public = new_key(place / "key.pem")
    sign("v0", place / "key.pem", place)
    settings = {"artifacts_dir": place / "artifacts", "trusted_keys": public, "fallback_version": "v0"}
    service = start(workers=1, **settings)
    line = until(
        lambda: next((one for one in service.lines() if one["event"] == "fallback serves"), None), "the line"
    )
    assert "v1/manifest.sig: is missing" in line["reason"]
    assert service.predict().json()["model_version"] == "v0"
