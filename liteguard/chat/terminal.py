"""The chat in a terminal: questions from a keyboard or a pipe, answers as they are written."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from liteguard import checkpoints, shown
from liteguard.chat.conversation import Conversation, Exchange
from liteguard.errors import LiteGuardError, UserError

COMMANDS = """  /reset          forget the conversation so far
  /system TEXT    system message from now on ("/system" shows it, "/system off" leaves it out)
  /save FILE      write the transcript as JSON lines
  /quit           leave, as Ctrl-D does"""
# Seconds in which a second Ctrl-C is surely heard; readline is set up in less.
HEARD_S = 0.2
ENDINGS = {"length": "cut at its limit", "interrupted": "interrupted"}


@dataclass
class Terminal:
    """Reads lines and answers them, every model in turn.

    `single`: each question starts a new conversation. `overwrite`: /save may replace a file.
    """

    conversations: list[Conversation]
    single: bool = False
    overwrite: bool = False

    def run(self) -> None:
        """Until the lines end, /quit, or a second Ctrl-C.

        From a pipe, Ctrl-C ends it at once (KeyboardInterrupt); whoever reads the output may leave
        at any time.
        """
        keyboard = sys.stdin.isatty()
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        if keyboard:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - arrow keys and history for input()
        stopped_before = False
        try:
            while True:
                try:
                    line = self._read(keyboard)
                    if line is None:
                        return
                    stopped_before = False
                    if line and not self._obey(line):
                        return
                except KeyboardInterrupt:
                    if not keyboard or stopped_before:
                        raise
                    stopped_before = True
                    print("\nstopped; Ctrl-C again leaves", flush=True)
                    # One that comes while readline sets the terminal up is held until a key is
                    # pressed: here it is heard at once.
                    time.sleep(HEARD_S)
        except KeyboardInterrupt:
            if not keyboard:
                raise
            print()
        except BrokenPipeError:
            # `| head` has seen enough. What Python still wants to write goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _read(self, keyboard: bool) -> str | None:
        """The next line without blanks around it; None at the end."""
        if keyboard:
            try:
                return input("you> ").strip()
            except EOFError:
                print()
                return None
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            print(f"you> {shown.visible(line.strip())}")
        return line.strip()

    def _obey(self, line: str) -> bool:
        """Answer a question or follow a command; False to leave. Mistakes are told, not raised."""
        command, _, rest = line.partition(" ")
        try:
            if not line.startswith("/"):
                self._answer(line)
            elif command == "/quit":
                return False
            elif command == "/reset":
                for conversation in self.conversations:
                    conversation.reset()
                print("the conversation starts over")
            elif command == "/system":
                self._system(rest.strip())
            elif command == "/save":
                self._save(rest.strip())
            elif command == "/help":
                print(COMMANDS)
            else:
                raise UserError(f"there is no {command}. Commands:\n{COMMANDS}")
        except LiteGuardError as error:
            print(shown.message(str(error)))
        return True

    def _answer(self, question: str) -> None:
        for conversation in self.conversations:
            if self.single:
                conversation.reset()
            _say(conversation.speaker.name, "1")
            with contextlib.closing(conversation.ask(question)) as pieces:
                for piece in pieces:
                    print(shown.visible(piece), end="", flush=True)
            _say(ending(conversation.exchanges[-1]), "2")
        print()

    def _system(self, text: str) -> None:
        if text:
            for conversation in self.conversations:
                conversation.system = "" if text == "off" else text
        for conversation in self.conversations:
            own = conversation.prompt.system.strip()
            print(f"{conversation.speaker.name}: {shown.visible(own) or 'no system message'}")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save FILE: name a file, e.g. /save chat.jsonl")
        path = Path(name)
        if path.exists() and not self.overwrite:
            raise UserError(
                f"{path} is there already. Name another file, or start with --overwrite"
            )
        try:
            checkpoints.write_text(path, "".join(transcript(self.conversations)))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        print(f"wrote {path}")


def transcript(conversations: list[Conversation]) -> Iterator[str]:
    """Every exchange as a line of JSON, in the order in which they happened."""
    exchanges = [e for conversation in conversations for e in conversation.exchanges]
    for exchange in sorted(exchanges, key=lambda e: e.turn):
        yield json.dumps(exchange.to_dict(), ensure_ascii=False) + "\n"


def ending(exchange: Exchange) -> str:
    """What stands under an answer: the judge's verdict, length and speed."""
    number, seconds = exchange.tokens, exchange.seconds
    parts = [exchange.verdict]
    parts += [ENDINGS[exchange.ended]] if exchange.ended in ENDINGS else []
    parts.append(f"{number} token{'s' * (number != 1)} in {seconds:.1f} s")
    if exchange.forgotten:
        many = "exchanges" if exchange.forgotten > 1 else "exchange"
        parts.append(f"forgot the first {exchange.forgotten} {many}, which no longer fit")
    return f"[{', '.join(parts)}]"


def _say(text: str, code: str) -> None:
    """A new line, in bold (1) or dim (2) on a terminal that is not asked to be plain.

    The codes are written by themselves: in a text they would be shown (`shown.Screen`).
    """
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    for part in ["\n", text] if plain else ["\n", f"\x1b[{code}m", text, "\x1b[0m"]:
        print(part, end="")
    print()
