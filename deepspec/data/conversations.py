"""Conversations from files, folders, globs or the hub, in any of three shapes.

`messages` (role, content), ShareGPT `conversations` (from, value), or `turns` (the user's side as
strings: prompts without answers). Which row fields hold what is config, not code. Nothing is left
out in silence: rows, and fields of turns, are counted by reason, with the first row that has it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from deepspec.config.schema import DataConfig, FieldsConfig
from deepspec.data.files import rows_of
from deepspec.data.turns import Message, Unusable, first_of, from_text, parse_tools, parse_turn
from deepspec.errors import DataError

SkipCounts = Counter[str]

NOT_UNICODE = "half a surrogate pair"  # why a row is left out, or an answer
TOO_DEEP = "a row nested too deeply"
TWICE = "the same row again, with the same id and content"
MOST_TURNS = 100_000
MOST_REASONS = 50  # data may name a role per row


@dataclass(frozen=True)
class Conversation:
    """Messages of roles system, developer, user, assistant and tool, and the `tools` on offer.

    `domain` is carried along for reports.

    `truncated`: the last answer stopped at a length limit, so its end of turn was not written.
    `conversation_id`: where several rows answer the same prompts, whose these are.
    """

    id: str
    messages: tuple[Message, ...]
    domain: str | None = None
    truncated: bool = False
    conversation_id: str | None = None
    tools: tuple[dict[str, Any], ...] = ()


def counter_of(skips: SkipCounts) -> Callable[[str, str], None]:
    """Return a function (reason, place) that counts in `skips` each reason with its first place."""
    first_places: dict[str, str] = {}

    def skip(reason: str, place: str) -> None:
        if reason not in first_places and len(first_places) >= MOST_REASONS:
            reason = "other reasons"
        skips[f"{reason} (first in {first_places.setdefault(reason, place)})"] += 1

    return skip


def load_conversations(config: DataConfig, skips: SkipCounts) -> Iterator[Conversation]:
    """All usable conversations of `config.path`, in order.

    `skips` counts the rows that are left out by reason, and the turns of the other rows by each of
    their fields that is not read. Raises DataError for a missing path, a malformed line (file and
    line named), and a source without one usable row. A row that was there before, with the same id
    and content, is left out; one with the same id and other content is not.
    """
    count, skip = 0, counter_of(skips)
    before: set[int] = set()  # hashes, for the rows may not fit into memory
    for place, row in (pair for path in config.path for pair in rows_of(path, config, skips)):
        unread: list[str] = []
        reason, conversation = parse_row(row, config.fields, place, unread)
        if conversation is None:
            skip(reason, place)
            continue
        content = _digest(conversation)
        if content in before:
            skip(TWICE, place)
            continue
        before.add(content)
        for name in unread:
            skip(f"field {name[:40]!r} of a turn", place)
        count += 1
        yield conversation
        if config.limit is not None and count >= config.limit:
            return
    if not count:
        found = ", ".join(f"{number} x {reason}" for reason, number in skips.items())
        raise DataError(
            f"no usable conversation in data.path={list(config.path)} ({found or 'no rows'}); rows "
            f"need one of the fields {', '.join(config.fields.messages)} (see data.fields)"
        )


def parse_row(
    row: dict[str, Any], fields: FieldsConfig, place: str, unread: list[str] | None = None
) -> tuple[str, Conversation | None]:
    """One row as (why it was skipped, or an empty string; the conversation or None).

    Appends to `unread` each field with content of a turn that is not read.
    """
    try:
        messages, others = _messages(first_of(row, fields.messages), fields)
        messages = _with_system(messages, first_of(row, fields.system))
        tools = parse_tools(first_of(row, fields.tools))
        name = first_of(row, fields.id)
        name = str(name) if name is not None else place
        domain, whose = row.get("domain"), row.get("conversation_id")
        said = json.dumps([name, domain, whose, messages, tools], ensure_ascii=False, default=str)
    except Unusable as why:
        return str(why), None
    except RecursionError:  # Python's json module recurses into lists and objects
        return TOO_DEEP, None
    if not is_unicode(said):
        return NOT_UNICODE, None
    if unread is not None:
        unread += others
    return "", Conversation(
        id=name,
        messages=messages,
        domain=domain,
        truncated=row.get("finish_reason") == "length",
        conversation_id=None if whose is None else str(whose),
        tools=tools,
    )


def _digest(row: Conversation) -> int:
    """The hash of all that is read of a row."""
    own = [row.id, row.messages, row.domain, row.truncated, row.conversation_id, row.tools]
    return hash(json.dumps(own, ensure_ascii=False, default=str))


def _messages(value: Any, fields: FieldsConfig) -> tuple[tuple[Message, ...], list[str]]:
    """The turns of a row, and their fields that were not read. Raises Unusable."""
    if value is None:
        raise Unusable("no messages field")
    value = from_text(value, "messages")
    if not isinstance(value, list) or not value:
        raise Unusable("empty conversation")
    if len(value) > MOST_TURNS:
        raise Unusable(f"more than {MOST_TURNS} turns")
    if all(isinstance(turn, str) for turn in value):
        return tuple({"role": "user", "content": turn} for turn in value), []
    messages, unread = [], []
    for turn in value:
        message, others = parse_turn(turn, fields)
        messages.append(message)
        unread += others
    if not any(message["role"] == "user" for message in messages):
        raise Unusable("no user turn")
    return tuple(messages), unread


def _with_system(messages: tuple[Message, ...], system: Any) -> tuple[Message, ...]:
    """`messages` after the system prompt that the row has beside them. Raises Unusable."""
    if system is None or not str(system).strip() or messages[0]["role"] in ("system", "developer"):
        return messages
    if not isinstance(system, str):
        raise Unusable("a system prompt that is no text")
    return ({"role": "system", "content": system}, *messages)


def with_distinct_ids(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    """The same ones, with ids that no two share: where the data repeats ID, the second is ID~2."""
    counts: dict[str, int] = {}  # id -> the number that was put behind it last
    for conversation in conversations:
        name = conversation.id
        while name in counts:
            counts[conversation.id] += 1
            name = f"{conversation.id}~{counts[conversation.id]}"
        counts[name] = 1
        yield replace(conversation, id=name)


def is_unicode(text: str) -> bool:
    """Whether it is text to tokenizers and files: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
