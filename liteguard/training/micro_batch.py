"""Which rows each optimizer step and each micro-batch of a run holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from liteguard.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def repeat_order(rows: int, seed: int, shuffle_first: bool) -> Iterator[int]:
    """Row numbers without end: every pass over the rows in another order.

    The first pass keeps the rows' own order unless `shuffle_first`; preparation has mixed them.
    """
    import numpy as np

    number = 0
    while True:
        order = np.arange(rows)
        if number or shuffle_first:
            order = np.random.default_rng([seed, number]).permutation(rows)
        yield from order.tolist()
        number += 1


def steps_of_rows(order: Iterator[int], rows_per_step: int, steps: int) -> list[list[int]]:
    """The rows of each optimizer step, `rows_per_step` at a time."""
    return [[next(order) for _ in range(rows_per_step)] for _ in range(steps)]


def steps_of_tokens(
    order: Iterator[int], lengths: np.ndarray, budget: int, steps: int
) -> list[list[int]]:
    """The rows of each optimizer step, as many as fit `budget` tokens (no row is cut)."""
    found: list[list[int]] = []
    waiting = next(order)
    for _ in range(steps):
        step, total = [waiting], int(lengths[waiting])
        while total + lengths[waiting := next(order)] <= budget:
            step.append(waiting)
            total += int(lengths[waiting])
        found.append(step)
    return found


def steps_of_groups(
    order: Iterator[int], lengths: np.ndarray, capacity: int, groups: int, steps: int
) -> list[list[int]]:
    """The rows of each optimizer step, as many as `spread` fits into `groups` of `capacity` tokens.

    A step has a row for every group at least, because no row is longer than `capacity`.
    """
    found: list[list[int]] = []
    waiting = next(order)
    for _ in range(steps):
        step: list[int] = []
        total = 0
        while True:
            step, total = [*step, waiting], total + int(lengths[waiting])
            waiting = next(order)
            if total + lengths[waiting] > groups * capacity:
                break
            # In the first half they always fit: a row that joins others is no longer than any of
            # them, so neither it nor the shortest group is longer than half of `capacity`.
            if total + lengths[waiting] > groups * capacity // 2:
                sizes = [int(lengths[row]) for row in (*step, waiting)]
                if max(sum(sizes[i] for i in g) for g in spread(sizes, groups)) > capacity:
                    break
        found.append(step)
    return found


def spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices of `lengths` spread over `count` groups of about equal sums.

    Longest first, each into the group that is shortest so far (Graham 1969: at most 4/3 of the best
    possible maximum). Deterministic; a group keeps its rows in order of falling length.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        shortest = totals.index(min(totals))
        groups[shortest].append(index)
        totals[shortest] += lengths[index]
    return groups


def micro_batches(
    steps: list[list[int]], lengths: np.ndarray, capacity: int, multiple: int = 1
) -> tuple[list[list[int]], int]:
    """(row numbers of each micro-batch, micro-batches per optimizer step).

    Every step gets the same number, because the trainer accumulates a fixed one: the smallest
    multiple of `multiple` (the number of processes) with which no micro-batch of any step exceeds
    `capacity` tokens.

    Raises UserError when a step has fewer rows than processes.
    """
    smallest = min(map(len, steps))
    count = multiple
    while True:
        if count > smallest:
            raise UserError(
                f"An optimizer step of {smallest} rows cannot be spread over {count} micro-batches "
                f"({multiple} process{'es' if multiple > 1 else ''}, at most {capacity:,} tokens "
                "each). Raise batch_size or gradient_accumulation, or use fewer processes."
            )
        grouped = []
        for step in steps:
            sizes = [int(lengths[row]) for row in step]
            groups = spread(sizes, count)
            if max(sum(sizes[i] for i in group) for group in groups) > capacity:
                break
            grouped += [[step[i] for i in group] for group in groups]
        else:
            return grouped, count
        count += multiple


def padded_micro_batches(
    steps: list[list[int]], lengths: np.ndarray, batch_size: int, multiple: int = 1
) -> tuple[list[list[int]], int]:
    """As `micro_batches`, for padded rows: `batch_size` each, those of similar length together.

    For models whose attention cannot keep packed examples apart (`packing: false`).
    """
    import numpy as np

    count = multiple * -(-max(map(len, steps)) // (batch_size * multiple))
    found: list[list[int]] = []
    for step in steps:
        if len(step) < count:
            raise UserError(
                f"An optimizer step of {len(step)} rows cannot be spread over {count} "
                f"micro-batches ({multiple} processes). Raise batch_size or "
                "gradient_accumulation, or use fewer processes."
            )
        ordered = sorted(step, key=lambda row: (lengths[row], row))
        found += [part.tolist() for part in np.array_split(ordered, count)]
    return found, count


def padded_groups(rows: list[int], lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows in the fewest micro-batches whose longest row times their number is within `capacity`
    tokens, those of similar length together; a row is never longer than that."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= capacity:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def padded_micro_batches_of_texts(
    steps: list[list[int]], lengths: np.ndarray, capacity: int, multiple: int = 1
) -> tuple[list[list[int]], int]:
    """As `micro_batches`, for padded texts, of which every step holds another number: within
    `capacity` tokens, padding counted. Raises UserError when a step has too few for that."""
    plans = [padded_groups(step, lengths, capacity) for step in steps]
    count = multiple * -(-max(map(len, plans)) // multiple)
    if count > (fewest := min(map(len, steps))):
        raise UserError(
            f"An optimizer step of {fewest} texts cannot be spread over {count} micro-batches of "
            f"{capacity:,} tokens with padding. Raise batch_size, or use fewer processes."
        )
    return [group for plan in plans for group in _halved(plan, count)], count


def padded_steps_of_groups(
    order: Iterator[int], lengths: np.ndarray, capacity: int, groups: int, steps: int
) -> list[list[int]]:
    """As `steps_of_groups`, for padded texts: the micro-batches of all steps, `groups` a step."""
    found: list[list[int]] = []
    waiting = next(order)
    for _ in range(steps):
        step = [waiting]
        planned = [step]
        while True:
            waiting = next(order)
            more = padded_groups([*step, waiting], lengths, capacity)
            if len(more) > groups:  # and `step` has as many rows as groups, or more
                break
            step, planned = [*step, waiting], more
        found += _halved(planned, groups)
    return found


def _halved(groups: list[list[int]], count: int) -> list[list[int]]:
    """`count` groups: those with most rows are halved until there are so many."""
    found = list(groups)
    while len(found) < count:
        largest = max(range(len(found)), key=lambda place: len(found[place]))
        half = len(found[largest]) // 2
        found[largest : largest + 1] = [found[largest][:half], found[largest][half:]]
    return found


# Power of an answer's length by which its tokens' losses are divided. "square" is the square
# averaging of InternVL 2.5 (Chen et al. 2024, arXiv:2412.05271).
LOSS_REDUCTIONS = {"token": 0.0, "square": 0.5, "sample": 1.0}


def row_weights(steps: list[list[int]], supervised: np.ndarray, reduction: str) -> list[np.ndarray]:
    """What the loss of each row's tokens is multiplied with, for every optimizer step.

    A trainer divides the sum over a step's tokens by their number N. With n tokens in a row and the
    weights N n^-p / sum(n^(1-p)) that becomes the mean over tokens (p = 0), over rows (p = 1) or
    between (p = 1/2): a row counts n^(1-p) times. supervised: (rows,), tokens that are targets.
    """
    import numpy as np

    power = LOSS_REDUCTIONS[reduction]
    found = []
    for step in steps:
        counts = np.maximum(supervised[step], 1).astype(float)
        found.append(supervised[step].sum() * counts**-power / (counts ** (1 - power)).sum())
    return found
