"""Lists of messages: which exchanges they are, and what is left out, by name.

The prompt object renders a system text, then questions and answers in turn. A conversation is used
up to the first turn that is something else: a tool, a system text in the middle."""

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
SYSTEM = "rows with a system text of their own"
NO_SLOT = "rows with a system text, which is left out: the prompt has no place for it"
TOOLS = "rows with tools, which are left out"
_BY_TOOLS = "an answer by tools: cannot be rendered"
_ASSISTANT_FIRST = "begins with the assistant's turn: cannot be rendered"
_SYSTEM_LATER = "a system turn after the first question: cannot be rendered"
_UNTRAINED = "an answer with weight 0: not for training"


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
    trained, calls = True, False
    if isinstance(text, list):
        trained = not any(_is_untrained(part) for part in text if isinstance(part, dict))
        text = _joined_parts(text)
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


def _is_untrained(part: Row) -> bool:
    """Whether a part of an answer says that it is not to be learnt from: then no part is."""
    return any(key in FLAGS and says_yes(value) is False for key, value in part.items())


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


class Exchange(NamedTuple):
    """A question and its answer, as found; whether the answer is to be learnt from."""

    question: Any
    answer: Any
    trained: bool


class Conversation(NamedTuple):
    """What of some messages can be rendered, and why it stops where it does ("" at the end).

    `system` and `asked`, a last question without an answer, are None where there is none.
    """

    system: Any
    exchanges: list[Exchange]
    asked: Any
    stop: str = ""

    @property
    def history(self) -> list[list[Any]]:
        """Questions and answers, as rows hold them."""
        return [[exchange.question, exchange.answer] for exchange in self.exchanges]


def read(found: list[Turn], notes: Counter[str], system: Any = None) -> Conversation:
    """Messages as exchanges; those in a row by one side are one. `system`: a text given beside."""
    roles = [turn.role for turn in found]
    begin = next((n for n, role in enumerate(roles) if role != "system"), len(roles))
    texts = [given(text) for text in (system, *(turn.text for turn in found[:begin]))]
    texts = [text for text in texts if text is not None]
    system = texts[0] if len(set(map(str, texts))) == 1 else _lines(texts) if texts else None
    exchanges: list[Exchange] = []
    while begin < len(roles):
        asked = _end(roles, begin, "user")
        end = _end(roles, asked, "assistant")
        answers = found[asked:end]
        follows = roles[end] if end < len(roles) else ""
        if follows == "tool" or any(turn.calls for turn in answers):
            return Conversation(system, exchanges, None, _BY_TOOLS)
        if asked == begin and answers:
            return Conversation(system, exchanges, None, _ASSISTANT_FIRST)
        if follows and not answers:
            return Conversation(system, exchanges, None, _SYSTEM_LATER)
        question = _joined(found[begin:asked], "user", notes)
        if not answers:
            return Conversation(system, exchanges, question)
        answer = _joined(answers, "assistant", notes)
        exchanges.append(Exchange(question, answer, all(turn.trained for turn in answers)))
        begin = end
    return Conversation(system, exchanges, None)


def _end(roles: list[str], begin: int, role: str) -> int:
    """Where the turns by `role` end that begin at `begin`."""
    return next((n for n in range(begin, len(roles)) if roles[n] != role), len(roles))


def row_of(found: list[Turn], notes: Counter[str], system: Any = None) -> Row:
    """The row of a conversation up to its last answer that is to be learnt from.

    Raises NotForTraining when nothing of it can be rendered, or no answer is to be learnt from;
    ValueError when there is no answer.
    """
    conversation = read(found, notes, system)
    exchanges = conversation.exchanges
    trained = [n for n, exchange in enumerate(exchanges) if exchange.trained]
    if not exchanges and not conversation.stop:
        raise ValueError("no user turn with an assistant's answer")
    if not trained:
        raise NotForTraining(conversation.stop or _UNTRAINED)
    if conversation.stop:
        notes[f"rows that are used up to {conversation.stop}"] += 1
    if conversation.asked is not None:
        notes["rows that end with a question, which is left out"] += 1
    exchanges = exchanges[: trained[-1] + 1]
    question, answer, _ = exchanges.pop()
    untrained = [n for n, exchange in enumerate(exchanges) if not exchange.trained]
    if untrained:
        notes["rows with earlier answers that are context and not learnt from"] += 1
    return {
        "prompt": question,
        "completion": answer,
        **beside(Conversation(conversation.system, exchanges, None)),
        **({"untrained": untrained} if untrained else {}),
    }


def question(found: list[Turn], notes: Counter[str], system: Any = None) -> Conversation:
    """A prompt that is a list of messages: it ends with a question, and all of it is needed."""
    conversation = read(found, notes, system)
    if conversation.stop:
        raise NotForTraining(conversation.stop)
    if conversation.asked is None:
        raise ValueError("the last message is not the user's")
    return conversation


def beside(conversation: Conversation) -> Row:
    """`history` and `system` of a row, where there are any."""
    history = {"history": conversation.history} if conversation.exchanges else {}
    return history | ({} if conversation.system is None else {"system": conversation.system})


def _joined(found: list[Turn], role: str, notes: Counter[str]) -> Any:
    if len(found) == 1:
        return found[0].text
    notes[f"rows with several {role} turns in a row, taken as one"] += 1
    return _lines([turn.text for turn in found])


def _lines(texts: list[Any]) -> str | None:
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else None


def last_answer(value: Any, notes: Counter[str]) -> tuple[Conversation | None, Any]:
    """(what was said before or None, answer) of a chosen or rejected cell: a text, or messages.

    Messages may begin with the prompt; what comes before the answer is the question.
    """
    if not is_conversation(value):
        return None, value
    found = turns(value, notes)
    if not found or found[-1].role != "assistant":
        raise ValueError("the last message is not the assistant's")
    answer = found.pop()
    if answer.calls:
        raise NotForTraining(_BY_TOOLS)
    if not answer.trained:
        raise NotForTraining(_UNTRAINED)
    before = any(turn.role != "system" for turn in found)
    return (question(found, notes) if before else None), answer.text


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
