"""A `deepspec train` that notes what of its training is alive when its evaluation begins.

NOTES.json train recipe=... key=value ...
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from deepspec.cli import main
from deepspec.commands import stages

TRAINING = {"AdamW", "Distillation", "Trainer", "AcceleratedOptimizer"}
DEEPSPEED = ("DeepSpeedEngine", "DeepSpeedZeroOptimizer")


def storages(tensors: Any) -> dict[int, int]:
    """Bytes by address: views share theirs."""
    kept = (tensor.untyped_storage() for tensor in tensors if not tensor.is_meta)
    return {storage.data_ptr(): storage.nbytes() for storage in kept if storage.nbytes()}


def alive() -> tuple[list[str], dict[int, int]]:
    """What belongs to a training, by class, and the storages of all tensors; as it is, without a
    collection by the test."""
    objects = gc.get_objects()
    names = (type(thing).__name__ for thing in objects)
    left = [name for name in names if name in TRAINING or name.startswith(DEEPSPEED)]
    kinds = [thing for thing in objects if issubclass(type(thing), Tensor)]
    return left, storages(kinds)


def run(given: list[str]) -> None:
    """Train; the first of the words `given`, a file, gets what was alive."""
    notes, words = Path(given[0]), given[1:]
    evaluate = stages.evaluate_drafter

    def noting(source: Any, target: Any, drafter: Any, out: Path) -> Any:
        left, found = alive()
        needed = [
            *target.model.parameters(),
            *target.model.buffers(),
            *drafter.state_dict().values(),
        ]
        others = found.keys() - storages([*needed, target.embedding, target.head.weight]).keys()
        weights = sum(parameter.nbytes for parameter in drafter.parameters())
        row = {"left": left, "bytes": sum(found[place] for place in others), "weights": weights}
        notes.write_text(json.dumps(row))
        return evaluate(source, target, drafter, out)

    stages.evaluate_drafter = noting
    try:
        main(words)
    finally:
        stages.evaluate_drafter = evaluate
