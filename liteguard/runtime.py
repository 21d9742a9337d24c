"""A finished bundle, opened with LiteRT-LM as an app on a phone opens it.

`Bundle` is used to check what was exported and to evaluate the thing that ships instead of the
model that it was made from. All generation is greedy, so that two runs can be compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import multiprocessing
import multiprocessing.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any

from liteguard.errors import UserError, WorkError
from liteguard.machine import available_memory, end_with_parent, one_at_a_time, peak_rss_gb


@dataclasses.dataclass(frozen=True)
class Answer:
    """One greedy answer."""

    text: str  # without the stop token
    tokens: int  # tokens written, the stop token included where there was one
    stopped: bool  # the model ended by itself, not by the limit or a full cache
    seconds: float  # prefill and decode


class Bundle:
    """A `.task` or `.litertlm` file on the CPU; use it as a context manager.

    Args:
        path: the bundle.
        threads: CPU threads; default: all cores, at most 4. (On 2 cores, 2 threads decode
            46-52 tokens/s where the engine's own default decodes 35-37.)
        unpacked: a folder of `unpacked_weights` that other processes use too; default: its own.

    Raises:
        UserError: the file does not exist.
        WorkError: the engine cannot open it.
    """

    def __init__(
        self, path: Path, *, threads: int | None = None, unpacked: Path | None = None
    ) -> None:
        self.path = Path(path)
        self.threads = threads or min(os.cpu_count() or 1, 4)
        self._unpacked = unpacked
        self._stack = contextlib.ExitStack()
        self._engine: Any = None
        self._scorer: _Scorer | None = None
        if not self.path.is_file():
            raise UserError(f"no bundle at {self.path}: make one with compress_model.py")

    def __enter__(self) -> Bundle:
        import litert_lm

        litert_lm.set_min_log_severity(litert_lm.LogSeverity.SILENT)
        try:
            with one_at_a_time(self.unpacked / "lock"):
                self._engine = litert_lm.Engine(
                    str(self.path),
                    backend=litert_lm.Backend.CPU(thread_count=self.threads),
                    cache_dir=str(self.unpacked),
                    enable_benchmark=True,
                )
        except RuntimeError as error:
            self._stack.close()
            raise WorkError(f"{self.path} cannot be opened: {error}") from error
        self._greedy = litert_lm.SamplerConfig(top_k=1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _quiet_stderr():
            self._scorer = None
            if self._engine is not None:
                self._engine.close()
                self._engine = None
            self._stack.close()

    @property
    def unpacked(self) -> Path:
        """The folder that holds the weights as this machine's processor reads them."""
        if self._unpacked is None:
            self._unpacked = self._stack.enter_context(unpacked_weights(self.path))
            self._stack.callback(setattr, self, "_unpacked", None)
        return self._unpacked

    @property
    def is_open(self) -> bool:
        """Whether the engine is running."""
        return self._engine is not None

    @property
    def start_id(self) -> int | None:
        """Id that the engine puts before every first prefill, None for none."""
        return self._engine.bos_token_id

    @property
    def stop_ids(self) -> list[int]:
        """Single-token ids at which the engine stops."""
        return [ids[0] for ids in self._engine.eos_token_ids if len(ids) == 1]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text` as the device computes them; nothing is added."""
        return self._engine.tokenize(text)

    def tokenize_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`tokenize` of each text."""
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens included."""
        return self._engine.detokenize(ids)

    def _without_start(self, text: str) -> str:
        """`text` less what the engine will put before it by itself."""
        if self.start_id is None:
            return text
        start = self.detokenize([self.start_id])
        if not text.startswith(start):
            raise WorkError(
                f"{self.path} puts {start!r} before every prompt, and this prompt does not start "
                f"with it: {text[:40]!r}"
            )
        return text[len(start) :]

    def generate(self, rendered: str, max_new_tokens: int = 256) -> Answer:
        """Greedy answer to a fully rendered prompt; no template is applied.

        Args:
            rendered: `Prompt.render_question(question)`.
            max_new_tokens: most tokens to write, the stop token included.

        Raises:
            WorkError: the prompt does not fit the KV cache.
        """
        started = time.perf_counter()
        session = self._engine.create_session(
            apply_prompt_template=False,
            sampler_config=self._greedy,
            # One more than asked for: with exactly as many, an answer that ends in a stop token
            # at the limit cannot be told from one that was cut.
            max_output_tokens=max_new_tokens + 1,
        )
        try:
            session.run_prefill([self._without_start(rendered)])
            text = session.run_decode().texts[0]
            written = session.get_benchmark_info().last_decode_token_count
        except RuntimeError as error:
            raise WorkError(
                f"{self.path}: generation failed for a prompt of {len(self.tokenize(rendered))} "
                f"tokens ({error}); prompt and answer must fit the KV cache"
            ) from error
        finally:
            session.close()
        # The stop token is counted but is no part of the text. When the cache is full the engine
        # ends early too, but then every counted token is in the text.
        stopped = written <= max_new_tokens and len(self.tokenize(text)) < written
        if not stopped:
            if written > max_new_tokens:
                text = self.detokenize(self.tokenize(text)[:max_new_tokens])
                written = max_new_tokens
            text = text.rstrip("\ufffd")  # a character that the cut left incomplete
        return Answer(text, written, stopped, time.perf_counter() - started)

    def generate_within(self, rendered: str, max_new_tokens: int, room: int) -> Answer:
        """`generate`; no answer (no token, not stopped) where a KV cache of `room` is too small."""
        tokens = len(self.tokenize(rendered))
        nothing = Answer("", 0, False, 0.0)
        if tokens >= room:
            return nothing
        try:
            return self.generate(rendered, max_new_tokens)
        except WorkError:
            if tokens + max_new_tokens <= room:
                raise
            return nothing

    def render_chat(self, question: str) -> str:
        """The prompt that the bundle's own template makes of a question."""
        with self._engine.create_conversation(sampler_config=self._greedy) as conversation:
            return conversation.render_message_to_string(question)

    def converse(self, questions: Sequence[str], max_new_tokens: int = 256) -> list[str]:
        """Greedy answers to questions asked one after the other in one conversation."""
        answers = []
        with self._engine.create_conversation(
            sampler_config=self._greedy, max_output_tokens=max_new_tokens
        ) as conversation:
            for question in questions:
                content = conversation.send_message(question).to_json()["content"]
                if not isinstance(content, str):
                    content = "".join(part.get("text", "") for part in content)
                answers.append(content)
        return answers

    def score(self, context: str, targets: str) -> tuple[float, int]:
        """Log-likelihood of `targets` after `context`, by the weights inside the bundle.

        The perplexity over several pairs is ``exp(-sum(log-likelihoods) / sum(tokens))``.

        LiteRT-LM 0.18.1's own `run_text_scoring` is not used: on an *unquantised* export, whose
        greedy answers equal the Hugging Face model's token by token, its log-likelihoods are off
        by up to 5 nats a token (short contexts most). The bundle's TFLite model is run directly
        instead, and agrees with Hugging Face to 1e-3.

        Args:
            context: rendered prompt, not scored.
            targets: the text to score, with its end token if that shall count.

        Returns:
            (sum of natural-log probabilities, number of scored tokens).

        Raises:
            WorkError: context and targets do not fit the KV cache.
        """
        # Tokenized apart, as the device sees them: the prompt is prefilled, the answer follows.
        return self.score_ids(self.tokenize(context), self.tokenize(targets))

    def score_ids(self, context: list[int], targets: list[int]) -> tuple[float, int]:
        """`score` of token ids; the engine need not be open."""
        if self._scorer is None:
            with one_at_a_time(self.unpacked / "lock"):
                self._scorer = _Scorer(self.path, self.threads, self.unpacked)
        return self._scorer.score(context, targets)

    def benchmark(self, rendered: str | None = None) -> dict[str, float]:
        """Speed of one prompt and its answer of at most 64 tokens.

        Returns:
            ``prefill_tok_s`` and ``decode_tok_s`` (tokens per second, as the engine counts them:
            padding of the prompt to the exported prefill length is not counted as tokens),
            ``first_token_s`` (seconds), ``prefill_tokens`` and ``decode_tokens`` (counts).
        """
        rendered = rendered or self.render_chat("What are the symptoms of anaemia, and what helps?")
        session = self._engine.create_session(
            apply_prompt_template=False,
            sampler_config=self._greedy,
            max_output_tokens=64,
        )
        try:
            session.run_prefill([self._without_start(rendered)])
            session.run_decode()
            info = session.get_benchmark_info()
        finally:
            session.close()
        return {
            "prefill_tok_s": info.last_prefill_tokens_per_second,
            "decode_tok_s": info.last_decode_tokens_per_second,
            "first_token_s": info.time_to_first_token_in_second,
            "prefill_tokens": info.last_prefill_token_count,
            "decode_tokens": info.last_decode_token_count,
        }


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
        cores = min(os.cpu_count() or 1, 4)
        free = available_memory()
        shared, own = bundle_memory(self.path.stat().st_size)
        fitting = cores if free is None else (free - shared) // own
        self.workers = workers or max(1, min(cores, fitting))
        self.threads = threads or max(1, cores // self.workers)
        self.peak_rss_gb = 0.0  # of all processes at a time, in GB of 10^9 bytes

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int | Sequence[int], room: int | None = None
    ) -> Iterator[tuple[int, Answer]]:
        """(index, `Bundle.generate`'s answer) of each prompt, as they come.

        `max_new_tokens`: of all answers, or of each.
        With the length of the KV cache as `room`, prompts that do not fit are not answered
        (`Bundle.generate_within`); without it they are an error.
        """
        one = isinstance(max_new_tokens, int)
        limits = [max_new_tokens] * len(prompts) if one else max_new_tokens
        asked = list(zip(prompts, limits, strict=True))
        if room is None:
            return self._map("generate", asked)
        return self._map("generate_within", [(*pair, room) for pair in asked])

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
        ids = dict(self._map("tokenize_all", [(parts,)]))[0]
        both = list(zip(ids[::2], ids[1::2], strict=True))
        fitting = []
        for index, (context, targets) in enumerate(both):
            if room is not None and len(context) + len(targets) > room:
                yield index, (None, 0)
            else:
                fitting.append(index)
        for place, result in self._map("score_ids", [both[index] for index in fitting]):
            yield fitting[place], result

    def benchmark(self, prompt: str, times: int = 3) -> dict[str, float]:
        """Best of several `Bundle.benchmark` of one prompt, after a first that warms up."""
        runs = [run for _, run in sorted(self._map("benchmark", [(prompt,)] * (times + 1)))][1:]
        return {
            key: (min if key == "first_token_s" else max)(run[key] for run in runs)
            for key in runs[0]
        }

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
        pending = {
            pool.submit(_work, method, *arguments): index for index, arguments in enumerate(calls)
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


@contextlib.contextmanager
def unpacked_weights(bundle: Path) -> Iterator[Path]:
    """A folder for the weights of a bundle as this processor reads them; removed at the end.

    LiteRT keeps them in a file that all signatures and processes map. Without it each signature
    holds its own copy: Phi-2 with 8 bits and three prefill lengths took 13.4 GB instead of 3.8, and
    20 seconds to open instead of 7. It lies beside the bundle, where its space was planned for, or
    in the system's temporary folder where that cannot be written to.
    """
    place = bundle.parent if os.access(bundle.parent, os.W_OK) else Path(tempfile.gettempdir())
    prefix, suffix = f".{bundle.name}.", ".unpacked"
    for left in place.glob(f"{glob.escape(prefix)}*{suffix}"):
        process = left.name.removeprefix(prefix).split("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", suffix=suffix, dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


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
    _worker.__exit__(None, None, None)


def _work(method: str, *arguments: Any) -> tuple[Any, int, float]:
    """(result of a method of this process's bundle, process id, its peak memory in GB)."""
    if method != "score_ids" and not _worker.is_open:
        _worker.__enter__()
    return getattr(_worker, method)(*arguments), os.getpid(), peak_rss_gb()


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hides what C++ code prints: LiteRT warns of every accelerator that a machine lacks.

    Failures still arrive as exceptions.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Scorer:
    """Teacher-forced log-likelihoods from the TFLite model inside a `.task` file.

    The KV cache is one set of buffers that every call reads and writes in place, as LiteRT-LM does.
    Through the interpreter's signature runners it would be copied in and out for each token, which
    took four times as long (197 against 49 ms a token with a cache of 1280, SmolLM2, 2 cores).
    """

    def __init__(self, path: Path, threads: int, unpacked: Path) -> None:
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.options import CpuOptions, Options

        from liteguard.export.bundle import tflite_model

        file = unpacked / "model.tflite"
        if not file.exists():
            # A file of its own is mapped; a buffer would be held in memory as a whole.
            with file.open("wb") as handle:
                handle.write(tflite_model(path))
        cpu = CpuOptions(
            num_threads=threads, xnnpack_weight_cache_path=str(unpacked / "scores.xnnpack_cache")
        )
        with _quiet_stderr():
            self._model = CompiledModel.from_file(str(file), options=Options(cpu_options=cpu))
        details = self._model.get_input_tensor_details("decode")
        self._cache = {
            name: (self._model.create_input_buffer_by_name("decode", name), tensor)
            for name, tensor in details.items()
            if "kv" in name
        }
        self.cache_length = int(details["mask"]["shape"][-1])
        with _quiet_stderr():
            self._clear_cache()  # the first write sets up an environment, and says so
        # Length in tokens -> (signature, its inputs, its outputs, details of its inputs).
        self._signatures = {1: self._buffers("decode")}
        for name in self._model.get_signature_list():
            if name.removeprefix("prefill_").isdigit():
                self._signatures[int(name.removeprefix("prefill_"))] = self._buffers(name)
        self._prefilled: list[int] | None = []  # tokens whose keys and values the cache holds
        outputs = self._model.get_output_tensor_details("decode")
        self._vocabulary = int(outputs["logits"]["shape"][-1])

    def _clear_cache(self) -> None:
        import numpy as np

        for buffer, tensor in self._cache.values():
            buffer.write(np.zeros(tensor["shape"], tensor["dtype"]))

    def _buffers(self, name: str) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]:
        cache = {key: buffer for key, (buffer, _) in self._cache.items()}
        details = self._model.get_input_tensor_details(name)
        inputs = {
            key: cache.get(key) or self._model.create_input_buffer_by_name(name, key)
            for key in details
        }
        outputs = {
            key: cache.get(key) or self._model.create_output_buffer_by_name(name, key)
            for key in self._model.get_output_tensor_details(name)
        }
        return name, inputs, outputs, details

    def _run(self, length: int, ids: list[int], start: int) -> Any:
        """Runs `ids` at positions start, start+1, ... in the signature of that length."""
        import numpy as np

        name, inputs, outputs, details = self._signatures[length]
        columns = np.arange(self.cache_length)
        visible = columns[None, :] <= (start + np.arange(length))[:, None]
        # Large and finite: minus infinity makes NaN of a fully masked row.
        boolean = "bool" in str(details["mask"]["dtype"])
        mask = visible if boolean else np.where(visible, 0.0, -1e9).astype(np.float32)
        inputs["mask"].write(mask[None, None])
        inputs["tokens"].write(np.array([ids], np.int32))
        inputs["input_pos"].write(np.arange(start, start + length, dtype=np.int32))
        self._model.run_by_name(name, inputs, outputs)
        if "logits" in outputs:
            return outputs["logits"].read(self._vocabulary, np.float32).astype(np.float64)
        return None

    def score(self, context: list[int], targets: list[int]) -> tuple[float, int]:
        """See `Bundle.score`; ids instead of text."""
        import numpy as np

        total = len(context) + len(targets)
        if not context or not targets:
            raise UserError("scoring needs a context and a target of at least one token each")
        if total > self.cache_length:
            raise WorkError(f"{total} tokens do not fit the KV cache of {self.cache_length} tokens")
        known = len(context) - 1  # the last context token yields the first logits
        if context[:known] == self._prefilled:
            # The options of one question: what stands behind the context is masked anyway.
            done = known
        else:
            if self._prefilled is None:
                self._clear_cache()  # numbers of a run that failed may be none
            self._prefilled = None  # in case that this one fails half way
            done = 0
        while done < known:
            fitting = [n for n in sorted(self._signatures) if done + n <= self.cache_length]
            # The shortest that covers the rest, else the longest. Padding lands in cache slots
            # that the mask hides until they are overwritten.
            length = next((n for n in fitting if n >= known - done), fitting[-1])
            chunk = context[done : min(done + length, known)]
            self._run(length, chunk + [0] * (length - len(chunk)), done)
            done += len(chunk)
        self._prefilled = context[:known]
        likelihood = 0.0
        sequence = context + targets
        for position in range(known, total - 1):
            logits = self._run(1, [sequence[position]], position)
            top = logits.max()
            likelihood += float(
                logits[sequence[position + 1]] - top - np.log(np.exp(logits - top).sum())
            )
        return likelihood, len(targets)
