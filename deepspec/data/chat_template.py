"""Tokens and loss mask of conversations, through the tokenizer's own chat template.

Supervised is exactly what the target emits when it answers the rendered prompt; `emission.py` holds
that rule for answers of the data. Answers that the target sampled are taken as the ids they are.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import torch

from deepspec.config.schema import DataConfig
from deepspec.data import tool_calls
from deepspec.data.conversations import Conversation, Message, SkipCounts
from deepspec.data.emission import Emission, Turn
from deepspec.data.stops import ASKED, Tools
from deepspec.data.turns import OURS
from deepspec.errors import TemplateError, TemplateRefusal
from deepspec.records import Sample

TODAY = datetime.date.fromisoformat(DataConfig().date)
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
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
        self._today = today
        stops = [_text_of(tokenizer, each) for each in stop_token_ids]
        self._emission = Emission(
            self._render, self._source, stops, _special_tokens(tokenizer), self._thinks
        )
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
        cannot be brought to what the target emits, or lie behind `max_length`. Without `skips` the
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
            skips["answers behind max_length"] += cut_away
        return samples

    def prompt(self, messages: Iterable[Message], tools: Tools = ()) -> list[int]:
        """Token ids of `messages` with the generation prompt, ready for the target to answer."""
        return self._tokens(self._render(self._prepared(messages), tools, True))

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
        messages, tools = self._prepared(conversation.messages), conversation.tools
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
        prompt = self._render(history, tools, True)
        given = self._tokens(prompt)
        if sampled is not None:
            return given, list(sampled)
        text, mark = self._emission.text(Turn(history, message, tools, prompt), truncated)
        both = self._tokens(prompt + text)
        answer = both[len(given) :] if both[: len(given)] == given else self._tokens(text)
        if mark is not None and self.tokenizer.decode(answer[-1:]).strip() != mark.strip():
            raise TemplateRefusal(
                f"{mark} ends the answer, but the tokenizer has no token of that name",
                "the end of a turn is not one token",
            )
        return given, answer

    def _prepared(self, messages: Iterable[Message]) -> list[Message]:
        """`messages` as templates see them, with the system prompt of the config."""
        prepared = [_without_ours(message) for message in messages]
        if self._system and prepared[0]["role"] not in ("system", "developer"):
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

    def _require_effect(self) -> None:
        """Raises TemplateError where `thinking` is on and the template has another switch."""
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
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(
        self, messages: Sequence[Message], tools: Tools, prompt: bool, **options: Any
    ) -> str:
        """Return the text of `messages`. Raises TemplateRefusal for whatever the template raises.

        Templates want the arguments of tool calls as objects or as JSON text.
        """
        first: Exception | None = None
        offered = [dict(tool) for tool in tools] or None
        for form in tool_calls.forms(messages):
            try:
                template = self.tokenizer.get_chat_template(tools=offered)
                text = self.tokenizer.apply_chat_template(
                    form,
                    tools=offered,
                    chat_template=_dated(template, self._today),
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **{**self._options, **options},
                )
                return str(text)
            except Exception as error:  # raise_exception() of the template, or any error in it
                first = first or error
        raise TemplateRefusal(f"the {self._template} refuses it: {first}")


def _dated(template: str, today: datetime.date) -> str:
    """`template` with the day of `today` where it asks for the current date.

    Transformers gives templates a clock and no way to set it.
    """
    return CLOCK.sub(lambda call: repr(today.strftime(call.group(2))), template)


def _without_ours(message: Message) -> Message:
    return {key: value for key, value in message.items() if key not in OURS}


def _text_of(tokenizer: Any, token_id: int) -> str:
    return str(tokenizer.decode([token_id], skip_special_tokens=False))


def _special_tokens(tokenizer: Any) -> set[str]:
    """The special tokens as text: those that are flagged so, whether or not they have a name."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


def encode_all(
    conversations: Iterable[Conversation], encoder: ChatEncoder, skips: SkipCounts
) -> list[Sample]:
    """Every conversation as a sample; what had to be left out is counted in `skips`."""
    samples = []
    for conversation in conversations:
        if not any(message["role"] == "assistant" for message in conversation.messages):
            skips["no answer"] += 1
            continue
        for sample in encoder.encode(conversation, skips):
            if bool((sample.loss_mask[1:] & sample.loss_mask[:-1]).any()):
                samples.append(sample)
            else:
                skips["answer too short for an anchor"] += 1
    return samples
