"""A finished `.task` is opened, asked and compared before anyone ships it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liteguard.errors import WorkError
from liteguard.export.tokenizer import GUARD, PLACEHOLDER_MARK
from liteguard.prompts import Prompt
from liteguard.runtime import Bundle

# Characters that stand for bytes in a byte-level vocabulary: space, newline, tab, return.
_RAW_BYTE_CHARACTERS = "\u0120\u010a\u0109\u010d"
_REPLACEMENT = "\ufffd"
IDENTICAL_IDS = 0.8


def _dirt(text: str, special: Sequence[str]) -> str | None:
    """What is in an answer that nobody should see, or None."""
    if PLACEHOLDER_MARK in text or GUARD in text:
        return "a placeholder piece (a token that is incomplete UTF-8 was not silenced)"
    if _REPLACEMENT in text:
        return "U+FFFD (bytes that are no valid UTF-8)"
    raw = [char for char in _RAW_BYTE_CHARACTERS if char in text]
    if raw:
        return f"raw byte-level characters {' '.join(raw)} (the tokenizer was not decoded)"
    shown = [token for token in special if token in text]
    if shown:
        return f"special-token text {', '.join(shown)}"
    return None


def verify_bundle(
    task: Path,
    prompt: Prompt,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 256,
    tokenizer_dir: Path | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Open a bundle, ask it, and fail with the name of the first check that it does not pass.

    The checks, in order: ``opens``, ``stop tokens``, ``chat template`` (the bundle's own template
    renders what `prompt` renders, and nothing is put before it), ``token ids`` (of the rendered
    prompts, against the Hugging Face tokenizer), ``not empty``, ``clean text``, ``never stops``
    (no answer ended by itself; single long answers are allowed and counted), ``chat answers``.

    Args:
        task: the bundle.
        prompt: what it was made with.
        questions: asked one by one, greedily.
        max_new_tokens: most tokens per answer, the stop token included.
        tokenizer_dir: directory of the original tokenizer; None leaves out ``token ids``.
        threads: CPU threads.

    Returns:
        ``questions``, ``stopped`` (counts), ``stopped_share``, ``mean_tokens``, ``seconds``,
        ``tokens_per_second`` (prefill and decode together), ``checks`` (those that passed), and
        ``answers`` (question, text, tokens, stopped).

    Raises:
        WorkError: ``check NAME failed: ...``.
    """
    if not questions:
        raise WorkError("verification needs at least one question")
    passed: list[str] = []

    def require(check: str, good: bool, message: str) -> None:
        if not good:
            raise WorkError(f"{task}: check '{check}' failed: {message}")
        if check not in passed:
            passed.append(check)

    rendered = [prompt.render_question(question) for question in questions]
    special = [*dict.fromkeys([*prompt.stop_tokens, prompt.pad_token])]
    started = time.perf_counter()
    try:
        bundle = Bundle(task, threads=threads).__enter__()
    except WorkError as error:
        raise WorkError(f"{task}: check 'opens' failed: {error}") from error
    passed.append("opens")
    try:
        expected = [bundle.tokenize(token) for token in prompt.stop_tokens]
        require(
            "stop tokens",
            sorted(expected) == sorted([one] for one in bundle.stop_ids),
            f"the bundle stops at ids {bundle.stop_ids}, the prompt's stop tokens are {expected}",
        )
        require(
            "chat template",
            bundle.start_id is None,
            f"the engine puts token {bundle.start_id} before every prompt; training does not",
        )
        for question, text in zip(questions, rendered, strict=True):
            own = bundle.render_chat(question)
            require(
                "chat template",
                own.replace(GUARD, "") == text and bundle.tokenize(own) == bundle.tokenize(text),
                f"the bundle renders {own!r} where training rendered {text!r}",
            )
        identical = None
        if tokenizer_dir is not None:
            identical = _compare_ids(bundle, tokenizer_dir, rendered, require)
        answers = []
        for question, text in zip(questions, rendered, strict=True):
            answer = bundle.generate(text, max_new_tokens)
            require("not empty", bool(answer.text.strip()), f"empty answer to {question!r}")
            dirt = _dirt(answer.text, special)
            require("clean text", dirt is None, f"{dirt} in the answer to {question!r}")
            answers.append(answer)
        stopped = sum(answer.stopped for answer in answers)
        require(
            "never stops",
            stopped > 0,
            f"none of {len(answers)} answers ended within {max_new_tokens} tokens: the end token "
            "was not learned, or the bundle does not stop at it",
        )
        own, first = bundle.chat(questions[0], max_new_tokens), answers[0]
        # A cut answer may differ in its last characters: the limit is counted differently.
        same = own == first.text if first.stopped else own.startswith(first.text[: len(own) // 2])
        require("chat answers", same, f"chat says {own!r}, the raw prompt {first.text!r}")
    finally:
        bundle.__exit__(None, None, None)
    seconds = sum(answer.seconds for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    return {
        "questions": len(answers),
        "identical_ids": identical,
        "stopped": stopped,
        "stopped_share": stopped / len(answers),
        "mean_tokens": tokens / len(answers),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "seconds": round(time.perf_counter() - started, 1),
        "checks": passed,
        "answers": [
            {"question": q, "text": a.text, "tokens": a.tokens, "stopped": a.stopped}
            for q, a in zip(questions, answers, strict=True)
        ],
    }


def _compare_ids(bundle: Bundle, tokenizer_dir: Path, rendered: list[str], require: Any) -> float:
    """Share of rendered prompts with the original tokenizer's ids on the device.

    Fails below IDENTICAL_IDS: another vocabulary shares no prompt at all, while SentencePiece
    merges a rare word in another order once in a few hundred texts.
    """
    import tokenizers

    original = tokenizers.Tokenizer.from_file(str(Path(tokenizer_dir) / "tokenizer.json"))
    different = []
    for text in rendered:
        ours, theirs = bundle.tokenize(text), original.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            different.append(
                f"token {at} of the prompt {text[:60]!r}... is {ours[at : at + 3]} on the device "
                f"and {theirs[at : at + 3]} in training"
            )
    share = 1 - len(different) / len(rendered)
    require("token ids", share >= IDENTICAL_IDS, "; ".join(different[:3]))
    return share
