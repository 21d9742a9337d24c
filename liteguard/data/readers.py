"""Rows of local files and of hub data sets, one by one, with what is wrong with each file.

Files are streamed: only a .json document is read as a whole, and refused when it is large."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from liteguard import hub
from liteguard.data.files import (
    SPLIT_NAMES,
    encoding_hint,
    files_and_splits,
    kind,
    open_data,
    unreadable,
)
from liteguard.data.spreadsheets import sheet_rows
from liteguard.data.xml_files import qa_rows
from liteguard.errors import UserError, first_line
from liteguard.rows import Row
from liteguard.wheels import MAX_WHOLE_BYTES

if TYPE_CHECKING:
    from pyarrow import RecordBatch

    from liteguard.config import SourceSection


# A longer line or paragraph is not a text to train on; no more of it is held in memory.
MAX_LINE_BYTES = 10_000_000
BATCH_ROWS = 1_000


@dataclass(frozen=True)
class Broken:
    """A row that cannot be used, in place of the row.

    `place`: 'texts.jsonl, line 7'; `reason`: one of few words, fit for counting; `text`: the first
    200 characters of what is there, printable.
    """

    place: str
    reason: str
    text: str = ""


class LeftOut(Broken):
    """A sound row that is not for training, or not yet; counted, and no sign of a bad source."""


def broken(place: str, reason: str, content: bytes | object, made: type[Broken] = Broken) -> Broken:
    """A `Broken` with the beginning of `content` made printable."""
    if isinstance(content, bytes):
        text = content[:800].decode("utf-8", errors="replace")
    else:
        text = content if isinstance(content, str) else str(content)
    shown = "".join(c if c.isprintable() else " " for c in text[:200])
    return made(place, reason, shown)


_HINTS = {
    "paragraph longer than 10 MB": "When every line is a text of its own, write in the YAML, in "
    "this source's entry:\n    text_unit: line",
}


def hints(rows: list[Broken], source: SourceSection) -> list[str]:
    """What to do about the reasons of some broken rows of a source."""
    found = [_HINTS[reason] for reason in dict.fromkeys(r.reason for r in rows) if reason in _HINTS]
    place = next((row.place for row in rows if row.reason == "not UTF-8"), None)
    if place and source.path and not source.encoding:
        file = Path(re.sub(r"(?: \(cells [^)]*\))?, (?:line|row|item) \d+$", "", place))
        if file.is_file() and kind(file)[0] not in (".parquet", ".arrow", ".xlsx"):
            found.append(encoding_hint(file))
    return found


class Tally:
    """Passes rows on and counts the broken ones, for `check` after the last row.

    It counts what was read, before any sampling: the share is that of the source. `notes` are what
    the reading of a layout counted, for the screen and the manifest.
    """

    def __init__(self, rows: Iterable[Row | Broken], source: SourceSection):
        self.source = source
        self.read = self.broken = 0
        self.first: list[Broken] = []
        notes = getattr(rows, "notes", None)  # empty until its rows are read
        self.notes: Counter[str] = Counter() if notes is None else notes
        self._rows = rows

    def __iter__(self) -> Iterator[Row | Broken]:
        for row in self._rows:
            self.read += 1
            if isinstance(row, Broken) and not isinstance(row, LeftOut):
                self.broken += 1
                self.first += [row][: 5 - len(self.first)]
            yield row

    def check(self) -> None:
        """Raise UserError when more rows were broken than the source's `max_broken` allows."""
        allowed = self.source.max_broken
        if self.broken <= allowed * self.read:
            return
        lines = [f"  {row.place}: {row.reason}: {row.text}" for row in self.first]
        if self.broken > len(lines):
            lines.append(f"  and {self.broken - len(lines):,} more")
        lines += hints(self.first, self.source)
        share = self.broken / self.read
        raise UserError(
            f"{self.source.path or self.source.hub or self.source.dataset}: {self.broken:,} of "
            f"{self.read:,} rows are broken ({share:.1%}, allowed: {allowed:.1%}):\n"
            + "\n".join(lines)
            + "\nRepair or remove them, or write in the YAML, in this source's entry, to go on "
            f"without them:\n    max_broken: {math.ceil(share * 100) / 100}   # now {allowed}"
        )


