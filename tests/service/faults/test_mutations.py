"""Thousands of starts and reloads with files, variables and folders as accidents leave them.

seed -> a mutated `.env`, environment, artifact folder or temporary folder -> prepare(), as gunicorn.conf.py
calls it -> settings that keep the keys, or one line; nothing outside is touched. `MUTATIONS=2000` runs all.
"""

import os
import random
import re
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from hashlib import sha256
from pathlib import Path

import httpx2
import pytest

from server.fleet import prepare
from tests.service.conftest import ARTIFACTS, EXAMPLE, PATIENCE_SECONDS, Service, until

COUNT = int(os.environ.get("MUTATIONS", "240"))
KEY = "a key"
HASH = sha256(KEY.encode()).hexdigest()
TEXT = f"""# this service
APP_ENV=local
APP_API_KEYS="{HASH}"
export APP_LOG_LEVEL='INFO'
APP_REVIEW_THRESHOLD=0.5 # unsure
OTHER_TOKEN="of another
program"
APP_MAX_QUEUE = 100

REDIS_PASSWORD=secret#1
APP_CORS_ORIGINS=https://shop.example,https://other.example
"""
STRANGE: list[str] = [
    *"\"'#:= \n\r\t\0\\\ufeff\u2028\xa0\u200bé\x0b,-0b`$|", "${X}", "APP_", "\x1b[31m", " #",
]  # fmt: skip
VALUES = [
    "", " ", ",", "0", "-1", "1e999", "nan", "true", "v1", "v999", "../v1", "tcp://10.0.0.1:8000", "null",
    "unix:/run/x", "\udcff", "x" * 5000, "http://x/", "{}", "é", "*", "::", "1\n2", "65535",
]  # fmt: skip
NAMES = [
    "PORT", "HOST", "WORKERS", "LOG_LEVEL", "MODEL_VERSION", "X", "é", "MAX_QUEUE", "REDIS_PORT", "API_KEYS",
    "ENV", "DRAIN_SECONDS", "CORS_ORIGINS", "SERVICE_HOST", "PORT_8000_TCP", "REDIS_SERVICE_PORT_HTTP",
]  # fmt: skip
ENCODINGS = [*["utf-8"] * 8, "utf-16", "utf-16-le", "utf-8-sig", "latin-1"]


def accident(text: str, pick: random.Random) -> str:
    """What a typing error, an editor or a broken copy makes of a text."""
    at, lines = pick.randrange(len(text)), text.splitlines(keepends=True)
    match pick.randrange(9):
        case 0:
            return text[:at] + text[at + pick.randint(1, 4) :]
        case 1:
            return text[:at] + pick.choice(STRANGE) + text[at:]
        case 2:
            return text[:at] + pick.choice(STRANGE) + text[at + 1 :]
        case 3:
            return text[:at]
        case 4:
            return "".join([*lines, pick.choice(lines)])
        case 5:
            return "".join(pick.sample(lines, len(lines)))
        case 6:
            return text.replace("=", pick.choice([": ", " ", " = ", ":="]), pick.randint(1, 3))
        case 7:
            return text.replace("\n", pick.choice(["\r\n", "\r", "\n\n"]))
    return text.replace(pick.choice("\"'"), "", 1)


def mutated(pick: random.Random) -> bytes:
    """`.env` after an accident or three."""
    text = TEXT
    for _ in range(pick.randint(1, 3)):
        text = accident(text, pick) or " "
    return text.encode(pick.choice(ENCODINGS), "replace")


def keys_are_meant(content: bytes) -> bool:
    """Whether a good part of the hash stands outside of comments of whole lines."""
    parts = {HASH[at : at + 24] for at in range(41)}
    lines = re.split("[\r\n]", content.decode("utf-8", "replace").removeprefix("\ufeff"))
    return any(part in line for line in lines if not line.lstrip().startswith("#") for part in parts)


def spoil(folder: Path, pick: random.Random) -> None:
    """Something happens to a file or two of the artifacts."""
    for _ in range(pick.randint(1, 2)):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = pick.choice(files)
        content = path.read_bytes()
        at = pick.randrange(len(content)) if content else 0
        match pick.randrange(8):
            case 0:
                path.unlink()
            case 1:
                path.write_bytes(content[:at])
            case 2:
                path.write_bytes(content[:at] + pick.randbytes(3) + content[at + 1 :])
            case 3:
                path.unlink()
                path.mkdir()
            case 4:
                path.unlink()
                path.symlink_to(path)
            case 5:
                path.write_bytes(
                    pick.choice([b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 5000, b"1e999"])
                )
            case 6:
                path.rename(path.with_name(pick.choice(["v9", "release.json", "x", "v0"]) + "~"))
            case _:
                shutil.rmtree(path.parent)
                folder.mkdir(exist_ok=True)
        if not any(one.is_file() for one in folder.rglob("*")):
            return


