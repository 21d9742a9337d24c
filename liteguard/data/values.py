"""Cells as other programs write them: what is missing, yes or no, HTML, wrongly decoded."""

from __future__ import annotations

import html
import re
from collections import Counter
from typing import Any

# How pandas, Arrow, R, SQL, spreadsheets and people write that there is nothing, in lower case.
MISSING = frozenset(
    ("", "-", "--", "?", ".", "na", "n/a", "n.a.", "#n/a", "#n/a n/a", "#na", "<na>", "nan", "-nan")
    + ("nat", "nil", "none", "null", "\\n", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan", "undefined")
    + ("missing", "(none)", "(null)", "<none>", "<noinput>", "[]", "{}", "<nil>", "<null>", "<nan>")
    + ("<missing>", "#null!", "#value!", "#ref!", "#name?", "#num!", "#div/0!", "---", "n/d", "n/k")
    + ("na_character_", "na_integer_", "na_real_", "\u2013", "\u2014", "\u2212")
)
# Of these, what no answer would be: "None" and "-" may be one, and "" is counted as empty.
NO_TEXT = frozenset(("nan", "NaN", "-nan", "-NaN", "NaT", "<NA>", "N/A", "n/a", "#N/A", "null"))
NO_TEXT |= {"NULL", "#NA", "undefined", "<noinput>"}


def given(value: Any) -> Any:
    """A cell's value, or None where it stands for nothing: null, NaN, "", "N/A", an empty list."""
    if isinstance(value, str):
        return None if len(value) < 16 and _closed(value) in MISSING else value
    if value is None or value != value or value in ([], {}, ()):
        return None
    return value


def _closed(text: str) -> str:
    """A short text in lower case without its blanks: "N / A" and "n. a." are one."""
    return "".join(text.lower().split())


def is_unicode(text: str) -> bool:
    """Whether a text can be written: half a surrogate pair in JSON, or raw bytes in CSV, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def says_yes(value: Any) -> bool | None:
    """What a cell says that is true or false (1, "yes", "f", -1); None when it is neither."""
    text = str(value).strip().lower()
    if text in ("true", "t", "1", "1.0", "yes", "y", "on"):
        return True
    return False if text in ("false", "f", "0", "0.0", "-1", "-1.0", "no", "n", "off") else None


# --- what is no plain text ------------------------------------------------------------------------
_ATTRIBUTES = r"""(?:\s+[\w:-]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+))*\s*/?>"""
_UNSEEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
# Names of tags, so that "p <0.05 and n> 3" stays as it is.
_BLOCK = re.compile(
    r"<(/?)(p|br|hr|div|h[1-6]|ul|ol|li|dl|dt|dd|table|thead|tbody|tr|td|th|section|article|body|"
    rf"html|head|header|footer|pre|blockquote|img|figure|center){_ATTRIBUTES}",
    re.IGNORECASE,
)
_LAYOUT = re.compile(rf"<(?:p|li|div|table|h[1-6]){_ATTRIBUTES}", re.IGNORECASE)
_INLINE = re.compile(
    rf"</?(?:a|b|i|u|s|em|strong|span|font|mark|small|big|code|tt|sub){_ATTRIBUTES}|</sup\s*>",
    re.IGNORECASE,
)
_SUPERSCRIPT = re.compile(rf"<sup{_ATTRIBUTES}", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
# Marks that are not seen: soft hyphens, zero-width spaces, marks of direction. Joiners are letters
# of other scripts and are taken out between Latin ones only.
_INVISIBLE = re.compile(
    "[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
    "|(?<=[A-Za-z])[\u200c\u200d](?=[A-Za-z])"
)
# UTF-8 that was read as Windows-1252 or Latin-1: bytes that follow a lead byte, as characters.
_PUNCTUATION = "\u2026\u2018\u2019\u201a\u201c\u201d\u201e\u2013\u2014\u2039\u203a\u00ab\u00bb"
_BYTES = "\u0080-\u00aa\u00ac-\u00ba\u00bc-\u00bf\u20ac\u0192\u2020\u2021\u02c6\u2030\u0160\u0152"
_BYTES += "\u017d\u2022\u02dc\u2122\u0161\u0153\u017e\u0178"
_ANY_BYTE = f"[{_BYTES}{_PUNCTUATION}]"
_CHARACTER = (
    f"(?:[\u00c2-\u00df]{_ANY_BYTE}|[\u00e0-\u00ef]{_ANY_BYTE}{{2}}"
    f"|[\u00f0-\u00f4]{_ANY_BYTE}{{3}})"
)
# "Ã©", "Ð¿Ñ€"; quotes, arrows and "≥"; Polish, Turkish, Czech letters; emoji; two characters or
# more of any script. In other runs chance may play a part: "groß…" and "à «" are meant.
_MOJIBAKE = re.compile(
    f"(?:[\u00c2\u00c3\u00d0\u00d1]|\u00e2\u20ac)[^\x00-\x7f]+|(?:{_CHARACTER} ?){{2,}}"
    f"|\u00e2{_ANY_BYTE}{{2}}|\u00f0{_ANY_BYTE}{{3}}"
    f"|[\u00c4\u00c5](?:[{_BYTES}]|{_ANY_BYTE}(?=[a-z]))"
)


def mended(text: str, notes: Counter[str]) -> str:
    """A text without tags, entities, invisible marks and wrong decoding; each is counted.

    What stands for a lost character (U+FFFD) cannot be mended: it is counted.
    """
    if "<" in text or "&" in text:
        plain = _without_html(text)
        if plain != text:
            notes["texts with HTML, which is taken out"] += 1
            text = plain
    if text.isascii():
        return text
    if _MOJIBAKE.search(text):
        decoded = _MOJIBAKE.sub(_decoded_again, text)
        what = "are put right" if decoded != text else "stay: decode the source anew"
        notes[f"texts with wrongly decoded characters, which {what}"] += 1
        text = decoded
    if _INVISIBLE.search(text):
        notes["texts with invisible characters, which are taken out"] += 1
        text = _INVISIBLE.sub("", text)
    if "\ufffd" in text:
        notes["texts with U+FFFD where characters were lost before"] += 1
    return text


def _without_html(text: str) -> str:
    if "<" in text:
        if _CLOSED.search(text):  # without an end each beginning would be looked for to the end
            text = _UNSEEN.sub(" ", text)
        if _LAYOUT.search(text):
            bare = _BESIDE_TAGS.sub("", text)
            # Where tags make the lines, a line break is a blank; not where others do as well.
            text = text if _OWN_LINES.search(bare) else " ".join(text.split())
        text = _EMPTY_ITEM.sub("", _BREAK.sub("<br>", text))
        text = _SOFT.sub("\n", _BLOCK.sub(_Breaks(), text))
        text = _ITEM_BEGINS.sub(r"\1", text)
        # 10<sup>9</sup> is another number than 109.
        text = _INLINE.sub("", _SUPERSCRIPT.sub("^", text))
    for _ in range(2):  # "&amp;lt;" was escaped twice
        if "&" in text:
            text = _ENTITY.sub(lambda found: html.unescape(found[0]), text)
    return text


# Several of these are one line break: where one row or item ends, the next begins.
_SOFT_BREAK = "\x1d"
_SOFT = re.compile(f"[ \\t]*{_SOFT_BREAK}[ \\t{_SOFT_BREAK}]*")
_CLOSED = re.compile(r"</(?:script|style)|-->", re.IGNORECASE)
_BESIDE_TAGS = re.compile(r"(?<=>)\s+|\s+(?=<)")
_OWN_LINES = re.compile(r"<pre\b|\n\s*\n|\n\s*(?:[-*\u2022]|\d{1,3}[.)])\s", re.IGNORECASE)
_BREAK = re.compile(rf"<br{_ATTRIBUTES}[ \t]*\n?", re.IGNORECASE)
_EMPTY_ITEM = re.compile(rf"<li{_ATTRIBUTES}\s*</li\s*>", re.IGNORECASE)
# A paragraph in an item begins beside its mark.
_ITEM_BEGINS = re.compile(r"((?:^|\n)(?:-|\d+\.) )\s*\n\s*(?!-|\d+\. )")
_NUMBER = re.compile(r"\b(?:start|value)\s*=\s*[\"']?(-?\d{1,6})", re.IGNORECASE)


class _Breaks:
    """What stands in the place of a tag, one text from its beginning to its end: line breaks, and
    the marks of lists, numbers in those that count."""

    def __init__(self) -> None:
        self._lists: list[int | None] = []

    def __call__(self, found: re.Match[str]) -> str:
        closes, name = found[1], found[2].lower()
        given = _NUMBER.search(found[0])
        if name in ("ul", "ol"):
            inside = len(self._lists) > (1 if closes else 0)
            if not closes:
                first = int(given[1]) if given else 1
                self._lists.append(first - 1 if name == "ol" else None)
            elif self._lists:
                self._lists.pop()
            return _SOFT_BREAK if inside else "\n\n"
        if name == "li" and not closes:
            number = self._lists[-1] if self._lists else None
            if number is None:
                return f"{_SOFT_BREAK}- "
            self._lists[-1] = number = int(given[1]) if given else number + 1
            return f"{_SOFT_BREAK}{number}. "
        if name in ("td", "th", "img"):
            return " "
        if name == "br":
            return "\n"
        return _SOFT_BREAK if name in ("li", "tr", "dt", "dd", "div") else "\n\n"


def _decoded_again(found: re.Match[str]) -> str:
    try:
        return b"".join(map(_byte, found[0])).decode("utf-8")
    except UnicodeError:
        return found[0]


def _byte(character: str) -> bytes:
    """The byte of Windows-1252, whose five holes most programs fill as Latin-1 does."""
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1")
