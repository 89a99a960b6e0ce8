"""What real training steps allocate, beside what the plan of the same config says.

    torchrun --nproc-per-node 2 -m tests.planning.measuring OUT WORDS then WORDS ...

WORDS: sample lengths `60,200,30`, then settings of recipe=tiny; a step is one micro-batch a process
unless they say otherwise. On a processor every byte is counted that torch's allocator gives and
takes (torch.profiler's memory events, also those inside kernels): the same in every run, unlike the
resident set. On CUDA it is the allocator's own peak.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile, record_function

import deepspec.training.distillation
from deepspec.config.loading import load_config
from deepspec.drafters.registry import drafter_kind
from deepspec.features.sources import Online
from deepspec.objective import compute_loss
from deepspec.planning.plan import make_plan
from deepspec.planning.shapes import Job, shapes_of
from deepspec.planning.workload import Workload
from deepspec.processes import rank
from deepspec.records import Sample
from deepspec.targets import load_target
from deepspec.training.engine import open_engine
from deepspec.training.run_folder import RunFolder
from deepspec.training.trainer import Trainer

PROMPT = 8
MARK = "moment: "


def peaks(work: Callable[[], Any], device: str = "cpu") -> dict[str, int]:
    """Most bytes alive that `work` allocated: in all, and in its marked moments (not on CUDA)."""
    gc.collect()  # what an earlier call left would be counted when it goes
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return {"all": torch.cuda.max_memory_allocated() - before}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    changes, marks = [], []
    for event in recorded.profiler.kineto_results.events():
        name, start = event.name(), event.start_ns()
        if name == "[memory]":
            changes.append((start, event.nbytes()))
        elif name.startswith(MARK):
            marks.append((name.removeprefix(MARK), start, start + event.duration_ns()))
    found, alive = {"all": 0}, 0
    for when, size in sorted(changes):
        alive += size
        for name in ["all", *(name for name, start, end in marks if start <= when <= end)]:
            found[name] = max(found.get(name, 0), alive)
    return found


def mark(holder: Any, name: str, moment: str) -> None:
    """Calls of `holder.name` are marked as `moment`."""
    original = getattr(holder, name)

    def marked(*arguments: Any, **options: Any) -> Any:
        with record_function(MARK + moment):
            return original(*arguments, **options)

    setattr(holder, name, marked)


def measure(out: Path, lengths: list[int], words: list[str]) -> dict[str, Any]:
    """One config in the run folder `out`: {"planned": ..., "measured": ...}, by name."""
    AcceleratorState._reset_state()
    config = load_config("tiny", ["engine.device=cpu", *words])
    target = load_target(config.target, "cpu")
    samples = [
        Sample(torch.arange(n) % 4000, torch.arange(n) >= PROMPT, f"s{i}")
        for i, n in enumerate(lengths)
    ]
    made: list[Trainer] = []

    def build_and_train() -> None:
        kind = drafter_kind(config.drafter.kind)
        drafter = kind.build(kind.resolve(config.drafter, target))
        run = RunFolder(out).__enter__()
        engine = open_engine(config.engine, config.training, config.tracking, run.path)
        source = Online(target, kind.all_finals)
        trainer = Trainer(config, target, source, drafter, samples, [], run, engine)
        made.append(trainer)
        trainer.train_step()  # makes AdamW's moments
        mark(trainer.source, "features", "target")
        mark(deepspec.training.distillation, "compute_loss", "objective")
        mark(engine, "backward", "backward")
        mark(engine, "update", "update")
        trainer.train_step()

    with patch.object(deepspec.training.distillation, "compute_loss", compute_loss):
        moments = peaks(build_and_train)
    trainer, folder = made[0], made[0].save()
    job = Job(config, shapes_of(target, config.drafter), trainer.engine.world, cuda=False)
    answers = tuple((n, n - PROMPT) for n in lengths)
    plan = make_plan(job, Workload(len(lengths), answers, True, "test"))
    own = sum(p.numel() * p.element_size() for p in target.model.parameters())
    return {
        "planned": {
            "moments": {**plan.memory.moments, "all": plan.memory.peak},
            "parts": plan.memory.parts,
            "checkpoint": plan.checkpoint,
            "steps": plan.steps,
        },
        "measured": {
            "moments": {name: size + own for name, size in moments.items()},
            "parts": {"target weights": own, **resting(trainer)},
            "checkpoint": sum(f.stat().st_size for f in folder.iterdir()) if rank() == 0 else 0,
            "steps": trainer.total_steps,
        },
    }


def resting(trainer: Trainer) -> dict[str, int]:
    """Bytes of what one process keeps from step to step, and of the gradients."""
    if trainer.config.engine.kind != "single":
        return {}
    drafter, optimizer = trainer.engine._drafter, trainer.engine._optimizer.optimizer
    samples, batch = trainer.blocks_of(trainer.micro_batches(0)[0], 0)
    trainer.loss_of(samples, batch, 1.0)[0].loss.backward()
    parameters = list(drafter.parameters())
    moments = [m for state in optimizer.state.values() for m in state.values() if m.ndim]
    return {
        "drafter weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "optimizer": sum(moment.nbytes for moment in moments),
    }


def main() -> None:
    """Measure the configs of the command line; rank 0 writes their list to OUT."""
    torch.set_num_threads(1)
    out, *words = sys.argv[1:]
    jobs: list[list[str]] = [[]]
    for word in words:
        if word == "then":
            jobs.append([])
        else:
            jobs[-1].append(word)
    rows = []
    for number, (lengths, *settings) in enumerate(jobs):
        folder = Path(out).with_name(f"run-{number}")
        rows.append(measure(folder, [int(n) for n in lengths.split(",")], settings))
    if rank() == 0:
        Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