def ready(service: Service) -> int:
    """How many workers have become ready so far."""
    return len([line for line in service.lines() if line["event"] == "ready"])


def outcome_of_a_start() -> str:
    """What a start comes to: `open`, `locked`, or the line that refuses it; it leaves no folder behind."""
    try:
        fleet = copy_context().run(prepare)
        fleet.metric_files.prepare(fleet.settings.metrics_enabled)
    except SystemExit as refusal:
        return str(refusal.code)
    fleet.metric_files.remove()
    return "locked" if fleet.settings.api_keys else "open"


def test_no_accident_opens_the_service_or_shows_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start keeps the keys that were meant, or is refused in one line without a value."""
    outcomes: Counter[str] = Counter()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    for seed in range(COUNT):
        pick = random.Random(seed)  # no secret
        folder = tmp_path / "service"
        folder.mkdir()
        kind = pick.choice(["env file"] * 5 + ["environment"] * 2 + ["artifacts"] * 2 + ["temporary folder"])
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            for name in [name for name in os.environ if name.upper().startswith("APP_")]:
                patch.delenv(name)
            patch.setenv("APP_ARTIFACTS_DIR", str(ARTIFACTS))
            patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(outside))
            patch.setattr(tempfile, "tempdir", None)
            patch.setenv("TMPDIR", str(tmp_path))
            content = TEXT.encode()
            if kind == "env file":
                content = mutated(pick)
            elif kind == "environment":
                for name in pick.sample(NAMES, 3):
                    patch.setitem(os.environ, f"APP_{name}", pick.choice(VALUES))
            elif kind == "artifacts":
                shutil.copytree(ARTIFACTS, folder / "artifacts")
                spoil(folder / "artifacts", pick)
                patch.setenv("APP_ARTIFACTS_DIR", str(folder / "artifacts"))
            else:
                place = folder / "temporary"
                if make := pick.choice([Path.mkdir, Path.touch, None]):
                    make(place)
                patch.setenv("TMPDIR", str(place))
            (folder / ".env").write_bytes(content)
            outcome = outcome_of_a_start()
        assert outcome != "open" or not keys_are_meant(content), (seed, content)
        if outcome not in ("open", "locked"):
            assert len(outcome.splitlines()) == 1, (seed, outcome)
            assert len(outcome) <= 300, (seed, outcome)
            assert outcome.startswith("cannot start: "), (seed, outcome)
            assert HASH[:24] not in outcome, (seed, outcome)
        assert [path.name for path in outside.iterdir()] == ["precious"], seed
        assert not list(tmp_path.glob("metrics-*")), seed
        shutil.rmtree(folder)
        outcomes[f"{kind}: {outcome if outcome in ('open', 'locked') else 'refused'}"] += 1
    print(dict(sorted(outcomes.items())))


def test_no_reload_opens_the_service_or_ends_a_healthy_worker(
    start: Callable[..., Service], tmp_path: Path
) -> None:
    """SIGHUP after SIGHUP with mutated files, under load: nobody without a key gets in, nobody is lost."""
    (tmp_path / ".env").write_text(TEXT)
    service, over = start(workers=2), threading.Event()

    def knock() -> Counter[object]:
        """A client without a key, until it is over."""
        seen: Counter[object] = Counter()
        with httpx2.Client(base_url=service.url, timeout=PATIENCE_SECONDS) as client:
            while not over.is_set():
                try:
                    seen[client.post("/v1/predict", json=EXAMPLE).status_code] += 1
                except httpx2.TransportError as error:
                    seen[type(error).__name__] += 1
        return seen

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(knock) for _ in range(3)]
        try:
            for seed in range(max(4, COUNT // 60)):
                (tmp_path / ".env").write_bytes(mutated(random.Random(seed)))  # no secret
                want = ready(service) + 2
                service.process.send_signal(signal.SIGHUP)
                until(lambda want=want: ready(service) >= want, "successors")  # type: ignore[misc]
        finally:
            over.set()
    answers = sum((client.result() for client in clients), Counter())
    assert set(answers) <= {401, 429}  # after thirty of them a client is told to stop
    assert service.stop() == 0
    assert "Traceback" not in service.log.read_text()
