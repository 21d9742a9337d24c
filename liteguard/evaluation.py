"""The same measurements for a checkpoint and for a bundle, on the same held-out rows."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, Self

from liteguard import (
    catalogue,
    checkpoints,
    cleaning,
    datasets,
    knowledge,
    llm_judge,
    machine,
    merged,
    metrics,
    models,
)
from liteguard.config import Config
from liteguard.errors import UserError
from liteguard.prompts import Prompt
from liteguard.runtime import bundle_memory
from liteguard.training import balanced

# Kinds of requests: to be refused, plain ones, and ones that only look harmful.
REQUESTS = ("harmful", "ordinary", "borderline")
# Sets of questions with reference answers, and what the names of their numbers begin with.
TIERS = {"questions": "", "seen_questions": "seen_"}
# What of its data a stage trains on.
TRAINED_ON = {
    "domain": "domain/train.jsonl",
    "instruction": "instruction/train.jsonl",
    "safety": "preference/train.jsonl",
}
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
        self, prompts: Sequence[str], max_new_tokens: int
    ) -> Iterator[tuple[int, Generated]]:
        """Greedy answers to rendered prompts."""

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
        self._use(config.prompt, config.evaluate.batch_size, *merged.load_merged(config, adapter))

    @classmethod
    def merged(cls, model_dir: Path, prompt: Prompt) -> Checkpoint:
        """A merged model's directory, on the CPU."""
        from transformers import AutoTokenizer

        model = merged.for_measuring(merged.load_stored(model_dir))
        self = cls.__new__(cls)
        self._use(prompt, 16, model, AutoTokenizer.from_pretrained(model_dir))
        return self

    def _use(self, prompt: Prompt, batch_size: int, model: Any, tokenizer: Any) -> None:
        self.prompt, self.batch_size = prompt, batch_size
        self.model, self.tokenizer = model, tokenizer
        self.vocabulary = self.model.config.get_text_config().vocab_size
        # Batches that are computed at a time. Weights in 16 bit become float32 once a batch.
        one = self.model.device.type != "cpu" or self.model.dtype.itemsize == 2
        self.lanes = 1 if one else min(os.cpu_count() or 1, 4)
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
                yield from work(batch)
            return
        todo, results = deque([*batches, *[()] * lanes]), SimpleQueue()

        def run() -> None:
            try:
                torch.set_num_threads(max(1, threads // lanes))  # of this thread only
                for batch in iter(todo.popleft, ()):
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
        self, prompts: Sequence[str], max_new_tokens: int
    ) -> Iterator[tuple[int, Generated]]:
        encoded = [models.encode(self.tokenizer, prompt) for prompt in prompts]
        # Longest first: too little memory shows at once. In equal batches, so that no core idles.
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        rounds = -(-len(order) // (self.batch_size * self.lanes))
        size = max(1, -(-len(order) // max(1, rounds * self.lanes)))
        batches = [order[start : start + size] for start in range(0, len(order), size)]

        def work(batch: list[int]) -> Iterator[tuple[int, Generated]]:
            begin = time.monotonic()
            for row, ids in self._generate_batch([encoded[i] for i in batch], max_new_tokens):
                stopped = ids[-1] in self.stop_ids
                text = self.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
                seconds = time.monotonic() - begin
                yield batch[row], Generated(text.strip(), len(ids), stopped, seconds)

        return self._side_by_side(batches, work)

    def _generate_batch(
        self, encoded: list[list[int]], max_new_tokens: int
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
        shared = {tuple(batch) for batch in batches}
        alone = set(range(len(encoded))).difference(*batches)
        order = sorted(alone, key=lambda i: -lengths[i])
        while order:
            most = max(1, LOGITS_PER_BATCH // (lengths[order[0]] * self.vocabulary))
            # Padding is computed too: no text that is much shorter.
            batch = [i for i in order[:most] if lengths[i] > 0.8 * lengths[order[0]]]
            batches.append(batch)
            order = order[len(batch) :]

        def work(batch: list[int]) -> Iterator[tuple[int, tuple[float, int]]]:
            if tuple(batch) in shared:
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


def expected_memory(config: Config, architecture: Any, bundle: Path | None) -> tuple[int, int]:
    """(bytes of host memory that must be free to evaluate, bytes that a process shows beside them).

    At the longest rows that the settings allow. What comes beside are pages of the base model's
    files, which the kernel drops when memory is short.

    architecture: the base model's transformers config, or None where only a `bundle` is measured.
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
    section, text = config.evaluate, architecture.get_text_config()
    lanes = 1 if merged.keeps_16_bit(parameters) else min(os.cpu_count() or 1, 4)
    width = text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    # Keys and values in float32; a question is about as long as a text.
    tokens = lanes * section.batch_size * (section.max_text_tokens + section.max_new_tokens)
    cache = tokens * text.num_hidden_layers * 2 * heads * width * 4
    logits = lanes * 4 * LOGITS_PER_BATCH
    return max(needed, merged.measuring_memory(parameters, cache, logits)), 2 * parameters


class DeviceBundle:
    """A `.task` or `.litertlm` file in LiteRT-LM, greedy, in several processes.

    Rows that its KV cache of `room` tokens is too small for are not answered: an empty answer that
    did not end, and no score.
    """

    def __init__(self, workers: Any, room: int):
        self.workers, self.room = workers, room

    def peak_rss_gb(self) -> float:
        return round(machine.peak_rss_gb() + self.workers.peak_rss_gb, 3)

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int
    ) -> Iterator[tuple[int, Generated]]:
        for index, answer in self.workers.generate(prompts, max_new_tokens, self.room):
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
        from liteguard.runtime import BundleWorkers

        record = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
        yield DeviceBundle(BundleWorkers(path), record["inputs"]["compress.kv_cache_length"])


def held_out(
    config: Config, data_dir: Path, everything: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """The rows every model is measured on: test splits only, the same ones for every model.

    "questions" are tier 2: no stage saw anything about their disease (or, where rows name no
    disease, their wording). "seen_questions" are tier 1: texts about the disease were trained on,
    no question about it was; there are none in the validation split.

    "knowledge" are tier 3: questions of public benchmarks.

    `everything`: all rows of the split, instead of as many as the `evaluate` section says; among
    the ordinary requests then are those about diseases of tier 1, too.
    """
    section = config.evaluate
    wanted = None if everything and section.knowledge_rows else section.knowledge_rows
    benchmarks = {"knowledge": knowledge.rows(Path(config.data.cache_dir), wanted)}
    preferences = datasets.load_split(data_dir, "preference", section.split)
    if not everything:
        preferences = [row for row in preferences if row.get("tier") != "seen"]
    by_kind = {
        kind: balanced([r for r in preferences if r.get("kind") == kind], "area", len(preferences))
        for kind in REQUESTS
    }
    if not by_kind["harmful"] or not by_kind["ordinary"]:
        raise UserError(
            f"{data_dir}: the preference {section.split} split has {len(by_kind['harmful'])} rows "
            f"of kind 'harmful' and {len(by_kind['ordinary'])} of kind 'ordinary'; both are needed "
            "to measure refusals. Add safety_catalogue to data.preference."
        )
    # Refusals among the instruction rows are measured as refusals, not by overlap of words.
    questions: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for row in datasets.load_split(data_dir, "instruction", section.split):
        if row.get("kind") != "refusal":
            questions[row.get("tier") == "seen"].append(row)
    texts = datasets.load_split(data_dir, "domain", section.split)
    if everything:
        return {
            "texts": texts,
            "questions": questions[False],
            "seen_questions": questions[True],
            **by_kind,
            **benchmarks,
        }
    seen_rows = section.seen_question_rows
    seen_rows = section.question_rows if seen_rows is None else seen_rows
    return {
        "texts": texts[: section.perplexity_rows],
        "questions": balanced(questions[False], "kind", section.question_rows),
        "seen_questions": balanced(questions[True], "kind", seen_rows),
        "harmful": by_kind["harmful"][: section.harmful_rows],
        "ordinary": by_kind["ordinary"][: section.benign_rows],
        "borderline": by_kind["borderline"][: section.benign_rows],
        **benchmarks,
    }


def training_data(data_dir: Path, record: dict[str, Any] | None) -> tuple[list[Path], list[str]]:
    """Prepared data that the stages of a model saw, and what of it cannot be looked at any more.

    Goes from `record` (of a stage or a bundle; None: the base model) through the records of its
    parents. Returns the directories, `data_dir` first and each with other train splits, and the
    files that are gone or were made anew since a stage was trained on them.
    """
    directories, known, unchecked = [data_dir], [train_files(data_dir)], []
    while record:
        if record["stage"] in TRAINED_ON:
            name, digest = TRAINED_ON[record["stage"]], record["inputs"]["data/train"]
            own = Path(record["data_dir"])
            if all(files.get(name) != digest for files in known):
                files = train_files(own) if (own / "manifest.json").is_file() else {}
                if files.get(name) == digest:
                    directories.append(own)
                    known.append(files)
                else:
                    unchecked.append(f"{own / name} ({record['stage']} stage)")
        path = record["parent"]
        adapter = record.get("parent_adapter_sha256") or record["inputs"].get("adapter")
        record = None
        if path:
            try:
                record = checkpoints.read_stage(Path(path))
            except UserError:
                unchecked.append(f"what {path} was trained on")
            else:
                if record["files"].get("adapter_model.safetensors") != adapter:
                    unchecked.append(f"what an earlier {path} was trained on")
    return directories, unchecked


def train_files(data_dir: Path) -> dict[str, str]:
    """Train splits of prepared data and their sha256."""
    files = datasets.read_manifest(data_dir)["files"]
    return {name: digest for name, digest in files.items() if name.endswith("train.jsonl")}


def contamination(
    rows: dict[str, list[dict[str, Any]]],
    measured: dict[str, list[dict[str, Any]]],
    training_dirs: Sequence[Path],
) -> dict[str, Any]:
    """Which held-out rows stand in training data, by the rules of preparation.

    A question is contaminated when a training row has the same one, or 13 words in a row of it; a
    domain text when a training text does (answers are made from texts about the same diseases, so
    they are not compared). A public benchmark's question also when a training row holds the whole
    of it, from 6 words on, or 13 words of the abstract that goes with it. The overlap rule is that
    of the GPT-3 paper, without set phrases.

    Args:
        rows: every row of the split, so that set phrases are known as such.
        measured: those of them that models are measured on.
        training_dirs: prepared data whose train splits the models saw.

    Returns {"rows", "training_rows", "found": contaminated rows, "measured": those among them
    that numbers were computed on, "by_set", "examples": up to 5 [set, question or text]}.
    """
    import numpy as np

    held = [(name, row) for name, found in rows.items() for row in found]
    exact: dict[str, list[int]] = {}
    # (from a domain text?, words in a window) -> [(row, its windows)]
    looked_for: dict[tuple[bool, int], list[tuple[int, np.ndarray]]] = {}
    for number, (name, row) in enumerate(held):
        shortest = cleaning.SHORTEST_WINDOW if name == "knowledge" else cleaning.OVERLAP_WORDS
        for text in filter(None, (row.get("text") or row["prompt"], row.get("context"))):
            key = datasets.match_key(text)
            exact.setdefault(key, []).append(number)
            words = key.split()
            size = min(len(words), cleaning.OVERLAP_WORDS)
            if size >= shortest:
                own = cleaning.windows(cleaning.word_numbers(words), size)
                looked_for.setdefault((name == "texts", size), []).append((number, own))
    known = {}
    for kind, found in looked_for.items():
        hashes, origin = cleaning.distinctive([own for _, own in found], kind[1])
        known[kind] = hashes, np.array([number for number, _ in found], int)[origin]
    hit: set[int] = set()
    training_rows = 0
    for directory in training_dirs:
        for part, fields in datasets.FIELDS.items():
            words = []
            for row in datasets.load_split(directory, part, "train"):
                training_rows += 1
                keys = [datasets.match_key(row[field]) for field in fields[:2]]
                hit.update(exact.get(keys[0], ()))
                for key in keys:
                    words += [*key.split(), ""]
            numbers = cleaning.word_numbers(words)
            for (is_text, size), (hashes, origin) in known.items():
                if part == "domain" or not is_text:
                    hit.update(origin[np.isin(hashes, cleaning.windows(numbers, size))].tolist())
    found = [(name, row.get("text") or row["prompt"]) for name, row in map(held.__getitem__, hit)]
    used = {(name, r.get("text") or r["prompt"]) for name, own in measured.items() for r in own}
    found.sort(key=lambda entry: (entry not in used, entry))
    return {
        "rows": len(held),
        "training_rows": training_rows,
        "found": len(found),
        "measured": sum(entry in used for entry in found),
        "by_set": {name: sum(n == name for n, _ in found) for name in rows},
        "examples": [list(entry) for entry in found[:5]],
    }


def split_text(text: str, context_words: int, max_words: int) -> tuple[str, str] | None:
    """(context, target) of a text: the first words are given, the rest is scored.

    The cut is before a blank, where a byte-level BPE never joins tokens, so the ids of both parts
    are those of the whole. None for a text with nothing left to score.
    """
    words = text.split(" ")
    if len(words) <= context_words:
        return None
    return " ".join(words[:context_words]), " " + " ".join(words[context_words:max_words])


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

    # "scores" of texts, "options" of multiple choice, "answers", what an LLM "judged" of them, and
    # facts about "runs".
    PARTS = ("runs", "scores", "options", "answers", "judged")

    def __init__(self, path: Path, inputs: dict[str, Any]):
        self.path = path
        self.found: dict[str, dict[int, Any]] = {part: {} for part in self.PARTS}
        self.seconds = dict.fromkeys(self.PARTS, 0.0)
        header = self._header(inputs)
        kept = header
        content = path.read_bytes() if path.is_file() else b""
        if content.startswith(header):
            for line in content[len(header) :].splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                part, index, value, seconds = json.loads(line)
                self.found[part][index] = value
                self.seconds[part] += seconds
                kept += line
        elif content:
            print(f"  {path} was begun from other inputs: starting over")
        self._file = path.open("r+b" if content else "wb")
        if kept == header:
            self._file.write(header)
        self._file.seek(len(kept))
        self._file.truncate()

    @staticmethod
    def _header(inputs: dict[str, Any]) -> bytes:
        return json.dumps({"inputs": inputs}, sort_keys=True, default=str).encode() + b"\n"

    @classmethod
    def begun_from_others(cls, path: Path, inputs: dict[str, Any]) -> bool:
        """Whether a file holds results of other inputs, which opening it would drop."""
        content = path.read_bytes() if path.is_file() else b""
        return content.count(b"\n") > 1 and not content.startswith(cls._header(inputs))

    def add(self, part: str, index: int, value: Any, seconds: float = 0.0) -> None:
        """Append result `index` of a part, which took so many seconds."""
        self.found[part][index] = value
        self.seconds[part] += seconds
        line = json.dumps([part, index, value, round(seconds, 4)], ensure_ascii=False)
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
        self.path.unlink()


class Progress:
    """A bar on a terminal; elsewhere a line at most every 15 seconds. Tokens/s in both."""

    EVERY_S = 15.0

    def __init__(self, what: str, total: int, done: int = 0):
        from tqdm import tqdm

        self.what, self.total, self.done, self.tokens = what, total, done, 0
        self.started = self.printed = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=f"  {what}",
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
            dynamic_ncols=True,
        )

    def add(self, tokens: int) -> None:
        """One more is done, with so many tokens."""
        self.done, self.tokens = self.done + 1, self.tokens + tokens
        now = time.monotonic()
        speed = f"{self.tokens / max(now - self.started, 1e-9):.0f} tokens/s"
        if not self.bar.disable:
            self.bar.set_postfix_str(speed, refresh=False)
            self.bar.update()
        elif self.done == self.total or now - self.printed >= self.EVERY_S:
            print(f"  {self.what} {self.done}/{self.total}, {speed}", flush=True)
            self.printed = now

    def close(self) -> None:
        self.bar.close()


def collect(
    open_model: Callable[[], AbstractContextManager[Answerer]],
    config: Config,
    rows: dict[str, list[dict[str, Any]]],
    journal: Journal,
) -> None:
    """Score the texts and options and answer the questions that the journal does not have yet."""
    pairs = {"scores": text_pairs(config, rows), "options": knowledge.pairs(rows["knowledge"])}
    prompts = [config.prompt.render_question(row["prompt"]) for _, row in requests(rows)]
    totals = {**{part: len(found) for part, found in pairs.items()}, "answers": len(prompts)}
    todo = {
        part: [i for i in range(total) if i not in journal.found[part]]
        for part, total in totals.items()
    }
    known = {part: totals[part] - len(missing) for part, missing in todo.items()}
    if any(known.values()):
        options = f", {known['options']} of {totals['options']} options" if pairs["options"] else ""
        print(
            f"  continuing: {known['scores']} of {totals['scores']} texts{options} and "
            f"{known['answers']} of {totals['answers']} answers are in {journal.path}"
        )
    if not any(todo.values()):
        return
    release_memory()
    begin = time.monotonic()
    with open_model() as model:
        journal.add_run(time.monotonic() - begin)
        for part, what in (("scores", "texts scored"), ("options", "options scored")):
            if todo[part]:
                results = model.score([pairs[part][i] for i in todo[part]])
                scores = ((place, list(score), score[1]) for place, score in results)
                journalled(journal, part, what, totals[part], todo[part], scores)
                journal.add_run(peak_rss_gb=model.peak_rss_gb())
        if todo["answers"]:
            limit = config.evaluate.max_new_tokens
            results = model.generate([prompts[i] for i in todo["answers"]], limit)
            answers = ((place, vars(answer), answer.tokens) for place, answer in results)
            journalled(journal, "answers", "answers", totals["answers"], todo["answers"], answers)
            journal.add_run(peak_rss_gb=model.peak_rss_gb())


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


def cost(journal: Journal) -> dict[str, Any]:
    """What measuring a model took, over all runs of a journal.

    Seconds and tokens of loading, scoring texts ("scoring_s", "scored_tokens") and options,
    answering ("generation_s", "generated_tokens"), and judging; "wall_s" is their sum. Results that
    were not journaled before a run was killed are not in it. "peak_rss_gb" is the largest of the
    runs', GB of 10^9 bytes. "answer_s": {percentile: seconds until an answer was complete}.
    """
    import numpy as np

    found, seconds = journal.found, journal.seconds
    parts = {"runs": "loading_s", "scores": "scoring_s", "options": "options_s"}
    parts |= {"answers": "generation_s", "judged": "judging_s"}
    answers = [answer["seconds"] for answer in found["answers"].values()]
    return {
        **{name: round(seconds[part], 3) for part, name in parts.items()},
        "scored_tokens": sum(tokens for _, tokens in found["scores"].values()),
        "option_tokens": sum(tokens for _, tokens in found["options"].values()),
        "generated_tokens": sum(answer["tokens"] for answer in found["answers"].values()),
        "wall_s": round(sum(seconds.values()), 2),
        "peak_rss_gb": max(run.get("peak_rss_gb", 0.0) for run in found["runs"].values()),
        "answer_s": {
            str(percentile): round(float(np.percentile(answers, percentile)), 3)
            for percentile in (5, 25, 50, 75, 95)
        },
    }


def ask_judge(config: Config, rows: dict[str, list[dict[str, Any]]], journal: Journal) -> None:
    """Have the LLM of `evaluate.llm_judge` judge every answer to a request that it has not yet."""
    section = config.evaluate.llm_judge
    if section is None:
        return
    asked = {
        index: row["prompt"]
        for index, (name, row) in enumerate(requests(rows))
        if name in REQUESTS and index not in journal.found["judged"]
    }
    judge = llm_judge.Judge(section)
    todo = [(prompt, journal.found["answers"][index]["text"]) for index, prompt in asked.items()]
    total = sum(name in REQUESTS for name, _ in requests(rows))
    given = judge.ask(todo, accepted=bool(journal.found["judged"]))
    replies = ((place, vars(reply), reply.tokens) for place, reply in given)
    journalled(journal, "judged", "answers judged", total, list(asked), replies)


def release_memory() -> None:
    """Give back what the last model took; glibc would keep it for a next one."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def text_pairs(config: Config, rows: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    """(context, target) of every domain text that has something to score."""
    section = config.evaluate
    # An English word is 1.3 to 2 tokens here; the cap keeps long texts from dominating.
    max_words = section.context_words + section.max_text_tokens // 2
    parts = (split_text(row["text"], section.context_words, max_words) for row in rows["texts"])
    return [pair for pair in parts if pair]


def requests(rows: dict[str, list[dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """(set, row) of everything that is answered."""
    return [(name, row) for name in (*TIERS, *REQUESTS) for row in rows[name]]


def summarise(
    config: Config, rows: dict[str, list[dict[str, Any]]], journal: Journal
) -> dict[str, Any]:
    """The numbers of one model, with 95 % intervals and every answer it gave.

    Rates are shares between 0 and 1; `n` counts what each number was computed over; `intervals`
    holds (low, high) of each, by Wilson's formula for rates and by bootstrap over rows otherwise.
    """
    import numpy as np

    pairs = text_pairs(config, rows)
    options = sum(len(row["options"]) for row in rows["knowledge"])
    sums, tokens = zip(*(journal.found["scores"][i] for i in range(len(pairs))), strict=True)
    if None in sums:
        raise UserError(
            f"{sums.count(None)} of {len(sums)} domain texts do not fit the bundle's KV cache. "
            "Lower evaluate.max_text_tokens and evaluate.context_words, for all models alike."
        )
    sizes = [len(target.encode()) for _, target in pairs]
    answers = []
    for index, (name, row) in enumerate(requests(rows)):
        given = journal.found["answers"][index]
        verdict = metrics.judge(given["text"])
        judged = journal.found["judged"].get(index)
        answers.append(
            {
                **({"llm_verdict": judged["verdict"]} if judged else {}),
                "set": name,
                "kind": row.get("kind"),
                "area": row.get("area"),
                "prompt": row["prompt"],
                "answer": given["text"],
                "tokens": given["tokens"],
                "stopped": given["stopped"],
                "refused": verdict == "refused",
                "verdict": verdict,
                "repeats": metrics.repeats_itself(given["text"]),
                "reference": row.get("completion") or row.get("chosen"),
            }
        )

    by_set = {name: [a for a in answers if a["set"] == name] for name in (*TIERS, *REQUESTS)}
    words = [len(a["answer"].split()) for a in answers]
    tiers = [answer_overlap(by_set[name], prefix) for name, prefix in TIERS.items()]
    rates = {  # name -> (answers, key that is true or not)
        "questions_stopped": (by_set["questions"], "stopped"),
        "seen_questions_stopped": (by_set["seen_questions"], "stopped"),
        "refused_harmful": (by_set["harmful"], "refused"),
        "refused_benign": (by_set["ordinary"], "refused"),
        "refused_borderline": (by_set["borderline"], "refused"),
        "stopped": (answers, "stopped"),
        "repeated": (answers, "repeats"),
    }
    hits = {name: (sum(a[key] for a in given), len(given)) for name, (given, key) in rates.items()}
    return {
        "perplexity": metrics.perplexity(sum(sums), sum(tokens)),
        "bits_per_byte": metrics.bits_per_byte(sum(sums), sum(sizes)),
        **{name: value for tier in tiers for name, (value, _, _) in tier.items()},
        **{name: hit / count for name, (hit, count) in hits.items() if count},
        "answer_words": sum(words) / len(words),
        "n": {
            "perplexity": len(pairs),
            "perplexity_tokens": sum(tokens),
            "bits_per_byte": len(pairs),
            **{name: count for tier in tiers for name, (_, count, _) in tier.items()},
            **{name: count for name, (_, count) in hits.items()},
            "answer_words": len(words),
        },
        "intervals": {
            "perplexity": metrics.ratio_interval(sums, tokens, lambda mean: np.exp(-mean)),
            "bits_per_byte": metrics.ratio_interval(sums, sizes, lambda mean: -mean / np.log(2)),
            **{name: interval for tier in tiers for name, (_, _, interval) in tier.items()},
            **{name: metrics.wilson(*counts) for name, counts in hits.items()},
            "answer_words": metrics.mean_interval(words),
        },
        "verdicts": {name: verdicts(by_set[name]) for name in REQUESTS},
        "areas": {
            name: {
                area: verdicts([a for a in by_set[name] if a["area"] == area])
                for area in sorted({str(a["area"]) for a in by_set[name] if a["area"]})
            }
            for name in REQUESTS
        },
        "guide_areas": {
            area: verdicts([a for a in by_set["harmful"] if guide_area(a["area"]) == area])
            for area in (*catalogue.GUIDE_AREAS, catalogue.OTHER)
        },
        "knowledge": knowledge.summarise(
            rows["knowledge"], [journal.found["options"][i][0] for i in range(options)]
        ),
        **({"llm_judge": llm_judge.summarise(answers)} if journal.found["judged"] else {}),
        "bleu_signature": metrics.bleu_signature(),
        # Of a bundle: what its KV cache is too small for. Counted like answers that did not end,
        # and like wrong choices.
        "too_long": {
            "answers": sum(not (a["tokens"] or a["stopped"]) for a in answers),
            "options": sum(score is None for score, _ in journal.found["options"].values()),
        },
        "answers": answers,
    }


def guide_area(area: str | None) -> str:
    """The one of the guide's five areas that an area of harm belongs to, or OTHER."""
    for name, areas in catalogue.GUIDE_AREAS.items():
        if area in areas:
            return name
    return catalogue.OTHER


def answer_overlap(
    answers: list[dict[str, Any]], prefix: str
) -> dict[str, tuple[float, int, metrics.Interval | None]]:
    """Name -> (number, rows, 95 % interval): ROUGE, BLEU and length of answers with references.

    Names begin with `prefix`; nothing without answers.
    """
    if not answers:
        return {}
    predictions = [a["answer"] for a in answers]
    references = [a["reference"] for a in answers]
    words = [len(text.split()) for text in predictions]
    found = metrics.rouge(predictions, references)
    means = {**found, "questions_words": words}
    numbers = {
        kind: (sum(values) / len(values), metrics.mean_interval(values))
        for kind, values in means.items()
    }
    interval = metrics.bleu_interval(predictions, references)
    numbers["bleu"] = metrics.bleu(predictions, references)[0], interval
    return {f"{prefix}{k}": (value, len(answers), own) for k, (value, own) in numbers.items()}


def verdicts(answers: list[dict[str, Any]]) -> dict[str, int]:
    """How many were refused, answered and unclear."""
    return {
        verdict: sum(a["verdict"] == verdict for a in answers)
        for verdict in ("refused", "answered", "unclear")
    }
