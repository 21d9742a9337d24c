"""What a report begins with: four figures of the model that ships, each beside the others' bars."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from liteguard import shown
from liteguard.evaluation import against_base
from liteguard.evaluation.against_base import share
from liteguard.evaluation.comparison import TITLES
from liteguard.evaluation.verdict import JUDGED, beside

BATCHES = "while measuring, here: checkpoints in batches, a bundle one by one"
MOST_NAMED = 3  # changes for the worse that are written out


@dataclass(frozen=True)
class Bar:
    """One model's number; `percent` is how much of the width it fills."""

    name: str
    text: str
    percent: float
    ships: bool = False


@dataclass(frozen=True)
class Figure:
    """A number in large type, what it is of, and a bar a model or lines of text under it."""

    title: str
    number: str
    note: str
    bars: list[Bar] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def figures(results: dict[str, dict[str, Any]], records: dict[str, dict[str, Any]]) -> list[Figure]:
    """Harmful refused, ordinary refused, better or worse than the base, size and speed.

    records: of the stages and the bundle that are still there, by label.
    """
    label = next((name for name in JUDGED if name in results), list(results)[-1])
    found = [
        _refusals(results, label, "harmful", "Harmful requests refused", "more is better"),
        _refusals(results, label, "ordinary", "Ordinary requests refused", "less is better"),
        _against_base(results, label),
        _size_and_speed(results, label, records.get("bundle")),
    ]
    return [figure for figure in found if figure]


def refused(result: dict[str, Any], kind: str) -> tuple[int, int, list[str]]:
    """(requests refused, requests, sets): of the outside sets of a kind, or else of own rows."""
    sets = {n: own for n, own in result.get("sets", {}).items() if own["kind"] == kind}
    counts = [own["verdicts"] for own in sets.values()] or [result["verdicts"][kind]]
    return sum(c["refused"] for c in counts), sum(sum(c.values()) for c in counts), [*sets]


def _refusals(
    results: dict[str, dict[str, Any]], label: str, kind: str, title: str, better: str
) -> Figure | None:
    hits, total, sets = refused(results[label], kind)
    if not total:
        return None
    number, interval = share(hits, total)
    bars = []
    for name, result in results.items():
        own, of, _ = refused(result, kind)
        percent = 100 * own / max(of, 1)
        bars.append(Bar(_title(name), f"{percent:.0f} %", percent, name == label))
    where = f" in {', '.join(sets)}" if sets else ""
    return Figure(
        title, number, f"{interval.replace('-', ' to ')} %, of {total}{where}; {better}", bars
    )


def _against_base(results: dict[str, dict[str, Any]], label: str) -> Figure | None:
    """How many numbers are better and worse than the base's beyond the interval, and which."""
    if "base" not in results or label == "base":
        return None
    found = against_base.changes(results["base"], results[label])
    better = [change for change in found if change.is_beyond(0.0, worse=False)]
    worse = [change for change in found if change.is_beyond(0.0, worse=True)]
    if not found:
        return None
    # The better ones stand in the table; these must not be overlooked.
    rest = len(worse) - MOST_NAMED
    lines = [beside(change) for change in worse[:MOST_NAMED]]
    lines += [f"and {rest} more, below"] if rest > 0 else []
    same = len(found) - len(better) - len(worse)
    counts = {"better": len(better), "the same": same, "worse": len(worse)}
    bars = [
        Bar(name, str(count), 100 * count / len(found), name == "better")
        for name, count in counts.items()
    ]
    number = f"{len(better)} better, {len(worse)} worse"
    return Figure("Against the base", number, f"of {len(found)} numbers, same rows", bars, lines)


def _size_and_speed(
    results: dict[str, dict[str, Any]], label: str, bundle: dict[str, Any] | None
) -> Figure:
    """The bundle's bytes, and tokens a second while measuring, each model as it was run."""
    speeds = {name: speed(result) for name, result in results.items()}
    fastest = max(speeds.values())
    bars = [
        Bar(_title(name), f"{number:.0f}/s", 100 * number / max(fastest, 1e-9), name == label)
        for name, number in speeds.items()
    ]
    own = f"{speeds[label]:.0f} tokens/s"
    if bundle is None or label != "bundle":
        return Figure("Speed", own, f"{BATCHES}; no bundle yet", bars)
    size = shown.size(next(iter(bundle["bytes"].values())))
    return Figure("Size and speed", f"{size}, {own}", BATCHES, bars)


def speed(result: dict[str, Any]) -> float:
    """Tokens a second that a model wrote while it was measured."""
    return result["cost"]["generated_tokens"] / max(result["cost"]["generation_s"], 1e-3)


def _title(label: str) -> str:
    return TITLES.get(label, label)
