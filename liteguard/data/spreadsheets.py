"""Cells of an .xlsx file, which is a zip file of XML, with the standard library alone."""

from __future__ import annotations

import itertools
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from liteguard.data.files import say_once
from liteguard.errors import UserError, first_line
from liteguard.wheels import MAX_WHOLE_BYTES

_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_LINK = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


def sheet_rows(path: Path) -> Iterator[tuple[int, list[str | None]]]:
    """(number, cells) of the first sheet's rows that hold anything; other sheets are named.

    Raises UserError for what is not such a file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            large = [
                info.filename for info in archive.infolist() if info.file_size > MAX_WHOLE_BYTES
            ]
            if large:
                raise UserError(f"{path}: {large[0]} in it is too large. Save it as CSV UTF-8.")
            member, others = _first_sheet(archive)
            if others:
                say_once(f"  {path}: only the first sheet is read, not {', '.join(others)}")
            shared = _shared_texts(archive)
            with archive.open(member) as file:
                yield from _rows(file, shared)
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError),
        *(ElementTree.ParseError, KeyError, IndexError, ValueError),
    ) as error:
        raise UserError(
            f"{path}: cannot be read as a spreadsheet ({first_line(error)}).\n"
            "Copy it again, or save it in the spreadsheet program as CSV UTF-8."
        ) from None


def _first_sheet(archive: zipfile.ZipFile) -> tuple[str, list[str]]:
    """(member of the archive, names of the other sheets)."""
    book = ElementTree.fromstring(archive.read("xl/workbook.xml"))
    links = ElementTree.fromstring(archive.read("xl/_rels/workbook.xml.rels"))
    targets = {link.get("Id"): link.get("Target", "") for link in links}
    first, *others = book.iter(f"{_MAIN}sheet")
    target = targets[first.get(_LINK)]
    member = target.lstrip("/") if target.startswith("/") else f"xl/{target}"
    return member, [repr(sheet.get("name")) for sheet in others]


def _shared_texts(archive: zipfile.ZipFile) -> list[str]:
    """The texts that cells name by their number."""
    if "xl/sharedStrings.xml" not in archive.namelist():
        return []
    found = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
    return [_text(item) for item in found.iter(f"{_MAIN}si")]


def _text(element: ElementTree.Element) -> str:
    """The runs of a text; not what is written above them to say how they are pronounced."""
    spoken = {id(t) for over in element.iter(f"{_MAIN}rPh") for t in over.iter(f"{_MAIN}t")}
    text = "".join(t.text or "" for t in element.iter(f"{_MAIN}t") if id(t) not in spoken)
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)


# A character that XML cannot hold, mostly the carriage return of a pasted line: "_x000D_".
_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")


def _rows(file, shared: list[str]) -> Iterator[tuple[int, list[str | None]]]:
    number = 0
    for _, element in ElementTree.iterparse(file):
        if element.tag != f"{_MAIN}row":
            continue
        number = int(element.get("r", number + 1))
        cells: list[str | None] = []
        for cell in element.iter(f"{_MAIN}c"):
            place = _column(cell.get("r", "")) or len(cells) + 1
            cells += [None] * (place - len(cells))
            cells[place - 1] = _value(cell, shared)
        if any(cells):
            yield number, cells
        element.clear()


def _column(reference: str) -> int:
    """3 of 'C7'."""
    column = 0
    for letter in itertools.takewhile(str.isalpha, reference[:3]):
        column = 26 * column + ord(letter) - 64
    return column


def _value(cell: ElementTree.Element, shared: list[str]) -> str | None:
    kind = cell.get("t", "n")
    if kind == "inlineStr":
        return _text(cell)
    value = cell.findtext(f"{_MAIN}v")
    if value is None or kind == "e":  # "#N/A", "#REF!"
        return None
    if kind == "b":
        return "true" if value == "1" else "false"
    if kind == "s":
        return shared[int(value)]
    # Of a number 17 digits are kept and 15 are shown: 4.1 is written as 4.0999999999999996.
    return f"{float(value):.15g}" if kind == "n" and "." in value else value
