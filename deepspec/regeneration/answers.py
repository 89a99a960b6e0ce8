"""Answers by the target: a drafter learns the target's text, so the data's own answers go.

The assistant turns of each conversation are dropped and written anew by the target, turn by turn,
with its own earlier answers as history.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deepspec.config.schema import RegenerateConfig
from deepspec.data.conversations import Conversation
from deepspec.errors import DeepSpecError
from deepspec.progress import Progress
from deepspec.regeneration.answer_file import AnswerFile
from deepspec.regeneration.dialogue import Dialogue, make_dialogues

SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "seed", "samples_per_prompt")


class Answerer(Protocol):
    """Who answers: the target in this process, or behind a server.

    `error` is raised when nobody got an answer.
    """

    error: type[DeepSpecError]

    def describe(self) -> dict[str, Any]:
        """What decides the answers besides sampling: which target, which rendering of prompts.

        JSON values. Raises `error` when the answerer is not at hand.
        """

    def answer(
        self,
        dialogues: Iterable[Dialogue],
        config: RegenerateConfig,
        done: Callable[[Dialogue], None],
    ) -> None:
        """Answer every turn of every dialogue; each goes to `done` as soon as it is closed."""


@dataclass(frozen=True)
class RegenerationCounts:
    """What came of `samples` that were asked for.

    `resumed` of them stood in the output before, `failed` ones got no answer (by reason). Of the
    output's `rows` now, `truncated` hit the length limit and `altered` encode to other token ids
    than were sampled. `tokens` were generated in `seconds`, by this process.
    """

    samples: int
    resumed: int
    failed: dict[str, int]
    rows: int
    truncated: int
    altered: int
    tokens: int
    seconds: float


def regenerate(
    conversations: Sequence[Conversation],
    answerer: Answerer,
    config: RegenerateConfig,
    out: Path,
    show: bool = True,
) -> RegenerationCounts:
    """Write conversations with the target's own answers to `out` (.jsonl), in completion order.

    A row has `id`, `domain` where known, `conversation_id` where several rows answer one prompt,
    `messages`, and `finish_reason`: "stop", or "length" when the last answer hit `max_new_tokens`.
    Rows that `out` has already are not asked for again, so a killed run is resumed by starting it
    again; samples that failed before are tried again.

    An answer is stored as text, without its end of turn, and training tokenizes it again. That
    gives other ids than the target sampled where those are not the tokenizer's own way to write
    the text. Such rows are kept, for the text is the target's and its features are computed on the
    new ids; they are marked `"altered": true` and counted (in process only: a server does not
    tell). Of 512 answers of the embedded target, 21 % of the rows and 1.5 % of the tokens are
    altered at temperature 1; 4 % and 0.2 % at 0.7 with top_p 0.8 and top_k 20.

    Raises DataError when `out` was made with other settings, and the answerer's error when it
    cannot be reached or not one sample got an answer.
    """
    file = AnswerFile(out, settings_of(config, answerer))
    with file:
        file.collect()
    begun, samples = time.monotonic(), len(conversations) * config.samples_per_prompt
    resumed = file.resume(make_dialogues(conversations, config.samples_per_prompt))
    missing = missing_dialogues(conversations, config, file)
    progress = Progress("regenerate", samples, "samples", done=resumed, show=show)
    tokens = answer_all(missing, answerer, config, file, progress)
    counts = counts_of(file, samples, resumed, tokens, time.monotonic() - begun)
    require_some(counts, answerer, file)
    return counts


def settings_of(config: RegenerateConfig, answerer: Answerer) -> dict[str, Any]:
    """What must be equal for answers to share a file."""
    return {key: getattr(config, key) for key in SAMPLING} | answerer.describe()


def missing_dialogues(
    conversations: Iterable[Conversation], config: RegenerateConfig, file: AnswerFile
) -> Iterator[Dialogue]:
    """What `file` has no row of; of all conversations, for that is what ids are unique in."""
    dialogues = make_dialogues(conversations, config.samples_per_prompt)
    return (dialogue for dialogue in dialogues if not file.holds(dialogue))


def answer_all(
    dialogues: Iterable[Dialogue],
    answerer: Answerer,
    config: RegenerateConfig,
    file: AnswerFile,
    progress: Progress,
) -> int:
    """Ask for `dialogues`, into `file`; how many tokens were generated."""
    begun, tokens = time.monotonic(), 0

    def done(dialogue: Dialogue) -> None:
        nonlocal tokens
        file.append(dialogue)
        tokens += dialogue.tokens
        rate = tokens / (time.monotonic() - begun)
        progress.advance(1, f"{rate:.0f} tokens/s  {file.failed.total()} failed")

    with file, progress:
        answerer.answer(dialogues, config, done)
    return tokens


def counts_of(
    file: AnswerFile, samples: int, resumed: int, tokens: int, seconds: float
) -> RegenerationCounts:
    """What stands in `file` by now, and what was done for it."""
    return RegenerationCounts(
        samples=samples,
        resumed=resumed,
        failed=dict(file.failed),
        rows=file.rows,
        truncated=file.truncated,
        altered=file.altered,
        tokens=tokens,
        seconds=seconds,
    )


def require_some(counts: RegenerationCounts, answerer: Answerer, file: AnswerFile) -> None:
    """Raises the answerer's error when not one sample got an answer."""
    if counts.samples and sum(counts.failed.values()) == counts.samples:
        raise answerer.error(
            f"not one of {counts.samples} samples got an answer; the first failed with "
            f"{file.first_failure}; see {file.failed_path}"
        )
