"""Several processes with one bundle each: answers and scores as fast as the cores allow."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from liteguard import limits
from liteguard.errors import UserError, WorkError
from liteguard.machine import available_memory, end_with_parent, peak_rss_gb, starting_children
from liteguard.runtime.bundle import Answer, Bundle
from liteguard.runtime.container import unpacked_weights
from liteguard.sampling import GREEDY, Sampling


class BundleWorkers:
    """The same bundle in several processes, for many prompts or texts.

    A decode step computes one token, and threads that share so little work mostly wait for each
    other: one thread takes 12 to 26 % less processor time a token than two. What that gains on the
    clock depends on the machine, and the processes' start (some seconds) and memory come off it
    (benchmarks/bench_evaluation.py; docs/experiments.md).

    Args:
        path: the bundle.
        workers: processes; default: one per core, at most 4, and no more than fit the free memory.
        threads: CPU threads of each; default: the cores (at most 4) shared out.
        unpacked: a folder of `unpacked_weights` to share with others; default: one a job.
    """

    def __init__(
        self,
        path: Path,
        *,
        workers: int | None = None,
        threads: int | None = None,
        unpacked: Path | None = None,
    ) -> None:
        self.path, self.unpacked = Path(path), unpacked
        if not self.path.is_file():
            raise UserError(f"no bundle at {self.path}: make one with compress_model.py")
        cores = min(limits.cores(), 4)
        free = available_memory()
        shared, own = bundle_memory(self.path.stat().st_size)
        fitting = cores if free is None else (free - shared) // own
        self.workers = workers or max(1, min(cores, fitting))
        self.threads = threads or max(1, cores // self.workers)
        self.peak_rss_gb = 0.0  # of all processes at a time, in GB of 10^9 bytes

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | Sequence[int],
        room: int | None = None,
        samplings: Sequence[Sampling] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """(index, `Bundle.generate`'s answer) of each prompt, as they come.

        `max_new_tokens`: of all answers, or of each. `samplings`: of each; default: greedy.
        With the length of the KV cache as `room`, prompts that do not fit are not answered
        (`Bundle.generate_within`); without it they are an error.
        """
        if isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * len(prompts)
        samplings = samplings or [GREEDY] * len(prompts)
        asked = list(zip(prompts, max_new_tokens, samplings, strict=True))
        if room is None:
            return self._map("generate", asked)
        return self._map("generate_within", [(*pair, room, drawn) for *pair, drawn in asked])

    def score(
        self, pairs: Sequence[tuple[str, str]], room: int | None = None
    ) -> Iterator[tuple[int, tuple[float | None, int]]]:
        """(index, `Bundle.score`'s result) of each (context, targets), as they come.

        With the length of the KV cache as `room`, pairs that do not fit get (None, 0); without it
        they are an error.
        """
        if not pairs:
            return  # not worth opening the bundle
        parts = [part for pair in pairs for part in pair]
        ids = self.tokenize(parts)
        both = list(zip(ids[::2], ids[1::2], strict=True))
        fitting = []
        for index, (context, targets) in enumerate(both):
            if room is not None and len(context) + len(targets) > room:
                yield index, (None, 0)
            else:
                fitting.append(index)
        for place, result in self._by_context("score_all", [both[index] for index in fitting]):
            yield fitting[place], result

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """`Bundle.tokenize` of each text."""
        return dict(self._map("tokenize_all", [(list(texts),)]))[0] if texts else []

    def follow(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """(index, `Bundle.follow_ids`'s result) of each (context, targets), as they come."""
        return self._by_context("follow_all", pairs) if pairs else iter(())

    def behind(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """`Bundle.behind` of each (context, tokens)."""
        return [gap for _, gap in sorted(self._map("behind", asked))] if asked else []

    def benchmark(self, prompt: str, times: int = 3) -> dict[str, float]:
        """Best of several `Bundle.benchmark` of one prompt, after a first that warms up."""
        runs = [run for _, run in sorted(self._map("benchmark", [(prompt,)] * (times + 1)))][1:]
        return {
            key: (min if key == "first_token_s" else max)(run[key] for run in runs)
            for key in runs[0]
        }

    def _by_context(
        self, method: str, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[int, Any]]:
        """(index, result) of each (context, targets) by a method of `Bundle` for all targets of a
        context: pairs that follow one another with the same one, as the options of a question do,
        go to one process, which computes the context once."""
        groups: list[tuple[list[int], list[list[int]]]] = []
        for context, targets in pairs:
            if not groups or groups[-1][0] != context:
                groups.append((context, []))
            groups[-1][1].append(targets)
        ends = list(itertools.accumulate(len(targets) for _, targets in groups))
        for place, results in self._map(method, groups):
            first = ends[place] - len(results)
            yield from enumerate(results, first)

    def _map(self, method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """(index, result) of a method of `Bundle` for each call's arguments.

        Processes live for one job: engines and models that score take gigabytes each, and of those
        a process that has had both gives back only a part.
        """
        folder = contextlib.nullcontext(self.unpacked) if self.unpacked else None
        with folder or unpacked_weights(self.path) as unpacked:
            yield from self._map_in(unpacked, method, calls)

    def _map_in(
        self, unpacked: Path, method: str, calls: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        pool = ProcessPoolExecutor(
            min(self.workers, len(calls)) or 1,
            # Forking a process whose libraries run threads can deadlock.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self.path, self.threads, unpacked),
        )
        with starting_children():
            pending = {
                pool.submit(_work, method, *arguments): index
                for index, arguments in enumerate(calls)
            }
        peaks: dict[int, float] = {}
        try:
            for future in as_completed(pending):
                result, process, peaks[process] = future.result()
                yield pending[future], result
        except BrokenProcessPool as error:
            raise WorkError(
                f"{self.path}: a process that ran the bundle was killed, most often because memory "
                "ran out. Close other programs and run the same command again: finished answers "
                "are kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
            self.peak_rss_gb = max(self.peak_rss_gb, sum(peaks.values()))


def bundle_memory(size: int) -> tuple[int, int]:
    """(bytes that all processes with a bundle of `size` bytes share, bytes of each of them).

    Shared are the unpacked weights, mapped from a file. Each has its KV cache and activations.
    Measured with 2.8 GB of 8 bits (Phi-2, cache of 1280, prefill up to 1024): 2.7 and 1.1 GB.
    Weight-only recipes unpack 8 bits to float32: four times as much to share.
    """
    return 2 * size, 300_000_000 + size // 2


_worker: Bundle | None = None


def _start_worker(path: Path, threads: int, unpacked: Path) -> None:
    """Prepares this process to run a bundle; it is opened by the first call, whose caller hears
    of what goes wrong."""
    global _worker
    _worker = Bundle(path, threads=threads, unpacked=unpacked)
    multiprocessing.util.Finalize(None, _close_worker, exitpriority=10)

    end_with_parent()


def _close_worker() -> None:
    """Ends the bundle with the process, whose C++ libraries print to the last."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if _worker is not None:
        _worker.__exit__(None, None, None)


def _work(method: str, *arguments: Any) -> tuple[Any, int, float]:
    """(result of a method of this process's bundle, process id, its peak memory in GB)."""
    assert _worker is not None  # made by _start_worker
    if method not in ("score_all", "follow_all", "behind") and not _worker.is_open:
        _worker.__enter__()
    return getattr(_worker, method)(*arguments), os.getpid(), peak_rss_gb()
