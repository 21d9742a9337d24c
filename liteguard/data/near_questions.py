"""Questions that are nearly a held-out one: a few other words, or the same in another order.

Windows of words find what was copied as it stands. Here two questions are compared as sets of
words, each word weighted by how rare it is in the questions at hand (inverse document frequency,
Spaerck Jones 1972), so that "what is the" counts for little and a disease's name for much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from liteguard.data.words import is_exact

# Held-out questions of so many words are looked for. One of two words ("asthma is") resembles every
# question about its subject; a longer one shares a window of 13 words even with a word changed.
MIN_WORDS, MAX_WORDS = 3, 26
# Longer questions cannot resemble one of MAX_WORDS, or only one of very common words.
MAX_ASKED = 40
_BUCKETS = 1 << 22
# A word that is among the rarest of more held-out questions leads to too many of them to compare
# with (data of few words would take hours). In the embedded data no word is of more than 72.
MAX_SHARED = 200
# Pairs of (question, held-out one) and rows held in memory at a time.
_PAIRS, ROWS = 1 << 17, 100_000


def count_words(questions: Iterable[np.ndarray]) -> np.ndarray:
    """How often each word comes in arrays of word numbers, by the last bits of its number.

    int64 of shape (2^22,): a size that does not grow with the data; that two words share a bucket
    now and then only makes them look a little more common.
    """
    counts = np.zeros(_BUCKETS, np.int64)
    for words in questions:
        for start in range(0, len(words), 1 << 22):
            piece = words[start : start + (1 << 22)]
            counts += np.bincount(_bucket(piece), minlength=_BUCKETS)
    return counts


def _bucket(words: np.ndarray) -> np.ndarray:
    return (words & np.uint64(_BUCKETS - 1)).astype(np.int64)


def asked_counts(question_words: np.ndarray) -> np.ndarray:
    """Words that are kept of questions of so many words: all, or none of a long one."""
    return np.where(question_words <= MAX_ASKED, question_words, 0).astype(np.int64)


class _Sets:
    """Questions as sets of words: (question, word) pairs, without repeated words.

    `prefix` holds the pairs in each question's prefix: its rarest words, up to a share 1 -
    `similarity` of its weight. Two questions whose weighted Jaccard similarity is at least that
    share a word of both prefixes (Chaudhuri et al. 2006), so only such pairs are compared.
    """

    def __init__(
        self, words: np.ndarray, counts: np.ndarray, weights: np.ndarray, similarity: float
    ) -> None:
        question = np.repeat(np.arange(len(counts)), counts)
        order = np.lexsort((words, question))
        question, words = question[order], words[order]
        first = np.ones(len(words), bool)
        first[1:] = (question[1:] != question[:-1]) | (words[1:] != words[:-1])
        self.question, self.words = question[first], words[first]
        self.sizes = np.bincount(self.question, minlength=len(counts))
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.weights = weights[_bucket(self.words)]
        self.totals = np.bincount(self.question, self.weights, minlength=len(counts))
        # Rarest first, in an order that is the same for all questions.
        rarest = np.lexsort((self.words, -self.weights, self.question))
        before = np.cumsum(self.weights[rarest]) - self.weights[rarest]
        before -= np.repeat(before[self.starts[self.sizes > 0]], self.sizes[self.sizes > 0])
        # A little more than exact, for rounding.
        within = before <= (1 - similarity) * self.totals[self.question[rarest]] + 1e-6
        self.prefix = rarest[within]


class HeldOut:
    """Held-out questions, ready to be compared with many others.

    `words`: word numbers of all questions one after the other, `counts`: how many each has,
    `labels`: a number >= 0 for each, which `find` answers with. `seen`: from `count_words`;
    `questions`: how many questions that counted; `similarity`: weighted Jaccard, 0 to 1.
    """

    def __init__(
        self,
        words: np.ndarray,
        counts: np.ndarray,
        labels: np.ndarray,
        seen: np.ndarray,
        questions: int,
        similarity: float,
    ) -> None:
        usable = (counts >= MIN_WORDS) & (counts <= MAX_WORDS)
        words = words[np.repeat(usable, counts)]
        self.similarity = similarity
        self.weights = weigh(seen, questions)
        self.sets = _Sets(words, counts[usable], self.weights, similarity)
        self.labels = labels[usable]
        found = self.sets.prefix
        postings = found[np.argsort(self.sets.words[found], kind="stable")]
        _, which, sharing = np.unique(
            self.sets.words[postings], return_inverse=True, return_counts=True
        )
        self.postings = postings[sharing[which] <= MAX_SHARED]
        self.keys = self.sets.words[self.postings]

    def find(self, words: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """For each question 1 + the smallest label of those it resembles, else 0; int64."""
        if not len(self.keys) or not len(words):
            return np.zeros(len(counts), np.int64)
        none = int(self.labels.max()) + 2
        result = np.full(len(counts), none)
        rows = _Sets(words, counts, self.weights, self.similarity)
        begin = np.searchsorted(self.keys, rows.words[rows.prefix], "left")
        end = np.searchsorted(self.keys, rows.words[rows.prefix], "right")
        matching = np.flatnonzero(end > begin)
        sizes = (end - begin)[matching]
        # In pieces of about _PAIRS pairs.
        piece = np.cumsum(sizes) // _PAIRS
        for number in np.unique(piece):
            own = matching[piece == number]
            own_sizes = (end - begin)[own]
            row = np.repeat(rows.question[rows.prefix[own]], own_sizes)
            place = np.repeat(begin[own], own_sizes) + _ramp(own_sizes)
            held = self.sets.question[self.postings[place]]
            # Two prefixes may share several words.
            pairs = np.unique(row * len(self.sets.sizes) + held)
            row, held = np.divmod(pairs, len(self.sets.sizes))
            row, held = self._similar(rows, row, held)
            np.minimum.at(result, row, self.labels[held] + 1)
        return np.where(result == none, 0, result)

    def _similar(
        self, rows: _Sets, row: np.ndarray, held: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Those of the pairs whose similarity is high enough."""
        similar = _are_similar(rows, row, self.sets, held, self.similarity)
        return row[similar], held[similar]


