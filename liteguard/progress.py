"""How far a step is, while it works: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from liteguard import shown

EVERY_S = 15.0  # between two lines


class Progress:
    """Counts what is done of a step: "  answers 12/64, 233 tok/s, 3 min left".

    total: of `unit`, or None where nobody knows; `about`: it is an estimate. done: of an earlier
    run. A step that ends within `EVERY_S` writes its last line alone, or nothing if `quiet`.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        done: int = 0,
        *,
        unit: str = "",
        about: bool = False,
        quiet: bool = False,
    ) -> None:
        from tqdm import tqdm

        self.what, self.total, self.done, self.unit = what, total, done, unit
        self.about, self.quiet, self.tokens, self.first = about, quiet, 0, done
        self.started = self.printed = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=f"  {what}",
            unit=f" {unit}" if unit else "it",
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
            dynamic_ncols=True,
            leave=not quiet,
        )

    def add(self, tokens: int = 0, count: int = 1) -> None:
        """So many more are done, with so many tokens."""
        self.done, self.tokens = self.done + count, self.tokens + tokens
        now = time.monotonic()
        if not self.bar.disable:
            self.bar.set_postfix_str(", ".join(self._speed(now)), refresh=False)
            self.bar.update(count)
            return
        ended = self.done == self.total and not self.about and not self.quiet
        if ended or now - self.printed >= EVERY_S:
            print(f"  {self.line(now)}", flush=True)
            self.printed = now

    def line(self, now: float) -> str:
        """What is done, how fast it goes, and the time that is left or, at the end, was taken."""
        of = "" if self.total is None or (self.about and self.done > self.total) else "/"
        counted = f"{self.done:,}"
        if of:
            counted += f" of about {self.total:,}" if self.about else f"/{self.total:,}"
        parts = [f"{self.what} {counted}{f' {self.unit}' if self.unit else ''}", *self._speed(now)]
        seconds, made = now - self.started, self.done - self.first
        if of and made and self.total is not None:
            left = seconds / made * (self.total - self.done)
            ended = self.done == self.total
            parts.append(shown.duration(seconds) if ended else f"{shown.duration(left)} left")
        return ", ".join(parts)

    def _speed(self, now: float) -> list[str]:
        seconds = max(now - self.started, 1e-9)
        if self.tokens:
            return [f"{self.tokens / seconds:,.0f} tok/s"]
        each = seconds / max(self.done - self.first, 1)
        if self.unit:
            return [f"{1 / each:,.0f} {self.unit}/s"] if each < 1 else [f"{each:.1f} s each"]
        return []

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


@contextlib.contextmanager
def ticking(what: str, expected: float | None = None) -> Iterator[None]:
    """While the body works, a line every `EVERY_S` seconds: for what cannot be counted.

    expected: seconds that it takes on two cores, as far as that was measured.
    """
    started, over = time.monotonic(), threading.Event()

    def tick() -> None:
        while not over.wait(EVERY_S):
            print(f"  {waiting(what, time.monotonic() - started, expected)}", flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def waiting(what: str, seconds: float, expected: float | None) -> str:
    """The line of `ticking` after so many seconds."""
    so_far = f"{what}: {shown.duration(seconds)} so far"
    if expected is None:
        return so_far
    if seconds < expected:
        return f"{so_far}, about {shown.duration(expected - seconds)} left"
    return f"{so_far}, longer than the {shown.duration(expected)} it took on two cores"
