"""Preference pairs: the project's safety texts, and answers that go round in circles.

Rows name their `split` themselves where whole areas and wordings are held out."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from liteguard.embedded.diseases import uniprot_questions
from liteguard.rows import SPLITS, Row
from liteguard.text import pick, sentences, unit

if TYPE_CHECKING:
    from liteguard.config import SourceSection

# Share of harmful requests whose rejected answer is a helpful answer to another request. With
# compliant openings alone ("Sure, ...") DPO is satisfied once those are unlikely, and the other
# half of the pairs, which reject refusals, then makes refusing unlikely for every prompt. Against
# a helpful answer it can only win by telling the requests apart.
MISMATCHED_SHARE = 0.75


def safety_catalogue(source: SourceSection | None, cache_dir: Path) -> Iterator[Row]:
    """Harmful requests (refuse, point to care) and ordinary or borderline ones (answer)."""
    for row in _catalogue():
        yield dict(row)


@functools.cache
def _catalogue() -> tuple[Row, ...]:
    """The rows of the catalogue: three sources are read from them, and they take seconds."""
    from liteguard.embedded.catalogue import preference_pairs

    pairs = preference_pairs()
    helpful = {
        split: _OfLength({p.chosen for p in pairs if p.kind != "harmful" and p.split == split})
        for split in SPLITS
    }
    rows = []
    for pair in pairs:
        rejected = pair.rejected
        if pair.kind == "harmful" and unit(f"mismatched{pair.prompt}") < MISMATCHED_SHARE:
            rejected = helpful[pair.split].pick(pair.chosen, pair.prompt)
        rows.append(
            {
                "prompt": pair.prompt,
                "chosen": pair.chosen,
                "rejected": rejected,
                "kind": pair.kind,
                "area": pair.area,
                "entity": f"{pair.kind}/{pair.area}/{pair.wording}",
                "split": pair.split,
            }
        )
    return tuple(rows)


class _OfLength:
    """Picks texts about as long as others; later picks make up for one too long or short."""

    CHOICE = 12  # texts of nearly one length to pick from, so that none is picked all the time
    LARGEST_DEBT = 5  # words

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted(texts, key=lambda text: (len(text.split()), text))
        self._words = [len(text.split()) for text in self._texts]
        self._debt = 0  # words that the picked texts are longer so far

    def pick(self, other: str, key: str) -> str:
        """One of the texts, drawn by `key` from those nearest to the length of `other`."""
        words = len(other.split())
        wanted = words - self._debt
        place = bisect.bisect_left(self._words, wanted)
        around = range(max(place - self.CHOICE, 0), min(place + self.CHOICE, len(self._words)))
        nearest = sorted(around, key=lambda n: (abs(self._words[n] - wanted), n))[: self.CHOICE]
        picked = pick([self._texts[n] for n in nearest], "rejected", key)
        debt = self._debt + len(picked.split()) - words
        self._debt = max(-self.LARGEST_DEBT, min(self.LARGEST_DEBT, debt))
        return picked


def _catalogue_answers(kind: str, kinds: tuple[str, ...], cache_dir: Path) -> Iterator[Row]:
    """The catalogue's chosen answers to requests of some kinds, as instruction rows of `kind`."""
    for row in safety_catalogue(None, cache_dir):
        if row["kind"] in kinds:
            yield {
                "prompt": row["prompt"],
                "completion": row["chosen"],
                "kind": kind,
                "entity": row["entity"],
                "split": row["split"],
            }


def everyday_questions(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """The catalogue's ordinary and borderline questions, answered."""
    return _catalogue_answers("everyday", ("ordinary", "borderline"), cache_dir)


def refusals(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """The catalogue's harmful requests, refused with a safe way on."""
    return _catalogue_answers("refusal", ("harmful",), cache_dir)


_UNWARRANTED_REFUSALS = [
    "I'm sorry, but I can't help with questions about {name}. Please ask a medical professional.",
    "I can't answer that. Questions about {name} are outside what I am able to discuss here.",
    "I won't give information about {name}. It would not be right for me to talk about it.",
    "I'm not able to help with this. Anything about {name} has to stay with a doctor.",
]

# Appended to an unwarranted refusal where that brings its length closer to the chosen answer's:
# otherwise the longer answer would be the right one in most of these pairs.
_REFUSAL_TAILS = [
    "This is a subject for a doctor.",
    "I have to leave it at that and cannot say what it is, how it shows or what follows from it.",
    "Please do not ask me about it again; there is nothing that I am able to add.",
]


def _refusal_like(answer: str, name: str, prompt: str) -> str:
    """An unwarranted refusal of as many words as `answer`, or as nearly as can be."""
    texts = [
        " ".join([refusal.format(name=name), *tails])
        for refusal in _UNWARRANTED_REFUSALS
        for count in range(len(_REFUSAL_TAILS) + 1)
        for tails in itertools.permutations(_REFUSAL_TAILS, count)
    ]
    wanted = len(answer.split())
    nearest = min(abs(len(text.split()) - wanted) for text in texts)
    return pick([t for t in texts if abs(len(t.split()) - wanted) == nearest], prompt)


# A beginning to go on from, and at least two rounds of up to four words.
_CIRCLE_WORDS = 10
_CIRCLE_SHARE = 0.9


def _circling(answer: str, prompt: str) -> str:
    """The beginning of `answer`, going round in circles over its last one to four words.

    As many words as `answer`. Greedy decoding of a small model ends in such loops ("non-syndromic,
    non-syndromic, ..."); pseudo-repetitions of training texts as the answers to avoid are how Xu et
    al. (2022, "Learning to Break the Loop", arXiv:2206.02369) teach a model to leave them.
    """
    words = answer.split()
    size = 1 + int(4 * unit(f"size {prompt}"))
    keep = min(len(words) - 2 * size, size + 4 + int(len(words) / 4 * unit(f"keep {prompt}")))
    head = words[: max(keep, size)]
    if unit(f"comma {prompt}") < 0.6:
        head[-1] = head[-1].rstrip(".,;:") + ","
    circle = itertools.cycle(head[-size:])
    text = " ".join([*head, *itertools.islice(circle, len(words) - len(head))])
    return text.rstrip(".,;:") + "."


def disease_preferences(source: SourceSection, cache_dir: Path) -> Iterator[Row]:
    """Ordinary questions about diseases: the answer is chosen. Rejected is an answer that goes
    round in circles, or for short answers and a tenth of the others an unwarranted refusal."""
    for row in uniprot_questions(source, cache_dir):
        if row["kind"] in ("definition", "features"):
            name = row["completion"].split(" is ")[0].split(":")[0]
            chosen = sentences(row["completion"], 25)
            if len(chosen.split()) >= _CIRCLE_WORDS and unit(row["prompt"]) < _CIRCLE_SHARE:
                rejected = _circling(chosen, row["prompt"])
            else:
                rejected = _refusal_like(chosen, name, row["prompt"])
            yield {
                "prompt": row["prompt"],
                "chosen": chosen,
                "rejected": rejected,
                "kind": "ordinary",
                "area": "disease",
                "entity": row["entity"],
            }
