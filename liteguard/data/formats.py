"""The layouts of users' files and of hub data: columns -> text, answer or preference pair.

Every row carries an `entity` (a disease where one is named, else the question itself): the split is
drawn by entity, so nothing that names a held-out disease as its entity is trained on."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from liteguard.config import SourceSection
from liteguard.data.readers import Broken, broken, read_rows
from liteguard.errors import UserError
from liteguard.rows import FIELDS, Row

# Beside the columns of a format, rows may have these; `columns:` of a source can name them too.
_LABELS = ("entity", "kind", "area")
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
    "system": "system",
}


def _turns(value: Any, notes: Counter[str]) -> list[tuple[str, Any]]:
    """(role, text) of each non-system message; accepts role/content and from/value.

    Raises ValueError when it is not a list of messages.
    """
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError("not a list of messages")
    turns = []
    for turn in value:
        role = str(turn.get("role") or turn.get("from")).lower()
        text = turn.get("content") if turn.get("content") is not None else turn.get("value")
        turns.append((_ROLES.get(role, role), text))
    spoken = [turn for turn in turns if turn[0] != "system"]
    notes["with a system turn, which is left out"] += len(spoken) < len(turns)
    return spoken


def _exchange(turns: list[tuple[str, Any]], notes: Counter[str]) -> Row:
    """The first user turn that an assistant turn answers. A small model on a device gets one turn,
    so later ones, which need those before them, are left out, and counted."""
    notes["with several exchanges, of which the first is used"] += (
        sum(role == "assistant" for role, _ in turns) > 1
    )
    for (asking, prompt), (answering, completion) in itertools.pairwise(turns):
        if (asking, answering) == ("user", "assistant"):
            return {"prompt": prompt, "completion": completion}
    raise ValueError("no user turn with an assistant's answer")


def _last(value: Any, role: str, notes: Counter[str]) -> Any:
    """A text as it is; of a list of messages the last one, which must be by `role`."""
    if not isinstance(value, list):
        return value
    turns = _turns(value, notes)
    if not turns or turns[-1][0] != role:
        raise ValueError(f"the last message is not the {role}'s")
    if role == "user":
        notes["with a longer conversation, of which the last question is used"] += len(turns) > 1
    return turns[-1][1]


def plain_text(row: Row, notes: Counter[str]) -> Row:
    """Texts in a column `text`."""
    return {"text": row.get("text")}


def alpaca(row: Row, notes: Counter[str]) -> Row:
    """Columns instruction, output and maybe input.

    The input is the prompt where there is one; see `_instructions_differ`.
    """
    question = row.get("input")
    if question is None or (isinstance(question, str) and not question.strip()):
        question = row.get("instruction")
    return {"prompt": question, "completion": row.get("output")}


def messages(row: Row, notes: Counter[str]) -> Row:
    """A column `messages`: a list of {role, content}. The first exchange, see `_exchange`."""
    return _exchange(_turns(row.get("messages"), notes), notes)


def sharegpt(row: Row, notes: Counter[str]) -> Row:
    """A column `conversations`: a list of {from, value}. The first exchange, see `_exchange`."""
    return _exchange(_turns(row.get("conversations"), notes), notes)


def prompt_completion(row: Row, notes: Counter[str]) -> Row:
    """Columns prompt, completion; texts, or lists of messages (then the first exchange)."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _exchange(_turns([*prompt, *completion], notes), notes)
    return {
        "prompt": _last(prompt, "user", notes),
        "completion": _last(completion, "assistant", notes),
    }


def preference(row: Row, notes: Counter[str]) -> Row:
    """Columns prompt, chosen, rejected; texts, or lists of messages.

    The answers may begin with the prompt: of messages the last one is the answer, and a text that
    both answers begin with and that is the prompt is cut off.
    """
    prompt = _last(row.get("prompt"), "user", notes)
    chosen = _last(row.get("chosen"), "assistant", notes)
    rejected = _last(row.get("rejected"), "assistant", notes)
    if (
        all(isinstance(text, str) for text in (prompt, chosen, rejected))
        and prompt
        and chosen.startswith(prompt)
        and rejected.startswith(prompt)
    ):
        notes["whose answers began with the prompt, which is cut off"] += 1
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


class Format(NamedTuple):
    """A layout of hub and local data: its part, the columns it must have, one row -> our row.

    `row` gets the row under our column names and a counter of things to tell the user; it raises
    ValueError with a short reason for a row that cannot be used.
    """

    part: str
    columns: tuple[str, ...]
    row: Callable[[Row, Counter[str]], Row]
    optional: tuple[str, ...] = ()
    defaults: Row = {}


# In the order in which they are tried by `dataset: auto`.
FORMATS = {
    "preference": Format(
        "preference",
        ("prompt", "chosen", "rejected"),
        preference,
        defaults={"kind": "unknown", "area": ""},
    ),
    "messages": Format("instruction", ("messages",), messages, defaults={"kind": "question"}),
    "sharegpt": Format("instruction", ("conversations",), sharegpt, defaults={"kind": "question"}),
    "prompt_completion": Format(
        "instruction", ("prompt", "completion"), prompt_completion, defaults={"kind": "question"}
    ),
    "alpaca": Format(
        "instruction",
        ("instruction", "output"),
        alpaca,
        optional=("input",),
        defaults={"kind": "question"},
    ),
    "plain_text": Format("domain", ("text",), plain_text),
}


