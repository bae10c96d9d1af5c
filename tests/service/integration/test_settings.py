"""Configuration: what is wrong stops the start with one line that names the variable and hides the value."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import (
    EXAMPLE,
    INPUTS,
    LABELS,
    NUMBER,
    WITH_NUMBER,
    Service,
    copied_artifacts,
    number,
    refusal,
    run,
    serving,
)
from tests.service.integration.test_http import assert_problem

SECRET = "s3cr3t"  # noqa: S105  # stands for what somebody put into the wrong variable
Start = Callable[..., Service]


@pytest.mark.parametrize(
    ("settings", "variable"),
    [
        ({"wrokers": SECRET}, "APP_WROKERS"),
        ({"port": SECRET}, "APP_PORT"),
        ({"port": 70000}, "APP_PORT"),
        ({"env": SECRET}, "APP_ENV"),
        ({"max_body_bytes": "1 MB " + SECRET}, "APP_MAX_BODY_BYTES"),
        ({"review_threshold": 1.5}, "APP_REVIEW_THRESHOLD"),
        ({"out_of_range": SECRET}, "APP_OUT_OF_RANGE"),
        ({"model_version": "../" + SECRET}, "APP_MODEL_VERSION"),
        ({"model_version": "latest"}, "APP_MODEL_VERSION"),
        ({"request_deadline_seconds": 30, "drain_seconds": 25}, "APP_REQUEST_DEADLINE_SECONDS"),
        ({"request_deadline_seconds": 0}, "APP_REQUEST_DEADLINE_SECONDS"),
        ({"env": "production"}, "APP_API_KEYS"),
        ({"api_keys": SECRET}, "APP_API_KEYS"),
        ({"api_keys": sha256(b"").hexdigest() + "," + SECRET}, "APP_API_KEYS"),
        ({"api_keys": sha256(b"\n").hexdigest()}, "APP_API_KEYS"),
        ({"batch_max_wait_ms": 1000, "request_deadline_seconds": 1}, "APP_BATCH_MAX_WAIT_MS"),
        ({"env": "production", "auth_disabled": "true", "drain_seconds": 9}, "APP_DRAIN_SECONDS"),
        ({"trusted_proxies": f"10.0.0.0/8,{SECRET}"}, "APP_TRUSTED_PROXIES"),
        ({"trusted_proxies": "*"}, "APP_TRUSTED_PROXIES"),
        ({"trusted_proxies": "10.0.0.1/8"}, "APP_TRUSTED_PROXIES"),
        ({"tracing_endpoint": f"http://user:{SECRET}@collector:4318"}, "APP_TRACING_ENDPOINT"),
        ({"rate_limit": SECRET}, "APP_RATE_LIMIT"),
        ({"rate_limit": "600/minute", "workers": 2}, "APP_RATE_LIMIT_STORAGE"),
        (
            {"rate_limit": "600/minute", "workers": 2, "rate_limit_storage": "memory://x"},
            "APP_RATE_LIMIT_STORAGE",
        ),
        ({"rate_limit_storage": f"redis://localhost:{SECRET}"}, "APP_RATE_LIMIT_STORAGE"),
        (
            {"rate_limit": "600/minute", "rate_limit_storage": f"carrier-pigeon://{SECRET}"},
            "APP_RATE_LIMIT_STORAGE",
        ),
    ],
    ids=str,
)
def test_a_wrong_setting_stops_the_start(tmp_path: Path, settings: dict[str, object], variable: str) -> None:
    """The service does not come up; one line names the variable, and no line shows the value."""
    line = refusal(tmp_path, **settings)
    assert variable in line
    assert SECRET not in line


def test_only_one_setting_says_how_many_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More workers than APP_WORKERS says, each with a quota of its own, are refused."""
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--workers 3")
    assert "APP_WORKERS" in refusal(tmp_path, workers=1, rate_limit="600/minute")


@pytest.mark.parametrize("host", ["::1", "::"])
def test_an_address_may_be_one_of_ipv6(start: Start, host: str) -> None:
    """APP_HOST takes both kinds of addresses, as they are written everywhere else."""
    service = start(workers=1, host=host)
    assert service.predict().status_code == 200
    assert "[" in service.url


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training": None}, "training"),
        ({"libraries": {}}, "libraries"),
        ({"libraries": {"onnxruntime": ">=1.31"}}, "libraries"),
        ({"libraries": {"onnxruntime": "latest"}}, "libraries"),
    ],
    ids=str,
)
def test_production_serves_only_what_is_pinned(tmp_path: Path, change: dict[str, object], named: str) -> None:
    """A model that does not say what it was made from, and with which releases, is refused in production."""
    artifacts = copied_artifacts(tmp_path)
    manifest = artifacts / "v1" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    settings: dict[str, Any] = {"artifacts_dir": artifacts, "auth_disabled": "true"}
    line = refusal(tmp_path, env="production", **settings)
    assert "v1" in line
    assert named in line
    (artifacts / "release.json").unlink()
    assert "release.json" in refusal(tmp_path, env="production", **settings)
    with serving(tmp_path, workers=1, env="production", model_version="v0", **settings) as service:
        assert service.client.get("/ready").json()["model_version"] == "v0"


