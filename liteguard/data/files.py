"""The files of a local source: which are read, the split each belongs to, and how they open."""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from liteguard import writing
from liteguard.checkpoints import read_dict
from liteguard.errors import UserError, first_line

if TYPE_CHECKING:
    from liteguard.config import SourceSection

# The end of a file's name, without .gz or .zst, that says how it is read (readers.READERS).
TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".xml")
BINARY_KINDS = (".parquet", ".arrow", ".xlsx")
PACKED = (".gz", ".zst")
# Files that lie beside data and hold none.
_NOT_DATA = re.compile(
    r"(?:readme|licen[cs]e|notice|citation|changelog|copying|authors)\b[^.]*(?:\.(?:md|rst|txt|html))?"
    r"|dataset_(?:infos?|dict)\.json|state\.json",  # these are written by `datasets`
    re.IGNORECASE,
)
# What others call our three splits, as the hub's library reads them in names of files.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "valset", "devset"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "testset"), "test"),
    **dict.fromkeys(("holdout", "hold_out", "hold-out", "heldout", "held_out", "held-out"), "test"),
}
_ANY = "|".join(sorted(SPLIT_NAMES, key=len, reverse=True))
_IN_NAME = re.compile(rf"(?<![a-z])({_ANY})(?![a-z])")
# A whole name, maybe with the numbers of shards: test.jsonl, test-00000-of-00001.parquet.
_SHARD = r"(?:[-_.]?\d+(?:-of-\d+)?)?"
_WHOLE_NAME = re.compile(
    rf"(train|validation|valid|val|dev|test|(?:train|val|dev|test)set|h[eo]ld[-_]?out){_SHARD}"
)
# The end of a name that says it beside files whose names do not: medqa.jsonl, medqa_test.jsonl.
_AT_END = re.compile(
    rf"[-_. ](test|testset|h[eo]ld[-_]?out|validation|valid|val|valset|dev|devset|eval){_SHARD}$"
)
_SAMPLE = 1 << 20
_LATIN = ["cp1252", "cp1250", "cp1254", "cp1257"]
_OTHER_SCRIPTS = ["gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp866"]
_OTHER_SCRIPTS += ["cp1253", "cp1255", "cp1256", "cp874"]


def kind(file: Path) -> tuple[str, str]:
    """('.jsonl', '.gz'): how a file is read and how it is packed, by the end of its name."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = suffixes.pop() if suffixes[-1:] and suffixes[-1] in PACKED else ""
    return (suffixes[-1] if suffixes else ""), packed


def is_data(file: Path) -> bool:
    """Whether the end of a file's name is one that can be read."""
    ending, packed = kind(file)
    return ending in TEXT_KINDS or (ending in BINARY_KINDS and not packed)


def local_files(source: SourceSection) -> list[Path]:
    """The files of a source with `path:`, in the order in which they are read."""
    return list(files_and_splits(source))


def files_and_splits(source: SourceSection) -> dict[Path, str | None]:
    """Every file of a source with `path:` -> the split that its name says, in order of reading.

    Of a directory: all in it, sorted by path, without hidden ones and those that hold no data
    (README, LICENSE, ...), which are named on the screen; of `config_name` and `split` only, where
    these are set. Raises UserError when there is none, or one of an unknown kind.
    """
    path = Path(source.path or "")
    if not path.exists():
        raise UserError(f"Data file {path} does not exist (dataset {source.dataset!r}).")
    files, skipped = ([path], []) if not path.is_dir() else _files_below(path)
    for file in files:
        writing.require_file(file)
    if skipped:
        names = [str(file.relative_to(path)) for file in skipped]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        say_once(f"  {path}: not read: {', '.join(names[:10])}{more}")
    if not files:
        raise UserError(f"Data directory {path} holds no file (dataset {source.dataset!r}).")
    if source.config_name and path.is_dir():
        files = _of_configuration(files, path, source.config_name)
    elif source.config_name:
        say_once(f"  {path}: one file, so config_name {source.config_name!r} says nothing about it")
    unknown = [str(file) for file in files if not is_data(file)]
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise UserError(
            f"{', '.join(unknown[:10])}{more}: unknown kind of data file. "
            f"Allowed: {', '.join((*TEXT_KINDS, *BINARY_KINDS))}; of text files also .gz, .zst\n"
            "Convert it, or move it out of the directory."
        )
    splits = _splits_by_name(files, path)
    wanted = SPLIT_NAMES.get(source.split or "")
    # Where no name says anything, a column may: see formats.
    if wanted and any(splits.values()):
        splits = {file: split for file, split in splits.items() if split == wanted}
        if not splits:
            raise UserError(
                f"{path}: no file of the split {source.split!r} (by the names of its files and "
                "folders).\nName another one in this source's entry, or leave `split:` out to read "
                "all, each in its own split."
            )
    return splits


