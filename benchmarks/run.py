"""Measures the rendered service against reference servers: `make benchmark`, ARGS="--model tiny --rounds 1".

render -> environment -> a copy with the medium model -> the harness: all servers, rounds interleaved
       -> processor time of cold starts -> this service with and without observation
       -> build/benchmark/results/*.json -> benchmarks/results.md

Parts add up: a later run with --only adds its servers to the report, each compared with this service in the
run where both were measured. The harness and its environments are found through PEERS_DIR and PEERS_HOME.
"""

import argparse
import http.client
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scripts.demo import free_port, say
from scripts.render import ROOT, render

WORK = ROOT / "build" / "benchmark"
RESULTS = WORK / "results"
REPORT = ROOT / "benchmarks" / "results.md"
MODELS = ("tiny", "medium")
OURS, RAW, SEED = "ours", "raw-asgi-batch-onnx", "seed-fastapi"
FRAMEWORKS = [
    name + batch
    for name in ("bentoml", "litserve", "mlserver", "rayserve", "kserve")
    for batch in ("", "-batch")
    if name + batch != "kserve-batch"
]
SERVERS = [RAW, SEED, *FRAMEWORKS, "mosec-batch"]
START_SECONDS = 60
MANY = 64
# What observation may leave of the requests/s, by model; the second is the tiny one, slowed.
BARE, KEPT = "unobserved", {"tiny": 0.70, "millisecond": 0.95}
SLOWED = (
    "from tests.service.gameday.day import SINES, release, width_for; from tests.service.where import ROOT; "
    "from tests.service.gameday.trial import Trouble, add_trial; root = ROOT / 'artifacts'; "
    "add_trial(root, 'v1', 'v101', Trouble(sines=SINES, width=width_for(root, 0.001))); "
    "release(root, serving='v101')"
)


def command(app: str = "app.main") -> list[str]:
    """How the service is started, with the environment of requirements/runtime.txt alone."""
    gunicorn = WORK / "tiny" / ".venv" / "bin" / "gunicorn"
    return [str(gunicorn), "--config", "gunicorn.conf.py", f"{app}:create_app()"]


