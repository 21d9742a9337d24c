"""A finished bundle, opened with LiteRT-LM as an app on a phone opens it.

`Bundle` is used to check what was exported and to evaluate the thing that ships instead of the
model that it was made from. Generation is greedy unless asked otherwise: two runs can be compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from liteguard import limits
from liteguard.errors import UserError, WorkError
from liteguard.machine import one_at_a_time, quiet_stderr, quiet_stderr_at_exit
from liteguard.runtime.container import lengths, unpacked_weights
from liteguard.runtime.scorer import Scorer
from liteguard.sampling import GREEDY, Sampling


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
        self.threads = threads or min(limits.cores(), 4)
        self._unpacked = unpacked
        self._stack = contextlib.ExitStack()
        self._engine: Any = None
        self._scorer: Scorer | None = None
        if not self.path.is_file():
            raise UserError(f"no bundle at {self.path}: make one with compress_model.py")

    def __enter__(self) -> Bundle:
        import litert_lm

        litert_lm.set_min_log_severity(litert_lm.LogSeverity.SILENT)
        quiet_stderr_at_exit()
        try:
            with one_at_a_time(self.unpacked / "lock", told=False):
                self._engine = litert_lm.Engine(
                    str(self.path),
                    backend=litert_lm.Backend.CPU(thread_count=self.threads),
                    cache_dir=str(self.unpacked),
                    enable_benchmark=True,
                )
        except RuntimeError as error:
            self._stack.close()
            raise WorkError(f"{self.path} cannot be opened: {error}") from error
        self._greedy = self._sampler(GREEDY)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with quiet_stderr():
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
        # SentencePiece writes the bar of DeepSeek's "begin\u2581of\u2581sentence" as a blank.
        if text[: len(start)].replace("\u2581", " ") != start.replace("\u2581", " "):
            raise WorkError(
                f"{self.path} puts {start!r} before every prompt, and this prompt does not start "
                f"with it: {text[:40]!r}"
            )
        return text[len(start) :]

    @staticmethod
    def _sampler(sampling: Sampling) -> Any:
        import litert_lm

        return litert_lm.SamplerConfig(**sampling.for_engine())

    def generate(
        self, rendered: str, max_new_tokens: int = 256, sampling: Sampling = GREEDY
    ) -> Answer:
        """Answer to a fully rendered prompt, greedy unless `sampling`; no template is applied.

        Args:
            rendered: `Prompt.render_question(question)`.
            max_new_tokens: most tokens to write, the stop token included.
            sampling: how a token is chosen.

        Raises:
            WorkError: the prompt does not fit the KV cache.
        """
        started = time.perf_counter()
        session = self._engine.create_session(
            apply_prompt_template=False,
            sampler_config=self._sampler(sampling),
            # One more than asked for: with exactly as many, an answer that ends in a stop token
            # at the limit cannot be told from one that was cut.
            max_output_tokens=max_new_tokens + 1,
        )
        try:
            session.run_prefill([self._without_start(rendered)])
            text = session.run_decode().texts[0]
            written = session.get_benchmark_info().last_decode_token_count
        except RuntimeError as error:
            raise self._failed(rendered, error) from error
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

    def _failed(
        self, rendered: str, error: RuntimeError, turn: str = "a prompt", held: int = 0
    ) -> WorkError:
        """What to say of a prompt that the runtime refused, which gives no reason itself.

        `held`: tokens that the conversation had before it.
        """
        tokens = len(self.tokenize(rendered))
        room, prefills = lengths(self.path)
        free = room - held
        full = tokens >= free or free < min(prefills, default=1)
        why = (
            f"prompt and answer must fit the KV cache, of which {free} of {room} tokens are free"
            if full
            else "it would fit the KV cache: the runtime cannot run this model"
        )
        return WorkError(f"{self.path}: no answer to {turn} of {tokens} tokens ({error}); {why}")

    def generate_within(
        self, rendered: str, max_new_tokens: int, room: int, sampling: Sampling = GREEDY
    ) -> Answer:
        """`generate`; no answer (no token, not stopped) where a KV cache of `room` is too small."""
        tokens = len(self.tokenize(rendered))
        nothing = Answer("", 0, False, 0.0)
        if tokens >= room:
            return nothing
        try:
            return self.generate(rendered, max_new_tokens, sampling)
        except WorkError:
            if tokens + max_new_tokens <= room:
                raise
            return nothing

    def render_chat(
        self, question: str, system: str | None = None, history: Sequence[Sequence[str]] = ()
    ) -> str:
        """The prompt that the bundle's own template makes of a question, after a system message
        and earlier exchanges (a question and its answer each)."""
        earlier = [
            {"role": role, "content": text}
            for exchange in history
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        ]
        settings = {"system_message": system, "messages": earlier or None}
        with self._conversation(**settings) as conversation:
            return conversation.render_message_to_string(question)

    def converse(self, questions: Sequence[str], max_new_tokens: int = 256) -> list[str]:
        """Greedy answers to questions asked one after the other in one conversation.

        Raises WorkError where the runtime gives none.
        """
        return [answer for answer, _ in self.exchanges(questions, max_new_tokens)]

    def exchanges(
        self, questions: Iterable[str], max_new_tokens: int = 256
    ) -> Iterator[tuple[str, int]]:
        """`converse`, one by one: (answer, tokens that the conversation holds after it)."""
        with self._conversation(max_output_tokens=max_new_tokens) as conversation:
            for number, question in enumerate(questions, 1):
                held = conversation.token_count
                try:
                    content = conversation.send_message(question).to_json()["content"]
                except RuntimeError as error:
                    given = self.render_chat(question), error, f"message {number}"
                    raise self._failed(*given, held) from error
                if not isinstance(content, str):
                    content = "".join(part.get("text", "") for part in content)
                yield content, conversation.token_count

    def _conversation(self, **settings: Any) -> Any:
        return self._engine.create_conversation(sampler_config=self._greedy, **settings)

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
        return self._scores().score(context, targets)

    def score_all(self, context: list[int], each: list[list[int]]) -> list[tuple[float, int]]:
        """`score_ids` of every one of `each` after the same context, which is computed once."""
        return [self.score_ids(context, targets) for targets in each]

    def follow_all(self, context: list[int], each: list[list[int]]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether they are the greedy answer to `context`) of each targets."""
        return [self._scores().follow(context, targets) for targets in each]

    def behind(self, context: list[int], tokens: list[int]) -> float:
        """Nats by which the likeliest of `tokens` is behind the likeliest token after `context`.

        By the bundle's model; the engine need not be open.
        """
        return self._scores().behind(context, tokens)

    def next_token(self, context: list[int], longest: int) -> Any:
        """Logits after `context`, an array over the vocabulary.

        By the bundle's model, run without the runtime in steps of at most `longest` tokens.
        """
        return self._scores().next_token(context, longest)

    def _scores(self) -> Scorer:
        if self._scorer is None:
            with one_at_a_time(self.unpacked / "lock", told=False):
                self._scorer = Scorer(self.path, self.threads, self.unpacked)
        return self._scorer

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
