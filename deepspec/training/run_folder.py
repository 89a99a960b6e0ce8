"""A run's folder: who may write in it, and what lies where.

config.yaml        the resolved config, defaults included
answers.jsonl      the training conversations, answered by the target
skipped.json       rows left out, by stage and reason
metrics.jsonl      a row an event of the training; lines found damaged: metrics.damaged.jsonl
checkpoints/       step-N folders, newest and best
features/          the target's features, where features=hybrid keeps them
export/            the best drafter in the layout of `export.format`
traces.jsonl       a row a decoding round of the evaluation
report.json|md|html
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from deepspec.atomic import write_text
from deepspec.config.schema import RunConfig, as_dict
from deepspec.errors import TrainingError
from deepspec.json_files import read_as
from deepspec.outputs import FOLDER, RUN, claim, hold, make_folder
from deepspec.processes import rank


class RunFolder:
    """`with RunFolder(path) as folder:` holds the folder against other jobs.

    Of a job's processes the main one holds it and writes in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.answers = path / "answers.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.skipped = path / "skipped.json"
        self.checkpoints = path / "checkpoints"
        self.features = path / "features"
        self.export = path / "export"
        self.traces = path / "traces.jsonl"
        self._held = ExitStack()

    def __enter__(self) -> Self:
        if rank() == 0:  # the others may look while it writes
            claim(self.path, RUN)
        make_folder(self.path)
        self._held.enter_context(hold(self.path, FOLDER))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def save_config(self, config: RunConfig) -> None:
        """Write the resolved config."""
        text = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
        write_text(self.config, text)

    def save_skipped(self, skipped: dict[str, dict[str, int]]) -> None:
        """Write the rows left out, by stage and reason; whole or not at all."""
        write_text(self.skipped, json.dumps(skipped, indent=2) + "\n")

    def read_skipped(self) -> dict[str, dict[str, int]]:
        """What `save_skipped` wrote; nothing where it never did."""
        if not self.skipped.is_file():
            return {}
        return read_as(dict[str, dict[str, int]], self.skipped, TrainingError, "delete it")
