"""A hub on this machine, and commands of this library that take it for the hub."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(folder: Path) -> Iterator[str]:
    """Serve the files of `folder`/OWNER/NAME as those of main; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self.wfile.write(self._answer())

        def _answer(self) -> bytes:
            path = self.path.partition("?")[0].removeprefix("/api/models")
            repository = "/".join(path.split("/")[1:3])
            rest = path.partition("/resolve/")[2]
            file = folder / repository / rest.partition("/")[2]
            if path != "/" and not (rest and file.is_file()):
                known = (folder / repository).is_dir()
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return b""
            content = b"" if path == "/" else file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            return content

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def closed_port() -> str:
    """The address of a port on this machine at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def run_with_hub(
    address: str, home: Path, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`deepspec WORDS` in a process of its own: the hub's library reads HF_ENDPOINT on import."""
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "COLUMNS": "300",
    }
    return subprocess.run(
        [sys.executable, "-m", "deepspec", *words],
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
