"""The layouts of users' files and of hub data, and how a row of each becomes a row of ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from liteguard.data.conversations import (
    TOOLS,
    Conversation,
    NotForTraining,
    Turn,
    beside,
    dialogue,
    is_conversation,
    last_answer,
    question,
    row_of,
    turns,
)
from liteguard.data.values import given
from liteguard.rows import Row


def plain_text(row: Row, notes: Counter[str]) -> Row:
    """Texts in a column `text`."""
    return {"text": row.get("text")}


# Says who answers, or only that there is a question: nothing that changes the answer's form.
_WHO = r"""an?\s+(?:[\w-]+\s+){0,4}(?:doctor|physician|clinician|nurse|surgeon|professional|expert
    |practitioner|specialist|assistant|chatbot|model|advis[eo]r|provider|\w+ist)"""
_ROLE_ONLY = re.compile(
    rf"""(?:(?:(?:if|suppose|imagine|assume)\s+)?you(?:\s+are|'re)\s+{_WHO}
      |(?:please\s+)?act\s+as\s+{_WHO}
      |(?:given|based\s+on)\s+your\s+(?:background|experience|expertise|training)\s+as\s+{_WHO}
      |as\s+{_WHO})?
    [\s,.:;]*
    (?:(?:please\s+|kindly\s+)?
      (?:answer|respond\s+to|reply\s+to|provide\s+your\s+insight\s+in(?:to)?\s+addressing)
      \s+(?:(?:this|the|these|my|following|user's|patient's|medical|clinical|health)\s+)*
      (?:questions?|quer(?:y|ies)|concerns?)
      (?:\s+(?:below|truthfully|honestly|accurately|correctly|carefully))?
      (?:\s+(?:based\s+on|about)\s+the\s+patient's\s+(?:descriptions?|accounts?))?)?
    [\s.!:;]*""",
    re.IGNORECASE | re.VERBOSE,
)


def asked(instruction: Any, text: Any, notes: Counter[str]) -> Any:
    """What an alpaca row asks: its instruction, about its input where there is one.

    Decided row by row. In the processed medical collections many instructions only say who answers
    ("If you are a doctor, please answer ..."): then the input alone is the question.
    """
    instruction, text = given(instruction), given(text)
    if text is None or instruction is None:
        return instruction if text is None else text
    if not isinstance(instruction, str) or not isinstance(text, str):
        return None
    if _ROLE_ONLY.fullmatch(instruction.strip()):
        notes["rows asked by their input: the instruction only says who answers"] += 1
        return text
    notes["rows asked by instruction and input together"] += 1
    task = instruction.strip()
    between = "\n\n" if "\n" in text.strip() else " "  # a list or a table keeps its first line
    return f"{task}{':' if task[-1:].isalnum() else ''}{between}{text}"


def about(row: Row, prompt: Any) -> Row:
    """The text that a task is about: rows about one text go to one split (cleaning.clean)."""
    text = given(row.get("input"))
    return {"about": text} if isinstance(text, str) and text != prompt else {}


def alpaca(row: Row, notes: Counter[str]) -> Row:
    """Columns instruction, output and maybe input, system, history (earlier exchanges).

    The answers of the history are learnt from as well.
    """
    _count_tools(row, notes)
    prompt = asked(row.get("instruction"), row.get("input"), notes)
    made = {"prompt": prompt, "completion": row.get("output"), **about(row, prompt)}
    return made | _history(row) | _system(row)


def _history(row: Row) -> Row:
    """`history` of a row that has one: earlier exchanges."""
    history = given(row.get("history"))
    if not history:
        return {}
    if not isinstance(history, list) or not all(_is_exchange(pair) for pair in history):
        raise ValueError("history is no list of [question, answer]")
    return {"history": [list(pair) for pair in history]}


def _is_exchange(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2


def _system(row: Row) -> Row:
    system = given(row.get("system"))
    return {} if system is None else {"system": system}


def _count_tools(row: Row, notes: Counter[str]) -> None:
    """Counts what a row says beside its turns, and what no prompt of ours can hold."""
    if given(row.get("tools")):
        notes[TOOLS] += 1


def messages(row: Row, notes: Counter[str]) -> Row:
    """A column `messages`: a list of {role, content}. See `conversations.row_of`."""
    _count_tools(row, notes)
    return row_of(turns(row.get("messages"), notes), notes, row.get("system"))


def sharegpt(row: Row, notes: Counter[str]) -> Row:
    """A column `conversations`: a list of {from, value}. See `conversations.row_of`."""
    _count_tools(row, notes)
    return row_of(turns(row.get("conversations"), notes), notes, row.get("system"))


def _opening(prompt: Any) -> Any:
    """A prompt; the messages of one that is a dialogue and ends where the answer begins."""
    messages = dialogue(prompt)
    if not messages:
        return prompt
    last = messages[-1]
    return messages[:-1] if last["role"] == "assistant" and not last["content"] else messages


def prompt_completion(row: Row, notes: Counter[str]) -> Row:
    """Columns prompt, completion; texts, or messages.

    What is learnt from is the completion; answers in the prompt are context.
    """
    prompt, completion = _opening(row.get("prompt")), row.get("completion")
    _count_tools(row, notes)
    if not is_conversation(prompt) and not is_conversation(completion):
        return {"prompt": prompt, "completion": completion, **_system(row)}
    if not is_conversation(completion):
        completion = [{"role": "assistant", "content": completion}]
    found = turns(completion, notes)
    if not found or found[-1].role != "assistant":
        raise ValueError("the last message is not the assistant's")
    if not is_conversation(prompt):
        prompt = {"role": "user", "content": prompt}
    before = [Turn(turn.role, turn.text, False, turn.calls) for turn in turns(prompt, notes)]
    question(before, Counter())  # ends with what the completion answers
    return row_of([*before, *found], notes, row.get("system"))


def preference(row: Row, notes: Counter[str]) -> Row:
    """Columns prompt (or instruction and input, or messages), chosen, rejected; texts or messages.

    Messages of the answers may begin with the prompt, or be all there is (an implicit prompt); a
    text that both answers begin with and that is the prompt is cut off.
    """
    _count_tools(row, notes)
    chosen, rejected = row.get("chosen"), row.get("rejected")
    prompt = _opening(row.get("prompt"))
    if "prompt" not in row:
        if "instruction" in row:
            prompt = asked(row["instruction"], row.get("input"), notes)
            if given(row.get("conversations")) is not None:
                notes["rows with a column 'conversations', which is not used"] += 1
        else:
            prompt = row.get("conversations")
            chosen, rejected = dialogue(chosen) or chosen, dialogue(rejected) or rejected
    given_before = None
    if is_conversation(prompt):
        given_before = question(turns(prompt, notes), notes)
        prompt = given_before.asked
    before, chosen = last_answer(chosen, notes)
    other, rejected = last_answer(rejected, Counter())
    if before and other and _said(before) != _said(other):
        raise NotForTraining("chosen and rejected part before their last answers")
    before = before or other
    if before and not _fits(before, prompt, given_before):
        raise NotForTraining("the prompt is not the question of the answers: not used")
    context = before or given_before
    prompt = context.asked if context else prompt
    if isinstance(prompt, str) and all(_repeats(prompt, text) for text in (chosen, rejected)):
        notes["rows whose answers began with the prompt, which is cut off"] += 1
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    made = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    made |= {} if "prompt" in row else about(row, prompt)
    own = beside(context) if context else {}
    if earlier := _history(row):
        if "history" in own:
            raise NotForTraining("a history beside messages that hold one: not used")
        own |= earlier
    return made | own | (_system(row) if "system" not in own else {})


def _repeats(prompt: str, answer: Any) -> bool:
    """Whether an answer begins with the prompt, and not just with the word that the prompt is
    ("Hypertension" and "Hypertension is ..." are a question and its answer)."""
    asks = len(prompt.split()) > 3 or prompt[-1:] in "\n.:?!\u3002\uff1f"
    return bool(prompt) and asks and isinstance(answer, str) and answer.startswith(prompt)


def _fits(before: Conversation, prompt: Any, context: Conversation | None) -> bool:
    """Whether what stands before an answer is what the prompt says: all of it, or where the prompt
    is a text its last question, or the first one, which begins the conversation."""
    if context:
        return _said(before) == _said(context)
    first = before.exchanges[0].question if before.exchanges else before.asked
    return prompt is None or _plain(prompt) in (_plain(before.asked), _plain(first))


def _said(conversation: Conversation) -> list[str]:
    """Every turn but the system's."""
    pairs = [text for pair in conversation.history for text in pair]
    return [_plain(text) for text in (*pairs, conversation.asked)]


def _plain(text: Any) -> str:
    return " ".join(str(text).split())


def _has_implied_prompt(row: Row) -> bool:
    """Whether a row of preferences says what was asked in another place than `prompt`."""
    if "chosen" not in row or "rejected" not in row:
        return False
    chosen = row["chosen"]
    inside = is_conversation(chosen) or dialogue(chosen) is not None
    return "instruction" in row or "conversations" in row or inside


class Format(NamedTuple):
    """A layout of hub and local data: its part, the columns it must have, one row -> our row.

    `row` gets the row under our column names and a counter of things to tell the user; it raises
    ValueError with a short reason for a row that cannot be used, NotForTraining for one that is
    left out on purpose. `instead` tells of a row without all `columns` whether it will do.
    """

    part: str
    columns: tuple[str, ...]
    row: Callable[[Row, Counter[str]], Row]
    optional: tuple[str, ...] = ()
    defaults: Row = {}
    instead: Callable[[Row], bool] = lambda row: False

    def fits(self, row: Row) -> bool:
        """Whether a row has the columns."""
        return all(column in row for column in self.columns) or self.instead(row)

    def used(self, row: Row) -> list[str]:
        """Columns of a row that are read, in the order in which they are documented."""
        optional = self.optional
        if "prompt" in row and "prompt" in self.columns:  # then it says what was asked
            optional = tuple(n for n in optional if n in ("system", "history", "tools"))
        return [name for name in (*self.columns, *optional) if name in row]


# In the order in which they are tried by `dataset: auto`.
FORMATS = {
    "preference": Format(
        "preference",
        ("prompt", "chosen", "rejected"),
        preference,
        optional=("instruction", "input", "conversations", "system", "history", "tools"),
        defaults={"kind": "unknown", "area": ""},
        instead=_has_implied_prompt,
    ),
    "messages": Format(
        "instruction",
        ("messages",),
        messages,
        optional=("system", "tools"),
        defaults={"kind": "question"},
    ),
    "sharegpt": Format(
        "instruction",
        ("conversations",),
        sharegpt,
        optional=("system", "tools"),
        defaults={"kind": "question"},
    ),
    "prompt_completion": Format(
        "instruction",
        ("prompt", "completion"),
        prompt_completion,
        optional=("system", "tools"),
        defaults={"kind": "question"},
    ),
    "alpaca": Format(
        "instruction",
        ("instruction", "output"),
        alpaca,
        optional=("input", "system", "history", "tools"),
        defaults={"kind": "question"},
    ),
    "plain_text": Format("domain", ("text",), plain_text),
}
