"""The report's pictures."""

from __future__ import annotations

import base64
import io
from typing import Any

from liteguard import shown
from liteguard.evaluation.comparison import QUESTIONS, REQUESTS, TITLES

# A palette that is told apart by colour-blind readers (Okabe and Ito 2008).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")


def _figure(width: float, height: float) -> Any:
    """(figure, axes) drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _data_uri(figure: Any) -> str:
    """A figure as a PNG inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def name_of(label: str) -> str:
    """The name of a result as a plot shows it: a short line, no formula between dollar signs."""
    name = shown.visible(" ".join(TITLES.get(label, label).split()))
    return (name if len(name) <= 40 else f"{name[:37]}...").replace("$", r"\$").lstrip("_")


def loss_plot(history: list[dict[str, Any]]) -> str:
    """Training and validation loss over steps (log_history.json) as a data URI."""
    figure, axes = _figure(4.2, 3.0)
    for key, title, marker in (("loss", "training", ""), ("eval_loss", "validation", "o")):
        points = [(e["step"], e[key]) for e in history if _is_number(e.get(key))]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=title)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    # Margins are a share of what the curves span; seen from zero, that cuts the top marker.
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.legend(frameon=False)
    return _data_uri(figure)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def length_plot(results: dict[str, dict[str, Any]]) -> str:
    """Words per answer, a box per model and kind of request, as a data URI."""
    figure, axes = _figure(6.4, 3.4)
    titles = {name: title.lower() for name, title in (QUESTIONS | REQUESTS).items()}
    first = next(iter(results.values()))["answers"]
    outside = next(iter(results.values())).get("sets", {})
    titles = {name: name for name in outside} | titles
    sets = [name for name in titles if any(a["set"] == name for a in first)]
    width = 0.8 / len(results)
    for number, (label, result) in enumerate(results.items()):
        lengths = [
            [len(a["answer"].split()) for a in result["answers"] if a["set"] == name]
            for name in sets
        ]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.boxplot(
            lengths,
            positions=[k - 0.4 + width * (number + 0.5) for k in range(len(sets))],
            widths=width * 0.8,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": colour, "alpha": 0.6},
            medianprops={"color": "black"},
            flierprops={"markersize": 2},
            label=name_of(label),
        )
    axes.set_xticks(range(len(sets)), [titles[name] for name in sets])
    axes.set_ylabel("words per answer")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return _data_uri(figure)


def latency_plot(results: dict[str, dict[str, Any]]) -> str:
    """Seconds until an answer was complete, a box per model (5 to 95 % in whiskers): a data URI."""
    figure, axes = _figure(6.4, 3.0)
    boxes = []
    for label, result in results.items():
        low, first, median, third, high = result["cost"]["answer_s"].values()
        quartiles = {"q1": first, "med": median, "q3": third}
        boxes.append({**quartiles, "whislo": low, "whishi": high, "label": name_of(label)})
    drawn = axes.bxp(boxes, showfliers=False, patch_artist=True, medianprops={"color": "black"})
    for number, box in enumerate(drawn["boxes"]):
        box.set(facecolor=_COLOURS[number % len(_COLOURS)], alpha=0.6)
    axes.set_ylabel("seconds per answer")
    axes.set_ylim(bottom=0)
    return _data_uri(figure)
