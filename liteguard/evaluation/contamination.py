"""Test rows that a stage was trained on."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import checkpoints
from liteguard.data import overlap
from liteguard.errors import UserError
from liteguard.records import Made
from liteguard.rows import FIELDS, iterate_split, questions, read_manifest
from liteguard.text import text_key

if TYPE_CHECKING:
    import numpy as np

# What of its data a stage trains on.
TRAINED_ON = {
    "domain": "domain/train.jsonl",
    "instruction": "instruction/train.jsonl",
    "safety": "preference/train.jsonl",
}

# Ends the name of data that is gone or was made anew, and surely not what is measured on.
OTHER_DATA = ": other rows than these"
# Characters of training rows that are looked at together; a word takes some 100 bytes meanwhile.
BLOCK = 5_000_000


def training_data(data_dir: Path, record: Made | None) -> tuple[list[Path], list[str]]:
    """Prepared data that the stages of a model saw, and what of it cannot be looked at any more.

    Goes from `record` (of a stage or a bundle; None: the base model) through the records of its
    parents. Returns the directories, `data_dir` first and each with other train splits, and the
    files that are gone or were made anew since a stage was trained on them.
    """
    directories, known, unchecked = [data_dir], [train_files(data_dir)], []
    seen: set[str] = set()
    while record:
        if record.stage in TRAINED_ON:
            name, digest = TRAINED_ON[record.stage], record.inputs.get("data/train")
            own = Path(record.data_dir)
            if digest is None or all(files.get(name) != digest for files in known):
                files = train_files(own) if (own / "manifest.json").is_file() else {}
                if digest is not None and files.get(name) == digest:
                    directories.append(own)
                    known.append(files)
                else:
                    unchecked.append(f"{own / name} ({record.stage} stage{OTHER_DATA})")
        path, adapter = record.parent, record.parent_adapter_sha256
        record = None
        if path in seen:  # a record may name itself
            unchecked.append(f"what {path} was trained on")
        elif path:
            seen.add(path)
            try:
                record = checkpoints.read_stage(Path(path))
            except UserError:
                unchecked.append(f"what {path} was trained on")
            else:
                if record.adapter != adapter:
                    unchecked.append(f"what an earlier {path} was trained on")
    return directories, unchecked


def train_files(data_dir: Path) -> dict[str, str]:
    """Train splits of prepared data and their sha256."""
    files = read_manifest(data_dir)["files"]
    return {name: digest for name, digest in files.items() if name.endswith("train.jsonl")}


def _named(row: dict[str, Any]) -> str:
    """What a held-out row is looked for by: its text, or all its questions."""
    return row.get("text") or " ".join(questions(row))


def _blocks(data_dir: Path, part: str) -> Iterator[list[dict[str, Any]]]:
    """The train split in lists of rows that have about BLOCK characters each."""
    block: list[dict[str, Any]] = []
    size = 0
    for row in iterate_split(data_dir, part, "train"):
        block.append(row)
        size += sum(len(row[field]) for field in FIELDS[part])
        if size > BLOCK:
            yield block
            block, size = [], 0
    yield block


def _shared(
    rows: list[dict[str, Any]],
    part: str,
    exact: Container[str],
    known: dict[tuple[bool, int], tuple[np.ndarray, np.ndarray, list[str]]],
) -> set[str]:
    """Held-out texts that training rows have as a whole question, or share a window with.

    `known`: (from a domain text?, words in a window) -> (windows, which text each is from, texts).
    """
    import numpy as np

    shared: set[str] = set()
    words: list[str] = []
    for row in rows:
        asked = [row["text"]] if part == "domain" else questions(row)
        answered = [answer for _, answer in row.get("history", ())]
        answered += [row[field] for field in FIELDS[part][1:2]]
        keys = [text_key(text) for text in (*asked, *answered)]
        wholes = {text_key(" ".join(asked)), *keys[: len(asked)]}
        shared.update(key for key in wholes if key in exact)
        for key in keys:
            words += [*key.split(), ""]
    numbers = overlap.word_numbers(words)
    for (is_text, size), (hashes, origin, texts) in known.items():
        if part == "domain" or not is_text:
            found = origin[np.isin(hashes, overlap.windows(numbers, size))]
            shared.update(texts[place] for place in found.tolist())
    return shared


def contamination(
    rows: dict[str, list[dict[str, Any]]],
    measured: dict[str, list[dict[str, Any]]],
    training_dirs: Sequence[Path],
) -> dict[str, Any]:
    """Which held-out rows stand in training data, by the rules of preparation.

    A question is contaminated when a training row has the same one, or 13 words in a row of it, in
    any turn (of a held-out conversation all questions together are looked for); a
    domain text when a training text does (answers are made from texts about the same diseases, so
    they are not compared). A question of a public benchmark or of an outside set also when a
    training row holds the whole of it, from 6 words on, or 13 words of the abstract or the
    reference answer that goes with it; an outside text when any training row has 13 words of it.
    Reference answers and outside texts of fewer than 6 words are looked for nowhere.
    The overlap rule is that of the GPT-3 paper, without set phrases.

    Args:
        rows: every row of the split, so that set phrases are known as such.
        measured: those of them that models are measured on.
        training_dirs: prepared data whose train splits the models saw.

    Returns {"rows", "training_rows", "found": contaminated rows, "measured": those among them
    that numbers were computed on, "by_set", "measured_by_set", "examples": up to 5 [set, question
    or text]}.
    """
    held = [(name, row) for name, found in rows.items() for row in found]
    exact: dict[str, list[int]] = {}
    # (from a domain text?, words in a window) -> {text: its windows}; a question with five answers
    # is one text, and no set phrase
    looked_for: dict[tuple[bool, int], dict[str, np.ndarray]] = {}
    for number, (name, row) in enumerate(held):
        of_others = name == "knowledge" or "measured_as" in row
        shortest = overlap.SHORTEST_WINDOW if of_others else overlap.OVERLAP_WORDS
        parts = [_named(row), row.get("context")]
        said = [row.get("completion"), row.get("text")] if "measured_as" in row else []
        for text in filter(None, [*parts, *said[:1]]):
            key = text_key(text)
            words = key.split()
            if text in said and len(words) < shortest:
                continue
            exact.setdefault(key, []).append(number)
            size = min(len(words), overlap.OVERLAP_WORDS)
            if size >= shortest:
                own = overlap.windows(overlap.word_numbers(words), size)
                looked_for.setdefault((name == "texts", size), {})[key] = own
    known = {}
    for kind, found in looked_for.items():
        hashes, origin = overlap.distinctive(list(found.values()), kind[1])
        known[kind] = hashes, origin, list(found)
    hit: set[int] = set()
    training_rows = 0
    for directory in training_dirs:
        for part in FIELDS:
            for block in _blocks(directory, part):
                training_rows += len(block)
                hit.update(n for key in _shared(block, part, exact, known) for n in exact[key])
    hits = [(name, _named(row)) for name, row in map(held.__getitem__, hit)]
    used = {(name, _named(row)) for name, own in measured.items() for row in own}
    hits.sort(key=lambda entry: (entry not in used, entry))
    return {
        "rows": len(held),
        "training_rows": training_rows,
        "found": len(hits),
        "measured": sum(entry in used for entry in hits),
        "by_set": {name: sum(n == name for n, _ in hits) for name in rows},
        "measured_by_set": {
            name: sum(entry[0] == name and entry in used for entry in hits) for name in rows
        },
        "examples": [list(entry) for entry in hits[:5]],
    }
