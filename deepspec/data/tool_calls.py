"""Tool calls of assistant turns: the forms that templates want, and whether one shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepspec.data.conversations import Message


def forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield `messages` with the arguments of their calls as objects, then as JSON text."""
    yield list(messages)
    if any(message.get("tool_calls") for message in messages):
        yield [
            {**message, "tool_calls": [_with_text(call) for call in calls]}
            if (calls := message.get("tool_calls"))
            else message
            for message in messages
        ]


def names(message: Message) -> list[str]:
    """Return the names of the functions that `message` calls."""
    return [str(_function(call).get("name")) for call in message.get("tool_calls") or ()]


def rendered_end(message: Message, before: str, after: str) -> int | None:
    """Return where in `after` the calls of `message` end, as the template renders them.

    `before` and `after` stand around the turn's content. None where a name or an argument is in
    neither.
    """
    end, rendered = 0, _squeezed(before + after)
    for call, name in zip(message["tool_calls"], names(message), strict=True):
        for piece in (name, *_values(_function(call).get("arguments"))):
            spellings = (piece, json.dumps(piece, ensure_ascii=False)[1:-1])
            if not any(_squeezed(each) in rendered for each in spellings):
                return None
            for each in spellings:
                if (found := after.rfind(each)) >= 0:
                    end = max(end, found + len(each))
    return end


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    return call.get("function") or call


def _values(arguments: Any) -> Iterator[str]:
    """Every text and number in `arguments`, as text."""
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    if isinstance(arguments, list):
        for each in arguments:
            yield from _values(each)
    elif isinstance(arguments, str):
        yield arguments
    elif isinstance(arguments, int | float) and not isinstance(arguments, bool):
        yield str(arguments)


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = _function(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return dict(call)
    return {**call, "function": {**function, "arguments": json.dumps(arguments)}}


def _squeezed(text: str) -> str:
    return "".join(text.split())