def test_a_wrong_line_in_env_file_stops_the_start(tmp_path: Path) -> None:
    """A typing error in `.env` is found like one in the environment."""
    (tmp_path / ".env").write_text(f"APP_LOG_LEVLE={SECRET}\n")
    line = refusal(tmp_path)
    assert "APP_LOG_LEVLE" in line
    assert SECRET not in line


def test_the_env_file_sets_what_the_environment_does_not(tmp_path: Path) -> None:
    """A variable in `.env` counts, and gives way to the environment."""
    (tmp_path / ".env").write_text("APP_MAX_QUEUE=7\nAPP_DRAIN_SECONDS=70\n")
    config = json.loads(run(tmp_path, "app", "config", drain_seconds=71).stdout)
    assert (config["APP_MAX_QUEUE"], config["APP_DRAIN_SECONDS"]) == (7, 71)


def test_config_shows_everything_but_secrets(tmp_path: Path) -> None:
    """`python -m app config` prints every setting in effect; keys and passwords are redacted."""
    digest = sha256(SECRET.encode()).hexdigest()
    storage = f"redis://:{SECRET}@localhost:6379"
    done = run(tmp_path, "app", "config", api_keys=digest, rate_limit="9/second", rate_limit_storage=storage)
    config = json.loads(done.stdout)
    assert (config["APP_PORT"], config["APP_ENV"], config["APP_RATE_LIMIT"]) == (8000, "local", "9/second")
    assert not [secret for secret in (digest, SECRET) if secret in done.stdout + done.stderr]


def test_config_refuses_like_the_service(tmp_path: Path) -> None:
    """The command that shows the configuration finds the same faults, in the same words."""
    done = run(tmp_path, "app", "config", port=SECRET)
    assert done.returncode != 0
    assert "APP_PORT" in done.stderr
    assert SECRET not in done.stdout + done.stderr


@WITH_NUMBER
@pytest.mark.parametrize(("policy", "action"), [("accept", "accept"), ("review", "review")])
def test_a_value_outside_the_training_range_is_the_operator_s_choice(
    start: Start, policy: str, action: str
) -> None:
    """Such a value is let through or marked for review, as APP_OUT_OF_RANGE says."""
    step = 1 if INPUTS[NUMBER]["dtype"] == "int64" else 0.01 * (number(1) - number(0))
    service = start(workers=1, out_of_range=policy, review_threshold=0)
    for edge, beyond in ((number(0), number(0) - step), (number(1), number(1) + step)):
        assert service.predict({**EXAMPLE, NUMBER: beyond}).json()["action"] == action
        assert service.predict({**EXAMPLE, NUMBER: edge}).json()["action"] == "accept"


@WITH_NUMBER
def test_a_value_outside_the_training_range_may_be_rejected(start: Start) -> None:
    """With APP_OUT_OF_RANGE=reject it is 422, naming the feature, and in a batch the index."""
    service = start(workers=1, out_of_range="reject")
    odd = {**EXAMPLE, NUMBER: number(2)}
    (error,) = assert_problem(service.predict(odd), 422, "invalid_input")["errors"]
    assert error["loc"][-1] == NUMBER
    for instances in ([EXAMPLE, odd], [odd]):
        answer = service.client.post("/v1/predict/batch", json={"instances": instances})
        (error,) = assert_problem(answer, 422, "invalid_input")["errors"]
        assert error["loc"][-3:] == ["instances", len(instances) - 1, NUMBER]


@pytest.mark.skipif(not LABELS, reason="a regressor has no score")
def test_a_low_score_is_reviewed_at_the_threshold_set(start: Start) -> None:
    """With APP_REVIEW_THRESHOLD at 1, whatever is not certain is for a person to look at."""
    service = start(workers=1, review_threshold=1)
    assert service.predict().json()["action"] == "review"


def test_limits_are_settings(start: Start) -> None:
    """Body size and batch length follow their variables."""
    service = start(workers=1, max_body_bytes=500, max_batch_items=2)
    assert_problem(service.predict(content=b" " * 501), 413, "body_too_large")
    answer = service.client.post("/v1/predict/batch", json={"instances": [EXAMPLE] * 3})
    assert_problem(answer, 422, "invalid_input")
