"""What the target emits for an answer of the data: the one rule of the loss mask.

Supervised is what the target emits after the rendered prompt: the thought where it writes one, the
answer, and the first token at which its generation stops. Of an answer that the data brings, the
template shows the form: the turn is rendered with the real words and with placeholders, and the
two must agree around them. What cannot be brought to the rule is refused with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import NamedTuple

from deepspec.data import tool_calls
from deepspec.data.stops import ANSWER, ASKED, NEXT, QUESTION, THOUGHT, Render, Stops, Tools
from deepspec.data.thoughts import (
    FIELDS,
    Marks,
    Thought,
    marks_in,
    opens,
    prompt_tail,
    skip_tail,
    split_thought,
    with_fields,
    without_thought,
)
from deepspec.data.turns import Message, squeezed
from deepspec.errors import TemplateRefusal

EMPTY = "an empty answer"  # why an answer is left out
Build = Callable[[str, str], Message]  # (thought, content) -> the turn


class Frame(NamedTuple):
    """An answer as the template renders it: `body` holds thought and content, `before` of it
    stands in front of the first of them; `after` follows the content."""

    before: str
    body: str
    after: str


@dataclass(frozen=True)
class Turn:
    """An assistant turn to be brought to what the target emits, and what it answers."""

    history: Sequence[Message]
    message: Message
    tools: Tools
    prompt: str


class Emission:
    """Brings answers to the text that the target emits after the prompt.

    `stops`, `special`: see `Stops`. `template`: the source of the chat template. `thinks`: None
    where the template has no switch for thoughts, else whether it is on.
    """

    def __init__(
        self,
        render: Render,
        template: str,
        stops: Collection[str],
        special: Collection[str],
        thinks: Callable[[], bool | None],
    ) -> None:
        self._render = render
        self._template = template
        self._stops = Stops(render, stops, special)
        self._thinks = thinks

    def text(self, turn: Turn, truncated: bool) -> tuple[str, str | None]:
        """Return (the answer's text, the mark that ends it; None where it is cut).

        Raises TemplateRefusal with the reason.
        """
        thought, content = split_thought(turn.message, self.marks)
        tail = prompt_tail(turn.prompt, self.marks)
        if truncated and not content.strip() and (thought is None or not thought.text.strip()):
            raise TemplateRefusal("a cut answer without a word", EMPTY)
        if thought is not None and self._thinks_not(tail):
            if thought.text.strip() or not thought.closed:
                raise TemplateRefusal(
                    "the answer has a thought, but thinking is off: set data.thinking=true, or "
                    "take the thoughts out of the data",
                    "a thought in the answer, but data.thinking is off",
                )
            thought = None  # an empty one, which the prompt has already
        if thought is not None and not thought.closed:
            if not truncated:
                raise TemplateRefusal(
                    "the answer ends inside its thought; mark it as cut by a length limit, or take "
                    "it out of the data",
                    "a thought that is not closed",
                )
            return self._unclosed(thought, tail), None
        if truncated and thought is None and opens(tail, self.marks):
            return content, None  # the whole answer is a thought that was cut
        frame = self._frame(turn, thought, content, tail)
        self._stops.require_none(frame.body)
        if truncated:
            return frame.body, None
        return self._ended(turn, frame)

    def normal(self, messages: Sequence[Message]) -> list[Message]:
        """Return `messages` with thoughts where the template expects them.

        A thought inside the content goes into fields of its own where the template would show it
        as a part of the answer, or in the marks of another model.
        """
        if self.marks is None or self._takes_raw:
            return list(messages)
        return [
            without_thought(message, self.marks) if message["role"] == "assistant" else message
            for message in messages
        ]

    @cached_property
    def marks(self) -> Marks | None:
        """The marks of the template's thoughts, by its source or the end of its prompt."""
        return marks_in(self._template) or marks_in(self._question or "")

    @cached_property
    def _question(self) -> str | None:
        try:
            return self._render(ASKED, (), True)
        except TemplateRefusal:
            return None

    @property
    def always_thinks(self) -> bool:
        """Whether the prompt of a plain question opens a thought."""
        return opens(prompt_tail(self._question or "", self.marks), self.marks)

    @cached_property
    def _takes_raw(self) -> bool:
        assert self.marks is not None
        content = f"{self.marks.open}\n{THOUGHT}\n{self.marks.close}\n\n{ANSWER}"
        try:
            shown = self._render([*ASKED, {"role": "assistant", "content": content}], (), False)
        except TemplateRefusal:
            return False
        before, thought, rest = shown.rpartition(THOUGHT)
        closed_before = self.marks.close in before.rpartition(QUESTION)[2]
        return bool(thought) and not closed_before and self.marks.close in rest

    def _thinks_not(self, tail: str) -> bool:
        """Whether the prompt with this tail is answered without a thought."""
        return (bool(tail) and not opens(tail, self.marks)) or self._thinks() is False

    def _unclosed(self, thought: Thought, tail: str) -> str:
        """A thought that was cut by a length limit."""
        assert self.marks is not None  # else it is no thought
        whole = self.marks.open + thought.text
        return _without_tail(whole, tail) if opens(tail, self.marks) else whole

    def _frame(self, turn: Turn, thought: Thought | None, content: str, tail: str) -> Frame:
        """The first form of the turn that the template renders rightly."""
        if thought is None:
            found = self._rendered(turn, lambda _, text: _plain(turn.message, text), "", content)
            if found is None:
                raise self._dropped(turn, "the answer")
            if opens(tail, self.marks) and not self._closes(found.before + found.after):
                raise TemplateRefusal(
                    "the prompt opens a thought and the answer has none; set data.thinking=false "
                    "where the template has that switch, or let the target answer",
                    "no thought in the answer, but the prompt opens one",
                )
            return found
        text = thought.text.strip()
        for build, said in self._forms(turn, thought) if text else ():
            found = self._rendered(turn, build, said, content)
            if found is not None and not self._repeats(found, tail):
                return found
        return self._assembled(turn, thought, content, tail)

    def _forms(self, turn: Turn, thought: Thought) -> Iterator[tuple[Build, str]]:
        """(turn of a thought and a content, the thought) in each form a template may expect."""
        message, gap = turn.message, thought.gap

        def inside(marks: Marks) -> Build:
            return lambda text, said: _plain(message, f"{marks.open}{text}{marks.close}{gap}{said}")

        if thought.marks is not None and self.marks in (None, thought.marks):
            yield inside(thought.marks), thought.text
        yield lambda text, said: with_fields(message, text, said), thought.text.strip()
        if self.marks is not None:
            yield inside(self.marks), thought.text

    def _rendered(self, turn: Turn, build: Build, thought: str, content: str) -> Frame | None:
        """The turn as the template renders it after the prompt.

        None where that is not the thought and the content, once each, or the template refuses it.
        """
        answer = ANSWER if content.strip() else ""
        try:
            shown = self._continued(turn, build(THOUGHT if thought else "", answer))
            if shown is None:
                turn = self._alone(turn)
                shown = self._continued(turn, build(THOUGHT if thought else "", answer))
            real = self._continued(turn, build(thought, content))
        except TemplateRefusal:
            if thought:
                return None
            raise
        if shown is None or real is None:
            return None
        pieces = [piece for piece in (THOUGHT if thought else "", answer) if piece]
        if any(shown.count(piece) != 1 for piece in pieces):
            return None
        first = shown.index(pieces[0]) if pieces else 0
        last = shown.index(pieces[-1]) + len(pieces[-1]) if pieces else 0
        before, middle, after = shown[:first], shown[first:last], shown[last:]
        between = middle.removeprefix(THOUGHT).removesuffix(ANSWER)
        if thought and answer and self.marks and not self._closes(between):
            return None
        if not (real.startswith(before) and real.endswith(after)):
            return None
        body = real[: len(real) - len(after)]
        if squeezed(body[len(before) :]) != squeezed(thought + between + content):
            return None
        return Frame(before, body, after)

    def _alone(self, turn: Turn) -> Turn:
        """The turn as the answer to one plain question, where its prompt ends like that one's.

        Some templates (Mistral's before 2025) put the system prompt into the last question only,
        and so render the prompt differently once it is answered.
        """
        question = self._question or ""
        if turn.prompt.endswith(question.rpartition(QUESTION)[2]):
            return Turn(ASKED, turn.message, (), question)
        return turn

    def _continued(self, turn: Turn, *messages: Message) -> str | None:
        """What stands after the prompt once `messages` follow; None where that is not clear."""
        text = self._render([*turn.history, *messages], turn.tools, False)
        if text.startswith(turn.prompt):
            return text[len(turn.prompt) :]
        tail = prompt_tail(turn.prompt, self.marks)
        base = turn.prompt[: len(turn.prompt) - len(tail)]
        if text.startswith(base):
            rest = text[len(base) :]
        else:  # the template renders what came before otherwise once it is answered
            opening = self._opening(turn)[: -len(tail) or None]
            _, found, rest = text.rpartition(opening) if opening.strip() else ("", "", "")
            if not found:
                return None
        return skip_tail(rest, tail, self.marks) if tail and self.marks else rest

    def _opening(self, turn: Turn) -> str:
        """The generation prompt alone."""
        given = self._render(turn.history, turn.tools, False)
        return turn.prompt[len(given) :] if turn.prompt.startswith(given) else ""

    def _repeats(self, frame: Frame, tail: str) -> bool:
        """Whether a thought was opened or closed before the thought of `frame` begins."""
        if self.marks is None:
            return False
        again = opens(tail, self.marks) and self.marks.open in frame.before
        return again or self._closes(frame.before)

    def _closes(self, text: str) -> bool:
        return self.marks is not None and self.marks.close in text

    def _assembled(self, turn: Turn, thought: Thought, content: str, tail: str) -> Frame:
        """The answer without its thought as rendered, and the thought where the target writes it:
        after the opening in the prompt, between the marks that the template leaves empty, or in
        front."""
        marks = self.marks
        if marks is None:
            raise TemplateRefusal(
                "the chat template has no place for the thought of the answer; put it into the "
                "content, or take it out of the data",
                "the template has no place for thoughts",
            )
        plain = {name: value for name, value in turn.message.items() if name not in FIELDS}
        found = self._rendered(turn, lambda _, said: _plain(plain, said), "", content)
        if found is None:
            raise self._dropped(turn, "the answer")
        said, text = found.body[len(found.before) :], thought.text
        slot = re.search(rf"({re.escape(marks.open)})?(\s*){re.escape(marks.close)}", found.before)
        if slot is not None:
            spaces = slot.group(2)
            if thought.marks != marks:
                half = (len(spaces) + 1) // 2
                text = spaces[:half] + text.strip() + spaces[half:]
            start = marks.open if slot.group(1) else ""
            before = found.before[: slot.start()] + start + text + marks.close
            before += found.before[slot.end() :]
        else:
            before = marks.open + text + marks.close + thought.gap + found.before
            if opens(tail, marks):
                before = _without_tail(before, tail)
        return Frame("", before + said, found.after)

    def _ended(self, turn: Turn, frame: Frame) -> tuple[str, str | None]:
        """`frame` up to and including the first stop after it; what the template leaves out is
        added as it would stand before the next turn."""
        if turn.message.get("tool_calls"):
            return self._ended_call(turn, frame)
        end = self._stops.after(frame.after)
        if end is None:
            return frame.body, None  # how the target ends is not known: nothing is taught of it
        return frame.body + end.text + end.mark, end.mark

    def _ended_call(self, turn: Turn, frame: Frame) -> tuple[str, str | None]:
        """The same of a turn with tool calls, which are followed by their results."""
        start = self._calls_end(turn, frame)
        if start is None:
            raise self._dropped(turn, "the tool calls")
        calls = frame.after[:start]
        self._stops.require_none(calls)
        result = {"role": "tool", "content": NEXT, "name": tool_calls.names(turn.message)[-1]}
        last = turn.message["tool_calls"][-1]
        if last.get("id"):
            result["tool_call_id"] = last["id"]
        try:
            rest = (self._continued(turn, turn.message, result) or "").rpartition(NEXT)[0]
        except TemplateRefusal:
            rest = ""
        begun = frame.body + calls
        _, found, next_turn = rest.rpartition(calls) if calls else ("", "", "")
        end = self._stops.after_call(frame.after[start:], next_turn if found else "")
        if end is None:
            return begun, None
        return begun + end.text + end.mark, end.mark

    def _calls_end(self, turn: Turn, frame: Frame) -> int | None:
        """Where in `frame.after` the calls end: what follows is the same after another last call.

        None where the template does not show all calls.
        """
        if not tool_calls.are_in(frame.before + frame.after, turn.message):
            return None
        for asked in (turn, self._alone(turn)):
            shown = self._continued(asked, turn.message)
            other = self._continued(asked, tool_calls.with_other_last(turn.message))
            if shown is not None and other is not None:
                ends = zip(reversed(shown), reversed(other), strict=False)
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
                return None if shown == other else max(0, len(frame.after) - same)
        return None

    def _dropped(self, turn: Turn, what: str) -> TemplateRefusal:
        if turn.message.get("tool_calls") and (turn.message.get("content") or "").strip():
            return TemplateRefusal(
                "the chat template does not show both the content and the tool calls of one turn",
                "content beside tool calls is not shown by the template",
            )
        return TemplateRefusal(
            f"the chat template does not show {what} as it stands after the prompt",
            "an answer is not shown by the template",
        )


def _plain(message: Message, content: str) -> Message:
    return {**message, "content": content}


def _without_tail(text: str, tail: str) -> str:
    """`text`, which begins with an opened thought, without what the prompt's `tail` has of it."""
    if text.startswith(tail):
        return text[len(tail) :]
    return text[len(tail.rstrip()) :].lstrip()
