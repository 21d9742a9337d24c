"""Texts of others, as a person is shown them: nothing that a terminal, a page or a log acts on.

Rows, answers, file names and messages of a service come from anywhere. A terminal obeys escape
sequences, Markdown obeys brackets, and a log keeps the password of a URL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TextIO, cast

LONGEST = 2000  # characters of a message
# Control characters but tab and newline, what turns the direction of writing, and halves of pairs.
_ACTS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# What gives access: a user name and password of a URL, a key in its query, a key as services make
# them (OpenAI and its like, Hugging Face, GitHub, Google).
_SECRETS = re.compile(
    r"(?P<user>(?<=://)[^/\s'\"?#]*@)"
    r"|(?P<name>[?&;#][\w.-]{0,40}(?:key|token|secret|password|passwd|signature|sig)=)[^&\s'\"#]+"
    r"|(?<![\w/-])(?:sk-(?=[\w-]*\d)[\w-]{6,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|AIza[\w-]{16,})",
    re.IGNORECASE,
)
# What a progress bar, or a name in bold, writes by itself: start of the line, line up, bold, dim.
_OWN_CODES = re.compile(r"(?:[\r\n]|\x1b\[(?:A|[012]m))*")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$#])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def visible(text: str) -> str:
    """`text` with every character that a terminal would act on written as an escape (\\x1b)."""
    return _ACTS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Screen:
    """A standard output whose texts are `visible`, whatever file, row or record they come from.

    A carriage return at the beginning of what is written, and codes of bars that are written by
    themselves, stay what they are. `stream`: what it writes to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if not _OWN_CODES.fullmatch(text):
            start = "\r" * text.startswith("\r")
            text = start + visible(text[len(start) :])
        return self.stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def screen(stream: TextIO) -> TextIO:
    """`Screen`, which has all that a text stream has."""
    return cast(TextIO, Screen(stream))


def without_passwords(text: str) -> str:
    """`text` with *** in place of user names and passwords in URLs, and of keys."""
    return _SECRETS.sub(
        lambda found: "***@" if found["user"] else f"{found['name'] or ''}***", text
    )


def duration(seconds: float) -> str:
    """A time as people say it: "0.4 s", "43 s", "12 min", "1.5 h"."""
    if round(seconds) < 120:
        return f"{seconds:.{0 < seconds < 0.95:d}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as people say them: "412 KB", "1.4 MB", "139 MB", "2.8 GB"."""
    if count < 1e6:
        return f"{count / 1e3:.0f} KB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.{count < 1e7:d}f} MB"


def brief(value: Any, longest: int = 80) -> str:
    """The repr of a value, cut where it is long."""
    if isinstance(value, str):
        value = value[: longest + 1]  # the repr of megabytes takes its time
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def message(text: str) -> str:
    """A message for the screen: without passwords, visible, cut in the middle beyond LONGEST."""
    text = without_passwords(text)  # first, since a half of one is not known as one
    if len(text) > LONGEST:
        half = LONGEST // 2 - 40
        text = (
            f"{text[:half]}\n... ({len(text) - 2 * half:,} characters left out) ...\n{text[-half:]}"
        )
    # Last, since an escape is longer than what it stands for.
    shown = visible(text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."


def markdown(text: str) -> str:
    """`text` as one line of Markdown that reads as it is written: no links, HTML, cells, titles."""
    line = _MARKDOWN.sub(r"\\\1", visible(" ".join(text.split())))
    line = re.sub("[&<>]", lambda found: _ENTITIES[found[0]], line).replace("](", "]\\(")
    return re.sub(r"^[-+=]", r"\\\g<0>", line)
