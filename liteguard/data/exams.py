"""Evaluation sets that training is kept apart from: public benchmarks, and exams in files."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import checkpoints, registry, writing
from liteguard.config import SourceSection
from liteguard.data import sets
from liteguard.data.conversations import is_conversation, turns
from liteguard.data.files import kind, open_data, unreadable
from liteguard.data.overlap import SHORTEST_WINDOW, OverlapIndex
from liteguard.data.readers import Broken, read_rows
from liteguard.data.shards import code_version, file_hashes
from liteguard.data.values import given, is_unicode, mended
from liteguard.errors import UserError
from liteguard.progress import ticking
from liteguard.rows import Row, questions
from liteguard.text import text_key
from liteguard.wheels import WHEELS

if TYPE_CHECKING:
    from liteguard.config import Config

# Where an exam's question may be, the likeliest first.
_FIELDS = ("question", "prompt", "input", "query", "problem", "stem", "instruction", "text")
_CONVERSATIONS = ("messages", "conversations")
# What a set of `evaluate.sets` is called here, and what its rows are asked about or answered with.
SET = "evaluate.sets {}"
_ANSWERS = ("completion", "text")
# Of an exam's rows, so many may be without a question: an empty line at the end of a table.
_MISSING = 0.01


def exam_source(path: str) -> SourceSection:
    """A local evaluation set as a source; a text file without blank lines has a question a line."""
    file = Path(path)
    by_line = file.is_file() and kind(file)[0] == ".txt" and not _has_paragraphs(file)
    return SourceSection(dataset="auto", path=path, text_unit="line" if by_line else "paragraph")


def _has_paragraphs(path: Path) -> bool:
    """Whether a blank line stands between two others."""
    try:
        with open_data(path) as file:
            text = b"".join(line.strip() and b"x" or b" " for line in file)
    except OSError as error:
        raise unreadable(path, error) from None
    except (EOFError, zlib.error, UnicodeError) as error:
        raise UserError(f"{path} is damaged: {error}. Unpack it, or load it again.") from None
    return b" " in text.strip()


def _question(row: Row) -> tuple[str, str] | None:
    """(field, question) of an exam's row, or None."""
    for field in _FIELDS:
        value = given(row.get(field))
        if isinstance(value, dict):  # {"question": {"stem": ..., "choices": ...}}
            value = next((value[inner] for inner in ("stem", *_FIELDS) if inner in value), value)
        if isinstance(value, str) and not is_conversation(value):
            return field, value
        if is_conversation(value):
            return _asked(field, value)
    for field in _CONVERSATIONS:
        if given(row.get(field)) is not None:
            return _asked(field, row[field])
    return None


def _asked(field: str, value: Any) -> tuple[str, str] | None:
    """What the user says in a list of messages."""
    try:
        texts = [turn.text for turn in turns(value, Counter()) if turn.role == "user"]
    except ValueError:
        return None
    return (field, "\n".join(texts)) if texts and all(isinstance(t, str) for t in texts) else None


def _exam_questions(name: str, report: dict[str, str]) -> Iterator[str]:
    fields: Counter[str] = Counter()
    without: list[str] = []
    example = ""
    rows = 0
    for place, row in read_rows(exam_source(name)):
        rows += 1
        if isinstance(row, Broken):
            raise UserError(f"{row.place}: {row.reason}. Repair the evaluation set first.")
        found = _question(row)
        if found is None:
            without.append(f"{place}: found {', '.join(map(repr, row)) or 'nothing'}")
            continue
        if not is_unicode(found[1]):
            raise UserError(f"{place}: not UTF-8. Save the evaluation set in UTF-8 first.")
        example = example or found[1]
        fields[found[0]] += 1
        yield mended(found[1], Counter())  # as training rows are
    if not fields or len(without) > _MISSING * rows:
        share = f"{len(without):,} of {rows:,} rows of {name} are without a question."
        shown = "".join(f"  {line}\n" for line in without[:3])
        raise UserError(
            f"data.decontaminate: {share if fields else f'no question in {name}.'}\n{shown}"
            f"An evaluation set needs a column "
            f"{', '.join(map(repr, _FIELDS[:-1]))} or 'text' with the text of the question, or "
            f"'messages'. Rename one of its columns, or remove {name} from data.decontaminate."
        )
    counts = ", ".join(f"{count:,} questions in {field!r}" for field, count in fields.items())
    missing = f"; {len(without):,} rows without one" if without else ""
    report[name] = f"{counts}{missing}; the first: {' '.join(example.split())[:80]!r}"


