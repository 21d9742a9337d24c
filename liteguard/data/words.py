"""Words and windows of words as 64-bit numbers: polynomial hashes, a whole chunk at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class _WordNumbers(dict):
    """word -> 64-bit number, the same in every run (Python's own hash of a string is not).

    Odd for words with digits and for signs (`is_exact`), even for others.
    """

    def __missing__(self, word: str) -> int:
        if len(self) > 500_000:  # numbers and misspellings: do not grow without end
            self.clear()
        number = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        exact = any(map(str.isdigit, word)) or not any(map(str.isalnum, word))
        number = self[word] = number | 1 if exact else number & ~1
        return number


_NUMBERS = _WordNumbers()


def word_numbers(words: Sequence[str]) -> np.ndarray:
    """uint64 of shape (len(words),)."""
    return np.fromiter(map(_NUMBERS.__getitem__, words), np.uint64, len(words))


def is_exact(numbers: np.ndarray) -> np.ndarray:
    """Whether words are numbers, names with digits or signs: with another, a text says another
    thing, however much else is the same."""
    return (numbers & np.uint64(1)).astype(bool)


# Words that turn an answer round. A lone "t" is the end of "isn't".
_TURNING = (
    *("no", "not", "yes", "never", "none", "without", "cannot", "t", "\u4e0d", "\u65e0"),
    *("\u6ca1", "\u5426", "nein", "nicht", "kein", "keine", "ja", "sin", "non", "pas"),
)


def fact_numbers(texts: Sequence[np.ndarray]) -> np.ndarray:
    """uint64 of shape (len(texts),): the same for texts with the same numbers, signs and negations.

    In whatever order, and each as often. `texts` are word numbers.
    """
    words = np.concatenate([np.empty(0, np.uint64), *texts])
    told = is_exact(words) | np.isin(words, word_numbers(_TURNING))
    sums = np.cumsum(np.where(told, mix_bits(words), np.uint64(0)), dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), sums])
    ends = np.cumsum([len(text) for text in texts])
    return sums[ends] - sums[ends - [len(text) for text in texts]]


def windows(numbers: np.ndarray, size: int) -> np.ndarray:
    """Hash of every window of `size` numbers, shape (len(numbers) - size + 1,), 64 mixed bits."""
    count = len(numbers) - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(size):
        total *= MULTIPLIER
        total += numbers[offset : offset + count]
    return mix_bits(total)


def mix_bits(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_number(key: str) -> int:
    """64 bits of a `match_key` or `text_key`."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
