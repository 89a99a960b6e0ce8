"""Answers by the target in this process, a batch of prompts at a time."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from deepspec.config.schema import DataConfig, RegenerateConfig, as_dict
from deepspec.data.chat_template import ChatEncoder
from deepspec.decoding import Completion, Sampling, plain_decode
from deepspec.errors import DataError, DeepSpecError, TemplateRefusal
from deepspec.regeneration.dialogue import BROKEN, Dialogue
from deepspec.targets import Target


class TargetAnswerer:
    """The target itself, with prompts rendered as training renders them.

    A sample's random numbers depend on the seed and its id alone, not on the batch it is in or on
    what was answered before. Its answer does so up to the rounding of differently padded batches:
    of the embedded target's answers at temperature 1, 5 in 384 differed between batches of 64 and
    of 256.
    """

    error: type[DeepSpecError] = DataError

    def __init__(self, target: Target, data: DataConfig) -> None:
        self._target = target
        self._data = data
        # uncut: a prompt is whole or too long, never shortened
        self._encoder = ChatEncoder.of(replace(data, max_length=sys.maxsize), target.tokenizer)

    def describe(self) -> dict[str, Any]:
        """Fingerprint of the target, and what the template is told."""
        written = as_dict(self._data)  # what comes from the environment stays out of files
        return {
            "answerer": "in process",
            **self._target.identity,
            "thinking": self._data.thinking,
            "system_prompt": written["system_prompt"],
            "date": self._data.date,
            "template_options": written["template_options"],
        }

    def answer(
        self,
        dialogues: Iterable[Dialogue],
        config: RegenerateConfig,
        done: Callable[[Dialogue], None],
    ) -> None:
        """A turn of `config.batch_size` dialogues at a time; see `Answerer.answer`.

        Prompts of like length share a batch. Longest first: a batch that does not fit into memory
        shows at once, and the time left is not underestimated. A dialogue with turns to come goes
        back into the line, so batches stay full.
        """
        waiting = deque(sorted(dialogues, key=_length, reverse=True))
        while waiting:
            batch = [waiting.popleft() for _ in range(min(config.batch_size, len(waiting)))]
            self._answer_turn(batch, config)
            for dialogue in batch:
                if dialogue.open:
                    waiting.appendleft(dialogue)
                else:
                    done(dialogue)

    def _answer_turn(self, batch: list[Dialogue], config: RegenerateConfig) -> None:
        prompts = {}
        for dialogue in batch:
            try:
                prompt = self._encoder.prompt(dialogue.messages, dialogue.tools)
            except TemplateRefusal as error:  # some templates take no system prompts, for one
                dialogue.give_up(error.reason, str(error))
                continue
            if problem := self._too_long(len(prompt)):
                dialogue.give_up("prompt too long", problem)
            else:
                prompts[dialogue] = prompt
        if not prompts:
            return
        result = plain_decode(
            self._target,
            list(prompts.values()),
            Sampling(config.temperature, config.top_p, config.top_k),
            config.max_new_tokens,
            config.seed,
            requests=[dialogue.turn for dialogue in prompts],
            batch_size=len(prompts),
        )
        for dialogue, completion in zip(prompts, result.completions, strict=True):
            self._take(dialogue, completion)

    def _too_long(self, length: int) -> str:
        if length >= self._data.max_length:
            return f"{length} tokens, data.max_length={self._data.max_length}"
        context = self._target.context_length
        if context is not None and length >= context:
            return f"{length} tokens leave no room in the target's context of {context}"
        return ""

    def _take(self, dialogue: Dialogue, completion: Completion) -> None:
        sampled, stopped = list(completion.tokens), completion.finish_reason == "stop"
        text = self._decode(sampled[:-1]) if stopped else self._decode(sampled).rstrip(BROKEN)
        answer = {"content": text, "token_ids": sampled}
        dialogue.answer(answer, len(sampled), truncated=not stopped)

    def _decode(self, tokens: list[int]) -> str:
        # special tokens in mid-answer stay: rendering the text gives them back
        return self._target.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def _length(dialogue: Dialogue) -> int:
    """Characters to read before the next answer."""
    return sum(len(message["content"]) for message in dialogue.messages)
