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
from liteguard.data.files import SPLIT_NAMES, files_and_splits
from liteguard.data.layouts import FORMATS, Format
from liteguard.data.readers import (
    Broken,
    LeftOut,
    broken,
    hints,
    hub_splits,
    read_rows,
    rows_and_splits,
)
from liteguard.data.values import NO_TEXT, given, is_unicode, mended, says_yes
from liteguard.errors import UserError
from liteguard.rows import FIELDS, SPLITS, Row

CONVERSATIONS = "conversations of several turns"
# Beside the columns of a format, rows may have these; `columns:` of a source can name them too.
_LABELS = ("entity", "kind", "area", "split")
# Columns whose false value says: not for training. `label` says it in rows with one answer each
# (KTO); of texts it is a class.
_FLAGS = {
    "domain": ("weight", "train"),
    "instruction": ("weight", "train", "label", "kto_tag"),
    "preference": ("weight", "train"),
}


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
                splits = OwnSplits(source, row)
            flag = None
            for name in row.keys() - known:
                if given(row[name]) is None:
                    continue
                said = says_yes(row[name]) if name in _FLAGS[layout.part] else None
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
    named = {
        theirs if theirs in first else theirs.split(".")[0] for theirs in source.columns.values()
    }
    return ({*layout.columns, *layout.optional, *_LABELS} - passed_over) | named


class OwnSplits:
    """The splits that a source comes with: in the names of its files, or in a column `split`.

    Rows of its test and validation splits become ours. Of its training rows some are held out only
    for a split that it does not have itself; a row without a split is drawn like any other.
    """

    def __init__(self, source: SourceSection, first: Row) -> None:
        names, column = _named_splits(source), "split" in first
        if source.path and (column or _may_differ(source)):
            said = _said_splits(source)
            column = column or bool(said)
            names |= {SPLIT_NAMES[text] for text in said if text in SPLIT_NAMES}
        self.any = bool(names) or column or bool(source.hub and not source.path)
        self.wanted = SPLIT_NAMES.get(source.split or "") if source.path else None
        if self.wanted and not names and self.wanted != "train":
            raise UserError(
                f"{source.path}: split {source.split!r} was asked for, but no name of a file or "
                "folder and no column 'split' says which rows those are.\nLeave `split:` out."
            )
        if self.wanted:
            names = {self.wanted}
        # How a row of the training split is marked: see cleaning.clean.
        self._train: str | None = None
        if {"test", "validation"} <= names:
            self._train = "train"
        elif "test" in names:
            self._train = "train or validation"
        elif "validation" in names:
            self._train = "train or test"

    def mark(
        self, made: Row, row: Row, place: str, named: str | None, notes: Counter[str]
    ) -> Row | Broken:
        """The row with its `split`, the most held-out one of those that its file and column say."""
        said = {named} - {None}
        if text := _split_text(row):
            if text not in SPLIT_NAMES:
                reason = f"unknown split {text[:40]!r}"
                return broken(place, reason, f"allowed: {', '.join(SPLIT_NAMES)}; in {row}")
            said.add(SPLIT_NAMES[text])
        if not said:
            return made
        split = min(said, key=SPLITS.index)
        if self.wanted not in (None, split):
            return broken(place, f"of the split {split}, not {self.wanted}", row, LeftOut)
        if split != "train":
            notes[f"rows of its own {split} split, which stay there"] += 1
            return {**made, "split": split}
        return {**made, "split": self._train} if self._train else made


def _named_splits(source: SourceSection) -> set[str]:
    """The splits that files' names, or the names of a hub dataset's splits, speak of."""
    if source.path:
        return {split for split in files_and_splits(source).values() if split}
    return {split for _, split in hub_splits(source) if split}


def _may_differ(source: SourceSection) -> bool:
    """Whether later rows may have a column that the first lacks: those of JSON, or other files."""
    files = list(files_and_splits(source))
    return len(files) > 1 or any({".json", ".jsonl", ".ndjson"} & {*f.suffixes} for f in files)


def _said_splits(source: SourceSection) -> set[str]:
    """What the column `split` of any row says, in lower case."""
    rows = (row for _, row in read_rows(source) if not isinstance(row, Broken))
    return {_split_text(renamed(source, row)) for row in rows} - {""}


def _split_text(row: Row) -> str:
    value = given(row.get("split"))
    return "" if value is None else str(value).strip().lower()


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
        made[label] = layout.defaults.get(label) if value is None else str(value)
    if not all(is_unicode(text) for text in _texts(made)):
        return broken(place, "not UTF-8", row)
    return made


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and (len(value) >= 12 or value.strip() not in NO_TEXT)


def _texts(made: Row) -> Iterator[str]:
    yield from (value for value in made.values() if isinstance(value, str))
    yield from (text for pair in made.get("history", ()) for text in pair)


def renamed(source: SourceSection, row: Row) -> Row:
    """The row under our column names, by the source's `columns:`; 'a.b' is b inside of a."""
    if not source.columns:
        return row
    kept = {name: value for name, value in row.items() if name not in source.columns}
    for ours, theirs in source.columns.items():
        if theirs in row:
            kept[ours] = row[theirs]
        elif "." in theirs and theirs.split(".")[0] in row:
            kept[ours] = _inside(row, theirs)
    return kept


def _inside(row: Any, path: str) -> Any:
    """The value at 'data.answers.0.text', or None."""
    for step in path.split("."):
        if isinstance(row, dict):
            row = row.get(step)
        elif isinstance(row, list) and step.isdigit() and int(step) < len(row):
            row = row[int(step)]
        else:
            return None
    return row


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
