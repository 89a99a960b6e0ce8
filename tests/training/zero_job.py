"""A training job for tests, in each of its processes: train some steps, maybe from a checkpoint.

    FOLDER STEPS RESUME key=value ...

Several jobs may follow each other in one process (separated by the word `then`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from deepspec.config.loading import config_from
from deepspec.processes import rank
from deepspec.targets import load_target
from deepspec.training.checkpoint import read_checkpoint
from tests.trainers import SETTINGS, build_trainer


def train(words: list[str]) -> None:
    """Run the jobs of the command line `words`."""
    torch.set_num_threads(1)
    jobs: list[list[str]] = [[]]
    for word in words:
        if word == "then":
            jobs.append([])
        else:
            jobs[-1].append(word)
    for folder, steps, resume, *overrides in jobs:
        AcceleratorState._reset_state()
        wanted = replace(config_from(SETTINGS, overrides).target, num_layer_ids=3)
        trainer = build_trainer(partial(load_target, wanted, "cpu"), Path(folder), *overrides)
        if resume != "new":
            trainer.resume(read_checkpoint(Path(resume)))
        losses, seen = [], []
        while trainer.step < int(steps):
            seen += [s.sample_id for micro in trainer.micro_batches(trainer.step) for s in micro]
            metrics = trainer.train_step()
            losses.append([metrics["loss"], metrics["gradient_norm"], metrics["accept_length"]])
        validation = trainer.validate()
        trainer.save()
        row = {"losses": losses, "seen": seen, "validation": validation}
        Path(folder, f"rank{rank()}.json").write_text(json.dumps(row))
    trainer.engine.close()
