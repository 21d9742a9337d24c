"""Stage 0's work: what the dataset functions yield, cleaned, de-duplicated, split and mixed."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard.datasets import (
    ASKED_KINDS,
    DATASETS,
    FIELDS,
    SPLITS,
    Row,
    match_key,
    normalise,
    unit,
)
from liteguard.errors import UserError
from liteguard.sources import WHEELS

if TYPE_CHECKING:
    from liteguard.config import Config, SourceSection


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
            if source.dataset not in DATASETS:
                problems.append(f"data.{part}: unknown dataset {source.dataset!r}")
            elif DATASETS[source.dataset][0] != part:
                problems.append(
                    f"data.{part}: {source.dataset!r} makes {DATASETS[source.dataset][0]} rows"
                )
            if source.opening_tokens and part != "instruction":
                problems.append(f"data.{part}: opening_tokens is for instruction rows")
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
        allowed = "\n".join(f"  data.{part}: {', '.join(found)}" for part, found in names.items())
        raise UserError("\n".join(problems) + f"\nDatasets by section:\n{allowed}")


def draw_split(entity: str, seed: int, validation_share: float, test_share: float) -> str:
    """The split of an entity: a hash, so that adding rows never moves an old one."""
    position = unit(f"{seed}\x1f{entity}")
    if position < test_share:
        return "test"
    return "validation" if position < test_share + validation_share else "train"


def collect(
    part: str, config: Config, report: Callable[[str], None] = print
) -> tuple[dict[str, list[Row]], list[dict[str, Any]]]:
    """Clean, de-duplicated rows of one part by split, and one manifest entry per source.

    A prompt (or text) that occurs in several splits is kept in the most held-out one: test before
    validation before train.
    """
    data, fields = config.data, FIELDS[part]
    cache_dir = Path(data.cache_dir)
    gathered: list[tuple[int, str, Row]] = []
    entries = []
    for number, source in enumerate(getattr(data, part)):
        function, wheels = DATASETS[source.dataset][1:]
        dropped: Counter[str] = Counter()
        read = kept = 0
        rows = function(source, cache_dir)
        if source.limit and not source.hub:
            rows = _sample(rows, source.limit, f"{data.seed}{source.dataset}", fields[0])
        for row in rows:
            if source.limit and kept >= source.limit:
                break
            read += 1
            if any(not isinstance(row.get(f), str) for f in fields):
                dropped["missing or not text"] += 1
                continue
            row = {**row, **{f: normalise(row[f]) for f in fields}}
            last = row[fields[-1]]
            if not row[fields[0]] or not last:
                dropped["empty"] += 1
            elif len(last) < data.min_characters:
                dropped["too short"] += 1
            elif sum(len(row[f]) for f in fields) > data.max_characters:
                dropped["too long"] += 1
            elif part == "preference" and row["chosen"] == row["rejected"]:
                dropped["chosen equals rejected"] += 1
            else:
                entity = row.get("entity") or match_key(row[fields[0]])
                split = row.pop("split", None) or draw_split(
                    entity, data.seed, data.validation_share, data.test_share
                )
                row = _opening(source, {**row, "entity": entity}, fields[0])
                gathered.append((number, split, row))
                kept += 1
        entries.append(
            {
                "part": part,
                "dataset": source.dataset,
                "hub": source.hub,
                "path": source.path,
                "revision": source.revision,
                "licence": source.licence or "; ".join(WHEELS[w].licence for w in wheels),
                "wheels": {WHEELS[w].requirement: WHEELS[w].sha256 for w in wheels},
                "rows_read": read,
                "dropped": dropped,
                "rows_kept": kept,
            }
        )
        report(f"  {part:12} {source.dataset:20} {read:7,} rows read, {kept:7,} usable")
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    entity_split: dict[str, str] = {}
    for split in SPLITS:
        for number, row_split, row in gathered:
            if row_split != split:
                continue
            key = match_key(row[fields[0]])
            if key in seen:
                entries[number]["dropped"]["duplicate"] += 1
                entries[number]["rows_kept"] -= 1
                continue
            seen.add(key)
            entity_split[row["entity"]] = split
            splits[split].append(
                {**row, "dataset": getattr(data, part)[number].dataset, "source": number}
            )
        # One shuffle by content: neighbours in a source do not end up in the same batch.
        splits[split].sort(
            key=lambda r: hashlib.sha256(f"{data.seed}{r[fields[0]]}".encode()).digest()
        )
        splits[split] = _mix(splits[split], getattr(data, part))
    if not splits["train"] or not splits["test"] or not splits["validation"]:
        found = ", ".join(f"{split}: {len(rows)}" for split, rows in splits.items())
        raise UserError(
            f"data.{part}: not enough usable rows for three splits ({found}). "
            "Check the sources, or raise data.validation_share and data.test_share."
        )
    for entry in entries:
        entry["dropped"] = dict(entry["dropped"])
    return splits, entries


def _mix(rows: list[Row], sources: list[SourceSection]) -> list[Row]:
    """`rows` interleaved so that every beginning holds about the sources' weights.

    Training reads from the front, so a short run sees the wanted mixture and a long one everything.
    Which source comes next is drawn at random by the weights (arrivals of Poisson processes): with
    regular turns every step has the same shares, and the model learns those instead of the
    difference between requests (docs/experiments.md). Rows of a source keep their order; without
    weights the order stays as it is.
    """
    ranks: Counter[int] = Counter()
    clock: Counter[int] = Counter()
    due = []
    for row in rows:
        # By position in the list: two sources may use the same dataset function.
        number = row.pop("source")
        weight = sources[number].weight
        if weight:
            clock[number] -= math.log(1 - unit(f"mix\x1f{number}\x1f{ranks[number]}")) / weight
        due.append(clock[number])
        ranks[number] += 1
    return [rows[i] for i in sorted(range(len(rows)), key=due.__getitem__)]


def _opening(source: SourceSection, row: Row, field: str) -> Row:
    """The row with `opening_tokens`, where the source asks for it and the row's hash is in."""
    if source.opening_tokens and unit(f"opening{row[field]}") < source.opening_share:
        return {**row, "opening_tokens": source.opening_tokens}
    return row


def _sample(rows: Iterable[Row], limit: int, seed: str, field: str) -> list[Row]:
    """`limit` rows drawn by a hash of their content; sources are often sorted by subject.

    Rows that will not be usable are drawn too, so a little more is taken than asked for.
    """
    found = list(rows)
    found.sort(key=lambda row: hashlib.sha256(f"{seed}{row.get(field)}".encode()).digest())
    return found[: limit + limit // 20]


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, UTF-8, keys in the rows' own order."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
