"""One config's plan: rows to show, and whether it fits."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from deepspec.planning.memory import Memory, checkpoint_bytes, memory_of
from deepspec.planning.shapes import BF16, FP32, Job, MicroBatch
from deepspec.planning.workload import Workload

TOKEN_ID, MASK = 4, 1  # bytes of a token beside its features: int32 and bool


def token_bytes(job: Job, fp8: bool = False) -> int:
    """Bytes of one token of stored or remote features: (L+1)*D numbers, its id and its mask.

    bf16: 2 a number. FP8: 1 a number, and an fp32 scale for each of the L+1 states.
    """
    states = len(job.shapes.drafter.target_layer_ids) + 1
    numbers = states * job.shapes.drafter.hidden_size
    return (numbers + states * FP32 if fp8 else numbers * BF16) + TOKEN_ID + MASK


@dataclass(frozen=True)
class Plan:
    """What `job` needs on `workload`. Sizes in bytes.

    `steps_an_epoch` and `steps` are None where the number of samples is not known.
    """

    job: Job
    workload: Workload
    batch: MicroBatch
    memory: Memory
    checkpoint: int
    steps_an_epoch: int | None
    steps: int | None

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
    return Plan(
        job, workload, batch, memory_of(job, batch), checkpoint_bytes(job), steps_an_epoch, steps
    )


def free_disk(out: str) -> int:
    """Free bytes where the folder `out` is, or will be."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@dataclass(frozen=True)
class Room:
    """Bytes there are: on a device (None: unknown) and on the disk of `out=`."""

    device: int | None
    disk: int
