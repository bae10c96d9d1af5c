"""A new version beside the served one: as a shadow for no client, then as a canary for some; how it does.

shadow, canary -> release.json, which the running service follows
Prometheus, or a scrape of /metrics -> traffic, agreement, failures, latency, scores -> table, picture

Neither needs an evaluation, because neither replaces the served version: `make promote` does.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.core.store import Release, read_artifact, read_release
from app.rollout.canary import ERROR_MARGIN, LATENCY_FACTOR, LATENCY_SECONDS
from lifecycle.errors import LifecycleError
from lifecycle.files import ROOT
from lifecycle.operations.sources import MINIMUM, ask, scraped
from lifecycle.package import write_release
from lifecycle.printing import table

# What is read, and the label that names the version.
COUNTERS = {
    "predictions_total": "model_version",
    "shadow_predictions_total": "shadow_version",
    "canary_requests_total": "model_version",
    "canary_failures_total": "model_version",
}
HISTOGRAMS = {
    "prediction_score": "model_version",
    "prediction_value": "model_version",
    "shadow_score": "shadow_version",
    "shadow_value": "shadow_version",
    "model_call_duration_seconds": "model_version",
    "canary_duration_seconds": "model_version",
}
AGREEMENTS = {"agree": "#4878a8", "disagree": "#d08030", "error": "#b03030", "dropped": "#dddddd"}
Sample = tuple[str, dict[str, str], float]


def shadow(version: str | None, *, artifacts: Path = ROOT / "artifacts") -> Release:
    """Ask `version` every question after the client got its answer; clients never see it. None ends it.

    Raises ArtifactError for a version that serves already or is not whole.
    """
    return _beside(artifacts, version, shadow=version)


def canary(version: str | None, percent: int = 10, *, artifacts: Path = ROOT / "artifacts") -> Release:
    """Let `version` answer `percent` of the clients, until it does worse than the served one. None ends it.

    Raises ArtifactError or LifecycleError for a version that serves already or is not whole.
    """
    return _beside(artifacts, version, canary=version, canary_percent=percent if version else 0)


def _beside(root: Path, version: str | None, **change: Any) -> Release:
    release = read_release(root)
    if version is not None:
        if version == release.serving:
            raise LifecycleError(f"{version} serves already")
        read_artifact(root, version)
    after = Release(**release.model_dump() | change)
    write_release(root, after)
    return after


@dataclass
class Side:
    """What was seen of one version. Buckets of histograms: upper bound -> count up to there."""

    version: str
    role: str
    counts: Counter[str] = field(default_factory=Counter)  # by metric, or by a shadow's agreement
    buckets: defaultdict[str, Counter[float]] = field(default_factory=lambda: defaultdict(Counter))

    @property
    def rows(self) -> float:
        """The rows it answered, or as a shadow would have."""
        return self.counts["predictions_total"] + self.counts["agree"] + self.counts["disagree"]

    @property
    def agreement(self) -> float:
        """The share of a shadow's answers that the served version gave, too."""
        return self.counts["agree"] / self.rows if self.rows else math.nan

    @property
    def failures(self) -> float:
        """The share that failed: of a shadow's rows, or of the requests while there is a canary."""
        if self.role == "shadow":
            failed, whole = self.counts["error"], self.rows + self.counts["error"]
        else:
            failed, whole = self.counts["canary_failures_total"], self.counts["canary_requests_total"]
        return failed / whole if whole else math.nan

    def quantile(self, histogram: str, share: float) -> float:
        """Interpolated within its bucket, as Prometheus does."""
        bounds = sorted(self.buckets[histogram].items())
        target, low, below = share * (bounds[-1][1] if bounds else 0), 0.0, 0.0
        for high, upto in bounds:
            if upto >= target and upto > below:
                return low if math.isinf(high) else low + (high - low) * (target - below) / (upto - below)
            low, below = high, upto
        return math.nan

    @property
    def spread(self) -> str:
        """The name of the histogram of its scores, or of a regressor's values."""
        return next((name for name in self.buckets if name.endswith(("_score", "_value"))), "")

    @property
    def latency(self) -> str:
        """The name of the histogram by which it is compared: a canary's requests, a shadow's calls."""
        return "canary_duration_seconds" if self.role == "canary" else "model_call_duration_seconds"

    def verdict(self, served: "Side") -> str:
        """The conclusion, by the margins that stop a canary too."""
        if self.role == "serving":
            return "-"
        if (self.counts["canary_requests_total"] if self.role == "canary" else self.rows) < MINIMUM:
            return "too little to say"
        own = served.failures if self.role == "canary" and not math.isnan(served.failures) else 0.0
        if self.failures > own + ERROR_MARGIN:
            return "fails too often"
        longest = LATENCY_FACTOR * served.quantile(self.latency, 0.95) + LATENCY_SECONDS
        if self.quantile(self.latency, 0.95) > longest:
            return "too slow"
        return "promote" if self.role == "canary" else "try as canary"


