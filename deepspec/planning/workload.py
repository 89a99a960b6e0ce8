"""How many samples there are and how long: counted where the data are at hand, else assumed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepspec.config.schema import DataConfig, FieldsConfig, RunConfig
from deepspec.data.chat_template import ChatEncoder, encode_all
from deepspec.data.conversations import (
    Conversation,
    SkipCounts,
    load_conversations,
)
from deepspec.data.files import is_local
from deepspec.errors import TemplateRefusal
from deepspec.planning.shapes import MicroBatch

TOKENISED = 2000  # conversations of a data set; the rest is counted only


@dataclass(frozen=True)
class Workload:
    """`samples` to train on, None where unknown; `lengths`: (tokens, tokens of answers) of each
    that was measured; `source`: where the lengths are from. `complete`: all were measured."""

    samples: int | None
    lengths: tuple[tuple[int, int], ...]
    complete: bool
    source: str

    def mean_tokens(self, config: RunConfig) -> float:
        """Tokens a sample, on average."""
        typical = self.typical(config)
        return typical.tokens / len(typical.contexts)

    def tokens(self, config: RunConfig) -> float | None:
        """Tokens of all samples."""
        return None if self.samples is None else self.samples * self.mean_tokens(config)

    def largest(self, config: RunConfig) -> MicroBatch:
        """The largest micro-batch that can come: the longest samples together."""
        size, longest = config.training.micro_batch_size, config.data.max_length
        lengths = sorted(self.lengths, reverse=True)[:size] if self.complete else []
        lengths = lengths or [(longest, longest)] * size
        contexts = tuple(max(2, min(tokens, longest)) for tokens, _ in lengths)
        return MicroBatch(contexts, self._blocks(config, lengths), config.drafter.block_size)

    def typical(self, config: RunConfig) -> MicroBatch:
        """Samples as long as they are, or as long as they may be where no length is known."""
        longest = config.data.max_length
        lengths = self.lengths or ((longest, longest),)
        contexts = tuple(max(2, min(tokens, longest)) for tokens, _ in lengths)
        return MicroBatch(contexts, self._blocks(config, lengths), config.drafter.block_size)

    @staticmethod
    def _blocks(config: RunConfig, lengths: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        anchors, longest = config.training.anchors_per_sample, config.data.max_length
        return tuple(max(1, min(anchors, answer - 1, longest - 1)) for _, answer in lengths)


def read_workload(config: RunConfig, tokenizer: Any | None, assumed: int | None = None) -> Workload:
    """The samples of `config`: the run's own answers, the data's, or prompts and a bound.

    Of data that are not here, and of all where there is no `tokenizer`, every sample has `assumed`
    tokens, or as many as it may. Raises DataError for data that are neither local nor named like a
    hub data set.
    """
    data, answers = config.data, Path(config.out) / "answers.jsonl"
    prompts, source = config.regenerate.enabled, "data"
    if prompts and answers.is_file():
        data = replace(data, path=[str(answers)], fields=FieldsConfig(), limit=None)
        prompts, source = False, "answers of the run"
    elif prompts:
        source = "prompts, and answers of regenerate.max_new_tokens"
    answers_each = config.regenerate.samples_per_prompt if prompts else 1
    encoder = None if tokenizer is None else ChatEncoder.of(data, tokenizer)
    if not all(is_local(path, data) for path in data.path):
        return _assumed(config, "not here", data.limit, answers_each, assumed)
    if encoder is None:
        count = sum(1 for _ in load_conversations(data, SkipCounts()))
        return _assumed(config, f"{source}; no tokenizer here", count, answers_each, assumed)
    return _measured(config, data, encoder, source, prompts)


def _assumed(
    config: RunConfig, why: str, conversations: int | None, answers_each: int, assumed: int | None
) -> Workload:
    """The workload of samples that all have one length, because of `why`."""
    longest = config.data.max_length
    each = min(assumed or longest, longest)
    source = f"{why}: {each} each, as " + ("assumed" if assumed else "data.max_length allows")
    samples = None if conversations is None else _training(config, conversations * answers_each)
    return Workload(samples, ((each, each),), False, source)


def _measured(
    config: RunConfig, data: DataConfig, encoder: ChatEncoder, source: str, prompts: bool
) -> Workload:
    """Measure at most `TOKENISED` conversations, drawn evenly, and count all of them.

    `prompts`: whether their answers are yet to be made.
    """
    draw, count = random.Random(0), 0
    kept: list[Conversation] = []
    for conversation in load_conversations(data, SkipCounts()):
        count += 1
        if len(kept) < TOKENISED:
            kept.append(conversation)
        elif (place := draw.randrange(count)) < TOKENISED:
            kept[place] = conversation
    if prompts:
        lengths = tuple(_bounds(config, kept, encoder))
        each = config.regenerate.samples_per_prompt
    else:
        samples = encode_all(kept, encoder, SkipCounts())
        lengths = tuple((len(sample), int(sample.loss_mask.sum())) for sample in samples)
        each = 1
    samples_all = round(count * each * len(lengths) / len(kept))
    complete = count == len(kept)
    if not complete:
        source += f", {TOKENISED} of {count} measured"
    return Workload(_training(config, samples_all), lengths, complete, source)


def _training(config: RunConfig, samples: int) -> int:
    """Of so many samples, those that are not held out."""
    return samples - min(config.training.validation_samples, samples // 5)


def _bounds(
    config: RunConfig, prompts: list[Conversation], encoder: ChatEncoder
) -> Iterator[tuple[int, int]]:
    """(tokens, tokens of answers) of each prompt, were every answer as long as it may be."""
    for prompt in prompts:
        asked = [message for message in prompt.messages if message["role"] == "user"]
        try:
            first, *others = asked
            own = len(encoder.prompt([first], prompt.tools))  # which templates write once
            own += sum(len(encoder.prompt([message])) for message in others)
        except TemplateRefusal:
            continue
        if own < encoder.max_length:
            answers = len(asked) * config.regenerate.max_new_tokens
            total = min(own + answers, encoder.max_length)
            yield total, total - own
