"""A feature server that lies: it describes its target truly, and then answers as it is told to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Answer = Callable[[socket.socket], None]


@contextmanager
def lying(description: bytes, answer: Answer, describe: Answer | None = None) -> Iterator[str]:
    """Serve `description` (or by `describe`), and every POST by `answer` on the bare socket."""
    listener = socket.create_server(("127.0.0.1", 0))

    def handle(client: socket.socket) -> None:
        with client:
            try:
                head = _read_request(client)
                if head.startswith(b"POST"):
                    answer(client)
                elif describe is not None:
                    describe(client)
                else:
                    client.sendall(response(description))
            except OSError:
                pass  # the honest side has left, as it should

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


def response(body: bytes, status: str = "200 OK", length: int | None = None, **more: str) -> bytes:
    """Return the bytes of a response; `more`: headers, with _ for -."""
    size = len(body) if length is None else length
    headers = {"Content-Length": str(size), "Connection": "close", **more}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items() if value]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1") + body


def _read_request(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = client.recv(2**16)
        if not chunk:
            raise ConnectionResetError
        data += chunk
    head, body = data.split(b"\r\n\r\n", 1)
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    while len(body) < length:
        body += client.recv(2**16)
    return head