def clean(folder: Path) -> Path:
    """The folder without what an earlier run left there, but with its environment."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name == ".venv":
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return folder


def prepare(models: list[str], parts: list[str]) -> None:
    """Renders the service as the template stands now, installs it, and makes the other models."""
    tiny, medium, quiet = clean(WORK / "tiny"), WORK / "medium", {**os.environ, "PIP_QUIET": "1"}
    say("Rendering the service and installing what it needs to serve")
    render(WORK, "service_name=tiny", "ci=none")
    subprocess.run(["make", "--silent", ".venv/runtime.stamp"], cwd=tiny, env=quiet, check=True)
    if "medium" in models or "cost" in parts:
        say("Making the other models in copies (their environment takes a minute the first time)")
        skip = shutil.ignore_patterns(".venv")
        shutil.copytree(tiny, clean(medium), ignore=skip, dirs_exist_ok=True)
        subprocess.run(["make", "--silent", ".venv/dev.stamp"], cwd=medium, env=quiet, check=True)
        python = medium / ".venv" / "bin" / "python"
        if "cost" in parts:
            shutil.copytree(tiny, clean(WORK / "millisecond"), ignore=skip, dirs_exist_ok=True)
            own = {**os.environ, "PROVE_SERVICE": str(WORK / "millisecond")}
            subprocess.run([python, "-c", SLOWED], cwd=ROOT, env=own, check=True)
        if "medium" in models:
            own = {**os.environ, "PROVE_SERVICE": str(medium)}
            subprocess.run([python, "-m", "benchmarks.medium", medium], cwd=ROOT, env=own, check=True)
    # A cold start must not be the one that compiles.
    folders = [tiny / ".venv" / "lib", *(WORK / model / "app" for model in models)]
    subprocess.run([tiny / ".venv" / "bin" / "python", "-m", "compileall", "-qq", *folders], check=False)


class Target(NamedTuple):
    """A server of ours: what starts it, in which folder, with which variables."""

    command: list[str]
    folder: Path
    variables: dict[str, str]


def servers(options: argparse.Namespace, model: str) -> None:
    """This service and the reference servers."""
    peers = list(dict.fromkeys([RAW, SEED, *options.only]))
    harness(options, model, model, f"1,{MANY}", peers, {OURS: Target(command(), WORK / model, {})})


def cost(options: argparse.Namespace) -> None:
    """This service as it is, and with nothing recorded and no line written."""
    unobserved = {"PYTHONPATH": str(ROOT / "benchmarks"), "APP_LOG_LEVEL": "ERROR"}
    for model in KEPT:
        folder = WORK / model
        both = {OURS: Target(command(), folder, {}), BARE: Target(command(BARE), folder, unobserved)}
        harness(options, "tiny", f"cost-{model}", str(MANY), [], both)


def harness(
    options: argparse.Namespace,
    model: str,
    name: str,
    connections: str,
    peers: list[str],
    targets: dict[str, Target],
) -> None:
    """Runs the harness; what it has measured is in its file even when it is interrupted."""
    body = options.peers_home / "data" / f"{model}-record.body.json"
    line = [
        options.peers_home / "venvs" / "base" / "bin" / "python",
        options.peers / "run.py",
        *("--only", ",".join(peers), "--model", model, "--workers", options.workers),
        *("--rounds", options.rounds, "--duration", options.duration, "--concurrency", connections),
        *("--out", RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"),
    ]
    for server, target in targets.items():
        port = free_port()
        settings = {"APP_HOST": "127.0.0.1", "APP_PORT": port, "APP_WORKERS": options.workers}
        line += ["--target", f"{server}=http://127.0.0.1:{port}/v1/predict,{body}"]
        line += ["--target-cmd", f"{server}={shlex.join(target.command)}"]
        line += ["--target-cwd", f"{server}={target.folder}"]
        for variable, value in {**settings, **target.variables}.items():
            line += ["--target-env", f"{server}={variable}={value}"]
    process = subprocess.Popen(
        [str(part) for part in line], env=environment(options), stdout=subprocess.DEVNULL
    )
    try:
        if process.wait():
            sys.exit(f"benchmark: the harness ended with {process.returncode}")
    finally:  # not killed: it has servers to stop
        process.terminate()
        process.wait()


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The environment without settings that were meant for another service."""
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("APP_", "MAKE", "MFLAGS"))
    }
    return {**own, "PEERS_HOME": str(options.peers_home)}


def cold_starts(options: argparse.Namespace, model: str) -> None:
    """Processor time from exec to the first prediction, of all processes; servers take turns."""
    sys.path.insert(0, str(options.peers))
    peers = importlib.import_module("peers")
    port = free_port()
    raw = peers.registry(options.peers_home, model, options.workers, port)[RAW]
    body = raw.body.read_bytes()
    # What the harness gives every server.
    common = environment(options) | {
        "PEERS_MODEL": model,
        "PEERS_WORKERS": str(options.workers),
        "PEERS_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(peers.SERVERS),
    }
    common.pop("PYTHONDONTWRITEBYTECODE", None)
    settings = {"APP_HOST": "127.0.0.1", "APP_PORT": str(port), "APP_WORKERS": str(options.workers)}
    servers = {
        RAW: (raw.command, raw.cwd, common | raw.env, raw.url),
        OURS: (command(), WORK / model, common | settings, f"http://127.0.0.1:{port}/v1/predict"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for number in range(-1, options.cold_runs):  # the first fills caches and does not count
        for name, (line, folder, variables, url) in servers.items():
            taken = cold_start(line, folder, variables, url, body)
            if number >= 0:
                seconds[name].append(taken)
        if number >= 0:
            found = ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items())
            print(f"cold start {number + 1}/{options.cold_runs}: {found}", flush=True)
    setup = {"workers": options.workers, "started": time.strftime("%F %T")}
    (RESULTS / f"cold-{model}.json").write_text(json.dumps({"setup": setup, "seconds": seconds}, indent=1))


def cold_start(line: list[str], folder: Path, variables: dict[str, str], url: str, body: bytes) -> float:
    """Starts a server, waits for its first 200, stops it; seconds of processor time up to then."""
    log = WORK / "cold.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            line, cwd=folder, env=variables, stdout=output, stderr=output, start_new_session=True
        )
    try:
        give_up = time.monotonic() + START_SECONDS
        while not answers(url, body):
            if server.poll() is not None or time.monotonic() > give_up:
                sys.exit(f"benchmark: {line[0]} did not start; its log:\n{log.read_text()[-3000:]}")
            time.sleep(0.02)
        return sum(used for _, used in session(server.pid))
    finally:
        server.terminate()
        try:
            server.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
        for pid, _ in session(server.pid):
            os.kill(pid, signal.SIGKILL)