def evaluation_texts(
    config: Config, report: dict[str, str] | None = None
) -> Iterator[tuple[str, str]]:
    """(name, question) of every set that `data.decontaminate` names or that `evaluate.sets` has;
    of the latter the reference answers and texts, too, from 6 words on: "Yes." is the answer to
    many a question.

    `report` gets what was found, by name: how many questions, in which field, and the first.
    Raises UserError for a file without questions.
    """
    report = {} if report is None else report
    for name in config.data.decontaminate:
        if Path(name).exists():
            for question in _exam_questions(name, report):
                yield name, question
        else:
            load = registry.BENCHMARKS[name][1]
            items = list(load(name, Path(config.data.cache_dir)))
            report[name] = f"{len(items):,} questions"
            for item in items:
                yield name, item.question
                # PubMedQA's labelled abstracts hold the answers to its questions.
                if item.context:
                    yield name, item.context
    for section in config.evaluate.sets:
        rows = sets.read(section, Path(config.data.cache_dir))
        report[SET.format(section.name)] = f"{len(rows):,} rows of {section.file}"
        for row in rows:
            said = filter(None, map(row.get, _ANSWERS))
            long = (text for text in said if len(text_key(text).split()) >= SHORTEST_WINDOW)
            for text in (*(questions(row) if "prompt" in row else ()), *long):
                yield SET.format(section.name), text


def evaluation_inputs(config: Config) -> dict[str, str]:
    """Name -> hash of every evaluation set that is trained around."""
    known = registry.BENCHMARKS
    found = {}
    for name in config.data.decontaminate:
        if Path(name).exists():
            found[name] = checkpoints.sha256_json(file_hashes(exam_source(name)))
        elif name in known:
            found[name] = WHEELS[known[name][0]].sha256
        else:
            raise UserError(
                f"data.decontaminate: {name!r} is neither a file nor a known benchmark. "
                f"Allowed: a path, {', '.join(known)}"
            )
    for name, own in sets.fingerprint(config).items():
        found[SET.format(name)] = checkpoints.sha256_json(own | {"rows": None})
    return found


def evaluation_report(index: Path) -> dict[str, str]:
    """What was found in each evaluation set of an index: how many questions, where, the first."""
    return json.loads(index.with_suffix(".json").read_text(encoding="utf-8"))


def evaluation_index(config: Config, inputs: dict[str, str]) -> Path | None:
    """The evaluation sets' index in the cache, made when it is not there; None without sets.

    inputs: `evaluation_inputs`.
    """
    if not inputs:
        return None
    key = checkpoints.sha256_json({"sets": inputs, "code": code_version()})
    path = Path(config.data.cache_dir) / "evaluation" / f"{key[:32]}.npz"
    report = path.with_suffix(".json")
    if not (writing.is_sealed(path) and writing.is_sealed(report)):
        path.parent.mkdir(parents=True, exist_ok=True)
        found: dict[str, str] = {}
        with ticking("reading evaluation sets"):
            index = OverlapIndex.build(evaluation_texts(config, found))
        if empty := {*inputs} - {*index.names}:
            raise UserError(f"No question to be kept apart in {', '.join(sorted(empty))}.")
        checkpoints.write_json(report, found, shared=True)
        with writing.replacing(path, shared=True) as beside:
            index.save(beside)
        for file in (report, path):
            writing.seal(file)
    for name, what in evaluation_report(path).items():
        print(f"  kept apart from {name}: {what}")
    return path
