"""All sources of a part together: copies and overlaps between rows and splits, and the order."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from liteguard.data import cleaning, near_questions
from liteguard.data.cleaning import ARRAYS, FIXED, NAMELESS, OWN, RAGGED
from liteguard.data.near_rows import near_rows
from liteguard.data.overlap import (
    OVERLAP_WORDS,
    OverlapIndex,
    distinctive,
    ngram_counts,
    row_overlaps,
)
from liteguard.data.shards import Lines, Shard
from liteguard.errors import UserError
from liteguard.rows import SPLITS
from liteguard.text import unit

OWN_TEST = "the test split"
# Losing more of a source than this to overlaps is said aloud.
MUCH_OVERLAP = 0.2


@dataclass
class Part:
    """All sources of one part: every array joined, `shard` and `row` say where a row is."""

    name: str
    shards: list[Shard]
    arrays: dict[str, np.ndarray]
    shard: np.ndarray
    row: np.ndarray
    # "" while a row is kept, else why it was dropped.
    reason: np.ndarray
    # Position in `names` of the entity that was found in a row that names none, or -1.
    guessed: np.ndarray
    names: list[str] = field(default_factory=list)

    @classmethod
    def join(cls, name: str, shards: list[Shard]) -> Part:
        """Everything but the signatures, word windows and questions, which are large."""
        wanted = [n for n in ARRAYS if n not in ("digest", "bytes", *RAGGED)]
        arrays = {n: np.concatenate([s.array(n) for s in shards]) for n in wanted}
        sizes = [s.info["kept"] for s in shards]
        shard = np.repeat(np.arange(len(shards), dtype=np.int32), sizes)
        row = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
        reason = np.full(len(row), "", dtype=object)
        return cls(name, shards, arrays, shard, row, reason, np.full(len(row), -1, np.int32))

    @property
    def kept(self) -> np.ndarray:
        """Positions of the rows that no reason was found against."""
        return np.flatnonzero(self.reason == "")

    def of_shard(self, number: int) -> slice:
        """Where a shard's rows are in the joined arrays."""
        start = sum(shard.info["kept"] for shard in self.shards[:number])
        return slice(start, start + self.shards[number].info["kept"])


def turn_rows(part: Part, number: int, openings: bool) -> np.ndarray:
    """The row of its shard that each question of the shard's conversations is from.

    `openings`: as in `turn_keys`, where the opening comes first.
    """
    turns = part.arrays["turns"][part.of_shard(number)].astype(np.int64)
    return np.repeat(np.arange(len(turns)), turns + (openings * (turns > 0)))


def drop_duplicates(part: Part, threshold: float | None, several_answers: str = "all") -> None:
    """Mark exact and near duplicates; what is most held out is kept, then what comes first.

    Rows are duplicates when question and answer are. Other answers to a question stay, in the most
    held-out split that one of them is in, as many as `several_answers` says.
    """
    # SPLITS is ordered from the most held-out one.
    preference = np.lexsort((part.row, part.shard, part.arrays["split"]))
    part.reason[preference[~_is_first(part.arrays["exact"][preference])]] = "duplicate"
    if part.name != "domain":
        _drop_answers(part, preference[part.reason[preference] == ""], several_answers)
    if threshold is None:
        return
    remaining = preference[part.reason[preference] == ""]
    near = near_rows(part, remaining, threshold)
    varied = np.array([shard.source.keep_near_duplicates for shard in part.shards])
    near &= ~varied[part.shard[remaining]]
    part.reason[remaining[near]] = "near duplicate"


def _is_first(values: np.ndarray) -> np.ndarray:
    """Whether nothing before a value is equal to it, bool."""
    _, first = np.unique(values, axis=0, return_index=True)
    result = np.zeros(len(values), bool)
    result[first] = True
    return result


def _drop_answers(part: Part, rows: np.ndarray, several_answers: str) -> None:
    """Mark rows whose question another row asks: in a more held-out split, or answered better."""
    questions, split = part.arrays["question"][rows], part.arrays["split"][rows]
    _, first, inverse = np.unique(questions, return_index=True, return_inverse=True)
    held_out = split[first][inverse]
    for number, name in enumerate(SPLITS):
        other = (held_out == number) & (split != number)
        part.reason[rows[other]] = f"its question is in the {name} split"
    if several_answers == "all":
        return
    rows = rows[part.reason[rows] == ""]
    if several_answers == "longest":
        answer_words = part.arrays["words"][rows] - part.arrays["question_words"][rows]
        rows = rows[np.argsort(-answer_words, kind="stable")]
    further = ~_is_first(part.arrays["question"][rows])
    part.reason[rows[further]] = f"not the {several_answers} answer to its question"


