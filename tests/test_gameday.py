"""The game day of a default render: ten minutes, mostly of waiting."""

import pytest

from scripts.render import ROOT
from tests.conftest import Render, run

pytestmark = pytest.mark.gameday


def test_rendered_service_raises_every_alert(render: Render) -> None:
    """In the rendered service's game day every alert fires, names its runbook, and resolves."""
    ended = run("make", "gameday", f"SERVICE={render().folder}", cwd=ROOT)
    assert ended.returncode == 0, ended.stdout[-20_000:]
