"""Secrets of this process: tokens from the environment, and texts that are never shown.

`hide` names a text, and `masked` replaces it. The command line masks all that it prints, tracebacks
and the messages of libraries included; what goes into files without their names is masked one by
one, such as the body in which a server repeats the headers of a request.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from contextlib import suppress
from typing import Any
from urllib.parse import quote, unquote

from deepspec.errors import ConfigError

TOKENS = ("DEEPSPEC_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
LEAST = 6  # characters: shorter texts stand in too many harmless words to be replaced everywhere
STARS = "***"
_NAME = r"\$\{(?:[^{}]|\{[^{}]*\})*\}"  # ${oc.env:NAME}, where another may be nested once
_USER_INFO = re.compile(r"(?<=://)(?:%s|[^\s/?#'\"<>])*@" % _NAME)  # noqa: UP031
_UNQUOTED = re.compile(r"(?<=://)[^/?#@]*:(?!\d*(?:[/?#]|$))[^@]*@")  # a password with / ? or #
_PARTS = re.compile(r"((?:%s|[^:])*)(?::(.*))?" % _NAME, re.DOTALL)  # noqa: UP031

_hidden: dict[str, str] = {}


def hide(text: str, shown: str = STARS) -> None:
    """Have `masked` show `text` as `shown`, also where it is quoted or escaped."""
    for form in (text, quote(text), quote(text, safe=""), repr(text)[1:-1], json.dumps(text)[1:-1]):
        if len(form) >= LEAST:
            _hidden[form] = shown


def hide_url(url: str) -> None:
    """Have `masked` hide the user info and the query of `url`, also as a header has them."""
    if found := _USER_INFO.search(url) or _UNQUOTED.search(url):
        user, _, password = found[0][:-1].partition(":")
        for secret in (password, unquote(password)) if password else (user, unquote(user)):
            hide(secret)
        pair = f"{unquote(user)}:{unquote(password)}"
        hide(base64.b64encode(pair.encode()).decode())
    for part in url.partition("?")[2].split("&"):
        value = part.rpartition("=")[2]
        hide(value)
        hide(unquote(value))


def masked(text: str) -> str:
    """Return `text` without what is hidden, tokens of the environment, and passwords in URLs."""
    known = dict(_hidden)
    for name in TOKENS:
        if value := os.environ.get(name, "").strip():
            known[value] = f"[{name}]"
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, known[secret])
    return _USER_INFO.sub(_shown_user, text)


def shown_url(url: str) -> str:
    """Return `url` without password and values of its query; `${oc.env:NAME}` stays."""
    kind = _USER_INFO if _USER_INFO.search(url) else _UNQUOTED
    place, mark, query = kind.sub(_shown_user, url, count=1).partition("?")
    return f"{place}{mark}{'&'.join(_shown_value(part) for part in query.split('&'))}"


def has_password(text: str) -> bool:
    """Whether there is a URL with a user or password in `text`."""
    return bool(_USER_INFO.search(text))


def has_unquoted_password(url: str) -> bool:
    """Whether `url` has a password with signs that end the name of a host."""
    return bool(_UNQUOTED.search(url)) and not _USER_INFO.search(url)


def mask_streams() -> None:
    """Mask all that is printed from now on; call it again after a library replaced the writing."""
    for stream in (sys.stdout, sys.stderr):
        write = stream.write
        if getattr(write, "masks", False):
            continue

        def write_masked(text: str, write: Any = write) -> Any:
            return write(masked(text))

        setattr(write_masked, "masks", True)  # noqa: B010
        with suppress(AttributeError):  # a stream of another kind, which a caller put there
            setattr(stream, "write", write_masked)  # noqa: B010


def token_of(variable: str) -> str | None:
    """Return the bearer token in the environment's `variable`, None where that is not set.

    Raises ConfigError, which never has the value, for one that is empty or that no HTTP header
    can carry.
    """
    value = os.environ.get(variable)
    if value is None:
        return None
    token = value.strip()  # files and shells leave line breaks at the end
    if not token:
        raise ConfigError(f"the environment variable {variable} is empty; set it, or unset it")
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(
            f"the environment variable {variable} holds characters that no HTTP header can carry "
            "(line breaks, control characters, or letters outside ASCII); set it to the token alone"
        )
    hide(token, f"[{variable}]")
    return token


def _shown_user(found: re.Match[str]) -> str:
    parts = _PARTS.fullmatch(found[0][:-1])
    assert parts is not None, "any text has a first part"
    user, password = parts[1], parts[2]
    if not password:  # a token stands where the user does
        return f"{_shown(user)}@"
    return f"{user}:{_shown(password)}@"


def _shown_value(part: str) -> str:
    name, equals, value = part.partition("=")
    return f"{name}={_shown(value)}" if equals else _shown(part)


def _shown(secret: str) -> str:
    return secret if re.fullmatch(rf"(?:{_NAME})*", secret) else STARS
