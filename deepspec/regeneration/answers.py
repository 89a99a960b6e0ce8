"""Answers by the target: a drafter learns the target's text, so the data's own answers go.

The assistant turns of each conversation are dropped and written anew by the target, turn by turn,
with its own earlier answers as history. See `Dialogue` for the turns of the data that stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from deepspec.config.schema import DataConfig, FieldsConfig, RegenerateConfig
from deepspec.data.conversations import (
    Conversation,
    SkipCounts,
    counter_of,
    load_conversations,
    with_distinct_ids,
)
from deepspec.errors import DeepSpecError
from deepspec.progress import Progress
from deepspec.regeneration.answer_file import AnswerFile, RowCounts
from deepspec.regeneration.dialogue import Dialogue, make_dialogues, sample_ids

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

    `resumed` of them stood in the output before, `failed` ones got no answer (by reason). `file`
    counts the rows of the output now, `unused` of which answer nothing in the data as it is now.
    `tokens` were generated in `seconds`, by this process.
    """

    samples: int
    resumed: int
    failed: dict[str, int]
    file: RowCounts
    unused: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        """One line for people."""
        file = self.file
        notes = (
            (
                self.unused,
                "rows are not used here, because the data no longer have their prompts, but a "
                "training with this file as data.path uses them",
            ),
            (
                file.truncated,
                "rows were cut at regenerate.max_new_tokens or the end of the context",
            ),
            (file.kept, "assistant turns were kept from the data and are not supervised"),
            (file.called, "rows end early, at a tool call of the target without a result"),
            (file.as_text, "rows as text: the server returns no token ids"),
            (file.repeated, "more rows have the id of a row before them and are not used"),
        )
        found = "".join(f"; {count} {note}" for count, note in notes if count)
        return (
            f"{file.rows} rows, {self.resumed} from before, with {file.answers} answers by the "
            f"target{found}; {self.tokens} tokens in {self.seconds:.0f} s"
        )


def regenerate(
    conversations: Sequence[Conversation],
    answerer: Answerer,
    config: RegenerateConfig,
    out: Path,
    show: bool = True,
) -> RegenerationCounts:
    """Write conversations with the target's own answers to `out` (.jsonl), in completion order.

    A row has `id`, `domain` where known, `conversation_id` where several rows answer one prompt,
    `tools` where there are some, `messages`, and `finish_reason`: "stop"; "length" when the last
    answer was cut by `max_new_tokens` or the end of the context; "tool_calls" when the conversation
    ends early because the target called a tool. Rows that `out` has already are not answered
    again, so a killed run is resumed by starting it again; samples that failed before are tried
    again. Rows that answer nothing in `conversations` stay and are counted; `load_answers` skips
    them.

    An answer has the ids that the target sampled, as `token_ids` beside its text, with the stop
    token unless a length limit cut it. Training takes the ids; the text is history for later turns.
    Every answer is supervised. A turn that was kept from the data has `supervised: false`.

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


def load_answers(
    data: DataConfig, samples_per_prompt: int, path: Path, skips: SkipCounts
) -> Iterator[Conversation]:
    """The rows of the answers at `path` that answer `data` as it is now.

    The file may hold more: data.limit may have been lowered since. Other rows are skipped. Of
    several answers with one id the first counts; `skips` counts the others.
    """
    asked = with_distinct_ids(load_conversations(data, SkipCounts()))
    found: set[str] = set()
    wanted = {name for each in asked for name in sample_ids(each.id, samples_per_prompt)}
    ours = replace(data, path=[str(path)], fields=FieldsConfig(), limit=None)
    skip = counter_of(skips)
    for row in load_conversations(ours, skips):
        if row.id in wanted:
            wanted.remove(row.id)
            found.add(row.id)
            yield row
        elif row.id in found:
            skip("another answer with the id of a row before it", row.id)


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
        file=file.counts,
        unused=file.unused,
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
