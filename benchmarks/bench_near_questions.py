"""What finds a held-out question that was changed a little, and what it takes by mistake.

    python prepare_datasets.py --model_type smollm2
    python benchmarks/bench_near_questions.py data/smollm2 --json near_questions.json

Changes questions of 3 to 26 words of the public benchmarks by a word or two (inserted, left out,
exchanged, moved, polite words around) and looks for them with windows of words alone and with the
similarity of near_questions.py at several thresholds. Then counts how many of the prepared training
rows each threshold takes: nearly all of those ask about a subject next to a held-out one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from liteguard.data import near_questions  # noqa: E402
from liteguard.data.overlap import OverlapIndex, key_number, windows, word_numbers  # noqa: E402
from liteguard.embedded import public_benchmarks  # noqa: E402
from liteguard.rows import SPLITS  # noqa: E402
from liteguard.text import match_key, normalise  # noqa: E402

SETS = ("medqa", "medmcqa", "pubmedqa", "mmlu_clinical", "healthsearchqa")
THRESHOLDS = (0.7, 0.75, 0.8, 0.85, 0.9)
LENGTHS = {"3 to 5 words": (3, 5), "6 to 12 words": (6, 12), "13 to 26 words": (13, 26)}


def changes(generator: random.Random, vocabulary: list[str]) -> dict[str, Callable]:
    """Name -> list of words to changed list of words."""

    def inserted(words: list[str]) -> list[str]:
        at = generator.randrange(1, len(words))
        return [*words[:at], generator.choice(vocabulary), *words[at:]]

    def dropped(words: list[str]) -> list[str]:
        at = generator.randrange(len(words))
        return words[:at] + words[at + 1 :]

    def exchanged(words: list[str]) -> list[str]:
        at = generator.randrange(len(words))
        return [*words[:at], generator.choice(vocabulary), *words[at + 1 :]]

    def moved(words: list[str]) -> list[str]:
        at = generator.randrange(1, len(words))
        return words[at:] + words[:at]

    def polite(words: list[str]) -> list[str]:
        return ["please", *words, "thank", "you"]

    return {
        "a word inserted": inserted,
        "a word left out": dropped,
        "a word exchanged": exchanged,
        "beginning and end exchanged": moved,
        "polite words around": polite,
    }


def found_by_windows(index: OverlapIndex, question: list[str]) -> bool:
    """Whether a window of words, or the whole question, is one of the evaluation sets'."""
    numbers = word_numbers(question)
    whole = index.find_texts(np.array([key_number(" ".join(question))], np.uint64))
    return bool(
        whole[0] or any(index.find_windows(windows(numbers, n), n).any() for n in index.sizes)
    )


def joined(questions: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """(word numbers of all questions, words of each)."""
    flat = word_numbers([word for words in questions for word in words])
    return flat, np.array([len(words) for words in questions], np.int64)


def prepared(data_dir: Path) -> tuple[list[list[str]], list[list[str]]]:
    """(training and validation, test) questions of a prepared directory, near ones included."""
    training, test = [], []
    for part in ("instruction", "preference"):
        for split in SPLITS:
            with (data_dir / part / f"{split}.jsonl").open(encoding="utf-8") as file:
                for line in file:
                    words = match_key(json.loads(line)["prompt"]).split()
                    (test if split == "test" else training).append(words)
    with (data_dir / "dropped.jsonl").open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            if entry["reason"].startswith("resembles"):
                training.append(match_key(entry["row"]["prompt"]).split())
    return [words for words in training if len(words) <= near_questions.MAX_ASKED], test


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a directory that prepare_datasets.py wrote")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="data.cache_dir")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    if not (args.data / "dropped.jsonl").is_file():
        sys.exit(f"{args.data} was not written by prepare_datasets.py.")
    texts = [(n, q.question) for n in SETS for q in public_benchmarks.load(n, args.cache)]
    index = OverlapIndex.build(texts)
    questions = sorted({match_key(normalise(text)) for _, text in texts})
    asked = [question.split() for question in questions]
    asked = [words for words in asked if 3 <= len(words) <= near_questions.MAX_WORDS]
    training, test = prepared(args.data)
    generator = random.Random(0)
    vocabulary = sorted({word for words in training for word in words})
    everything = joined([*training, *test, *asked])
    seen = near_questions.count_words([everything[0]])
    number = len(everything[1])
    results: dict[str, dict[str, float]] = {}

    def index_at(threshold: float, held: list[list[str]]) -> near_questions.HeldOut:
        words, counts = joined(held)
        labels = np.zeros(len(counts), np.int64)
        return near_questions.HeldOut(words, counts, labels, seen, number, threshold)

    indexes = {threshold: index_at(threshold, asked) for threshold in THRESHOLDS}
    print(f"{'changed questions found':44}{'windows':>9}", end="")
    print("".join(f"{threshold:9.2f}" for threshold in THRESHOLDS))
    for length, (low, high) in LENGTHS.items():
        group = [words for words in asked if low <= len(words) <= high]
        sample = generator.sample(group, min(len(group), 1_000))
        for name, change in changes(generator, vocabulary).items():
            changed = [change(words) for words in sample]
            by_window = np.array([found_by_windows(index, words) for words in changed])
            row = {"windows": float(by_window.mean())}
            for threshold, held in indexes.items():
                near = held.find(*joined(changed)) > 0
                row[f"{threshold:.2f}"] = float((near | by_window).mean())
            results[f"{length}, {name}"] = row
            print(f"{f'{length}, {name}':44}" + "".join(f"{v:9.1%}" for v in row.values()))
    for name, held in (("evaluation sets", asked), ("the test split", test)):
        row = {}
        for threshold in THRESHOLDS:
            found = index_at(threshold, held).find(*joined(training))
            row[f"{threshold:.2f}"] = int((found > 0).sum())
        results[f"training rows that resemble {name}"] = {"rows": len(training), **row}
        title = f"of {len(training):,} rows, resemble {name}"
        print(f"{title:53}" + "".join(f"{v:9,}" for v in row.values()))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