def _first_of_each(values: np.ndarray, among: np.ndarray, seen: set[int]) -> np.ndarray:
    """Where a value stands for the first time `among` rows, bool of shape (rows,).

    `seen` holds the values of earlier rows, and then those of these, too. A question with five
    answers is one text: counted five times its windows would pass for a set phrase.
    """
    result = np.zeros(len(values), bool)
    places = np.flatnonzero(among)
    unique, first = np.unique(values[places], return_index=True)
    new = [value not in seen for value in unique.tolist()]
    result[places[first[new]]] = True
    seen.update(unique.tolist())
    return result


def drop_overlaps(
    parts: list[Part], index: OverlapIndex | None, similarity: float | None = None
) -> None:
    """Mark rows that share 13 words or a whole question with an evaluation set or a test row.

    Evaluation sets were looked up while cleaning. Test rows: the questions of all parts against
    every text; domain texts of the test split against domain texts only, because answers about a
    disease are derived from the texts about it (the split by entity keeps those apart).
    `similarity`: see `drop_near_questions`.
    """
    test = SPLITS.index("test")
    for part in parts:
        if index:
            for number, name in enumerate(index.names, 1):
                hit = part.kept[part.arrays["overlap"][part.kept] == number]
                part.reason[hit] = f"overlaps {name}"
    asked: list[np.ndarray] = []
    own: list[np.ndarray] = []
    questions: list[np.ndarray] = []
    for part in parts:
        domain = part.name == "domain"
        picked: list[np.ndarray] = []
        seen: set[int] = set()
        for number, shard in enumerate(part.shards):
            rows = part.of_shard(number)
            held_out = (part.arrays["split"][rows] == test) & (part.reason[rows] == "")
            counts = ngram_counts(part.arrays["words"][rows])
            starts = np.cumsum(counts) - counts
            looked_for = held_out
            if not domain:
                # Windows of the question come first.
                counts = ngram_counts(part.arrays["question_words"][rows])
                asked_here = part.arrays["question"][rows]
                questions.append(asked_here[held_out])
                looked_for = _first_of_each(asked_here, held_out, seen)
                # Of a conversation its opening, too: what follows may be asked anywhere ("Why?").
                of_turn = turn_rows(part, number, openings=True)
                first = np.diff(of_turn, prepend=-1) > 0
                opened = shard.array("turn_keys")[first & held_out[of_turn]]
                questions.append(opened)
            ngrams = shard.array("ngrams")
            spans = zip(starts[looked_for], counts[looked_for], strict=True)
            picked += [ngrams[start : start + count] for start, count in spans if count]
        # Set phrases of many test rows are found per part, where they are common.
        found, _ = distinctive(picked, OVERLAP_WORDS)
        (own if domain else asked).append(found)
    whole = np.concatenate([np.empty(0, np.uint64), *questions])
    for part in parts:
        known = np.unique(np.concatenate([*asked, *(own if part.name == "domain" else [])]))
        size = OVERLAP_WORDS
        names = np.zeros(len(known), np.uint8)
        lookup = OverlapIndex([OWN_TEST], {f"windows{size}": known, f"names{size}": names})
        for number, shard in enumerate(part.shards):
            rows = part.of_shard(number)
            counts = ngram_counts(part.arrays["words"][rows])
            overlap = row_overlaps(lookup, shard.array("ngrams"), counts)
            overlap |= np.isin(part.arrays["question"][rows], whole)
            asked_again = np.isin(shard.array("turn_keys"), whole)
            overlap[turn_rows(part, number, openings=True)[asked_again]] = True
            overlap &= (part.arrays["split"][rows] != test) & (part.reason[rows] == "")
            part.reason[rows][overlap] = f"overlaps {OWN_TEST}"
    drop_near_questions(parts, index, similarity)
    for part in parts:
        for number, shard in enumerate(part.shards):
            reasons = part.reason[part.of_shard(number)]
            lost = sum(reason.startswith(("overlaps", "resembles")) for reason in reasons)
            if lost > MUCH_OVERLAP * len(reasons):
                print(
                    f"  {part.name}: {lost:,} of {len(reasons):,} rows of {shard.source.dataset} "
                    "share 13 words with held-out rows, or nearly ask their questions. Look at "
                    "them in dropped.jsonl: a phrase that all rows have (a lead-in, a licence "
                    "line) should be removed."
                )


