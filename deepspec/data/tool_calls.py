"""Tool calls of assistant turns: the forms that templates want, and whether one shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deepspec.data.turns import Message, squeezed
from deepspec.json_files import parse_json

OTHER = "Zcallz"  # a name and an argument that no data holds


def forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield `messages` with the arguments of their calls as objects, then as JSON text."""
    if not any(message.get("tool_calls") for message in messages):
        yield list(messages)
        return
    for form in (_as_object, _as_text):
        yield [
            {**message, "tool_calls": [_with_arguments(call, form) for call in calls]}
            if (calls := message.get("tool_calls"))
            else message
            for message in messages
        ]


def shown_as_python(messages: Sequence[Message], text: str) -> bool:
    """Whether `text` shows the arguments of a call as Python prints a dict, not as JSON."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    arguments = [_function(call).get("arguments") for call in calls]
    return any(isinstance(each, Mapping) and each and str(each) in text for each in arguments)


def readable(message: Message) -> bool:
    """Whether the calls of `message` are a list of objects with names."""
    calls = message.get("tool_calls") or []
    return isinstance(calls, list | tuple) and all(
        isinstance(call, Mapping)
        and isinstance(_function(call), Mapping)
        and isinstance(_function(call).get("name"), str)
        for call in calls
    )


def with_other_last(message: Message) -> Message:
    """Return `message` with another name and other arguments in its last call."""
    *calls, last = message["tool_calls"]
    return {**message, "tool_calls": [*calls, _changed(last, name=OTHER, arguments={OTHER: OTHER})]}


def names(message: Message) -> list[str]:
    """Return the names of the functions that `message` calls."""
    return [str(_function(call).get("name")) for call in message.get("tool_calls") or ()]


def shown(text: str, message: Message) -> bool:
    """Whether `text` has the calls of `message`, or the result that it is: at least its longest
    word, because templates write results in many ways."""
    if message["role"] == "tool":
        words = re.findall(r"\w+", message["content"])
        return not words or max(words, key=len) in text
    return not message.get("tool_calls") or are_in(text, message)


def are_in(text: str, message: Message) -> bool:
    """Whether `text` has the names and the arguments of all calls of `message`."""
    rendered = squeezed(text)
    for call, name in zip(message["tool_calls"], names(message), strict=True):
        for piece in (name, *_values(_as_object(_function(call).get("arguments")))):
            escaped = (json.dumps(piece, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
            spellings = (piece, *escaped)
            if not any(squeezed(each) in rendered for each in spellings):
                return False
    return True


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


def _with_arguments(call: Mapping[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    return _changed(call, arguments=form(_function(call).get("arguments")))


def _changed(call: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return `call` with `changes` to its function, which some data do not put into a key of its
    own."""
    function = {**_function(call), **changes}
    return {**(call if "function" in call else function), "function": function}


def _as_object(arguments: Any) -> Any:
    """`arguments` as an object where they are the JSON text of one, or no text for none at all."""
    try:
        parsed = parse_json(arguments or "{}") if isinstance(arguments, str) else None
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, Mapping) else arguments


def _as_text(arguments: Any) -> Any:
    if isinstance(arguments, str):
        return arguments or "{}"
    return json.dumps(arguments, ensure_ascii=False)
