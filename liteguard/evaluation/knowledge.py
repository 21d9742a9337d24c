"""Multiple choice by log-likelihood on public medical question sets, with what guessing would give.

A small model does not answer with a letter reliably, so its choice is the option that it finds
likeliest, by conventions of EleutherAI's lm-evaluation-harness (lm-eval 0.4):

    medqa, medmcqa, mmlu_clinical   as its ARC tasks: " option" after "Question: ...\\nAnswer:", by
                                    log-likelihood per UTF-8 byte of the option (its `acc_bytes`;
                                    `acc_norm` divides by characters, which are bytes in ASCII)
    pubmedqa                        as its task `pubmedqa`: " yes", " no" or " maybe" after
                                    "Abstract: ...\\nQuestion: ...\\nAnswer:", by log-likelihood
                                    (its `acc`)

lm-eval's own medqa, medmcqa and mmlu tasks score letters: their numbers are others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liteguard.evaluation import metrics
from liteguard.registry import BENCHMARKS, MULTIPLE_CHOICE
from liteguard.text import match_key, unit


def rows(cache_dir: Path, limit: int | None) -> list[dict[str, Any]]:
    """`limit` questions of every set (None: all), drawn by a hash of where they stand in the wheel.

    The same ones for every model, and those of a smaller limit are among those of a larger. A row
    that cannot be read is among them like any other, with the reason under "unparsed".
    """
    found = []
    for name in MULTIPLE_CHOICE if limit is None or limit else ():
        read = BENCHMARKS[name][2]
        questions, failures = read(name, cache_dir)
        own = [_row(question) for question in questions]
        own += [
            {"set": name, "identifier": place, "prompt": "", "options": [], "unparsed": reason}
            for place, reason in failures
        ]
        own.sort(key=lambda row: unit(f"knowledge\x1f{name}\x1f{row['identifier']}"))
        found += own[:limit]
    return found


def _row(question: Any) -> dict[str, Any]:
    """A row of an `embedded.public_benchmarks.Question`."""
    return {
        "set": question.benchmark,
        "identifier": question.identifier,
        "prompt": question.question,
        "context": question.context,
        "options": list(question.options),
        "answer": question.answer,
    }


def pairs(found: Sequence[dict[str, Any]], bos: str = "") -> list[tuple[str, str]]:
    """(context, target) of every option of every row, in order; contexts begin with `bos`."""
    return [(bos + _asked(row), f" {option}") for row in found for option in row["options"]]


def _asked(row: dict[str, Any]) -> str:
    abstract = f"Abstract: {row['context']}\n" if row["context"] else ""
    return f"{abstract}Question: {row['prompt']}\nAnswer:"


def choices(found: Sequence[dict[str, Any]], scores: Sequence[float | None]) -> list[int | None]:
    """The option that is chosen in every row, None where there are no options to choose from.

    `scores`: log-likelihoods of `pairs(found)`. Of equal options the first is chosen, and none
    where one of them was too long to be scored (None).
    """
    chosen: list[int | None] = []
    place = 0
    for row in found:
        options = row["options"]
        given = scores[place : place + len(options)]
        own = [score for score in given if score is not None]
        place += len(options)
        if len(own) < len(given):
            chosen.append(None)
            continue
        if row["set"] != "pubmedqa":
            own = [score / len(option.encode()) for score, option in zip(own, options, strict=True)]
        chosen.append(own.index(max(own)) if own else None)
    return chosen


def overlap_choice(row: dict[str, Any]) -> float:
    """Chance of being right when choosing the option with most words in common with the question.

    The share of an option's words that stand in the question or its abstract; of equally good
    options one is drawn. 0 for a row that could not be read.
    """
    given = set(match_key(f"{row.get('context', '')} {row['prompt']}").split())
    shares = []
    for option in row["options"]:
        words = match_key(option).split()
        shares.append(sum(word in given for word in words) / max(1, len(words)))
    best = [index for index, share in enumerate(shares) if share == max(shares)]
    return (row.get("answer") in best) / len(best) if best else 0.0


def summarise(
    found: Sequence[dict[str, Any]], scores: Sequence[float | None]
) -> dict[str, dict[str, Any]]:
    """Per set: accuracy, its 95 % interval (Wilson), and what it is to be compared with.

    Returns {set: {"accuracy", "interval", "n", "chance", "majority", "overlap", "unparsed",
    "repeated_options", "choices"}}. Rows that could not be read ("unparsed") count as wrong, in n
    as well. "majority": always the option (yes, no, maybe or the place) that is right most often.
    "repeated_options": questions that offer the right answer twice; the text does not say which.
    "choices": [identifier, option chosen, right one] of every row.
    """
    result = {}
    chosen = choices(found, scores)
    for name in dict.fromkeys(row["set"] for row in found):
        own = [(row, pick) for row, pick in zip(found, chosen, strict=True) if row["set"] == name]
        asked = [row for row, _ in own]
        readable = [row for row in asked if row["options"]]
        hits = sum(pick is not None and pick == row["answer"] for row, pick in own)
        answers = Counter(row["answer"] for row in readable)
        count = len(own)
        result[name] = {
            "accuracy": hits / count,
            "interval": metrics.wilson(hits, count),
            "n": count,
            "chance": sum(1 / len(row["options"]) for row in readable) / count,
            "majority": max(answers.values(), default=0) / count,
            "overlap": sum(map(overlap_choice, asked)) / count,
            "unparsed": count - len(readable),
            "repeated_options": sum(
                row["options"].count(row["options"][row["answer"]]) > 1 for row in readable
            ),
            "choices": [[row["identifier"], pick, row.get("answer")] for row, pick in own],
        }
    return result
