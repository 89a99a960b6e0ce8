"""Tokens and loss mask of conversations, through the tokenizer's own chat template.

Supervised is exactly what the target emits when it answers the rendered prompt; `emission.py` holds
that rule for answers of the data. Answers that the target sampled are taken as the ids they are.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from typing import Any, NoReturn, Self

import torch

from deepspec.config.schema import DataConfig
from deepspec.data import tool_calls
from deepspec.data.conversations import Conversation, Message, SkipCounts, counter_of
from deepspec.data.emission import EMPTY, Emission, Turn
from deepspec.data.rendering import LimitError, Renderer, text_of
from deepspec.data.special_tokens import media_tokens, special_tokens
from deepspec.data.stops import ASKED, STOP_INSIDE, Tools
from deepspec.data.turns import OURS, squeezed
from deepspec.errors import TemplateError, TemplateRefusal
from deepspec.records import Sample

TODAY = datetime.date.fromisoformat(DataConfig().date)
OVERRUNS = 10  # conversations at which a template may overrun its limits, each of them seconds
SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch for thoughts


class ChatEncoder:
    """Renders conversations for one tokenizer.

    `thinking` is passed to the template as `enable_thinking` and `thinking`, `options` beside it;
    `system_prompt` is put in front of conversations that bring none; samples are cut at
    `max_length` tokens. `stop_token_ids`: where the target's generation stops; without any, the
    template tells what ends a turn. `today`: the date that templates see.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        thinking: bool = False,
        system_prompt: str | None = None,
        stop_token_ids: Iterable[int] = (),
        options: Mapping[str, Any] | None = None,
        today: datetime.date = TODAY,
    ) -> None:
        if not tokenizer.chat_template:
            raise TemplateError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; put a "
                "chat_template.jinja beside it, or take the tokenizer of the instruct model"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._system = system_prompt
        self._thinking = thinking
        self._options = {
            **dict.fromkeys(SWITCHES, thinking),
            **(options or {}),
        }
        self._chosen = tuple(options or ())
        self._renderer = _renderer(tokenizer, str(tokenizer.chat_template), today)
        self._overruns = 0
        self._stop_ids = frozenset(stop_token_ids)
        stops = [tokenizer.decode([each]) for each in self._stop_ids]
        self._media = frozenset(tokenizer.convert_tokens_to_ids(media_tokens(tokenizer)))
        self._emission = Emission(
            self._render, self._source, stops, special_tokens(tokenizer), self._thinks
        )
        self._require_end()
        self._require_effect()

    @classmethod
    def of(cls, data: DataConfig, tokenizer: Any, stop_token_ids: Iterable[int] = ()) -> Self:
        """Return the encoder that `data` describes; see the class for `stop_token_ids`."""
        return cls(
            tokenizer,
            data.max_length,
            data.thinking,
            data.system_prompt,
            stop_token_ids,
            data.template_options,
            datetime.date.fromisoformat(data.date),
        )

    def encode(self, conversation: Conversation, skips: SkipCounts | None = None) -> list[Sample]:
        """Return token ids and loss masks; nothing where `max_length` cuts every answer away.

        Supervised is every assistant turn that answers something and is not marked
        `supervised: false`. Answers share a sample as far as the prompt of one continues the sample
        of the one before; templates that render earlier answers differently (Qwen3 drops their
        thoughts) give a sample per answer. What is left out is counted in `skips`: answers that
        cannot be brought to what the target emits, or lie after `max_length`. Without `skips` the
        former raise TemplateRefusal.
        """
        found: list[tuple[list[int], list[bool]]] = []
        refusals: list[TemplateRefusal] = []
        for prompt, answer in self._answers(conversation, refusals):
            if found and prompt[: len(found[-1][0])] == found[-1][0]:
                ids, mask = found.pop()
                mask = mask + [False] * (len(prompt) - len(ids)) + [True] * len(answer)
            else:
                mask = [False] * len(prompt) + [True] * len(answer)
            found.append((prompt + answer, mask))
        if refusals and skips is None:
            raise refusals[0]
        skips = SkipCounts() if skips is None else skips
        skips.update(refusal.reason for refusal in refusals)
        samples = self._samples(conversation, found)
        if cut_away := len(found) - len(samples):
            skips["answers after data.max_length"] += cut_away
        return samples

    def prompt(self, messages: Iterable[Message], tools: Tools = ()) -> list[int]:
        """Token ids of `messages` with the generation prompt, ready for the target to answer."""
        return self._tokens(self._prompt(self._prepared(messages), tools))

    def _samples(
        self, conversation: Conversation, found: Sequence[tuple[list[int], list[bool]]]
    ) -> list[Sample]:
        several = len(found) > 1
        whose = conversation.conversation_id or (conversation.id if several else None)
        samples = []
        for number, (ids, mask) in enumerate(found, start=1):
            ids, mask = ids[: self.max_length], mask[: self.max_length]
            if any(mask):
                name = f"{conversation.id}#{number}" if several else conversation.id
                tokens, supervised = torch.tensor(ids), torch.tensor(mask, dtype=torch.bool)
                samples.append(Sample(tokens, supervised, name, whose))
        return samples

    def _answers(
        self, conversation: Conversation, refusals: list[TemplateRefusal]
    ) -> Iterable[tuple[list[int], list[int]]]:
        """(prompt, answer) in token ids of each supervised turn; the others go to `refusals`."""
        tools = conversation.tools
        try:
            messages = self._prepared(conversation.messages)
        except TemplateRefusal as refusal:
            refusals.append(TemplateRefusal(f"sample {conversation.id}: {refusal}", refusal.reason))
            return
        raw = [*conversation.messages]
        raw = [*itertools.repeat({}, len(messages) - len(raw)), *raw]  # a system prompt of ours
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or raw[index].get("supervised") is False:
                continue
            last = index == len(messages) - 1
            try:
                if not any(each["role"] in ("user", "tool") for each in messages[:index]):
                    raise TemplateRefusal(
                        "an assistant turn comes before any question",
                        "an assistant turn before any question",
                    )
                yield self._answer(
                    messages[:index],
                    _without_ours(raw[index]),
                    tools,
                    raw[index].get("token_ids"),
                    conversation.truncated and last,
                )
            except TemplateRefusal as refusal:
                name = f"sample {conversation.id}, turn {index + 1}"
                refusals.append(TemplateRefusal(f"{name}: {refusal}", refusal.reason))

    def _answer(
        self,
        history: list[Message],
        message: Message,
        tools: Tools,
        sampled: list[int] | None,
        truncated: bool,
    ) -> tuple[list[int], list[int]]:
        prompt = self._prompt(history, tools)
        given = self._tokens(prompt)
        if sampled is None:
            text, mark = self._emission.text(Turn(history, message, tools, prompt), truncated)
            answer = self._continuation(prompt, given, text)
            if mark is not None and self.tokenizer.decode(answer[-1:]).strip() != mark.strip():
                raise TemplateRefusal(
                    f"{mark} ends the answer, but the tokenizer has no token of that name",
                    "the end of a turn is not one token",
                )
        else:
            answer = list(sampled)
        if not answer:
            raise TemplateRefusal("the answer has no token", EMPTY)
        if not self._stop_ids.isdisjoint(answer[:-1]):
            raise TemplateRefusal(
                "a token at which the target's generation stops is inside the answer", STOP_INSIDE
            )
        if sampled is not None:
            self._require_own(answer, message["content"])
        return given, answer

    def _require_own(self, sampled: Sequence[int], content: str) -> None:
        """Raises TemplateRefusal where `sampled` ids are not those of `content` here: a target with
        another tokenizer wrote them."""
        spelt = []
        if all(0 <= each < len(self.tokenizer) for each in sampled):
            # servers leave special tokens out of the text
            spelt = [self.tokenizer.decode(sampled, skip_special_tokens=s) for s in (False, True)]
        if not any(squeezed(content) in squeezed(text) for text in spelt):
            raise TemplateRefusal(
                "the token ids of the answer do not give its text: they are of a target with "
                "another tokenizer; make the answers again with this target",
                "token ids of another tokenizer",
            )

    def _continuation(self, prompt: str, given: list[int], text: str) -> list[int]:
        """Token ids of `text` after the ids `given` of `prompt`.

        Where a token of both would reach over the end of the prompt, `text` is tokenised alone.
        Tokenizers that put a space in front of every text must not put one there, so `text` then
        follows a character, which is removed again. Raises TemplateRefusal where nothing gives the
        text of both.
        """
        both = self._tokens(prompt + text)
        if both[: len(given)] == given:
            return both[len(given) :]
        right = self._text_of(both)
        for lead in ("", ".", "\n", "x"):
            before, apart = self._tokens(lead), self._tokens(lead + text)
            answer = apart[len(before) :]
            if apart[: len(before)] == before and self._text_of(given + answer) == right:
                return answer
        raise TemplateRefusal(
            "the tokenizer changes the end of the prompt when the answer follows",
            "the tokenizer cannot split prompt and answer",
        )

    def _text_of(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _prepared(self, messages: Iterable[Message]) -> list[Message]:
        """`messages` as templates see them, with the system prompt of the config.

        Raises TemplateRefusal where one is not of the form that templates read.
        """
        prepared = [_without_ours(message) for message in messages]
        for message in prepared:
            if not isinstance(message["content"], str) or not tool_calls.readable(message):
                raise TemplateRefusal(
                    "each turn needs a content that is text, and tool calls that have names",
                    "unreadable turn",
                )
        leading = {message["role"] for message in prepared[:1]}
        if self._system and leading.isdisjoint({"system", "developer"}):
            prepared.insert(0, {"role": "system", "content": self._system})
        return self._emission.normal(prepared)

    @property
    def _template(self) -> str:
        return f"chat template of {self.tokenizer.name_or_path}"

    @cached_property
    def _source(self) -> str:
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else "".join(template.values())

    @cached_property
    def _switch(self) -> bool:
        """Whether the template's prompt depends on `thinking`."""
        try:
            on, off = (
                self._render(ASKED, (), True, **dict.fromkeys(SWITCHES, value))
                for value in (True, False)
            )
        except TemplateRefusal:
            return False
        return on != off

    def _require_end(self) -> None:
        """Raises TemplateError where the template overruns its limits on one short question."""
        with suppress(TemplateRefusal):  # it may want tools, for one
            self._render(ASKED, (), True)
        if self._overruns:
            self._give_up("one short question")

    def _give_up(self, what: str) -> NoReturn:
        raise TemplateError(
            f"the {self._template} takes more time or memory than it may to render {what}; mend "
            "it, or take the tokenizer's own"
        )

    def _require_effect(self) -> None:
        """Raises TemplateError for options that the template does not read, and where `thinking` is
        on and it has another switch."""
        unread = [name for name in self._chosen if name not in self._source]
        if unread:
            raise TemplateError(
                f"data.template_options has {', '.join(unread)}, which the {self._template} does "
                "not read; take it out, or spell it as the template does"
            )
        effort = "reasoning_effort"
        ignored = self._thinking and not self._switch and not self._emission.always_thinks
        if ignored and effort in self._source and effort not in self._options:
            raise TemplateError(
                f"data.thinking=true has no effect: the {self._template} has no such switch and "
                f"reads {effort} instead; leave data.thinking=false and set "
                f"data.template_options={{{effort}: high}} (or another value that it knows)"
            )

    def _thinks(self) -> bool | None:
        return self._thinking if self._switch else None

    def _tokens(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not self._media.isdisjoint(ids):
            raise TemplateRefusal(
                "the text holds a token that stands for an image or sound: one of "
                + ", ".join(media_tokens(self.tokenizer)),
                "a placeholder of an image or sound",
            )
        return ids

    def _prompt(self, messages: Sequence[Message], tools: Tools) -> str:
        """Return the rendered prompt. Raises TemplateRefusal where calls or results are not in it:
        the target would answer a broken conversation."""
        text = self._render(messages, tools, True)
        for message in messages:
            if not tool_calls.shown(text, message):
                raise TemplateRefusal(
                    f"the {self._template} does not show the tool calls or results before the "
                    "answer",
                    "tool calls or results are not shown by the template",
                )
        return text

    def _render(
        self, messages: Sequence[Message], tools: Tools, prompt: bool, **options: Any
    ) -> str:
        """Return the text of `messages`. Raises TemplateRefusal for whatever the template raises.

        Templates want the arguments of tool calls as objects or as JSON text.
        """
        first: Exception | str | None = None
        offered = [dict(tool) for tool in tools] or None
        for form in tool_calls.forms(messages):
            try:
                text = self._renderer(form, offered, prompt, {**self._options, **options})
            except LimitError as error:  # another form of the calls would cost as much again
                self._overruns += 1
                if self._overruns > OVERRUNS:
                    self._give_up(f"more than {OVERRUNS} conversations")
                first = error
                break
            except ValueError as error:  # raise_exception() of the template, or any error in it
                first = first or error
                continue
            if not tool_calls.shown_as_python(form, text):
                return text
            first = first or "it shows the arguments of a tool call as a Python dict"
        raise TemplateRefusal(
            f"the {self._template} refuses it: {first}",
            f"refused by the chat template: {' '.join(str(first).split())[:60]}",
        )


@lru_cache(maxsize=4)  # processes at once
def _renderer(tokenizer: Any, _template: str, today: datetime.date) -> Renderer:
    """Encoders of the same tokenizer share its process, which is 20 to 60 ms to start."""
    return Renderer(partial(text_of, tokenizer, today))


def _without_ours(message: Message) -> Message:
    """`message` as templates see it. A turn of tool calls may have no content."""
    seen = {key: value for key, value in message.items() if key not in OURS}
    return {**seen, "content": ""} if seen.get("content") is None else seen


def encode_all(
    conversations: Iterable[Conversation], encoder: ChatEncoder, skips: SkipCounts
) -> list[Sample]:
    """Return the samples of all conversations; `skips` counts what is left out, by reason and with
    the first conversation that has it."""
    samples, skip = [], counter_of(skips)
    for conversation in conversations:
        if not any(message["role"] == "assistant" for message in conversation.messages):
            skip("no answer", conversation.id)
            continue
        left_out = SkipCounts()
        encoded = encoder.encode(conversation, left_out)
        for reason in left_out.elements():
            skip(reason, conversation.id)
        if not encoded and not left_out:
            skip("no supervised answer", conversation.id)
        for sample in encoded:
            if bool((sample.loss_mask[1:] & sample.loss_mask[:-1]).any()):
                samples.append(sample)
            else:
                skip("answer too short for an anchor", conversation.id)
    return samples
