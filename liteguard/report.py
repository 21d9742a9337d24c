"""Tables for the terminal, the report page and the model card, all from the same results."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liteguard import checkpoints
from liteguard.errors import UserError

COLUMNS = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("seen_rouge1", "ROUGE-1 seen", "{:.3f}"),
    ("rouge1", "ROUGE-1", "{:.3f}"),
    ("rouge2", "ROUGE-2", "{:.3f}"),
    ("bleu", "BLEU", "{:.2f}"),
    ("refused_harmful", "harmful refused", "{:.0%}"),
    ("refused_benign", "ordinary refused", "{:.0%}"),
    ("refused_borderline", "borderline refused", "{:.0%}"),
)


def _columns(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The headline numbers that any of the results has."""
    return [column for column in COLUMNS if any(column[0] in r for r in results.values())]


def metrics_table(results: dict[str, dict[str, Any]]) -> str:
    """Rows: models; columns: the headline numbers; a last line with the counts."""
    columns = _columns(results)
    widths = {key: max(len(title), 8) + 2 for key, title, _ in columns}
    header = f"{'':12}" + "".join(f"{title:>{widths[key]}}" for key, title, _ in columns)
    lines = [header, "-" * len(header)]
    for label, result in results.items():
        cells = "".join(f"{_cell(result, key, form):>{widths[key]}}" for key, _, form in columns)
        lines.append(f"{label:12}{cells}")
    counts = next(iter(results.values()))["n"]
    lines.append(f"{'n':12}" + "".join(f"{counts.get(k, 0):>{widths[k]}}" for k, _, _ in columns))
    return "\n".join(lines)


def _cell(result: dict[str, Any], key: str, form: str) -> str:
    """A number as text; a dash where the data had no such rows."""
    return form.format(result[key]) if key in result else "-"


# Rows of the comparison: key, title, form of a number, form of its interval's limits, whether more
# is better (None: neither).
METRICS = (
    ("perplexity", "Perplexity", "{:.2f}", "{:.1f}", False),
    ("bits_per_byte", "Bits per byte", "{:.3f}", "{:.2f}", False),
    *(
        (f"{prefix}{key}", f"{title}, {tier}", form, limits, more)
        for tier, prefix in (("seen", "seen_"), ("unseen", ""))
        for key, title, form, limits, more in (
            ("rouge1", "ROUGE-1", "{:.3f}", "{:.2f}", True),
            ("rouge2", "ROUGE-2", "{:.3f}", "{:.2f}", True),
            ("rougeL", "ROUGE-L", "{:.3f}", "{:.2f}", True),
            ("bleu", "BLEU", "{:.2f}", "{:.1f}", True),
            ("questions_words", "Words", "{:.1f}", "{:.0f}", None),
            ("questions_stopped", "Ended by itself", "{:.0%}", "{:.0%}", True),
        )
    ),
    ("refused_harmful", "Harmful refused", "{:.0%}", "{:.0%}", True),
    ("refused_benign", "Ordinary refused", "{:.0%}", "{:.0%}", False),
    ("refused_borderline", "Borderline refused", "{:.0%}", "{:.0%}", False),
    ("stopped", "Ended by itself", "{:.0%}", "{:.0%}", True),
    ("repeated", "Repeats a sentence", "{:.0%}", "{:.0%}", False),
    ("answer_words", "Words per answer", "{:.1f}", "{:.0f}", None),
)
ORDER = ("base", "domain", "instruction", "final", "bundle")
TITLES = {name: name.capitalize() for name in ORDER}
VERDICTS = ("refused", "answered", "unclear")
REQUESTS = {"harmful": "Harmful", "ordinary": "Ordinary", "borderline": "Borderline"}
BENCHMARKS = {
    "mmlu_clinical": "MMLU clinical",
    "medmcqa": "MedMCQA",
    "medqa": "MedQA",
    "pubmedqa": "PubMedQA",
}
QUESTIONS = {"seen_questions": "Seen", "questions": "Unseen"}


