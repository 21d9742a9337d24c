"""A conversation of three turns: the bundle's own answers against those to the rendered text.

Only an answer that ends has a second message behind it as in training: one that a limit cuts has no
end token. So a question is looked for whose answer ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from liteguard.errors import WorkError
from liteguard.export import agreement
from liteguard.export.conditions import Row
from liteguard.export.measured import LATER_TURNS
from liteguard.prompts import Prompt, Turn
from liteguard.runtime.bundle import Bundle

# Questions that are tried for an answer that ends.
_TRIED = 4
# Tokens that a conversation may take beside what is counted here (separators, a guard).
_SPARE = 16


def conversation(
    bundle: Bundle, prompt: Prompt, questions: Sequence[str], short: int, limit: int, room: int
) -> Row:
    """The line of the proof's table.

    Args:
        bundle: opened.
        prompt: as training rendered it.
        questions: to begin with, the first whose answer ends.
        short: tokens up to which answers must be equal in full.
        limit: most tokens of the first answer.
        room: tokens of the KV cache.
    """
    # A .task loses what stands between two turns (see bundle.py).
    task = bundle.path.suffix == ".task"
    rendered = prompt.model_copy(update={"turn_separator": ""}) if task else prompt
    try:
        found = _that_ends(bundle, rendered, questions[:_TRIED], limit, room)
        asked = [found[0], *LATER_TURNS] if found else [questions[0]]
        most = max(short, found[1] + 1) if found else short
        answers = bundle.converse(asked, most)
        pairs = _compared(bundle, rendered, asked, answers, short, most)
    except WorkError as error:
        return Row("conversation", "no answer", "three turns", False, str(error))
    same = sum(chat == raw for chat, raw in pairs)
    measured = f"{same} of {len(pairs)} turns equal"
    if not found:
        measured += f"; no answer ends in {limit} tokens"
    elif _is_alone(bundle, prompt):
        measured += "; later ones repeat the system text"
    where = next((f"{c!r} instead of {r!r}" for c, r in pairs if c != r), "")
    return Row("conversation", measured, "all", same == len(pairs), where)


def _that_ends(
    bundle: Bundle, prompt: Prompt, questions: Sequence[str], limit: int, room: int
) -> tuple[str, int] | None:
    """(question, tokens of its answer) of the first answer that ends and leaves room for two more
    exchanges as long."""
    for question in questions:
        turns: list[Turn] = [(question, ""), *((text, "") for text in LATER_TURNS)]
        around = len(bundle.tokenize(prompt.render_conversation(turns))) + _SPARE
        most = min(limit, (room - around) // 3 - 1)
        if most > 0:
            answer = bundle.generate(prompt.render_question(question), most)
            if answer.stopped:
                return question, answer.tokens
    return None


def _compared(
    bundle: Bundle, prompt: Prompt, asked: list[str], answers: list[str], short: int, most: int
) -> list[tuple[str, str]]:
    """(answer in the conversation, answer to the rendered text) of each turn, as much of both as is
    to be equal. An answer that `most` tokens cut is the last."""
    pairs: list[tuple[str, str]] = []
    read = 0  # tokens of the longest answer so far
    for turn, text in enumerate(asked):
        history = list(zip(asked[:turn], answers, strict=False))
        given = prompt.render_conversation([*history, (text, None)])
        alone = bundle.generate(given, most)
        chat, raw = answers[turn].strip(), alone.text.strip()
        last = not alone.stopped or _is_alone(bundle, prompt)
        if last:
            # Cut by different counts: compare what both surely have.
            least = min(len(chat), len(raw)) * 3 // 4
            chat, raw = chat[:least], raw[:least]
        if chat != raw and read > short and _as_good(bundle, given, chat, raw):
            chat = raw
        pairs.append((chat, raw))
        read = max(read, alone.tokens)
        if last:
            break
    return pairs


def _is_alone(bundle: Bundle, prompt: Prompt) -> bool:
    """Whether later turns are other ones than in training: a .task repeats the system text."""
    return bundle.path.suffix == ".task" and bool(prompt.system)


def _as_good(bundle: Bundle, given: str, chat: str, raw: str) -> bool:
    """Whether two answers part where the model likes both words: behind a long answer, which the
    conversation wrote step by step and the rendered text reads at once, rounding tips the scale."""
    ours, theirs = bundle.tokenize(chat), bundle.tokenize(raw)
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    written = ours[at : at + 1] or bundle.stop_ids
    return bundle.behind(bundle.tokenize(given) + ours[:at], written) <= agreement.AS_GOOD
