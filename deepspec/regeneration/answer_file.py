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
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deepspec.data.files import read_jsonl
from deepspec.errors import DataError
from deepspec.regeneration.dialogue import Dialogue

FORMAT = 1


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
        self.rows = self.truncated = self.altered = 0
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
        """How many of `dialogues`, the whole data, the file holds.

        Raises DataError when it holds any other sample: the data has changed since.
        """
        held = 0
        for dialogue in filter(self.holds, dialogues):
            held += 1
            count, digest = self._prompts[dialogue.id]
            if hash(dialogue.prompts[:count]) != digest:
                raise DataError(
                    f"{self.path} holds a sample {dialogue.id} with other prompts than the data "
                    "has under that id; give another out, or delete it to ask again"
                )
        if held < self.rows:
            raise DataError(
                f"{self.path} holds {self.rows - held} samples that are not in the data "
                "(data.path, data.limit or data.fields changed); give another out, or delete it"
            )
        return held

    def append(self, dialogue: Dialogue) -> None:
        """Write a finished or failed sample; it survives the death of this process."""
        if dialogue.failure is None:
            row = dialogue.row()
            self._answers.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._answers.flush()
            self._count(row)
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
        self._count(row)
        prompts = tuple(m["content"] for m in row["messages"] if m["role"] == "user")
        self._prompts[row["id"]] = (len(prompts), hash(prompts))

    def _count(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.truncated += row["finish_reason"] == "length"
        self.altered += row.get("altered", False)

    def _settle(self, path: Path, settings: dict[str, Any]) -> None:
        """Hold `settings` against those on file, or put them there before the first row."""
        if not self.path.stat().st_size:
            with suppress(OSError, ValueError):
                if json.loads(path.read_text(encoding="utf-8")) == settings:
                    return  # another process of the job has put them there
            partial = path.with_suffix(".json.partial")
            partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise DataError(
                f"{self.path} has rows, but {path.name} beside it, which says how they were made, "
                "is missing or unreadable; give another out, or delete the rows"
            ) from None
        different = [
            f"{key} is {found.get(key)!r} there and {settings.get(key)!r} here"
            for key in {**settings, **found}
            if found.get(key) != settings.get(key)
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
