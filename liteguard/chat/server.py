"""The local page and the OpenAI-compatible API, on 127.0.0.1 and for this machine's programs only.

A page of another site can make a browser send requests here, under a name of its own that resolves
to 127.0.0.1 (DNS rebinding) too. So the Host must be this server's, an Origin too where one is
sent, and a body must be JSON, which a browser sends to another site only after asking.
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import sys
import threading
from collections.abc import Generator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from liteguard import shown
from liteguard.chat import openai_api
from liteguard.chat.openai_api import ApiError, Asked
from liteguard.chat.speakers import Said, Speaker
from liteguard.errors import LiteGuardError, UserError
from liteguard.sampling import Sampling

ADDRESS = "127.0.0.1"
LARGEST_BODY = 1_000_000  # bytes
PAGE = Path(__file__).parent / "page.html"


class Server(ThreadingHTTPServer):
    """The server; `page` is HTML, or None for the API alone."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        speakers: Sequence[Speaker],
        max_new_tokens: int,
        sampling: Sampling,
        system: str | None = None,
        port: int = 0,
        page: str | None = None,
    ) -> None:
        self.speakers = {speaker.name: speaker for speaker in speakers}
        self.max_new_tokens, self.sampling, self.system = max_new_tokens, sampling, system
        self.page = page
        self.ended = False
        self.answering: set[threading.Thread] = set()
        try:
            super().__init__((ADDRESS, port), Handler)
        except OverflowError:
            raise UserError(f"--port {port}: 0 to 65535") from None
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(
                    f"port {port} cannot be used ({error.strerror}). Choose another --port; 0 "
                    "takes a free one."
                ) from None
            raise
        self.port = int(self.server_address[1])
        self.url = f"http://{ADDRESS}:{self.port}"
        self.hosts = {f"{name}:{self.port}" for name in (ADDRESS, "localhost")}
        if self.port == 80:  # which clients leave out
            self.hosts |= {ADDRESS, "localhost"}

    def end(self) -> None:
        """Stop answers at their next piece, and wait for them: then the models are closed."""
        self.ended = True
        for thread in list(self.answering):
            thread.join(60)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "LiteGuard", ""

    def log_message(self, *args: object) -> None:
        pass  # questions are nobody's business

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def _guarded(self, work: Any) -> None:
        """Do it; what goes wrong is answered in OpenAI's form."""
        try:
            self._check_sender()
            work()
        except ApiError as error:
            self._json(error.to_dict(), error.status)
        except LiteGuardError as error:
            self._json(ApiError(500, shown.message(str(error))).to_dict(), 500)

    def _check_sender(self) -> None:
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        allowed = {f"http://{name}" for name in self.server.hosts}
        if host not in self.server.hosts or (origin is not None and origin not in allowed):
            self.close_connection = True  # its body stays unread
            raise ApiError(403, f"only for requests to {self.server.url} from this machine")

    def _get(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/" and self.server.page is not None:
            self._page(self.server.page)
        elif path == "/v1/models":
            data = [openai_api.model(speaker) for speaker in self.server.speakers.values()]
            self._json({"object": "list", "data": data})
        elif path.startswith("/v1/models/") and (name := path[11:]) in self.server.speakers:
            self._json(openai_api.model(self.server.speakers[name]))
        else:
            raise ApiError(404, "there are /v1/models and /v1/chat/completions")

    def _post(self) -> None:
        self.close_connection = True  # until the body was read
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            raise ApiError(413, f"a body of at most {LARGEST_BODY} bytes, with its Content-Length")
        content = self.rfile.read(int(length))
        self.close_connection = False
        if self.headers.get_content_type() != "application/json":
            raise ApiError(415, "Content-Type must be application/json")
        if urlsplit(self.path).path != "/v1/chat/completions":
            raise ApiError(404, "there are /v1/models and /v1/chat/completions")
        own = self.server
        asked = openai_api.read_request(
            content, own.speakers, own.max_new_tokens, own.sampling, own.system
        )
        pieces = asked.speaker.stream(asked.rendered, asked.max_new_tokens, asked.sampling)
        identity = openai_api.new_id()
        own.answering.add(threading.current_thread())
        try:
            with contextlib.closing(pieces):
                if asked.stream:
                    self._stream(identity, asked, pieces)
                else:
                    self._json(openai_api.completion(identity, asked, self._last(pieces)))
        finally:
            own.answering.discard(threading.current_thread())

    def _stream(self, identity: str, asked: Asked, pieces: Generator[str, None, Said]) -> None:
        """Server-sent events; who goes away stops the answer."""
        self.close_connection = True  # the end of the stream is the end of the connection
        self._head("text/event-stream", {"Connection": "close"})
        self._event(openai_api.chunk(identity, asked))
        try:
            while not self.server.ended:
                self._event(openai_api.chunk(identity, asked, next(pieces)))
            return
        except StopIteration as end:
            said: Said = end.value
        except LiteGuardError as error:
            self._event(ApiError(500, shown.message(str(error))).to_dict())
            return
        self._event(openai_api.chunk(identity, asked, said=said))
        if asked.usage:
            self._event(openai_api.usage_chunk(identity, asked, said))
        self.wfile.write(b"data: [DONE]\n\n")

    def _last(self, pieces: Generator[str, None, Said]) -> Said:
        """What a generator returns, its pieces not needed."""
        while not self.server.ended:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value
        raise ApiError(503, "the server ends")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _page(self, page: str) -> None:
        nonce = secrets.token_urlsafe(16)
        content = page.replace("NONCE", nonce).encode()
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
        policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        headers = {"Content-Security-Policy": policy, "Content-Length": str(len(content))}
        self._head("text/html; charset=utf-8", headers)
        self.wfile.write(content)

    def _json(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        headers = {"Content-Length": str(len(content))}
        if self.close_connection:
            headers["Connection"] = "close"
        self._head("application/json", headers, status)
        self.wfile.write(content)

    def _head(self, kind: str, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        always = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        for name, value in {"Content-Type": kind, **always, **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def serve(
    speakers: Sequence[Speaker],
    max_new_tokens: int,
    sampling: Sampling,
    system: str | None,
    port: int,
    page: bool,
) -> None:
    """Serve until Ctrl-C. Raises UserError when the port cannot be used."""
    text = PAGE.read_text(encoding="utf-8") if page else None
    with Server(speakers, max_new_tokens, sampling, system, port, text) as server:
        if page:
            print(f"page: {server.url}/")
        print(f"API:  {server.url}/v1 (models: {', '.join(server.speakers)}; any API key)")
        print("Not medical advice. Ctrl-C ends it.")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        server.end()
        print("\nended")
