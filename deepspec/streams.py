"""Standard output and error: a reader that leaves, and signs that they cannot hold."""

from __future__ import annotations

import io
import os
import select
import sys


def tell(line: str) -> None:
    """A line on standard error; what is told to nobody stops no work."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        drop_unread()


def drop_unread() -> bool:
    """Lead the streams whose reader left (`deepspec train 2>&1 | head -1`) to nowhere; whether
    there was one. Where not, a BrokenPipeError is that of another pipe or socket."""
    unread = [descriptor for descriptor in (1, 2) if _is_unread(descriptor)]
    for descriptor in unread:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
    return bool(unread)


def escape_unknown_signs() -> None:
    """Where the terminal's or file's encoding lacks a sign, print its escape and go on."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _is_unread(descriptor: int) -> bool:
    ends = select.poll()
    ends.register(descriptor, 0)  # errors and hang-ups, which are reported unasked
    return bool(ends.poll(0))
