"""Rows of local files and of hub data sets, one by one, with what is wrong with each file.

Files are streamed: only a .json document is read as a whole, and refused when it is large."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from liteguard import hub
from liteguard.errors import UserError, first_line
from liteguard.rows import Row
from liteguard.wheels import MAX_WHOLE_BYTES

if TYPE_CHECKING:
    from pyarrow import RecordBatch

    from liteguard.config import SourceSection


# A longer line or paragraph is not a text to train on; no more of it is held in memory.
MAX_LINE_BYTES = 10_000_000
# Files that lie beside data and hold none.
_NOT_DATA = re.compile(
    r"(?:readme|licen[cs]e|notice|citation|changelog|copying|authors)\b[^.]*(?:\.(?:md|rst|txt|html))?"
    r"|dataset_infos?\.json|state\.json",  # these are written by `datasets`
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Broken:
    """A row that cannot be used, in place of the row.

    `place`: 'texts.jsonl, line 7'; `reason`: one of few words, fit for counting; `text`: the first
    200 characters of what is there, printable.
    """

    place: str
    reason: str
    text: str = ""


def broken(place: str, reason: str, content: bytes | object) -> Broken:
    """A `Broken` with the beginning of `content` made printable."""
    if isinstance(content, bytes):
        text = content[:800].decode("utf-8", errors="replace")
    else:
        text = content if isinstance(content, str) else str(content)
    shown = "".join(c if c.isprintable() else " " for c in text[:200])
    return Broken(place, reason, shown)


_HINTS = {
    "not UTF-8": "Convert the file: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
    "paragraph longer than 10 MB": "When every line is a text of its own, write in the YAML, in "
    "this source's entry:\n    text_unit: line",
}


class Tally:
    """Passes rows on and counts the broken ones, for `check` after the last row.

    It counts what was read, before any sampling: the share is that of the source.
    """

    def __init__(self, rows: Iterable[Row | Broken], source: SourceSection):
        self.source = source
        self.read = self.broken = 0
        self.first: list[Broken] = []
        self._rows = rows

    def __iter__(self) -> Iterator[Row | Broken]:
        for row in self._rows:
            self.read += 1
            if isinstance(row, Broken):
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
        reasons = dict.fromkeys(row.reason for row in self.first)
        lines += [_HINTS[reason] for reason in reasons if reason in _HINTS]
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
    .csv (with a header), .tsv, .txt (by `text_unit`), .json, each also .gz; .parquet; directories
    of them. A .json file is read as a whole: for large data use .jsonl.
    Raises UserError for what cannot be reached or read; a bad row is a `Broken`.
    """
    if source.path:
        for file in local_files(source):
            yield from _read_file(file, source)
        return
    if not source.hub:
        raise UserError(
            f"Dataset {source.dataset!r} needs 'hub:' (a dataset id) or 'path:' (a local file)."
        )
    yield from _hub_rows(source)


def _hub_rows(source: SourceSection) -> Iterator[tuple[str, Row]]:
    """(place, row) of a hub dataset at the commit that was resolved, streamed."""
    import datasets

    repository = hub.Repository("dataset", source.hub or "", source.revision)
    commit = hub.commit(repository)
    try:
        rows = datasets.load_dataset(
            source.hub,
            source.config_name,
            split=source.split,
            revision=commit,
            streaming=True,
        )
        for number, row in enumerate(rows, 1):
            yield f"{source.hub}, row {number}", row
    except ValueError as error:
        # What the library says to an unknown configuration or split lists those that exist.
        raise UserError(
            f"The dataset {source.hub!r} cannot be read with config_name {source.config_name!r}, "
            f"split {source.split!r}, revision {source.revision!r}: "
            f"{' '.join(str(error).split())[:600]}\n"
            "Correct them in this source's entry in the YAML."
        ) from None
    except Exception as error:  # noqa: BLE001 - the hub client raises many unrelated classes
        raise hub.failure(repository, error, "The reading of") from None


