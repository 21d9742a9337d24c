"""What the columns of a source say of a row beside its content: its split, and not to train on it.

Columns are known by their names in lower case, nested ones ('data.label') by the end of theirs.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from liteguard.config import SourceSection
from liteguard.data.conversations import FLAGS
from liteguard.data.files import SPLIT_NAMES, files_and_splits
from liteguard.data.readers import Broken, LeftOut, broken, hub_splits, read_rows
from liteguard.data.values import given, says_yes
from liteguard.errors import UserError
from liteguard.rows import SPLITS, Row

# These may say something else: only names of splits count in them.
_MAY_SAY_SPLITS = ("subset", "fold", "partition")
# Of rows with one answer each a false one says: not for training (KTO). Of texts it is a class.
_ANSWER_LABELS = ("label", "kto_tag")
_GOOD = ("good", "chosen", "positive", "desirable")
_BAD = ("bad", "rejected", "negative", "undesirable")


@functools.cache
def _plain(name: str) -> str:
    return str(name).rsplit(".", 1)[-1].strip().lower()


# --- columns by other names -----------------------------------------------------------------------
def renamed(source: SourceSection, row: Row) -> Row:
    """The row under our column names, by the source's `columns:`; 'a.b' is b inside of a.

    What else is inside of a column that is looked into becomes a column of its own ('a.label').
    """
    if not source.columns:
        return row
    kept = {name: value for name, value in row.items() if name not in source.columns}
    inside: dict[str, list[str]] = {}
    for ours, theirs in source.columns.items():
        root = theirs.split(".")[0]
        if theirs in row:
            kept[ours] = row[theirs]
        elif root != theirs and root in row:
            kept[ours] = _inside(row, theirs)
            inside.setdefault(root, []).append(theirs)
    for root, used in inside.items():
        if root in source.columns.values():
            continue
        if root not in source.columns:
            del kept[root]
        kept |= _left(row[root], root, used)
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


def _left(value: Any, path: str, used: list[str]) -> Row:
    """Path -> value of all inside of a column that no path in `used` is, or begins with."""
    if any(name == path or name.startswith(f"{path}.") for name in used):
        if not isinstance(value, dict) or path in used:
            return {}
        return {
            name: found
            for key, inner in value.items()
            for name, found in _left(inner, f"{path}.{key}", used).items()
        }
    return {path: value}


# --- not for training -----------------------------------------------------------------------------
class Flags:
    """Which columns of a part's rows say whether to train on them, and what they say.

    `labels`: what is in the columns of _ANSWER_LABELS, where the source was looked through.
    """

    def __init__(self, part: str, labels: dict[str, set[str]]) -> None:
        self._names = {*FLAGS, *(_ANSWER_LABELS if part == "instruction" else ())}
        for name, found in labels.items():
            unclear = sorted(value for value in found if _says(name, value) is None)
            # A class: of more than two, or the same for all.
            if unclear and len(found) != 2:
                self._names.discard(name)
            elif unclear and part == "instruction":
                raise UserError(
                    f"The column {name!r} holds {' and '.join(map(repr, sorted(found)))}, and does "
                    "not say which of them is not for training.\nWrite true or false there, or, if "
                    "it is a class, name it in this source's entry in the YAML:\n"
                    f"    columns: {{kind: {name}}}"
                )

    def says(self, name: str, value: Any, place: str) -> bool | None:
        """Whether a cell says to train on its row; None where it says nothing about that.

        Raises UserError for one that must say it and says neither.
        """
        plain = _plain(name)
        if plain not in self._names:
            return None
        said = _says(plain, value)
        if said is None and plain not in _ANSWER_LABELS:
            try:
                # A share, which is not used as one.
                return None if float(value) > 0 else False
            except (TypeError, ValueError):
                raise UserError(
                    f"{place}: the column {name!r} holds {str(value)[:40]!r}, which is neither yes "
                    "nor no, and says whether to train on a row.\nWrite true or false there. If it "
                    "means something else, give it another name, or name it in this source's "
                    f"entry in the YAML:\n    columns: {{kind: {name}}}"
                ) from None
        return said


def _says(name: str, value: Any) -> bool | None:
    said = says_yes(value)
    if said is None and name in _ANSWER_LABELS:
        text = str(value).strip().lower()
        said = True if text in _GOOD else False if text in _BAD else None
    return said


# --- splits ---------------------------------------------------------------------------------------
def says_split(name: str, value: Any) -> bool:
    """Whether a cell says which split its row is of."""
    plain = _plain(name)
    return plain == "split" or (
        plain in _MAY_SAY_SPLITS and str(value).strip().lower() in SPLIT_NAMES
    )


def _split_texts(row: Row) -> set[str]:
    """What the columns of a row say about its split, in lower case."""
    return {
        str(value).strip().lower()
        for name, value in row.items()
        if _plain(name) in ("split", *_MAY_SAY_SPLITS)
        and given(value) is not None
        and says_split(name, value)
    }


class OwnSplits:
    """The splits that a source comes with: in the names of its files, or in a column.

    Rows of its test and validation splits become ours. Of its training rows some are held out only
    for a split that it does not have itself; a row without a split is drawn like any other.
    `flags`: which of its columns say that a row is not for training.
    """

    def __init__(self, source: SourceSection, first: Row, part: str) -> None:
        names = _named_splits(source)
        plain = {_plain(name) for name in first}
        column = "split" in plain
        labels: dict[str, set[str]] = {}
        telling = plain & {"split", *_MAY_SAY_SPLITS, *_ANSWER_LABELS}
        if source.path and (telling or _may_differ(source)):
            said, labels = _said(source)
            column = column or bool(said)
            names |= {SPLIT_NAMES[text] for text in said if text in SPLIT_NAMES}
        self.flags = Flags(part, labels)
        self.any = bool(names) or column or bool(source.hub and not source.path)
        self.wanted = SPLIT_NAMES.get(source.split or "") if source.path else None
        if self.wanted and not names:
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
        for text in _split_texts(row):
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


def _said(source: SourceSection) -> tuple[set[str], dict[str, set[str]]]:
    """(what any row says of its split, a few of the values of each label), in lower case."""
    splits: set[str] = set()
    labels: dict[str, set[str]] = {}
    named = set(source.columns.values())
    for _, found in read_rows(source):
        if isinstance(found, Broken):
            continue
        row = renamed(source, found)
        splits |= _split_texts(row)
        for name, value in row.items():
            if name in named or _plain(name) not in _ANSWER_LABELS:
                continue
            if given(value) is not None:
                values = labels.setdefault(_plain(name), set())
                if len(values) < 20:
                    values.add(str(value).strip().lower())
    return splits, labels
