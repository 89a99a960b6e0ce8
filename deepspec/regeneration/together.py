"""Answers by all processes of a job: each into a part of its own, which the first one collects.

A job that was killed leaves its parts behind; the next one, of any number of processes, takes them
over before it shares out what is still missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deepspec.config.schema import RegenerateConfig
from deepspec.data.conversations import Conversation
from deepspec.processes import rank, world_size
from deepspec.regeneration.answer_file import AnswerFile
from deepspec.regeneration.answers import (
    Answerer,
    RegenerationCounts,
    answer_missing,
    counts_of,
    require_some,
    settings_of,
)
from deepspec.regeneration.dialogue import make_dialogues


def regenerate_together(
    conversations: Sequence[Conversation],
    answerer: Answerer,
    config: RegenerateConfig,
    out: Path,
    wait: Callable[[], None],
) -> RegenerationCounts | None:
    """`regenerate` by all processes, which all call this; its counts in the first one, else None.

    `wait` returns once all have called it.
    """
    begun, settings, main = time.monotonic(), settings_of(config, answerer), rank() == 0
    if main:
        with AnswerFile(out, settings) as file:
            file.collect()
    wait()
    file, each = AnswerFile(out, settings), config.samples_per_prompt
    resumed = file.resume(make_dialogues(conversations, each))
    missing = [
        conversation
        for conversation in conversations
        if not all(file.holds(dialogue) for dialogue in make_dialogues([conversation], each))
    ]
    share = missing[rank() :: world_size()]
    own = answer_missing(share, answerer, config, file.part(rank()), show=main)
    wait()
    if not main:
        return None
    with file:
        file.collect()
    seconds = time.monotonic() - begun
    counts = counts_of(file, len(conversations) * each, resumed, own.tokens, seconds)
    require_some(counts, answerer, file)
    return counts
