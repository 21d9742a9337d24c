"""Who is measured: a checkpoint with its adapter merged, the base, a merged model, or a bundle."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from liteguard import limits, machine, merged, models, records
from liteguard.config import Config, EvaluateSection
from liteguard.errors import UserError
from liteguard.prompts import Prompt
from liteguard.records import BundleRecord
from liteguard.runtime.workers import bundle_memory
from liteguard.sampling import Sampling

# Logits of one scoring batch (128 MB of float32): larger ones are no faster on a CPU.
LOGITS_PER_BATCH = 2**25


@dataclass(frozen=True)
class Generated:
    """One answer: its text, its length with the stop token, and whether the model ended it.

    `seconds`: until it was complete, in its batch where a model answers in batches.
    """

    text: str
    tokens: int
    stopped: bool
    seconds: float = field(default=0.0, compare=False)


class Answerer(Protocol):
    """What is evaluated: a model in Transformers, or a bundle in LiteRT-LM.

    Both methods yield (index into the list that was given, result) as results come, in any order.
    """

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        samplings: Sequence[Sampling] | None = None,
    ) -> Iterator[tuple[int, Generated]]:
        """Answers to rendered prompts: greedy, or drawn by a `Sampling` each."""

    def score(
        self, pairs: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[int, tuple[float | None, int]]]:
        """(sum of natural-log likelihoods of the target's tokens, their number) of each
        (context, target); None and 0 of one that is too long for it."""

    def peak_rss_gb(self) -> float:
        """Peak memory of all its processes together, in GB of 10^9 bytes."""


class Checkpoint:
    """The base model, with an adapter merged in where there is one, without quantisation."""

    def __init__(self, config: Config, adapter: Path | None):
        self._use(config.prompt, config.evaluate, *merged.load_merged(config, adapter))

    @classmethod
    def merged(cls, model_dir: Path, prompt: Prompt) -> Checkpoint:
        """A merged model's directory, on the CPU."""
        from transformers import AutoTokenizer

        model = merged.for_measuring(merged.load_stored(model_dir))
        self = cls.__new__(cls)
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        self._use(prompt, EvaluateSection(), model, tokenizer)
        return self

    def _use(self, prompt: Prompt, section: EvaluateSection, model: Any, tokenizer: Any) -> None:
        self.prompt, self.batch_size = prompt, section.batch_size
        self.row_tokens = row_tokens(section)
        self.model, self.tokenizer = model, tokenizer
        self.vocabulary = self.model.config.get_text_config().vocab_size
        # Batches that are computed at a time. Weights in 16 bit become float32 once a batch.
        one = self.model.device.type != "cpu" or self.model.dtype.itemsize == 2
        self.lanes = 1 if one else min(limits.cores(), 4)
        vocabulary = self.tokenizer.get_vocab()
        self.stop_ids = [vocabulary[token] for token in self.prompt.stop_tokens]

    def peak_rss_gb(self) -> float:
        return machine.peak_rss_gb()

    def _side_by_side(
        self, batches: list[list[int]], work: Callable[[list[int]], Iterator[Any]]
    ) -> Iterator[Any]:
        """What `work` yields for each batch; on a CPU a batch per core (at most 4) at a time.

        Threads that share one batch wait for each other after each of a thousand small operations
        a step, and beside another busy process wait several times as long as they work. Threads
        with a batch each hardly wait; they share the model.
        """
        import torch

        threads = torch.get_num_threads()
        lanes = min(self.lanes, len(batches))
        if lanes < 2:
            for batch in batches:
                yield from in_halves(batch, work)
            return
        todo: deque[list[int]] = deque([*batches, *([] for _ in range(lanes))])
        results: SimpleQueue[Any] = SimpleQueue()

        def run() -> None:
            try:
                torch.set_num_threads(max(1, threads // lanes))  # of this thread only
                for batch in iter(todo.popleft, []):
                    for result in work(batch):
                        results.put(result)
                results.put(None)
            except BaseException as error:
                results.put(error)

        for _ in range(lanes):
            threading.Thread(target=run, daemon=True).start()
        try:
            while lanes:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    lanes -= 1
                else:
                    yield result
        finally:
            todo.clear()
            torch.set_num_threads(threads)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        samplings: Sequence[Sampling] | None = None,
    ) -> Iterator[tuple[int, Generated]]:
        encoded = [models.encode(self.tokenizer, prompt) for prompt in prompts]
        # In equal batches, so that no core idles, but for long prompts.
        rounds = -(-len(encoded) // (self.batch_size * self.lanes))
        size = max(1, -(-len(encoded) // max(1, rounds * self.lanes)))
        batches = grouped([len(ids) + max_new_tokens for ids in encoded], size, self._room())

        def work(batch: list[int]) -> Iterator[tuple[int, Generated]]:
            begin = time.monotonic()
            drawn = [samplings[i] for i in batch] if samplings else None
            own = [encoded[i] for i in batch]
            for row, ids in self._generate_batch(own, max_new_tokens, drawn):
                stopped = ids[-1] in self.stop_ids
                text = self.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
                seconds = time.monotonic() - begin
                yield batch[row], Generated(text.strip(), len(ids), stopped, seconds)

        return self._side_by_side(batches, work)

    def _room(self) -> int:
        """Tokens of keys and values that a batch may have: on a GPU in half of what is free, since
        the activations of the prompts come beside them."""
        import torch

        room = self.batch_size * self.row_tokens
        if self.model.device.type != "cuda":
            return room
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        return min(room, free // 2 // cache_bytes(self.model.config, self.model.dtype.itemsize))

    def _generate_batch(
        self,
        encoded: list[list[int]],
        max_new_tokens: int,
        samplings: Sequence[Sampling] | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """(row, new ids with the stop token) of prompts, each when it ends.

        Transformers' `generate` computes every row until the last one has ended; here rows that
        have ended leave the batch.
        """
        import torch
        from transformers import DynamicCache

        device, length = self.model.device, max(map(len, encoded))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (length - len(e)) + e for e in encoded], device=device)
        mask = torch.tensor(
            [[0] * (length - len(e)) + [1] * len(e) for e in encoded], device=device
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        stops = torch.tensor(self.stop_ids, device=device)
        # A row's draws are its own, whatever batch it is in.
        draws = [(own, torch.Generator().manual_seed(own.drawn_seed())) for own in samplings or ()]
        if all(own.greedy for own, _ in draws):
            draws = []
        cache = DynamicCache(config=self.model.config)
        written: list[list[int]] = [[] for _ in encoded]
        live = list(range(len(encoded)))
        for step in range(max_new_tokens):
            with torch.inference_mode():
                output = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                ids = output.logits[:, -1:].argmax(-1)
                if draws:
                    drawn = zip((draws[row] for row in live), output.logits[:, -1], strict=True)
                    chosen = [[own.draw(row, generator)] for (own, generator), row in drawn]
                    ids = torch.tensor(chosen, device=device)
                goes_on = ~torch.isin(ids[:, 0], stops)
            for row, token, more in zip(live, ids[:, 0].tolist(), goes_on.tolist(), strict=True):
                written[row].append(token)
                if not more or step + 1 == max_new_tokens:
                    yield row, written[row]
            if not goes_on.any() or step + 1 == max_new_tokens:
                return
            with torch.inference_mode():
                positions = positions[:, -1:] + 1
                if not goes_on.all():
                    kept = goes_on.nonzero()[:, 0]
                    live = [live[i] for i in kept.tolist()]
                    ids, mask, positions = ids[kept], mask[kept], positions[kept]
                    cache.batch_select_indices(kept)
                mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)

    def score(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, tuple[float, int]]]:
        import torch

        encoded = [[models.encode(self.tokenizer, part) for part in pair] for pair in pairs]
        lengths = [len(before) + len(after) for before, after in encoded]
        batches = self._of_one_context(encoded)
        alone = set(range(len(encoded))).difference(*batches)
        order = sorted(alone, key=lambda i: -lengths[i])
        while order:
            most = max(1, LOGITS_PER_BATCH // (lengths[order[0]] * self.vocabulary))
            # Padding is computed too: no text that is much shorter.
            batch = [i for i in order[:most] if lengths[i] > 0.8 * lengths[order[0]]]
            batches.append(batch)
            order = order[len(batch) :]

        def work(batch: list[int]) -> Iterator[tuple[int, tuple[float, int]]]:
            if batch[0] not in alone:
                yield from self._score_options(batch, encoded)
                return
            length = lengths[batch[0]]
            # Padding is on the right, where causal attention does not look: no mask is needed.
            sequences = [encoded[i][0] + encoded[i][1] for i in batch]
            ids = torch.tensor([s + [0] * (length - len(s)) for s in sequences])
            ids = ids.to(self.model.device)
            # Position i predicts token i + 1: the last context token predicts the first target.
            first = min(len(encoded[i][0]) for i in batch) - 1
            with torch.inference_mode():
                logits = self.model(ids, use_cache=False, logits_to_keep=length - first).logits
                logits = logits[:, :-1].float()
                chosen = logits.gather(-1, ids[:, first + 1 :, None])[..., 0] - logits.logsumexp(-1)
            for row, index in enumerate(batch):
                before, after = map(len, encoded[index])
                begin = before - 1 - first
                yield index, (float(chosen[row, begin : begin + after].double().sum()), after)

        return self._side_by_side(batches, work)

    @staticmethod
    def _of_one_context(encoded: list[list[list[int]]]) -> list[list[int]]:
        """Pairs that share a context which is longer than their targets, as questions with options
        do: computing it once for all of them saves most of the work."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (before, _) in enumerate(encoded):
            groups.setdefault(tuple(before), []).append(index)
        return [
            group
            for context, group in groups.items()
            if len(group) > 1 and len(context) > max(len(encoded[i][1]) for i in group)
        ]

    def _score_options(
        self, batch: list[int], encoded: list[list[list[int]]]
    ) -> Iterator[tuple[int, tuple[float, int]]]:
        """`score` of targets after one context, which goes through the model once."""
        import torch
        from transformers import DynamicCache

        device = self.model.device
        sizes = [len(encoded[i][1]) for i in batch]
        longest = max(sizes)
        # Padding is on the right, where causal attention does not look: no mask is needed.
        ids = torch.tensor(
            [encoded[i][1] + [0] * (longest - len(encoded[i][1])) for i in batch], device=device
        )
        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            logits = self.model(
                torch.tensor([encoded[batch[0]][0]], device=device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits.expand(len(batch), -1, -1)
            if longest > 1:
                cache.batch_repeat_interleave(len(batch))
                rest = self.model(ids[:, :-1], past_key_values=cache, use_cache=True).logits
                logits = torch.cat([logits, rest], 1)
            logits = logits.float()
            chosen = logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
        for row, index in enumerate(batch):
            yield index, (float(chosen[row, : sizes[row]].double().sum()), sizes[row])


def row_tokens(section: EvaluateSection) -> int:
    """Tokens that a row of a batch has room for on average: a question as long as a text, and its
    answer. Batches of longer rows have fewer of them (`grouped`)."""
    return section.max_text_tokens + section.max_new_tokens


def grouped(lengths: Sequence[int], rows: int, tokens: int) -> list[list[int]]:
    """Rows by their places, longest first, so that too little memory shows at once: in batches of
    at most `rows`, and of at most `tokens` once they are padded, but of one row at least."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = []
    while order:
        most = max(1, min(rows, tokens // max(1, lengths[order[0]])))
        batches.append(order[:most])
        order = order[most:]
    return batches


def in_halves(
    batch: list[int], work: Callable[[list[int]], Iterator[tuple[int, Any]]]
) -> Iterator[tuple[int, Any]]:
    """What `work` yields for a batch; in halves where a GPU's memory does not suffice for it.

    Rows that were done before it ran out are not done again. Raises OutOfMemoryError where one row
    is too much.
    """
    import torch

    todo = [batch]
    while todo:
        part = todo.pop()
        done: set[int] = set()
        try:
            for place, result in work(part):
                done.add(place)
                yield place, result
            continue
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        # Out here nothing refers to what the batch took any more.
        torch.cuda.empty_cache()
        left = [place for place in part if place not in done]
        half = -(-len(left) // 2)
        todo += filter(None, (left[half:], left[:half]))


def require_gpu_memory(architecture: Any, longest: int) -> None:
    """Raise UserError where a GPU will be used and has no room for the model and its longest row.

    Larger batches are cut to what is free once the model is there (`Checkpoint`).
    """
    import torch

    if not torch.cuda.is_available():
        return
    size = models.choose_dtype("auto", architecture.model_type)[0].itemsize
    weights = size * models.count_parameters(architecture)
    # Logits, in float32, and what their softmax takes.
    needed = weights + longest * cache_bytes(architecture, size) + 3 * 4 * LOGITS_PER_BATCH
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        raise UserError(
            f"evaluating needs about {needed / 1e9:.1f} GB of the GPU's memory, and "
            f"{free / 1e9:.1f} GB is free. Close other programs on it, or measure on the CPU, with "
            "CUDA_VISIBLE_DEVICES= before the same command."
        )


def cache_bytes(architecture: Any, itemsize: int = 4) -> int:
    """Bytes of the keys and values of a token."""
    text = architecture.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return text.num_hidden_layers * 2 * heads * width * itemsize


def expected_memory(
    config: Config, architecture: Any, bundle: Path | None, longest: int = 0
) -> tuple[int, int]:
    """(bytes of host memory that must be free to evaluate, bytes that a process shows beside them).

    With batches as full as the settings allow, and the longest row, which is never cut. What comes
    beside are pages of the base model's files, which the kernel drops when memory is short.

    Args:
        config: `evaluate` says how many rows of which length a batch has.
        architecture: the base model's transformers config; None where only a bundle is measured.
        bundle: the bundle that is measured, too.
        longest: tokens of the longest row, its answer included.
    """
    import torch

    needed = 0
    if bundle is not None:
        needed = sum(bundle_memory(bundle.stat().st_size)) + 300_000_000
    if architecture is None:
        return needed, 0
    parameters = models.count_parameters(architecture)
    if torch.cuda.is_available():
        needed = max(needed, 1_000_000_000 + 5 * parameters // 2)  # merged here, measured there
        return needed, 2 * parameters
    section = config.evaluate
    lanes = 1 if merged.keeps_16_bit(parameters) else min(limits.cores(), 4)
    # Keys and values in float32.
    tokens = lanes * max(section.batch_size * row_tokens(section), longest)
    cache = tokens * cache_bytes(architecture)
    logits = lanes * 4 * LOGITS_PER_BATCH
    return max(needed, merged.measuring_memory(parameters, cache, logits)), 2 * parameters


class DeviceBundle:
    """A `.task` or `.litertlm` file in LiteRT-LM, in several processes.

    Rows that its KV cache of `room` tokens is too small for are not answered: an empty answer that
    did not end, and no score.
    """

    def __init__(self, workers: Any, room: int):
        self.workers, self.room = workers, room

    def peak_rss_gb(self) -> float:
        return round(machine.peak_rss_gb() + self.workers.peak_rss_gb, 3)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        samplings: Sequence[Sampling] | None = None,
    ) -> Iterator[tuple[int, Generated]]:
        answers = self.workers.generate(prompts, max_new_tokens, self.room, samplings)
        for index, answer in answers:
            text = answer.text.strip()
            yield index, Generated(text, answer.tokens, answer.stopped, answer.seconds)

    def score(
        self, pairs: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[int, tuple[float | None, int]]]:
        return self.workers.score(pairs, self.room)


@contextmanager
def open_answerer(config: Config, path: Path | None) -> Iterator[Answerer]:
    """The base model (None), a stage directory or a bundle, loaded once and freed at the end."""
    if path is None or path.is_dir():
        yield Checkpoint(config, path)
    else:
        from liteguard.runtime.workers import BundleWorkers

        record = records.read(BundleRecord, path.with_name(f"{path.name}.json"))
        yield DeviceBundle(BundleWorkers(path), record.cache_length)
