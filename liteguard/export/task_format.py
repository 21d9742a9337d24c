"""The bytes of a `.task`: its METADATA member, and the zip file around its members.

METADATA is a protocol buffer, `odml.infra.proto.LlmParameters`, of which a bundle needs six
fields. They were read off what MediaPipe 0.10.35's bundler writes; tests hold both to the same
bytes (tests/fixtures/mediapipe_bytes.json, and MediaPipe itself where it is installed). The
encoding: https://protobuf.dev/programming-guides/encoding/ (a tag, a length, the content).

The message has no field for a sampler or a limit of tokens: an app reads those in `deploy.json`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Fields of LlmParameters.
_STOP_TOKENS = 5
_START_TOKEN = 6
_PROMPT_TEMPLATE = 8  # one prefix and one suffix, for runtimes that know no turns
_PROMPT_TEMPLATES = 17  # a prefix and a suffix for each role
# Fields of both kinds of template.
_PREFIX, _SUFFIX = 2, 3
# Fields of _PROMPT_TEMPLATES.
_USER, _MODEL = 1, 2
# Bytes: where the content of a member starts, so that it can be mapped. MediaPipe's number.
_ALIGNMENT = 4
# A zip file has no time before this one. The same for all: equal inputs give equal bytes.
_TIME = (1980, 1, 1, 0, 0, 0)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def _field(number: int, content: bytes) -> bytes:
    """A field of text or of a message: wire type 2."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _filled(number: int, content: bytes) -> bytes:
    """`_field`, or nothing for nothing: protocol buffers leave out what is empty."""
    return _field(number, content) if content else b""


def _affixes(prefix: str, suffix: str) -> bytes:
    return _filled(_PREFIX, prefix.encode()) + _filled(_SUFFIX, suffix.encode())


def metadata(
    stop_tokens: list[str],
    user: tuple[str, str],
    model: tuple[str, str],
    start_token: str = "",
) -> bytes:
    """The METADATA member: the tokens that end an answer, and (prefix, suffix) of both roles.

    Without a start token the field is left out: an empty one aborts the runtime.
    """
    roles = _filled(_USER, _affixes(*user)) + _filled(_MODEL, _affixes(*model))
    stops = b"".join(_field(_STOP_TOKENS, token.encode()) for token in stop_tokens)
    # Without turns, what follows a question is all that stands before the answer.
    one = _affixes(user[0], user[1] + model[0])
    start = _filled(_START_TOKEN, start_token.encode())
    return stops + start + _filled(_PROMPT_TEMPLATE, one) + _filled(_PROMPT_TEMPLATES, roles)


def write(output: Path, members: Mapping[str, Any]) -> None:
    """A zip file of uncompressed members (name -> content, bytes or a mapped file).

    The same members give the same bytes. Each content starts at a multiple of four bytes; before
    a header that would miss it there are one to four zeros, as MediaPipe writes them.

    Raises OSError where it cannot be written.
    """
    with zipfile.ZipFile(output, "w") as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name, _TIME)
            member.create_system = 3  # Unix, whatever system this is
            member.external_attr = 0o600 << 16
            member.file_size = len(content)
            # Where sizes need 64 bits the header has 20 bytes more, which keep the alignment.
            header = 30 + len(name)
            archive.start_dir += _ALIGNMENT - (archive.start_dir + header) % _ALIGNMENT
            with archive.open(member, "w") as stream:
                stream.write(content)
