"""A new version beside the served version: as a shadow, then as a canary; and a comparison of both.

shadow, canary -> release.json, which the running service follows
Prometheus, or a scrape of /metrics -> traffic, agreement, failures, latency, scores -> table, picture

Shadow and canary need no evaluation, because neither replaces the served version: `make promote` does.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from app.core.store import Release, read_artifact, read_release
from app.rollout.canary import ERROR_MARGIN, LATENCY_FACTOR, LATENCY_SECONDS
from lifecycle.command import ROOT, LifecycleError, table
from lifecycle.operations.monitor import MINIMUM, Prometheus, Scrape, Window, ask, scraped
from lifecycle.package import write_release

COUNTERS = (
    "predictions_total", "shadow_predictions_total", "canary_requests_total", "canary_failures_total",
)  # fmt: skip
CALLS, REQUESTS = "model_call_duration_seconds", "canary_duration_seconds"
HISTOGRAMS = ("prediction_score", "prediction_value", "shadow_score", "shadow_value", CALLS, REQUESTS)
AGREEMENTS = {"agree": "#4878a8", "disagree": "#d08030", "error": "#b03030", "dropped": "#dddddd"}
Beside = Annotated[str | None, typer.Option(help="The version, like v2.")]
End = Annotated[bool, typer.Option("--end", help="End it.")]
Artifacts = Annotated[Path, typer.Option(help="Folder of the versions and of release.json.")]
Sample = tuple[str, dict[str, str], float]


def shadow(version: Beside = None, *, end: End = False, artifacts: Artifacts = ROOT / "artifacts") -> None:
    """Let VERSION predict the clients' rows after they got their answers; clients never see its answers."""
    _beside("shadow", artifacts, version, end=end)


def canary(
    version: Beside = None,
    percent: Annotated[int, typer.Option(envvar="PERCENT", min=0, max=100, help="Of the clients.")] = 10,
    *,
    end: End = False,
    artifacts: Artifacts = ROOT / "artifacts",
) -> None:
    """Let VERSION answer PERCENT of the clients; it stops if it does worse than the served version."""
    _beside("canary", artifacts, version, end=end, canary_percent=0 if end else percent)


def _beside(role: str, root: Path, version: str | None, *, end: bool, **more: int) -> None:
    """Change a role in release.json; raises ArtifactError or LifecycleError for an unfit version."""
    release = read_release(root)
    if bool(version) == end:
        raise LifecycleError(f"say which version: make {role} VERSION=v2; or end it: make {role} END=yes")
    if version:
        if version == release.serving:
            raise LifecycleError(f"{version} serves already")
        read_artifact(root, version)
    write_release(root, Release(**release.model_dump() | {role: version or None} | more))
    share = "".join(f", {percent}% of clients" for percent in more.values())
    typer.echo(f"{role}: {version or 'none'}{share}; a running service follows within seconds")


@dataclass
class Side:
    """Measurements of one version. Buckets of histograms: upper bound -> cumulative count."""

    version: str
    role: str
    counts: Counter[str] = field(default_factory=Counter)  # by metric, or by a shadow's agreement
    buckets: defaultdict[str, Counter[float]] = field(default_factory=lambda: defaultdict(Counter))

    @property
    def rows(self) -> float:
        """Number of rows answered, also as a shadow."""
        return self.counts["predictions_total"] + self.counts["agree"] + self.counts["disagree"]

    @property
    def agreement(self) -> float:
        """Share of a shadow's answers that agree with the served version's."""
        return self.counts["agree"] / self.rows if self.rows else math.nan

    @property
    def failures(self) -> float:
        """Share of failures: of a shadow's rows, or of requests while there is a canary."""
        if self.role == "shadow":
            failed, whole = self.counts["error"], self.rows + self.counts["error"]
        else:
            failed, whole = self.counts["canary_failures_total"], self.counts["canary_requests_total"]
        return failed / whole if whole else math.nan

    def quantile(self, histogram: str, share: float) -> float:
        """A quantile, interpolated within its bucket as in Prometheus."""
        bounds = sorted(self.buckets[histogram].items())
        target, low, below = share * (bounds[-1][1] if bounds else 0), 0.0, 0.0
        for high, upto in bounds:
            if upto >= target and upto > below:
                return low if math.isinf(high) else low + (high - low) * (target - below) / (upto - below)
            low, below = high, upto
        return math.nan

    @property
    def spread(self) -> str:
        """The name of the histogram of scores, or of a regressor's values."""
        return next((name for name in self.buckets if name.endswith(("_score", "_value"))), "")

    def verdict(self, served: "Side") -> str:
        """The conclusion, by the same margins that stop a canary."""
        if self.role == "serving":
            return "-"
        if (self.counts["canary_requests_total"] if self.role == "canary" else self.rows) < MINIMUM:
            return "too little to say"
        own = served.failures if self.role == "canary" else 0.0
        if self.failures > (0.0 if math.isnan(own) else own) + ERROR_MARGIN:
            return "fails too often"
        calls = REQUESTS if self.role == "canary" else CALLS
        if self.quantile(calls, 0.95) > LATENCY_FACTOR * served.quantile(calls, 0.95) + LATENCY_SECONDS:
            return "too slow"
        return "promote" if self.role == "canary" else "try as canary"


