"""Prepared rows: their columns, splits and manifest, and how a few are taken of each kind.

A row of a conversation of several turns has the last question and answer in its columns and what
came before in `history`: [[question, answer], ...]. `untrained` lists those of the history whose
answers are context and not learnt from; of a preference row none are. `system` is a system text of
its own, in place of the prompt's. Rows of one exchange have none of these. The answer of an
`open_ended` instruction row was cut: nothing is learnt from where it ends. At the answer's tokens
of a `distill` row the base model's distribution is learnt (training/teacher.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import records
from liteguard.errors import UserError

if TYPE_CHECKING:
    from liteguard.prompts import Prompt

SPLITS = ("test", "validation", "train")
Row = dict[str, Any]
FIELDS = {
    "domain": ("text",),
    "instruction": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
}


# Columns of rows that are more than a question and its answer.
CONVERSATION = ("history", "untrained", "system")


def check_conversation(row: Row, part: str) -> None:
    """Raise ValueError unless the columns of CONVERSATION that a row has are as they must be."""
    history, untrained = row.get("history", []), row.get("untrained", [])
    if part == "domain":
        raise ValueError("a text has no history, no untrained answers and no system text")
    if not (
        isinstance(history, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
        and all(isinstance(text, str) and text for pair in history for text in pair)
        and ("history" not in row or history)
    ):
        raise ValueError("history must be a list of [question, answer], both texts")
    turns = range(len(history)) if part == "instruction" else ()
    if not (isinstance(untrained, list) and all(type(n) is int and n in turns for n in untrained)):
        raise ValueError("untrained must be positions in the history of a row with an answer")
    if "system" in row and not (isinstance(row["system"], str) and row["system"]):
        raise ValueError("system must be a text")


def questions(row: Row) -> list[str]:
    """What the user says in a row, turn by turn; the last one is the question to be answered."""
    return [*(question for question, _ in row.get("history", ())), row["prompt"]]


def conversation_text(row: Row) -> str:
    """The question of a row with what was said before it, for a person or a judge to read."""
    turns = (f"User: {q}\nAssistant: {a}\n" for q, a in row.get("history", ()))
    before = f"System: {row['system']}\n" if "system" in row else ""
    before += "".join(turns)
    return f"{before}User: {row['prompt']}" if before else row["prompt"]


def check_system_texts(rows: Iterable[Row], prompt: Prompt) -> None:
    """Raise UserError where rows have a system text and the prompt has no place for one."""
    if not prompt.has_system_slot and any("system" in row for row in rows):
        raise UserError(
            "The prepared data have rows with a system text of their own, and the prompt has no "
            "place for it: it was changed since.\nSet prompt.system_prefix and system_suffix as "
            "they were, or prepare the data again with this prompt: python prepare_datasets.py "
            "--config FILE --output DIR --overwrite"
        )


def load_split(data_dir: Path, part: str, split: str) -> list[Row]:
    """Rows of one prepared split, checked against the manifest.

    Raises UserError when the directory is missing, unfinished or changed since it was written.
    """
    return list(iterate_split(data_dir, part, split))


def iterate_split(data_dir: Path, part: str, split: str) -> Iterator[Row]:
    """`load_split` row by row, for what need not have all of them in memory."""
    path = check_split(data_dir, part, split)
    remedy = again(data_dir)
    number = 0
    with path.open("rb") as file:  # whose lines end at a newline only, not at U+2028
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8"))
                if any(not isinstance(row[f], str) for f in FIELDS[part]):
                    raise ValueError(f"columns {FIELDS[part]} must be text")
                if not row.keys().isdisjoint(CONVERSATION):
                    check_conversation(row, part)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}. {remedy}") from None
            yield row
    if not number:
        raise UserError(f"{path} is empty. {remedy}")


def check_split(data_dir: Path, part: str, split: str) -> Path:
    """The file of a prepared split; UserError when it is missing or was changed since."""
    manifest = read_manifest(data_dir)
    name = f"{part}/{split}.jsonl"
    path = data_dir / name
    digest = manifest["files"].get(name)
    if digest is None or not path.is_file():
        raise UserError(f"{path} is missing from the prepared data. {again(data_dir)}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise UserError(
            f"{path} was changed after it was prepared (sha256 differs from manifest.json).\n"
            f"{again(data_dir)}"
        )
    return path


def again(data_dir: Path) -> str:
    """How to make prepared data again, from the sources that they were made from."""
    flags: list[str] = []
    with contextlib.suppress(ValueError):  # of a record that somebody has edited
        flags = shlex.split(read_manifest(data_dir)["made_by"])
    return f"Prepare it again: {_command(data_dir, flags)} --overwrite"


def _command(data_dir: Path, flags: Sequence[str]) -> str:
    """The command that prepares a directory; FILE where the flags do not name a configuration."""
    named = [] if {"--config", "--model_type", "--model"} & {*flags} else ["--config", "FILE"]
    words = ["prepare_datasets.py", *named, *flags, "--output", str(data_dir)]
    return f"python {shlex.join(words)}"


def source_titles(manifest: dict[str, Any], part: str) -> dict[str, str]:
    """What a row's `dataset` stands for in a part: a hub id, a file's name, or a dataset function.

    Rows do not tell two sources of one function apart: their names are joined.
    """
    found: dict[str, list[str]] = {}
    for entry in manifest["sources"]:
        if entry["part"] == part:
            file = entry["path"] and Path(entry["path"]).name
            found.setdefault(entry["dataset"], []).append(entry["hub"] or file or entry["dataset"])
    return {dataset: " and ".join(names) for dataset, names in found.items()}


def read_manifest(data_dir: Path, flags: Sequence[str] = ()) -> dict[str, Any]:
    """manifest.json of a prepared data directory.

    flags: those that name the configuration, for a message with the command that makes one. The
    directory's name does not tell: a user's own YAML may share it with one of ours.
    """
    path = data_dir / "manifest.json"
    if not path.is_file():
        raise UserError(
            f"No prepared data in {data_dir} (no manifest.json).\nRun: {_command(data_dir, flags)}"
        )
    found = records.read_raw(records.Manifest, path, "\nPrepare the data again.")[1]
    return {"counts": {}, "sources": [], "made_by": "", **found}


def balanced(
    rows: list[dict], key: str, limit: int, weights: dict[str, float] | None = None
) -> list[dict]:
    """Up to `limit` rows, the groups that `key` makes taking turns by their weights (default 1).

    The order within a group is kept; a group that runs out leaves its turns to the others.
    """
    groups: dict[Any, list[dict]] = {}
    for row in rows:
        groups.setdefault(row.get(key), []).append(row)
    due = [
        ((rank + 0.5) / (weights or {}).get(name, 1.0), str(name), rank, row)
        for name, members in groups.items()
        for rank, row in enumerate(members)
    ]
    return [entry[3] for entry in sorted(due, key=lambda entry: entry[:3])[:limit]]
