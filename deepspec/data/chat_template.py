"""Tokens and loss mask through the tokenizer's own chat template.

Two ways to the mask: `{% generation %}` markers where the template has them, else what the target
is given and what it writes: the rendered prompt, and the rest of the rendered answer. Where the
template takes thoughts away from answers, or renders the prompt otherwise once it is answered
(Gemma 4 does both), the answer itself is put behind the prompt. Nothing is guessed: a mask that
would be empty or all ones is an error that names the sample and the template.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import jinja2
import torch

from deepspec.config.schema import DataConfig
from deepspec.data.conversations import Conversation, Message, SkipCounts
from deepspec.errors import TemplateError, TemplateRefusal
from deepspec.records import Sample

REFUSED = "refused by the chat template"  # why a row is left out


class ChatEncoder:
    """Renders conversations for one tokenizer.

    `thinking` is passed to the template as `enable_thinking`; `system_prompt` is put in front of
    conversations that bring none; samples are cut at `max_length` tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        thinking: bool = False,
        system_prompt: str | None = None,
        stop_token_ids: Iterable[int] = (),
    ) -> None:
        template = tokenizer.chat_template
        if not template:
            raise TemplateError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; put a "
                "chat_template.jinja beside it, or take the tokenizer of the instruct model"
            )
        self.stop_token_ids = frozenset(stop_token_ids)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._system = system_prompt
        self._options = {"enable_thinking": thinking}
        self.has_markers = "{% generation" in template or "{%- generation" in template

    @classmethod
    def of(cls, data: DataConfig, tokenizer: Any, stop_token_ids: Iterable[int] = ()) -> Self:
        """Return the encoder that `data` describes; see the class for `stop_token_ids`."""
        return cls(tokenizer, data.max_length, data.thinking, data.system_prompt, stop_token_ids)

    def encode(self, conversation: Conversation) -> list[Sample]:
        """Token ids and loss masks; nothing where `max_length` cuts every answer away.

        One sample, unless the template renders an answer differently from how it was written
        (Gemma 4 takes its thoughts away), or once more turns follow (Qwen3 does so then): then one
        sample an answer, each as the target wrote it. An answer that was cut by a length limit is
        not supervised at the end of turn that the template adds: the target did not write it.
        """
        messages = self._with_system(conversation.messages)
        try:
            rendered = self._rendered(messages)
        except TemplateError as error:
            raise type(error)(f"sample {conversation.id}: {error}") from None
        several = len(rendered) > 1
        whose = conversation.conversation_id or (conversation.id if several else None)
        samples = []
        for number, (ids, mask) in enumerate(rendered, start=1):
            if not any(mask) or all(mask):
                raise TemplateError(
                    f"sample {conversation.id}: the {self._template} gives a loss mask that is "
                    f"{'all ones' if all(mask) and mask else 'empty'}; the answers cannot be told "
                    "from the prompt. Mend the template's {% generation %} markers, or check that "
                    "the conversation has an assistant turn"
                )
            if conversation.truncated and number == len(rendered):
                last = max(index for index, masked in enumerate(mask) if masked)
                mask[last] = False
            ids, mask = ids[: self.max_length], mask[: self.max_length]
            if any(mask):
                name = f"{conversation.id}#{number}" if several else conversation.id
                tokens, supervised = torch.tensor(ids), torch.tensor(mask, dtype=torch.bool)
                samples.append(Sample(tokens, supervised, name, whose))
        return samples

    def answered(self, messages: Iterable[Message]) -> list[int]:
        """Token ids of `messages`, which end with an answer, as training will see that answer."""
        return self._rendered(self._with_system(messages))[-1][0]

    def prompt(
        self, messages: Iterable[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Token ids of `messages` with the generation prompt, ready for the target to answer."""
        return self._render(self._with_system(messages), add_generation_prompt=True)

    def _with_system(self, messages: Iterable[Message]) -> list[Message]:
        messages = list(messages)
        if self._system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        return messages

    @property
    def _template(self) -> str:
        return f"chat template of {self.tokenizer.name_or_path}"

    def _apply(self, messages: list[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages, return_dict=True, **options, **self._options
            )
        except jinja2.TemplateError as error:  # raise_exception() inside the template, mostly
            raise TemplateRefusal(f"the {self._template} refuses it: {error}") from None

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> list[int]:
        return list(self._apply(messages, add_generation_prompt=add_generation_prompt)["input_ids"])

    def _rendered(self, messages: list[Message]) -> list[tuple[list[int], list[bool]]]:
        """(ids, mask) of each sample."""
        return self._marked(messages) if self.has_markers else self._by_prefix(messages)

    def _marked(self, messages: list[Message]) -> list[tuple[list[int], list[bool]]]:
        out = self._apply(messages, return_assistant_tokens_mask=True)
        return [(list(out["input_ids"]), [bool(value) for value in out["assistant_masks"]])]

    def _by_prefix(self, messages: list[Message]) -> list[tuple[list[int], list[bool]]]:
        """Before each answer the prompt, after it the prompt plus answer: the difference is it."""
        answers = []  # a (text that ends with it, where it begins, where it ends) each
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:index], add_generation_prompt=True)
                after, end = self._answered(messages[: index + 1], before)
                answers.append((after, len(before), end))
        # the last answer's text is the whole one unless more was said
        spoken_last = messages[-1]["role"] == "assistant"
        whole = answers[-1][0] if spoken_last else self._render(messages)
        if all(whole[: len(after)] == after for after, _, _ in answers):
            return [(whole, _mask(len(whole), [(start, end) for _, start, end in answers]))]
        return [(after, _mask(len(after), [(start, end)])) for after, start, end in answers]

    def _answered(self, messages: list[Message], before: list[int]) -> tuple[list[int], int]:
        """The prompt `before` with the last of `messages`, and where its end of turn ends.

        As the template renders it, if that is what the target was given and what it wrote. Some
        take thoughts away or refuse them.
        """
        answer, start = self._tokens(messages[-1]["content"]), len(before)
        try:
            rendered = self._render(messages)
        except TemplateRefusal:
            return [*before, *answer, self.tokenizer.eos_token_id], start + len(answer) + 1
        as_given = rendered[:start] == before
        end = self._end_of_turn(rendered, start if as_given else 0)
        if as_given and self._said(rendered[start:end]) == self._said(answer):
            return rendered, end
        closing = rendered[end - 1 : end] if not self._said(rendered[end:]) else []
        written = before + answer + closing
        return written, len(written)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _said(self, tokens: list[int]) -> str:
        """Without spaces and special tokens, which templates add and take away at will."""
        return "".join(self.tokenizer.decode(tokens, skip_special_tokens=True).split())

    def _end_of_turn(self, ids: list[int], start: int) -> int:
        """Templates write a line break behind the end of turn; the model never does."""
        special = set(self.tokenizer.all_special_ids)
        marks = [position for position in range(start, len(ids)) if ids[position] in special]
        return marks[-1] + 1 if marks else len(ids)


def _mask(length: int, answers: Iterable[tuple[int, int]]) -> list[bool]:
    mask = [False] * length
    for start, end in answers:
        mask[start:end] = [True] * (end - start)
    return mask


def encode_all(
    conversations: Iterable[Conversation], encoder: ChatEncoder, skips: SkipCounts
) -> list[Sample]:
    """Every conversation as a sample; what had to be left out is counted in `skips`."""
    samples = []
    for conversation in conversations:
        if not any(message["role"] == "assistant" for message in conversation.messages):
            skips["no answer"] += 1
            continue
        try:
            encoded = encoder.encode(conversation)
        except TemplateRefusal:
            skips[REFUSED] += 1
            continue
        if not encoded:
            skips["answers behind max_length"] += 1
        for sample in encoded:
            if bool((sample.loss_mask[1:] & sample.loss_mask[:-1]).any()):
                samples.append(sample)
            else:
                skips["answer too short for an anchor"] += 1
    return samples
