"""A conversation on its way to the target's own answers, whoever gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from deepspec.data.conversations import (
    NOT_UNICODE,
    Conversation,
    Message,
    is_unicode,
    with_distinct_ids,
)

# What a decoder writes for bytes that are no character. At the end of an answer that hit the
# length limit it is a character cut in two, and is left away.
BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Failure:
    """Why a sample got no answer: `reason` to count by, `detail` to read.

    `own`: it lies in the conversation itself (a prompt too long), not in who should answer.
    """

    reason: str
    detail: str
    own: bool


class Dialogue:
    """System and user turns of one conversation, with an answer behind each user turn so far.

    While `open`, `messages` ends with the user turn to be answered next. Consecutive user turns
    (prompts without answers) are answered one by one.
    """

    def __init__(
        self, sample_id: str, conversation: Conversation, conversation_id: str | None
    ) -> None:
        self.id = sample_id
        self.prompts = tuple(m["content"] for m in conversation.messages if m["role"] == "user")
        self.messages: list[Message] = []
        self.open = True
        self.failure: Failure | None = None
        self.tokens = 0
        self._domain = conversation.domain
        self._conversation_id = conversation_id
        self._truncated = self._altered = False
        self._answered = 0
        self._turns = _turns(conversation.messages)
        self.messages += next(self._turns)

    @property
    def turn(self) -> str:
        """A name of the open turn that no other turn has; its randomness is seeded by it."""
        return f"{self.id}/{self._answered}"

    def answer(self, text: str, tokens: int, *, truncated: bool, altered: bool = False) -> None:
        """Take the target's answer (`tokens` long, end of turn included) to the open turn.

        `truncated`: it hit the length limit. That ends the conversation: what follows would answer
        a broken turn. `altered`: the template and tokenizer give other token ids for it than the
        target sampled.
        """
        self.tokens += tokens
        if not text.strip():
            self.give_up("empty answer", f"{tokens} tokens, none of them text")
            return
        if not is_unicode(text):  # a server's JSON may spell what no tokenizer writes
            self.give_up(NOT_UNICODE, ascii(text)[:300])
            return
        self.messages.append({"role": "assistant", "content": text})
        self._answered += 1
        self._truncated, self._altered = truncated, self._altered or altered
        following = None if truncated else next(self._turns, None)
        self.messages += following or []
        self.open = following is not None

    def give_up(self, reason: str, detail: str, *, own: bool = True) -> None:
        """The open turn gets no answer.

        Where the conversation itself is to blame, trying again will not help: answers to earlier
        turns are kept, and it ends behind the last of them. Else the whole sample has failed.
        """
        self.open = False
        if own and self._answered:
            while self.messages[-1]["role"] != "assistant":
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
            "messages": self.messages,
            "finish_reason": "length" if self._truncated else "stop",
            **({"altered": True} if self._altered else {}),
        }


def make_dialogues(
    conversations: Iterable[Conversation], samples_per_prompt: int
) -> Iterator[Dialogue]:
    """`samples_per_prompt` dialogues a conversation, with ids that no two share.

    Several samples of conversation ID are ID#0, ID#1, ...
    """
    several = samples_per_prompt > 1
    for conversation in with_distinct_ids(conversations):
        name = conversation.id
        whose = conversation.conversation_id or (name if several else None)
        for index in range(samples_per_prompt):
            yield Dialogue(f"{name}#{index}" if several else name, conversation, whose)


def _turns(messages: Iterable[Message]) -> Iterator[list[Message]]:
    """What is said before each answer: up to and with the next user turn; old answers dropped."""
    turn: list[Message] = []
    for message in messages:
        if message["role"] != "assistant":
            turn.append(message)
        if message["role"] == "user":
            yield turn
            turn = []
