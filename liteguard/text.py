"""Characters, words and hashes of texts, as every stage sees them."""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata

# Typographic characters that phones type by themselves ("smart punctuation"), and their plain
# equivalents: `plain` replaces all in data, a `.task` those that its vocabulary cannot spell.
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


def plain(text: str) -> str:
    """NFC text with plain quotes and dashes; NUL and names of control tokens are taken out.

    Typographic characters that are spelled with incomplete UTF-8 tokens are where SentencePiece on
    the device and a byte-level BPE differ, so training on the plain form keeps its ids equal.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_TO_PLAIN)
    text = text.replace("\x00", "")
    return _CONTROL.sub(" ", text) if "<" in text else text


def normalise(text: str) -> str:
    """`plain` text in one line, for names and for what is only compared; what is learnt or asked
    keeps its lines (`data/lines.py`). Runs of blanks have other ids on the device: one is left."""
    return " ".join(plain(text).split())


# What a tokenizer would read as a control token ("<|im_end|>" in a forum post would end the answer
# there): those of Phi, Qwen, Llama 3 and SmolLM, of SentencePiece, of Gemma, and DeepSeek's with
# their wide bars.
_CONTROL = re.compile(
    r"<\|[A-Za-z0-9_]{1,40}\|>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>"
    "|<\uff5c[^\uff5c<>]{1,40}\uff5c>"
)
# Signs that change what a medical text says, as the words they become in a `text_key`.
_SIGNS = {
    **{sign: f" {sign} " for sign in "<>%+=~\u00b0"},
    **{">=": " \u2265 ", "<=": " \u2264 ", "=<": " \u2264 ", "+/-": " \u00b1 "},
    **{"-": " \u2212 ", "/": " \u2044 ", "\u2044": " \u2044 ", ".": "\u00b7"},
}
# A hyphen is a minus before a number, at the end of a word ("Rh-"), alone at the end of a phrase
# ("HBsAg (-)") and raised, not inside of a word; a point and a slash are parts of numbers between
# digits ("120/80", not "and/or").
_SIGN = re.compile(
    r">=|<=|=<|\+/-|[<>%+=~\u00b0]"
    r"|-(?<=\w-)(?!\w)|-(?<!\w-)(?=\.?\d)|-(?<=[\s(]-)(?=\s*(?:[),.;:?!]|$))|-(?<=\^-)"
    r"|[./\u2044](?<=\d[./\u2044])(?=\d)"
)
_NOT_WORD_OR_SIGN = re.compile(r"(?:[^\w<>\u2264\u2265\u00b1\u00b0%+=~\u2212\u2044\u00b7]|_)+")
# Raised: 10\u2079 is not 109.
_RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070-\u207f]+")
# Other shapes of one sign, once full-width and raised ones are plain (NFKC).
_ONE_SHAPE = str.maketrans(
    {
        **dict.fromkeys("\u2a7e\u2267\u2273", "\u2265"),
        **dict.fromkeys("\u2a7d\u2266\u2272", "\u2264"),
        **{"\u2212": "-", "\u223c": "~", "\u2795": "+", "\u2796": "-"},
    }
)
# Beside the characters of mathematics: female, male; arrows and triangles, up or down.
_MORE_SIGNS = "\u2640\u2642\u26a5\u2797"
_MORE_SIGNS += "".join(map(chr, [*range(0x2190, 0x2200), *range(0x25B2, 0x25C6)]))
_MORE_SIGNS += "".join(map(chr, [*range(0x27F0, 0x2800), *range(0x2B00, 0x2B12)]))
_NOT_WORD = re.compile(r"[\W_]+")


@functools.cache
def _unicode_patterns() -> tuple[re.Pattern[str], ...]:
    """(not a word, a sign, not a word or a sign, a character of a script without blanks).

    Vowel signs and the like (category M) belong to the letter before them; Python's \\w does not
    hold them.
    """
    codes = (c for c in range(0x300, 0x1F000) if not 0xFE00 <= c <= 0xFE0F)  # variation selectors
    marks = "".join(chr(c) for c in codes if unicodedata.category(chr(c))[0] == "M")
    # The characters of mathematics; not those that _SIGN makes of others.
    found = {chr(c) for c in range(0xA1, 0x3000) if unicodedata.category(chr(c)) == "Sm"}
    signs = re.escape("".join(sorted({*found, *_MORE_SIGNS} - {"\u2044", "\u2212"})))
    kept = _NOT_WORD_OR_SIGN.pattern.replace("^", f"^{marks}{signs}")
    # Thai, Lao, Burmese, Khmer, kana, Chinese characters.
    unspaced = (
        "\u0e01-\u0e4e\u0e81-\u0edf\u1000-\u103f\u1780-\u17d3\u3005-\u3007\u3041-\u30ff"
        "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    )
    return (
        re.compile(f"(?:[^\\w{marks}]|_)+"),
        re.compile(f"([{signs}])"),
        re.compile(kept),
        re.compile(f"([{unspaced}][{marks}]*)"),
    )


def match_key(name: str) -> str:
    """Letters and digits of a name in lower case: equal for names that read the same."""
    not_word = _NOT_WORD if name.isascii() else _unicode_patterns()[0]
    return not_word.sub(" ", name.casefold()).strip()


def text_key(text: str) -> str:
    """Words and medical signs of a text in lower case, with one blank between them.

    Equal for texts that say the same: "K > 5", "K < 5" and "K 5" are three, "Rh+" and "Rh-" two,
    full-width characters are as others. A script that is written without blanks has a word for
    every character.
    """
    if not text.isascii():
        text = _RAISED.sub(r"^\g<0>", text)
        text = unicodedata.normalize("NFKC", text).translate(_ONE_SHAPE)
    text = _SIGN.sub(lambda found: _SIGNS[found[0]], text.casefold())
    if text.isascii():
        return " ".join(_NOT_WORD_OR_SIGN.sub(" ", text).split())
    _, sign, not_kept, unspaced = _unicode_patterns()
    text = not_kept.sub(" ", sign.sub(r" \1 ", text))
    return " ".join(unspaced.sub(r" \1 ", text).split())


def is_latin(text: str) -> bool:
    """Whether at least half of the letters of a text are Latin ones (beta-blocker with a Greek beta
    is); a text without letters is taken to be."""
    if text.isascii():
        return True
    letters = [ord(letter) < 0x250 for letter in text if letter.isalpha()]
    return 2 * sum(letters) >= len(letters)


def is_unspaced(text: str) -> bool:
    """Whether at least half of the letters are of scripts that are written without blanks."""
    if text.isascii():
        return False
    return 2 * len(_unicode_patterns()[3].findall(text)) > sum(map(str.isalpha, text))


def has_words(text: str) -> bool:
    """Whether a text has letters or digits, not signs alone."""
    return any(map(str.isalnum, text))


def pieces(text: str, limit: int, shortest: int = 1) -> list[str]:
    """A normalised text in pieces of at most `limit` characters, cut at the ends of sentences.

    Where a sentence is longer, at a line break or a blank, and inside of a word when there is none.
    Nothing is lost, and no piece is shorter than `shortest` if that can be.
    """
    found = []
    while len(text) > limit:
        # Not a last piece of a few characters: the last two are about equal.
        size = limit if len(text) >= limit + shortest else max(1, len(text) // 2)
        ends = [match.end() for match in _SENTENCE_END.finditer(text, 0, size + 1)]
        ends = [end for end in ends if shortest <= end <= size]
        lines = text.rfind("\n", shortest, size + 1)
        cut = ends[-1] if ends else lines if lines > 0 else text.rfind(" ", shortest, size + 1)
        cut = cut if cut > 0 else size
        found.append(text[:cut].strip())
        text = text[cut:].strip()
    return [*found, text] if text else found


# The marks of other scripts end a sentence without a blank after them. "1." begins an item.
_SENTENCE_END = re.compile(
    r"(?<!^\d)(?<!^\d\d)(?<!\n\d)(?<!\n\d\d)[.!?][\"')\]]*(?=\s)|[\u3002\uff01\uff1f\u0964\u06d4]"
)


def first_words(text: str, count: int) -> int:
    """Where the first `count` words of a text end; its length where there are no more."""
    for number, word in enumerate(re.finditer(r"\S+", text), start=1):
        if number == count:
            return word.end()
    return len(text)


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
