"""Connections that cost the server little, whatever their client does with them.

uvicorn has no limit for clients that connect and send nothing, that send their headers byte by
byte, that go on sending a body which was refused, or that do not read their answer. Its own limit
on connections counts requests, not connections.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepspec.config.schema import ServeConfig

BYTES_PER_SECOND = 2**18  # the slowest line that is worth a connection, both ways
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: 20\r\n\r\ntoo many connections"
)


class Connections:
    """The limits that all connections share. `lost(reason)` is called for each that broke one."""

    def __init__(self, config: ServeConfig, lost: Callable[[str], None]) -> None:
        self.seconds = config.request_seconds
        self.most, self.most_per_client = config.connections, config.connections_per_client
        self.lost = lost
        self.of_client: Counter[str] = Counter()

    def protocol(self, *args: Any, **kwargs: Any) -> GuardedProtocol:
        """Return the protocol of one new connection, as uvicorn makes it."""
        return GuardedProtocol(self, *args, **kwargs)


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol with time limits where no request handler is at work."""

    def __init__(self, shared: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared = shared
        self._client = ""
        self._sending: asyncio.TimerHandle | None = None  # until the client must have sent
        self._reading: asyncio.TimerHandle | None = None  # until the client must have read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Close the connection at once where there are too many."""
        super().connection_made(transport)
        shared = self._shared
        self._client = self.client[0] if self.client else ""
        shared.of_client[self._client] += 1
        too_many = shared.of_client[self._client] > shared.most_per_client
        if too_many or len(self.connections) > shared.most:
            shared.lost("too many")
            transport.write(FULL)
            transport.close()
            return
        self._hold_to_time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._shared.of_client[self._client] -= 1
        if not self._shared.of_client[self._client]:
            del self._shared.of_client[self._client]
        for timer in (self._sending, self._reading):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Handle `data`, and stop the time when headers or a refused body are complete."""
        super().data_received(data)
        self._hold_to_time()

    def send_400_response(self, msg: str) -> None:
        """Count what is no HTTP."""
        self._shared.lost("not HTTP")
        super().send_400_response(msg)

    def on_response_complete(self) -> None:
        """Give the client time to read the answer, and to send what was refused unread."""
        unread = self.transport.get_write_buffer_size()
        if self._reading is not None:
            self._reading.cancel()
        if unread:
            seconds = self._shared.seconds + unread / BYTES_PER_SECOND
            self._reading = self.loop.call_later(seconds, self._drop_unread)
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._hold_to_time()

    def _hold_to_time(self) -> None:
        refused = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        waits = self.conn.their_state is h11.IDLE or refused
        if waits and self._sending is None:
            self._sending = self.loop.call_later(self._shared.seconds, self._drop_slow)
        elif not waits and self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _drop_slow(self) -> None:
        if not self.transport.is_closing():
            self._shared.lost("slow headers")
            self.transport.abort()

    def _drop_unread(self) -> None:
        if self.transport.get_write_buffer_size():
            self._shared.lost("unread answer")
            self.transport.abort()
