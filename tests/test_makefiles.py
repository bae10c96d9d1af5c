"""The Makefiles of template and service: what a shell has exported, and an environment made half-way."""

import re
from pathlib import Path

import pytest

from scripts.render import ROOT, SERVICE
from tests.conftest import run

MAKEFILES = {"template": ROOT, "service": SERVICE}


@pytest.mark.parametrize(
    "target", ["evaluate", "shadow", "canary", "promote", "predict", "sign", "image", "up", "drift"]
)
def test_only_what_is_typed_after_make_counts(target: str) -> None:
    """Variables that a shell exports for other programs change no recipe; typed after make, they do."""
    text = (SERVICE / "Makefile").read_text("utf-8")
    read = set(re.findall(r"\$\((?:or |if )?\$?\(?([A-Z]+)\b", text)) - {
        "MAKE",
        "CURDIR",
        "OS",
        "BIN",
        "APP",
        "HADOLINT",
    }
    assert {"VERSION", "INPUT", "PERCENT", "KEY", "MODEL", "DATA", "ARGS", "IMAGE"} <= read
    exported = dict.fromkeys(read, "of-another-program")
    plain = run("make", "--dry-run", target, cwd=SERVICE).stdout
    assert run("make", "--dry-run", target, cwd=SERVICE, **exported).stdout == plain


def test_what_is_exported_is_not_handed_on(tmp_path: Path) -> None:
    """Commands read LIMITS, DATA and the like from make: an exported one reaches them as nothing."""
    (tmp_path / "Makefile").write_text(
        (SERVICE / "Makefile").read_text("utf-8") + "\nshow:\n\t@echo [$$DATA$$VERSION$$LOGS$$LIMITS]\n",
        "utf-8",
    )
    exported = dict.fromkeys(("DATA", "VERSION", "LOGS", "LIMITS"), "of-another-program")
    assert run("make", "--silent", "show", cwd=tmp_path, **exported).stdout == "[]\n"
    assert run("make", "--silent", "show", "DATA=typed", cwd=tmp_path, **exported).stdout == "[typed]\n"


@pytest.mark.parametrize("name", MAKEFILES)
@pytest.mark.parametrize("left", ["a configuration", "a configuration and a Python without pip"])
def test_an_environment_made_half_way_is_made_again(name: str, left: str, tmp_path: Path) -> None:
    """Where `python -m venv` failed or was killed, the next make does it again, until it has worked."""
    text = (MAKEFILES[name] / "Makefile").read_text("utf-8")
    (tmp_path / "Makefile").write_text(text, "utf-8")
    calls, fails = tmp_path / "calls", tmp_path / "fails"
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
  "-m venv .venv")
    echo venv >>"{calls}"; mkdir -p .venv/bin; echo home >.venv/pyvenv.cfg
    {"true" if left == "a configuration" else "echo >.venv/bin/python"}
    test ! -e "{fails}" ;;
esac
""",
        "utf-8",
    )
    python.chmod(0o755)
    fails.touch()
    make = ("make", f"PYTHON={python}", ".venv/made.stamp")
    assert run(*make, cwd=tmp_path).returncode != 0
    assert (tmp_path / ".venv" / "pyvenv.cfg").is_file()
    fails.unlink()
    assert run(*make, cwd=tmp_path).returncode == 0
    assert run(*make, cwd=tmp_path).returncode == 0
    assert calls.read_text("utf-8").splitlines() == ["venv", "venv"]
    assert (tmp_path / ".venv" / "made.stamp").exists()