def drop_near_questions(
    parts: list[Part], index: OverlapIndex | None, similarity: float | None
) -> None:
    """Mark rows whose question is nearly one of an evaluation set or, outside it, of a test row."""
    if similarity is None:
        return
    test = SPLITS.index("test")
    names = [*(index.names if index else []), OWN_TEST]
    # A text about a disease has the words of "What is ...?" and is no question: no domain texts.
    asking = [part for part in parts if part.name != "domain"]
    sources = [(part, number) for part in asking for number in range(len(part.shards))]
    evaluation = [np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64)]
    if index:
        evaluation = [index.arrays[k] for k in ("asked", "asked_words", "asked_names")]
    # (word numbers, words of each question, position of its set in `names`)
    held = [evaluation]
    for part, number in sources:
        rows = part.of_shard(number)
        sizes = near_questions.asked_counts(part.arrays["question_words"][rows])
        held_out = (part.arrays["split"][rows] == test) & (part.reason[rows] == "")
        words = part.shards[number].array("asked")[np.repeat(held_out, sizes)]
        held.append([words, sizes[held_out], np.full(held_out.sum(), len(names) - 1)])
    everything = [part.shards[number].array("asked") for part, number in sources]
    words, counts, sets = (np.concatenate(column) for column in zip(*held, strict=True))
    known = near_questions.HeldOut(
        words,
        counts,
        sets,
        seen=near_questions.count_words([evaluation[0], *everything]),
        questions=len(evaluation[1]) + sum(len(part.row) for part in asking),
        similarity=similarity,
    )
    for (part, number), asked in zip(sources, everything, strict=True):
        rows = part.of_shard(number)
        sizes = near_questions.asked_counts(part.arrays["question_words"][rows])
        ends = np.cumsum(sizes)
        reason, training = part.reason[rows], part.arrays["split"][rows] != test
        in_turns = _near_turns(part, number, known)
        for start in range(0, len(sizes), near_questions.ROWS):
            block = slice(start, start + near_questions.ROWS)
            first, last = ends[start] - sizes[start], ends[block][-1]
            left = reason[block] == ""
            words = asked[first:last][np.repeat(left, sizes[block])]
            found = np.zeros(len(left), np.int64)
            found[left] = known.find(words, sizes[block][left])
            found = np.where(found > 0, found, in_turns[block])
            # A test row may resemble another test row, but no evaluation set.
            wanted = left & (found > 0) & (training[block] | (found < len(names)))
            for row in np.flatnonzero(wanted):
                reason[start + row] = f"resembles a question of {names[found[row] - 1]}"


def _near_turns(part: Part, number: int, known: near_questions.HeldOut) -> np.ndarray:
    """`HeldOut.find` for every row of a shard, by the single questions of conversations."""
    of_turn = turn_rows(part, number, openings=False)
    words, sizes = (part.shards[number].array(name) for name in ("turn_asked", "turn_words"))
    sizes = sizes.astype(np.int64)
    ends = np.cumsum(sizes)
    result = np.zeros(part.shards[number].info["kept"], np.int64)
    for start in range(0, len(sizes), near_questions.ROWS):
        block = slice(start, start + near_questions.ROWS)
        own = words[ends[start] - sizes[start] : ends[block][-1]]
        found = known.find(own, sizes[block])
        result[of_turn[block][found > 0]] = found[found > 0]
    return result


def mix(part: Part, rows: np.ndarray) -> np.ndarray:
    """`rows` (positions, shuffled by content) in the order in which they are written.

    Interleaved so that every beginning holds about the sources' weights: training reads from the
    front, so a short run sees the wanted mixture and a long one everything. Which source comes next
    is drawn at random (arrivals of Poisson processes whose rates are the weights). Rows of a source
    keep their order; without weights the order stays as it is.
    """
    weights = [shard.source.weight or 0.0 for shard in part.shards]
    if not all(weights):
        return rows
    due = np.empty(len(rows))
    sources = part.shard[rows]
    for number, weight in enumerate(weights):
        own = np.flatnonzero(sources == number)
        gaps = [-math.log(1 - unit(f"mix\x1f{number}\x1f{n}")) / weight for n in range(len(own))]
        due[own] = np.cumsum(gaps)
    return rows[np.argsort(due, kind="stable")]


TIERS = ("unseen", "seen", "held-out wording")


def trained_entities(part: Part) -> np.ndarray:
    """Sorted entities of the rows of a part's train split."""
    train = (part.arrays["split"] == SPLITS.index("train")) & (part.reason == "")
    return np.unique(part.arrays["entity"][train])


