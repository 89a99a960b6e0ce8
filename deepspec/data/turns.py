"""One turn of a conversation: from the forms that data have to the one that templates read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from deepspec.config.schema import FieldsConfig
from deepspec.json_files import beyond, parse_json

# One turn: `role` and `content` (text), and where it has them `reasoning_content` (the thought
# before the answer), `tool_calls`, `name` and `tool_call_id`, in the form that templates read.
Message = dict[str, Any]

# Keys of an assistant turn that are ours and reach neither a template nor a server, with their
# types: `token_ids` (the ids that the target sampled for this answer, with the stop token unless a
# length limit cut it) and `supervised` (false: context only).
OURS = {"token_ids": list, "supervised": bool}
KEPT = ("name", "tool_call_id")
OLD_CALL = "function_call"  # where OpenAI's first version of tools put its one call
# Keys of a turn that are left out and not counted: nothing in them is part of the conversation.
IGNORED = frozenset(
    "id message_id uuid parent parent_id index turn_id timestamp time date created_at updated_at "
    "create_time weight loss train mask model model_name usage finish_reason lang language "
    "token_count num_tokens tokens".split()
)
TEXT_PARTS = ("text", "input_text", "output_text")


class Unusable(Exception):
    """The reason why a row cannot be used; rows are counted by it."""


def parse_turn(turn: Any, fields: FieldsConfig) -> tuple[Message, list[str]]:
    """The turn as templates read it, and the keys with content that were not read.

    Raises Unusable.
    """
    if not isinstance(turn, dict):
        raise Unusable(f"a turn that is no object but {_kind(turn)}")
    role = _role(first_of(turn, fields.role), fields)
    message: Message = {"role": role, "content": ""}
    content = first_of(turn, fields.content)
    read = {*fields.role, *fields.content, *KEPT}
    if role == "assistant":
        reasoning = first_of(turn, fields.reasoning)
        if reasoning:
            message["reasoning_content"] = _text(reasoning, role)
        if calls := _tool_calls(turn, fields):
            message["tool_calls"] = calls
        for key, kind in OURS.items():
            if isinstance(turn.get(key), kind):
                message[key] = turn[key]
        if turn.get("weight") == 0 or turn.get("train") is False:  # OpenAI's, Axolotl's
            message["supervised"] = False
        read |= {*fields.reasoning, *fields.tool_calls, OLD_CALL, *OURS}
    elif content is None:
        raise Unusable(f"a turn of role {role} without any of {', '.join(fields.content)}")
    if content is not None:
        message["content"] = _text(content, role)
    if role == "assistant" and not (
        message["content"].strip() or {"reasoning_content", "tool_calls"} & message.keys()
    ):
        raise Unusable("empty answer")
    for key in KEPT:
        if turn.get(key) is not None:
            message[key] = str(turn[key])
    unread = [key for key in turn if key not in read | IGNORED and _has_content(turn[key])]
    return message, unread


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The tools on offer, each as {"type": "function", "function": {...}}. Raises Unusable."""
    tools = from_text(value, "tools") if value else []
    tools = [tools] if isinstance(tools, dict) else tools
    if isinstance(tools, list):
        tools = [from_text(tool, "tools") for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools that are no list of objects")
    return tuple(
        tool if "function" in tool or "name" not in tool else _nested(tool) for tool in tools
    )


def first_of(row: dict[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of `names` that `row` has; None where it has none."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _role(name: Any, fields: FieldsConfig) -> str:
    if name is None:
        raise Unusable(f"a turn without any of {', '.join(fields.role)}")
    role = fields.roles.get(str(name)) or fields.roles.get(str(name).strip().lower())
    if role is None:
        raise Unusable(f"role {str(name)[:40]!r}, which data.fields.roles does not have")
    return role


def _text(content: Any, role: str) -> str:
    """`content` as text: joined where it comes in parts, as JSON where a tool returned it."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_part, content)):
        return "".join(map(_part, content))
    if role == "tool":
        return json.dumps(content, ensure_ascii=False, default=str)
    raise Unusable(f"content that is no text but {_kind(content)}")


def _is_part(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, dict) and bool({"type", "text"} & set(value))
    )


def _part(part: str | dict[str, Any]) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text")
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    raise Unusable(f"content part of type {str(kind)[:40]!r}")


def _tool_calls(turn: dict[str, Any], fields: FieldsConfig) -> list[dict[str, Any]]:
    value = first_of(turn, [*fields.tool_calls, OLD_CALL])
    calls = from_text(value, "tool calls") if value else []
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise Unusable("tool calls that are no list")
    return [_tool_call(from_text(call, "tool calls")) for call in calls]


def _tool_call(call: Any) -> dict[str, Any]:
    """{"type", "function": {"name", "arguments": an object}}, and its id where it has one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("a tool call without a name")
    arguments = first_of(function, ("arguments", "parameters"))
    arguments = from_text(arguments, "arguments of a tool call") if arguments else {}
    if not isinstance(arguments, dict):
        raise Unusable("arguments of a tool call that are no object")
    named = {"id": str(call["id"])} if call.get("id") is not None else {}
    return {**named, **_nested({"name": function["name"], "arguments": arguments})}


def _nested(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


def from_text(value: Any, what: str) -> Any:
    """`value`, read as JSON where it is text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except json.JSONDecodeError:
        raise Unusable(f"{what} as text that is not JSON") from None
    except ValueError as error:
        raise Unusable(f"{what} as text that is beyond the limits: {beyond(error)}") from None


def _has_content(value: Any) -> bool:
    """Whether `value` is more than an empty column, which a table has in rows that lack it."""
    return value is not None and value is not False and value not in ("", [], {})


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "text" if isinstance(value, str) else "a number")


def squeezed(text: str) -> str:
    """Return `text` without white space, which templates add and take away at will."""
    return "".join(text.split())
