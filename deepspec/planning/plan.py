"""One config's plan: rows to show, and whether it fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepspec.features.encoding import token_bytes as encoded_bytes
from deepspec.features.store_index import TOKEN_BYTES
from deepspec.planning.memory import Memory, checkpoint_bytes, memory_of
from deepspec.planning.shapes import Job, MicroBatch
from deepspec.planning.work import batch_flops
from deepspec.planning.workload import Workload


def token_bytes(job: Job, dtype: str) -> int:
    """Bytes of one token of stored features, its id and its mask; on the wire it is these less.

    The most: of drafters that do not read final states, a token that no supervised one follows has
    none, and how many those are the data alone says.
    """
    shape = job.shapes.drafter
    return encoded_bytes(dtype, len(shape.target_layer_ids), shape.hidden_size) + TOKEN_BYTES


@dataclass(frozen=True)
class Plan:
    """What `job` needs on `workload`. Sizes in bytes.

    `steps_an_epoch` and `steps` are None where the number of samples is not known. `step_flops`:
    floating-point operations of an average step, all processes together.
    """

    job: Job
    workload: Workload
    batch: MicroBatch
    memory: Memory
    checkpoint: int
    steps_an_epoch: int | None
    steps: int | None
    step_flops: float

    def hours(self, flops: float) -> float | None:
        """Of all steps, where a device does `flops` a second; answers are not in it."""
        if self.steps is None:
            return None
        return self.steps * self.step_flops / (flops * self.job.world) / 3600

    @property
    def need(self) -> int:
        """Bytes of a device's memory; where processors train, `host` is no other memory."""
        return self.memory.peak + (0 if self.job.cuda else self.memory.host)

    @property
    def checkpoints(self) -> int:
        """Most on disk at a time: the newest ones, the best, and the one being written."""
        training = self.job.config.training
        most = training.keep_last + 2
        if self.steps is not None:
            most = min(most, math.ceil(self.steps / training.save_every))
        return most * self.checkpoint


def make_plan(job: Job, workload: Workload) -> Plan:
    """The plan of one config."""
    training, batch = job.config.training, workload.largest(job.config)
    steps_an_epoch = steps = None
    if workload.samples is not None:
        steps_an_epoch = math.ceil(workload.samples / training.batch_size)
        steps = max(1, round(training.epochs * steps_an_epoch))
    if training.max_steps is not None:
        steps = min(training.max_steps, steps or training.max_steps)
    typical = workload.typical(job.config)
    return Plan(
        job,
        workload,
        batch,
        memory_of(job, batch),
        checkpoint_bytes(job),
        steps_an_epoch,
        steps,
        training.batch_size * batch_flops(job, typical) / len(typical.contexts),
    )


@dataclass(frozen=True)
class Room:
    """Bytes there are: on a device (None: unknown) and on the disk of `out=`."""

    device: int | None
    disk: int
