"""A kill before every change of a file that a piece of work makes, one after the other.

Python reports what it opens for writing, renames and deletes to audit hooks, whichever library does
it, and a hook that raises stops the operation. From then on nothing is done any more, also by
`finally` and `except`: a process that was killed tidies nothing up.

For tests/test_faults.py, within one process; fault_matrix.py kills processes of the real scripts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}


class Killed(BaseException):
    """What a kill is to the code: neither an Exception nor something that it knows."""


def change(event: str, arguments: tuple, place: str) -> str | None:
    """What an audit event changes below `place`, as text; None where it changes nothing there."""
    if event == "open":
        flags = arguments[2]
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return None
    elif event not in CHANGES:
        return None
    names = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]
    # rmtree deletes by names inside a directory that it holds open: those count, too.
    if not any(name.startswith(place) or "/" not in name for name in names):
        return None
    return f"{event} {' '.join(names)}"


class _Watch:
    """What is counted: the n-th change below `place` and all after it do not happen."""

    def __init__(self) -> None:
        self.place: str | None = None
        self.left = 0
        self.dead = False
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple) -> None:
        found = self.place and change(event, arguments, self.place)
        if not found:
            return
        if self.dead or self.left == 0:
            self.dead = True
            raise Killed(f"before {found}")
        self.left -= 1
        self.seen.append(found)


_watch = _Watch()
_hooked = False


@contextlib.contextmanager
def killed_after(changes: int, place: Path) -> Iterator[list[str]]:
    """Killed before the change that follows so many below `place`; yields those that were made."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_watch)  # hooks stay for ever: this one sleeps in between
        _hooked = True
    _watch.place, _watch.left, _watch.dead, _watch.seen = str(place), changes, False, []
    try:
        yield _watch.seen
    finally:
        _watch.place = None


def every_kill(place: Path, begin: Callable[[], object], work: Callable[[], object]) -> Iterator:
    """Kill `work` after 0, 1, 2 ... changes below `place`, each time after `begin`, until it ends.

    Yields after every kill, for the caller to look at what it left; the number of changes so far.
    """
    for count in range(10_000):
        begin()
        try:
            with killed_after(count, place):
                work()
        except Killed:
            yield count
        else:
            return
    raise AssertionError("there is no end to the changes")


def die_after(changes: int | None, place: Path, log: Path, at: str | None = None) -> None:
    """From now on this process is killed (SIGKILL) before the change that follows so many.

    None: it is not killed, or before the first change whose text holds `at`. Every change below
    `place` is written to `log`, a line each. What other processes change does not count.
    """
    own, seen = os.getpid(), 0
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        found = change(event, arguments, str(place)) if os.getpid() == own else None
        if found is None:
            return
        if seen == changes or (at is not None and at in found):
            os.kill(own, signal.SIGKILL)
        seen += 1
        os.write(sink, f"{found}\n".encode("utf-8", "replace"))

    sys.addaudithook(watch)
