"""The report page and the model card, from the results that the table shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liteguard import checkpoints, records, shown, writing
from liteguard.errors import UserError, first_line
from liteguard.evaluation import against_base, card
from liteguard.evaluation.comparison import (
    AGAINST_BASE,
    QUESTIONS,
    REQUESTS,
    TITLES,
    VERDICTS,
    comparison_json,
    comparison_markdown,
    comparison_table,
    notes,
)
from liteguard.evaluation.figures import figures
from liteguard.evaluation.plots import latency_plot, length_plot, loss_plot
from liteguard.evaluation.verdict import MARKS, Verdict, verdict_markdown
from liteguard.records import BundleRecord, History, StageRecord
from liteguard.rows import read_manifest

# What a file of ours has in it, of earlier versions too.
_MARKS = {
    "report.html": "<title>LiteGuard report</title>",
    "MODEL_CARD.md": ", adapted with LiteGuard\n",
}
_TABLE = "| Metric | n |"


def check_places(
    directory: Path, markdown: str | None = None, json_file: str | None = None
) -> None:
    """Raise UserError, before the work, where `write_report` would replace another's file."""
    marks = {directory / name: mark for name, mark in _MARKS.items()}
    if markdown:
        marks[Path(markdown)] = _TABLE
    if json_file:
        marks[Path(json_file)] = '"stages"'
    for path, mark in marks.items():
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link, and left as it is: name another place.")
        writing.require_file(path)
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if text and mark not in text:
            raise UserError(
                f"{path} was not written by evaluate_model.py --compare, and would be replaced. "
                "Move it away, or name another place."
            )


def write_report(
    results: dict[str, dict[str, Any]],
    directory: Path,
    markdown: str | None = None,
    json_file: str | None = None,
    verdict: Verdict | None = None,
) -> list[Path]:
    """Write report.html and MODEL_CARD.md to `directory`, the table where asked; returns paths."""
    facts = report_facts(results, verdict)
    texts = {
        directory / "report.html": render("report_template.html", facts),
        directory / "MODEL_CARD.md": model_card(results, facts),
    }
    if markdown:
        said = f"\n{verdict_markdown(verdict)}\n" if verdict else ""
        texts[Path(markdown)] = comparison_markdown(results) + said
    for path, text in texts.items():
        checkpoints.write_text(path, text)
    if json_file:
        said_too = {"verdict": verdict.to_dict()} if verdict else {}
        checkpoints.write_json(Path(json_file), comparison_json(results) | said_too)
    return [*texts, *([Path(json_file)] if json_file else [])]


def model_card(results: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """The card of the last result, with the metadata that a model hub reads."""
    label = list(results)[-1]
    kind: card.Kind = "bundle" if label == "bundle" else "adapter"
    name = facts["base_model"].split("/")[-1].split(":")[-1]
    return card.front_matter(facts, kind, f"{name} {label}") + render(
        "model_card_template.md", facts
    )


def render(template: str, facts: dict[str, Any]) -> str:
    """A template of this package with `facts` filled in, every text escaped for its format."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
    from markupsafe import Markup

    is_html = template.endswith(".html")

    def escaped(value: Any) -> Any:
        """What Markdown has in place of autoescape; Markup is Markdown already."""
        is_text = isinstance(value, str) and not isinstance(value, Markup)
        return shown.markdown(value) if is_text else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=is_html,
        finalize=None if is_html else escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if not is_html:
        made = ("markdown", "verdict_markdown")  # escaped where they are put together
        facts = {**facts, **{name: Markup(facts[name]) for name in made if name in facts}}
    try:
        return environment.get_template(template).render(facts)
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"a record beside the results lacks what {template} shows ({first_line(error)}): it is "
            "damaged, or of another version. Make the stage or the bundle that it belongs to again."
        ) from None


def report_facts(
    results: dict[str, dict[str, Any]], verdict: Verdict | None = None
) -> dict[str, Any]:
    """Everything that the report page and the model card show.

    Loss curves, data and versions come from the stages and the data that the results name; what is
    no longer there is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for label, result in results.items():
        path = result["model"]["path"]
        file = Path(f"{path}.json") if label == "bundle" else Path(path or "") / checkpoints.RECORD
        if path and file.is_file():
            kind = BundleRecord if label == "bundle" else StageRecord
            found[label] = records.read(kind, file).model_dump()
    last = list(results.values())[-1]
    data_dir = Path(last["model"]["data_dir"])
    manifest = read_manifest(data_dir) if (data_dir / "manifest.json").is_file() else None
    sources = manifest["sources"] if manifest else []
    versions: dict[str, str] = {}
    for record in found.values():
        versions |= record.get("versions", {})
    return {
        "labels": {label: TITLES.get(label, label) for label in results},
        "tables": [
            (corner, rows)
            for corner, rows in (
                ("Metric", comparison_table(results)),
                (AGAINST_BASE, against_base.table(results)),
            )
            if rows
        ],
        "verdict": verdict,
        "figures": figures(results, found),
        "marks": MARKS,
        "verdict_markdown": verdict_markdown(verdict) if verdict else "",
        "notes": notes(results),
        "markdown": comparison_markdown(results),
        "areas": area_tables(results),
        "curves": [
            (label, loss_plot(records.read(History, history).root))
            for label, result in results.items()
            if (history := Path(result["model"]["path"] or "") / "log_history.json").is_file()
        ],
        "both_bases": {
            label: both
            for label, record in found.items()
            if (both := record.get("metrics", {}).get("both_bases"))
        },
        "lengths": length_plot(results),
        "latencies": latency_plot(results),
        "samples": samples(results),
        "duration": shown.duration,
        "costs": {label: result["cost"] for label, result in results.items()},
        "manifest": manifest,
        "licences": sorted({source["licence"] for source in sources if source["licence"]}),
        "versions": versions,
        "base_model": last["model"]["name"],
        "base_licence": next(
            (
                model["licence"]
                for record in found.values()
                if isinstance(model := record["config"].get("model"), dict) and "licence" in model
            ),
            "",
        ),
        "stages": found,
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
    outside = next(iter(results.values())).get("sets", {})
    for name in (*outside, *QUESTIONS, *REQUESTS):
        seen: set[str] = set()
        kind = outside.get(name, {}).get("kind")
        for index, answer in enumerate(first):
            group = str(answer["area"] or answer["kind"] or kind)
            if answer["set"] != name or group in seen or len(seen) == 2:
                continue
            seen.add(group)
            given = {label: r["answers"][index] for label, r in results.items()}
            title = f"{QUESTIONS[name]} question" if name in QUESTIONS else REQUESTS.get(name, name)
            chosen.append(
                {
                    "set": title,
                    "group": group.replace("_", " "),
                    "prompt": answer["prompt"],
                    "reference": answer["reference"],
                    "answers": given,
                }
            )
    return chosen


def steps_table(steps: list[dict[str, Any]]) -> str:
    """Wall time and peak memory of each step."""
    lines = [f"{'step':22}{'wall s':>10}{'peak GB':>10}"]
    lines += [f"{s['name']:22}{s['wall_s']:>10.1f}{s['peak_rss_gb']:>10.2f}" for s in steps]
    return "\n".join(lines)
