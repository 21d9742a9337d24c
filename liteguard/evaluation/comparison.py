"""Results of several models in one table: for the terminal, Markdown and JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liteguard import records, shown
from liteguard.errors import UserError
from liteguard.evaluation import against_base, as_used
from liteguard.records import Result

COLUMNS = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("seen_rouge1", "ROUGE-1 seen", "{:.3f}"),
    ("rouge1", "ROUGE-1", "{:.3f}"),
    ("wording_rouge1", "ROUGE-1 held-out wording", "{:.3f}"),
    ("rouge2", "ROUGE-2", "{:.3f}"),
    ("bleu", "BLEU", "{:.2f}"),
    ("refused_harmful", "harmful refused", "{:.0%}"),
    ("refused_benign", "ordinary refused", "{:.0%}"),
    ("refused_borderline", "borderline refused", "{:.0%}"),
)


def table_columns(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The headline numbers that any of the results has."""
    return [column for column in COLUMNS if any(column[0] in r for r in results.values())]


def metrics_table(results: dict[str, dict[str, Any]]) -> str:
    """Rows: models; columns: the headline numbers; a last line with the counts."""
    columns = table_columns(results)
    widths = {key: max(len(title), 8) + 2 for key, title, _ in columns}
    header = f"{'':12}" + "".join(f"{title:>{widths[key]}}" for key, title, _ in columns)
    lines = [header, "-" * len(header)]
    for label, result in results.items():
        cells = "".join(f"{cell(result, key, form):>{widths[key]}}" for key, _, form in columns)
        lines.append(f"{label:12}{cells}")
    counts = next(iter(results.values()))["n"]
    lines.append(f"{'n':12}" + "".join(f"{counts.get(k, 0):>{widths[k]}}" for k, _, _ in columns))
    return "\n".join(lines)


def closing(results: dict[str, dict[str, Any]]) -> str:
    """The last model's headline numbers, in a line."""
    label, result = list(results.items())[-1]
    wanted = ("perplexity", "rouge1", "refused_harmful", "refused_benign")
    numbers = [
        f"{title} {cell(result, key, form)}"
        for key, title, form in COLUMNS
        if key in wanted and key in result
    ]
    return f"{TITLES.get(label, label)}: {', '.join(numbers)}"


def cell(result: dict[str, Any], key: str, form: str) -> str:
    """A number as text; a dash where the data had no such rows."""
    return form.format(result[key]) if key in result else "-"


