"""A bundle under the conditions of use: what people and apps do to it that held-out rows do not.

Each function gives rows for the proof's table. The weights and answers are proven elsewhere
(verify.py); this is about lengths, empty and overlong messages, a system message, a full cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from liteguard.errors import WorkError
from liteguard.prompts import Prompt
from liteguard.runtime.bundle import Bundle

# How much less likely than the likeliest the first token of an answer may be for the model run in
# shorter steps, in nats. Rounded activations differ a little between signatures.
_GAP = 1.0
# Above so many tokens only the prompt one longer is asked: two prefills, the costly case of a large
# model (Phi-2: a minute a thousand tokens, and the same again for the reference).
_LONG = 256
# Tokens of an answer while the cache is filled, and a message that is short in every tokenizer.
_STEP = 16
_MORE = "And then?"
_SYSTEM = "Answer in one sentence."
_SAID = "Then rest."


class Row(NamedTuple):
    """A line of the proof's table."""

    step: str
    measured: str
    tolerance: str
    passed: bool
    why: str = ""


def measure(
    path: Path,
    prompt: Prompt,
    ladder: Sequence[int],
    room: int,
    text: str,
    unpacked: Path,
) -> list[Row]:
    """`prompt_lengths` and `full_cache` of a bundle, for a process of its own: it opens the engine
    and the model that scores, and gives back the memory of both."""
    with Bundle(path, unpacked=unpacked) as bundle:
        rows = [*prompt_lengths(bundle, prompt, ladder, room, text)]
        promised = room - min(ladder) + 1
        return [*rows, *full_cache(bundle, prompt, room, promised, text)]


def messages(bundle: Bundle, prompt: Prompt, question: str) -> Iterator[Row]:
    """An empty message, a system message with the question after it, and earlier exchanges."""
    try:
        next(bundle.exchanges([""], _STEP))
        yield Row("empty message", "an answer", "no error", True)
    except WorkError as error:
        yield Row("empty message", "an error", "no error", False, str(error))
    if bundle.path.suffix == ".task":
        return  # the runtime pastes it before the question: deploy.json and docs/phone.md say so
    both: tuple[tuple[str, str | None, Sequence[tuple[str, str]]], ...] = (
        ("system message", _SYSTEM, ()),
        ("second message", None, [(_MORE, _SAID)]),
    )
    for step, system, history in both:
        wanted = prompt.render_question(question, history, system).removeprefix(prompt.bos_token)
        own = bundle.render_chat(question, system, history)
        why = f"the bundle renders {own!r} where training rendered {wanted!r}"
        measured = "as in training" if own == wanted else "another text"
        yield Row(step, measured, "as in training", own == wanted, why)


def boundaries(ladder: Sequence[int], room: int) -> list[int]:
    """Lengths of prompts, in tokens, one below, at and above every prefill length that leave room
    for an answer; of long ones only above (`_LONG`)."""
    near = {length + by for length in ladder for by in ((1,) if length > _LONG else (-1, 0, 1))}
    return sorted(n for n in near if 2 <= n < room - 1)


def prompt_lengths(
    bundle: Bundle, prompt: Prompt, ladder: Sequence[int], room: int, text: str
) -> Iterator[Row]:
    """Prompts at every boundary of the ladder are answered as the model is without that step.

    Args:
        bundle: opened.
        prompt: for its BOS.
        ladder: prefill lengths that were exported.
        room: tokens of the KV cache.
        text: to cut prompts from; where it is too short, longer ones are left out.
    """
    asked, worst, why = 0, 0.0, ""
    for length in boundaries(ladder, room):
        given = _of_length(bundle, prompt, text, length)
        if not given:
            continue
        try:
            answer = bundle.generate(given, 1)
        except WorkError as error:
            measured = f"{length} tokens: an error"
            yield Row("prompt lengths", measured, "an answer to each", False, str(error))
            return
        # The reference takes shorter steps than the one that is looked at.
        below = max((n for n in ladder if n + 1 < length), default=1)
        logits = bundle.next_token(bundle.tokenize(given), below)
        likeliest = int(logits.argmax())
        written = bundle.stop_ids if answer.stopped else bundle.tokenize(answer.text)[:1]
        shown = bundle.detokenize([likeliest])
        hidden = likeliest not in bundle.stop_ids and (not shown or "\ufffd" in shown)
        if hidden or not written:
            continue  # half a character, or a row without a token: not to be seen in a text
        gap = float(logits.max() - max(logits[token] for token in written))
        asked += 1
        if gap > worst:
            worst, why = gap, f"a prompt of {length} tokens is answered {answer.text!r}"
    yield Row(
        "prompt lengths",
        f"{asked} of them, {worst:.2f} nats off",
        f"<= {_GAP} from the likeliest, one at least",
        asked > 0 and worst <= _GAP,
        f"{why}, which is not what the model run in shorter steps says"
        if asked
        else "no prompt could be looked at: the test rows' texts are too short for every step",
    )


def _of_length(bundle: Bundle, prompt: Prompt, text: str, length: int) -> str:
    """A piece of `text` that is `length` tokens with the BOS; empty where there is none."""
    ids = bundle.tokenize(text)
    own = length - (len(bundle.tokenize(prompt.bos_token)) if prompt.bos_token else 0)
    for start in range(0, max(0, len(ids) - own), 3):
        # Cut anywhere, a text may have other ids than before.
        found = prompt.begin(bundle.detokenize(ids[start : start + own]))
        if "\ufffd" not in found and len(bundle.tokenize(found)) == length:
            return found
    return ""


def full_cache(
    bundle: Bundle, prompt: Prompt, room: int, promised: int, text: str
) -> Iterator[Row]:
    """A message longer than the cache is refused and does no harm; a conversation fills the cache.

    Args:
        bundle: opened.
        prompt: how a message is rendered.
        room: tokens of the KV cache.
        promised: tokens from which on a message may be refused (`Export.conversation_tokens`).
        text: to make a long message of.
    """
    long = text
    while len(bundle.tokenize(long)) <= room:
        long = f"{long} {text}"
    try:
        next(bundle.exchanges([long], _STEP))
        refused = False
    except WorkError:
        refused = True
    try:
        next(bundle.exchanges([_MORE], _STEP))
        yield Row(
            "too long a message",
            "refused" if refused else "answered",
            "refused, the next answered",
            refused,
            "the runtime answers a message that does not fit its cache",
        )
    except WorkError as error:
        measured = "nothing works after it"
        yield Row("too long a message", measured, "refused, the next answered", False, str(error))
    rest = len(bundle.tokenize(prompt.render_question(_MORE) + prompt.turn_separator))
    reached, why = 0, ""
    try:
        for _, reached in bundle.exchanges(_filling(bundle, prompt, room, text), _STEP):
            if reached >= room - 1:
                break
    except WorkError as error:
        why = str(error)
    yield Row(
        "fills its cache",
        f"{min(reached, room)} of {room} tokens",  # an end token is counted past the last place
        f">= {promised} less a message",
        reached + rest >= min(promised, room - 1),
        f"a conversation ends at {reached} tokens: {why}",
    )


def _filling(bundle: Bundle, prompt: Prompt, room: int, text: str) -> Iterator[str]:
    """A first message that leaves room for a few short ones, then those, more than fit."""
    around = len(bundle.tokenize(prompt.render_question("")))
    yield bundle.detokenize(bundle.tokenize(text)[: max(1, room - 2 * _STEP - 4 * around)])
    for _ in range(room):
        yield _MORE
