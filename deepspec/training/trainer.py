"""The training loop. Start at `Trainer.train_step`: that is the whole algorithm.

What a step sees is a function of (seed, step): batches, anchors and the learning rate have no state
of their own, so a resumed run goes on exactly where it was. Several processes share the samples of
a step; every one runs this loop, and all of them together do what one alone would.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from deepspec.config.schema import RunConfig, TrainingConfig, as_dict
from deepspec.data.anchors import draw_anchors
from deepspec.data.batching import epoch_batches, split_batch
from deepspec.data.blocks import build_blocks
from deepspec.drafters.base import Drafter
from deepspec.drafters.registry import drafter_kind
from deepspec.errors import Interrupted, TrainingError
from deepspec.features.sources import FeatureSource
from deepspec.objective import LossOutput
from deepspec.progress import Progress
from deepspec.records import BlockBatch, Sample
from deepspec.targets import TargetEnds
from deepspec.training.checkpoint import (
    OPTIMIZER,
    WEIGHTS,
    Checkpoint,
    list_checkpoints,
    prune,
    read_tensors,
    save_checkpoint,
    step_folder,
)
from deepspec.training.distillation import Distillation
from deepspec.training.engine import Engine
from deepspec.training.metrics import MetricsLog, Ratios
from deepspec.training.resume import named_start
from deepspec.training.run_folder import RunFolder
from deepspec.training.speed import Speed
from deepspec.training.tracking import start_trackers

VALIDATION_EPOCH = -1  # anchors of validation samples are drawn once and for all


class Trainer:
    """Distils one drafter from one frozen target."""

    def __init__(
        self,
        config: RunConfig,
        target: TargetEnds,
        source: FeatureSource,
        drafter: Drafter,
        samples: Sequence[Sample],
        validation: Sequence[Sample],
        folder: RunFolder,
        engine: Engine,
        speed: Speed | None = None,
    ) -> None:
        if not samples:
            raise TrainingError("no sample to train on; see the skipped rows above and data.path")
        self.config, self.target, self.source = config, target, source
        self.samples, self.validation = samples, validation
        self.folder = folder
        self.engine = engine
        self.speed = speed
        self.shape = drafter.config
        # the tokens it drafts are fixed from here on
        self._d2t = None if drafter.d2t is None else drafter.d2t.cpu()
        self.distillation: Any = engine.prepare(Distillation(drafter, target, config))
        self._loads = [self._load(sample) for sample in samples]
        self._shortest = min(samples, key=len)
        training = config.training
        self.steps_an_epoch = math.ceil(len(samples) / training.batch_size)
        self.total_steps = max(1, round(training.epochs * self.steps_an_epoch))
        if training.max_steps is not None:
            self.total_steps = min(self.total_steps, training.max_steps)
        self.step = 0
        self._waited = 0.0  # seconds of this step until features were there
        self._coming = self._order()
        self._expected = 0  # micro-batches that the source has heard of and not been asked for
        self._signal: int | None = None
        self._validation: dict[str, float] = {}  # of the weights as they are

    # ------------------------------------------------------------------------------- one step

    def train_step(self) -> dict[str, float]:
        """One optimizer step: sample anchors, capture features, forward, objective, update."""
        begun, self._waited = time.perf_counter(), 0.0
        micro_batches = [self.blocks_of(samples) for samples in self.micro_batches(self.step)]
        # decision 2: every term is divided by the weight of the whole step, known beforehand
        (denominator,) = self.engine.sum(sum(float(b.weights.sum()) for _, b in micro_batches))
        ratios, loss = Ratios(), 0.0
        for samples, batch in micro_batches:
            self._expect()
            output, batch = self.loss_of(samples, batch, denominator)
            self._require_finite("loss", float(output.loss.detach()), batch.sample_ids)
            self.engine.backward(output.loss)
            loss += float(output.loss.detach())
            ratios.add_loss(output, batch)
        rate = learning_rate(self.step, self.total_steps, self.config.training)
        norm = self.engine.update(rate)
        # what is not finite here is not saved: the last checkpoint stays good
        ids = [sample_id for _, batch in micro_batches for sample_id in batch.sample_ids]
        self._require_finite("gradient norm", norm, ids)
        self.step += 1
        self._validation = {}
        (loss,) = self.engine.sum(loss)
        ratios.add("feature_wait", self._waited, time.perf_counter() - begun)
        return {
            "step": self.step,
            "loss": loss,
            **ratios.divided(self.engine.sum),
            "learning_rate": rate,
            "gradient_norm": norm,
        }

    def micro_batches(self, step: int) -> list[list[Sample]]:
        """This process's samples of `step`, cut into micro-batches: as many in every process."""
        epoch, index = divmod(step, self.steps_an_epoch)
        training = self.config.training
        batches = epoch_batches(len(self.samples), training.batch_size, self.config.seed, epoch)
        return self._share(self.samples, self._loads, batches[index])

    def _load(self, sample: Sample) -> int:
        """What a sample costs: its tokens and, at most, its slots."""
        anchors = min(self.config.training.anchors_per_sample, int(sample.loss_mask.sum()))
        return len(sample) + anchors * self.shape.block_size

    def _share(
        self, samples: Sequence[Sample], loads: Sequence[int], batch: Sequence[int]
    ) -> list[list[Sample]]:
        engine, size = self.engine, self.config.training.micro_batch_size
        own = split_batch(batch, loads, engine.world, size)[engine.rank]
        return [[samples[index] for index in micro] for micro in own]

    def blocks_of(
        self, samples: Sequence[Sample], epoch: int | None = None
    ) -> tuple[Sequence[Sample], BlockBatch]:
        """Blocks of `samples` at this epoch's anchors.

        Without a sample, blocks that weigh nothing: a process whose share is empty still takes part
        in every collective of a sharded forward and backward.
        """
        if not samples:
            samples, batch = self.blocks_of([self._shortest], epoch)
            return samples, replace(batch, weights=torch.zeros_like(batch.weights))
        epoch = self.step // self.steps_an_epoch if epoch is None else epoch
        count = self.config.training.anchors_per_sample
        anchors = [draw_anchors(sample, count, self.config.seed, epoch) for sample in samples]
        decay = self.config.objective.decay or float(self.shape.block_size)
        return samples, build_blocks(samples, anchors, self.shape.block_size, decay)

    def _order(self) -> Iterator[Sequence[Sample]]:
        """What the source will be asked for, micro-batch after micro-batch to the last step."""
        for step in range(self.step, self.total_steps):
            for samples in self.micro_batches(step):
                yield samples or [self._shortest]

    def _expect(self) -> None:
        """Before a micro-batch: tell the source of it and of the `features.prefetch` behind it."""
        for samples in islice(self._coming, 1 + self.config.features.prefetch - self._expected):
            self.source.expect(samples)
            self._expected += 1
        self._expected -= 1

    def loss_of(
        self, samples: Sequence[Sample], batch: BlockBatch, denominator: float
    ) -> tuple[LossOutput, BlockBatch]:
        """Features of the frozen target, the drafter's forward, and the objective."""
        batch = batch.to(self.engine.device)
        begun = time.perf_counter()
        features = self.source.features(samples)
        features = features.to(self.engine.device, non_blocking=True)
        if self.engine.device.type == "cuda":  # a target's kernels are queued, not done
            torch.cuda.current_stream(self.engine.device).synchronize()
        self._waited += time.perf_counter() - begun
        fields = self.distillation(features.context, features.final, batch, denominator)
        return LossOutput(*fields), batch

    # ------------------------------------------------------------------------------- the loop

    def train(self) -> None:
        """Train to the last step, with validation, checkpoints and a clean stop on a signal."""
        training, main = self.config.training, self.engine.is_main
        log = MetricsLog(self.folder.metrics, self.step) if main else None
        accelerator = self.engine.accelerator
        start_trackers(accelerator, self.config.tracking, as_dict(self.config), self.folder.path)

        def record(row: dict[str, float]) -> None:
            if log is not None:
                log.write(row)
            accelerator.log(row, step=self.step)

        handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        done, total = self.step, self.total_steps
        try:
            with Progress("train", total, "steps", done=done, show=main) as progress:
                while self.step < total:
                    begun, micro_batches = time.perf_counter(), self.micro_batches(self.step)
                    metrics = self.train_step()
                    seconds = time.perf_counter() - begun
                    stop = self._signal_to_any()
                    last = self.step == total
                    if last or self.step % training.log_every == 0:
                        record(metrics)
                    progress.advance(1, self._note(metrics, micro_batches, seconds))
                    if last or self.step % training.evaluate_every == 0:
                        record(self.validate())
                    if last or stop or self.step % training.save_every == 0:
                        saved = self.save()
                    if self.step % self.steps_an_epoch == 0:
                        self.source.settle(self.engine.wait)
                    if last:  # no later step hears of what came since
                        stop = self._signal_to_any()
                    if stop:
                        raise Interrupted(stop, str(saved))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for tracker in accelerator.trackers:
                tracker.finish()

    def _note(
        self, metrics: dict[str, float], micro_batches: Sequence[Sequence[Sample]], seconds: float
    ) -> str:
        accept, wait = metrics.get("accept_length", 1.0), metrics["feature_wait"]
        note = f"loss {metrics['loss']:.3f}  accept {accept:.2f}  features {wait:.0%}"
        if self.speed is None:
            return note
        anchors = self.config.training.anchors_per_sample
        return f"{note}  {self.speed.note(micro_batches, anchors, seconds)}"

    def validate(self) -> dict[str, float]:
        """Loss terms and expected accepted length on the held-out samples."""
        ratios = Ratios()
        loads = [self._load(sample) for sample in self.validation]
        self.distillation.eval()
        with torch.no_grad():
            for share in self._share(self.validation, loads, range(len(loads))):
                samples, batch = self.blocks_of(share, VALIDATION_EPOCH)
                ratios.add_loss(*self.loss_of(samples, batch, 1.0))
        self.distillation.train()
        self._validation = {
            f"validation_{name}": value for name, value in ratios.divided(self.engine.sum).items()
        }
        return {"step": self.step, **self._validation}

    def save(self) -> Path:
        """A checkpoint of the current step; old ones go, see `prune`.

        Written by the main process while the others wait: when they go on, it is there.
        """
        self.source.settle(self.engine.wait)
        weights, moments = self.engine.weights(), self.engine.optimizer_state()
        description = {
            "step": self.step,
            "kind": self.config.drafter.kind,
            "shape": self.shape.to_dict(),
            "identity": self.target.identity,
            "target": self.target.name,
            "config": as_dict(self.config),
            "metrics": self._validation,
        }
        if self.engine.is_main:
            save_checkpoint(self.folder.checkpoints, weights, moments, description)
            training = self.config.training
            prune(self.folder.checkpoints, training.keep_last, named_start(training))
        self.engine.wait()
        return step_folder(self.folder.checkpoints, self.step)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from `checkpoint`: same weights, moments and place in the data."""
        checkpoint.check_target(self.target.identity)
        shape = self.shape.to_dict()
        its = drafter_kind(checkpoint.kind).load(checkpoint.shape).to_dict()
        if changed := [key for key, value in shape.items() if its.get(key) != value]:
            raise TrainingError(
                f"{checkpoint.folder} holds a drafter of another shape ({', '.join(changed)} "
                "differ); set out= to a new folder, or training.resume=never"
            )
        weights = read_tensors(checkpoint, WEIGHTS)
        own = self._d2t
        if own is not None and not torch.equal(weights.get("d2t", own[:0]), own):
            raise TrainingError(
                f"{checkpoint.folder} drafts other tokens than this run (d2t differs); set out= to "
                "a new folder, or training.resume=never"
            )
        self.engine.restore(weights, read_tensors(checkpoint, OPTIMIZER), checkpoint.step)
        self.step = checkpoint.step
        self._validation = checkpoint.metrics

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number  # acted on after the step, when weights and step agree

    def _signal_to_any(self) -> int | None:
        """A signal to one process is one to all: they save the same step.

        What came since then counts at the next step: only what all know of may be acted on.
        """
        kinds = (signal.SIGTERM, signal.SIGINT)
        heard = self.engine.sum(*(float(self._signal == kind) for kind in kinds))
        return next((kind for kind, count in zip(kinds, heard, strict=True) if count), None)

    def _require_finite(self, what: str, value: float, sample_ids: Sequence[str]) -> None:
        if not math.isfinite(value):
            kept = [entry.name for entry in list_checkpoints(self.folder.checkpoints)]
            raise TrainingError(
                f"the {what} is {value} at step {self.step + 1}; samples: "
                f"{', '.join(sample_ids)}. Lower training.learning_rate, raise "
                "training.warmup_ratio, or try training.precision=fp32; the last checkpoint is "
                f"{kept[-1] if kept else 'none'}"
            )


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """Linear warm-up over `warmup_ratio` of the steps, then cosine to `min_learning_rate`."""
    warmup = max(1, round(config.warmup_ratio * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    low = config.min_learning_rate
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress))
