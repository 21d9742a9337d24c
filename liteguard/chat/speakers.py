"""Who is talked to: a stage, the base model or a bundle, loaded once and answering in pieces.

Loading is the evaluation's and the runtime's own; what is new here is that an answer can be read
while it is being written. Greedy answers are those that `evaluate_model.py` measures.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from liteguard import models
from liteguard.config import Config
from liteguard.evaluation import answerers
from liteguard.prompts import Prompt
from liteguard.records import BundleRecord, Made
from liteguard.sampling import Sampling


@dataclass(frozen=True)
class Said:
    """A finished answer: its text without blanks around it, tokens, and whether the model ended it.

    `tokens` has the stop token in it; `seconds` are from the prompt to the last token.
    """

    text: str
    prompt_tokens: int
    tokens: int
    stopped: bool
    seconds: float


class Speaker(Protocol):
    """Something that answers, one question at a time."""

    name: str
    prompt: Prompt
    room: int  # tokens that prompt and answer may have together

    def count(self, rendered: str) -> int:
        """Tokens of a rendered prompt."""

    def stream(
        self, rendered: str, max_new_tokens: int, sampling: Sampling
    ) -> Generator[str, None, Said]:
        """The answer to a rendered prompt in pieces; returns the whole."""


class Pieces:
    """A growing text, given out in pieces that together are the text without blanks around it."""

    def __init__(self) -> None:
        self.given = ""

    def more(self, text: str, last: bool = False) -> str:
        """What is new in `text`. Half characters and blanks at its end wait for the `last`."""
        ready = text.strip()
        if not last:
            ready = ready.rstrip("\ufffd").rstrip()
        if not ready.startswith(self.given):
            return ""  # a tokenizer that changes its mind about earlier text
        new = ready[len(self.given) :]
        self.given = ready
        return new


class CheckpointSpeaker:
    """A checkpoint of the evaluation, whose next token may be drawn."""

    def __init__(self, name: str, checkpoint: answerers.Checkpoint, room: int) -> None:
        self.name, self.checkpoint, self.room = name, checkpoint, room
        self.prompt = checkpoint.prompt
        self._one_at_a_time = threading.Lock()

    def count(self, rendered: str) -> int:
        return len(models.encode(self.checkpoint.tokenizer, rendered))

    def stream(
        self, rendered: str, max_new_tokens: int, sampling: Sampling
    ) -> Generator[str, None, Said]:
        with self._one_at_a_time:
            return (yield from self._stream(rendered, max_new_tokens, sampling))

    def _stream(
        self, rendered: str, max_new_tokens: int, sampling: Sampling
    ) -> Generator[str, None, Said]:
        begin = time.monotonic()
        tokenizer, stops = self.checkpoint.tokenizer, self.checkpoint.stop_ids
        encoded = models.encode(tokenizer, rendered)
        written: list[int] = []
        text, pieces, stopped = "", Pieces(), False
        limit = min(max_new_tokens, self.room - len(encoded))
        for token in self._tokens(encoded, limit, sampling):
            written.append(token)
            stopped = token in stops
            if not stopped:
                text = tokenizer.decode(written, skip_special_tokens=True)
                if piece := pieces.more(text):
                    yield piece
        if piece := pieces.more(text, last=True):
            yield piece
        seconds = time.monotonic() - begin
        return Said(text.strip(), len(encoded), len(written), stopped, seconds)

    def _tokens(self, encoded: list[int], limit: int, sampling: Sampling) -> Iterator[int]:
        """New tokens, the stop token too where there is one; each is one step of the model."""
        import torch
        from transformers import DynamicCache

        model, stops = self.checkpoint.model, self.checkpoint.stop_ids
        generator = torch.Generator().manual_seed(sampling.drawn_seed())
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([encoded], device=model.device)
        for _ in range(limit):
            with torch.inference_mode():
                logits = model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                ).logits[0, -1]
                token = sampling.draw(logits, generator)
                yield token
                if token in stops:
                    return
                ids = torch.tensor([[token]], device=model.device)


class BundleSpeaker:
    """A bundle in LiteRT-LM, as a phone runs it."""

    def __init__(self, name: str, bundle: Any, prompt: Prompt, room: int) -> None:
        self.name, self.bundle, self.prompt, self.room = name, bundle, prompt, room
        self._one_at_a_time = threading.Lock()

    def count(self, rendered: str) -> int:
        return len(self.bundle.tokenize(rendered))

    def stream(
        self, rendered: str, max_new_tokens: int, sampling: Sampling
    ) -> Generator[str, None, Said]:
        with self._one_at_a_time:
            asked = self.count(rendered)
            limit = min(max_new_tokens, self.room - asked)
            whole, pieces = "", Pieces()
            answer = self.bundle.stream(rendered, limit, sampling)
            while True:
                try:
                    whole += next(answer)
                except StopIteration as end:
                    said = end.value
                    break
                if piece := pieces.more(whole):
                    yield piece
            text = said.text.strip()
            if piece := pieces.more(text, last=True):
                yield piece
            return Said(text, asked, said.tokens, said.stopped, said.seconds)


@dataclass(frozen=True)
class Target:
    """A model to be opened: path of a stage or bundle, or None for the base model."""

    name: str
    path: Path | None
    config: Config
    record: Made | None

    @property
    def is_bundle(self) -> bool:
        return isinstance(self.record, BundleRecord)


@contextlib.contextmanager
def open_speaker(target: Target) -> Iterator[Speaker]:
    """A model, loaded as the evaluation or the runtime loads it, and freed at the end."""
    if isinstance(target.record, BundleRecord) and target.path is not None:
        from liteguard.runtime.streaming import StreamedBundle

        room = target.record.cache_length
        with StreamedBundle(target.path) as bundle:
            yield BundleSpeaker(target.name, bundle, target.record.prompt, room)
        return
    with answerers.open_answerer(target.config, target.path) as checkpoint:
        if not isinstance(checkpoint, answerers.Checkpoint):
            raise TypeError(f"{target.name} is no checkpoint")
        yield CheckpointSpeaker(target.name, checkpoint, target.config.model.context_length)


def expected_memory(target: Target, architecture: Any) -> int:
    """Bytes of host memory that must be free to talk to a model: one answer at a time.

    architecture: the base model's transformers config; None for a bundle.
    """
    section = target.config.evaluate.model_copy(
        update={"batch_size": 1, "max_text_tokens": target.config.model.context_length}
    )
    config = target.config.model_copy(update={"evaluate": section})
    bundle = target.path if target.is_bundle else None
    return answerers.expected_memory(config, None if bundle else architecture, bundle)[0]
