"""The two ways a command ends badly, and the exit code of each."""

from __future__ import annotations

import re


class LiteGuardError(Exception):
    """A message meant for the person at the keyboard: what, where, what is allowed, what next."""

    exit_code = 1


class UserError(LiteGuardError):
    """A mistake in what was asked for (configuration, paths, order of stages): exit code 2."""

    exit_code = 2


class WorkError(LiteGuardError):
    """The work itself failed (disk full, conversion killed, loss not finite): exit code 1."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without the signatures that download links carry."""
    text = str(error).strip().splitlines()
    return re.sub(r"\?\S*=\S*", "", text[0])[:200] if text else "no detail"
