"""From an exception to what a person is told, and the exit code.

One code for each way to fail, wherever it happens: 2 for what was asked for (a configuration, a
path, an input that cannot be read), 1 for what the machine could not do (disk, memory, rights,
limits).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from liteguard.errors import LiteGuardError, first_line

_AGAIN = "then run the same command again: what is finished is kept."
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_SUCH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENXIO, errno.EEXIST, errno.ENOTEMPTY),
)
_LIMITS = (errno.EAGAIN, errno.EMFILE, errno.ENFILE)
# Of a file system that went away or is in use; a read that fails names no file.
_REFUSED = (errno.EBUSY, errno.ESTALE, errno.ENOLCK, errno.EXDEV, errno.ETIMEDOUT)
# What torch.save says instead of the system's error.
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "iostream error", "inline_container.cc")
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "out of memory")
_NO_MORE = ("can't start new thread", "Resource temporarily unavailable", "Too many open files")


def explain(error: BaseException) -> tuple[str, int] | None:
    """(what to say, exit code); None for a mistake of the program, which needs its traceback.

    safetensors and torch raise classes of their own, with the system's words in the message, so
    the whole chain of causes is looked at.
    """
    chain = [*_causes(error)]
    if any(isinstance(e, KeyboardInterrupt) for e in chain):
        return "interrupted; run the same command again to go on", 130
    if isinstance(error, LiteGuardError):
        return f"error: {error}", error.exit_code
    for cause in chain:
        if told := _refused_by_the_machine(cause):
            return f"error: {told[0]}", told[1]
    # Of the error itself only: what is raised while another is handled may be a mistake of ours.
    if wrong := _wrong_name(error):
        return f"error: {wrong}", 2
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"error: {_refusal(f'{error.filename}: {os.strerror(error.errno)}')}", 1
    return None


def _refusal(place: str) -> str:
    return f"the system refused {place}. See to the disk or mount that it is on, {_AGAIN}"


def _wrong_name(error: BaseException) -> str | None:
    """What to say of a path or a text that cannot be one."""
    if isinstance(error, OSError) and error.errno in _NO_SUCH and error.filename:
        names = " -> ".join(map(str, filter(None, (error.filename, error.filename2))))
        return f"{names}: {error.strerror}. Correct the path and run the command again."
    if isinstance(error, UnicodeEncodeError):
        return f"a name or a text holds bytes that are not UTF-8: {ascii(error.object)[:200]}"
    return None


def _refused_by_the_machine(error: BaseException) -> tuple[str, int] | None:
    """What to say, and the exit code, where disk, memory, rights or a limit failed."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"os error (\d+)\)", text):
        number = int(found[1])
    where = getattr(error, "filename", None)
    place = f"{where}: {os.strerror(number)}" if where and number else first_line(error)
    if isinstance(error, BrokenPipeError):
        return f"what read the output is gone. Leave it open, {_AGAIN}", 1
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _says(text, _NO_MEMORY):
        return f"not enough memory ({place}). Close other programs, {_AGAIN}", 1
    if number in _LIMITS or _says(text, _NO_MORE):
        what = f"the system allows no more processes, threads or open files ({place})"
        return f"{what}. Raise the limit (ulimit -u, ulimit -n, a container's pids), {_AGAIN}", 1
    if "failed to map segment" in text:
        return (
            f"a library cannot be loaded ({place}). Allow more memory (ulimit -v), or install it "
            f"where programs may run (no noexec mount), {_AGAIN}"
        ), 1
    if number in _DISK_FULL:
        kept = "Nothing was left under a final name."
        return f"cannot write, the disk is full: {place}\n{kept} Free some space, {_AGAIN}", 1
    if number in _NO_RIGHT and where and _is_unreadable(where):
        return f"cannot read {place}. Give the right to read it, {_AGAIN}", 2
    if number in _NO_RIGHT or _says(text, _TORCH_CANNOT_WRITE):
        return f"cannot write: {place}\nFix the permissions (and look for free space), {_AGAIN}", 1
    if number == errno.EIO:
        return f"the disk fails: {place}. Use another one, {_AGAIN}", 1
    if number in _REFUSED:
        return _refusal(place), 1
    return None


def _is_unreadable(path: str) -> bool:
    try:
        return Path(path).exists() and not os.access(path, os.R_OK)
    except OSError:
        return True  # in a directory that may not be entered


def _says(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it came from, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
