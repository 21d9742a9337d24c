"""What a base model's own tokenizer says and does: its chat template as a prompt, its flags.

Nothing is taken over that would not be the same on the device: what cannot be expressed is said.
"""

from __future__ import annotations

import json
import os.path
import re
from typing import TYPE_CHECKING, Any

from liteguard.errors import UserError
from liteguard.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts that no chat template holds, and that none changes.
_Q, _A, _S = ("QUESTIONZQ{}", "ANSWERZA{}", "SYSTEMZS")
# Tokens between documents, as model families call them.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<｜end▁of▁sentence｜>")


def mend(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, rows: int, directory: str) -> None:
    """Take out of a loaded tokenizer what a phone's cannot do, where the prompt does not need it.

    Added tokens past the embedding's `rows` (Gemma-3's token for images) are removed. Added tokens
    that swallow the blanks beside them (Phi-4-mini) no longer do. Raises UserError where that would
    change the prompt's ids.
    """
    added = tokenizer.added_tokens_decoder
    past = {str(token) for index, token in added.items() if index >= rows}
    greedy = [t for t in added.values() if t.lstrip or t.rstrip or t.single_word]
    if not past and not any(str(token) not in past for token in greedy):
        return
    from tokenizers import Tokenizer

    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [
        {**token, "lstrip": False, "rstrip": False, "single_word": False}
        for token in core["added_tokens"]
        if token["id"] < rows
    ]
    mended = Tokenizer.from_str(json.dumps(core))
    text = prompt.render_conversation([("a b", "c d"), ("e f", None)])
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    if mended.encode(text, add_special_tokens=False).ids != before:
        names = ", ".join(sorted(str(token) for token in greedy)[:3])
        raise UserError(
            f"The tokenizer of {directory} swallows blanks and line breaks beside some of its "
            f"tokens ({names}), which no phone's does, and the prompt has some there. Leave them "
            "out of prompt.*_prefix and prompt.*_suffix: the model never saw them."
        )
    tokenizer._tokenizer = mended
    _forget(tokenizer, past)