def local_files(source: SourceSection) -> list[Path]:
    """The files of a source with `path:`, in the order in which they are read.

    Of a directory: all in it, sorted by path, without hidden ones and those that hold no data
    (README, LICENSE, ...), which are named on the screen.
    Raises UserError when there is none, or one of an unknown kind.
    """
    path = Path(source.path or "")
    if not path.exists():
        raise UserError(f"Data file {path} does not exist (dataset {source.dataset!r}).")
    files: list[Path] = [path]
    skipped: list[Path] = []
    if path.is_dir():
        files = []
        for file in _files_below(path):
            relative = file.relative_to(path)
            hidden = any(part.startswith(".") for part in relative.parts)
            no_data = hidden or _NOT_DATA.fullmatch(file.name)
            (skipped if no_data else files).append(file)
        if skipped:
            names = [str(file.relative_to(path)) for file in skipped]
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            print(f"  {path}: not read: {', '.join(names[:10])}{more}")
        if not files:
            raise UserError(f"Data directory {path} holds no file (dataset {source.dataset!r}).")
    unknown = [str(file) for file in files if _kind(file) not in READERS]
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise UserError(
            f"{', '.join(unknown[:10])}{more}: unknown kind of data file. "
            f"Allowed: {', '.join(READERS)}\n"
            "Convert it, or move it out of the directory."
        )
    return files


def _files_below(directory: Path) -> list[Path]:
    def stop(error: OSError) -> None:
        # os.walk leaves out what it may not list, silently.
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}).")

    found = [
        Path(root) / name
        for root, _, names in os.walk(directory, onerror=stop, followlinks=False)
        for name in names
    ]
    return sorted(found)


def _kind(file: Path) -> str:
    """'.jsonl', '.jsonl.gz': the end of a file's name that says how to read it."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def hub_commit(source: SourceSection) -> str:
    """The commit that a hub dataset's revision stands for."""
    return hub.commit(hub.Repository("dataset", source.hub or "", source.revision))


def _read_file(path: Path, source: SourceSection) -> Iterator[tuple[str, Row | Broken]]:
    """(place, row) of one local file; UserError when the file as a whole cannot be read."""
    import pyarrow

    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from _parquet_rows(path)
            return
        read: Callable[..., Iterator[tuple[str, Row | Broken]]] = READERS[kind]
        with gzip.open(path) if kind.endswith(".gz") else path.open("rb") as file:
            yield from read(path, file, source)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: cannot be read, the gzip file is truncated or damaged "
            f"({first_line(error)}).\nCopy or download it again; `gzip -t {path}` checks it."
        ) from None
    except (OSError, pyarrow.ArrowException) as error:
        detail = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{path}: cannot be read ({detail}).\n"
            "Copy or download it again, or check that you may read it."
        ) from None


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
        raise UserError(
            f"{path}: not a JSON file ({first_line(error)}); {expected}.\n"
            "When it has one object a line, name it .jsonl."
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
    # Strict: without it a quote that is never closed takes in the rest of the file unnoticed.
    reader = csv.reader(lines, delimiter="\t" if ".tsv" in _kind(path) else ",", strict=True)
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
                place = f"{path}, line {number}"
                yield place, broken(place, reason, str(error))
            continue
        if not cells:
            continue
        if not header:
            header = cells
            if len(set(header)) < len(header):
                raise UserError(f"{path}, line {first}: two columns have the same name: {header}.")
            continue
        place = f"{path}, line {first}"
        if len(cells) > len(header):
            yield place, broken(place, "more cells than the header", cells)
        else:
            row: Row = dict(zip(header, cells, strict=False))
            yield place, dict.fromkeys(header) | row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row | Broken]]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            for row in _batch_rows(batch):
                number += 1
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


# The end of a file's name -> its reader. Parquet is compressed inside, and needs its own opening.
READERS = {
    kind + packed: reader
    for kind, reader in {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".txt": _text_rows,
    }.items()
    for packed in ("", ".gz")
} | {".parquet": _parquet_rows}