def formatted(source: SourceSection, cache_dir: Path) -> Iterator[Row | Broken]:
    """Rows of a hub dataset or of local files in one of FORMATS.

    The first row must have the format's columns, else UserError with the YAML line to write. After
    that a row that cannot be used is a `Broken`.
    """
    layout = FORMATS[source.dataset]
    notes: Counter[str] = Counter()
    checked = False
    placed = read_rows(source)
    joins = False
    if layout.row is alpaca:
        first = list(itertools.islice(placed, 200))
        joins = _instructions_differ(source, first)
        placed = itertools.chain(first, placed)
    try:
        for place, found in placed:
            if isinstance(found, Broken):
                yield found
                continue
            row = _renamed(source, found)
            if not checked:
                _check_columns(source, layout, place, found, row)
                checked = True
            if joins and row.get("input"):
                row = {**row, "input": f"{row.get('instruction')} {row['input']}"}
            yield _usable(layout, place, row, notes)
    finally:
        for what, count in notes.items():
            if count:
                print(f"  {source.path or source.hub}: {count:,} rows {what}")


def _instructions_differ(source: SourceSection, first: list[tuple[str, Row | Broken]]) -> bool:
    """Whether an alpaca source's instructions are tasks of their own, to be asked with the input.

    In the processed medical collections `instruction` is one sentence about the role for all rows
    (or a few): then the input alone is the question. Judged by the first rows.
    """
    rows = [_renamed(source, row) for _, row in first if not isinstance(row, Broken)]
    instructions = Counter(str(row.get("instruction")) for row in rows if row.get("input"))
    if not instructions:
        return False
    differ = len(rows) > 3 and instructions.most_common(1)[0][1] < 0.2 * instructions.total()
    what = "instruction and input" if differ else "input, not the instruction,"
    print(f"  {source.path or source.hub}: the {what} is asked")
    return differ


def _usable(layout: Format, place: str, row: Row, notes: Counter[str]) -> Row | Broken:
    try:
        made = layout.row(row, notes)
    except ValueError as error:
        return broken(place, str(error), row)
    for field, value in made.items():
        if not isinstance(value, str):
            return broken(place, "missing or not text", f"{field} is {value!r} in {row}")
    for label in (*layout.defaults, "entity"):
        value = row.get(label)
        made[label] = layout.defaults.get(label) if value is None else str(value)
    if not all(value is None or _is_unicode(value) for value in made.values()):
        return broken(place, "not UTF-8", row)
    return made


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: half a surrogate pair in JSON, or raw bytes in CSV, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _renamed(source: SourceSection, row: Row) -> Row:
    """The row under our column names, by the source's `columns:`."""
    if not source.columns:
        return row
    kept = {name: value for name, value in row.items() if name not in source.columns}
    return kept | {ours: row[theirs] for ours, theirs in source.columns.items() if theirs in row}


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


def _separator_hint(found: Row) -> str:
    """What to do with a CSV file whose cells are not separated by commas; "" for any other."""
    names = list(found)
    if len(names) == 1 and (marks := [m for m in (";", "\t", "|") if m in str(names[0])]):
        return f"Its cells look separated by {marks[0]!r}: use commas, or tabs and the end .tsv."
    return ""


def _check_columns(source: SourceSection, layout: Format, place: str, found: Row, row: Row) -> None:
    """Raise UserError unless the format's columns are there and `columns:` names known ones."""
    shown = ", ".join(map(repr, found)) or "none"
    missing = [name for name in layout.columns if name not in row]
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
            name
            for name, other in FORMATS.items()
            if other.part == layout.part and all(column in row for column in other.columns)
        ]
        raise UserError(
            f"{place}: dataset {source.dataset!r} needs a column {theirs}, found {shown}.\n"
            f"{_separator_hint(found) or _columns_to_write(missing, found, source)}"
            + "".join(f"\nor take them as they are:\n    dataset: {name}" for name in fitting[:1])
        )


def recognise(source: SourceSection, part: str) -> str:
    """The name in FORMATS that the first readable row of a source has the columns of.

    Prints it. Raises UserError when no format of this part of the data fits.
    """
    place, found = next(
        ((p, r) for p, r in itertools.islice(read_rows(source), 100) if not isinstance(r, Broken)),
        ("", None),
    )
    name = source.path or source.hub
    if found is None:
        raise UserError(
            f"{name}: no readable row among the first 100, so its format cannot be recognised.\n"
            "Check the file, or name the format: dataset: " + ", ".join(FORMATS)
        )
    row = _renamed(source, found)
    fitting = [n for n, layout in FORMATS.items() if all(c in row for c in layout.columns)]
    for fit in fitting:
        layout = FORMATS[fit]
        if layout.part == part:
            used = ", ".join(c for c in (*layout.columns, *layout.optional) if c in row)
            print(f"  {name}: recognised as {fit} ({used})")
            return fit
    known = "\n".join(
        f"  {n} (data.{layout.part}): {', '.join(layout.columns)}" for n, layout in FORMATS.items()
    )
    elsewhere = [f"{fit}, which belongs in data.{FORMATS[fit].part}" for fit in fitting]
    raise UserError(
        f"{place}: the columns {', '.join(map(repr, found)) or '(none)'} are those of "
        f"{' or '.join(elsewhere) or 'no known format'}; this source is in data.{part}.\n"
        f"Formats and their columns:\n{known}\n"
        f"{_separator_hint(found) or _columns_to_write(FIELDS[part], found, source)}"
    )