@functools.cache
def say_once(text: str) -> None:
    """Print what is found each time that a source is looked at."""
    print(text)


def _files_below(directory: Path) -> tuple[list[Path], list[Path]]:
    """(files with data, others), each sorted by path."""

    def stop(error: OSError) -> None:
        # os.walk leaves out what it may not list, silently.
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}).")

    found: tuple[list[Path], list[Path]] = ([], [])
    everything = sorted(
        Path(root) / name
        for root, _, names in os.walk(directory, onerror=stop, followlinks=False)
        for name in names
    )
    left = _left_by_map([file for file in everything if file.name == "state.json"])
    for file in everything:
        hidden = any(part.startswith(".") for part in file.relative_to(directory).parts)
        found[bool(hidden or file in left or _NOT_DATA.fullmatch(file.name))].append(file)
    return found


def _left_by_map(states: list[Path]) -> set[Path]:
    """Files of saved data sets that are none of their rows: what `Dataset.map` left there.

    `states`: each set's state.json, which names the files that are its rows.
    """
    left: set[Path] = set()
    for state in states:
        named = (read_dict(state) or {}).get("_data_files")
        if isinstance(named, list):
            own = {entry.get("filename") for entry in named if isinstance(entry, dict)}
            left |= {file for file in state.parent.glob("*.arrow") if file.name not in own}
    return left


def _of_configuration(files: list[Path], path: Path, name: str) -> list[Path]:
    """The files in a folder of that name, or whose own names begin with it."""
    chosen = [
        file
        for file in files
        if name in file.relative_to(path).parts[:-1] or file.name.startswith(name)
    ]
    if chosen or path.name == name:
        return chosen or files
    folders = sorted({file.relative_to(path).parts[0] for file in files})
    raise UserError(
        f"{path}: no folder or file of the configuration {name!r}; found {', '.join(folders[:10])}."
        "\nCorrect config_name in this source's entry, or let `path:` be the folder of the "
        "configuration and write `config_name: null`."
    )


def _splits_by_name(files: list[Path], path: Path) -> dict[Path, str | None]:
    """What the names say.

    A part of a name ('blood_test') counts beside a 'train' one, at its end beside names that say
    nothing, and where the folder has the same name with another split, or with none ('medqa_train'
    or 'medqa' for 'medqa_test'): that may be a source of its own.
    """
    whole: dict[Path, str | None] = {}
    parts: dict[Path, str | None] = {}
    for file in files:
        names = [*file.relative_to(path).parts[:-1], file.name] if file != path else [file.name]
        stem = _stem(file)
        folders = [path.name.lower()] if file != path else []
        folders += [name.lower() for name in names[:-1]]
        said = [m[1] for name in (*folders, stem) if (m := _WHOLE_NAME.fullmatch(name))]
        whole[file] = SPLIT_NAMES[said[-1]] if said else None
        said = [name for part in (*folders[1:], stem) for name in _IN_NAME.findall(part)]
        parts[file] = SPLIT_NAMES[said[-1]] if said else None
    named = set(parts.values())
    if "train" in named and named & {"test", "validation"}:
        return parts
    unsaid = any(said is None for said in parts.values())
    return {
        file: said
        or (parts[file] if unsaid and _AT_END.search(_stem(file)) else None)
        or (parts[file] if _has_sibling(file) else None)
        for file, said in whole.items()
    }


def _stem(file: Path) -> str:
    return file.name.lower().removesuffix("".join(kind(file)))


def _has_sibling(file: Path) -> bool:
    """Whether a file beside this one differs from it in the split that the name says."""

    def parted(name: str) -> tuple[str, list[str]]:
        rest = re.sub(rf"{_SHARD}$", "", _IN_NAME.sub("", name)).strip("-_. ")
        return rest, [SPLIT_NAMES[said] for said in _IN_NAME.findall(name)][-1:]

    rest, said = parted(_stem(file))
    others: list[Path] = []
    with contextlib.suppress(OSError):  # a folder that may not be listed
        others += file.parent.iterdir() if said else []
    return any(
        name == rest and split != said
        for name, split in (parted(_stem(other)) for other in others if is_data(other))
    )