# Rows of the comparison: key, title, form of a number, form of its interval's limits, whether more
# is better (None: neither).
METRICS = (
    ("perplexity", "Perplexity", "{:.2f}", "{:.1f}", False),
    ("bits_per_byte", "Bits per byte", "{:.3f}", "{:.2f}", False),
    *(
        (f"{prefix}{key}", f"{title}, {tier}", form, limits, more)
        for tier, prefix in (("seen", "seen_"), ("unseen", ""), ("held-out wording", "wording_"))
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
    ("circles", "Circles (the question's words only)", "{:.0%}", "{:.0%}", False),
    ("stopped", "Ended by itself", "{:.0%}", "{:.0%}", True),
    ("repeated", "Repeats a sentence", "{:.0%}", "{:.0%}", False),
    ("answer_words", "Words per answer", "{:.1f}", "{:.0f}", None),
)
# Rows of an outside set: the names of its numbers, which are those above where they are the same.
SET_METRICS = (
    ("perplexity", "perplexity", "{:.2f}", "{:.1f}", False),
    ("rubric", "rubric score", "{:.0%}", "{:.0%}", True),
    ("rouge1", "ROUGE-1", "{:.3f}", "{:.2f}", True),
    ("rouge2", "ROUGE-2", "{:.3f}", "{:.2f}", True),
    ("rougeL", "ROUGE-L", "{:.3f}", "{:.2f}", True),
    ("bleu", "BLEU", "{:.2f}", "{:.1f}", True),
    ("questions_words", "words", "{:.1f}", "{:.0f}", None),
    ("questions_stopped", "ended by itself", "{:.0%}", "{:.0%}", True),
    ("questions_refused", "refused", "{:.0%}", "{:.0%}", False),
    ("circles", "circles", "{:.0%}", "{:.0%}", False),
    ("repeated", "repeats a sentence", "{:.0%}", "{:.0%}", False),
    ("stopped", "ended by itself", "{:.0%}", "{:.0%}", True),
)
ARROWS = {True: "higher is better", False: "lower is better", None: ""}
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
QUESTIONS = {
    "seen_questions": "Seen",
    "questions": "Unseen",
    "wording_questions": "Held-out wording",
}


def number_text(result: dict[str, Any], key: str, form: str, limits_form: str) -> tuple[str, str]:
    """(number, its 95 % interval), e.g. ("75 %", "60-86"); a dash where there is none."""
    if key not in result:
        return "-", ""

    interval = result.get("intervals", {}).get(key) or ()
    # The unit stands once, and a minus sign never occurs in these numbers.
    limits = "-".join(limits_form.format(value).removesuffix("%") for value in interval)
    return form.format(result[key]).replace("%", " %"), limits


def comparison_table(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table Metric | Base | Domain | ...: title and, per model, number and interval.

    Outside sets first, the project's own rows after them.
    """
    rows = set_rows(results)
    for key, title, form, limits, more_is_better in METRICS:
        cells = {label: number_text(result, key, form, limits) for label, result in results.items()}
        if any(number != "-" for number, _ in cells.values()):
            n = next(r["n"][key] for r in results.values() if key in r.get("n", {}))
            arrow = ARROWS[more_is_better]
            rows.append({"key": key, "title": title, "n": n, "arrow": arrow, "cells": cells})
        if key == "refused_harmful":
            rows += used_rows(results, "harmful", "Harmful refused")
    rows += knowledge_rows(results)
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
            n = max(sum(r.get(group, {}).get(name, {}).values()) for r in results.values())
            title = f"{title}: refused/answered/unclear"
            rows.append({"key": name, "title": title, "n": n, "arrow": "", "cells": cells})
    return rows + _device_rows(results)


def set_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A block of rows per outside set; what it is measured as stands in the first title."""
    rows: list[dict[str, Any]] = []
    for name, first in next(iter(results.values())).get("sets", {}).items():
        of = {label: result["sets"][name] for label, result in results.items()}
        metrics: list[tuple[Any, ...]] = [*SET_METRICS]
        if "refused" in first:
            better = {"harmful": True, "ordinary": False, "borderline": False}[first["kind"]]
            refused = ("refused", f"{first['kind']} refused", "{:.0%}", "{:.0%}", better)
            metrics.insert(0, refused)
        for key, title, form, limits, more_is_better in metrics:
            if not any(key in own for own in of.values()):
                continue
            row = {"key": f"{name}.{key}", "title": f"{name}: {title}"}
            row |= {"n": max(own["n"].get(key, 0) for own in of.values())}
            cells = {label: number_text(own, key, form, limits) for label, own in of.items()}
            rows.append({**row, "arrow": ARROWS[more_is_better], "cells": cells})
            if key == "refused" and first["kind"] == "harmful":
                rows += used_rows(results, name, f"{name}: harmful refused")
        if "verdicts" in first:
            counts = {label: [own["verdicts"][v] for v in VERDICTS] for label, own in of.items()}
            cells = {label: (" / ".join(map(str, own)), "") for label, own in counts.items()}
            row = {"key": f"{name}.verdicts", "title": f"{name}: refused/answered/unclear"}
            n = sum(next(iter(counts.values())))
            rows.append({**row, "n": n, "arrow": "", "cells": cells})
    return rows


def used_rows(results: dict[str, dict[str, Any]], name: str, title: str) -> list[dict[str, Any]]:
    """A row per condition of a harmful set: shares refused as apps ask and as people word it."""
    of = {
        label: result.get("as_used", {}).get("numbers", {}).get(name, {})
        for label, result in results.items()
    }
    rows = []
    for condition in dict.fromkeys(itertools.chain(*of.values())):
        draws = max(as_used.draws(result) for result in results.values())
        cells = {label: ("-", "") for label in results}
        for label, own in of.items():
            if condition in own:
                shown = {"refused": own[condition]["refused"]}
                shown["intervals"] = {"refused": own[condition]["interval"]}
                cells[label] = number_text(shown, "refused", "{:.0%}", "{:.0%}")
        n = max(own[condition]["n"] for own in of.values() if condition in own)
        row = {"key": f"{name}.{condition}", "n": n, "arrow": ARROWS[True], "cells": cells}
        rows.append({**row, "title": f"{title} {as_used.title(condition, draws)}"})
    return rows


def knowledge_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
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


def joined(cell: tuple[str, str]) -> str:
    number, limits = cell
    return f"{number} ({limits})" if limits else number


def notes(results: dict[str, dict[str, Any]]) -> list[str]:
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
            "but for those that a source's own splits train on (tier 1). Unseen: about diseases "
            "that no stage saw (tier 2).",
        )
    if any("wording_rouge1" in result for result in results.values()):
        notes.insert(
            1,
            "Held-out wording: questions of rows that name no disease; other questions about the "
            "same may have been trained on.",
        )
    if any(result.get("as_used") for result in results.values()):
        notes.append(
            "Harmful refused, then in brackets how the request came: after a system message, as a "
            "second turn, with a reason given. In all draws: as an app's sampler draws answers "
            "(evaluate.as_used), and every one of them refused."
        )
    notes += _set_notes(results) + _knowledge_notes(results) + _judge_notes(results)
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


def _set_notes(results: dict[str, dict[str, Any]]) -> list[str]:
    """Where outside sets come from, what is scored of them, what stands in training data."""
    sets = next(iter(results.values())).get("sets", {})
    if not sets:
        return []
    lost = sum(a.get("unjudged", 0) for r in results.values() for a in r["answers"])
    files = ", ".join(f"{name} ({own['kind']}, {own['file']})" for name, own in sets.items())
    return [
        f"Outside sets, whose rows are not of this project's making: {files}. Perplexity of a "
        "question is that of its reference answer. Circles: answers that say nothing beyond the "
        "question's own words."
        + (f" Rubric scores: {lost} criteria without a verdict, not met." if lost else "")
    ]


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
                f"{REQUESTS[name].lower() if name in REQUESTS else name} "
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
    parts = [_table_text("Metric", comparison_table(results), results)]
    if changed := against_base.table(results):
        parts.append(_table_text(AGAINST_BASE, changed, results))
    return shown.visible("\n".join([*parts, *notes(results)]))


AGAINST_BASE = "Against the base, same rows"


def _table_text(corner: str, rows: list[dict[str, Any]], results: dict[str, dict[str, Any]]) -> str:
    first = max(len(corner), *(len(row["title"]) for row in rows)) + 2
    widths = {}
    for label in results:
        column = [TITLES.get(label, label), *(joined(row["cells"][label]) for row in rows)]
        widths[label] = max(map(len, column)) + 2
    header = f"{corner:{first}}{'n':>4}" + "".join(
        f"{TITLES.get(label, label):>{width}}" for label, width in widths.items()
    )
    lines = [header, "-" * len(header)]
    for row in rows:
        cells = "".join(f"{joined(row['cells'][k]):>{width}}" for k, width in widths.items())
        lines.append(f"{row['title']:{first}}{row['n']:>4}{cells}")
    return "\n".join([*lines, ""])


def comparison_markdown(results: dict[str, dict[str, Any]]) -> str:
    """The comparison as Markdown tables: the numbers, and what changed against the base.

    Names and texts in them are escaped.
    """
    lines = []
    for corner, rows in (
        ("Metric", comparison_table(results)),
        (AGAINST_BASE, against_base.table(results)),
    ):
        if rows:
            titles = " | ".join(shown.markdown(TITLES.get(label, label)) for label in results)
            lines += [f"| {corner} | n | {titles} |", "|---" * (len(results) + 2) + "|"]
        for row in rows:
            cells = " | ".join(joined(row["cells"][label]) for label in results)
            lines.append(f"| {shown.markdown(row['title'])} | {row['n']} | {cells} |")
        lines += [""] if rows else []
    under = [f"{shown.markdown(note)}  " for note in notes(results)]
    return "\n".join([*lines, *under]).rstrip() + "\n"


def comparison_json(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The comparison's numbers: {"stages": {model: {metric, ..., "n", "intervals", ...}}}."""
    keys = [key for key, *_ in METRICS]
    keys += ["sets", "n", "intervals", "verdicts", "areas", "guide_areas", "knowledge", "llm_judge"]
    keys += ["bleu_signature", "contamination", "cost"]
    stages = {
        label: {key: result[key] for key in keys if key in result}
        for label, result in results.items()
    }
    for label, result in results.items():  # without answers
        if used := result.get("as_used"):
            stages[label]["as_used"] = {key: used[key] for key in ("draws", "numbers")}
    return {"stages": stages}


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
        again = " Measure again with this version of evaluate_model.py."
        _, result = records.read_raw(Result, path, again)
        label = path.stem
        if label in found:
            label = f"{path.parent.name}/{label}"
        if label in found:
            label = str(path)
        if label in found:
            raise UserError(f"{path} is there twice. Name every result once.")
        found[label] = result
    _require_same_sets(found)
    asked = {json.dumps(what_was_asked(result), sort_keys=True) for result in found.values()}
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


def _require_same_sets(results: dict[str, dict[str, Any]]) -> None:
    """Raise UserError unless all results have the same outside sets, with the same content."""
    own = {label: r["inputs"].get("sets", {}) for label, r in results.items()}
    if len({json.dumps(sets, sort_keys=True) for sets in own.values()}) > 1:
        named = "; ".join(f"{label}: {', '.join(s) or 'none'}" for label, s in own.items())
        raise UserError(
            "These results are not of the same rows, and cannot be compared. Outside sets (same "
            f"names may be other files): {named}.\nMeasure them again with the same "
            "--sets NAME=FILE:KIND, or with the same evaluate.sets in the YAML (--config FILE)."
        )


def what_was_asked(result: dict[str, Any]) -> list[Any]:
    """What two results must have in common: the rows, and how they were answered and scored."""
    settings, rows = result["inputs"]["evaluate"], result["inputs"]["rows"]
    return [
        [[a["prompt"], a["reference"]] for a in result["answers"]],
        result["n"]["perplexity"],
        {name: digest for name, digest in rows.items() if name.startswith("domain/")},
        {k: settings[k] for k in ("max_new_tokens", "max_text_tokens", "context_words")},
        result["inputs"].get("judge"),
        result["inputs"].get("set_rows"),
    ]
