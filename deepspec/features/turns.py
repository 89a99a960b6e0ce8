"""Who is computed next: one request at a time, the clients in turn."""

from __future__ import annotations

import asyncio
from collections import deque

Turn = asyncio.Future[bool]  # true when the turn has come, false when another took the place


class Turns:
    """At most `size` requests that wait or are computed.

    Clients are served round robin, and a client's own requests in the order they came. When the
    queue is full, a client that has fewer requests in it than the busiest one takes the place of
    that client's newest request: a flood from one address does not shut out the others.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._current: Turn | None = None
        self._lines: dict[str, deque[Turn]] = {}  # in the order in which clients are served

    def __len__(self) -> int:
        return (self._current is not None) + sum(map(len, self._lines.values()))

    def join(self, client: str) -> Turn | None:
        """Return the turn of a new request, or None where the queue is full. Call `leave` with
        it however the request ends."""
        if len(self) >= self._size and not self._make_room(client):
            return None
        turn: Turn = asyncio.get_running_loop().create_future()
        self._lines.setdefault(client, deque()).append(turn)
        if self._current is None:
            self._advance()
        return turn

    def leave(self, turn: Turn) -> None:
        """End a request that was computed, or one that waits no longer."""
        if turn is self._current:
            self._current = None
            self._advance()
            return
        for client, line in self._lines.items():
            if turn in line:
                self._remove(client, turn)
                return

    def _make_room(self, client: str) -> bool:
        busiest = max(self._lines, key=lambda name: len(self._lines[name]), default=client)
        if len(self._lines.get(client, ())) + 1 >= len(self._lines.get(busiest, ())):
            return False
        last = self._lines[busiest][-1]
        self._remove(busiest, last)
        last.set_result(False)
        return True

    def _remove(self, client: str, turn: Turn) -> None:
        self._lines[client].remove(turn)
        if not self._lines[client]:
            del self._lines[client]

    def _advance(self) -> None:
        if not self._lines:
            return
        client = next(iter(self._lines))
        line = self._lines.pop(client)
        self._current = line.popleft()
        if line:
            self._lines[client] = line  # behind the other clients
        self._current.set_result(True)
