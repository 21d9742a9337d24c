"""Lists of messages: what of them is one question and its answer, and what is left out, by name.

A model on a device is asked one question at a time, and the prompt object renders one: of a longer
conversation the first exchange is used, because it needs nothing before it. An answer that does
need earlier turns is left out."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NamedTuple

from liteguard.data.values import given, says_yes
from liteguard.rows import Row

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_call", "tool_call"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "ipython"), "tool"),
}
_TEXT_KEYS = frozenset(("role", "from", "content", "value"))
_CALLS = frozenset(("tool_calls", "function_call", "function_calls"))
# Of a message or a row: false, or 0, means that it is not to be trained on.
FLAGS = ("weight", "train", "training", "trainable", "loss")
EARLIER = "more than one exchange: not used yet"
SYSTEM = "rows with a system turn, which is left out"
TOOLS = "rows with tools, which are left out"
_LATER = "rows with more turns than a question and its answer: those are not used yet"


class NotForTraining(ValueError):
    """Why a sound row is left out, in few words, fit for counting."""


class Turn(NamedTuple):
    """A message: role as in _ROLES, text (or what was found in its place), trained on or not."""

    role: str
    text: Any
    trained: bool = True
    calls: bool = False


def is_conversation(value: Any) -> bool:
    """Whether a cell holds messages rather than a text."""
    return isinstance(value, (list, dict)) or (isinstance(value, str) and value.startswith("[{"))


def turns(value: Any, notes: Counter[str]) -> list[Turn]:
    """The messages of a cell: role/content or from/value, one or a list, JSON text too.

    Raises ValueError for anything else, for an unknown role, and for content that is not text.
    """
    if isinstance(value, str) and value.startswith("[{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if isinstance(value, dict):
        columns = [v for v in value.values() if isinstance(v, list)]
        if len(columns) == len(value) and value:  # {"from": [...], "value": [...]}, from Arrow
            value = [dict(zip(value, cells, strict=False)) for cells in zip(*columns, strict=False)]
        else:
            value = [value]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError("not a list of messages")
    return [_turn(message, notes) for message in value]


def _turn(message: Row, notes: Counter[str]) -> Turn:
    name = str(message.get("role") or message.get("from")).lower()
    role = _ROLES.get(name)
    if role is None:
        raise ValueError(f"unknown role {name[:40]!r}")
    text = message.get("content")
    if text is None:
        text = message.get("value")
    if isinstance(text, list):
        text = _joined_parts(text)
    trained, calls = True, False
    for key in message.keys() - _TEXT_KEYS:
        value = given(message[key])
        if value is None:
            continue
        if key in FLAGS:
            said = says_yes(value)
            if said is None:
                raise ValueError(f"{key} of a message is neither 0 nor 1")
            trained = trained and said
        elif key in _CALLS:
            calls = True
        else:
            notes[f"messages with a key {key!r}, which is not used"] += 1
    return Turn(role, text, trained, calls)


def _joined_parts(parts: list[Any]) -> str:
    """The text of content that is a list of parts; NotForTraining when one is a picture."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise NotForTraining(f"a message with {str(kind)[:40]}: only text is used")
        texts.append(part if isinstance(part, str) else part.get("text"))
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a part of a message is not text")
    return "\n".join(texts)


def _spoken(found: list[Turn], notes: Counter[str]) -> list[Turn]:
    spoken = [turn for turn in found if turn.role != "system"]
    if len(spoken) < len(found):
        notes[SYSTEM] += 1
    return spoken


def exchange(found: list[Turn], notes: Counter[str]) -> Row:
    """The first question and its answer; messages in a row by one side are one.

    Raises NotForTraining when the answer is not to be trained on, calls a tool, or needs a turn
    that comes before the question; ValueError when there is none.
    """
    spoken = _spoken(found, notes)
    roles = [turn.role for turn in spoken]
    if roles[:1] == ["assistant"]:
        raise NotForTraining("begins with the assistant's turn: not used yet")
    asked = next((n for n, role in enumerate(roles) if role != "user"), len(roles))
    end = next((n for n in range(asked, len(roles)) if roles[n] != "assistant"), len(roles))
    answers = spoken[asked:end]
    if "tool" in roles[asked : end + 1] or any(turn.calls for turn in answers):
        raise NotForTraining("an answer by tools: not used yet")
    if not asked or not answers:
        raise ValueError("no user turn with an assistant's answer")
    if not all(turn.trained for turn in answers):
        raise NotForTraining("an answer with weight 0: not for training")
    if end < len(roles):
        notes[_LATER] += 1
    return {
        "prompt": _joined(spoken[:asked], "user", notes),
        "completion": _joined(answers, "assistant", notes),
    }


def question(found: list[Turn], notes: Counter[str]) -> Any:
    """The text of a prompt that is a list of messages, all by the user but for a system turn."""
    spoken = _spoken(found, notes)
    if not spoken or spoken[-1].role != "user":
        raise ValueError("the last message is not the user's")
    if any(turn.role != "user" for turn in spoken):
        raise NotForTraining(EARLIER)
    return _joined(spoken, "user", notes)


def _joined(found: list[Turn], role: str, notes: Counter[str]) -> Any:
    if len(found) == 1:
        return found[0].text
    notes[f"rows with several {role} turns in a row, taken as one"] += 1
    texts = [turn.text for turn in found]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else None


def last_answer(value: Any, notes: Counter[str]) -> tuple[Any, Any]:
    """(question or None, answer) of a chosen or rejected cell: a text, or messages.

    Messages may begin with the prompt; what comes before the answer is the question.
    """
    if not is_conversation(value):
        return None, value
    spoken = _spoken(turns(value, notes), notes)
    if not spoken or spoken[-1].role != "assistant":
        raise ValueError("the last message is not the assistant's")
    answer = spoken.pop()
    if answer.calls:
        raise NotForTraining("an answer by tools: not used yet")
    return (question(spoken, notes) if spoken else None), answer.text


# A dialogue in one text, as in the first published preference data of that kind.
_SPEAKER = re.compile(r"\s*\n\n(Human|Assistant): ?")


def dialogue(text: Any) -> list[Row] | None:
    """The messages of a text "\\n\\nHuman: ... \\n\\nAssistant: ...", or None for any other."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return None
    pieces = _SPEAKER.split(text)[1:]
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
