"""Thoughts of reasoning models: how templates mark them, and how answers hold them.

A *thought* is what a model writes before its answer, between two marks. Data keep it in a field of
its own (`reasoning_content`) or inside the content, often in the marks of another model.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from deepspec.data.conversations import Message
from deepspec.errors import TemplateRefusal


class Marks(NamedTuple):
    """What opens and what closes a thought."""

    open: str
    close: str


TURN_END = "<|end|>"  # closes thoughts in some templates, and turns in many others

# In the order in which they are looked for: templates that mention two kinds use the rarer one.
KNOWN = (
    Marks("<|channel|>analysis<|message|>", TURN_END),  # gpt-oss
    Marks("<|channel>thought", "<channel|>"),  # Gemma 4
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A and R7B
    Marks("<|think|>", TURN_END),  # Solar Open
    Marks("<seed:think>", "</seed:think>"),  # Seed OSS
    Marks("<think:opensource>", "</think:opensource>"),  # Hunyuan 3
    Marks("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    Marks("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
    Marks("◁think▷", "◁/think▷"),  # Kimi VL
    Marks("<think>", "</think>"),  # DeepSeek, Qwen, GLM and most others
)
# Templates read the thought of a turn under one of these names.
FIELDS = ("reasoning_content", "reasoning", "thinking", "thought")


class Thought(NamedTuple):
    """`text` between the marks, `gap` after the closing mark: both with the data's own spaces.

    `marks` are those around it in the content; None where it has a field of its own. `closed` is
    false where the answer ends inside the thought.
    """

    text: str
    gap: str
    marks: Marks | None
    closed: bool = True


def marks_in(text: str) -> Marks | None:
    """Return the first known marks of which `text`, a template or a prompt, has the opening.

    Templates that only take thoughts away name the closing one alone.
    """
    opened = (each for each in KNOWN if each.open in text)
    closed = (each for each in KNOWN if each.close in text and each.close != TURN_END)
    return next(opened, None) or next(closed, None)


def split_thought(message: Message, own: Marks | None) -> tuple[Thought | None, str]:
    """Return the thought of an assistant turn, or None, and its content without the thought.

    Marks of the template (`own`) are looked for first, then those of other models. A content that
    closes a thought which it does not open was written after a prompt that opens it, where the
    template has thoughts. Raises TemplateRefusal where content and field hold different thoughts.
    """
    content = message.get("content") or ""
    inside, answer = _split_content(content, own)
    field = next((message[name] for name in FIELDS if isinstance(message.get(name), str)), "")
    field = field.strip()
    if not field:
        return inside, answer
    if inside is not None and inside.text.strip() != field:
        raise TemplateRefusal(
            "the answer has a thought in a field of its own and another one in its content",
            "two thoughts in one answer",
        )
    return Thought(f"\n{field}\n", "\n\n", None), answer


def _split_content(content: str, own: Marks | None) -> tuple[Thought | None, str]:
    for marks in KNOWN if own is None else (own, *KNOWN):
        head, opened, rest = content.partition(marks.open)
        if opened and not head.strip():
            text, closed, answer = rest.partition(marks.close)
            if closed or own is not None:
                return _thought(text, answer, marks, bool(closed))
    for marks in () if own is None else (own, Marks("<think>", "</think>")):
        text, closed, answer = content.partition(marks.close)
        if closed and marks.close != TURN_END and marks.open not in text:
            return _thought(text, answer, marks, True)
    return None, content


def _thought(text: str, answer: str, marks: Marks, closed: bool) -> tuple[Thought, str]:
    content = answer.lstrip()
    return Thought(text, answer[: len(answer) - len(content)], marks, closed), content


def without_thought(message: Message, own: Marks | None) -> Message:
    """Return the turn with its thought in fields of its own instead of in the content."""
    thought, content = split_thought(message, own)
    if thought is None or thought.marks is None or not thought.closed:
        return message
    return with_fields(message, thought.text.strip(), content)


def with_fields(message: Message, thought: str, content: str) -> Message:
    """Return the turn with `thought` under every name that templates read."""
    named: dict[str, Any] = dict.fromkeys(FIELDS, thought)
    return {**message, **named, "content": content}


def prompt_tail(prompt: str, marks: Marks | None) -> str:
    """Return the marks that a prompt ends with and the spaces after them, else an empty string.

    They open a thought, or close one, or both.
    """
    if marks is None or not prompt.rstrip().endswith(marks):
        return ""
    start, end = re.escape(marks.open), re.escape(marks.close)
    found = re.search(rf"(?:{start}\s*{end}|{start}|{end})\s*\Z", prompt)
    assert found is not None
    return found.group()


def opens(tail: str, marks: Marks | None) -> bool:
    """Whether a prompt with this tail leaves a thought open."""
    return marks is not None and tail.rstrip().endswith(marks.open)


def skip_tail(rest: str, tail: str, marks: Marks) -> str:
    """Return `rest`, what a template renders where a prompt ends with `tail`, without that tail.

    Templates write the tail with other spaces once the turn is answered, or not at all.
    """
    start, end = re.escape(marks.open), re.escape(marks.close)
    if opens(tail, marks):
        found = re.match(rf"\s*{start}", rest)
    else:
        found = re.match(rf"(?:\s*{start})?\s*{end}", rest)
    if found is None:
        return rest
    spaces = tail[len(tail.rstrip()) :]
    return rest[found.end() :].removeprefix(spaces)
