"""Which rows of a part nearly equal another; what is compared stays in the shards' files."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

import numpy as np

from liteguard.data import near_duplicates, near_questions
from liteguard.data.shards import Lines
from liteguard.data.words import word_numbers
from liteguard.rows import questions
from liteguard.text import text_key

if TYPE_CHECKING:
    from liteguard.data.splits import Part


class _Signatures:
    """MinHash signatures of a part's rows, read from the shards' files as they are asked for."""

    def __init__(self, part: Part, rows: np.ndarray) -> None:
        self._arrays = [shard.array("digest") for shard in part.shards]
        self._shard, self._row = part.shard[rows], part.row[rows]

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), near_duplicates.PERMUTATIONS), np.uint32)
        shard, row = self._shard[rows], self._row[rows]
        for number, array in enumerate(self._arrays):
            own = shard == number
            found[own] = array[row[own]]
        return found


class _Questions:
    """Words of a part's questions, read from the shards' files as they are asked for."""

    def __init__(self, part: Part) -> None:
        self._arrays = [shard.array("asked") for shard in part.shards]
        self._shard = part.shard
        self.sizes = near_questions.asked_counts(part.arrays["question_words"])
        self._starts = np.empty(len(self.sizes), np.int64)
        for number in range(len(part.shards)):
            own = part.of_shard(number)
            self._starts[own] = np.cumsum(self.sizes[own]) - self.sizes[own]
        seen = near_questions.count_words(self._arrays)
        self.weights = near_questions.weigh(seen, len(self.sizes))

    def __getitem__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(word numbers one after the other, how many each question has)."""
        words = [
            self._arrays[shard][start : start + size]
            for shard, start, size in zip(
                self._shard[rows], self._starts[rows], self.sizes[rows], strict=True
            )
        ]
        return np.concatenate([np.empty(0, np.uint64), *words]), self.sizes[rows]


# A word that fewer of the (short) questions have is a subject, not a manner of speaking.
_RARE = 0.01


class _LongQuestions:
    """Questions of which no words are kept, read again where two seem to be the same.

    Among a hundred words one weighs little, and may be the drug that is asked about.
    """

    def __init__(self, part: Part, weights: np.ndarray) -> None:
        self._part, self._weights = part, weights
        # In data of few questions: what no short one has.
        self._least = min(-np.log(_RARE), weights.max())
        self._lines = [Lines(shard) for shard in part.shards]
        self._rare = functools.lru_cache(1 << 17)(self._rare_words)

    def _rare_words(self, row: int) -> np.ndarray:
        line = json.loads(self._lines[self._part.shard[row]][self._part.row[row]])
        words = np.unique(word_numbers(text_key(" ".join(questions(line))).split()))
        return words[near_questions.weights_of(words, self._weights) >= self._least]

    def ask_the_same(self, own: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether no rare word of one stands in the place of another's, bool.

        One that only one of them has may be there beside all the others.
        """
        same = np.empty(len(own), bool)
        for n, (one, other) in enumerate(zip(own.tolist(), others.tolist(), strict=True)):
            a, b = self._rare(one), self._rare(other)
            alone = sorted((np.isin(x, y, invert=True).sum() for x, y in ((a, b), (b, a))))
            same[n] = alone[0] == 0 and alone[1] <= 1
        return same


def near_rows(part: Part, rows: np.ndarray, threshold: float) -> np.ndarray:
    """Which rows nearly equal an earlier one: texts by their words, pairs in both sides."""
    signatures = _Signatures(part, rows)

    def texts(own: np.ndarray, others: np.ndarray) -> np.ndarray:
        one, other = signatures[own], signatures[others]
        return near_duplicates.similarity(one, other) >= threshold

    def pairs(own: np.ndarray, others: np.ndarray) -> np.ndarray:
        one, other = signatures[own], signatures[others]
        asked, answered = near_duplicates.pair_similarity(one, other)
        a, b = rows[own], rows[others]
        # However much else is the same: 5 mg and 50 mg, yes and no.
        near = (answered >= threshold) & (facts[a, 1] == facts[b, 1])
        short = (short_ones.sizes[a] > 0) & (short_ones.sizes[b] > 0)
        check = np.flatnonzero(near & short)
        near[check] = near_questions.ask_the_same(
            short_ones[a[check]], short_ones[b[check]], short_ones.weights, threshold
        )
        near &= short | ((asked >= threshold) & (facts[a, 0] == facts[b, 0]))
        check = np.flatnonzero(near & ~short)
        near[check] = long.ask_the_same(a[check], b[check])
        return near

    if part.name == "domain":
        return near_duplicates.near_duplicates(signatures, texts) >= 0
    short_ones, facts = _Questions(part), part.arrays["facts"]
    long = _LongQuestions(part, short_ones.weights)
    return near_duplicates.near_duplicates(signatures, pairs) >= 0
