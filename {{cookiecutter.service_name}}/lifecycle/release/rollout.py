"""A new version beside the served one: unseen as a shadow, then for some clients as a canary; how it does.

make shadow, make canary -> release.json, which the running service follows
Prometheus, or a scrape of /metrics -> traffic, agreement, failures, latency, scores -> table, picture

Neither needs a gate, because neither puts the version in the place of the served one: `make promote` does.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from app.core.errors import ArtifactError
from app.core.store import Release, read_artifact, read_release
from app.rollout.canary import ERROR_MARGIN, LATENCY_FACTOR, LATENCY_SECONDS
from lifecycle.errors import LifecycleError
from lifecycle.operations.sources import MINIMUM, Prometheus, Scrape, Window, ask, scraped
from lifecycle.package import write_release

ROOT = Path(__file__).resolve().parents[2]
Artifacts = Annotated[Path, typer.Option(help="Folder of the versions and of release.json.")]
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


def shadow(
    version: Annotated[
        str, typer.Option(envvar="VERSION", help="The version, such as v2; empty ends the shadow.")
    ] = "",
    artifacts: Artifacts = ROOT / "artifacts",
) -> None:
    """Ask VERSION what clients ask, after they got their answer; nobody sees what it says."""
    _release(artifacts, version, shadow=version or None)
    typer.echo(f"shadow: {version or 'none'}; a running service follows within seconds")


def canary(
    version: Annotated[
        str, typer.Option(envvar="VERSION", help="The version, such as v2; empty ends the canary.")
    ] = "",
    percent: Annotated[int, typer.Option(envvar="PERCENT", min=0, max=100, help="Of the clients.")] = 10,
    artifacts: Artifacts = ROOT / "artifacts",
) -> None:
    """Let VERSION answer PERCENT of the clients, until it does worse than the served version."""
    percent = percent if version else 0
    _release(artifacts, version, canary=version or None, canary_percent=percent)
    typer.echo(
        f"canary: {version or 'none'}, {percent}% of clients; a running service follows within seconds"
    )


def _release(root: Path, version: str, **change: Any) -> None:
    """Change release.json, if `version` is one to put beside the served one."""
    try:
        release = read_release(root)
        if version:
            if version == release.serving:
                raise ArtifactError(f"{version} serves already")
            read_artifact(root, version)
        write_release(root, Release(**release.model_dump() | change))
    except ArtifactError as error:
        typer.echo(f"release: {error}", err=True)
        raise typer.Exit(1) from None


@dataclass
class Side:
    """What was seen of one version. Buckets of histograms: upper bound -> how many, up to there."""

    version: str
    role: str
    counts: Counter[str] = field(default_factory=Counter)  # by metric, or by a shadow's agreement
    buckets: defaultdict[str, Counter[float]] = field(default_factory=lambda: defaultdict(Counter))

    @property
    def rows(self) -> float:
        """What it answered, or as a shadow would have."""
        return self.counts["predictions_total"] + sum(self.counts[one] for one in ("agree", "disagree"))

    @property
    def agreement(self) -> float:
        """The share of a shadow's answers that clients got from the served version, too."""
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
        """The histogram of its scores, or of a regressor's values."""
        return next((name for name in self.buckets if name.endswith(("_score", "_value"))), "")


def sides(samples: Iterable[Sample]) -> list[Side]:
    """The served version, then canary and shadow."""
    found = list(samples)
    serving = {labels["version"] for name, labels, value in found if name == "model_info" and value}
    shadows = {labels["shadow_version"] for name, labels, _ in found if name == "shadow_predictions_total"}
    asked = {labels["model_version"] for name, labels, _ in found if name == "canary_requests_total"}
    by_key = {(version, "serving"): Side(version, "serving") for version in serving}
    by_key |= {(version, "canary"): Side(version, "canary") for version in sorted(asked - serving)}
    by_key |= {(version, "shadow"): Side(version, "shadow") for version in sorted(shadows - serving)}
    for name, labels, value in found:
        histogram = name.removesuffix("_bucket")
        version = labels.get(COUNTERS.get(name) or HISTOGRAMS.get(histogram, ""), "")
        for (own, role), side in by_key.items():
            # A version that is both has its own scores as each; its calls are counted together.
            mixed = name.startswith("model_call") or name.startswith("shadow") == (role == "shadow")
            if version != own or not mixed:
                continue
            if name in COUNTERS:
                side.counts[labels.get("agreement", name)] += value  # type: ignore[assignment]  # no whole number
            elif name != histogram:
                side.buckets[histogram][float(labels["le"])] += value  # type: ignore[assignment]
    return list(by_key.values())