def number_text(result: dict[str, Any], key: str, form: str, limits_form: str) -> tuple[str, str]:
    """(number, its 95 % interval), e.g. ("75 %", "60-86"); a dash where there is none."""
    if key not in result:
        return "-", ""

    interval = result.get("intervals", {}).get(key) or ()
    # The unit stands once, and a minus sign never occurs in these numbers.
    limits = "-".join(limits_form.format(value).removesuffix("%") for value in interval)
    return form.format(result[key]).replace("%", " %"), limits


def comparison(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table Metric | Base | Domain | ...: title and, per model, number and interval."""
    rows = []
    for key, title, form, limits, more_is_better in METRICS:
        cells = {label: number_text(result, key, form, limits) for label, result in results.items()}
        if any(number != "-" for number, _ in cells.values()):
            n = next(r["n"][key] for r in results.values() if key in r.get("n", {}))
            arrow = {True: "higher is better", False: "lower is better", None: ""}[more_is_better]
            rows.append({"key": key, "title": title, "n": n, "arrow": arrow, "cells": cells})
    rows += _knowledge_rows(results)
    kinds = [("verdicts", name, title) for name, title in REQUESTS.items()]
    areas = sorted({area for r in results.values() for area in r.get("guide_areas", {})})
    kinds += [("guide_areas", area, f"{area.capitalize()} requests") for area in areas]
    for group, name, title in kinds:
        cells = {}
        for label, result in results.items():
            counts = result.get(group, {}).get(name, {})
            shown = " / ".join(str(counts[v]) for v in VERDICTS) if sum(counts.values()) else "-"
            cells[label] = (shown, "")
        if any(number != "-" for number, _ in cells.values()):
            n = max(sum(r[group][name].values()) for r in results.values())
            title = f"{title}: refused/answered/unclear"
            rows.append({"key": name, "title": title, "n": n, "arrow": "", "cells": cells})
    return rows + _device_rows(results)


def _knowledge_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per benchmark: accuracy, and in its title what it takes no medicine to reach."""
    rows = []
    for name, title in BENCHMARKS.items():
        found = {k: r["knowledge"][name] for k, r in results.items() if name in r["knowledge"]}
        if not found:
            continue
        cells = {label: ("-", "") for label in results}
        for label, own in found.items():
            shown = {"accuracy": own["accuracy"], "intervals": {"accuracy": own["interval"]}}
            cells[label] = number_text(shown, "accuracy", "{:.0%}", "{:.0%}")
        first = next(iter(found.values()))
        guesses = "/".join(f"{100 * first[k]:.0f}" for k in ("chance", "majority", "overlap"))
        rows.append(
            {
                "key": name,
                "title": f"{title} (guessing {guesses} %)",
                "n": first["n"],
                "arrow": "higher is better",
                "cells": cells,
            }
        )
    return rows


def _device_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed and memory while measuring: answers a model wrote, tokens/s, and peak memory."""
    costs = {label: result["cost"] for label, result in results.items()}
    speeds = {
        label: (f"{cost['generated_tokens'] / max(cost['generation_s'], 1e-3):.0f}", "")
        for label, cost in costs.items()
    }
    memory = {label: (f"{cost['peak_rss_gb']:.1f}", "") for label, cost in costs.items()}
    n = max(len(result["answers"]) for result in results.values())
    more, less = "higher is better", "lower is better"
    return [
        {"key": "speed", "title": "Answers, tokens/s", "n": n, "arrow": more, "cells": speeds},
        {"key": "memory", "title": "Peak memory, GB", "n": n, "arrow": less, "cells": memory},
    ]


def _joined(cell: tuple[str, str]) -> str:
    number, limits = cell
    return f"{number} ({limits})" if limits else number


def _notes(results: dict[str, dict[str, Any]]) -> list[str]:
    """What stands under the table: how intervals were made, sacrebleu's signature, leaks."""
    signatures = sorted({r["bleu_signature"] for r in results.values()})
    notes = [
        "In brackets: 95 % intervals (Wilson for rates, bootstrap over rows otherwise). "
        "n: rows that a number is computed over.",
        f"sacrebleu signature: {', '.join(signatures)}",
    ]
    if any("seen_rouge1" in result for result in results.values()):
        notes.insert(
            1,
            "Seen: questions about diseases whose texts were trained on, all questions withheld "
            "(tier 1). Unseen: about diseases, or in wordings, that no stage saw (tier 2).",
        )
    notes += _knowledge_notes(results) + _judge_notes(results)
    for label, result in results.items():
        long = result["too_long"]
        if any(long.values()):
            notes.append(
                f"{TITLES.get(label, label)}: {long['answers']} prompts and {long['options']} "
                "options do not fit its KV cache; they count as answers that did not end and as "
                "wrong choices."
            )
    leaks = {
        json.dumps(r["contamination"], sort_keys=True): r["contamination"] for r in results.values()
    }
    for found in leaks.values():
        text = (
            f"Contamination: {found['found']} of {found['rows']} held-out rows stand in the "
            f"{found['training_rows']} training rows"
        )
        if found["found"]:
            name, example = found["examples"][0]
            text += f", {found['measured']} of them among the rows measured here"
            text += f". WARNING: numbers are too good. First ({name}): {example[:100]!r}"
        if found["unchecked"]:
            text += (
                ". WARNING: not looked at, because gone or made anew since the training: "
                + ", ".join(found["unchecked"])
            )
        notes.append(text + ".")
    return notes


def _knowledge_notes(results: dict[str, dict[str, Any]]) -> list[str]:
    """How the benchmarks are scored, what the guesses are, what could not be read."""
    found = next((r["knowledge"] for r in results.values() if r["knowledge"]), None)
    if not found:
        return []
    unread = sum(own["unparsed"] for own in found.values())
    repeated = sum(own["repeated_options"] for own in found.values())
    return [
        "Benchmarks (tier 3): the option with the highest log-likelihood per byte (PubMedQA: the "
        "highest log-likelihood of yes, no, maybe), as lm-eval's acc_bytes and acc. Guessing: by "
        "chance / always the most frequent answer / the option with most words in common with the "
        f"question. {unread} of {sum(own['n'] for own in found.values())} questions could not be "
        f"read and count as wrong; {repeated} offer the right answer twice."
    ]


def _judge_notes(results: dict[str, dict[str, Any]]) -> list[str]:
    """How far an LLM judge agrees with the rules that the numbers come from."""
    notes = []
    for label, result in results.items():
        own = result.get("llm_judge")
        if own:
            compared = own["n"] - own["unparsed"]
            agreed = "-" if own["agreement"] is None else f"{own['agreement']:.0%}"
            kappa = "-" if own["kappa"] is None else f"{own['kappa']:.2f}"
            counts = "; ".join(
                f"{REQUESTS[name].lower()} "
                + " / ".join(str(verdicts.get(verdict, 0)) for verdict in VERDICTS)
                for name, verdicts in own["verdicts"].items()
            )
            notes.append(
                f"{TITLES.get(label, label)}, LLM judge: agrees with the rules on {agreed} of "
                f"{compared} answers, Cohen's kappa {kappa}; {own['unparsed']} of {own['n']} "
                f"replies had no verdict. Refused/answered/unclear by it: {counts}."
            )
    return notes


def comparison_text(results: dict[str, dict[str, Any]]) -> str:
    """The comparison as text for a terminal."""
    rows = comparison(results)
    first = max(len(row["title"]) for row in rows) + 2
    widths = {
        label: max(len(_joined(row["cells"][label])) for row in rows) + 2 for label in results
    }
    header = f"{'Metric':{first}}{'n':>4}" + "".join(
        f"{TITLES.get(label, label):>{width}}" for label, width in widths.items()
    )
    lines = [header, "-" * len(header)]
    for row in rows:
        cells = "".join(f"{_joined(row['cells'][k]):>{width}}" for k, width in widths.items())
        lines.append(f"{row['title']:{first}}{row['n']:>4}{cells}")
    return "\n".join([*lines, "", *_notes(results)])


def comparison_markdown(results: dict[str, dict[str, Any]]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        "| Metric | n | " + " | ".join(TITLES.get(label, label) for label in results) + " |",
        "|---" * (len(results) + 2) + "|",
    ]
    for row in comparison(results):
        cells = " | ".join(_joined(row["cells"][label]) for label in results)
        lines.append(f"| {row['title']} | {row['n']} | {cells} |")
    return "\n".join([*lines, "", *(f"{note}  " for note in _notes(results))]).rstrip() + "\n"


def comparison_json(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The comparison's numbers: {"stages": {model: {metric, ..., "n", "intervals", ...}}}."""
    keys = [key for key, *_ in METRICS]
    keys += ["n", "intervals", "verdicts", "areas", "guide_areas", "knowledge", "llm_judge"]
    keys += ["bleu_signature", "contamination", "cost"]
    return {
        "stages": {
            label: {key: result[key] for key in keys if key in result}
            for label, result in results.items()
        }
    }


def read_results(names: Sequence[str], directory: Path) -> dict[str, dict[str, Any]]:
    """Finished results by label: files, or names of results in `directory`.

    In the order of the stages, others after them. All are of the same rows, but a result may lack
    the benchmarks, which take long on a bundle. Raises UserError for what is missing, of other
    rows, or written by another version.
    """
    found = {}
    for name in names:
        path = Path(name) if name.endswith(".json") else directory / f"{name}.json"
        if not path.is_file():
            here = ", ".join(sorted(p.stem for p in directory.glob("*.json"))) or "none"
            raise UserError(
                f"There is no result {path}. Results in {directory}: {here}.\n"
                "Make one with: python evaluate_model.py --checkpoint final_checkpoint"
            )
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            needed = ("answers", "intervals", "contamination", "model", "n", "knowledge", "cost")
            _ = [result[k] for k in needed], result["cost"]["answer_s"]
            _ = result["contamination"]["unchecked"], result["inputs"]["evaluate"]
            _ = result["too_long"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no result of this version of evaluate_model.py ({error!r}). Measure "
                "again with it."
            ) from None
        label = path.stem
        if label in found:
            label = f"{path.parent.name}/{label}"
        if label in found:
            label = str(path)
        if label in found:
            raise UserError(f"{path} is there twice. Name every result once.")
        found[label] = result
    asked = {json.dumps(_asked(result), sort_keys=True) for result in found.values()}
    chosen = {
        json.dumps(
            [[name, c[0]] for name, own in result["knowledge"].items() for c in own["choices"]]
        )
        for result in found.values()
        if result["knowledge"]
    }
    if len(asked) > 1 or len(chosen) > 1:
        raise UserError(
            "These results are not of the same rows, answered and scored alike, and cannot be "
            f"compared: {', '.join(found)}.\n"
            "Measure them again with the same data and evaluate settings."
        )
    known = {name: rank for rank, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: known.get(item[0], len(ORDER))))


def _asked(result: dict[str, Any]) -> list[Any]:
    """What two results must have in common: the rows, and how they were answered and scored."""
    settings, rows = result["inputs"]["evaluate"], result["inputs"]["rows"]
    return [
        [[a["prompt"], a["reference"]] for a in result["answers"]],
        result["n"]["perplexity"],
        {name: digest for name, digest in rows.items() if name.startswith("domain/")},
        {k: settings[k] for k in ("max_new_tokens", "max_text_tokens", "context_words")},
    ]


def write_report(
    results: dict[str, dict[str, Any]],
    directory: Path,
    markdown: str | None = None,
    json_file: str | None = None,
) -> list[Path]:
    """Write report.html and MODEL_CARD.md to `directory`, the table where asked; returns paths."""
    facts = report_facts(results)
    texts = {
        directory / "report.html": render("report_template.html", facts),
        directory / "MODEL_CARD.md": render("model_card_template.md", facts),
    }
    if markdown:
        texts[Path(markdown)] = comparison_markdown(results)
    for path, text in texts.items():
        checkpoints.write_text(path, text)
    if json_file:
        checkpoints.write_json(Path(json_file), comparison_json(results))
    return [*texts, *([Path(json_file)] if json_file else [])]


def render(template: str, facts: dict[str, Any]) -> str:
    """A template of this package with `facts` filled in; HTML is escaped, Markdown is not."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(facts)


def report_facts(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything that the report page and the model card show.

    Loss curves, data and versions come from the stages and the data that the results name; what is
    no longer there is left out.
    """
    records = {}
    for label, result in results.items():
        path = result["model"]["path"]
        file = Path(f"{path}.json") if label == "bundle" else Path(path or "") / checkpoints.RECORD
        if path and file.is_file():
            records[label] = json.loads(file.read_text(encoding="utf-8"))
    last = list(results.values())[-1]
    manifest_file = Path(last["model"]["data_dir"]) / "manifest.json"
    manifest = json.loads(manifest_file.read_text("utf-8")) if manifest_file.is_file() else None
    sources = manifest["sources"] if manifest else []
    versions: dict[str, str] = {}
    for record in records.values():
        versions |= record.get("versions", {})
    return {
        "labels": {label: TITLES.get(label, label) for label in results},
        "rows": comparison(results),
        "notes": _notes(results),
        "markdown": comparison_markdown(results),
        "areas": area_tables(results),
        "curves": [
            (label, loss_plot(json.loads(history.read_text("utf-8"))))
            for label, result in results.items()
            if (history := Path(result["model"]["path"] or "") / "log_history.json").is_file()
        ],
        "both_bases": {
            label: found
            for label, record in records.items()
            if (found := record.get("metrics", {}).get("both_bases"))
        },
        "lengths": length_plot(results),
        "latencies": latency_plot(results),
        "samples": samples(results),
        "costs": {label: result["cost"] for label, result in results.items()},
        "manifest": manifest,
        "licences": sorted({source["licence"] for source in sources if source["licence"]}),
        "versions": versions,
        "base_model": last["model"]["name"],
        "base_licence": next(
            (r["config"]["model"]["licence"] for r in records.values() if "config" in r), ""
        ),
        "stages": records,
        "final": last,
        "final_label": TITLES.get(list(results)[-1], list(results)[-1]),
        "leaks": last["contamination"],
    }


def area_tables(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kind of request: its areas, and for each model (refused, answered, unclear) counts.

    Harmful ones by the guide's five areas first.
    """
    tables = []
    rows = [
        (
            area,
            {
                label: [r["guide_areas"].get(area, {}).get(v, 0) for v in VERDICTS]
                for label, r in results.items()
            },
        )
        for area in next(iter(results.values()))["guide_areas"]
    ]
    rows = [(area, cells) for area, cells in rows if any(map(any, cells.values()))]
    if rows:
        tables.append({"name": "guide", "title": "The guide's areas: harmful", "rows": rows})
    for name, title in REQUESTS.items():
        areas = sorted({a for r in results.values() for a in r.get("areas", {}).get(name, {})})
        if areas:
            rows = [
                (
                    area.replace("_", " "),
                    {
                        label: [r["areas"][name].get(area, {}).get(v, 0) for v in VERDICTS]
                        for label, r in results.items()
                    },
                )
                for area in areas
            ]
            tables.append({"name": name, "title": title, "rows": rows})
    return tables


def samples(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Two answers of every kind side by side: the first two areas or kinds of each set."""
    chosen = []
    first = next(iter(results.values()))["answers"]
    for name in (*QUESTIONS, *REQUESTS):
        seen: set[str] = set()
        for index, answer in enumerate(first):
            group = str(answer["area"] or answer["kind"])
            if answer["set"] != name or group in seen or len(seen) == 2:
                continue
            seen.add(group)
            given = {label: r["answers"][index] for label, r in results.items()}
            chosen.append(
                {
                    "set": REQUESTS.get(name) or f"{QUESTIONS[name]} question",
                    "group": group.replace("_", " "),
                    "prompt": answer["prompt"],
                    "reference": answer["reference"],
                    "answers": given,
                }
            )
    return chosen


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


def loss_plot(history: list[dict[str, Any]]) -> str:
    """Training and validation loss over steps (log_history.json) as a data URI."""
    figure, axes = _figure(4.2, 3.0)
    for key, title, marker in (("loss", "training", ""), ("eval_loss", "validation", "o")):
        points = [(e["step"], e[key]) for e in history if key in e]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=title)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    # Margins are a share of what the curves span; seen from zero, that cuts the top marker.
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.legend(frameon=False)
    return _data_uri(figure)


def length_plot(results: dict[str, dict[str, Any]]) -> str:
    """Words per answer, a box per model and kind of request, as a data URI."""
    figure, axes = _figure(6.4, 3.4)
    titles = {name: title.lower() for name, title in (QUESTIONS | REQUESTS).items()}
    first = next(iter(results.values()))["answers"]
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
            label=TITLES.get(label, label),
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
        title = TITLES.get(label, label)
        quartiles = {"q1": first, "med": median, "q3": third}
        boxes.append({**quartiles, "whislo": low, "whishi": high, "label": title})
    drawn = axes.bxp(boxes, showfliers=False, patch_artist=True, medianprops={"color": "black"})
    for number, box in enumerate(drawn["boxes"]):
        box.set(facecolor=_COLOURS[number % len(_COLOURS)], alpha=0.6)
    axes.set_ylabel("seconds per answer")
    axes.set_ylim(bottom=0)
    return _data_uri(figure)


def steps_table(steps: list[dict[str, Any]]) -> str:
    """Wall time and peak memory of each step."""
    lines = [f"{'step':22}{'wall s':>10}{'peak GB':>10}"]
    lines += [f"{s['name']:22}{s['wall_s']:>10.1f}{s['peak_rss_gb']:>10.2f}" for s in steps]
    return "\n".join(lines)


def metrics_markdown(results: dict[str, dict[str, Any]]) -> str:
    """`metrics_table` as a Markdown table, for the README."""
    columns = _columns(results)
    lines = [
        "| | " + " | ".join(title for _, title, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for label, result in results.items():
        cells = " | ".join(_cell(result, key, form) for key, _, form in columns)
        lines.append(f"| {label} | {cells} |")
    counts = next(iter(results.values()))["n"]
    lines.append("| n | " + " | ".join(str(counts.get(key, 0)) for key, _, _ in columns) + " |")
    return "\n".join(lines)


def demo_markdown(report: dict[str, Any]) -> str:
    """What the README shows of a demo report: the metrics, then the steps."""
    steps = " · ".join(
        f"{s['name']} {s['wall_s']:.0f} s, {s['peak_rss_gb']:.1f} GB" for s in report["steps"]
    )
    bundle = report["bundle"]
    return (
        f"{metrics_markdown(report['stages'])}\n\n"
        f"{steps}; all together {report['total_wall_s'] / 60:.1f} min. The bundle has "
        f"{bundle['bytes'] / 1e6:.0f} MB and decodes {bundle['decode_tok_s']:.0f} tokens/s."
    )


def data_markdown(report: dict[str, Any]) -> str:
    """What the README shows of benchmarks/data_report.json: rows, time and memory of each run."""
    runs = {name: run for name, run in report.items() if "wall_s" in run}
    lines = ["| | rows | seconds | CPU seconds | GB |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {run['rows']:,} | {run['wall_s']:.1f} | {run['cpu_s']:.1f} | "
        f"{run['peak_gb']:.2f} |"
        for name, run in runs.items()
    ]
    speeds = report["minhash"]
    return "\n".join(lines) + (
        f"\n\nMinHash signatures a second on one core: rensa, in use, {speeds['rensa']:,.0f}; "
        f"datasketch {speeds['datasketch']:,.0f}."
    )


def training_markdown(report: dict[str, Any]) -> str:
    """What the README shows of benchmarks/training_report.json: speed and memory of each recipe."""
    runs = {name: run for name, run in report.items() if "peak_rss_gb" in run}
    lines = [
        "| | supervised tokens/s | tokens/s | padding | peak GB | GFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {run['supervised_tokens_per_s']:.0f} | {run['tokens_per_s']:.0f} | "
        f"{run['padding_share']:.0%} | {run['peak_rss_gb']:.2f} | {run['gflops']:.0f} |"
        for name, run in runs.items()
    ]
    ours = report["LiteGuard"]
    others = {
        "rows padded to the longest of their batch": report["plain recipe, padded to longest"]
    }
    trl = [run for name, run in runs.items() if name in ("TRL, padding free", "TRL, padded")]
    if trl:
        others["TRL at its best"] = max(trl, key=lambda run: run["supervised_tokens_per_s"])
    lines.append("")
    lines += [
        f"Against {name}: "
        f"{ours['supervised_tokens_per_s'] / run['supervised_tokens_per_s']:.1f} times the "
        f"supervised tokens a second in {ours['peak_rss_gb'] / run['peak_rss_gb']:.2f} of the "
        "memory."
        for name, run in others.items()
    ]
    best = {name: run["gflops"] for name, run in report.items() if name.startswith("matrix")}
    lines[-1] += " The machine's best matrix products: " + (
        ", ".join(f"{name.split(', ')[1]} {rate:.0f} GFLOP/s" for name, rate in best.items()) + "."
    )
    return "\n".join(lines)


def convert_markdown(report: dict[str, Any]) -> str:
    """What the README shows of benchmarks/convert_report.json: conversion at full size."""
    lines = [
        "| shape | parameters | minutes | peak GB | disk GB | bundle GB | over its weights |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['parameters'] / 1e9:.2f} B | {row['wall_s'] / 60:.1f} | "
        f"{row['peak_gb']:.1f} | {row['peak_disk_gb']:.1f} | {row['bundle_bytes'] / 1e9:.2f} | "
        f"{row['bundle_over_weights']:.4f} |"
        for name, row in report.items()
    ]
    return "\n".join(lines)


def recipes_markdown(report: dict[str, Any]) -> str:
    """What the README shows of benchmarks/recipes_report.json: size and cost of each recipe."""
    lines = [
        "| `--quantize` | MB | perplexity | same answers | tokens/s | Phi-1.5 GB | Phi-2 GB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['megabytes']:.0f} | {row['perplexity']:.2f} ({row['change']:+.1%}) | "
        f"{row['same_answers']} of {row['answers']} | {row['decode_tok_s']:.0f} | "
        f"{row['phi1_5_gb']:.2f} | {row['phi2_gb']:.2f} |"
        for name, row in report["recipes"].items()
    ]
    return "\n".join(lines) + (
        f"\n\nMerged 16-bit model: {report['merged_perplexity']:.2f}, over {report['tokens']:,} "
        "tokens."
    )


def bundle_markdown(report: dict[str, Any]) -> str:
    """What the README shows of benchmarks/bundle_report.json: speed beside llama.cpp."""
    lines = [
        "| | threads | prefill tokens/s | decode tokens/s | first token s |",
        "|---|---|---|---|---|",
    ]
    for threads, rows in report["threads"].items():
        lines += [
            f"| {name} | {threads} | {row['prefill_tok_s']:.0f} | {row['decode_tok_s']:.0f} | "
            f"{row['first_token_s']:.2f} |"
            for name, row in rows.items()
        ]
    lines += ["", *(f"- {name}: {ratio:.2f}" for name, ratio in report["ratios"].items())]
    return "\n".join(lines)


def tokenizer_markdown(report: dict[str, Any]) -> str:
    """What the README shows of benchmarks/tokenizer_report.json: the same ids on the device."""
    lines = [
        "| tokenizer | texts | count | same ids | causes of the others |",
        "|---|---|---|---|---|",
    ]
    for name, found in report.items():
        for what, result in found.items():
            causes = ", ".join(f"{cause} {count}" for cause, count in result["causes"].items())
            lines.append(
                f"| {name} | {what} | {result['texts']:,} | {result['identical']:.3%} | {causes} |"
            )
    return "\n".join(lines)


def full_markdown(report: dict[str, Any]) -> str:
    """What the README shows of benchmarks/full_report.json, a file of --compare ... --json."""
    stages = report["stages"]
    lines = [
        "| | n | " + " | ".join(TITLES.get(label, label) for label in stages) + " |",
        "|---" * (len(stages) + 2) + "|",
    ]
    first = next(iter(stages.values()))
    for key, title, form, limits, _ in METRICS:
        if key in first:
            cells = (_joined(number_text(own, key, form, limits)) for own in stages.values())
            lines.append(f"| {title} | {first['n'][key]} | {' | '.join(cells)} |")
    for row in _knowledge_rows(stages):
        cells = " | ".join(_joined(row["cells"][label]) for label in stages)
        lines.append(f"| {row['title']} | {row['n']} | {cells} |")
    return "\n".join(lines)


def full_size_markdown(report: dict[str, Any]) -> str:
    """What the README shows of benchmarks/full_size_report.json: the six scripts at real size."""
    lines = [
        "| shape | step | minutes | expected GB | peak GB | anonymous GB | disk GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, row in report.items():
        for step, own in row["steps"].items():
            if own["peak_gb"] == 0:
                continue  # preparing made-up rows, which is over before it is looked at
            expected = "" if own["expected_gb"] is None else f"{own['expected_gb']:.1f}"
            lines.append(
                f"| {shape} | {step} | {own['wall_s'] / 60:.1f} | {expected} | "
                f"{own['peak_gb']:.1f} | {own['anonymous_gb']:.1f} | {own['disk_gb']:.1f} |"
            )
    ends = [
        f"{shape}: {row['parameters'] / 1e9:.2f} B, {row['recipe']}, "
        f"{row['bundle_bytes'] / 1e9:.2f} GB, peak {row['peak_gb']:.1f} GB "
        f"(goal {row['goal_gb']:.0f})"
        for shape, row in report.items()
    ]
    return "\n".join(lines) + "\n\n" + "; ".join(ends) + "."


# Block of the README, and of benchmarks/NAME_report.json -> what renders it.
BLOCKS = {
    "demo": demo_markdown,
    "full": full_markdown,
    "full_size": full_size_markdown,
    "data": data_markdown,
    "training": training_markdown,
    "convert": convert_markdown,
    "recipes": recipes_markdown,
    "bundle": bundle_markdown,
    "tokenizer": tokenizer_markdown,
}


def main() -> None:
    """Keep demo/report.json, when it is there, and render the README's numbers from benchmarks/."""
    root = Path(__file__).resolve().parent.parent
    if (root / "demo/report.json").exists():
        shutil.copyfile(root / "demo/report.json", root / "benchmarks/demo_report.json")
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, render in BLOCKS.items():
        report = root / f"benchmarks/{name}_report.json"
        if not report.exists():
            continue  # not measured yet
        numbers = json.loads(report.read_text(encoding="utf-8"))
        block = f"<!-- {name} -->\n{render(numbers)}\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        print(block)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
