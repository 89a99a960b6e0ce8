"""Whether the Hugging Face hub answers, looked at before a command relies on it.

The hub's own library retries a name that does not resolve for most of a minute.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from deepspec.errors import first_line
from deepspec.secrets import masked, shown_url

SECONDS = 2.0


@dataclass(frozen=True)
class Hub:
    """Whether the hub `answers`, and in words what was `found`."""

    answers: bool
    found: str


def look_at_hub(seconds: float = SECONDS) -> Hub:
    """Send one request to the hub (HF_ENDPOINT, through the proxy of the environment).

    With HF_HUB_OFFLINE nothing is sent. Takes at most `seconds`, name resolution included.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return Hub(False, "offline (HF_HUB_OFFLINE)")
    endpoint = constants.ENDPOINT
    shown = shown_url(endpoint)
    found = [Hub(False, f"{shown} cannot be reached (no answer within {seconds:g} s)")]

    def ask() -> None:
        try:
            status = get_session().head(endpoint, timeout=seconds).status_code
        except Exception as error:  # of the HTTP library that the hub's has chosen
            reason = f"{type(error).__name__}: {masked(first_line(error))}"
            found.append(Hub(False, f"{shown} cannot be reached ({reason})"))
        else:
            found.append(Hub(status < 500, f"{shown} answers (HTTP {status})"))

    # a thread, because no timeout bounds the resolution of a name; a daemon, because the process
    # must not wait for it in the end
    thread = threading.Thread(target=ask, daemon=True, name="hub")
    thread.start()
    thread.join(seconds)
    return found[-1]
