"""Standard output and error: a reader that leaves, and signs that they cannot hold."""

from __future__ import annotations

import io
import os
import re
import select
import sys

# what moves the cursor, colours, ends a line, or turns the direction of writing
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def tell(line: str) -> None:
    """A line on standard error; what is told to nobody stops no work."""
    try:
        print(visible(line), file=sys.stderr, flush=True)
    except BrokenPipeError:
        drop_unread()


def show(line: str = "") -> None:
    """Print one line of results to standard output."""
    print(visible(line))


def visible(text: str, lines: bool = False) -> str:
    """Return `text` with escapes in place of what a terminal would act on; `lines` stay apart."""

    def escaped(found: re.Match[str]) -> str:
        return "\n" if lines and found[0] == "\n" else repr(found[0])[1:-1]

    return CONTROL.sub(escaped, text)


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
