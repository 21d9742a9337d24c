"""Whether the model hub answers and takes the token, in seconds and without its library's retries.

A token is named by where it comes from and never shown. Offline is no failure: a base model and
data may be local, in the cache, or embedded.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

_YES = ("1", "ON", "YES", "TRUE")
_WAYS = "--set model.path=DIR and path: in sources, or --model_type smollm2, which needs no hub"

Line = tuple[Literal["ok", "note", "missing"], str, str, str]


def endpoint() -> str | None:
    """The hub that huggingface_hub talks to; None where the library is missing."""
    try:
        constants = importlib.import_module("huggingface_hub.constants")
    except Exception:  # noqa: BLE001 - broken installations raise anything
        return None
    return str(constants.ENDPOINT)


def token() -> tuple[str, str] | None:
    """(where the token comes from, the token); None without one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if value := os.environ.get(name, "").strip():
            return name, value
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    file = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if value := file.read_text(encoding="utf-8").strip():
            return "hf auth login", value
    return None


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE (or transformers' own name for it) is set."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _YES for name in names)


def ask(url: str, seconds: float, secret: str = "") -> int:
    """The HTTP status of a request that follows no redirect: a token goes to nobody else.

    It goes through the proxy that the environment names, as the hub's library does. Raises OSError
    or http.client.HTTPException when there is no answer in time.
    """
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    request = urllib.request.Request(url, headers={"User-Agent": "doctor", **headers})
    try:
        with urllib.request.build_opener(_Stays).open(request, timeout=seconds) as answered:
            return answered.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


class _Stays(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """None: the redirect itself is the answer."""


def look(offline: bool, seconds: float) -> Iterator[Line]:
    """Two lines: the hub, and the token."""
    found, hub = token(), endpoint()
    named = f"from {found[0]}" if found else ""
    none = "none: enough for public repositories"
    log_in = "for gated or private ones: HF_TOKEN, or hf auth login"
    reached = False
    if hub is None:
        yield ("note", "hub", "huggingface_hub is not installed", "see the packages below")
    elif offline or is_offline():
        why = "not asked (--offline)" if offline else "HF_HUB_OFFLINE is set: only the cache"
        yield ("note", "hub", why, _WAYS)
    else:
        try:
            status = ask(f"{hub}/api/models", seconds)
            reached = True
            if status >= 500:
                yield ("note", "hub", f"{hub} answers with a failure ({status})", "try later")
            else:
                yield ("ok", "hub", f"{hub} answers", "")
        except (OSError, http.client.HTTPException, ValueError) as error:
            inner = getattr(error, "reason", error)  # of a URLError
            reason = getattr(inner, "strerror", None) or str(inner)[:100] or type(inner).__name__
            yield ("note", "hub", f"{hub} cannot be reached ({reason}); offline works", _WAYS)
    if found is None:
        yield ("ok", "hub token", none, "" if not reached else log_in)
    elif not reached:
        yield ("ok", "hub token", f"{named}, not tried", "")
    else:
        yield from _try_token(str(hub), named, found[1], seconds)


def _try_token(hub: str, named: str, secret: str, seconds: float) -> Iterator[Line]:
    try:
        status = ask(f"{hub}/api/whoami-v2", seconds, secret)
    except (OSError, http.client.HTTPException, ValueError):
        yield ("note", "hub token", f"{named}, not answered in time", "run it again")
        return
    if status in (401, 403):
        text = f"{named}, refused by the hub ({status}): every request with it fails"
        yield ("missing", "hub token", text, "make a new one (hf auth login), or unset it")
    else:
        yield ("ok", "hub token", f"{named}, accepted" if status == 200 else f"{named}", "")
