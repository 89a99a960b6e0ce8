"""Renders chat templates in a process of their own, within a time and a memory.

Templates are programs that strangers wrote. Jinja's sandbox keeps them from the machine, not from
work without end: nested loops, strings that double, `10**10**8`. Much of that happens in one call
of C, which nothing in the same process can stop. What bounds what: SECONDS bounds one rendering,
whatever it does (the process is killed); BYTES bounds what the process may take beyond what it was
forked with (the kernel refuses more); CHARACTERS bounds the text that is handed back.
"""

from __future__ import annotations

import datetime
import gc
import os
import re
import resource
import signal
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from deepspec.data.turns import Message

SECONDS = 5.0
BYTES = 2**30
CHARACTERS = 2**26
ALIVE = 1.0  # seconds between looks at whether the parent still lives
TEXT, REFUSAL = b"+", b"-"
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
UTF8 = ("utf-8", "surrogatepass")  # of Python's text, which may hold half a surrogate pair


class LimitError(Exception):
    """A rendering took more time or memory than it may, or ended its process."""


class Renderer:
    """Calls `render` in a forked process, which is made when first needed and again after its end.

    Forked, as to import what it needs would take seconds. Threads may share one; a process that
    was itself forked makes its own.
    """

    def __init__(self, render: Callable[..., str]) -> None:
        self._render = render
        self._lock = threading.Lock()
        self._owner = 0
        self._stop: Callable[[], Any] | None = None
        RENDERERS.add(self)

    def __call__(self, *args: Any) -> str:
        """Return `render(*args)`. Raises LimitError beyond the limits, ValueError with the words of
        any other error."""
        with self._lock:
            if self._stop is None or self._owner != os.getpid():
                self._start()
            try:
                self._connection.send(args)
                if not self._connection.poll(SECONDS):
                    raise LimitError(f"it takes more than {SECONDS:g} s")
                answer = self._connection.recv_bytes()
            except BaseException as error:  # an interrupt too: the answer would be the next one's
                self.close()
                if isinstance(error, EOFError | OSError):
                    raise LimitError("it ended its process, for want of memory or stack") from None
                raise
        text = answer[1:].decode(*UTF8)
        if answer[:1] == TEXT:
            return text
        kind, _, words = text.partition(":")
        raise (LimitError if kind == LimitError.__name__ else ValueError)(words or kind)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._stop is not None and self._owner == os.getpid():
            self._stop()
        self._stop = None

    def _start(self) -> None:
        ours, its = Pipe()
        pid = os.fork()
        if pid == 0:
            _serve(its, self._render)
        its.close()
        self._connection, self._owner = ours, os.getpid()
        self._stop = weakref.finalize(self, _end, ours, pid, os.getpid())


def _unlock() -> None:
    """In a forked process: another thread may have held a lock while it was forked."""
    for each in RENDERERS:
        each._lock = threading.Lock()


RENDERERS: weakref.WeakSet[Renderer] = weakref.WeakSet()
os.register_at_fork(after_in_child=_unlock)


def _end(connection: Connection, pid: int, owner: int) -> None:
    connection.close()
    if os.getpid() == owner:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _serve(connection: Connection, render: Callable[..., str]) -> None:
    """Answer until the parent ends. Never returns."""
    try:
        _shut_off(connection.fileno())
        parent = os.getppid()
        while True:
            while not connection.poll(ALIVE):
                if os.getppid() != parent:
                    os._exit(0)
            connection.send_bytes(_answer(render, connection.recv()))
    finally:
        os._exit(0)


def _answer(render: Callable[..., str], args: tuple[Any, ...]) -> bytes:
    try:
        text = render(*args)
        if len(text) > CHARACTERS:
            raise LimitError(f"its text has {len(text)} characters, expected at most {CHARACTERS}")
        return TEXT + text.encode(*UTF8)
    except MemoryError:
        words = f"{LimitError.__name__}:it takes more than {BYTES / 2**30:g} GiB of memory"
    except LimitError as error:
        words = f"{LimitError.__name__}:{error}"
    except BaseException as error:  # whatever it raises is its refusal
        words = f"{type(error).__name__}:{str(error)[:1000] or type(error).__name__}"
    return REFUSAL + words.encode(*UTF8)


def _shut_off(kept: int) -> None:
    """Let go of what the parent has open (locks, ports, pipes to read to their end), leave signals
    of the terminal to it, and take no more memory than BYTES."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    gc.freeze()  # what came from the parent stays shared
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    taken = Path("/proc/self/statm")
    if not taken.exists():  # elsewhere than on Linux only the time is bounded
        return
    pages = int(taken.read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def text_of(
    tokenizer: Any,
    today: datetime.date,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    prompt: bool,
    options: Mapping[str, Any],
) -> str:
    """Return what the template makes of `messages`, or raise whatever it raises."""
    text: str = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=_dated(tokenizer.get_chat_template(tools=tools), today),
        add_generation_prompt=prompt,
        tokenize=False,
        **options,
    )
    return text


def _dated(template: str, today: datetime.date) -> str:
    """`template` with the day of `today` where it asks for the current date.

    Transformers gives templates a clock and no way to set it.
    """
    return CLOCK.sub(lambda call: repr(today.strftime(call.group(2))), template)