def answers(url: str, body: bytes) -> bool:
    """Whether a prediction is answered with 200."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, http.client.HTTPException):
        return False


def session(leader: int) -> Iterator[tuple[int, float]]:
    """Every process of a session with its processor seconds and those of its children that have ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            yield int(path.parent.name), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Runs:
    """What the harness measured of one model: per server, the newest run that has it."""

    def __init__(self, results: Path, model: str) -> None:
        self.files = [json.loads(path.read_text()) for path in sorted(results.glob(f"{model}-*.json"))]

    def rounds(self, server: str) -> list[dict[str, Any]]:
        """The rounds of the newest run in which the server and this service were measured."""
        for file in reversed(self.files):
            both = [
                one
                for one in file["rounds"]
                if all(one.get(name, {}).get("points") for name in (server, OURS))
            ]
            if both:
                return both
        return []

    def servers(self) -> list[str]:
        """The servers in the order of `SERVERS`, then others that were asked for."""
        named = [name for file in self.files for one in file["rounds"] for name in one]
        return [name for name in dict.fromkeys([*SERVERS, *named]) if name != OURS and self.rounds(name)]

    def median(self, server: str, value: Callable[[dict[str, Any]], float], base: str = "") -> float:
        """The median over rounds of a value, or of its ratio to that of `base` in the same round."""
        pairs = [(value(one[server]), value(one[base]) if base else 1) for one in self.rounds(base or server)]
        # A server that answered nothing in a round has no figures to compare with.
        return statistics.median([a / b for a, b in pairs if b] or [math.nan])

    def noise(self) -> float:
        """Processors that something else used, or the host took, while a point was measured; the worst."""
        points = [
            point
            for server in [OURS, *self.servers()]
            for one in self.rounds(server)
            for point in one[server]["points"]
        ]
        return max((point["other_cores"] + point["stolen_cores"] for point in points), default=math.nan)


def at(connections: int, key: str) -> Callable[[dict[str, Any]], float]:
    """A value of the point with so many connections."""
    return lambda result: next(float(one[key]) for one in result["points"] if one["c"] == connections)


def pss(result: dict[str, Any]) -> float:
    """Megabytes of all processes after the load."""
    return float(result["loaded"]["pss_mb"])


COLUMNS = [
    (f"requests/s at {MANY}", at(MANY, "rps"), ",.0f"),
    (f"p99 ms at {MANY}", at(MANY, "p99_ms"), ",.1f"),
    ("p50 ms at 1", at(1, "p50_ms"), ".2f"),
    ("memory MB (PSS)", pss, ",.0f"),
]