def tiers(part: Part, rows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The tier of each held-out row as a position in TIERS, or -1 for one without: int8.

    "seen" where the entity is among `seen`, the entities of rows of any part that are trained on,
    else "unseen". By what is in the data, not by the draw: an entity drawn for tier 1 whose texts
    were dropped, or that has none, is nowhere in training, and one that was drawn to be held out is
    trained on where another source's own train split is about it. Of rows that name no entity
    nobody knows what they are about: they are held out by their wording only. Texts, and data of
    this project that bring their split (the safety catalogue), have no tier.
    """
    if part.name == "domain":
        return np.full(len(rows), -1, np.int8)
    found = np.isin(part.arrays["entity"][rows], seen).astype(np.int8)
    naming = part.arrays["naming"][rows] % OWN
    found[naming == NAMELESS] = TIERS.index("held-out wording")
    return np.where(naming == FIXED, -1, found)


def write_part(part: Part, work: Path, dropped: BinaryIO, seen: np.ndarray) -> dict[str, Any]:
    """Write <part>/<split>.jsonl and the lines of dropped.jsonl; returns counts by file name.

    Rows of the test and validation splits get their `tier`, see `tiers`.
    """
    counts: dict[str, Any] = {}
    (work / part.name).mkdir(exist_ok=True)
    readers = [Lines(shard) for shard in part.shards]
    # One shuffle by content: neighbours in a source do not end up in the same batch.
    shuffled = np.lexsort((part.arrays["exact"][:, 0], part.arrays["order"]))
    shuffled = shuffled[part.reason[shuffled] == ""]
    for number, split in enumerate(SPLITS):
        rows = mix(part, shuffled[part.arrays["split"][shuffled] == number])
        name = f"{part.name}/{split}.jsonl"
        own = tiers(part, rows, seen) if split != "train" else np.full(len(rows), -1)
        with (work / name).open("wb") as file:
            for row, tier in zip(rows, own.tolist(), strict=True):
                line = readers[part.shard[row]][part.row[row]]
                if part.guessed[row] >= 0:
                    content = json.loads(line) | {"entity": part.names[part.guessed[row]]}
                    line = json.dumps(content, ensure_ascii=False).encode() + b"\n"
                if tier >= 0:
                    line = line[:-2] + f', "tier": "{TIERS[tier]}"}}\n'.encode()
                file.write(line)
        counts[name] = {
            "rows": len(rows),
            "entities": len(np.unique(part.arrays["entity"][rows])),
            "words": int(part.arrays["words"][rows].sum()),
        }
        if conversations := int((part.arrays["turns"][rows] > 0).sum()):
            counts[name]["conversations"] = conversations
        if (own >= 0).any():
            numbers = [int((own == tier).sum()) for tier in range(len(TIERS))]
            counts[name]["tiers"] = dict(zip(TIERS, numbers, strict=True))
    _check_splits(part, counts)
    for number, shard in enumerate(part.shards):
        with (shard.directory / "dropped.jsonl").open("rb") as file:
            shutil.copyfileobj(file, dropped)
        for position in np.flatnonzero((part.shard == number) & (part.reason != "")):
            row = json.loads(readers[number][part.row[position]])
            reason = part.reason[position]
            dropped.write(cleaning.dropped_line(part.name, shard.source.dataset, reason, row))
    return counts


# Reason of a drop -> the setting that it comes from.
_SETTINGS = {
    "too short": "min_characters of texts, answer_min_characters of answers",
    "too long": "max_characters",
    "near duplicate": "near_duplicate_threshold",
    "not the": "several_answers",
    "resembles": "question_similarity",
    "overlaps": "decontaminate",
}


def _check_splits(part: Part, counts: dict[str, Any]) -> None:
    """Raise UserError, with what was dropped and by which setting, when a split has no row."""
    rows = {split: counts[f"{part.name}/{split}.jsonl"]["rows"] for split in SPLITS}
    if all(rows.values()):
        return
    lost: Counter[str] = Counter(part.reason[part.reason != ""])
    for shard in part.shards:
        lost.update(shard.info["dropped"])
    why = ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common())
    found: list[str] = []
    for reason, _ in lost.most_common():
        found += [name for start, name in _SETTINGS.items() if reason.startswith(start)]
        # "not en" is a language, "not UTF-8" is not.
        found += ["language"] if re.fullmatch("not [a-z]{2,3}", reason) else []
    by = "; ".join(f"data.{name}" for name in dict.fromkeys(found))
    raise UserError(
        f"data.{part.name}: not enough usable rows for three splits "
        f"({', '.join(f'{split}: {count}' for split, count in rows.items())}; dropped: "
        f"{why or 'none'}).\n"
        + (f"What is dropped is set by {by}.\n" if by else "")
        + "Check the sources, or raise data.validation_share and data.test_share."
    )
