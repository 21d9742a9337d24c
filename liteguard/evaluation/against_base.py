"""What changed against the base model: row by row, over the same rows.

Two intervals that overlap do not say that two models are alike: both were asked the same rows, and
a hard row is hard for both. So differences are resampled, not numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from liteguard.evaluation import metrics

OWN = "own"  # the project's rows, beside the names of outside sets
SHORT = 0.5  # of the base's words, for the same question
# Metric -> title, form of a number, whether more is better.
METRICS = {
    "perplexity": ("perplexity", "{:.2f}", False),
    "rouge1": ("ROUGE-1", "{:.3f}", True),
    "stopped": ("ended by itself", "{:.0%}", True),
    "accuracy": ("accuracy", "{:.0%}", True),
}


@dataclass(frozen=True)
class Change:
    """One number of a model beside the base's, over the rows that both have.

    `change` and its 95 % interval are shares of the base's number, and for rates and accuracies
    (`in_points`) plain differences.
    """

    of: str  # an outside set, or OWN
    metric: str
    base: float
    value: float
    change: float
    interval: metrics.Interval | None
    n: int
    what: str = ""  # which of the project's rows

    @property
    def in_points(self) -> bool:
        return self.metric in ("stopped", "accuracy")

    @property
    def title(self) -> str:
        name = METRICS[self.metric][0]
        return f"{self.what or self.of}: {name}"

    def is_beyond(self, limit: float, worse: bool) -> bool:
        """Whether the whole interval is worse (or better) than the base by more than `limit`."""
        low, high = self.interval or (self.change, self.change)
        rises = METRICS[self.metric][2] != worse
        return low > limit if rises else high < -limit


def changes(base: dict[str, Any], result: dict[str, Any]) -> list[Change]:
    """Everything that can be compared row by row: outside sets first, then the project's rows."""
    found: list[Change | None] = []
    for name, own in result.get("sets", {}).items():
        found.append(_perplexity(base, result, name, name))
        if own["kind"] == "questions":
            found += [
                _of_answers(base, result, name, name, metric) for metric in ("rouge1", "stopped")
            ]
    found.append(_perplexity(base, result, "texts", OWN, "own texts"))
    for name, what in (("questions", "own questions"), ("seen_questions", "own seen questions")):
        found += [
            _of_answers(base, result, name, OWN, metric, what) for metric in ("rouge1", "stopped")
        ]
    for name, own in result["knowledge"].items():
        if name in base["knowledge"]:
            both = (base["knowledge"][name]["choices"], own["choices"])
            before, now = ([float(pick == right) for _, pick, right in c] for c in both)
            found.append(_means(OWN, "accuracy", before, now, name))
    return [change for change in found if change]


def _perplexity(
    base: dict[str, Any], result: dict[str, Any], name: str, of: str, what: str = ""
) -> Change | None:
    """Of the rows that both could score; None where a result of an older version has no scores."""
    import numpy as np

    earlier, later = (r.get("scores", {}).get(name, ()) for r in (base, result))
    both = [
        (*before, *now)
        for before, now in zip(earlier, later, strict=False)
        if before[0] is not None and now[0] is not None
    ]
    if not both:
        return None
    columns = list(zip(*both, strict=True))
    old, old_tokens, new, new_tokens = map(sum, columns)
    before, value = metrics.perplexity(old, old_tokens), metrics.perplexity(new, new_tokens)

    def ratio(old: Any, old_tokens: Any, new: Any, new_tokens: Any, axis: int) -> Any:
        gained = old.sum(axis) / old_tokens.sum(axis) - new.sum(axis) / new_tokens.sum(axis)
        return np.exp(gained) - 1

    interval = metrics.bootstrap(ratio, *columns)
    return Change(of, "perplexity", before, value, value / before - 1, interval, len(both), what)


def _of_answers(
    base: dict[str, Any], result: dict[str, Any], name: str, of: str, metric: str, what: str = ""
) -> Change | None:
    before, now = (
        [float(a[metric]) for a in r["answers"] if a["set"] == name and metric in a]
        for r in (base, result)
    )
    return _means(of, metric, before, now, what)


def _means(
    of: str, metric: str, before: Sequence[float], now: Sequence[float], what: str = ""
) -> Change | None:
    if not before or len(before) != len(now):
        return None
    old, new = sum(before) / len(before), sum(now) / len(now)
    if metric in ("stopped", "accuracy"):
        interval = metrics.bootstrap(lambda a, b, axis: b.mean(axis) - a.mean(axis), before, now)
        return Change(of, metric, old, new, new - old, interval, len(now), what)
    if not old:
        return None
    # A share of the base's mean over all rows: one drawn anew may be 0.
    interval = metrics.bootstrap(lambda a, b, axis: (b - a).mean(axis) / old, before, now)
    return Change(of, metric, old, new, new / old - 1, interval, len(now), what)


def shorter(base: dict[str, Any], result: dict[str, Any], name: str) -> tuple[int, int]:
    """(answers with less than half the base's words, answers) to the questions of a set."""
    lengths = [
        [metrics.word_count(a["answer"]) for a in r["answers"] if a["set"] == name]
        for r in (base, result)
    ]
    pairs = list(zip(*lengths, strict=True))
    return sum(now < SHORT * before for before, now in pairs), len(pairs)


def per_cent(change: Change) -> tuple[str, str]:
    """(change, its interval) as text: ("-50.7 %", "-55.0 to -46.1"); points where it is a rate."""
    unit = "points" if change.in_points else "%"
    limits = " to ".join(f"{100 * limit:+.1f}" for limit in change.interval or ())
    return f"{100 * change.change:+.1f} {unit}", limits


def table(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows like those of `comparison.comparison_table`: the base's number, and what changed.

    Empty without the base, or where nothing stands beside it.
    """
    base = results.get("base")
    others = {label: result for label, result in results.items() if label != "base"}
    if base is None or not others:
        return []
    rows: dict[str, dict[str, Any]] = {}
    for label, result in others.items():
        for change in changes(base, result):
            _, form, more = METRICS[change.metric]
            row = rows.setdefault(
                change.title,
                {
                    "key": change.title,
                    "title": change.title,
                    "n": change.n,
                    "arrow": "higher is better" if more else "lower is better",
                    "cells": dict.fromkeys(results, ("-", "")),
                },
            )
            row["cells"]["base"] = (form.format(change.base).replace("%", " %"), "")
            row["cells"][label] = per_cent(change)
    asked = [n for n, own in base.get("sets", {}).items() if own["kind"] == "questions"]
    names = {**{name: name for name in asked}, "questions": "own questions"}
    for name, title in names.items():
        found = {label: shorter(base, result, name) for label, result in others.items()}
        counts = [total for _, total in found.values() if total]
        if counts:
            cells = {"base": ("-", "")} | {k: share(*found[k]) for k in others}
            title = f"{title}: shorter than half the base's"
            row = {"key": title, "title": title, "n": counts[0], "arrow": "lower is better"}
            rows[title] = {**row, "cells": cells}
    return list(rows.values())


def share(hits: int, total: int) -> tuple[str, str]:
    """(rate, its interval) as text: ("14 %", "9-21")."""
    limits = "-".join(f"{100 * limit:.0f}" for limit in metrics.wilson(hits, total) or ())
    return f"{100 * hits / max(total, 1):.0f} %", limits
