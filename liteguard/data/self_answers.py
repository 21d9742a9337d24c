"""`dataset: self_answers`: questions that people ask, with the base model's own answers.

A model that is tuned to short templates forgets how it answered everything else. Its own answers,
mixed into stage 2, keep that: they pull no weight anywhere until something else does. The questions
are here; `liteguard/rehearsal.py` has them answered, before the sources are read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from liteguard import registry
from liteguard.config import Config
from liteguard.data.lines import normalise_lines
from liteguard.data.readers import Broken, read_rows
from liteguard.data.values import given, mended
from liteguard.errors import UserError, WorkError
from liteguard.rows import Row
from liteguard.text import has_words, text_key, unit, upper_first

if TYPE_CHECKING:
    from liteguard.config import SourceSection

NAME = "self_answers"
# Longer ones are a story; the answer would be about a part of it.
LONGEST_QUESTION = 400  # characters
# They are for training: measured against its own answers a base model is perfect.
VALIDATION_SHARE = 0.03


def sources(config: Config) -> list[SourceSection]:
    """The sources whose questions the base model answers."""
    return [source for source in config.data.instruction if source.dataset == NAME]


def problems(source: SourceSection, decontaminate: list[str]) -> list[str]:
    """What is wrong with a source of this kind, as sentences; empty when nothing is."""
    found = []
    unknown = [name for name in source.questions if name not in registry.BENCHMARKS]
    if unknown:
        found.append(
            f"{NAME}: no question set {', '.join(map(repr, unknown))}; there are "
            f"{', '.join(registry.BENCHMARKS) or 'none'}"
        )
    if both := [name for name in source.questions if name in decontaminate]:
        found.append(
            f"{NAME}: {', '.join(both)} is in data.decontaminate: what is kept out of training "
            "cannot be asked for it. Take it out of one of the two"
        )
    if bool(source.questions) == bool(source.path or source.hub):
        found.append(
            f"{NAME} needs 'questions:' (names of question sets) or 'path:' or 'hub:' (rows with a "
            "column prompt), one of the two"
        )
    return found


def questions(source: SourceSection, cache_dir: Path) -> list[str]:
    """The questions to be answered, each once, at most `limit` drawn by their text.

    Raises UserError when a file has no column `prompt` (`columns:` can name another).
    """
    found: dict[str, str] = {}
    for text in _asked(source, cache_dir):
        question = upper_first(normalise_lines(mended(text, Counter())))
        if has_words(question) and len(question) <= LONGEST_QUESTION:
            found.setdefault(text_key(question), question)
    drawn = sorted(found, key=lambda key: unit(f"{NAME}\x1f{key}"))
    return [found[key] for key in drawn[: source.limit]]


def _asked(source: SourceSection, cache_dir: Path) -> Iterator[str]:
    for name in source.questions:
        for question in registry.BENCHMARKS[name][1](name, cache_dir):
            yield question.question
    if source.questions:
        return
    column = source.columns.get("prompt", "prompt")
    for place, row in read_rows(source):
        if isinstance(row, Broken):
            continue
        if column not in row:
            raise UserError(
                f"{place}: no column {column!r}; found {', '.join(row)}. Name the column of the "
                f"questions in the YAML, in the entry of {NAME}:\n    columns: {{prompt: NAME}}"
            )
        if isinstance(given(row[column]), str):
            yield row[column]


class SelfAnswers:
    """The rows of a source, out of the file of its answers; `notes` counts what was left out.

    Rows name their split: none is a test row (see VALIDATION_SHARE).
    """

    def __init__(self, source: SourceSection, cache_dir: Path) -> None:
        if source.answers is None:
            raise WorkError(f"{NAME}: the base model has not answered yet (liteguard/rehearsal.py)")
        self.file = Path(source.answers)
        self.notes: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Row]:
        with self.file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if row["left_out"]:
                    self.notes[f"answers of the base model left out: {row['left_out']}"] += 1
                    continue
                held_out = unit(f"split\x1f{row['prompt']}") < VALIDATION_SHARE
                yield {
                    "prompt": row["prompt"],
                    "completion": row["completion"],
                    "kind": "rehearsal",
                    **({"open_ended": True} if row["open_ended"] else {}),
                    "split": "validation" if held_out else "train",
                }
