"""Characters, words and hashes of texts, as every stage sees them."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# Typographic characters that phones type by themselves ("smart punctuation"), and their plain
# equivalents. Only those that the vocabulary spells with incomplete UTF-8 are ever replaced.
PLAIN = {
    "\u2018": "'",
    "\u2019": "'",
    "\u201a": "'",
    "\u201b": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u201e": '"',
    "\u2032": "'",
    "\u2033": '"',
    "\u2010": "-",
    "\u2011": "-",
    "\u2012": "-",
    "\u2013": "-",
    "\u2014": "-",
    "\u2015": "-",
    "\u2212": "-",
    "\u2022": "-",
    "\u2026": "...",
    "\u2103": "\u00b0C",
    "\u2109": "\u00b0F",
    "\u00a0": " ",
    "\u2002": " ",
    "\u2003": " ",
    "\u2008": " ",
    "\u2009": " ",
    "\u200a": " ",
    "\u202f": " ",
    "\u200b": "",
    "\u2060": "",
    "\ufeff": "",
}
_TO_PLAIN = {ord(character): plain for character, plain in PLAIN.items()}


def normalise(text: str) -> str:
    """NFC text with plain quotes and dashes and with every run of whitespace as one blank.

    Both are where SentencePiece on the device and a byte-level BPE differ (runs of newlines, tabs
    and blanks; typographic characters spelled with incomplete UTF-8 tokens), so training on the
    plain form keeps its ids equal to the device's. NUL and names of control tokens are taken out.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_TO_PLAIN)
    text = text.replace("\x00", "")
    if "<" in text:
        text = _CONTROL.sub(" ", text)
    return " ".join(text.split())


# What a tokenizer would read as a control token ("<|im_end|>" in a forum post would end the answer
# there).
_CONTROL = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>|</?s>")
# Letters and digits of any script: a key of Latin letters only would make all Chinese texts equal.
_NOT_WORD = re.compile(r"[\W_]+")


def match_key(text: str) -> str:
    """Letters and digits of a text in lower case: equal for texts that read the same."""
    return _NOT_WORD.sub(" ", text.casefold()).strip()


def pick(options: list[str], *key: str) -> str:
    """One of `options`, chosen by a hash of `key`, so that the data do not depend on order."""
    digest = hashlib.sha256("\x1f".join(key).encode()).digest()
    return options[int.from_bytes(digest[:4], "big") % len(options)]


def unit(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def upper_first(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def sentences(text: str, limit_words: int) -> str:
    """The first sentences of `text`, whole ones, up to about `limit_words` words."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?]) +(?=[A-Z])", text):
        if kept and len(" ".join(kept).split()) + len(sentence.split()) > limit_words:
            break
        kept.append(sentence)
    result = " ".join(kept)
    return result if result.endswith((".", "!", "?")) else result + "."


def listed(items: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