def begin_without_blank(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
    """Let no blank stand before a text that begins behind the prompt's BOS.

    Llama's tokenizers (TinyLlama, Mistral) put one before a text that nothing stands before, and
    behind a BOS they put none. The runtimes encode what follows the BOS by itself: with a blank
    they would read other ids than in training. Behind the BOS nothing changes by this.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    if not prompt.bos_token or (core["pre_tokenizer"] or {}).get("prepend_scheme") != "first":
        return
    from tokenizers import Tokenizer

    core["pre_tokenizer"]["prepend_scheme"] = "never"
    steps = (core["decoder"] or {}).get("decoders", [])
    steps[:] = [step for step in steps if step["type"] != "Strip" or not step["start"]]
    mended = Tokenizer.from_str(json.dumps(core))
    text = prompt.render_conversation([("a b", " c d"), ("e f", None)])
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    if mended.encode(text, add_special_tokens=False).ids == before:
        tokenizer._tokenizer = mended
        # Transformers makes the tokenizer of a finished stage anew, from this.
        tokenizer.add_prefix_space = tokenizer.init_kwargs["add_prefix_space"] = False


def _forget(tokenizer: Any, tokens: set[str]) -> None:
    """Let no attribute name `tokens`: they would be added again when the tokenizer is loaded."""
    for key, token in tokenizer.special_tokens_map.items():
        if str(token) in tokens:
            setattr(tokenizer, key, None)
            tokenizer.init_kwargs.pop(key, None)
    tokenizer.extra_special_tokens = [
        token for token in tokenizer.extra_special_tokens if str(token) not in tokens
    ]
    for key in ("extra_special_tokens", "model_specific_special_tokens", "added_tokens_decoder"):
        kept = tokenizer.init_kwargs.get(key)
        if isinstance(kept, dict):
            kept = {name: token for name, token in kept.items() if str(token) not in tokens}
        elif isinstance(kept, list):
            kept = [token for token in kept if str(token) not in tokens]
        if kept is not None:
            tokenizer.init_kwargs[key] = kept


def added_bos(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that the tokenizer puts before every text by itself."""
    begun = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if begun == plain or begun[-len(plain) :] != plain:
        return []
    return tokenizer.convert_ids_to_tokens(begun[: -len(plain)])


def prompt_of(tokenizer: PreTrainedTokenizerBase, name: str, rows: int | None = None) -> Prompt:
    """The prompt that renders what the tokenizer's own chat template renders.

    A BOS that the tokenizer adds stands before it where the template has none (TinyLlama's).

    name: of the model, for messages. rows: of its embedding; where none is spare, a token that is
    there pads. Raises UserError, with the place, for a template that a `Prompt` cannot express: one
    that renders earlier answers in another way than the last one, or puts something between an
    answer and the token that ends it.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"prompt: from_base, and {name} has no chat template. Write a prompt section yourself."
        )

    def rendered(turns: int, system: bool = False) -> str:
        return _render(tokenizer, _messages(turns, system))

    def refuse(why: str) -> UserError:
        return UserError(
            f"prompt: from_base: the chat template of {name} cannot be expressed as prefixes and "
            f"suffixes: {why}. Write a prompt section yourself; the nearest text is\n"
            f"{rendered(2)!r}"
        )

    one, two = rendered(1), rendered(2)
    first, second = _Q.format(0), _Q.format(1)
    answer = _A.format(0)
    if one.count(first) != 1 or two.count(second) != 1:
        raise refuse("a question does not stand in it once, as it was asked")
    before, after = one.split(first)
    opening = before + first + after + answer
    if not two.startswith(opening):
        raise refuse(
            "an earlier question and answer are rendered in another way than the last question"
        )
    between = two[len(opening) : two.index(second)]
    special = sorted(tokenizer.all_special_tokens + [*tokenizer.get_added_vocab()], key=len)
    end = next((t for t in reversed(special) if between.startswith(t)), None)
    if end is None:
        raise refuse(f"no token ends an answer, {between[:20]!r} follows it")
    bos = tokenizer.bos_token or ""
    bos = bos if bos and before.startswith(bos) else ""
    missing = "" if bos else "".join(added_bos(tokenizer))
    block, user_prefix, separator = _shared_end(before[len(bos) :], between[len(end) :])
    user_suffix, model_prefix = _halves(after, special)
    found = {
        "bos_token": bos or missing,
        "user_prefix": user_prefix,
        "user_suffix": user_suffix,
        "model_prefix": model_prefix,
        "turn_separator": separator,
        "end_token": end,
        "document_end_token": _document_end(tokenizer, end),
        **_system(tokenizer, bos, block, user_prefix),
    }
    taken = {found["bos_token"], end, found["document_end_token"]}
    full = rows is not None and len(tokenizer) >= rows
    found["pad_token"] = _pad(tokenizer, taken, two, full)
    prompt = Prompt(**found)
    for turns in (1, 2, 3):
        pairs = [(m, _A.format(i)) for i in range(turns) if (m := _Q.format(i))]
        ours = prompt.render_conversation([*pairs[:-1], (pairs[-1][0], None)])
        if ours != (theirs := missing + rendered(turns)):
            raise refuse(f"{turns} turns would become {ours!r} instead of {theirs!r}")
    return prompt


def rendered_chats(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokenizer's own chat template makes of one and of two exchanges; nothing where it
    has none, or none that renders them."""
    if not tokenizer.chat_template:
        return []
    try:
        return [_render(tokenizer, _messages(turns, system=False)) for turns in (1, 2)]
    except UserError:
        return []


def beside_template(chats: list[str], prompt: Prompt) -> str:
    """A sentence on whether `prompt` renders what the base's template does (`rendered_chats`).

    Empty where there is nothing to compare. A BOS that only one of them has is left aside: what
    the tokenizer adds by itself is looked at elsewhere.
    """
    for turns, theirs in enumerate(chats, 1):
        pairs = [(_Q.format(i), _A.format(i)) for i in range(turns)]
        ours = prompt.render_conversation([*pairs[:-1], (pairs[-1][0], None)])
        ours, theirs = (text.removeprefix(prompt.bos_token) for text in (ours, theirs))
        if ours != theirs:
            at = len(os.path.commonprefix([ours, theirs]))
            near, instead = (text[max(0, at - 20) : at + 40] for text in (theirs, ours))
            return (
                f"prompt: differs from the base's chat template, near {near!r}, where it has "
                f"{instead!r}. `prompt: from_base` takes the base's, where prefixes can express it."
            )
    return "prompt: as the base's chat template" if chats else ""


def _messages(turns: int, system: bool) -> list[dict[str, str]]:
    found = [{"role": "system", "content": _S}] if system else []
    for turn in range(turns):
        found.append({"role": "user", "content": _Q.format(turn)})
        found.append({"role": "assistant", "content": _A.format(turn)})
    return found[:-1]


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2's, and whatever the template raises
        raise UserError(f"the chat template fails: {error}") from error


def _shared_end(before: str, between: str) -> tuple[str, str, str]:
    """(system block, user prefix, turn separator) of what stands before a first and a later
    question."""
    size = 0
    while size < min(len(before), len(between)) and before[-1 - size] == between[-1 - size]:
        size += 1
    prefix = before[len(before) - size :]
    block = before[: len(before) - size]
    # A line break that both have belongs to what stands before the turn, if anything does.
    lead = len(prefix) - len(prefix.lstrip()) if block else 0
    return block + prefix[:lead], prefix[lead:], between[: len(between) - size] + prefix[:lead]


def _halves(after: str, special: list[str]) -> tuple[str, str]:
    """(user suffix, model prefix): the first token behind a question ends it, and a line break."""
    named = [token for token in special if token]
    found = re.match("(" + "|".join(map(re.escape, reversed(named))) + r")\s*", after)
    cut = found.end() if found else after.find("\n") + 1
    return after[:cut], after[cut:]


def _system(tokenizer: Any, bos: str, block: str, user_prefix: str) -> dict[str, str]:
    """The slots of a system turn, and the text that the template puts there by itself."""
    try:
        text = _render(tokenizer, _messages(1, system=True))
    except UserError:
        text = ""
    head, found, tail = text.partition(_S)
    tail = tail.partition(_Q.format(0))[0]
    if found and tail.endswith(user_prefix) and head.startswith(bos):
        prefix, suffix = head[len(bos) :], tail[: len(tail) - len(user_prefix)]
        if not block:
            return {"system_prefix": prefix, "system_suffix": suffix}
        if block.startswith(prefix) and block.endswith(suffix):
            middle = block[len(prefix) : len(block) - len(suffix)]
            return {"system_prefix": prefix, "system": middle, "system_suffix": suffix}
    return {"system": block} if block else {}


def _document_end(tokenizer: Any, end: str) -> str:
    known = tokenizer.get_vocab()
    return next((token for token in _DOCUMENT_ENDS if token in known), end)


def _pad(tokenizer: Any, taken: set[str], text: str, full: bool) -> str:
    """A token for padding that no text holds: one that is called so, else a spare one, else a new
    one. Where the embedding is `full`: `<unk>`, or any that the template does not use."""
    spare = [t for t in tokenizer.get_added_vocab() if t not in taken and t not in text]
    for word in ("pad", "reserved", "unused", "empty"):
        if found := [token for token in spare if word in token.lower()]:
            return found[0]
    if full and spare:
        return tokenizer.unk_token if tokenizer.unk_token in spare else spare[-1]
    return "<|pad|>"
