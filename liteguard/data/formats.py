"""Rows of a source under its layout: what it holds is used, obeyed, or counted by name.

Every row carries an `entity` (a disease where one is named, else the question itself): the split is
drawn by entity, so nothing that names a held-out disease as its entity is trained on."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from liteguard.config import SourceSection
from liteguard.data.conversations import SYSTEM, NotForTraining
from liteguard.data.layouts import FORMATS, Format
from liteguard.data.marks import OwnSplits, renamed, says_split
from liteguard.data.readers import (
    Broken,
    LeftOut,
    broken,
    hints,
    read_rows,
    rows_and_splits,
)
from liteguard.data.values import NO_TEXT, given, is_unicode, mended
from liteguard.errors import UserError
from liteguard.rows import FIELDS, Row

CONVERSATIONS = "conversations of several turns"
# Beside the columns of a format, rows may have these; `columns:` of a source can name them too.
_LABELS = ("entity", "kind", "area", "split")


def formatted(source: SourceSection, cache_dir: Path) -> Formatted:
    """Rows of a hub dataset or of local files in one of FORMATS, for `DATASETS`."""
    return Formatted(source)


class Formatted:
    """Rows of a source in one of FORMATS; `notes` counts what was not used, or not as it is.

    The first row must have the format's columns, else UserError with the YAML line to write. After
    that a row that cannot be used is a `Broken`, one that is left out on purpose a `LeftOut`.
    """

    def __init__(self, source: SourceSection) -> None:
        self.source = source
        self.notes: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Row | Broken]:
        source, notes = self.source, self.notes
        layout = FORMATS[source.dataset]
        known: set[str] = set()
        splits: OwnSplits | None = None
        for place, found, split in rows_and_splits(source):
            if isinstance(found, Broken):
                yield found
                continue
            row = renamed(source, found)
            if splits is None:
                _check_columns(source, layout, place, found, row)
                known = _known_columns(source, layout, row)
                splits = OwnSplits(source, row, layout.part)
            flag = None
            for name in row.keys() - known:
                if given(row[name]) is None or says_split(name, row[name]):
                    continue
                said = splits.flags.says(name, row[name], place)
                if said is None:
                    notes[_unused(name)] += 1
                elif not said:
                    flag = name
            if flag:
                yield broken(place, f"{flag} is {row[flag]}: not for training", row, LeftOut)
                continue
            made = _usable(layout, place, row, notes)
            if splits.any and not isinstance(made, Broken):
                made = splits.mark(made, row, place, split, notes)
            yield made


@functools.cache
def _unused(name: str) -> str:
    return f"rows with a column {name!r}, which is not used"


def _known_columns(source: SourceSection, layout: Format, first: Row) -> set[str]:
    """Columns that are read, by the first row: of two that say the same only one is."""
    read = layout.used(first)
    passed_over = {name for name in layout.optional if name in first and name not in read}
    return ({*layout.columns, *layout.optional, *_LABELS} - passed_over) | {
        *source.columns.values()
    }


def _usable(layout: Format, place: str, row: Row, notes: Counter[str]) -> Row | Broken:
    try:
        made = layout.row(row, notes)
    except NotForTraining as reason:
        return broken(place, str(reason), row, LeftOut)
    except ValueError as error:
        return broken(place, str(error), row)
    for field in FIELDS[layout.part]:
        value = made[field]
        if not _is_text(value):
            return broken(place, "missing or not text", f"{field} is {value!r} in {row}")
        made[field] = mended(value, notes)
    if history := made.get("history"):
        if not all(_is_text(text) for pair in history for text in pair):
            return broken(place, "an earlier turn is missing or not text", row)
        made["history"] = [[mended(text, notes) for text in pair] for pair in history]
        notes[CONVERSATIONS] += 1
    if "system" in made:
        if not isinstance(made["system"], str):
            return broken(place, "the system text is not text", row)
        made["system"] = mended(made["system"], notes)
        notes[SYSTEM] += 1
    for label in (*layout.defaults, "entity"):
        value = given(row.get(label))
        made[label] = layout.defaults.get(label) if value is None else mended(str(value), Counter())
    if "about" in made:
        made["about"] = mended(made["about"], Counter())
    if not all(is_unicode(text) for text in _texts(made)):
        return broken(place, "not UTF-8", row)
    return made


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and (len(value) >= 12 or value.strip() not in NO_TEXT)


def _texts(made: Row) -> Iterator[str]:
    yield from (value for value in made.values() if isinstance(value, str))
    yield from (text for pair in made.get("history", ()) for text in pair)


# What columns are called elsewhere, for the line that an error proposes.
_OTHER_NAMES = {
    "text": ("body", "content", "abstract", "document", "passage", "article", "sentence"),
    "prompt": ("question", "query", "instruction", "input", "request"),
    "completion": ("answer", "response", "output", "reply", "answers"),
    "instruction": ("question", "prompt", "query"),
    "output": ("answer", "response", "completion", "reply"),
    "chosen": ("preferred", "accepted", "better"),
    "rejected": ("dispreferred", "refused", "worse"),
}


def _columns_to_write(missing: Iterable[str], found: Row, source: SourceSection) -> str:
    """The YAML line that names columns, with those of the row that look right filled in."""
    columns = {name: their for name, their in source.columns.items() if their in found}
    for name in missing:
        others = _OTHER_NAMES.get(name, ())
        guesses = [column for column in found if str(column).lower() in (name, *others)]
        columns[name] = guesses[0] if len(guesses) == 1 else "THE_COLUMN"
    line = ", ".join(f"{name}: {their}" for name, their in columns.items())
    return f"Name it in the YAML, in this source's entry:\n    columns: {{{line}}}"


def _check_columns(source: SourceSection, layout: Format, place: str, found: Row, row: Row) -> None:
    """Raise UserError unless the format's columns are there and `columns:` names known ones."""
    shown = ", ".join(map(repr, found)) or "none"
    missing = [] if layout.fits(row) else [n for n in layout.columns if n not in row]
    # A column that `columns:` names and that is not there is a mistake, needed or not.
    missing += [name for name in source.columns if name not in (*row, *missing)]
    known = (*layout.columns, *layout.optional, *_LABELS)
    unknown = [name for name in source.columns if name not in known]
    if unknown:
        raise UserError(
            f"{place}: dataset {source.dataset!r} has no column {', '.join(map(repr, unknown))} to "
            f"be named in 'columns:'. Allowed: {', '.join(known)}"
        )
    if missing:
        theirs = " and ".join(repr(source.columns.get(name, name)) for name in missing)
        fitting = [
            name for name, other in FORMATS.items() if other.part == layout.part and other.fits(row)
        ]
        raise UserError(
            f"{place}: dataset {source.dataset!r} needs a column {theirs}, found {shown}.\n"
            f"{_columns_to_write(missing, found, source)}"
            + "".join(f"\nor take them as they are:\n    dataset: {name}" for name in fitting[:1])
        )


