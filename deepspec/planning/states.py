"""What an engine holds a process: fp32 weights, gradients, AdamW's moments, DeepSpeed's buffers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from deepspec.planning.shapes import FP32, Job

LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters, which the engine leaves as it is


@dataclass(frozen=True)
class States:
    """Bytes on one device; `host` is what engine.offload=cpu puts beside it, a process.

    `weights` and `optimizer` are there from the first step on, and so is `staying`. `gathered`:
    whole weights during forward and backward. `waiting`: gradients during a forward; `gradients`
    from the backward to the update. `buffers` during the backward. `update`: what AdamW allocates.
    """

    weights: int
    optimizer: int
    gradients: int
    update: int
    waiting: int = 0
    gathered: int = 0
    buffers: int = 0
    staying: int = 0
    host: int = 0


def engine_states(job: Job) -> States:
    """See `States`; each stage of ZeRO shards one thing more over the processes."""
    kind, shapes = job.config.engine.kind, job.shapes
    whole, largest = shapes.trainable * FP32, max(shapes.parameters) * FP32
    several = job.micro_batches > 1  # gradients of the step's earlier ones wait for the last
    if kind not in ("single", "zero0"):
        states = _sharded(job, whole, largest, several)
        return _offloaded(states) if job.config.engine.offload == "cpu" else states
    # CUDA updates all parameters at once, with a temporary as large; a processor one by one, with
    # two, while the one before still holds its own
    one_by_one = max(before + 2 * own for before, own in pairwise((0, *shapes.parameters)))
    update = whole if job.cuda else one_by_one * FP32
    return States(whole, 2 * whole, whole, update, waiting=whole if several else 0)


def _sharded(job: Job, whole: int, largest: int, several: bool) -> States:
    config = job.config.engine
    share, bucket = -(-whole // job.world), config.bucket_size * FP32
    # moments, and fp32 weights apart from those that the forward reads, although these are fp32;
    # a shard is one flat parameter, and AdamW takes two temporaries as large
    optimizer, update = 3 * share, 2 * share
    if config.kind == "zero1":
        waiting, staying = (whole, bucket) if several else (0, 0)
        buffers = 0 if several else bucket
        return States(whole, optimizer, whole, update, waiting, 0, buffers, staying)
    if config.kind == "zero2":
        # a parameter on the border of a shard is kept whole; accumulated and new ones lie apart
        kept = min(2 * (share + largest), 2 * whole) if several else 0
        bucket *= 2 if config.overlap_comm else 1  # one is reduced while the other fills
        return States(whole, optimizer, max(share, kept), update, kept, 0, bucket)
    small = FP32 * sum(n for n in job.shapes.parameters if n < config.persistence_threshold)
    # a module at least, and not let go before the step ends
    gathered = min(whole - small, max(LIVE_PARAMETERS, job.shapes.largest) * FP32)
    return States(share + small, optimizer, share, update, share, gathered, 0, bucket)


def _offloaded(states: States) -> States:
    """Optimizer, a copy of its gradients and a way back for the weights are beside the device."""
    share = states.optimizer // 3
    host = states.optimizer + 2 * share + states.update
    return replace(states, optimizer=0, gradients=0, waiting=0, update=0, host=host)
