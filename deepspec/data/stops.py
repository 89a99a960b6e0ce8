"""Where the target's generation stops after an answer, and what the template tells of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from deepspec.data.conversations import Message
from deepspec.errors import TemplateRefusal

# Placeholders: words that no template treats in a special way and no data holds.
QUESTION, THOUGHT, ANSWER, NEXT = "Zquestionz", "Zthoughtz", "Zanswerz", "Znextz"
ASKED: list[Message] = [{"role": "user", "content": QUESTION}]
STOP_INSIDE = "an answer holds a stop token"  # why an answer is left out

Tools = Sequence[Mapping[str, Any]]
# (messages, tools, whether to add the generation prompt) -> text. Raises TemplateRefusal.
Render = Callable[[Sequence[Message], Tools, bool], str]


class Stop(NamedTuple):
    """`text` between an answer and the `mark` at which generation stops."""

    text: str
    mark: str


class Stops:
    """The stops of a target: `known` ones, as text, else what ends a turn in its template.

    `special`: all special tokens of the tokenizer, as text.
    """

    def __init__(self, render: Render, known: Collection[str], special: Collection[str]) -> None:
        self._render = render
        self._known = frozenset(filter(None, known))  # ids beyond the tokenizer have no text
        self._special = frozenset(special) | self._known

    def require_none(self, text: str) -> None:
        """Raises TemplateRefusal where generation would stop inside `text`."""
        if (inside := next((stop for stop in self._marks if stop in text), None)) is not None:
            raise TemplateRefusal(
                f"the answer holds {inside}, at which the target's generation stops",
                STOP_INSIDE,
            )

    def after(self, rendered: str) -> Stop | None:
        """Return the first stop in `rendered`, what the template puts after an answer; where there
        is none, what it puts before the next turn. None where the template has neither."""
        return self._first(self._in(rendered)) or self._end

    def after_call(self, rendered: str, next_turn: str) -> Stop | None:
        """Return the stop after a tool call: `rendered` follows the call where it comes last,
        `next_turn` where its result follows, which is what the target sees."""
        before_result = self._in(next_turn)
        known = [each for each in before_result if each.mark in self._known]
        return self._first(known or self._in(rendered) or before_result[:1])

    @property
    def _marks(self) -> frozenset[str]:
        return self._known or frozenset([self._end.mark] if self._end else [])

    @cached_property
    def _end(self) -> Stop | None:
        """What ends a turn, by the rendering of one answer alone, else before a next question.

        Cohere's templates close the answer with a special token of its own before the turn's end:
        where an answer is opened by a special token, the first one after it is its counterpart. So
        it is only where the one after that also stands before a next question (Phi 4 mini ends the
        conversation with one).
        """
        answered: list[Message] = [*ASKED, {"role": "assistant", "content": ANSWER}]
        (before, alone), (_, followed) = (
            self._around_answer([*answered, *more])
            for more in ((), [{"role": "user", "content": NEXT}])
        )
        marks = alone or followed
        known = [each for each in marks if each.mark in self._known]
        paired = before.endswith(tuple(self._special)) and alone[1:2] == followed[1:2]
        return next(iter(known or (alone[1:] if paired else ()) or marks), None)

    def _around_answer(self, messages: Sequence[Message]) -> tuple[str, list[Stop]]:
        """What the template puts in front of the ANSWER in `messages`, and its special tokens up to
        NEXT or the end."""
        try:
            before, _, after = self._render(messages, (), False).partition(ANSWER)
        except TemplateRefusal:
            return "", []
        return before, self._in(after.partition(NEXT)[0])

    def _first(self, found: Sequence[Stop]) -> Stop | None:
        """The first known stop in `found`, else what ends turns, else the last special token."""
        for wanted in (self._marks, {self._end.mark if self._end else None}):
            for each in found:
                if each.mark in wanted:
                    return each
        return found[-1] if found else None

    def _in(self, text: str) -> list[Stop]:
        """Every special token in `text`, in order, with what stands in front of it."""
        return [Stop(text[: each.start()], each.group()) for each in self._pattern.finditer(text)]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest = sorted(filter(None, self._special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest)) or r"(?!)")