def report(results: Path) -> str:
    """All that was measured so far, as Markdown."""
    lines = [
        "# Benchmark",
        "",
        "Written by `make benchmark`. Everything is switched on in `ours`: validation, problem documents, "
        "request ids, a JSON line a request, metrics of all workers together, admission.",
        "`raw-asgi-batch-onnx` is a bare ASGI application with none of it, `seed-fastapi` what tutorials "
        "teach, the others serve the same model as their documentation says.",
        "Only ratios mean anything: each is the median over rounds of this service's figure divided by the "
        "other server's in the same round.",
    ]
    for model in MODELS:
        runs, cold = Runs(results, model), results / f"cold-{model}.json"
        seconds = json.loads(cold.read_text())["seconds"] if cold.exists() else {}
        if not runs.servers() and not seconds:
            continue
        lines += ["", f"## {model}", ""]
        if runs.servers():
            lines += setup(runs) + table(runs)
        if seconds:
            middle = {name: statistics.median(taken) for name, taken in seconds.items()}
            found = ", ".join(f"`{name}` {taken:.2f}" for name, taken in middle.items())
            ratio = middle[OURS] / middle[RAW]
            title = (
                f"Processor seconds of a cold start to the first prediction, median of {len(seconds[OURS])}"
            )
            lines += ["", f"{title}: {found}; ratio {ratio:.2f}."]
        lines += ["", "| aim | measured |", "|---|--:|"]
        lines += [f"| {aim} | {figure} |" for aim, figure in aims(model, runs, seconds)]
    both = {model: Runs(results, f"cost-{model}") for model in KEPT}
    if both := {model: runs for model, runs in both.items() if runs.servers()}:
        lines += costs(both)
    return "\n".join(lines) + "\n"


def costs(both: dict[str, Runs]) -> list[str]:
    """What observation costs, by model."""
    rate = at(MANY, "rps")
    lines = [
        *("", "## What observation costs", ""),
        f"This service, and the same with nothing recorded and no line written (`benchmarks/{BARE}.py`), in "
        f"turns, at {MANY} connections. `millisecond` is the tiny model slowed to a millisecond a row.",
        *("", *setup(next(iter(both.values())))),
        f"| model | requests/s | {BARE} | kept | aim |",
        "|---|--:|--:|--:|--:|",
    ]
    for model, runs in both.items():
        cells = [f"{runs.median(OURS, rate):,.0f}", f"{runs.median(BARE, rate):,.0f}"]
        cells += [f"{runs.median(OURS, rate, base=BARE):.2f}", f"at least {KEPT[model]:.2f}"]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def setup(runs: Runs) -> list[str]:
    """How it was measured."""
    one = next(file for file in reversed(runs.files) if file["rounds"])["setup"]
    counts = {len(runs.rounds(name)) for name in runs.servers()}
    rounds = "-".join(str(count) for count in sorted({min(counts), max(counts)}))
    return [
        f"{one['workers']} workers, {one['cpus']} processors shared with the load generator, "
        f"{rounds} rounds of {one['duration_s']} s a point, {one['started'][:10]}. "
        f"Meanwhile something else used up to {runs.noise():.2f} processors.",
        "",
    ]


def table(runs: Runs) -> list[str]:
    """Medians of each server, and after each how this service compares."""
    head = " | ".join(f"{title} | ours / it" for title, _, _ in COLUMNS)
    lines = [f"| server | {head} | errors |", "|---|" + "--:|" * (2 * len(COLUMNS) + 1)]
    for name in [OURS, *runs.servers()]:
        cells = []
        for _, value, form in COLUMNS:
            ratio = "" if name == OURS else f"{runs.median(OURS, value, base=name):.2f}"
            cells += [format(runs.median(name, value), form), ratio.replace("nan", "-")]
        errors = sum(point["errors"] for one in runs.rounds(name) for point in one[name]["points"])
        lines.append(f"| {name} | {' | '.join(cells)} | {errors} |")
    return lines


