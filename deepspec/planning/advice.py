"""What would make a plan fit: candidates are planned again, cheapest first, none is guessed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

from deepspec.config.validation import value_of
from deepspec.planning.shapes import BF16, Job

Change = dict[str, object]
STAGES = ("zero1", "zero2", "zero3")
SMALL_BUCKET = 5_000_000


def advise(job: Job, fits: Callable[[Job], bool]) -> Change | None:
    """The first change under which `fits(job)` holds, by key; None where nothing helps.

    Each candidate alone, in order of its cost; then the first ones together.
    """
    candidates = list(_candidates(job))
    together: Change = {}
    for change in candidates:
        if fits(changed(job, change)):
            return change
    for change in candidates:
        together |= change  # a later stage takes an earlier one's place
        if fits(changed(job, together)):
            return together
    return None


def changed(job: Job, change: Change) -> Job:
    """The same job under other settings."""
    config = copy.deepcopy(job.config)
    for key, value in change.items():
        group, _, name = key.rpartition(".")
        setattr(value_of(config, group), name, value)
    return replace(job, config=config)


def _candidates(job: Job) -> Iterator[Change]:
    config = job.config
    # the same result with less memory, a little slower
    if config.objective.implementation == "eager":
        yield {"objective.implementation": "fused"}
    if config.training.micro_batch_size > 1:
        yield {"training.micro_batch_size": 1}
    if config.objective.chunk_size > 64:
        yield {"objective.chunk_size": 64}
    kind = config.engine.kind
    further = [stage for stage in STAGES if stage > kind] if kind in STAGES else list(STAGES)
    if job.world > 1:
        for stage in further:
            yield {"engine.kind": stage}
    if kind in STAGES and config.engine.bucket_size > SMALL_BUCKET:
        yield {"engine.bucket_size": SMALL_BUCKET}
    if config.engine.offload == "none":
        yield {"engine.kind": kind if kind in STAGES else "zero2", "engine.offload": "cpu"}
    # another result, or another target
    if job.value > BF16:
        yield {"target.dtype": "bfloat16"}
    if config.training.anchors_per_sample > 128:
        yield {"training.anchors_per_sample": 128}
    if config.data.max_length > 1024:
        yield {"data.max_length": 1024}