def from_prometheus(address: str, window: str) -> list[Sample]:
    """All that `sides` wants, of the last `window`."""
    wanted = [*COUNTERS, *(f"{name}_bucket" for name in HISTOGRAMS)]
    samples = [
        (name, labels, value)
        for name in wanted
        for labels, value in ask(address, f"increase({name}[{window}])")
    ]
    return samples + [("model_info", labels, value) for labels, value in ask(address, "model_info")]


def verdict(side: Side, served: Side) -> str:
    """What the numbers say, by the margins that stop a canary too."""
    if side.role == "serving":
        return "-"
    if (side.counts["canary_requests_total"] if side.role == "canary" else side.rows) < MINIMUM:
        return "too little to say"
    own = served.failures if side.role == "canary" and not math.isnan(served.failures) else 0.0
    if side.failures > own + ERROR_MARGIN:
        return "fails too often"
    latency = "canary_duration_seconds" if side.role == "canary" else "model_call_duration_seconds"
    if side.quantile(latency, 0.95) > LATENCY_FACTOR * served.quantile(latency, 0.95) + LATENCY_SECONDS:
        return "too slow"
    return "promote" if side.role == "canary" else "try as canary"


def table(found: Sequence[Side]) -> str:
    """A line a version."""
    head = "version  role         rows  dropped  agreement  failures  model p50, p95 ms   request p50, p95 ms"
    lines = [f"{head}   score p10, p50, p90  verdict"]
    for side in found:
        cells = [
            f"{side.version:<7}  {side.role:<7}  {side.rows:>8,.0f}  {side.counts['dropped']:>7,.0f}",
            f"{_share(side.agreement) if side.role == 'shadow' else '-':>9}",
            f"{_share(side.failures):>8}",
            f"{_numbers(side, 'model_call_duration_seconds', (0.5, 0.95), 1000):>17}",
            f"{_numbers(side, 'canary_duration_seconds', (0.5, 0.95), 1000):>20}",
            f"{_numbers(side, side.spread, (0.1, 0.5, 0.9)):>20}",
            verdict(side, found[0]),
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _numbers(side: Side, histogram: str, shares: Sequence[float], factor: float = 1) -> str:
    values = [side.quantile(histogram, share) for share in shares]
    return "-" if any(map(math.isnan, values)) else ", ".join(f"{factor * value:.3g}" for value in values)


def draw(found: Sequence[Side], path: Path) -> None:
    """Agreement, latency and scores beside each other, as SVG."""
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
    agreement.legend()
    latency.set(title="a call of the model", ylabel="ms")
    for shift, share in ((-0.2, 0.5), (0.2, 0.95)):
        values = [1000 * side.quantile("model_call_duration_seconds", share) for side in found]
        latency.bar([at + shift for at in range(len(found))], values, width=0.4, label=f"p{share * 100:.0f}")
    latency.set_xticks(range(len(found)), names)
    latency.legend()
    scores.set(title="scores", ylabel="share of rows")
    for side in found:
        bounds = sorted(side.buckets[side.spread].items()) if side.spread else []
        if bounds and bounds[-1][1]:
            steps = itertools.pairwise([(0.0, 0.0), *bounds])
            heights = [(upto - below) / bounds[-1][1] for (_, below), (_, upto) in steps]
            label = f"{side.version}, {side.role}"
            scores.plot([f"{bound:g}" for bound, _ in bounds], heights, drawstyle="steps-mid", label=label)
    scores.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def compare(
    prometheus: Prometheus = "http://127.0.0.1:9090",
    metrics: Scrape = None,
    window: Window = "1h",
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = ROOT / "build" / "compare.svg",
) -> None:
    """Put served version, canary and shadow side by side: traffic, agreement, failures, latency, scores."""
    try:
        found = sides(scraped(metrics) if metrics else from_prometheus(prometheus, window))
        if [side.role for side in found[:2]] not in (["serving", "canary"], ["serving", "shadow"]):
            raise LifecycleError(f"{metrics or prometheus}: there is no shadow and no canary to compare")
    except LifecycleError as error:
        typer.echo(f"compare: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(table(found))
    draw(found, picture)
    typer.echo(f"picture: {picture}")