def expected_rows(source: SourceSection) -> int | None:
    """About how many rows will be read of a source; None where only reading it tells.

    Of files with lines: those of their beginnings, for all of the bytes.
    """
    if not source.path:
        return source.limit if source.hub else None
    total = 0.0
    try:
        files = local_files(source)
        sample = max(_SAMPLE // max(len(files), 1), 1 << 12)
        for file in files:
            ending, packed = kind(file)
            if ending == ".parquet":
                import pyarrow.parquet

                total += pyarrow.parquet.read_metadata(file).num_rows
            elif packed or ending not in (".jsonl", ".ndjson", ".csv", ".tsv"):
                return None
            else:
                with file.open("rb") as opened:
                    head = opened.read(sample)
                total += head.count(b"\n") * file.stat().st_size / max(len(head), 1)
    except Exception:  # noqa: BLE001 - reading the rows will say what is wrong, and where
        return None
    return min(round(total), source.limit or round(total)) or None


# --- opening --------------------------------------------------------------------------------------
def open_data(path: Path, encoding: str | None = None) -> BinaryIO:
    """A text file as bytes of UTF-8, unpacked; UTF-16 is recognised without being named."""
    packed = kind(path)[1]
    if packed == ".zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        file: Any = io.BufferedReader(stream)
    else:
        file = gzip.open(path) if packed else path.open("rb")  # noqa: SIM115 - the caller's
    encoding = encoding or _utf16(file.peek(1 << 12)[: 1 << 12])
    if encoding is None or codecs.lookup(encoding).name == "utf-8":
        return file
    return io.BufferedReader(_AsUtf8(file, encoding), 1 << 16)


class _AsUtf8(io.RawIOBase):
    """A file of another encoding as UTF-8. Bytes that are not of it stay: a row each is lost."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left:
            chunk = self._file.read(1 << 16)
            text = self._decoder.decode(chunk, not chunk)
            self._left = text.encode("utf-8", "surrogateescape")
            if not chunk:
                break
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _utf16(head: bytes) -> str | None:
    """'utf-16' of a file that begins with its mark, or in which every second byte is zero."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    zeros = [head[start::2].count(0) / max(len(head) / 2, 1) for start in (0, 1)]
    if max(zeros) > 0.3 and min(zeros) < 0.1:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    return None


def encoding_hint(path: Path) -> str:
    """The line to write for a file that is not UTF-8, with what its text would begin with."""
    with open_data(path) as file:
        lines = [line for line in file.read(_SAMPLE).splitlines() if not line.isascii()]
    broken = [line for line in lines if not _is_utf8(line)]
    # Of a file that is UTF-8 but for some lines, those lines are broken, not the encoding.
    if 2 * len(broken) < len(lines) or not broken:
        return f"{path} is UTF-8, but for these rows: write them anew."
    wrong = b"\n".join(broken)[:20_000]
    name = _detected(wrong)
    shown = "".join(c for c in wrong.decode(name, "replace") if c.isprintable())
    start = next((n for n, c in enumerate(shown) if not c.isascii()), 0)
    return (
        f"{path} seems to be {name}: it would read {shown[max(start - 20, 0) : start + 40]!r}. "
        f"If that is right, write in the YAML, in this source's entry:\n    encoding: {name}"
    )


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _detected(sample: bytes) -> str:
    """The name of the likeliest encoding, among those that people still write files in."""
    from charset_normalizer import from_bytes

    runs = re.findall(rb"[\x80-\xff]+", sample)
    # Letters with accents stand alone among plain ones; of other scripts all bytes are high.
    western = sum(len(run) == 1 for run in runs) > 0.7 * len(runs)
    found = from_bytes(sample, cp_isolation=_LATIN if western else _OTHER_SCRIPTS).best()
    name = codecs.lookup(found.encoding if found else "cp1252").name
    # Most accents are the same in several code pages; then it is the commonest of these.
    same = sample.decode("cp1252", "replace") == sample.decode(name, "replace")
    return "cp1252" if western and same else name


def unreadable(path: str | Path, error: BaseException) -> UserError:
    """One message for whatever the system or a library says about a file."""
    detail = getattr(error, "strerror", None) or first_line(error)
    return UserError(
        f"{path}: cannot be read ({detail}).\n"
        "Copy or download it again, or check that you may read it."
    )