def read_rows(source: SourceSection) -> Iterator[tuple[str, Row | Broken]]:
    """(place, row) of a hub dataset or of a local file or directory, one after the other.

    A place is 'texts.jsonl, line 7'. Rows are streamed, at most a batch at a time. Local: .jsonl,
    .ndjson, .csv (with a header), .tsv, .txt (by `text_unit`), .json, .xml (MedQuAD's), each also
    .gz and .zst; .parquet, .arrow, .xlsx; directories of them. A .json file is read as a whole: for
    large data use .jsonl. Raises UserError for what cannot be reached or read; a bad row is a
    `Broken`.
    """
    return ((place, row) for place, row, _ in rows_and_splits(source))


def rows_and_splits(
    source: SourceSection,
) -> Iterator[tuple[str, Row | Broken, str | None]]:
    """`read_rows` with the split that the file's name, or the hub, says that a row belongs to."""
    if source.path:
        for file, split in files_and_splits(source).items():
            for place, row in _read_file(file, source):
                yield place, row, split
        return
    if not source.hub:
        raise UserError(
            f"Dataset {source.dataset!r} needs 'hub:' (a dataset id) or 'path:' (a local file)."
        )
    yield from _hub_rows(source)


def _hub_rows(source: SourceSection) -> Iterator[tuple[str, Row, str | None]]:
    """(place, row, split) of a hub dataset at the commit that was resolved, streamed."""
    import datasets

    repository = hub.Repository("dataset", source.hub or "", source.revision)
    commit = hub.commit(repository)
    try:
        names = hub_splits(source)
        for name, split in names:
            rows = datasets.load_dataset(
                source.hub,
                source.config_name,
                split=name,
                revision=commit,
                streaming=True,
            )
            label = "row" if len(names) == 1 else f"{name} row"
            # It is streamed, so the first ones; of each split, or the held-out ones were not seen.
            for number, row in enumerate(itertools.islice(rows, source.limit), 1):
                yield f"{source.hub}, {label} {number}", row, split
    except ValueError as error:
        # What the library says to an unknown configuration or split lists those that exist.
        raise UserError(
            f"The dataset {source.hub!r} cannot be read with config_name {source.config_name!r}, "
            f"split {source.split or 'train'!r}, revision {source.revision!r}: "
            f"{' '.join(str(error).split())[:600]}\n"
            "Correct them in this source's entry in the YAML."
        ) from None
    except Exception as error:  # noqa: BLE001 - the hub client raises many unrelated classes
        raise hub.failure(repository, error, "The reading of") from None


def hub_splits(source: SourceSection) -> list[tuple[str, str | None]]:
    """(name, which of ours it is) of every split of a hub dataset that is read."""
    if source.split == "all":
        import datasets

        commit = hub_commit(source)
        names = datasets.get_dataset_split_names(source.hub, source.config_name, revision=commit)
    else:
        names = [name.strip() for name in (source.split or "train").split("+")]
    # 'test_sft', 'train[:10%]', 'validation-00'
    return [(n, SPLIT_NAMES.get(re.split(r"[^a-z]", n.lower())[0])) for n in names]


def hub_commit(source: SourceSection) -> str:
    """The commit that a hub dataset's revision stands for."""
    return hub.commit(hub.Repository("dataset", source.hub or "", source.revision))


