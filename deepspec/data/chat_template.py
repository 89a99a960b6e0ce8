"""Tokens and loss mask through the tokenizer's own chat template.

Two ways to the mask: `{% generation %}` markers where the template has them, else the difference
between rendered prefixes, checked to be consistent. Nothing is guessed: a mask that would be empty
or all ones is an error that names the sample and the template.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from deepspec.data.conversations import Conversation, Message, SkipCounts
from deepspec.errors import TemplateError
from deepspec.records import Sample


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
    ) -> None:
        template = tokenizer.chat_template
        if not template:
            raise TemplateError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; put a "
                "chat_template.jinja beside it, or take the tokenizer of the instruct model"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._system = system_prompt
        self._options = {"enable_thinking": thinking}
        self.has_markers = "{% generation" in template or "{%- generation" in template

    def encode(self, conversation: Conversation) -> Sample | None:
        """Token ids and loss mask; None when `max_length` cuts every answer away.

        A conversation whose last answer was cut by a length limit is not supervised at the end of
        turn that the template adds: the target did not write it.
        """
        messages = self._with_system(conversation.messages)
        ids, mask = (self._marked if self.has_markers else self._by_prefix)(messages, conversation)
        if not any(mask) or all(mask):
            raise TemplateError(
                f"sample {conversation.id}: the chat template of {self.tokenizer.name_or_path} "
                f"gives a loss mask that is {'all ones' if all(mask) and mask else 'empty'}; the "
                "answers cannot be told from the prompt. Mend the template's {% generation %} "
                "markers, or check that the conversation has an assistant turn"
            )
        if conversation.truncated:
            last = max(index for index, masked in enumerate(mask) if masked)
            mask[last] = False
        ids, mask = ids[: self.max_length], mask[: self.max_length]
        if not any(mask):
            return None
        return Sample(torch.tensor(ids), torch.tensor(mask, dtype=torch.bool), conversation.id)

    def prompt(self, messages: Iterable[Message]) -> list[int]:
        """Token ids of `messages` with the generation prompt, ready for the target to answer."""
        return self._render(self._with_system(messages), add_generation_prompt=True)

    def _with_system(self, messages: Iterable[Message]) -> list[Message]:
        messages = list(messages)
        if self._system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        return messages

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> list[int]:
        return list(
            self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=add_generation_prompt,
                return_dict=True,
                **self._options,
            )["input_ids"]
        )

    def _marked(
        self, messages: list[Message], conversation: Conversation
    ) -> tuple[list[int], list[bool]]:
        out = self.tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, **self._options
        )
        return list(out["input_ids"]), [bool(value) for value in out["assistant_masks"]]

    def _by_prefix(
        self, messages: list[Message], conversation: Conversation
    ) -> tuple[list[int], list[bool]]:
        """Before each answer the prompt, after it the prompt plus answer: the difference is it."""
        whole = self._render(messages)
        mask = [False] * len(whole)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            after = self._render(messages[: index + 1])
            if whole[: len(before)] != before or whole[: len(after)] != after:
                raise TemplateError(
                    f"sample {conversation.id}: the chat template of "
                    f"{self.tokenizer.name_or_path} renders turn {index} differently when more "
                    "turns follow, so prefixes do not show where the answer stands; add "
                    "{% generation %} markers to the template"
                )
            for position in range(len(before), self._end_of_turn(whole, len(before), len(after))):
                mask[position] = True
        return whole, mask

    def _end_of_turn(self, ids: list[int], start: int, end: int) -> int:
        """Templates write a line break behind the end of turn; the model never does."""
        special = set(self.tokenizer.all_special_ids)
        marks = [position for position in range(start, end) if ids[position] in special]
        return marks[-1] + 1 if marks else end


def encode_all(
    conversations: Iterable[Conversation], encoder: ChatEncoder, skips: SkipCounts
) -> list[Sample]:
    """Every conversation as a sample; what had to be left out is counted in `skips`."""
    samples = []
    for conversation in conversations:
        if not any(message["role"] == "assistant" for message in conversation.messages):
            skips["no answer"] += 1
            continue
        sample = encoder.encode(conversation)
        if sample is None:
            skips["answers behind max_length"] += 1
        elif not bool((sample.loss_mask[1:] & sample.loss_mask[:-1]).any()):
            skips["answer too short for an anchor"] += 1
        else:
            samples.append(sample)
    return samples
