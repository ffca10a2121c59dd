"""Servers to which an Airflow under test talks, and what each of them has heard: mail, pings, metrics."""

from __future__ import annotations

import email
import email.policy
import socket
import threading
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller

from demo.processes import free_port


class Mailbox:
    """A mail server, and what it has received."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.port = free_port()
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port)

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.mails.append(email.message_from_bytes(envelope.content, policy=email.policy.default))  # type: ignore[arg-type]
        return "250 OK"

    def __enter__(self) -> Mailbox:
        self._controller.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._controller.stop()

    def of(self, provider: str) -> list[EmailMessage]:
        return [mail for mail in self.mails if f" {provider}: " in mail["subject"]]


class Checks:
    """A web server that takes pings, and the path and body of each."""

    def __init__(self) -> None:
        self.pings: list[tuple[str, str]] = []
        pings = self.pings

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                pings.append((self.path, self.rfile.read(length).decode()))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Checks:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of(self, check: str) -> list[str]:
        return [path for path, _ in self.pings if path.startswith(f"/{check}")]


class StatsdServer:
    """Keeps what Airflow sends to it."""

    def __init__(self) -> None:
        self._socket = socket.socket(type=socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._listen)

    def _listen(self) -> None:
        while data := self._socket.recv(65536):
            self._lines += data.decode().splitlines()

    def __enter__(self) -> StatsdServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join(10)
        self._socket.close()

    def told(self, prefix: str) -> dict[str, str]:
        """Return the last value of each metric whose name, below Airflow's own prefix, begins so."""
        lines = [line.removeprefix("airflow.").partition(":") for line in self._lines]
        return {name.removeprefix(prefix): value for name, _, value in lines if name.startswith(prefix)}
