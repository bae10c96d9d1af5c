"""A release as people make it: evaluated, promoted and taken back, while the service runs."""

import shutil
from pathlib import Path

from tests.service.conftest import run, serving, until
from tests.service.unit.test_evaluation import ROOT, git, place, unevaluated

__all__ = ["place", "unevaluated"]  # fixtures
PATIENCE = 300  # training's libraries take their time to be imported
CODE = [ROOT / name for name in ("app", "lifecycle", "load")]


def test_the_running_service_follows_a_promotion_and_a_rollback(place: Path, tmp_path: Path) -> None:
    """From a shell, without a restart: v2 serves once it is evaluated and promoted, v1 after the rollback."""
    for folder in CODE:
        shutil.copytree(folder, place / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    (place / ".gitignore").write_text("build/\n__pycache__/\n")
    git(place, "add", ".")
    git(place, "commit", "--quiet", "--message=code")
    with serving(tmp_path, artifacts_dir=place / "artifacts") as service:

        def serves(version: str) -> bool:
            return bool(service.client.get("/ready").json()["model_version"] == version)

        refused = run(place, "lifecycle", "promote", "v2", timeout=PATIENCE)
        assert (refused.returncode, refused.stderr) == (
            1, "promote: v2 was never evaluated: make evaluate VERSION=v2\n"
        )  # fmt: skip
        for command in (("evaluate", "v2"), ("promote", "v2")):
            done = run(place, "lifecycle", *command, timeout=PATIENCE)
            assert (done.returncode, done.stderr) == (0, ""), done.stdout
        until(lambda: serves("v2"), "v2")
        assert run(place, "lifecycle", "rollback", timeout=PATIENCE).returncode == 0
        until(lambda: serves("v1"), "v1")
        assert len(service.workers()) == 2
    assert git(place, "log", "--format=%s").splitlines()[:2] == [
        "Roll back to model v1 from v2",
        "Release model v2 in place of v1",
    ]
    assert git(place, "status", "--porcelain") == ""
