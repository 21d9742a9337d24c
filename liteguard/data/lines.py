"""The lines of a text: paragraphs and lists are kept, wrapped lines are joined.

A file that was printed for a screen of 80 characters ends its lines where there was no more room; a
list and a paragraph end them because something ends. The first kind is undone, the second is what
the answer on a phone is to look like. The device reads a line break as training does: the ids of
texts in lines are equal as often as those of the same texts in one line (tests/test_lines.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from liteguard.text import plain

# A list is marked in many ways; "-" is one that every vocabulary has.
_BULLET = re.compile(
    "(?:[\u2022\u2023\u2043\u2219\u25aa\u25cf\u25e6\u25a0\uf0b7]|\u00b7(?=\\s))\\s*"
)
# Items; "A. baumannii" at the beginning of a line is none.
_ITEM = re.compile(r"(?:[-*]|\d{1,3}[.)]|\(?(?:[A-Za-z]|\d{1,3}|[ivx]{2,4})\))(?:\s|$)")
_FIRST = re.compile(r"\(?(?:1|a|A|i)[.)]")
_HEADING_OR_TABLE = re.compile(r"#{1,6} |\|")
_LABEL = re.compile(r"[^\W\d_]+:")
_BREAK = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# Widths for which programs wrap text; what is narrower is a list, what is wider was not wrapped.
NARROWEST, WIDEST = 50, 130


class Line(NamedTuple):
    """A line without the blanks around it, and how many were before it."""

    text: str
    indent: int


def normalise_lines(text: str) -> str:
    """`text.plain`, with one blank between words, one line break between lines and an empty line
    between paragraphs. Indentation and further empty lines, also between items, are not kept."""
    if not _BREAK.search(text):
        return " ".join(plain(text).split())
    lines = [_line(raw) for raw in plain("\n".join(map(_marked, text.splitlines()))).split("\n")]
    blocks = list(_blocks(lines))
    # A line of a web address, or of another paragraph that nobody wrapped, is no measure.
    fitting = [len(line.text) for line in lines if " " in line.text and len(line.text) <= WIDEST]
    width = max(fitting, default=0)
    # A block of two lines is not enough to tell a wrapped line from two that somebody wrote.
    several = any(len(block) > 2 and _is_wrapped(block, width) for _, block in blocks)
    made: list[str] = []
    for blank, block in blocks:
        if (len(block) > 2 or several) and _is_wrapped(block, width) or _hangs(block):
            block = [Line(" ".join(line.text for line in block), 0)]
        if made and blank and not _goes_on(made[-1], block[0].text):
            made.append("")
        made += [line.text for line in block]
    return "\n".join(made)


def _marked(line: str) -> str:
    """A line whose round or square bullet is a "-"."""
    bare = line.lstrip()
    found = _BULLET.match(bare)
    return f"{line[: len(line) - len(bare)]}- {bare[found.end() :]}" if found else line


def _line(raw: str) -> Line:
    return Line(" ".join(raw.split()), len(raw) - len(raw.lstrip()))


def _goes_on(before: str, item: str) -> bool:
    """Whether an item belongs to the list of the line before the empty one."""
    same = _ITEM.match(before) and _ITEM.match(item)
    return bool(same) and (before[0] in "-*") == (item[0] in "-*") and not _FIRST.match(item)


def _blocks(lines: Sequence[Line]) -> Iterator[tuple[bool, list[Line]]]:
    """(whether an empty line is before it, lines) of each paragraph or item of a list; a heading
    and a row of a table are blocks of their own."""
    block: list[Line] = []
    before = blank = alone = False
    for line in lines:
        own = bool(_HEADING_OR_TABLE.match(line.text))
        if block and (not line.text or own or alone or _ITEM.match(line.text)):
            yield before, block
            block = []
        if line.text and not block:
            before, blank = blank, False
        block += [line] if line.text else []
        blank, alone = blank or not line.text, own
    if block:
        yield before, block


def _hangs(block: Sequence[Line]) -> bool:
    """Whether an item of a list goes on in lines that stand further in than its mark."""
    first, *others = block
    further = all(line.indent > first.indent and _continues(line.text) for line in others)
    return bool(others) and bool(_ITEM.match(first.text)) and further


def _is_wrapped(block: Sequence[Line], width: int) -> bool:
    """Whether lines end where the next word did not fit into `width` characters, and not by chance:
    half of them go on in lower case, and none is "dose: 5 mg"."""
    if len(block) < 2 or not NARROWEST <= width <= WIDEST:
        return False
    texts = [line.text for line in block]
    following = list(zip(texts, texts[1:], strict=False))
    full = all(" " in a and len(a) + 1 + len(b.split(" ", 1)[0]) > width for a, b in following)
    lower = [_continues(after) for _, after in following]
    labelled = any(_LABEL.match(after) for _, after in following)
    return full and 2 * sum(lower) >= len(lower) and not labelled


def _continues(text: str) -> bool:
    return text[0].islower() and not _LABEL.match(text)
