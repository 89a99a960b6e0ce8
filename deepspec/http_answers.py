"""Answers of HTTP servers, read within limits of time and size."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from deepspec.secrets import masked

PLAIN = {"Accept-Encoding": "identity"}  # a few bytes of gzip can become gigabytes
SHOWN = 200


class UnusableAnswerError(httpx.RequestError):
    """An answer that is larger than it may be, or compressed though that was not asked for."""


async def fetch(
    client: httpx.AsyncClient, method: str, url: str, seconds: float, limit: int, **options: Any
) -> httpx.Response:
    """Return the whole response to a request, whose body has at most `limit` bytes.

    Raises httpx.ReadTimeout when it is not complete after `seconds`, however often some bytes
    came, and UnusableAnswerError as soon as it is seen to be too large or compressed; the body of
    an HTTP error is cut instead. Redirects are not followed.
    """
    request = client.build_request(method, url, **options)
    request.headers.update(PLAIN)
    try:
        async with asyncio.timeout(seconds):
            response = await client.send(request, stream=True, follow_redirects=False)
            try:
                body = await _body(response, limit)
            finally:
                await response.aclose()
    except TimeoutError:
        raise httpx.ReadTimeout(f"no whole answer in {seconds:g} s", request=request) from None
    headers = response.headers.copy()
    headers.pop("content-type", None)  # its charset may be any codec of Python, zlib too
    return httpx.Response(response.status_code, headers=headers, content=body, request=request)


async def _body(response: httpx.Response, limit: int) -> bytes:
    """Return the body; of an error, whose text is only shown, as much as can be."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        if response.is_error:
            return b""
        raise UnusableAnswerError(f"the answer is compressed ({shown(encoding)})")
    body = bytearray()
    declared = int(response.headers.get("content-length", 0))
    if declared <= limit or response.is_error:  # else it is not read at all
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > limit:
                break
        else:
            return bytes(body)
    if response.is_error:
        return bytes(body[:limit])
    raise UnusableAnswerError(f"the answer has more than the {limit} bytes it can have")


def shown(text: str) -> str:
    """Return the beginning of what a server sent, without secrets, which it may repeat, and
    without signs that a terminal would obey."""
    line = " ".join(masked(text[: 100 * SHOWN]).split())[:SHOWN]
    return line if line.isprintable() else ascii(line)[1:-1]
