"""OpenAI's chat completions: what a request may ask for, and what the answers look like.

Only what changes an answer is read. What this server cannot do (tools, several choices, log
probabilities) is refused by name; what makes no difference here (`user`, `metadata`) is ignored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from liteguard import records
from liteguard.chat.conversation import with_system
from liteguard.chat.speakers import Said, Speaker
from liteguard.errors import UserError
from liteguard.evaluation import refusals
from liteguard.sampling import Sampling

STARTED = int(time.time())


class ApiError(Exception):
    """An answer with an error: HTTP status, message, and OpenAI's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def to_dict(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.code}
        return {"error": error}


def _text_alone(content: Any) -> Any:
    """Content in parts as one text. Raises ValueError for parts that are no text."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) < len(content):
        raise ValueError("only text is understood here, no images, sounds or files")
    return "".join(known)


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    text: Annotated[str, BeforeValidator(_text_alone)] = Field(alias="content")


class StreamOptions(BaseModel):
    include_usage: bool = False


class Body(BaseModel):
    """What is read of a request's body."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


# What this server cannot do -> values that ask for nothing.
_CANNOT: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False),
    "stop": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
}


@dataclass(frozen=True)
class Asked:
    """A request that can be answered: the rendered prompt, and how to answer it."""

    speaker: Speaker
    rendered: str
    max_new_tokens: int
    sampling: Sampling
    stream: bool
    usage: bool  # whether a stream ends with the number of tokens


def read_request(
    content: bytes,
    speakers: Mapping[str, Speaker],
    max_new_tokens: int,
    sampling: Sampling,
    system: str | None = None,
) -> Asked:
    """What a body asks for; `max_new_tokens`, `sampling` and `system` where it says nothing.

    Raises ApiError for what cannot be read, is not there, does not fit or cannot be done.
    """
    try:
        body = Body.model_validate_json(content)
    except ValidationError as error:
        raise ApiError(400, records.first_problem(error)) from None
    extra = body.__pydantic_extra__ or {}
    if refused := [name for name, none in _CANNOT.items() if extra.get(name) not in none]:
        raise ApiError(400, f"not supported here: {', '.join(refused)}", "unsupported_parameter")
    speaker = speakers.get(body.model)
    if speaker is None:
        there = f"there is no model {body.model[:80]!r}. Models: {', '.join(speakers)}"
        raise ApiError(404, there, "model_not_found")
    asked = (body.temperature, body.top_k, body.top_p, body.seed)
    try:
        own = sampling if asked == (None,) * 4 else _merged(sampling, *asked)
    except UserError as error:
        raise ApiError(400, str(error)) from None
    turns, said = conversation(body.messages)
    prompt = with_system(speaker.prompt, system if said is None else said)
    rendered = prompt.render_conversation(turns)
    tokens = speaker.count(rendered)
    if tokens >= speaker.room:
        text = f"the messages take {tokens} tokens, and {body.model} has room for {speaker.room}"
        raise ApiError(400, f"{text} with the answer", "context_length_exceeded")
    limit = body.max_completion_tokens or body.max_tokens or max_new_tokens
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return Asked(speaker, rendered, limit, own, body.stream, usage)


def _merged(
    default: Sampling,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> Sampling:
    """The request's sampler, with the server's settings where it names none."""
    if temperature is None:
        drawn = top_k is not None or (top_p is not None and top_p != 1)
        temperature = default.temperature or (1.0 if drawn else 0.0)
    return Sampling(
        temperature,
        default.top_k if top_k is None else top_k,
        default.top_p if top_p is None else top_p,
        default.seed if seed is None else seed,
    )


def conversation(messages: list[Message]) -> tuple[list[tuple[str, str | None]], str | None]:
    """(turns for `Prompt.render_conversation`, the system message or None).

    Raises ApiError unless user and assistant take turns and the user has the last word.
    """
    system = [m.text for m in messages if m.role in ("system", "developer")]
    rest = [m for m in messages if m.role in ("user", "assistant")]
    leading = [m.role for m in messages[: len(system)]]
    if {"user", "assistant"} & {*leading}:
        raise ApiError(400, "messages: a system message is allowed at the beginning only")
    expected = ["user", "assistant"] * (len(rest) // 2 + 1)
    if len(rest) % 2 == 0 or any(m.role != e for m, e in zip(rest, expected, strict=False)):
        raise ApiError(400, "messages: user and assistant take turns, and the last one is a user's")
    turns: list[tuple[str, str | None]] = [
        (question.text, answer.text)
        for question, answer in zip(rest[:-1:2], rest[1::2], strict=True)
    ]
    return [*turns, (rest[-1].text, None)], "\n\n".join(system) if system else None


def new_id() -> str:
    """The name of one answer."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def model(speaker: Speaker) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {"id": speaker.name, "object": "model", "created": STARTED, "owned_by": "liteguard"}


def completion(identity: str, asked: Asked, said: Said) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    message = {"role": "assistant", "content": said.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None}
    return {
        **_head(identity, asked, "chat.completion"),
        "choices": [{**choice, "finish_reason": _reason(said)}],
        "usage": usage(said),
        "liteguard": beside(said),
    }


def chunk(
    identity: str, asked: Asked, piece: str | None = None, said: Said | None = None
) -> dict[str, Any]:
    """One event of a stream: the role first (no piece), then pieces, at the end how it ended."""
    delta: dict[str, Any] = {} if said else {"content": piece or ""}
    if piece is None and said is None:
        delta["role"] = "assistant"
    choice = {"index": 0, "delta": delta, "logprobs": None}
    choice["finish_reason"] = _reason(said) if said else None
    own = {"liteguard": beside(said)} if said else {}
    return {**_head(identity, asked, "chat.completion.chunk"), "choices": [choice], **own}


def usage_chunk(identity: str, asked: Asked, said: Said) -> dict[str, Any]:
    """The event with the number of tokens, where the request wants it."""
    head = _head(identity, asked, "chat.completion.chunk")
    return {**head, "choices": [], "usage": usage(said)}


def usage(said: Said) -> dict[str, int]:
    """Tokens of a request and its answer, the stop token included."""
    total = said.prompt_tokens + said.tokens
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return dict(zip(names, (said.prompt_tokens, said.tokens, total), strict=True))


def beside(said: Said) -> dict[str, Any]:
    """What OpenAI's format has no place for: the refusal judge's verdict, and seconds."""
    return {"verdict": refusals.judge(said.text), "seconds": round(said.seconds, 3)}


def _head(identity: str, asked: Asked, kind: str) -> dict[str, Any]:
    created = int(time.time())
    return {"id": identity, "object": kind, "created": created, "model": asked.speaker.name}


def _reason(said: Said) -> str:
    return "stop" if said.stopped else "length"
