"""MinHash: rows that are nearly another one, by shared windows of 3 words.

Of a question with an answer both must be near another row's. Answers to different questions often
share all but a name ("X is inherited in an autosomal recessive pattern, which means ..."), and each
is a fact of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from liteguard.data.overlap import BLOCK, windows_of_rows
from liteguard.data.words import windows

# Shingles of 3 words and 128 permutations: an estimate of the Jaccard similarity J has a standard
# deviation of sqrt(J (1 - J) / 128), 0.035 at 0.8.
SHINGLE_WORDS = 3
PERMUTATIONS = 128
# Pairs have 64 permutations a side, and 0.05 at 0.8.
# 32 bands of 4: a pair with J = 0.8 shares a band with probability 1 - (1 - 0.8^4)^32 > 0.9999.
BAND_ROWS = 4


def digests(
    shingles: np.ndarray, counts: np.ndarray, permutations: int = PERMUTATIONS
) -> np.ndarray:
    """MinHash signatures, uint32 of shape (rows, permutations)."""
    from rensa import RMinHash

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, permutations, 1)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(counts), permutations)


def sign_texts(texts: list[np.ndarray], permutations: int = PERMUTATIONS) -> np.ndarray:
    """Signatures of texts that are arrays of word numbers, uint32 (texts, permutations)."""
    padding = np.zeros(SHINGLE_WORDS - 1, np.uint64)
    # Texts of one or two words have one window, filled up.
    counts = np.array([max(len(text) - SHINGLE_WORDS + 1, 1) for text in texts], np.int64)
    lengths = np.array([len(text) for text in texts], np.int64) + len(padding)
    stream = np.concatenate([part for text in texts for part in (text, padding)] + [padding])
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    shingles = windows(stream, SHINGLE_WORDS)[: len(place)][place < np.repeat(counts, lengths)]
    return digests(shingles, counts, permutations)


def sign_pairs(questions: list[np.ndarray], answers: list[np.ndarray]) -> np.ndarray:
    """Signatures of questions with answers, uint32 (rows, PERMUTATIONS).

    Half of each, and half of every band: rows that share a band are near in both.
    """
    sides = [
        sign_texts(texts, PERMUTATIONS // 2).reshape(len(texts), -1, BAND_ROWS // 2)
        for texts in (questions, answers)
    ]
    return np.concatenate(sides, axis=2).reshape(len(questions), PERMUTATIONS)


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of signatures of texts, row by row."""
    return (one == other).mean(1)


def pair_similarity(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(of the questions, of the answers): `similarity` of signatures by `sign_pairs`."""
    equal = (one == other).reshape(len(one), -1, 2, BAND_ROWS // 2)
    return equal[:, :, 0].mean((1, 2)), equal[:, :, 1].mean((1, 2))


class Signatures(Protocol):
    """MinHash signatures: an array of shape (rows, PERMUTATIONS), or what reads like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...


# Rows, and as many others -> whether each nearly equals its other; bool.
Alike = Callable[[np.ndarray, np.ndarray], np.ndarray]


def near_duplicates(digests: Signatures, alike: Alike) -> np.ndarray:
    """For each row the earlier row it nearly equals, or -1; rows are in order of preference.

    Rows that share a band of their signature with an earlier row are compared with the first such
    row by `alike`.
    """
    count = len(digests)
    numbers = np.arange(count)
    original = np.full(count, -1, np.int64)
    for band in _bands(digests):
        _, first, inverse = np.unique(band, return_index=True, return_inverse=True)
        leader = first[inverse]
        later = np.flatnonzero((leader != numbers) & (original < 0))
        for start in range(0, len(later), BLOCK):
            rows = later[start : start + BLOCK]
            close = alike(rows, leader[rows])
            original[rows[close]] = leader[rows[close]]
    # A leader may have turned out to be a copy itself: compare with what stays, and keep a row
    # that resembles nothing kept. In ascending order, so that an original is settled before it.
    for row in np.flatnonzero(original >= 0):
        root = original[row]
        while original[root] >= 0:
            root = original[root]
        if root != original[row]:
            close = alike(np.array([row]), np.array([root]))[0]
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
        for start in range(0, len(digests), BLOCK):
            block = digests[np.arange(start, min(start + BLOCK, len(digests)))]
            for band, begin in zip(hashes, own, strict=True):
                columns = block[:, begin : begin + BAND_ROWS]
                band[start : start + len(block)] = windows_of_rows(columns)
        yield from hashes
