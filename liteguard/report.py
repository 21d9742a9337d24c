"""Tables for the terminal."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

COLUMNS = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("rouge1", "ROUGE-1", "{:.3f}"),
    ("rouge2", "ROUGE-2", "{:.3f}"),
    ("bleu", "BLEU", "{:.2f}"),
    ("refused_harmful", "harmful refused", "{:.0%}"),
    ("refused_benign", "ordinary refused", "{:.0%}"),
    ("refused_borderline", "borderline refused", "{:.0%}"),
)


def metrics_table(results: dict[str, dict[str, Any]]) -> str:
    """Rows: models; columns: the headline numbers; a last line with the counts."""
    widths = {key: max(len(title), 8) + 2 for key, title, _ in COLUMNS}
    header = f"{'':12}" + "".join(f"{title:>{widths[key]}}" for key, title, _ in COLUMNS)
    lines = [header, "-" * len(header)]
    for label, result in results.items():
        cells = "".join(f"{_cell(result, key, form):>{widths[key]}}" for key, _, form in COLUMNS)
        lines.append(f"{label:12}{cells}")
    counts = next(iter(results.values()))["n"]
    lines.append(f"{'n':12}" + "".join(f"{counts.get(k, 0):>{widths[k]}}" for k, _, _ in COLUMNS))
    return "\n".join(lines)


def _cell(result: dict[str, Any], key: str, form: str) -> str:
    """A number as text; a dash where the data had no such rows."""
    return form.format(result[key]) if key in result else "-"


def steps_table(steps: list[dict[str, Any]]) -> str:
    """Wall time and peak memory of each step."""
    lines = [f"{'step':22}{'wall s':>10}{'peak GB':>10}"]
    lines += [f"{s['name']:22}{s['wall_s']:>10.1f}{s['peak_rss_gb']:>10.2f}" for s in steps]
    return "\n".join(lines)


def metrics_markdown(results: dict[str, dict[str, Any]]) -> str:
    """`metrics_table` as a Markdown table, for the README."""
    lines = [
        "| | " + " | ".join(title for _, title, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for label, result in results.items():
        cells = " | ".join(_cell(result, key, form) for key, _, form in COLUMNS)
        lines.append(f"| {label} | {cells} |")
    counts = next(iter(results.values()))["n"]
    lines.append("| n | " + " | ".join(str(counts.get(key, 0)) for key, _, _ in COLUMNS) + " |")
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


def main() -> None:
    """Keep demo/report.json, when it is there, and render the README's numbers from benchmarks/."""
    root = Path(__file__).resolve().parent.parent
    if (root / "demo/report.json").exists():
        shutil.copyfile(root / "demo/report.json", root / "benchmarks/demo_report.json")
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, render in (("demo", demo_markdown), ("data", data_markdown)):
        numbers = json.loads((root / f"benchmarks/{name}_report.json").read_text(encoding="utf-8"))
        block = f"<!-- {name} -->\n{render(numbers)}\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        print(block)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