def weights_of(words: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weight of each of some words, by `weigh`."""
    return weights[_bucket(words)]


def weigh(seen: np.ndarray, questions: int) -> np.ndarray:
    """The weight of each word by `count_words` over so many questions, float64 (2^22,)."""
    # Words that are in every question still count for something.
    return np.maximum(np.log((questions + 1) / (seen + 0.5)), 0.05)


def ask_the_same(
    one: tuple[np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray],
    weights: np.ndarray,
    similarity: float,
) -> np.ndarray:
    """Whether question i of `one` and question i of `other` nearly ask the same, bool.

    Both are (word numbers one after the other, how many each question has, at most MAX_ASKED).
    Their similarity is at least `similarity`, and their numbers and signs are the same.
    """
    a, b = (_Sets(words, counts, weights, similarity) for words, counts in (one, other))
    same = np.arange(len(one[1]))
    alike = _are_similar(a, same, b, same, similarity)
    exact_a, exact_b = (
        np.bincount(sets.question, is_exact(sets.words), minlength=len(same)) for sets in (a, b)
    )
    common = _common(a, same, b, same, is_exact(b.words))
    return alike & (common == exact_a) & (common == exact_b)


def _are_similar(
    one: _Sets, row: np.ndarray, other: _Sets, held: np.ndarray, similarity: float
) -> np.ndarray:
    """Whether the weighted Jaccard similarity of row[i] of `one`, held[i] of `other` is enough."""
    a, b = one.totals[row], other.totals[held]
    # The larger total bounds the union from below, the smaller the overlap from above.
    similar = np.minimum(a, b) >= similarity * np.maximum(a, b) - 1e-9
    row, held, a, b = row[similar], held[similar], a[similar], b[similar]
    common = _common(one, row, other, held, other.weights)
    similar[similar] = common >= similarity * (a + b - common) - 1e-9
    return similar


def _common(
    one: _Sets, row: np.ndarray, other: _Sets, held: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Sum of `values` (of `other.words`) over the words that row[i] and held[i] have in common."""
    sizes = other.sizes[held]
    pair = np.repeat(np.arange(len(row)), sizes)
    place = np.repeat(other.starts[held], sizes) + _ramp(sizes)
    there = _contains(one, row[pair], other.words[place])
    return np.bincount(pair, values[place] * there, minlength=len(row))


def _ramp(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ..., size - 1 for each size, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _contains(sets: _Sets, question: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Whether question[i] has words[i]: bisection inside each question's sorted words."""
    low, size = sets.starts[question], sets.sizes[question]
    high = low + size
    for _ in range(math.ceil(math.log2(MAX_ASKED + 1)) + 1):
        middle = (low + high) // 2
        smaller = (middle < high) & (sets.words[np.minimum(middle, len(sets.words) - 1)] < words)
        low, high = np.where(smaller, middle + 1, low), np.where(smaller, high, middle)
    inside = low < sets.starts[question] + size
    return inside & (sets.words[np.minimum(low, len(sets.words) - 1)] == words)
