"""A server that keeps what it is sent and answers it with one status and one body."""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


@dataclass(frozen=True)
class Sent:
    """One request, names of headers in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Inbox:
    """A receiver at a real port; `status` and `answer` may be changed at any time."""

    def __init__(self, *, status: int = 204, answer: bytes = b"") -> None:
        self.status, self.answer = status, answer
        self.got: list[Sent] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.got.append(Sent(self.command, self.path, headers, body))
                self.send_response(outer.status)
                self.send_header("content-length", str(len(outer.answer)))
                self.end_headers()
                self.wfile.write(outer.answer)

            do_PUT = do_POST  # noqa: N815 -- as the base class wants it

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A client that hangs up is not worth a word."""

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def speak_tls(self, certificate: str, key: str) -> None:
        """Speak nothing but TLS from now on."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = self.url.replace("http:", "https:")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
