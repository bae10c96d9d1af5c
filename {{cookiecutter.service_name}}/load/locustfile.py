"""Traffic as from clients, and the gate that the service must pass.

golden set -> single and batch calls, one in twenty invalid -> p50, p95, p99, error ratio -> exit code

python -m load.run                                         starts the service, loads it, stops it
locust -f load/locustfile.py --host http://localhost:8000  loads a running service, with locust's web page
"""

import ipaddress
import random
import tomllib
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from locust import FastHttpUser, between, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from lifecycle.command import ROOT
from lifecycle.operations.programs import golden_rows


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]  # locust leaves it untyped
def add_options(parser: LocustArgumentParser) -> None:
    """Add options for the gate, with the numbers of slo.toml as defaults."""
    slo = tomllib.loads((ROOT / "slo.toml").read_text("utf-8"))
    add = parser.add_argument
    add("--p95-ms", type=float, default=slo["latency_p95_ms"], help="p95 latency must be below")
    add("--error-ratio", type=float, default=slo["error_ratio"], help="errors / calls at most")
    add("--allow-remote", action="store_true", help="load a host that is not this machine")
    add("--api-key", env_var="LOAD_API_KEY", is_secret=True, default="", help="sent as X-API-Key")


@events.test_start.add_listener  # type: ignore[untyped-decorator]  # locust leaves it untyped
def refuse_other_machines(environment: Environment, **_: object) -> None:
    """Refuse other hosts than this machine without --allow-remote: load on the wrong host is an outage."""
    options = environment.parsed_options
    assert options is not None  # set by locust's main  # noqa: S101
    host = urlsplit(environment.host or "").hostname or ""
    own = host == "localhost"
    with suppress(ValueError):  # a name; no DNS query
        own = ipaddress.ip_address(host).is_loopback
    if not (own or options.allow_remote):
        raise SystemExit(f"load: {host or 'no host'} is not this machine; add --allow-remote if you mean it")


@events.quitting.add_listener  # type: ignore[untyped-decorator]  # locust leaves it untyped
def judge(environment: Environment, **_: object) -> None:
    """Print the percentiles and the verdict, and make the verdict the exit code."""
    options, total = environment.parsed_options, environment.stats.total
    assert options is not None  # as above  # noqa: S101
    p50, p95, p99 = (total.get_response_time_percentile(share) or 0 for share in (0.5, 0.95, 0.99))
    ratio, most = total.fail_ratio, options.error_ratio
    broken = {
        "nothing was answered": total.num_requests == 0,
        f"p95 {p95} ms is not below {options.p95_ms:g} ms": not p95 < options.p95_ms,
        f"error ratio {ratio:.4f} is above {most:g}": ratio > most,
    }
    reasons = [words for words, is_broken in broken.items() if is_broken]
    figures = (
        f"load: {total.num_requests} calls, {total.total_rps:.0f} a second, {total.num_failures} errors; "
        f"p50 {p50} ms, p95 {p95} ms, p99 {p99} ms"
    )
    verdict = "load: FAILED, " + " and ".join(reasons) if reasons else "load: passed"
    environment.process_exit_code = int(bool(reasons))

    def show(**_: object) -> None:
        print(figures, verdict, sep="\n", flush=True)

    # After locust's own table, so that the verdict is the last line.
    environment.events.quit.add_listener(show)  # type: ignore[no-untyped-call]  # locust leaves it untyped


class Client(FastHttpUser):
    """Sends golden rows, and compares the answers of the busy service with the golden ones."""

    wait_time = between(0.05, 0.15)

    def on_start(self) -> None:
        """Read the golden set of the served version."""
        self.version, self.golden = golden_rows()
        key = self.environment.parsed_options.api_key
        self.headers = {"X-API-Key": key} if key else {}

    @task(80)
    def single(self) -> None:
        """One instance."""
        row = random.choice(self.golden)
        self.ask("/v1/predict", row["features"], lambda answer: self.same([row], [answer], answer))

    @task(15)
    def batch(self) -> None:
        """Up to the whole golden set in one call."""
        rows = random.sample(self.golden, random.randint(2, len(self.golden)))
        body = {"instances": [row["features"] for row in rows]}
        self.ask("/v1/predict/batch", body, lambda answer: self.same(rows, answer["predictions"], answer))

    @task(5)
    def invalid(self) -> None:
        """A missing field, an extra field, or a wrong type: the right answer is a 422 about the input."""
        row = random.choice(self.golden)["features"]
        name = random.choice(list(row))
        fewer = {key: value for key, value in row.items() if key != name}
        broken = random.choice([fewer, row | {"unheard_of": 1}, row | {name: [1]}])
        self.ask("/v1/predict", broken, blames_input, status=422, name="/v1/predict (invalid)")

    def ask(
        self, path: str, body: Any, is_right: Callable[[Any], bool], status: int = 200, name: str = ""
    ) -> None:
        """POST `body`; a status other than `status`, or a wrong answer, counts as an error."""
        with self.client.post(
            path, json=body, headers=self.headers, name=name or path, catch_response=True
        ) as response:
            if response.status_code != status:
                response.failure(f"status {response.status_code}, expected {status}")
                return
            try:
                if is_right(response.json()):
                    response.success()
                else:
                    response.failure("an answer that differs from the golden set")
            except (KeyError, TypeError, ValueError) as error:
                response.failure(f"unexpected answer: {error!r}")

    def same(self, rows: list[Any], predictions: list[Any], answer: Any) -> bool:
        """Whether each row got its own answer; answers of other versions are not compared."""
        return answer["model_version"] != self.version or all(map(as_recorded, rows, predictions))


def as_recorded(row: Any, prediction: Any) -> bool:
    """Whether the label is the recorded label, or the value is within the tolerance."""
    if "label" in row:
        return bool(prediction["label"] == row["label"])
    return bool(abs(prediction["value"] - row["value"]) <= row["tolerance"])


def blames_input(answer: Any) -> bool:
    """Whether the problem document is about the input."""
    return bool(answer["code"] == "invalid_input")
