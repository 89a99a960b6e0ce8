"""Answers by all processes of a job: each into a part of its own, which the first one collects.

A job that was killed leaves its parts behind; the next one, of any number of processes, takes them
over before it shares out what is still missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from deepspec.config.schema import RegenerateConfig
from deepspec.data.conversations import Conversation
from deepspec.processes import rank, world_size
from deepspec.progress import Progress
from deepspec.regeneration.answer_file import AnswerFile
from deepspec.regeneration.answers import (
    Answerer,
    RegenerationCounts,
    answer_all,
    counts_of,
    missing_dialogues,
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
    samples = len(conversations) * each
    resumed = file.resume(make_dialogues(conversations, each))
    share = islice(missing_dialogues(conversations, config, file), rank(), None, world_size())
    size = len(range(rank(), samples - resumed, world_size()))
    progress = Progress("regenerate", size, "samples", show=main)
    tokens = answer_all(share, answerer, config, file.part(rank()), progress)
    wait()
    if not main:
        return None
    with file:
        file.collect()
    seconds = time.monotonic() - begun
    counts = counts_of(file, samples, resumed, tokens, seconds)
    require_some(counts, answerer, file)
    return counts