def _read_file(path: Path, source: SourceSection) -> Iterator[tuple[str, Row | Broken]]:
    """(place, row) of one local file; UserError when the file as a whole cannot be read."""
    import pyarrow

    ending = kind(path)[0]
    try:
        if ending in BINARY_READERS:
            yield from BINARY_READERS[ending](path)
            return
        with open_data(path, source.encoding) as file:
            yield from TEXT_READERS[ending](path, file, source)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: cannot be read, the gzip file is truncated or damaged "
            f"({first_line(error)}).\nCopy or download it again; `gzip -t {path}` checks it."
        ) from None
    except UnicodeError as error:
        raise UserError(
            f"{path}: is not in the encoding {source.encoding or 'utf-16'} ({first_line(error)}).\n"
            "Correct `encoding:` in this source's entry, or copy the file again."
        ) from None
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from None


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes, bool]]:
    """(number, line, whole): a line longer than MAX_LINE_BYTES is cut there and not whole."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of Windows programs
        whole = len(line) <= MAX_LINE_BYTES or line.endswith(b"\n")
        end = line
        while not whole and end and not end.endswith(b"\n"):
            end = file.readline(MAX_LINE_BYTES)
        yield number, line, whole


def _jsonl_rows(
    path: Path, file: IO[bytes], source: SourceSection
) -> Iterator[tuple[str, Row | Broken]]:
    for number, line, whole in _lines(file):
        place = f"{path}, line {number}"
        if not whole:
            yield place, broken(place, "line longer than 10 MB", line)
        elif line.strip():
            yield place, _json_row(place, line)


def _json_row(place: str, line: bytes) -> Row | Broken:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return broken(place, "not UTF-8", line)
    except (ValueError, RecursionError):  # RecursionError: a hundred thousand brackets
        return broken(place, "not JSON", line)
    return row if isinstance(row, dict) else broken(place, "not an object with columns", line)


def _json_rows(
    path: Path, file: IO[bytes], source: SourceSection
) -> Iterator[tuple[str, Row | Broken]]:
    """A list of objects, or an object with one list; the whole file is held in memory."""
    text = file.read(MAX_WHOLE_BYTES + 1)
    if len(text) > MAX_WHOLE_BYTES:
        raise UserError(
            f"{path}: larger than {MAX_WHOLE_BYTES:,} bytes, and a .json file is read as a whole.\n"
            "Write one object a line into a .jsonl file, which is streamed."
        )
    expected = "expected a list of objects, or an object with one such list"
    try:
        rows = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        hint = "When it has one object a line, name it .jsonl."
        if isinstance(error, UnicodeDecodeError):
            hint += "\n" + encoding_hint(path)
        raise UserError(
            f"{path}: not a JSON file ({first_line(error)}); {expected}.\n{hint}"
        ) from None
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else None
    if not isinstance(rows, list):
        raise UserError(f"{path}: {expected}.")
    for number, row in enumerate(rows, 1):
        place = f"{path}, item {number}"
        if not isinstance(row, dict):
            row = broken(place, "not an object with columns", row)
        yield place, row


class _CsvLines:
    """Lines of a CSV file as text, for csv.reader; `number` is that of the last line.

    Not a generator, because the reader can go on after an exception. Bytes that are not UTF-8 come
    as surrogates, which the dataset functions refuse cell by cell.
    """

    def __init__(self, file: IO[bytes]):
        self.number = 0
        self._lines = _lines(file)

    def separator(self, usual: str) -> str:
        """What separates the cells of the first line: most often `usual`, in Excel maybe ';'."""
        first = next(self._lines, (0, b"", True))
        text = first[1].decode("utf-8", "replace")
        if named := re.fullmatch(r"sep=(.)\s*", text):  # a line that Excel writes and reads
            self.number = 1
            return named[1]
        self._lines = itertools.chain([first], self._lines) if first[0] else self._lines
        outside = re.sub(r'"[^"]*"', "", text)
        return max(usual + ",;\t|", key=outside.count)

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        self.number, line, whole = next(self._lines)
        if not whole:
            raise csv.Error("line longer than 10 MB")
        return line.decode("utf-8", errors="surrogateescape")


def _csv_rows(
    path: Path, file: IO[bytes], source: SourceSection
) -> Iterator[tuple[str, Row | Broken]]:
    """Rows by the names in the first line; cells that are not there are null."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = _CsvLines(file)
    usual = "\t" if kind(path)[0] == ".tsv" else ","
    separator = lines.separator(usual)
    name = str(path) if separator == usual else f"{path} (cells separated by {separator!r})"
    # Strict: without it a quote that is never closed takes in the rest of the file unnoticed.
    reader = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] = []
    first = 0
    while True:
        first = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "line longer than 10 MB" if "10 MB" in str(error) else "not a CSV row"
            if not header:
                raise UserError(f"{path}, line {lines.number}: {reason} ({error}).") from None
            # Every line that went with it counts: the share of broken rows must not look small.
            for number in range(first, lines.number + 1):
                place = f"{name}, line {number}"
                yield place, broken(place, reason, str(error))
            continue
        if not cells:
            continue
        if not header:
            header = _column_names(path, first, cells)
            continue
        place = f"{name}, line {first}"
        while len(cells) > len(header) and not cells[-1]:  # "question;answer;;;"
            cells.pop()
        if len(cells) > len(header):
            yield place, broken(place, "more cells than the header", cells)
        else:
            row: Row = dict(zip(header, cells, strict=False))
            yield place, dict.fromkeys(header) | row


