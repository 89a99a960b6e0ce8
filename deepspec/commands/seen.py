"""Whether prompts are held out: a drafter's own training prompts say nothing about new text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from deepspec.commands.sources import Source
from deepspec.config.schema import FieldsConfig
from deepspec.data.chat_template import ChatEncoder
from deepspec.data.conversations import Conversation, SkipCounts, load_conversations
from deepspec.errors import DataError, TemplateRefusal
from deepspec.evaluation.benchmarks import load_prompts
from deepspec.features.store import Store

SHOWN = 5


def held_out_prompts(source: Source, encoder: ChatEncoder) -> tuple[str, bool]:
    """(digest of the prompts of `evaluation.benchmarks`, whether they were compared).

    They are held against the conversations that the drafter was trained and validated on (its best
    checkpoint was chosen by the latter): the store of features=stored, else a run's answers, else
    what data.path names. Where there is nothing of these, for an export, they are not compared.
    Raises DataError where the drafter has seen some of them, and where its data cannot be read.
    """
    config, limit = source.config, source.config.evaluation.limit
    prompts: dict[str, str] = {}  # how a prompt is known -> its name
    texts: list[str] = []
    for benchmark in config.evaluation.benchmarks:
        short, conversations, _ = load_prompts(benchmark, limit, config.data.fields)
        names = {_key(each): f"{short}/{each.id}" for each in conversations}
        texts += names
        if config.features.source == "stored":
            names |= dict(_token_keys(conversations, short, encoder))
        prompts |= names
    digest = _digest("".join(sorted(texts)))
    try:
        known = _training_keys(source)
        seen = sorted({prompts[key] for key in known or () if key in prompts})
    except DataError as error:
        raise DataError(
            f"the prompts cannot be compared with what the drafter was trained on: {error}"
        ) from None
    if known is None:
        return digest, False
    if seen:
        more = f" and {len(seen) - SHOWN} more" if len(seen) > SHOWN else ""
        total = len(set(prompts.values()))
        raise DataError(
            f"the drafter was trained on {len(seen)} of these {total} prompts: "
            f"{', '.join(seen[:SHOWN])}{more}; name files of others by prompts=[...]"
        )
    return digest, True


def _training_keys(source: Source) -> Iterable[str] | None:
    """How each conversation of the training is known; None where nothing is at hand."""
    config = source.config
    if config.features.source == "stored":
        store = Store.open(Path(str(config.features.path)).expanduser())
        first = ((each.input_ids, each.loss_mask.int().argmax()) for each in store.samples())
        return (_digest(str(ids[:end].tolist())) for ids, end in first)
    data = config.data
    if config.regenerate.enabled and source.run and source.run.answers.is_file():
        data = replace(data, path=[str(source.run.answers)], fields=FieldsConfig(), limit=None)
    elif not data.path:
        return None
    return (_key(each) for each in load_conversations(data, SkipCounts()))


def _key(conversation: Conversation) -> str:
    """By the text of its first user turn, whatever stands around it."""
    turns = (turn["content"] for turn in conversation.messages if turn["role"] == "user")
    return _digest(" ".join(next(turns).split()))


def _token_keys(
    conversations: Iterable[Conversation], short: str, encoder: ChatEncoder
) -> Iterator[tuple[str, str]]:
    """By the tokens in front of the first answer: all that a store of features has."""
    for each in conversations:
        try:
            yield _digest(str(encoder.prompt(each.messages, each.tools))), f"{short}/{each.id}"
        except TemplateRefusal:  # it is not decoded either
            continue


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