def compare(
    prometheus: Prometheus = "http://127.0.0.1:9090",
    metrics: Scrape = None,
    window: Window = "1h",
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = ROOT / "build" / "compare.svg",
) -> list[Side]:
    """Compare served version, canary and shadow: traffic, agreement, failures, latency, scores."""
    found = sides(scraped(metrics) if metrics else from_prometheus(prometheus, window))
    if [side.role for side in found[:2]] not in (["serving", "canary"], ["serving", "shadow"]):
        raise LifecycleError(f"{metrics or prometheus}: there is no shadow and no canary to compare")
    typer.echo(comparison(found))
    draw(found, picture)
    typer.echo(f"picture: {picture}")
    return found


def from_prometheus(address: str, window: str) -> list[Sample]:
    """The increase, over the last `window`, of all metrics that `sides` reads."""
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
        version = labels.get("shadow_version" if name.startswith("shadow") else "model_version")
        for side in result:
            # A version in both roles has separate scores for each, but a common count of calls.
            mixed = name.startswith("model_call") or name.startswith("shadow") == (side.role == "shadow")
            if version != side.version or not mixed:
                continue
            if name in COUNTERS:
                side.counts[labels.get("agreement", name)] += value  # type: ignore[assignment]  # no whole number
            elif histogram in HISTOGRAMS and name != histogram:
                side.buckets[histogram][float(labels["le"])] += value  # type: ignore[assignment]
    return result


def comparison(found: Sequence[Side]) -> str:
    """A table with a line for each version."""

    def shown(*values: float, form: str = ".3g") -> str:
        return "-" if any(map(math.isnan, values)) else ", ".join(format(value, form) for value in values)

    head = ["version", "role", "rows", "dropped", "agreement", "failures", "model p50, p95 ms"]
    rows = [
        (
            side.version,
            side.role,
            f"{side.rows:,.0f}",
            f"{side.counts['dropped']:,.0f}",
            shown(side.agreement if side.role == "shadow" else math.nan, form=".1%"),
            shown(side.failures, form=".1%"),
            *(shown(*(1000 * side.quantile(name, one) for one in (0.5, 0.95))) for name in (CALLS, REQUESTS)),
            shown(*(side.quantile(side.spread, share) for share in (0.1, 0.5, 0.9))),
            side.verdict(found[0]),
        )
        for side in found
    ]
    return table([*head, "request p50, p95 ms", "score p10, p50, p90", "verdict"], rows)


def draw(found: Sequence[Side], path: Path) -> None:
    """Draw agreement, latency and scores side by side; the suffix of `path` gives the format."""
    import pandas as pd  # here: these take a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    agreement, latency, scores = figure.subplots(1, 3)
    names = [f"{side.version}\n{side.role}" for side in found]
    rows = pd.DataFrame([[side.counts[one] for one in AGREEMENTS] for side in found], names, [*AGREEMENTS])
    shares, colours = rows.div(rows.sum(axis=1).clip(lower=1), axis=0), [*AGREEMENTS.values()]
    shares.plot.bar(
        ax=agreement, stacked=True, color=colours, rot=0, ylabel="share", title="rows of a shadow"
    )
    calls = {
        f"p{share:.0%}"[:-1]: [1000 * side.quantile(CALLS, share) for side in found] for share in (0.5, 0.95)
    }
    pd.DataFrame(calls, names).plot.bar(ax=latency, rot=0, ylabel="ms", title="a call of the model")
    for side, name in zip(found, names, strict=True):
        bounds = pd.Series(side.buckets[side.spread], dtype=float).sort_index()
        if bounds.max() > 0:
            heights = bounds.diff().fillna(bounds) / bounds.max()
            scores.plot([f"{bound:g}" for bound in bounds.index], heights, drawstyle="steps-mid", label=name)
    scores.set(title="scores", ylabel="share of rows")
    scores.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
