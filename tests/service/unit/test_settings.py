"""Configuration and the number of workers, from files and variables that the tests make themselves."""

import os
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.rollout.fleet import default_workers, machine
from app.settings import GRACE_SECONDS, SLO_FILE, SettingsError, load_settings, redacted

SECRET = "s3cr3t"  # noqa: S105  # stands for what somebody put into the wrong variable
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable and no `.env` of the developer's counts."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("APP_")]:
        monkeypatch.delenv(name)


def refused() -> str:
    """The one line with which the settings are refused."""
    with pytest.raises(SettingsError) as raised:
        load_settings()
    (line,) = str(raised.value).splitlines()
    assert SECRET not in line
    return line


def test_the_defaults_start() -> None:
    """Without a single variable the service may start, with the deadline that `slo.toml` promises."""
    slo = tomllib.loads(SLO_FILE.read_text("utf-8"))
    settings = load_settings()
    assert settings.request_deadline_seconds == slo["request_deadline_seconds"]
    assert settings.docs


@pytest.mark.parametrize("seconds", [5, 10, 15], ids=["strict", "standard", "relaxed"])
def test_every_promised_deadline_starts_with_the_default_drain(
    monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """Whatever service level was chosen, draining takes long enough for it without being set."""
    monkeypatch.setenv("APP_REQUEST_DEADLINE_SECONDS", str(seconds))
    assert load_settings().drain_seconds > seconds + GRACE_SECONDS


def test_who_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code over environment over `.env` over `slo.toml`; an empty variable says nothing."""
    names = ("request_deadline_seconds", "max_queue", "max_concurrency", "max_batch_items")
    lines = [f"APP_{name.upper()}=1\n" for name in names]
    Path(".env").write_text("".join(lines), "utf-8")
    monkeypatch.setenv("APP_MAX_QUEUE", "2")
    monkeypatch.setenv("app_max_concurrency", "2")
    monkeypatch.setenv("APP_MAX_BATCH_ITEMS", "")
    settings = load_settings(max_concurrency=3)
    assert [getattr(settings, name) for name in names] == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WROKERS": SECRET}, "APP_WROKERS"),
        ({"PORT": "65536"}, "APP_PORT"),
        ({"WORKERS": "0"}, "APP_WORKERS"),
        ({"MAX_QUEUE": "-1"}, "APP_MAX_QUEUE"),
        ({"MAX_CONCURRENCY": SECRET}, "APP_MAX_CONCURRENCY"),
        ({"REQUEST_DEADLINE_SECONDS": "nan"}, "APP_REQUEST_DEADLINE_SECONDS"),
        ({"BATCH_MAX_WAIT_MS": "inf"}, "APP_BATCH_MAX_WAIT_MS"),
        ({"MODEL_VERSION": f"v1/../{SECRET}"}, "APP_MODEL_VERSION"),
        ({"API_KEYS": f"{sha256(b'').hexdigest()},{SECRET}"}, "APP_API_KEYS"),
        ({"ARTIFACTS_DIR": f"https://user:{SECRET}@host/path"}, "APP_ARTIFACTS_DIR"),
        ({"ARTIFACTS_DIR": f"https://host/path?sig={SECRET}"}, "APP_ARTIFACTS_DIR"),
        ({"ARTIFACTS_DIR": f"ftp://host/{SECRET}"}, "APP_ARTIFACTS_DIR"),
        ({"ENV": "production"}, "APP_API_KEYS"),
        ({"RATE_LIMIT": f"lots/{SECRET}"}, "APP_RATE_LIMIT"),
        ({"RATE_LIMIT": "9/second", "WORKERS": "2"}, "APP_RATE_LIMIT_STORAGE"),
        ({"RATE_LIMIT": "9/second"}, "APP_RATE_LIMIT_STORAGE"),  # as many workers as there are processors
        ({"RATE_LIMIT": "9/second", "RATE_LIMIT_STORAGE": "memory://x"}, "APP_RATE_LIMIT_STORAGE"),
        ({"RATE_LIMIT": "1000000/day", "WORKERS": "1"}, "APP_RATE_LIMIT"),  # more than memory would hold
        ({"RATE_LIMIT_STORAGE": f"smtp://{SECRET}"}, "APP_RATE_LIMIT_STORAGE"),
        ({"RATE_LIMIT_STORAGE": f"redis://:{SECRET}@cache"}, "APP_RATE_LIMIT_STORAGE"),
        ({"RATE_LIMIT_STORAGE": f"redis://cache:{SECRET}"}, "APP_RATE_LIMIT_STORAGE"),
        ({"RATE_LIMIT_STORAGE": "rediss://:6379"}, "APP_RATE_LIMIT_STORAGE"),
        ({"CORS_ORIGINS": f"https://shop.example,{SECRET}"}, "APP_CORS_ORIGINS"),
        ({"CORS_ORIGINS": "https://shop.example/"}, "APP_CORS_ORIGINS"),
        ({"CORS_ORIGINS": "null"}, "APP_CORS_ORIGINS"),
        ({"REQUEST_DEADLINE_SECONDS": "20", "DRAIN_SECONDS": "25"}, "APP_DRAIN_SECONDS"),
    ],
    ids=str,
)
def test_what_contradicts_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str
) -> None:
    """One line names the variable and hides what it was set to."""
    for name, value in variables.items():
        monkeypatch.setenv(f"APP_{name}", value)
    assert named in refused()


def test_production_is_locked_unless_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """In production keys are needed or waived in so many words, and the documentation is off by default."""
    monkeypatch.setenv("APP_ENV", "production")
    monkeypatch.setenv("APP_AUTH_DISABLED", "true")
    assert not load_settings().docs
    monkeypatch.setenv("APP_DOCS_ENABLED", "true")
    assert load_settings().docs
    monkeypatch.delenv("APP_AUTH_DISABLED")
    monkeypatch.setenv("APP_API_KEYS", f" {sha256(b'a').hexdigest()}, {sha256(b'b').hexdigest()} ,")
    assert len(load_settings().api_keys) == 2


def test_secrets_are_shown_as_asterisks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The effective configuration has every variable and no secret."""
    digest = sha256(SECRET.encode()).hexdigest()
    monkeypatch.setenv("APP_API_KEYS", digest)
    monkeypatch.setenv("APP_RATE_LIMIT_STORAGE", f"redis://:{SECRET}@cache:6379")
    settings = load_settings()  # with those of capabilities
    shown = redacted(settings)
    assert shown.keys() == {f"APP_{name.upper()}" for name in type(settings).model_fields}
    assert SECRET not in str(shown)
    assert digest not in str(shown)


def group(folder: Path, **files: str) -> Path:
    """A control group's files; `cpu_max` is `cpu.max`."""
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")
    return folder


@given(quota=st.integers(1_000, 10_000_000))
def test_a_cpu_quota_limits_the_workers(tmp_path_factory: pytest.TempPathFactory, quota: int) -> None:
    """One worker per processor that the quota pays for in full, at least one, never more than there are."""
    folder = tmp_path_factory.mktemp("group")
    cgroup = group(folder, cpu_max=f"{quota} 100000")
    assert default_workers(folder, cgroup) == max(1, min(CPUS, quota // 100_000))


def test_no_quota_means_every_processor(tmp_path: Path) -> None:
    """Without a control group, or with one that sets no limit, there is a worker for each processor."""
    assert default_workers(tmp_path, tmp_path / "none") == CPUS
    assert default_workers(tmp_path, group(tmp_path, cpu_max="max 100000", memory_max="max")) == CPUS


def test_memory_limits_the_workers(tmp_path: Path) -> None:
    """What memory does not carry is not started: a larger model means fewer workers, but always one."""
    cgroup = group(tmp_path, cpu_max="max 100000", memory_max=str(4 * 2**30))
    model = tmp_path / "artifacts" / "v1" / "model.onnx"
    model.parent.mkdir(parents=True)
    workers = []
    for size in (2**20, 2**29, 2**33):
        with model.open("wb") as file:
            file.truncate(size)  # takes no room on the disk
        workers.append(default_workers(tmp_path / "artifacts", cgroup))
    assert workers == sorted(workers, reverse=True)
    assert workers[-1] == 1
    half = group(tmp_path, cpu_max="max 100000", memory_max=str(2**29))  # two workers full of requests
    assert default_workers(tmp_path / "none", half) == min(CPUS, 2)
    assert default_workers(tmp_path, group(tmp_path, memory_max=str(2**20))) == 1


def test_the_first_version_of_control_groups_counts_too(tmp_path: Path) -> None:
    """Older hosts say the same in other files, -1 meaning no limit."""
    for name, content in {
        "cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": str(2**40),
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert default_workers(tmp_path, tmp_path) == 1
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert default_workers(tmp_path, tmp_path) == CPUS


@pytest.mark.parametrize(
    ("membership", "limited"),
    [
        ("0::/system.slice/iris.service\n", "system.slice"),  # on the slice around it
        ("0::/system.slice/iris.service\n", "system.slice/iris.service"),
        ("12:cpu,cpuacct:/docker/abc\n0::/\n", "cpu,cpuacct/docker"),  # the first version, of one hierarchy
        ("0::/../elsewhere\n", "."),  # a container sees its own group as the root
    ],
)
def test_limits_are_found_where_the_kernel_says(tmp_path: Path, membership: str, limited: str) -> None:
    """The group of this process and every one around it counts, wherever in the hierarchy it is."""
    (tmp_path / "membership").write_text(membership)
    folder = tmp_path / "groups" / limited
    folder.mkdir(parents=True)
    if "cpuacct" in membership:
        (folder / "cpu.cfs_quota_us").write_text("100000\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    else:
        group(folder, cpu_max="100000 100000", memory_max=str(2**28))
        assert machine(tmp_path / "groups", tmp_path / "membership").memory == 2**28
    assert machine(tmp_path / "groups", tmp_path / "membership").cpus == 1