def compare(
    prometheus: str = "http://127.0.0.1:9090", window: str = "1h", scrape: Path | None = None
) -> list[Side]:
    """The served version, then canary and shadow: over `window`, or since the start from a saved `scrape`.

    Raises LifecycleError if there is nothing to compare.
    """
    found = sides(scraped(scrape) if scrape else from_prometheus(prometheus, window))
    if [side.role for side in found[:2]] not in (["serving", "canary"], ["serving", "shadow"]):
        raise LifecycleError(f"{scrape or prometheus}: there is no shadow and no canary to compare")
    return found


def from_prometheus(address: str, window: str) -> list[Sample]:
    """The increase of everything that `sides` reads, over the last `window`."""
    wanted = [*COUNTERS, *(f"{name}_bucket" for name in HISTOGRAMS)]
    samples = [
        (name, labels, value)
        for name in wanted
        for labels, value in ask(address, f"increase({name}[{window}])")
    ]
    return samples + [("model_info", labels, value) for labels, value in ask(address, "model_info")]


def sides(samples: Iterable[Sample]) -> list[Side]:
    """The served version, then canary and shadow."""
    found = list(samples)
    serving = {labels["version"] for name, labels, value in found if name == "model_info" and value}
    shadows = {labels["shadow_version"] for name, labels, _ in found if name == "shadow_predictions_total"}
    asked = {labels["model_version"] for name, labels, _ in found if name == "canary_requests_total"}
    roles = {"serving": serving, "canary": asked - serving, "shadow": shadows - serving}
    result = [Side(version, role) for role, versions in roles.items() for version in sorted(versions)]
    for name, labels, value in found:
        histogram = name.removesuffix("_bucket")
        version = labels.get(COUNTERS.get(name) or HISTOGRAMS.get(histogram, ""), "")
        for side in result:
            # A version in both roles has scores of its own in each; its calls are counted together.
            mixed = name.startswith("model_call") or name.startswith("shadow") == (side.role == "shadow")
            if version != side.version or not mixed:
                continue
            if name in COUNTERS:
                side.counts[labels.get("agreement", name)] += value  # type: ignore[assignment]  # no whole number
            elif name != histogram:
                side.buckets[histogram][float(labels["le"])] += value  # type: ignore[assignment]
    return result


def comparison(found: Sequence[Side]) -> str:
    """A table with a line for each version."""
    head = ["version", "role", "rows", "dropped", "agreement", "failures", "model p50, p95 ms"]
    rows = [
        (
            side.version,
            side.role,
            f"{side.rows:,.0f}",
            f"{side.counts['dropped']:,.0f}",
            _share(side.agreement if side.role == "shadow" else math.nan),
            _share(side.failures),
            _quantiles(side, "model_call_duration_seconds", (0.5, 0.95), 1000),
            _quantiles(side, "canary_duration_seconds", (0.5, 0.95), 1000),
            _quantiles(side, side.spread, (0.1, 0.5, 0.9)),
            side.verdict(found[0]),
        )
        for side in found
    ]
    return table([*head, "request p50, p95 ms", "score p10, p50, p90", "verdict"], rows)


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _quantiles(side: Side, histogram: str, shares: Sequence[float], factor: float = 1) -> str:
    values = [side.quantile(histogram, share) for share in shares]
    return "-" if any(map(math.isnan, values)) else ", ".join(f"{factor * value:.3g}" for value in values)


def draw(found: Sequence[Side], path: Path) -> None:
    """Draw agreement, latency and scores beside each other; the name of `path` gives the format."""
    from matplotlib.figure import Figure  # here, because it takes a second

    figure = Figure(figsize=(12, 4), layout="constrained")
    agreement, latency, scores = figure.subplots(1, 3)
    names = [f"{side.version}\n{side.role}" for side in found]
    agreement.set(title="rows of a shadow", ylabel="share", ylim=(0, 1))
    whole = [max(sum(side.counts[one] for one in AGREEMENTS), 1) for side in found]
    bottom = [0.0] * len(found)
    for one, colour in AGREEMENTS.items():
        heights = [side.counts[one] / total for side, total in zip(found, whole, strict=True)]
        agreement.bar(names, heights, bottom=bottom, label=one, color=colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    latency.set(title="a call of the model", ylabel="ms")
    for shift, share in ((-0.2, 0.5), (0.2, 0.95)):
        values = [1000 * side.quantile("model_call_duration_seconds", share) for side in found]
        latency.bar([at + shift for at in range(len(found))], values, width=0.4, label=f"p{share * 100:.0f}")
    latency.set_xticks(range(len(found)), names)
    scores.set(title="scores", ylabel="share of rows")
    for side in found:
        bounds = sorted(side.buckets[side.spread].items()) if side.spread else []
        if bounds and bounds[-1][1]:
            steps = itertools.pairwise([(0.0, 0.0), *bounds])
            heights = [(upto - below) / bounds[-1][1] for (_, below), (_, upto) in steps]
            label = f"{side.version}, {side.role}"
            scores.plot([f"{bound:g}" for bound, _ in bounds], heights, drawstyle="steps-mid", label=label)
    for axes in (agreement, latency, scores):
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
