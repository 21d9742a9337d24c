"""Which rows of a part nearly equal another; what is compared stays in the shards' files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from liteguard.data import near_duplicates, near_questions

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


def near_rows(part: Part, rows: np.ndarray, threshold: float) -> np.ndarray:
    """Which rows nearly equal an earlier one: texts by their words, pairs in both sides."""
    signatures = _Signatures(part, rows)

    def texts(own: np.ndarray, others: np.ndarray) -> np.ndarray:
        one, other = signatures[own], signatures[others]
        return near_duplicates.similarity(one, other) >= threshold

    def pairs(own: np.ndarray, others: np.ndarray) -> np.ndarray:
        one, other = signatures[own], signatures[others]
        asked, answered = near_duplicates.pair_similarity(one, other)
        near = answered >= threshold
        a, b = rows[own], rows[others]
        short = (questions.sizes[a] > 0) & (questions.sizes[b] > 0)
        # Of long questions no words are kept, and a few rare ones would not count for much.
        near &= short | (asked >= threshold)
        check = np.flatnonzero(near & short)
        near[check] = near_questions.ask_the_same(
            questions[a[check]], questions[b[check]], questions.weights, threshold
        )
        return near

    if part.name == "domain":
        return near_duplicates.near_duplicates(signatures, texts) >= 0
    questions = _Questions(part)
    return near_duplicates.near_duplicates(signatures, pairs) >= 0
