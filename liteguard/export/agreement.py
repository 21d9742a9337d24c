"""Whether a bundle answers as the model that it was made from.

Greedy answers are compared token by token. Where they part it may be for a hair: a fluent model
often has two words that it likes as well, and 8-bit weights tip the scale. One such place in
sixteen tokens is no fault, and a model that talks freely has several. So where answers part, the
bundle is asked how much less it likes the merged model's token than its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# First tokens of an answer that are compared.
TOKENS = 16
# Nats by which the merged model's token may be behind the bundle's own choice where they part: it
# is at least 0.37 times as likely. conditions.py allows the same between steps of other lengths.
AS_GOOD = 1.0

# (question, ids of the beginning that both answers have, next id of the merged model's answer or
# None for its end) -> nats behind the likeliest token, for each.
Behind = Callable[[list[tuple[int, list[int], int | None]]], list[float]]


class Agreement(NamedTuple):
    """Of the answers to the questions: how many agree, how many of those are equal so far, tokens
    that they have in common on average, nats of the worst parting."""

    agree: int
    equal: int
    mean: float
    worst: float

    def text(self, count: int) -> str:
        """The proof's line, of `count` answers."""
        found = f"{self.agree} of {count}, {self.equal} equal; mean {self.mean:.1f} tokens"
        return f"{found}; {self.worst:.2f} nats" if self.equal < count else found


def measure(
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    tokenize: Callable[[str], list[int]],
    behind: Behind,
) -> Agreement:
    """pairs: (the bundle's answer, the merged model's), {"text", ...}, question by question."""
    ids = [(tokenize(ours["text"]), tokenize(theirs["text"])) for ours, theirs in pairs]
    common = [_common(*both) for both in ids]
    parted = [
        (number, theirs[:same], theirs[same] if same < len(theirs) else None)
        for number, ((_, theirs), same) in enumerate(zip(ids, common, strict=True))
        if same < min(TOKENS, max(map(len, ids[number])))
    ]
    gaps = behind(parted) if parted else []
    equal = len(ids) - len(parted)
    return Agreement(
        equal + sum(gap <= AS_GOOD for gap in gaps),
        equal,
        sum(common) / max(1, len(common)),
        max(gaps, default=0.0),
    )


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    same = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(same, min(len(one), len(other)))
