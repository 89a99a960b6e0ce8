"""Conversations from files, folders, globs or the hub, in any of three shapes.

`messages` (role, content), ShareGPT `conversations` (from, value), or `turns` (the user's side as
strings: prompts without answers). Which row fields hold what is config, not code. Every row that
is skipped is counted by reason.
"""

from __future__ import annotations

import difflib
import glob
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from deepspec.config.schema import DataConfig, FieldsConfig
from deepspec.errors import DataError

# One turn: `role` and `content` (text), and where it has them `reasoning_content` (the thought
# before the answer), `tool_calls`, `name` and `tool_call_id`, in the form that templates read. Two
# keys are ours and never reach a template: `token_ids` (the ids that the target sampled for this
# answer, with the stop token unless a length limit cut it), `supervised` (false: context only).
Message = dict[str, Any]
SkipCounts = Counter[str]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
NOT_UNICODE = "half a surrogate pair"  # why a row is left out, or an answer


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


def load_conversations(config: DataConfig, skips: SkipCounts) -> Iterator[Conversation]:
    """All usable conversations of `config.path`, in order; skipped rows counted in `skips`.

    Raises DataError for a missing path, a malformed line (file and line named), and a source
    without one usable row.
    """
    count = 0
    rows = (pair for path in config.path for pair in _rows(path, config))
    for place, row in rows:
        reason, conversation = parse_row(row, config.fields, place)
        if conversation is None:
            skips[reason] += 1
            continue
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
    row: dict[str, Any], fields: FieldsConfig, place: str
) -> tuple[str, Conversation | None]:
    """One row as (why it was skipped, or an empty string; the conversation or None)."""
    value = _first(row, fields.messages)
    if value is None:
        return "no messages field", None
    if not isinstance(value, list) or not value:
        return "empty conversation", None
    if all(isinstance(turn, str) for turn in value):
        messages = [{"role": "user", "content": turn} for turn in value]
    else:
        messages = []
        for turn in value:
            role = ROLES.get(str(_first(turn, fields.role))) if isinstance(turn, dict) else None
            content = _first(turn, fields.content) if isinstance(turn, dict) else None
            if role is None or not isinstance(content, str):
                return "unreadable turn", None
            messages.append({"role": role, "content": content})
    if not any(message["role"] == "user" for message in messages):
        return "no user turn", None
    if any(not m["content"].strip() for m in messages if m["role"] == "assistant"):
        return "empty answer", None
    name = _first(row, fields.id)
    name = str(name) if name is not None else place
    domain, whose = row.get("domain"), row.get("conversation_id")
    texts = (name, str(domain), str(whose), *(message["content"] for message in messages))
    if not all(map(is_unicode, texts)):
        return NOT_UNICODE, None
    return "", Conversation(
        id=name,
        messages=tuple(messages),
        domain=domain,
        truncated=row.get("finish_reason") == "length",
        conversation_id=None if whose is None else str(whose),
    )


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


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of each non-empty line. Raises DataError naming file and line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                # some editors put a byte order mark in front of the first line
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: expected a JSON object, found {row!r:.60}"
                    + ("; one object a line, not one array" if isinstance(row, list) else "")
                )
            yield number, row


def _first(row: dict[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _rows(path: str, config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    files = local_files(path)
    if files is None:
        yield from _hub_rows(path, config)
        return
    for file in files:
        for number, row in read_jsonl(file):
            yield f"{file.stem}-{number}", row


def local_files(path: str) -> list[Path] | None:
    """The JSONL files behind a file, folder or glob; None when `path` can only be a hub name.

    Raises DataError when it looks like a path and there is nothing.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = sorted(place.glob("**/*.jsonl"))
        if not files:
            raise DataError(f"data.path={path} is a folder without any .jsonl file")
        return files
    if any(mark in path for mark in "*?["):
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True))
        if not files:
            raise DataError(f"data.path={path} matches no file")
        return files
    if place.suffix or path.startswith((".", "/", "~")) or path.count("/") != 1:
        siblings = [str(p) for p in place.parent.glob("*")] if place.parent.is_dir() else []
        near = difflib.get_close_matches(str(place), siblings, n=1)
        raise DataError(
            f"data.path={path} does not exist"
            + (
                f"; did you mean {near[0]}?"
                if near
                else "; give a .jsonl file, a folder, a glob, or"
            )
            + ("" if near else " a hub data set as owner/name")
        )
    return None


def _hub_rows(name: str, config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()  # progress is shown once, by us
    try:
        rows = load_dataset(name, config.subset, split=config.split, streaming=config.streaming)
    except Exception as error:  # the hub client raises many unrelated kinds
        raise DataError(
            f"data.path={name}: neither a local file nor a data set that the hub gave "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); check "
            "the name, data.split, data.subset and the network, or give a local .jsonl file"
        ) from None
    for index, row in enumerate(islice(rows, None)):
        yield f"{name}-{index}", dict(row)
