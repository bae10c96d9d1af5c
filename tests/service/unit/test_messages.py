"""What a person reads when a command cannot do what it was asked: one line, never a traceback."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lifecycle import __main__ as entry
from lifecycle import release
from lifecycle.__main__ import LONGEST, MODULES, commands, one_line
from lifecycle.command import LifecycleError
from tests.service.conftest import ARTIFACTS

NOT_TEXT = b"\xff\xfe\x00\xd8"


def said(*words: str) -> tuple[int, str]:
    """Exit code of `python -m lifecycle ...`, and the last line of what it says on stderr."""
    done = CliRunner().invoke(commands, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    lines = done.stderr.splitlines()
    return done.exit_code, lines[-1] if lines else ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["promote"], "promote: give VERSION: make promote VERSION=..."),
        (["evaluate"], "evaluate: give VERSION: make evaluate VERSION=..."),
        (["release-check"], "release-check: give VERSION: make release-check VERSION=..."),
        (["sign", "v1", "--key", ""], "sign: give KEY: make sign KEY=..."),
        (["sign", "v1"], "sign: give KEY: make sign KEY=..."),
        (
            ["import-model", "--model", "", "--data=", "--target", "y"],
            "import-model: give MODEL, DATA: make import-model MODEL=... DATA=...",
        ),
        (["shadow"], "shadow: say which version: make shadow VERSION=v2; or end it: make shadow END=yes"),
        (["canary"], "canary: say which version: make canary VERSION=v2; or end it: make canary END=yes"),
        (["canary", "--version=v9", "--end"], "canary: say which version: make canary VERSION=v2; or end"),
        (["shadow", "--version="], "shadow: give VERSION: make shadow VERSION=..."),
        (["canary", "--version=v0", "--percent=ten"], "canary: Invalid value for '--percent'"),
        (["canary", "--version=v0", "--percent=101"], "canary: Invalid value for '--percent'"),
        (["promote", "v2", "--force"], "promote: No such option: --force"),
        (["quality", "--logs="], "quality: give LOGS: make quality LOGS=..."),
        (["forget"], "No such command 'forget'"),
    ],
)
def test_a_command_asks_for_what_it_was_not_given(words: list[str], line: str) -> None:
    """Missing, empty and wrong words on the command line are one line that says what to write."""
    before = (ARTIFACTS / "release.json").read_bytes()
    status, found = said(*words)
    assert status in (1, 2)
    assert line in found
    assert (ARTIFACTS / "release.json").read_bytes() == before


def spoiled(folder: Path) -> dict[str, Path]:
    """Things that are not the file which a command expects."""
    found = {name: folder / name for name in ("empty", "bytes", "nowhere", "loop")}
    found["empty"].write_bytes(b"")
    found["bytes"].write_bytes(NOT_TEXT)
    found["loop"].symlink_to(found["loop"])
    return found | {"folder": folder}


@pytest.mark.parametrize("what", ["empty", "bytes", "nowhere", "loop", "folder"])
@pytest.mark.parametrize(
    "command",
    [
        lambda path: ["evaluate", "v1", "--data", path, "--target", "y"],
        lambda path: ["quality", "--logs", path],
        lambda path: ["quality", "--logs", path, "--labels", path],
        lambda path: ["drift", "--logs", path],
        lambda path: ["drift", "--metrics", path],
        lambda path: ["compare", "--metrics", path],
        lambda path: ["sign", "v1", "--key", path],
        lambda path: ["shadow", "--version", "v0", "--artifacts", path],
        lambda path: ["promote", "v1", "--root", path],
        lambda path: ["rollback", "--root", path],
        lambda path: ["evaluate", "v1", "--root", path],
        lambda path: ["release-check", "v1", "--root", path],
    ],
    ids=lambda command: " ".join(command("X")),
)
def test_no_file_makes_a_traceback(
    command: Callable[[str], list[str]], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty, no text, missing, unreadable, or a folder: one line, whatever the command is."""
    monkeypatch.setattr(entry, "ROOT", tmp_path)
    path = spoiled(tmp_path)[what]
    status, line = said(*command(str(path)))
    assert (status, len(line) <= LONGEST) == (1, True)
    assert line.startswith(f"{command('X')[0]}: ")


def test_what_nobody_expected_is_one_line_and_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that no command foresees ends in one line; its traceback is in the file that it names."""

    def broken(_: object) -> None:
        raise KeyError("x" * 1000)

    monkeypatch.setattr(entry, "ROOT", tmp_path)
    monkeypatch.setattr("lifecycle.release.rollout.read_release", broken)
    status, line = said("shadow", "--version=v0")
    assert status == 1
    assert line.startswith("shadow: KeyError: 'xxx")
    assert line.endswith("; the whole story: build/shadow.log")
    assert len(line) == LONGEST
    assert "in broken" in (tmp_path / "build" / "shadow.log").read_text("utf-8")


def test_a_long_reason_is_cut_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason of many lines is its first line; where the service's folder cannot be written, /tmp has it."""
    monkeypatch.setattr(entry, "ROOT", tmp_path)
    assert one_line("size", "short\n") == "size: short"
    assert one_line("size", "first\nsecond") == "size: first; the whole story: build/size.log"
    assert (tmp_path / "build" / "size.log").read_text("utf-8") == "first\nsecond\n"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(entry, "ROOT", tmp_path / "file")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert one_line("size", "x" * 400).endswith(f"; the whole story: {tmp_path}/size.log")


def test_python_gets_the_commands_as_functions() -> None:
    """`lifecycle.release`, `.importing` and `.operations` hand out what `python -m lifecycle` calls."""
    with pytest.raises(LifecycleError, match="say which version"):
        release.shadow()
    from lifecycle import importing, operations

    doors = {*release.__all__, *importing.__all__, *operations.__all__}
    assert {name.replace("-", "_") for name in MODULES} == doors | {"size", "sbom"}
    assert callable(importing.import_model)
    assert all(callable(getattr(one, name)) for one in (release, operations) for name in one.__all__)
