"""Answers and scores, written down as they come: an interrupted measurement goes on from there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from liteguard import writing
from liteguard.progress import Progress


class Journal:
    """What one model has given so far, in a file that survives the process.

    The first line holds the inputs, each later one a result, appended as it comes, with the seconds
    since the one before: what a run that was killed had cost is known as well. A file that was
    begun from other inputs is started over; a last line that a crash cut is dropped.

    Attributes:
        found: part -> index -> result; the parts are PARTS.
        seconds: part -> seconds that its results took, of all runs.

    Args:
        path: the file; its directory exists.
        inputs: whatever the results depend on, as JSON.
    """

    # "scores" of texts, "options" of multiple choice, "answers", those to requests as they are
    # "used", what an LLM "judged" of them and of each criterion of "rubrics", facts about "runs".
    PARTS = ("runs", "scores", "options", "answers", "used", "judged", "rubrics")

    def __init__(self, path: Path, inputs: dict[str, Any]):
        self.path = path
        self.found: dict[str, dict[int, Any]] = {part: {} for part in self.PARTS}
        self.seconds = dict.fromkeys(self.PARTS, 0.0)
        header = self._header(inputs)
        kept = header
        writing.require_file(path)
        content = path.read_bytes() if path.is_file() else b""
        begun = content.startswith(header)
        if begun:
            for line in content[len(header) :].splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                try:
                    part, index, value, seconds = _entry(line)
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    print(f"  {path} is damaged: what follows the damage is measured again")
                    break
                self.found[part][index] = value
                self.seconds[part] += seconds
                kept += line
        elif content:
            print(f"  {path} was begun from other inputs: starting over")
        if not begun:
            # A whole new file: below a new header, lines of other inputs would count as its own.
            writing.write_bytes(path, header)
        elif len(kept) < len(content):
            os.truncate(path, len(kept))
        self._file = path.open("ab")

    @staticmethod
    def _header(inputs: dict[str, Any]) -> bytes:
        return json.dumps({"inputs": inputs}, sort_keys=True, default=str).encode() + b"\n"

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a file begins as a journal does, of whatever inputs."""
        with path.open("rb") as file:
            return file.read(11) == b'{"inputs": '

    @classmethod
    def begun_from_others(cls, path: Path, inputs: dict[str, Any]) -> bool:
        """Whether a file holds results of other inputs, which opening it would drop."""
        content = path.read_bytes() if path.is_file() else b""
        return content.count(b"\n") > 1 and not content.startswith(cls._header(inputs))

    def add(self, part: str, index: int, value: Any, seconds: float = 0.0) -> None:
        """Append result `index` of a part, which took so many seconds."""
        self.found[part][index] = value
        self.seconds[part] += seconds
        line = json.dumps([part, index, value, round(seconds, 6)], ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def add_run(self, seconds: float = 0.0, **facts: Any) -> None:
        """Append something about a run, e.g. its peak memory so far."""
        self.add("runs", len(self.found["runs"]), facts, seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def remove(self) -> None:
        """Close and delete the file: its content is in a finished result."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    @classmethod
    def drop(cls, path: Path, inputs: dict[str, Any]) -> None:
        """Delete a file that a kill left beside the finished result of the same inputs."""
        if path.is_file() and path.read_bytes().startswith(cls._header(inputs)):
            path.unlink()


def _entry(line: bytes) -> tuple[str, int, Any, float]:
    """(part, index, value, seconds) of a line; an error of some kind for anything else."""
    part, index, value, seconds = json.loads(line)
    fits = {
        "runs": lambda: isinstance(value, dict),
        "scores": lambda: _is_score(*value),
        "options": lambda: _is_score(*value),
        "answers": lambda: _is_answer(value),
        "used": lambda: _is_answer(value),
        "judged": lambda: _is_reply(value),
        "rubrics": lambda: _is_reply(value),
    }
    whole = type(index) is int and index >= 0 and isinstance(seconds, (int, float))
    if not whole or part not in fits or not fits[part]():
        raise ValueError("no entry")
    return part, index, value, seconds


def _is_answer(value: dict[str, Any]) -> bool:
    kinds = {name: type(found) for name, found in value.items() if name != "seconds"}
    timed = isinstance(value.get("seconds", 0.0), (int, float))  # the proof's are not
    return timed and kinds == {"text": str, "tokens": int, "stopped": bool}


def _is_reply(value: dict[str, Any]) -> bool:
    return all(isinstance(value.get(name), str) for name in ("verdict", "text"))


def _is_score(score: Any, tokens: Any) -> bool:
    return (score is None or isinstance(score, float)) and type(tokens) is int


def journalled(
    journal: Journal,
    part: str,
    what: str,
    total: int,
    todo: list[int],
    results: Iterator[tuple[int, Any, int]],
) -> None:
    """Journal results (place in `todo`, value, tokens) as they come, under a progress bar."""
    progress = Progress(what, total, total - len(todo))
    before = time.monotonic()
    for place, value, tokens in results:
        now = time.monotonic()
        journal.add(part, todo[place], value, now - before)
        before = now
        progress.add(tokens)
    progress.close()