def recognise(source: SourceSection, part: str) -> str:
    """The name in FORMATS that the first readable row of a source has the columns of.

    Prints it. Raises UserError when no format of this part of the data fits.
    """
    name = source.path or source.hub
    first = list(itertools.islice(read_rows(source), 100))
    place, found = next(((p, r) for p, r in first if not isinstance(r, Broken)), ("", None))
    if found is None:
        bad = [row for _, row in first if isinstance(row, Broken)]
        shown = "".join(f"  {row.place}: {row.reason}: {row.text}\n" for row in bad[:3])
        raise UserError(
            f"{name}: no readable row among the first 100, so its format cannot be recognised.\n"
            + shown
            + "\n".join([*hints(bad, source), ""])
            + "Check the file, or name the format: dataset: "
            + ", ".join(FORMATS)
        )
    row = renamed(source, found)
    fitting = [n for n, layout in FORMATS.items() if layout.fits(row)]
    for fit in fitting:
        layout = FORMATS[fit]
        if layout.part == part:
            print(f"  {name}: recognised as {fit} ({', '.join(layout.used(row))})")
            return fit
    known = "\n".join(
        f"  {n} (data.{layout.part}): {', '.join(layout.columns)}" for n, layout in FORMATS.items()
    )
    elsewhere = [f"{fit}, which belongs in data.{FORMATS[fit].part}" for fit in fitting]
    raise UserError(
        f"{place}: the columns {', '.join(map(repr, found)) or '(none)'} are those of "
        f"{' or '.join(elsewhere) or 'no known format'}; this source is in data.{part}.\n"
        f"Formats and their columns:\n{known}\n"
        f"{_columns_to_write(FIELDS[part], found, source)}"
    )
