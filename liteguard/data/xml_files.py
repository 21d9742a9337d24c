"""Questions and answers of XML files in MedQuAD's layout, one row a pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO
from xml.etree import ElementTree
from xml.parsers import expat

from liteguard.errors import UserError, first_line
from liteguard.rows import Row
from liteguard.wheels import MAX_WHOLE_BYTES


def qa_rows(path: Path, file: IO[bytes], encoding: str | None) -> Iterator[tuple[str, Row]]:
    """(place, row) of every QAPair: "question", "answer", "qtype", and "entity", its subject.

    encoding: that the file was named to be in; it comes as UTF-8 then. A pair without an answer
    (most of MedQuAD's were withdrawn by who wrote them) is a question that exams may hold, and not
    for training. Raises UserError for what is no XML, or another layout.
    """
    root = _parsed(path, file, encoding)
    pairs = list(root.iter("QAPair"))
    if not pairs and root.find("QAPairs") is None:
        raise UserError(
            f"{path}: no QAPair in <{root.tag}>. Of XML files only MedQuAD's layout is read: "
            "Document, QAPairs, QAPair with Question and Answer.\n"
            "Convert it to .jsonl or .csv, or move it out of the directory."
        )
    focus = _text(root.find("Focus"))
    for number, pair in enumerate(pairs, 1):
        question, answer = pair.find("Question"), _text(pair.find("Answer"))
        row: Row = {
            "question": _text(question),
            "answer": answer,
            "qtype": question.get("qtype") if question is not None else None,
            "entity": focus or None,
        }
        yield f"{path}, item {number}", row if answer else {**row, "train": False}


def _text(element: ElementTree.Element | None) -> str:
    return "" if element is None else "".join(element.itertext()).strip()


def _parsed(path: Path, file: IO[bytes], encoding: str | None) -> ElementTree.Element:
    """The root of a document without entities of its own: such grow without end, or name files."""
    data = file.read(MAX_WHOLE_BYTES + 1)
    if len(data) > MAX_WHOLE_BYTES:
        raise UserError(f"{path}: larger than {MAX_WHOLE_BYTES:,} bytes. Split it.")
    # What was recoded while it was opened declares its old encoding.
    recoded = encoding or b"utf-16" in data[:200].lower()
    parser, tree = expat.ParserCreate("utf-8" if recoded else None), ElementTree.TreeBuilder()

    def refuse(*_: object) -> None:
        raise UserError(
            f"{path}, line {parser.CurrentLineNumber}: a DOCTYPE, which is not read: what it "
            "declares can make a short file endless. Delete it from the file."
        )

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = tree.start
    parser.EndElementHandler = tree.end
    parser.CharacterDataHandler = tree.data
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not whole XML ({expat.ErrorString(error.code)}).\n"
            "Copy or download it again, or move it out of the directory."
        ) from None
    except (LookupError, ValueError) as error:  # a name of an encoding that the parser cannot take
        raise UserError(
            f"{path}: the encoding of its first line cannot be read ({first_line(error)}).\n"
            "Save it as UTF-8, or write `encoding:` in this source's entry in the YAML."
        ) from None
    return tree.close()
