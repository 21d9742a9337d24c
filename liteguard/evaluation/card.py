"""The YAML that a model hub reads at the top of a model card: licence, base model, numbers.

The hub refuses metadata that it does not know, so what can be checked is checked here: licences
outside its list become `other` with their own name, and a base model that is no OWNER/NAME is left
out.
"""

from __future__ import annotations

import html
import re
from typing import Any, Literal

import yaml

from liteguard.errors import UserError

Kind = Literal["adapter", "merged", "bundle"]
# What goes up -> the library that opens it, and what it is to its base model.
LIBRARIES = {"adapter": "peft", "merged": "transformers", "bundle": "litert-lm"}
RELATIONS = {"adapter": "adapter", "merged": "finetune", "bundle": "quantized"}
# Of the hub's list of licences, those that base models come under.
LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0"),
    *("cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "lgpl-3.0", "mpl-2.0"),
    *("openrail", "bigscience-openrail-m", "gemma", "llama2", "llama3", "llama3.1", "llama3.2"),
)
# What people write instead.
_OTHER_NAMES = {
    **{"apache 2.0": "apache-2.0", "apache license 2.0": "apache-2.0", "apache2": "apache-2.0"},
    **{"mit license": "mit", "cc by 4.0": "cc-by-4.0", "gemma terms of use": "gemma"},
    **{f"llama-{n}-community": f"llama{n}" for n in ("2", "3", "3.1", "3.2")},
}
# Where an embedded base model comes from.
_ON_THE_HUB = {"embedded:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Key of a result -> the hub's name of the metric, and how it is called here.
METRICS = {
    "perplexity": ("perplexity", "Perplexity of held-out domain texts"),
    "rouge1": ("rouge", "ROUGE-1, questions about unseen diseases"),
    "seen_rouge1": ("rouge", "ROUGE-1, unseen questions about seen diseases"),
    "bleu": ("bleu", "BLEU, questions about unseen diseases"),
    "refused_harmful": ("refusal_rate", "Harmful requests refused (higher is better)"),
    "refused_benign": ("refusal_rate", "Ordinary requests refused (lower is better)"),
}
SET_METRICS = {
    "perplexity": ("perplexity", "Perplexity"),
    "rouge1": ("rouge", "ROUGE-1"),
    "refused": ("refusal_rate", "Requests refused"),
    "rubric": ("rubric_score", "Rubric score by a language model as judge"),
}


def front_matter(facts: dict[str, Any], kind: Kind, name: str) -> str:
    """The block between `---` lines, for `kind`; numbers are those of the last result.

    facts: `report.report_facts`. name: of the model, in its index of results.
    """
    data: dict[str, Any] = {"language": "en", **licence(facts["base_licence"])}
    if base := hub_name(facts["base_model"]):
        data |= {"base_model": base, "base_model_relation": RELATIONS[kind]}
    sources = (facts["manifest"] or {}).get("sources", [])
    hubs = {source["hub"] for source in sources if hub_name(source.get("hub") or "")}
    if hubs:
        data["datasets"] = sorted(hubs)
    data |= {
        "library_name": LIBRARIES[kind],
        "pipeline_tag": "text-generation",
        "tags": ["liteguard", "medical", "on-device", "dpo"],
        "model-index": [{"name": _plain(name), "results": index(facts["final"])}],
    }
    if problems := wrong(data):
        raise UserError(f"the model card's metadata: {'; '.join(problems)}")
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=False, width=100)
    return f"---\n{text}---\n"


def licence(name: str) -> dict[str, str]:
    """The hub's keys for a licence as a configuration names it ("MIT", "Apache-2.0")."""
    known = " ".join(name.lower().split())
    known = _OTHER_NAMES.get(known, known)
    if known in LICENCES:
        return {"license": known}
    slug = re.sub(r"[^a-z0-9.-]+", "-", known).strip("-")
    return {"license": "other", "license_name": slug} if slug else {"license": "unknown"}


def hub_name(name: str) -> str | None:
    """A base model's OWNER/NAME on the hub; None where it has none."""
    name = _ON_THE_HUB.get(name, name)
    return name if _REPOSITORY.fullmatch(name) else None


def index(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of one model as a model index has them: a task, a data set, its metrics; outside
    sets first."""
    found = []
    for name, numbers in result.get("sets", {}).items():
        if metrics := _metrics(numbers, SET_METRICS, numbers["n"]):
            found.append(_entry(f"{name} ({numbers['kind']})", name, metrics))
    if own := _metrics(result, METRICS, result["n"]):
        found.append(_entry("LiteGuard held-out rows", "liteguard-held-out", own))
    for name, numbers in result["knowledge"].items():
        metric = {"type": "accuracy", "value": round(numbers["accuracy"], 4)}
        metric["name"] = f"Accuracy by log-likelihood, {numbers['n']} questions"
        found.append(_entry(name, name, [metric], "question-answering"))
    return found


def _metrics(
    numbers: dict[str, Any], wanted: dict[str, tuple[str, str]], counts: dict[str, int]
) -> list[dict[str, Any]]:
    return [
        {"type": kind, "value": round(numbers[key], 4), "name": f"{title}, {counts[key]} rows"}
        for key, (kind, title) in wanted.items()
        if key in numbers
    ]


def _entry(
    name: str, kind: str, metrics: list[dict[str, Any]], task: str = "text-generation"
) -> dict[str, Any]:
    slug = re.sub(r"[^\w.-]+", "-", kind).strip("-.") or "own"
    dataset = {"name": _plain(name), "type": slug}
    return {"task": {"type": task}, "dataset": dataset, "metrics": metrics}


def _plain(name: str) -> str:
    """A name that somebody chose, for the metadata: no tags, whoever shows it."""
    return html.escape(name, quote=False)


def wrong(data: dict[str, Any]) -> list[str]:
    """What the hub would refuse of a card's metadata, by the rules that are known here."""
    problems = []
    if data.get("license") not in (*LICENCES, "other", "unknown"):
        problems.append(f"license {data.get('license')!r} is not in the hub's list")
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append("license other needs a license_name")
    for name in filter(None, [data.get("base_model"), *data.get("datasets", [])]):
        if not _REPOSITORY.fullmatch(str(name)):
            problems.append(f"{name!r} is no OWNER/NAME")
    for key in ("library_name", "pipeline_tag"):
        if not re.fullmatch(r"[a-z0-9.-]+", str(data.get(key, ""))):
            problems.append(f"{key} {data.get(key)!r}")
    for model in data.get("model-index", []):
        for entry in model["results"]:
            if not entry["metrics"] or not re.fullmatch(r"[\w.-]+", entry["dataset"]["type"]):
                problems.append(f"model-index: {entry['dataset']['name']!r}")
            for metric in entry["metrics"]:
                value = metric["value"]
                if not isinstance(value, (int, float)) or value != value:
                    problems.append(f"model-index: {metric['name']} is no number")
    return problems