def _sheet_rows(path: Path) -> Iterator[tuple[str, Row | Broken]]:
    """Rows of the first sheet by the names in its first line."""
    header: list[str] = []
    for number, cells in sheet_rows(path):
        place = f"{path}, row {number}"
        if not header:
            header = _column_names(path, number, cells)
        elif any(cells[len(header) :]):
            yield place, broken(place, "more cells than the header", cells)
        else:
            yield place, dict.fromkeys(header) | dict(zip(header, cells, strict=False))


def _column_names(path: Path, line: int, cells: Sequence[str | None]) -> list[str]:
    """The cells of a header; a column without a name gets its number."""
    header = [(cell or "").strip() or f"(column {number})" for number, cell in enumerate(cells, 1)]
    if len(set(header)) < len(header):
        raise UserError(f"{path}, line {line}: two columns have the same name: {header}.")
    return header


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row | Broken]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _placed(path, file.iter_batches(batch_size=BATCH_ROWS))


def _arrow_rows(path: Path) -> Iterator[tuple[str, Row | Broken]]:
    """What `save_to_disk` of `datasets` writes (a stream), or an Arrow file."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            batches: Iterable[RecordBatch] = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
        pieces = (
            batch.slice(start, BATCH_ROWS)
            for batch in batches
            for start in range(0, batch.num_rows, BATCH_ROWS)
        )
        yield from _placed(path, pieces)


def _placed(path: Path, batches: Iterable[RecordBatch]) -> Iterator[tuple[str, Row | Broken]]:
    rows = itertools.chain.from_iterable(map(_batch_rows, batches))
    for number, row in enumerate(rows, 1):
        place = f"{path}, row {number}"
        yield place, broken(place, "not UTF-8", b"") if row is None else row


def _batch_rows(batch: RecordBatch) -> Iterator[Row | None]:
    """Rows of an Arrow batch; None for one with bytes that are not UTF-8 (Arrow does not check)."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # one bad row must not take the other 999 with it
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield None


def _text_rows(
    path: Path, file: IO[bytes], source: SourceSection
) -> Iterator[tuple[str, Row | Broken]]:
    """One text per paragraph (between blank lines) or per line, by the source's `text_unit`."""
    by_line = source.text_unit == "line"
    name = "line" if by_line else "paragraph"
    parts: list[bytes] = []
    first = size = paragraphs = count = 0

    def text() -> tuple[str, Row | Broken]:
        place = f"{path}, line {first}"
        content = b"".join(parts)
        if size > MAX_LINE_BYTES:
            return place, broken(place, f"{name} longer than 10 MB", content)
        try:
            return place, {"text": content.decode("utf-8").strip()}
        except UnicodeDecodeError:
            return place, broken(place, "not UTF-8", content)

    for number, line, _ in _lines(file):
        blank = not line.strip()
        if parts and (blank or by_line):
            yield text()
            paragraphs += 1
            parts, size = [], 0
        if blank:
            continue
        if not parts:
            first, count = number, 0
        size += len(line)
        count += 1
        if size <= MAX_LINE_BYTES or not parts:
            parts.append(line)
    if not parts:
        return
    if not by_line and not paragraphs and count > 100:
        raise UserError(
            f"{path}: no blank line in {count:,} lines, so the file would be one single text.\n"
            "When every line is a text of its own, write in the YAML, in this source's entry:\n"
            "    text_unit: line"
        )
    yield text()


# The end of a file's name -> its reader. The binary ones open their files themselves.
TEXT_READERS = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".txt": _text_rows,
    ".xml": lambda path, file, source: qa_rows(path, file, source.encoding),
}
BINARY_READERS = {".parquet": _parquet_rows, ".arrow": _arrow_rows, ".xlsx": _sheet_rows}
