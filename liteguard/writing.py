"""Files and directories that are whole or not there: written beside their place, then one rename.

All that is written under a name that somebody reads goes through here (tests/test_writing.py holds
the package to it), so that a kill at any moment leaves the old content or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from liteguard.errors import UserError

# Files up to this size are hashed whole; of larger ones so many blocks of 64 KiB, spread evenly.
_WHOLE, _BLOCKS, _BLOCK = 64 << 20, 256, 1 << 16
# A hidden name beside an output adds a dot and an ending; most file systems allow 255 bytes.
LONGEST_NAME = 240
# An empty file in directories that are ours to delete; it goes last, so a kill leaves it there.
MARK = ".liteguard"
_EXCHANGE = 2  # RENAME_EXCHANGE in linux/fs.h
_AT_HERE = -100  # AT_FDCWD in fcntl.h


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A place beside `path` for a file or a directory, which gets that name when the block ends.

    An error leaves what was there before. Raises UserError for a link, a pipe or a device.

    shared: other processes may be making the same at this moment (a cache without a lock), each in
    a place of its own; the last one stays.
    """
    if path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir())):
        raise UserError(
            f"{path} is a link, a pipe or a device, and would be replaced by a file: it is left as "
            "it is. Name another place."
        )
    own = f".{os.getpid()}" if shared else ""
    beside = path.with_name(f".{path.name}{own}.partial")
    remove(beside)
    if shared:
        _forget(path)
    try:
        yield beside
        flush(beside)
        put(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(beside)
        raise


def _forget(path: Path) -> None:
    """Delete what processes that were killed a day ago or earlier left of a shared `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                remove(left)


def write_text(path: Path, text: str, shared: bool = False) -> None:
    """Write text so that `path` is either the old or the complete new file."""
    write_bytes(path, text.encode("utf-8"), shared)


def write_json(path: Path, value: Any, shared: bool = False) -> None:
    """Write JSON so that `path` is either the old or the complete new file."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", shared)


def write_bytes(path: Path, content: bytes, shared: bool = False) -> None:
    """Write a file so that `path` is either the old or the complete new one."""
    with replacing(path, shared) as beside, beside.open("xb") as file:
        file.write(content)


def put(source: Path, target: Path) -> None:
    """Give `source` the name `target` in one step; what had it is deleted afterwards.

    A directory that is not empty cannot be renamed over: the two change places, which Linux does at
    once. Where the file system cannot, the old one is moved aside first, and a kill between the two
    renames is mended by `bring_back`.
    """
    if is_full(target) and source.is_dir():
        if _exchange(source, target):
            remove(source)
        else:
            aside = moved_aside(target)
            remove(aside)
            os.replace(target, aside)
            os.replace(source, target)
            mark(aside)
            remove_marked(aside)
    else:
        os.replace(source, target)
    _flush_names(target.parent)


def bring_back(target: Path) -> bool:
    """Undo the first half of a replacement that a kill cut in two; whether there was one."""
    aside = moved_aside(target)
    if not aside.is_dir() or aside.is_symlink():
        return False
    if target.exists() or is_marked(aside):
        mark(aside)
        remove_marked(aside)
        return False
    os.replace(aside, target)
    _flush_names(target.parent)
    return True


def moved_aside(target: Path) -> Path:
    """Where `put` moves a directory that it replaces, for the moment of two renames."""
    return target.with_name(f".{target.name}.replaced")


def is_full(path: Path) -> bool:
    """Whether `path` is a directory, and no link to one, with something in it."""
    return path.is_dir() and not path.is_symlink() and any(path.iterdir())


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places at once; False where that is not known."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    sys.audit("os.rename", str(one), str(other), -1, -1)  # as every rename of Python's own
    if function(_AT_HERE, os.fsencode(one), _AT_HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def remove(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a directory; it need not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def mark(directory: Path) -> None:
    """Say that a directory is ours to delete."""
    os.close(os.open(directory / MARK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644))


def is_marked(directory: Path) -> bool:
    """Whether `mark` was here; a link is none."""
    found = directory / MARK
    return found.is_file() and not found.is_symlink()


def remove_marked(directory: Path) -> None:
    """Delete a directory, its mark last: what a kill leaves of it is still known to be ours."""
    for path in [*directory.iterdir()]:
        if path.name != MARK:
            remove(path)
    remove(directory / MARK)
    directory.rmdir()


def flush(path: Path) -> None:
    """Have the disk take a file, or everything in a directory: a rename may overtake its data."""
    if not path.is_dir():
        _sync(path)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            if file.is_file() and not file.is_symlink():
                _sync(file)
        _flush_names(Path(folder))


def _flush_names(directory: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems know no fsync of a directory
        _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_mount(path: Path) -> bool:
    """Whether something is mounted at `path`, which therefore cannot be renamed or replaced.

    `os.path.ismount` does not see a directory of the same file system (`mount --bind`).
    """
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    places = {line.split(" ")[4] for line in lines.splitlines() if line.count(" ") > 4}
    return str(path.resolve()).replace(" ", "\\040") in places


def require_file(path: Path) -> None:
    """Raise UserError for what is there and is no file: reading a pipe or a device may not end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a directory, a pipe or a device, and a file is needed there.")


def fingerprint(path: Path) -> str:
    """What tells a file of a cache from one that was edited or damaged since: `SIZE:BLAKE2B`.

    Of a file of more than 64 MiB, size, time of change and 256 blocks of 64 KiB are hashed: an edit
    is seen by the time, a hole or a cut by the rest. A copy with other times is made again.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if size <= _WHOLE:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            digest.update(str(path.stat().st_mtime_ns).encode())
            for number in range(_BLOCKS):
                file.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return f"{size}:{digest.hexdigest()}"


def fingerprints(directory: Path) -> dict[str, str]:
    """Name -> `fingerprint` of every file in a directory of a cache."""
    return {path.name: fingerprint(path) for path in sorted(directory.iterdir()) if path.is_file()}


def is_whole(directory: Path, expected: Any) -> bool:
    """Whether the files of a directory of a cache are those whose `fingerprints` were kept."""
    try:
        return bool(expected) and all(
            (directory / name).is_file() and fingerprint(directory / name) == found
            for name, found in expected.items()
        )
    except (OSError, AttributeError, TypeError):
        return False


def seal(path: Path) -> None:
    """Keep the fingerprint of a file of a cache beside it, in NAME.sum, once it is written."""
    write_text(_seal(path), fingerprint(path), shared=True)


def is_sealed(path: Path) -> bool:
    """Whether a file of a cache is there as `seal` saw it; one that is not is made again."""
    try:
        whole = path.is_file() and _seal(path).is_file()
        return whole and _seal(path).read_text(encoding="utf-8") == fingerprint(path)
    except (OSError, ValueError):
        return False


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sum")
