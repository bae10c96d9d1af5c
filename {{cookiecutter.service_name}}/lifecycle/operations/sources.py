"""Where the figures about a running service come from: Prometheus, a saved answer of /metrics, or the log."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer
from prometheus_client.parser import text_string_to_metric_families

from lifecycle.errors import LifecycleError

MINIMUM = 300  # rows, below which no verdict is given; as in ops/prometheus/drift_rules.yml

Prometheus = Annotated[str, typer.Option(envvar="PROMETHEUS", help="Ask this Prometheus.")]
Scrape = Annotated[Path | None, typer.Option(envvar="METRICS", help="Or read a saved answer of /metrics.")]
Window = Annotated[str, typer.Option(envvar="WINDOW", help="How far to look back in Prometheus.")]


def ask(address: str, query: str) -> list[tuple[dict[str, str], float]]:
    """The answer of Prometheus to an instant query: labels and value of each series."""
    try:
        answer = httpx2.get(f"{address.rstrip('/')}/api/v1/query", params={"query": query}, timeout=10)
        series = answer.raise_for_status().json()["data"]["result"]
        return [(one["metric"], float(one["value"][1])) for one in series]
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, KeyError) as error:
        raise LifecycleError(f"{address}: no answer from Prometheus ({_words(error)})") from None


def scraped(path: Path) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each sample in a saved answer of /metrics."""
    try:
        for family in text_string_to_metric_families(read(path)):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value
    except ValueError as error:
        raise LifecycleError(f"{path}: not a scrape of /metrics ({_words(error)})") from None


def log_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a log, also where a log collector put something in front of them."""
    for line in read(path).splitlines():
        try:
            document = json.loads(line[line.find("{") :])
        except ValueError:
            continue
        if isinstance(document, dict):
            yield document


def read(path: Path) -> str:
    """The text of a file that people or other programs made; bytes that are not UTF-8 are replaced."""
    return path.read_text("utf-8", errors="replace")


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
