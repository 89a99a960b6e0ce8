"""The answers on disk: appended row by row, resumed by sample id, never of two settings.

answers.jsonl          a row a finished sample; `deepspec.data.conversations` reads it
answers.json           the settings that the rows were made with
answers.failed.jsonl   samples without an answer: id, reason, detail; asked again next time
answers.part-0003.*    the same three of process 3 of several, until they are collected
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deepspec.atomic import write_text
from deepspec.data.files import read_jsonl
from deepspec.errors import DataError
from deepspec.json_files import parse_json
from deepspec.regeneration.dialogue import Dialogue, is_answer, prompts_of
from deepspec.targets.identity import ALL

FORMAT = 2  # since answers have their token ids


@dataclass
class RowCounts:
    """What stands in the rows of a file.

    `truncated` of the `rows` were cut by a length limit, `called` end at the target's own call of a
    tool though the data go on, and `as_text` have answers without token ids. They hold `answers` of
    the target, and `kept` assistant turns of the data. `repeated` more rows have the id of a row
    before them: they are not used, and not counted otherwise.
    """

    rows: int = 0
    truncated: int = 0
    called: int = 0
    as_text: int = 0
    answers: int = 0
    kept: int = 0
    repeated: int = 0

    def add(self, row: dict[str, Any]) -> None:
        """Count `row`."""
        spoken = [message for message in row["messages"] if message["role"] == "assistant"]
        own = [message for message in spoken if is_answer(message)]
        self.rows += 1
        self.truncated += row["finish_reason"] == "length"
        self.called += row["finish_reason"] == "tool_calls"
        self.as_text += any("token_ids" not in message for message in own)
        self.answers += len(own)
        self.kept += len(spoken) - len(own)


class AnswerFile:
    """`with AnswerFile(out, settings) as file: file.append(dialogue)`.

    `settings`: JSON values that must be equal for answers to share a file. Raises DataError when
    `out` holds answers of other settings, or anything else.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        if out.suffix != ".jsonl":
            raise DataError(f"out={out}: the file of answers must be named *.jsonl")
        self.path = out
        self._settings = settings
        self.counts = RowCounts()
        self.unused = 0  # rows that `resume` found to answer nothing in the data
        self.failed: Counter[str] = Counter()
        self.first_failure = ""
        self.failed_path = out.with_suffix(".failed.jsonl")
        self._prompts: dict[str, tuple[int, int]] = {}  # of the rows: how many, and their hash
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.touch()
        except OSError as error:
            raise DataError(f"out={out} cannot be written: {error.strerror}") from None
        self._settle(out.with_suffix(".json"), {"format": FORMAT, **settings})
        _cut_half_line(out)
        self._read()

    def __enter__(self) -> Self:
        self.failed_path.unlink(missing_ok=True)  # what failed is asked again
        self.failed.clear()
        self.first_failure = ""
        self._answers = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._answers.close()

    def holds(self, dialogue: Dialogue) -> bool:
        """Whether the file held this sample when it was opened."""
        return dialogue.id in self._prompts

    def resume(self, dialogues: Iterable[Dialogue]) -> int:
        """How many of `dialogues`, the whole data, the file holds; `unused` is the rest of it.

        Raises DataError when it holds one of them with other prompts: the data have changed since.
        """
        held = 0
        for dialogue in filter(self.holds, dialogues):
            held += 1
            count, digest = self._prompts[dialogue.id]
            if hash(dialogue.prompts[:count]) != digest:
                raise DataError(
                    f"{self.path} holds a sample {dialogue.id} with other prompts than the data "
                    "have under that id; give another out, or delete it to answer again"
                )
        self.unused = self.counts.rows - held
        return held

    def append(self, dialogue: Dialogue) -> None:
        """Write a finished or failed sample; it survives the death of this process."""
        if dialogue.failure is None:
            row = dialogue.row()
            self._answers.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._answers.flush()
            self.counts.add(row)
            return
        failure = dialogue.failure
        self.failed[failure.reason] += 1
        self.first_failure = self.first_failure or f"{failure.reason} ({failure.detail})"
        row = {"id": dialogue.id, "reason": failure.reason, "detail": failure.detail}
        with self.failed_path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    def part(self, number: int) -> AnswerFile:
        """A file of its own for process `number` of several."""
        path = self.path.with_name(f"{self.path.stem}.part-{number:04d}.jsonl")
        return AnswerFile(path, self._settings)

    def collect(self) -> None:
        """Take over what processes left in their parts, which then go."""
        for path in sorted(self.path.parent.glob(f"{self.path.stem}.part-????.jsonl")):
            self._absorb(AnswerFile(path, self._settings))

    def _absorb(self, part: AnswerFile) -> None:
        # a row that stands here already, because a process died in mid-way, is not taken twice
        for _, row in read_jsonl(part.path):
            if row["id"] not in self._prompts:
                self._answers.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._remember(row)
        self._answers.flush()
        os.fsync(self._answers.fileno())
        if part.failed_path.exists():
            with self.failed_path.open("a", encoding="utf-8") as lines:
                lines.write(part.failed_path.read_text(encoding="utf-8"))
            for _, row in read_jsonl(part.failed_path):
                self.failed[row["reason"]] += 1
                self.first_failure = self.first_failure or f"{row['reason']} ({row['detail']})"
        for path in (part.path, part.failed_path, part.path.with_suffix(".json")):
            path.unlink(missing_ok=True)

    def _read(self) -> None:
        for number, row in read_jsonl(self.path):
            try:
                self._remember(row)
            except (KeyError, TypeError):
                raise DataError(
                    f"{self.path}, line {number}: not a row of answers; delete the line, or give "
                    "another out"
                ) from None

    def _remember(self, row: dict[str, Any]) -> None:
        if row["id"] in self._prompts:
            self.counts.repeated += 1
            return
        self.counts.add(row)
        prompts = prompts_of(row["messages"])
        self._prompts[row["id"]] = (len(prompts), hash(prompts))

    def _settle(self, path: Path, settings: dict[str, Any]) -> None:
        """Hold `settings` against those on file, or put them there before the first row."""
        if not self.path.stat().st_size:
            with suppress(OSError, ValueError):
                if parse_json(path.read_bytes()) == settings:
                    return  # another process of the job has put them there
            write_text(path, json.dumps(settings, indent=2) + "\n")
            return
        try:
            found = parse_json(path.read_bytes())
            if not isinstance(found, dict):
                raise ValueError("no object")
        except (OSError, ValueError):
            raise DataError(
                f"{self.path} has rows, but {path.name} beside it, which says how they were made, "
                "is missing or unreadable; give another out, or delete the rows"
            ) from None
        different = [
            f"{key} is {found.get(key)!r} there and {settings.get(key)!r} here"
            for key in {**settings, **found}
            if found.get(key) != settings.get(key)
            and (key in found or not key.startswith(ALL))  # which older versions did not record
        ]
        if different:
            raise DataError(
                f"{self.path} holds answers of other settings ({'; '.join(different)}); give "
                "another out, or delete it to ask again"
            )


def _cut_half_line(path: Path) -> None:
    """Drop what a killed process left behind the last newline."""
    with path.open("rb") as lines:
        whole = sum(len(line) for line in lines if line.endswith(b"\n"))
    os.truncate(path, whole)
