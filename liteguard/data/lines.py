"""The lines of a text: paragraphs and lists are kept, wrapped lines are joined.

A file that was printed for a screen of 80 characters ends its lines where there was no more room; a
list and a paragraph end them because something ends. The first kind is undone, the second is what
the answer on a phone is to look like. The device reads a line break as training does: the ids of
texts in lines are equal as often as those of the same texts in one line (tests/test_lines.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from liteguard.text import plain

# A list is marked in many ways; "-" is one that every vocabulary has.
_BULLET = re.compile(
    "^(?:[\u2022\u2023\u2043\u2219\u25aa\u25cf\u25e6\u25a0\uf0b7]|\u00b7(?=\\s))\\s*"
)
_ITEM = re.compile(r"(?:[-*+]|\(?(?:\d{1,3}|[A-Za-z])[.)])(?:\s|$)|#{1,6} |\|")
_MARKER_ALONE = re.compile(r"(?:[-*+]|\(?(?:\d{1,3}|[A-Za-z])[.)])$")
# Widths for which programs wrap text; what is narrower is a list, what is wider was not wrapped.
NARROWEST, WIDEST = 50, 130


def normalise_lines(text: str) -> str:
    """`text.plain`, with one blank between words, one line break between lines and an empty line
    between paragraphs. Indentation and further empty lines, also between items, are not kept."""
    if not _BREAK.search(text):
        return " ".join(plain(text).split())
    marked = "\n".join(_BULLET.sub("- ", line.strip(), count=1) for line in text.splitlines())
    lines = _with_markers(" ".join(line.split()) for line in plain(marked).split("\n"))
    width = max(map(len, lines))
    made: list[str] = []
    for blank, block in _blocks(lines):
        if _is_wrapped(block, width):
            block = [" ".join(block)]
        if made and blank and not (_ITEM.match(block[0]) and _ITEM.match(made[-1])):
            made.append("")
        made += block
    return "\n".join(made)


def _blocks(lines: Sequence[str]) -> Iterator[tuple[bool, list[str]]]:
    """(whether an empty line is before it, lines) of each paragraph or item of a list."""
    block: list[str] = []
    before = blank = False
    for line in lines:
        if block and (not line or _ITEM.match(line)):
            yield before, block
            block = []
        if line and not block:
            before, blank = blank, False
        block += [line] if line else []
        blank = blank or not line
    if block:
        yield before, block


_BREAK = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


def _with_markers(lines: Iterable[str]) -> list[str]:
    """Lines, where "-" and its item on the next line are one."""
    joined: list[str] = []
    for line in lines:
        if joined and _MARKER_ALONE.match(joined[-1]) and not _ITEM.match(line):
            joined[-1] += f" {line}" if line else ""
        else:
            joined.append(line)
    return joined


def _is_wrapped(block: Sequence[str], width: int) -> bool:
    """Whether lines end where the next word did not fit into `width` characters, and not by chance:
    half of them go on in lower case. An item of a list goes on in lower case, or the next begins.
    """
    if len(block) < 2:
        return False
    following = list(zip(block, block[1:], strict=False))
    lower = [after[0].islower() for _, after in following]
    if _ITEM.match(block[0]) and all(lower):
        return True
    full = all(len(a) + 1 + len(b.split(" ", 1)[0]) > width for a, b in following)
    return NARROWEST <= width <= WIDEST and full and 2 * sum(lower) >= len(lower)
