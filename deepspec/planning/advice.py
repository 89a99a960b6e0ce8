"""What would make a plan fit: candidates are planned again, cheapest first, none is guessed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

from deepspec.config.validation import RECOMPUTABLE, validate, value_of
from deepspec.errors import ConfigError
from deepspec.planning.shapes import BF16, Job
from deepspec.targets.parallel import check_split

Change = dict[str, object]
STAGES = ("zero1", "zero2", "zero3")
SMALL_BUCKET = 5_000_000


def advise(job: Job, need: Callable[[Job], int], room: int) -> Change | None:
    """The first change under which `need(job)` is at most `room`, by key; None: nothing helps.

    Each candidate alone, in order of its cost; then one after the other together, those that help.
    One that `deepspec train` would refuse is none, unless it refuses `job` already.
    """
    fine = _trains if _trains(job) else lambda _: True
    candidates = [change for change in _candidates(job) if fine(changed(job, change))]
    together: Change = {}
    least = need(job)
    for change in candidates:
        if need(changed(job, change)) <= room:
            return change
    for change in candidates:
        further = together | change  # a later stage takes an earlier one's place
        then = changed(job, further)
        if fine(then) and (wanted := need(then)) < least:
            together, least = further, wanted
        if least <= room:
            return together
    return None


def changed(job: Job, change: Change) -> Job:
    """The same job under other settings."""
    config = copy.deepcopy(job.config)
    for key, value in change.items():
        group, _, name = key.rpartition(".")
        setattr(value_of(config, group), name, value)
    return replace(job, config=config)


def _trains(job: Job) -> bool:
    try:
        validate(job.config)
        check_split(job.config)
    except ConfigError:
        return False
    return True


def _candidates(job: Job) -> Iterator[Change]:
    config = job.config

    def off(*keys: str) -> Change:
        return {key: False for key in keys if value_of(config, key)}

    # the same result with less memory, a little slower
    if config.objective.implementation == "eager":
        yield {"objective.implementation": "fused"}
    if config.training.micro_batch_size > 1:
        yield {"training.micro_batch_size": 1}
    if config.objective.chunk_size > 64:
        yield {"objective.chunk_size": 64}
    training = config.training
    if not training.activation_checkpointing and config.drafter.kind in RECOMPUTABLE:
        yield {"training.activation_checkpointing": True}
    kind = config.engine.kind
    further = [stage for stage in STAGES if stage > kind] if kind in STAGES else list(STAGES)
    if job.world > 1:
        for stage in further:
            yield {"engine.kind": stage}
    if kind in STAGES and config.engine.bucket_size > SMALL_BUCKET:
        yield {"engine.bucket_size": SMALL_BUCKET}
    if config.engine.offload == "none":
        started = {} if kind in STAGES else {"engine.kind": "zero2"}
        yield {**started, "engine.offload": "cpu"}
    if config.features.source in ("online", "hybrid"):
        if job.world > 1 and config.target.parallel == "replicated":
            yield {"target.parallel": "zero3", **off("features.overlap", "evaluation.enabled")}
        path = config.features.path or "DIR"
        yield {"features.source": "stored", "features.path": path, **off("features.overlap")}
    # another result, or another target
    if job.value > BF16:
        yield {"target.dtype": "bfloat16"}
    if config.training.anchors_per_sample > 128:
        yield {"training.anchors_per_sample": 128}
    if config.data.max_length > 1024:
        yield {"data.max_length": 1024}
