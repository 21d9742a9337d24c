"""Windows of 13 words that rows share with evaluation sets and with held-out rows."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from liteguard.data import near_questions
from liteguard.data.words import MULTIPLIER, key_number, mix_bits, windows, word_numbers
from liteguard.text import normalise, text_key

# GPT-3's overlap rule (Brown et al. 2020, appendix C), since then the usual length. Of a script
# that is written without blanks, where a word is a character (`text_key`), it is 13 characters.
OVERLAP_WORDS = 13
# Shorter questions are looked for as a whole, down to this many words.
SHORTEST_WINDOW = 6
# A window of more held-out texts than this is a set phrase.
COMMON_TEXTS = 3
# Windows of words and rows of signatures that are worked on at a time.
_PIECE, BLOCK = 1 << 22, 1 << 16
_FILTER = 1 << 24


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
        longer one; a shorter text only as a whole. Windows of more than three different texts are
        how questions are phrased, and left out.
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
            key = text_key(normalise(text))
            words = key.split()
            size = min(len(words), OVERLAP_WORDS)
            numbers = word_numbers(words)
            # One question with five answers is one text, not a set phrase of five.
            if key_number(key) in whole:
                continue
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
        arrays: dict[str, Any] = {"names": np.array(self.names, dtype=np.str_), **self.arrays}
        with path.open("xb") as file:
            np.savez(file, **arrays)

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

    `texts` are each text's windows of `size` words in order, no text twice. A window that more than
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
def index_texts(path: str) -> OverlapIndex:
    return OverlapIndex.load(path)


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


def windows_of_rows(values: np.ndarray) -> np.ndarray:
    """One 64-bit hash per row of a (rows, columns) array."""
    total = np.zeros(len(values), np.uint64)
    for column in values.T:
        total = total * MULTIPLIER + column.astype(np.uint64) + np.uint64(1)
    return mix_bits(total)
