"""What a row is about: one name for all names of a disease, and a guess where a row names none.

Rows are split by what they are about, so that a test question is about a disease that no training
row is about. A row that names nothing can only be kept apart by its wording.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from liteguard import checkpoints, registry, writing
from liteguard.config import DataSection
from liteguard.data.cleaning import NAMED, NAMELESS, OWN, draw_split, entity_names
from liteguard.data.shards import Lines
from liteguard.data.splits import Part
from liteguard.data.words import key_number
from liteguard.rows import FIELDS, SPLITS, questions
from liteguard.text import match_key
from liteguard.wheels import WHEELS, cached_wheel

# Names of fewer letters mean too many things; longer names than so many words are sentences.
MIN_LETTERS, MAX_NAME_WORDS = 4, 12
# A text is about what its first sentence names.
TEXT_WORDS = 30
# What more rows than this share name is no subject of its own ("disease"), from so many rows on.
TOO_COMMON, FEW = 0.05, 200


def known_names(cache_dir: Path, configured: Iterable[str]) -> dict[str, str]:
    """Wheel -> sha256 of the packages whose disease names are at hand; {} when one is missing.

    At hand: among the `configured` ones, which are fetched anyway, or in the cache already.
    """
    wheels = registry.ENTITIES[0] if registry.ENTITIES else ()
    present = [name in set(configured) or bool(cached_wheel(name, cache_dir)) for name in wheels]
    return {name: WHEELS[name].sha256 for name in wheels} if all(present) else {}


def names_file(cache_dir: Path, wheels: dict[str, str], code: dict[str, str]) -> Path | None:
    """The JSON file name -> entity of the embedded diseases in the cache; None without `wheels`."""
    if not wheels:
        return None
    key = checkpoints.sha256_json({"wheels": wheels, "code": code})
    path = cache_dir / "entities" / f"{key[:32]}.json"
    if not writing.is_sealed(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(path, registry.ENTITIES[1](cache_dir), shared=True)
        writing.seal(path)
    return path


class Names:
    """Names of entities, to be looked for in texts."""

    def __init__(self, names: dict[str, str]) -> None:
        self._entities = {
            name: entity
            for name, entity in names.items()
            if len(name) >= MIN_LETTERS
            and not name.replace(" ", "").isdigit()
            and name.count(" ") < MAX_NAME_WORDS
        }
        self._longest: dict[str, int] = {}  # first word -> words of the longest name
        for name in self._entities:
            words = name.split()
            self._longest[words[0]] = max(len(words), self._longest.get(words[0], 0))

    def __len__(self) -> int:
        return len(self._entities)

    def find(self, words: list[str]) -> str | None:
        """The entity of the longest name in a text, of equally long ones the first; or None."""
        best = ""
        for start, word in enumerate(words):
            for size in range(min(self._longest.get(word, 0), len(words) - start), 0, -1):
                name = " ".join(words[start : start + size])
                if name in self._entities:
                    best = max(best, name, key=len)
                    break
        return self._entities[best] if best else None


def guess_entities(parts: list[Part], data: DataSection, known: Path | None) -> dict[str, str]:
    """Find what rows without an entity are about, and draw their split by that.

    By the names of the rows that have one and by the `known` names of diseases. Rows that came with
    their split stay in it. Returns a sentence for each part that has rows without an entity.
    """
    names = Names(_given_names(parts) | (entity_names(str(known)) if known else {}))
    said = {}
    for part in parts:
        nameless = np.flatnonzero(part.arrays["naming"] % OWN == NAMELESS)
        if not len(nameless):
            continue
        found = _guess(part, nameless, names, data) if len(names) else 0
        said[part.name] = (
            f"{len(nameless):,} rows name no entity; what {found:,} of them are about was found by "
            f"{len(names):,} known names"
        )
    return said


def _given_names(parts: list[Part]) -> dict[str, str]:
    """The entities that rows name."""
    found = {}
    for part in parts:
        readers = [Lines(shard) for shard in part.shards]
        named = np.flatnonzero(part.arrays["naming"] % OWN == NAMED)
        _, first = np.unique(part.arrays["entity"][named], return_index=True)
        for row in named[first]:
            entity = json.loads(readers[part.shard[row]][part.row[row]])["entity"]
            found[entity] = entity
    return found


def _first_text(line: str, field: str) -> str:
    """A row's question or text; it comes first in the line, so the rest need not be read.

    Of a conversation all questions.
    """
    begin = f'{{"{field}": "'
    if field == "prompt" and '"history": [[' in line:
        return " ".join(questions(json.loads(line)))
    if line.startswith(begin):
        return json.decoder.scanstring(line, len(begin))[0]  # type: ignore[attr-defined]
    return json.loads(line)[field]


def _guess(part: Part, rows: np.ndarray, names: Names, data: DataSection) -> int:
    """Guess the entities of these rows of a part; returns of how many."""
    readers = [Lines(shard) for shard in part.shards]
    numbers: dict[str, int] = {}
    field = FIELDS[part.name][0]
    for row in rows:
        text = _first_text(readers[part.shard[row]][part.row[row]].decode(), field)
        if part.name == "domain":
            text = " ".join(text.split(None, TEXT_WORDS)[:TEXT_WORDS]).split(". ", 1)[0]
        entity = names.find(match_key(text).split())
        if entity:
            part.guessed[row] = numbers.setdefault(entity, len(numbers))
    part.names = list(numbers)
    found = part.guessed[rows]
    counts = np.bincount(found[found >= 0], minlength=len(numbers))
    if len(rows) >= FEW:
        common = np.flatnonzero(counts > TOO_COMMON * len(rows))
        part.guessed[rows[np.isin(found, common)]] = -1
    guessed = rows[part.guessed[rows] >= 0]
    drawn = [draw_split(name, data, part.name != "domain") for name in part.names]
    name = part.guessed[guessed]
    if len(guessed):
        came_with_split = part.arrays["naming"][guessed] & OWN
        splits = np.array([*map(SPLITS.index, drawn)], np.uint8)[name]
        part.arrays["entity"][guessed] = np.array([*map(key_number, part.names)], np.uint64)[name]
        part.arrays["split"][guessed] = np.where(
            came_with_split, part.arrays["split"][guessed], splits
        )
        part.arrays["naming"][guessed] = NAMED | came_with_split
    return len(guessed)
