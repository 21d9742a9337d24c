"""The tables of README.md and docs/: from benchmarks/*_report.json and from the code.

    make readme

A block between `<!-- name -->` and `<!-- /name -->` is rendered here and never typed. Measured ones
come from benchmarks/NAME_report.json, the others from reference.py. tests/test_readme.py fails
where a document does not say what this would write.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import notebook  # noqa: E402
import reference  # noqa: E402

from liteguard.evaluation.comparison import (  # noqa: E402
    COLUMNS,
    METRICS,
    TITLES,
    cell,
    joined,
    knowledge_rows,
    number_text,
    set_rows,
    table_columns,
)
from liteguard.evaluation.verdict import MARKS  # noqa: E402

# Columns of the table in README.md.
RESULT = ("perplexity", "rouge1", "refused_harmful", "refused_benign")


def metrics_markdown(results: dict[str, dict[str, Any]]) -> str:
    """`metrics_table` as a Markdown table, for the documents."""
    columns = table_columns(results)
    lines = [
        "| | " + " | ".join(title for _, title, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for label, result in results.items():
        cells = " | ".join(cell(result, key, form) for key, _, form in columns)
        lines.append(f"| {label} | {cells} |")
    counts = next(iter(results.values()))["n"]
    lines.append("| n | " + " | ".join(str(counts.get(key, 0)) for key, _, _ in columns) + " |")
    return "\n".join(lines)


def demo_markdown(report: dict[str, Any]) -> str:
    """What the documents show of a demo report: the metrics, then the steps."""
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
    """What the documents show of benchmarks/data_report.json: rows, time and memory of each run."""
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
    """What the documents show of benchmarks/training_report.json: speed and memory."""
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
    """What the documents show of benchmarks/convert_report.json: conversion at full size."""
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
    """What the documents show of benchmarks/recipes_report.json: size and cost of each recipe."""
    lines = [
        "| `--quantize` | MB | perplexity | same answers | tokens/s | Phi-1.5 GB | Phi-2 GB |",
        "|---|---|---|---|---|---|---|",
    ]

    def change(row: dict[str, Any]) -> str:
        known = f" ± {row['error']:.1%}, {row['texts']} texts" if "error" in row else ""
        return f"{row['change']:+.1%}{known}"

    lines += [
        f"| {name} | {row['megabytes']:.0f} | {change(row)} | "
        f"{row['same_answers']} of {row['answers']} | {row['decode_tok_s']:.0f} | "
        f"{row['phi1_5_gb']:.2f} | {row['phi2_gb']:.2f} |"
        for name, row in report["recipes"].items()
    ]
    lines += [
        f"| {name} | {row['megabytes']:.0f} | {change(row)} | | | | |"
        for name, row in report.get("llama_cpp", {}).items()
    ]
    return "\n".join(lines)


def bundle_markdown(report: dict[str, Any]) -> str:
    """What the documents show of benchmarks/bundle_report.json: speed beside llama.cpp."""
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
    """What the documents show of benchmarks/tokenizer_report.json: the same ids on the device."""
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
    """What the documents show of benchmarks/full_report.json, a file of --compare ... --json."""
    stages = report["stages"]
    lines = [
        "| | n | " + " | ".join(TITLES.get(label, label) for label in stages) + " |",
        "|---" * (len(stages) + 2) + "|",
    ]
    first = next(iter(stages.values()))
    for key, title, form, limits, _ in METRICS:
        if key in first:
            cells = (joined(number_text(own, key, form, limits)) for own in stages.values())
            lines.append(f"| {title} | {first['n'][key]} | {' | '.join(cells)} |")
    for row in knowledge_rows(stages):
        cells = " | ".join(joined(row["cells"][label]) for label in stages)
        lines.append(f"| {row['title']} | {row['n']} | {cells} |")
    return "\n".join(lines)


def full_size_markdown(report: dict[str, Any]) -> str:
    """What the documents show of benchmarks/full_size_report.json: the six scripts at real size."""
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


# Rows of the outside table, of questions and of harmful requests, as `set_rows` names them.
OUTSIDE = ("perplexity", "rouge1", "bleu", "questions_words", "circles", "refused", "drawn")


def outside_markdown(report: dict[str, Any]) -> str:
    """What the documents show of benchmarks/outside_report.json: rows that others wrote."""
    stages = report["stages"]
    lines = [
        "| | n | " + " | ".join(TITLES.get(label, label) for label in stages) + " |",
        "|---" * (len(stages) + 2) + "|",
    ]
    for row in set_rows(stages):
        if row["key"].partition(".")[2] in OUTSIDE:
            cells = " | ".join(joined(row["cells"][label]) for label in stages)
            lines.append(f"| {row['title']} | {row['n']} | {cells} |")
    return "\n".join([*lines, "", f"{report['verdict']['headline']}."])


def outside_reasons(report: dict[str, Any]) -> str:
    """Everything the verdict on the outside run looked at, in its own words."""
    marks, reasons = {**MARKS, None: "told"}, report["verdict"]["reasons"]
    return "\n".join(f"- {marks[own['met']]}: {own['text']}" for own in reasons)


def result_markdown(report: dict[str, Any]) -> str:
    """What README.md shows of a demo report: four numbers of each stage."""
    columns = [column for column in COLUMNS if column[0] in RESULT]
    lines = [
        "| | " + " | ".join(title for _, title, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for label, stage in report["stages"].items():
        cells = " | ".join(cell(stage, key, form) for key, _, form in columns)
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)


def machines_markdown(demo: dict[str, Any], full_size: dict[str, Any], memory: str) -> str:
    """What README.md says of memory: two machines that were measured, and an estimate.

    memory: docs/memory.md, whose table tests/test_readme.py compares with the command's.
    """
    most = max(step["peak_rss_gb"] for step in demo["steps"])
    phi2 = full_size["phi2"]
    disk = max(step["disk_gb"] for step in phi2["steps"].values())
    card = {
        stage: float(re.search(rf"phi-2 +{stage} +checkpointing  +([\d.]+)", memory)[1])
        for stage in ("domain", "safety")
    }
    return "\n".join(
        (
            "| machine | model | memory |",
            "|---|---|---|",
            "| 2 CPU cores | SmolLM2-135M (`make demo`) | "
            f"{most:.1f} GB, {demo['total_wall_s'] / 60:.0f} minutes |",
            "| CPU, no GPU | Phi-2, all six scripts, few steps | "
            f"{phi2['peak_gb']:.1f} GB, {disk:.1f} GB of disk |",
            f"| 8 GB GPU | Phi-2, `configs/phi-2_8gb.yaml` | {card['domain']:.1f} GB in stages 1 "
            f"and 2, {card['safety']:.1f} GB in stage 3 (estimated) |",
        )
    )


def allocator_markdown(report: dict[str, list[float]]) -> str:
    """What the documents show of benchmarks/allocator_report.json: tokens/s, tenth by tenth."""
    count = len(next(iter(report.values())))
    lines = ["| allocator | " + " | ".join(map(str, range(1, count + 1))) + " |"]
    lines.append("|---" * (count + 1) + "|")
    lines += [
        f"| {name} | {' | '.join(f'{speed:.0f}' for speed in speeds)} |"
        for name, speeds in report.items()
    ]
    return "\n".join(lines)


def support_markdown(report: dict[str, Any]) -> str:
    """What the documents show of benchmarks/support_report.json: what came of each family."""
    steps = {"train": "train", "task": "`.task`", "litertlm": "`.litertlm`", "int4": "4 bits"}
    lines = [
        f"| models | file | tokenizer | {' | '.join(steps.values())} | date |",
        "|---" * (len(steps) + 4) + "|",
    ]
    reasons: list[str] = []
    for row in report["families"].values():
        cells = []
        for step in steps:
            said = row.get(step, "")
            why = said.removeprefix("no: ")
            if said.startswith("no") and why not in reasons:
                reasons.append(why)
            cells.append(f"no ({reasons.index(why) + 1})" if said.startswith("no") else said)
        lines.append(
            f"| {row['models']} | `{row['yaml']}` | {row['tokenizer']} | {' | '.join(cells)} | "
            f"{row['date']} |"
        )
    notes = [f"{number}. {text}" for number, text in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]) if notes else "\n".join(lines)


# Block -> what renders it from benchmarks/NAME_report.json.
BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo_markdown,
    "full": full_markdown,
    "full_size": full_size_markdown,
    "data": data_markdown,
    "training": training_markdown,
    "convert": convert_markdown,
    "recipes": recipes_markdown,
    "bundle": bundle_markdown,
    "tokenizer": tokenizer_markdown,
    "support": support_markdown,
    "allocator": allocator_markdown,
    "outside": outside_markdown,
}


def read_report(name: str) -> dict[str, Any]:
    """benchmarks/NAME_report.json."""
    return json.loads((ROOT / f"benchmarks/{name}_report.json").read_text(encoding="utf-8"))


@functools.cache
def blocks() -> dict[str, str]:
    """Name of a block -> its text."""
    demo, memory = read_report("demo"), (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    return {
        "configuration": reference.configuration(),
        "formats": reference.formats(),
        "datasets": reference.datasets(),
        "tree": reference.tree(),
        "result": result_markdown(demo),
        "verdict": outside_reasons(read_report("outside")),
        "machines": machines_markdown(demo, read_report("full_size"), memory),
        **{name: render(read_report(name)) for name, render in BLOCKS.items()},
    }


def documents() -> dict[Path, str]:
    """README.md, docs/*.md, the notebook and configs/schema.json as they should be."""
    rendered = blocks()
    found = {
        ROOT / "configs/schema.json": reference.schema(),
        ROOT / "docs/liteguard.ipynb": notebook.notebook(),
    }
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for name, block in rendered.items():
            pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
            whole = f"<!-- {name} -->\n{block}\n<!-- /{name} -->"
            text = re.sub(pattern, lambda _, whole=whole: whole, text, flags=re.DOTALL)
        found[path] = text
    return found


def main() -> None:
    """Keep demo/report.json, when it is there, and write the documents that say something else."""
    if (ROOT / "demo/report.json").exists():
        shutil.copyfile(ROOT / "demo/report.json", ROOT / "benchmarks/demo_report.json")
    for path, text in documents().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