def aims(model: str, runs: Runs, seconds: dict[str, list[float]]) -> Iterator[tuple[str, str]]:
    """What this service is held to, and what was found."""
    rate, p99, p50 = (value for _, value, _ in COLUMNS[:3])

    def ratio(value: Callable[[dict[str, Any]], float], base: str) -> str:
        found = runs.median(OURS, value, base=base)
        return "not measured" if math.isnan(found) else f"{found:.2f}"

    yield f"at least 0.40 of the requests/s of `{RAW}` at {MANY}", ratio(rate, RAW)
    if model == "tiny":
        yield f"at least 7 times the requests/s of `{SEED}` at {MANY}", ratio(rate, SEED)
        yield f"at most 2.5 times the p99 of `{RAW}` at {MANY}", ratio(p99, RAW)
    else:
        measured = [name for name in FRAMEWORKS if not math.isnan(runs.median(OURS, rate, base=name))]
        best = min(measured, key=lambda name: runs.median(OURS, rate, base=name), default="")
        title = (
            "at least 8 times the requests/s of the best of BentoML, LitServe, MLServer, Ray Serve, KServe"
        )
        yield f"{title} at {MANY}", f"{ratio(rate, best)} (`{best}`)" if best else "not measured"
        yield f"at least 2.5 times the requests/s of `mosec-batch` at {MANY}", ratio(rate, "mosec-batch")
    yield f"at most 1.4 times the p50 of `{RAW}` at one connection", ratio(p50, RAW)
    yield f"at most 1.25 times the memory of `{RAW}`", ratio(pss, RAW)
    cold = statistics.median(seconds[OURS]) / statistics.median(seconds[RAW]) if seconds else math.nan
    found = "not measured" if math.isnan(cold) else f"{cold:.2f}"
    yield f"at most 2 times the processor time of a cold start of `{RAW}`", found


def parse() -> argparse.Namespace:
    """The command line."""
    home = os.environ.get("PEERS_HOME") or Path(tempfile.gettempdir()) / "peers"
    folder = os.environ.get("PEERS_DIR") or ROOT.parent / "shared" / "peers"
    parser = argparse.ArgumentParser(description="Measure the rendered service against reference servers.")
    parser.add_argument("--peers", type=Path, default=Path(folder), help="the harness (PEERS_DIR)")
    parser.add_argument("--peers-home", type=Path, default=Path(home), help="its environments (PEERS_HOME)")
    parser.add_argument("--model", default=",".join(MODELS), help="tiny, medium or both")
    parser.add_argument(
        "--only", default=",".join(SERVERS), help=f"servers; {RAW} and {SEED} always are there"
    )
    parser.add_argument(
        "--parts", default="load,cold,cost", help="load, cold, cost, or none to write the report anew"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=int, default=8, help="seconds a point")
    parser.add_argument("--cold-runs", type=int, default=7)
    parser.add_argument("--forget", action="store_true", help="first remove the figures of earlier runs")
    options = parser.parse_args()
    for name in ("model", "only", "parts"):
        setattr(options, name, [word for word in getattr(options, name).split(",") if word])
    if unknown := set(options.model) - set(MODELS) or set(options.parts) - {"load", "cold", "cost"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    options.peers, options.peers_home = options.peers.resolve(), options.peers_home.resolve()
    return options


def main() -> None:
    """Measures the parts that were asked for and writes the report of all parts so far."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse()
    if not (options.peers / "run.py").exists():
        sys.exit(f"benchmark: there is no harness in {options.peers}; name its folder in PEERS_DIR")
    if not (options.peers_home / "venvs" / "base").exists():
        sys.exit(f"benchmark: no environments in {options.peers_home}; setup.sh makes them in PEERS_HOME")
    if options.forget:
        shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.parts:
        prepare(options.model, options.parts)
    try:
        for model in options.model:
            if "cold" in options.parts:
                say(f"Cold starts, {model}")
                cold_starts(options, model)
            if "load" in options.parts:
                say(f"Servers of the {model} model: {options.rounds} rounds")
                servers(options, model)
        if "cost" in options.parts:
            say(f"This service with and without observation: {options.rounds} rounds")
            cost(options)
    finally:
        REPORT.write_text(report(RESULTS), encoding="utf-8")
        print(f"\n{REPORT.read_text(encoding='utf-8')}\nbenchmark: report in {REPORT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
