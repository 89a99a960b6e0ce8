"""A conversation on its way to the target's own answers, whoever gives them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepspec.data.conversations import (
    NOT_UNICODE,
    Conversation,
    is_unicode,
    with_distinct_ids,
)
from deepspec.data.turns import Message

# What a decoder writes for bytes that are no character. At the end of an answer that hit the
# length limit it is a character cut in two, and is left out of the text (not of the ids).
BROKEN = "\N{REPLACEMENT CHARACTER}"
GIVEN = ("user", "tool")  # roles that an answer may be expected from


@dataclass(frozen=True)
class Failure:
    """Why a sample got no answer: `reason` to count by, `detail` to read.

    `own`: it lies in the conversation itself (a prompt too long), not in who should answer.
    """

    reason: str
    detail: str
    own: bool


class Dialogue:
    """The turns of one conversation that the data give, and the target's answers so far.

    The target answers each user turn (consecutive ones, which are prompts without answers, one by
    one) and each tool's result. Two kinds of assistant turn stay as the data have them, marked
    `supervised: false`: one that a tool's result follows, because the result would not fit another
    call; and one before the first user turn, because it answers nothing. All other assistant turns
    of the data are dropped.

    While `open`, `messages` ends with the turn to be answered next.
    """

    def __init__(
        self, sample_id: str, conversation: Conversation, conversation_id: str | None
    ) -> None:
        self.id = sample_id
        self.prompts = prompts_of(conversation.messages)
        self.tools = conversation.tools
        self.messages: list[Message] = []
        self.open = True
        self.failure: Failure | None = None
        self.tokens = 0
        self._domain = conversation.domain
        self._conversation_id = conversation_id
        self._finish_reason = "stop"
        self._answered = 0
        self._turns = _turns(conversation.messages)
        self.messages += next(self._turns)

    @property
    def turn(self) -> str:
        """A name of the open turn that no other turn has; its randomness is seeded by it."""
        return f"{self.id}/{self._answered}"

    def answer(self, message: Message, tokens: int, *, truncated: bool) -> None:
        """Take the target's answer (`tokens` long, end of turn included) to the open turn.

        `message`: `content`, with `token_ids` where they are known, and what a server parsed out of
        the text. `truncated`: a length limit cut it. That ends the conversation, because what
        follows would answer a broken turn. So does a call of one of the conversation's tools,
        because the data have no result for it.
        """
        self.tokens += tokens
        text = message["content"] + message.get("reasoning_content", "")
        if not text.strip() and not message.get("tool_calls"):
            self.give_up("empty answer", f"{tokens} tokens, none of them text")
            return
        if not is_unicode(text):  # a server's JSON may spell what no tokenizer writes
            self.give_up(NOT_UNICODE, ascii(text)[:300])
            return
        self.messages.append({"role": "assistant", **message})
        self._answered += 1
        following = next(self._turns, None)
        if truncated:
            self._finish_reason = "length"
        elif following is not None and self._calls_a_tool(message):
            self._finish_reason = "tool_calls"
        self.open = following is not None and self._finish_reason == "stop"
        if self.open:
            self.messages += following or []

    def _calls_a_tool(self, message: Message) -> bool:
        """Whether `message` is a call, as far as its text shows it in the formats of templates.

        They write the tool's name after a quotation mark, a tag or a separator, or before a
        bracket: {"name": "add"}, <function=add>, functions.add:0, add(a=1), call:add{a:1}.
        """
        names = (_name_of(tool) for tool in self.tools)
        patterns = (
            rf"[\"'=>.:|\N{{FULLWIDTH VERTICAL LINE}}]{name}\b|\b{name}[({{]"
            for name in map(re.escape, filter(None, names))
        )
        called = (re.search(pattern, message["content"]) for pattern in patterns)
        return bool(message.get("tool_calls")) or any(called)

    def give_up(self, reason: str, detail: str, *, own: bool = True) -> None:
        """The open turn gets no answer.

        Where the conversation itself is to blame, trying again will not help: answers to earlier
        turns are kept, and it ends behind the last of them. Else the whole sample has failed.
        """
        self.open = False
        if own and self._answered:
            while not is_answer(self.messages[-1]):
                self.messages.pop()
        else:
            self.failure = Failure(reason, detail, own)

    def row(self) -> dict[str, Any]:
        """The finished sample as a row that `deepspec.data.conversations` reads."""
        assert not self.open
        assert self.failure is None
        return {
            "id": self.id,
            **({"domain": self._domain} if self._domain is not None else {}),
            **({"conversation_id": whose} if (whose := self._conversation_id) else {}),
            **({"tools": self.tools} if self.tools else {}),
            "messages": self.messages,
            "finish_reason": self._finish_reason,
        }


def prompts_of(messages: Iterable[Message]) -> tuple[str, ...]:
    """The texts that the target answers: those of users and tools."""
    return tuple(message["content"] for message in messages if message["role"] in GIVEN)


def is_answer(message: Message) -> bool:
    """Whether `message` is the target's own turn, not one that was kept from the data."""
    return message["role"] == "assistant" and message.get("supervised", True)


def sample_ids(name: str, samples_per_prompt: int) -> list[str]:
    """The ids of the samples of conversation `name`: ID#0, ID#1, ... where there are several."""
    several = samples_per_prompt > 1
    return [f"{name}#{index}" for index in range(samples_per_prompt)] if several else [name]


def make_dialogues(
    conversations: Iterable[Conversation], samples_per_prompt: int
) -> Iterator[Dialogue]:
    """`samples_per_prompt` dialogues per conversation, with ids that no two share."""
    for conversation in with_distinct_ids(conversations):
        names = sample_ids(conversation.id, samples_per_prompt)
        whose = conversation.conversation_id or (conversation.id if len(names) > 1 else None)
        for name in names:
            yield Dialogue(name, conversation, whose)


def _turns(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """What comes before each answer of the target; the data's own answers dropped."""
    turn: list[Message] = []
    begun = False  # whether a user has spoken
    for index, message in enumerate(messages):
        begun = begun or message["role"] == "user"
        if message["role"] != "assistant":
            turn.append(message)
        elif not begun or _has_result(messages, index):
            kept = {key: value for key, value in message.items() if key != "token_ids"}
            turn.append({**kept, "supervised": False})
        if begun and message["role"] in GIVEN and not _continues(messages, index):
            yield turn
            turn = []


def _has_result(messages: Sequence[Message], index: int) -> bool:
    """Whether a tool's result follows the turn at `index`."""
    return index + 1 < len(messages) and messages[index + 1]["role"] == "tool"


def _continues(messages: Sequence[Message], index: int) -> bool:
    """Whether another result, or a call that is kept, comes next instead of an answer."""
    following = range(index + 1, len(messages))
    place = next((i for i in following if messages[i]["role"] in ("user", "assistant", "tool")), -1)
    if place < 0 or messages[place]["role"] == "user":
        return False
    return messages[place]["role"] == "tool" or _has_result(messages, place)


def _name_of(tool: dict[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name") or "") if isinstance(function, dict) else ""
