"""MinHash: rows that are nearly another one, by shared windows of 3 words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from liteguard.data.overlap import BLOCK, windows_of_rows

# Shingles of 3 words and 128 permutations: an estimate of the Jaccard similarity J has a standard
# deviation of sqrt(J (1 - J) / 128), 0.035 at 0.8.
SHINGLE_WORDS = 3
PERMUTATIONS = 128
# 32 bands of 4: a pair with J = 0.8 shares a band with probability 1 - (1 - 0.8^4)^32 > 0.9999.
BAND_ROWS = 4


def digests(shingles: np.ndarray, counts: np.ndarray) -> np.ndarray:
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
        for start in range(0, len(later), BLOCK):
            rows = later[start : start + BLOCK]
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
        for start in range(0, len(digests), BLOCK):
            block = digests[np.arange(start, min(start + BLOCK, len(digests)))]
            for band, begin in zip(hashes, own, strict=True):
                columns = block[:, begin : begin + BAND_ROWS]
                band[start : start + len(block)] = windows_of_rows(columns)
        yield from hashes
