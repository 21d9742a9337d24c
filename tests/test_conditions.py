"""The proof under conditions of use: each fault, put into a scripted runtime, is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from liteguard.errors import WorkError
from liteguard.export import conditions, turns
from liteguard.prompts import Prompt
from liteguard.runtime.bundle import Answer

PROMPT = Prompt(user_prefix="ask ", user_suffix=" ", model_prefix="say ", turn_separator=" ")
LADDER, ROOM = [1, 8, 64], 128
TEXT = " ".join(f"word{n}" for n in range(200))


class Runtime:
    """What `Bundle` offers. A token is a word, an answer is "yes" and its end; one fault."""

    stop_ids = [0]

    def __init__(self, fault: str = "", path: str = "x.litertlm") -> None:
        self.path, self.fault, self.words = Path(path), fault, ["<end>"]
        self.longest: list[tuple[int, int]] = []  # tokens of a prompt, of the reference's step

    def tokenize(self, text: str) -> list[int]:
        self.words += [word for word in dict.fromkeys(text.split()) if word not in self.words]
        return [self.words.index(word) for word in text.split()]

    def detokenize(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def generate(self, given: str, limit: int) -> Answer:
        tokens = len(self.tokenize(given))
        if self.fault == f"no answer to {tokens}":
            raise WorkError("Failed to invoke the compiled model")
        word = "no" if self.fault == f"another answer to {tokens}" else "yes"
        return Answer(word, 1, False, 0.0)

    def next_token(self, ids: list[int], longest: int) -> np.ndarray:
        self.longest.append((len(ids), longest))
        logits = np.zeros(1000)
        logits[self.tokenize("yes")] = 6.0
        return logits

    def exchanges(self, questions, limit):
        if self.fault == "broken for good":
            raise WorkError("closed")
        held, shortest = 0, 64 if self.fault == "a long shortest prefill" else 1
        for question in questions:
            given = len(self.tokenize(PROMPT.render_question(question)))
            if not question and self.fault == "nothing to say":
                raise WorkError("empty input")
            if held + max(given, shortest) > ROOM:
                if held == 0:
                    self.fault = {"breaks": "broken for good"}.get(self.fault, self.fault)
                if self.fault != "cuts what is long":
                    raise WorkError("exceeds available state entries")
            held = min(ROOM, held + given + 2)
            yield "yes", held

    def render_chat(self, question: str, system: str | None = None, history=()) -> str:
        known = () if self.fault == "forgets what was said" else history
        text = PROMPT.render_question(question, known)
        return f"{system} {text}" if system and self.fault == "pastes a system message" else text


def rows_of(runtime: Runtime) -> list[conditions.Row]:
    return [
        *conditions.messages(runtime, PROMPT, "What is it?"),
        *conditions.prompt_lengths(runtime, PROMPT, LADDER, ROOM, TEXT),
        *conditions.full_cache(runtime, PROMPT, ROOM, ROOM, TEXT),
    ]


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("", []),
        ("nothing to say", ["empty message"]),
        ("pastes a system message", ["system message"]),
        ("forgets what was said", ["second message"]),
        ("no answer to 9", ["prompt lengths"]),
        ("another answer to 63", ["prompt lengths"]),
        ("cuts what is long", ["too long a message"]),
        ("breaks", ["too long a message", "fills its cache"]),
        ("a long shortest prefill", ["fills its cache"]),
    ],
)
def test_each_fault_is_named(fault, named):
    rows = rows_of(Runtime(fault))
    assert [row.step for row in rows if not row.passed] == named, rows
    assert all(row.why for row in rows if not row.passed)
    assert [row.step for row in rows] == [
        "empty message",
        "system message",
        "second message",
        "prompt lengths",
        "too long a message",
        "fills its cache",
    ]


def test_every_boundary_is_asked_and_compared_with_shorter_steps():
    assert conditions.boundaries(LADDER, ROOM) == [2, 7, 8, 9, 63, 64, 65]
    assert conditions.boundaries([1, 64], 66) == [2, 63, 64], "an answer must fit, too"
    assert conditions.boundaries([256, 1024], 1280) == [255, 256, 257, 1025], "long ones once"
    runtime = Runtime()
    rows_of(runtime)
    assert runtime.longest == [(2, 1), (7, 1), (8, 1), (9, 1), (63, 8), (64, 8), (65, 8)]


def test_of_a_task_no_system_message_is_asked_for():
    rows = conditions.messages(Runtime("pastes a system message", "x.task"), PROMPT, "What?")
    assert [row.step for row in rows] == ["empty message"]


class Talking:
    """A runtime whose first answer to `long` questions has 60 words, or does not end."""

    stop_ids = [0]

    def __init__(self, path: str = "x.litertlm", ends=True, garbled=False, near=0.2) -> None:
        self.path, self.ends, self.garbled, self.near = Path(path), ends, garbled, near
        self.asked: list[list[str]] = []

    def tokenize(self, text: str) -> list[int]:
        return [hash(word) for word in text.split()]

    def behind(self, ids: list[int], tokens: list[int]) -> float:
        return self.near

    def generate(self, given: str, limit: int) -> Answer:
        later, endless = given.count("ask ") > 1, "endless" in given or not self.ends
        words = ["right", "answer"] if later else ["word"] * (10**6 if endless else 60)
        cut = len(words) >= limit
        return Answer(" ".join(words[:limit]), min(len(words) + 1, limit), not cut, 0.0)

    def converse(self, questions: list[str], limit: int) -> list[str]:
        self.asked.append(questions)
        first = self.generate(PROMPT.render_question(questions[0]), limit).text
        second = "GARBAGE" if self.garbled else "right answer"
        return [first, *[second] * (len(questions) - 1)]


def conversation(runtime: Talking, questions=("What is it?",), room: int = 1280):
    return turns.conversation(runtime, PROMPT, list(questions), 48, 128, room)


@pytest.mark.parametrize("path", ["x.litertlm", "x.task"])
def test_the_second_message_is_looked_at_where_the_first_answer_is_long(path):
    """An answer of more than 48 tokens ended the check, and what came after it was not seen."""
    row = conversation(Talking(path))
    assert row.passed and row.measured == "3 of 3 turns equal"
    row = conversation(Talking(path, garbled=True, near=9.0))
    assert not row.passed and row.measured == "1 of 3 turns equal"
    assert "'GARBAGE' instead of 'right answer'" in row.why


def test_a_question_whose_answer_ends_is_looked_for():
    runtime = Talking()
    row = conversation(runtime, ["endless one?", "endless two?", "What is it?"])
    assert row.passed and row.measured == "3 of 3 turns equal"
    assert runtime.asked[0][0] == "What is it?"


def test_where_no_answer_ends_nothing_is_claimed_of_the_second_message():
    for runtime, room in ((Talking(ends=False), 1280), (Talking(), 128)):
        row = conversation(runtime, room=room)
        assert row.passed and row.measured == "1 of 1 turns equal; no answer ends in 128 tokens"
        assert len(runtime.asked[0]) == 1


def test_a_task_with_a_system_text_is_compared_in_its_first_turn():
    own = PROMPT.model_copy(update={"system": "You help.", "system_suffix": " "})
    row = turns.conversation(Talking("x.task"), own, ["What is it?"], 48, 128, 1280)
    assert row.passed
    assert row.measured == "1 of 1 turns equal; later ones repeat the system text"


def test_a_near_tie_behind_a_long_answer_is_no_fault():
    assert conversation(Talking(garbled=True, near=0.9)).passed
