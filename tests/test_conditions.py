"""The proof under conditions of use: each fault, put into a scripted runtime, is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from liteguard.errors import WorkError
from liteguard.export import conditions
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

    def render_chat(self, question: str, system: str | None = None) -> str:
        text = PROMPT.render_question(question)
        return f"{system} {text}" if self.fault == "pastes a system message" else text


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
