"""One line of a check's table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from deepspec.errors import DeepSpecError, first_line
from deepspec.progress import say


@dataclass(frozen=True)
class Finding:
    """Whether `what` holds, the largest `difference` that was seen (None: nothing was compared),
    and in words what was found."""

    what: str
    holds: bool
    difference: float | None
    detail: str


Outcome = tuple[bool, float | None, str]
"""A finding but for its name."""


def tried(what: str, check: Callable[[], Outcome]) -> Finding:
    """What `check` gives; where it raises, it does not hold, and the error is the reason.

    Prints the result at once: a large target takes minutes per check.
    """
    begun = time.monotonic()
    try:
        finding = Finding(what, *check())
    except Exception as error:
        first = first_line(error)
        reason = first if isinstance(error, DeepSpecError) else f"{type(error).__name__}: {first}"
        finding = Finding(what, False, None, reason)
    verdict = "holds" if finding.holds else "does not hold"
    say(f"{what}: {verdict} ({time.monotonic() - begun:.1f} s)")
    return finding
