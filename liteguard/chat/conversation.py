"""One conversation with one model: its history, what of it fits, and what a transcript keeps."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field

from liteguard.chat.speakers import Said, Speaker
from liteguard.errors import UserError
from liteguard.evaluation import refusals
from liteguard.prompts import Prompt
from liteguard.sampling import Sampling

# Of a conversation that no longer fits, so much is left free for the answer: a quarter of the room
# at most, and no more than the longest answer.
ANSWER_SHARE = 4


@dataclass(frozen=True)
class Exchange:
    """A question, its answer and how it ended: a line of the transcript.

    ended: "stopped" by the model, at its "length" limit, or "interrupted". verdict: of the refusal
    judge. forgotten: earliest exchanges of the history that no longer fitted.
    """

    model: str
    turn: int
    system: str
    question: str
    answer: str
    verdict: str
    ended: str
    prompt_tokens: int
    tokens: int
    seconds: float
    sampling: str
    forgotten: int = 0

    def to_dict(self) -> dict[str, str | int | float]:
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt with another system message; None keeps its own, an empty one leaves it out.

    A prompt without a system turn (Phi's) has the message on a line of its own before the first
    question; a model has rarely been trained with that.
    """
    if system is None:
        return prompt
    if system and not (prompt.system_prefix or prompt.system_suffix):
        system = f"{system}\n"
    return prompt.model_copy(update={"system": system})


def drained(stream: Generator[str, None, Said], into: list[str]) -> Generator[str, None, Said]:
    """The same stream; its pieces are put `into` a list too, which survives an interruption."""
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            return end.value
        into.append(piece)
        yield piece


@dataclass
class Conversation:
    """What was asked and answered so far. `system`: None for the prompt's own.

    `turns` is the history that the model sees, `exchanges` the transcript.
    """

    speaker: Speaker
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def prompt(self) -> Prompt:
        return with_system(self.speaker.prompt, self.system)

    def reset(self) -> None:
        """Forget the history; the transcript stays."""
        self.turns.clear()

    def rendered(self, question: str) -> tuple[str, int]:
        """(the prompt of the whole history and a question, earliest exchanges that do not fit).

        Raises UserError when the question does not fit even without a history.
        """
        room = self.speaker.room
        spare = max(1, min(self.max_new_tokens, room // ANSWER_SHARE))
        for forgotten in range(len(self.turns) + 1):
            kept: list[tuple[str, str | None]] = [*self.turns[forgotten:], (question, None)]
            text = self.prompt.render_conversation(kept)
            tokens = self.speaker.count(text)
            if tokens + spare <= room:
                return text, forgotten
        raise UserError(
            f"{self.speaker.name}: the question takes {tokens} tokens with its prompt, and {room} "
            f"hold both prompt and answer (at least {spare} are kept for the answer). Ask a "
            "shorter one."
        )

    def ask(self, question: str) -> Generator[str, None, Exchange]:
        """The answer in pieces; returns the exchange, which is then part of the history.

        What was said before an interruption (KeyboardInterrupt, or the generator closed) is kept.
        """
        text, forgotten = self.rendered(question)
        del self.turns[:forgotten]
        pieces: list[str] = []
        begin = time.monotonic()
        stream = self.speaker.stream(text, self.max_new_tokens, self.sampling)
        try:
            said = yield from drained(stream, pieces)
        except (KeyboardInterrupt, GeneratorExit):
            stream.close()
            answer = "".join(pieces)
            seconds, tokens = time.monotonic() - begin, self.speaker.count(answer)
            said = Said(answer, self.speaker.count(text), tokens, False, seconds)
            self._keep(question, said, "interrupted", forgotten)
            raise
        return self._keep(question, said, "stopped" if said.stopped else "length", forgotten)

    def _keep(self, question: str, said: Said, ended: str, forgotten: int) -> Exchange:
        exchange = Exchange(
            model=self.speaker.name,
            turn=len(self.exchanges) + 1,
            system=self.prompt.system,
            question=question,
            answer=said.text,
            verdict=refusals.judge(said.text),
            ended=ended,
            prompt_tokens=said.prompt_tokens,
            tokens=said.tokens,
            seconds=said.seconds,
            sampling=str(self.sampling),
            forgotten=forgotten,
        )
        self.exchanges.append(exchange)
        if said.text:
            self.turns.append((question, said.text))
        return exchange
