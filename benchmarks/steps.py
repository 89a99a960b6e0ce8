"""Training steps of random weights at given shapes, and how they are measured; used by the others.

What a step costs depends on shapes and lengths, not on values: features are random, the target's
forward is not part of it. Lengths are drawn like those of recipe=tiny's answers (60 to 257 tokens,
117 on average, the last 58 % of them supervised), stretched to the shape's longest.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from deepspec.config.schema import DrafterConfig, ObjectiveConfig, RunConfig, TrainingConfig
from deepspec.data.anchors import draw_anchors
from deepspec.data.blocks import build_blocks
from deepspec.drafters.dspark import DSparkConfig, DSparkDrafter
from deepspec.machine import describe_machine
from deepspec.planning.shapes import Job, MicroBatch, Shapes
from deepspec.planning.work import drafter_flops, objective_flops
from deepspec.records import BlockBatch, Sample, TargetFeatures
from deepspec.targets import FrozenHead
from deepspec.training.distillation import Distillation


@dataclass(frozen=True)
class Shape:
    """`lengths`: tokens of each sample of the micro-batch; the rest by the names of the configs."""

    vocabulary: int
    hidden: int
    heads: int
    key_value_heads: int
    intermediate: int
    layers: int
    captured: int
    block: int
    rank: int
    anchors: int
    lengths: tuple[int, ...]


def drawn_lengths(samples: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """`samples` lengths of which the longest has `longest` tokens."""
    draw = random.Random(seed)
    shares = [min(1.0, draw.lognormvariate(-0.85, 0.35)) for _ in range(samples)]
    return tuple(max(16, round(longest * share / max(shares))) for share in shares)


# recipe=tiny; the vocabulary of Qwen3 over small hidden states, which a processor does in seconds;
# the same with as many anchors as large recipes have; and Qwen3-4B as recipe=qwen3 trains it
SHAPES = {
    "tiny": Shape(4096, 128, 4, 2, 448, 2, 4, 5, 64, 32, drawn_lengths(4, 170)),
    "tiny16": Shape(4096, 128, 4, 2, 448, 2, 4, 5, 64, 32, drawn_lengths(16, 200)),
    "reduced": Shape(151_936, 256, 4, 2, 896, 2, 5, 7, 64, 32, drawn_lengths(2, 160)),
    "reduced512": Shape(151_936, 256, 4, 2, 896, 2, 5, 7, 64, 512, (700, 340)),
    "4b": Shape(151_936, 2560, 32, 8, 9728, 5, 5, 7, 256, 512, drawn_lengths(2, 4096)),
}


class Problem:
    """A drafter of `shape` and one micro-batch, on `device`; `step` is forward and backward."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        objective: ObjectiveConfig,
        *,
        rows: bool = False,
        **training: Any,
    ) -> None:
        """`rows`: one sample a row, padded to the longest, with as many blocks as the most."""
        cuda = device.type == "cuda"
        precision = "bf16" if cuda else "fp32"
        self.shape, self.device = shape, device
        self.config = RunConfig(
            objective=objective,
            training=TrainingConfig(precision=precision, **training),
            drafter=DrafterConfig(num_layers=shape.layers, block_size=shape.block),
        )
        self.config.features.source = "stored"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drafter = DSparkDrafter(drafter_config(shape)).to(device)
            head = torch.empty(shape.vocabulary, shape.hidden, device=device).normal_(
                std=shape.hidden**-0.5
            )
            if cuda:
                head = head.bfloat16()
            frozen = FrozenHead(head)
            ends: Any = SimpleNamespace(embedding=head, head=frozen, device=device)
            self.module = Distillation(drafter, ends, self.config)
            samples, self.batch = blocks(shape, rows)
            self.batch = self.batch.to(device)
            self.features = features(samples, shape, head.dtype, device)
        self.denominator = float(self.batch.weights.sum())

    def step(self) -> float:
        """Forward and backward; gives the loss."""
        for parameter in self.module.parameters():
            parameter.grad = None
        context, final = self.features.context, self.features.final
        loss = self.module(context, final, self.batch, self.denominator)[0]
        loss.backward()
        return float(loss.detach())

    @property
    def micro_batch(self) -> MicroBatch:
        """As the plan sees it."""
        counts = torch.bincount(self.batch.block_documents).tolist()
        return MicroBatch(self.shape.lengths, tuple(counts), self.shape.block)

    @property
    def job(self) -> Job:
        """As the plan sees it."""
        return Job(self.config, planned_shapes(self.module.drafter), 1, self.device.type == "cuda")

    @property
    def flops(self) -> float:
        """What the plan counts for such a step."""
        return drafter_flops(self.job, self.micro_batch) + objective_flops(
            self.job, self.micro_batch
        )


def drafter_config(shape: Shape) -> DSparkConfig:
    """The drafter's own shape."""
    return DSparkConfig(
        hidden_size=shape.hidden,
        vocab_size=shape.vocabulary,
        num_target_layers=shape.captured + 4,
        target_layer_ids=tuple(range(1, shape.captured + 1)),
        num_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=32 if shape.hidden < 1024 else 128,
        intermediate_size=shape.intermediate,
        block_size=shape.block,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=65_536,
        initializer_range=0.02,
        mask_token_id=0,
        markov_head="vanilla",
        markov_rank=shape.rank,
        confidence_head=True,
        confidence_with_markov=True,
        confidence_detached=False,
    )


def planned_shapes(drafter: Any) -> Shapes:
    """As `planning.shapes.shapes_of`, where there is no target."""
    return Shapes(
        drafter=drafter.config,
        drafted=drafter.config.vocab_size,
        parameters=tuple(parameter.numel() for parameter in drafter.parameters()),
        largest=0,
        casts=0,
        target_parameters=0,
        target_active=0,
        ends=drafter.config.vocab_size * drafter.config.hidden_size,
        scaled_ends=0,
        saved_value=4,
        soft_cap=False,
        by_token=drafter.latent_of_token,
        text=None,
    )


def blocks(shape: Shape, rows: bool) -> tuple[list[Sample], BlockBatch]:
    """The micro-batch, packed or `rows`; tokens are drawn so that some come often, as in text."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index, length in enumerate(shape.lengths):
        often = torch.rand(length, generator=generator) ** 3 * shape.vocabulary
        mask = torch.arange(length) >= round(0.42 * length)
        samples.append(Sample(often.long(), mask, f"s{index}"))
    anchors = [draw_anchors(sample, shape.anchors, 0, 0) for sample in samples]
    counted = torch.ones(sum(map(len, anchors)))
    if rows:
        most, longest = max(map(len, anchors)), max(shape.lengths)
        counted = torch.cat([(torch.arange(most) < len(own)).float() for own in anchors])
        anchors = [torch.cat((own, own[:1].expand(most - len(own)))) for own in anchors]
        samples = [_padded(sample, longest) for sample in samples]
    batch = build_blocks(samples, anchors, shape.block, float(shape.block))
    return samples, replace(batch, weights=batch.weights * counted[:, None])


def _padded(sample: Sample, length: int) -> Sample:
    missing = length - len(sample)
    ids, mask = sample.input_ids, sample.loss_mask
    return Sample(
        torch.cat((ids, ids.new_zeros(missing))),
        torch.cat((mask, mask.new_zeros(missing))),
        sample.sample_id,
    )


def features(
    samples: Sequence[Sample], shape: Shape, dtype: torch.dtype, device: torch.device
) -> TargetFeatures:
    """Random ones, the same for a sample wherever it lies."""
    own = []
    for index, length in enumerate(shape.lengths):
        generator = torch.Generator().manual_seed(index)
        width = (shape.captured + 1) * shape.hidden
        values = torch.randn(length, width, generator=generator)
        missing = len(samples[index]) - length
        own.append(torch.cat((values, values.new_zeros(missing, width))))
    packed = torch.cat(own).to(device, dtype)
    return TargetFeatures(*packed.split((shape.captured * shape.hidden, shape.hidden), dim=1))


def in_turns(
    sides: dict[str, Callable[[], object]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side's calls, one after the other: what disturbs one disturbs all.

    Processor time of this process on processors, which a busy machine disturbs less; wall clock on
    CUDA, where the processor waits.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time
    for _ in range(repeats + warm_up):
        for name, side in sides.items():
            begun = clock()
            side()
            if cuda:
                torch.cuda.synchronize()
            taken[name].append(clock() - begun)
    return {name: seconds[warm_up:] for name, seconds in taken.items()}


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that `work` has allocated at a time, above what was there before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = most = 0
    for _, size in changes:
        alive += size
        most = max(most, alive)
    return most


def spread(seconds: Sequence[float]) -> str:
    """Milliseconds: median, and the middle half."""
    ordered = sorted(seconds)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return f"{1e3 * median(seconds):,.0f} ({1e3 * low:,.0f} to {1e3 * high:,.0f})"


def described() -> str:
    """The machine, its threads, and the version of what computes."""
    machine = describe_machine()
    device = ", ".join(machine["accelerators"]) or machine["processor"]
    return f"{device}, {machine['threads']} thread(s), torch {machine['torch']}"


def device_here() -> torch.device:
    """CUDA where it is."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def close(losses: Sequence[float], within: float) -> Tensor:
    """The largest relative difference to the first; asserts that it is small."""
    values = torch.tensor(losses)
    worst = ((values - values[0]).abs() / values[0].abs()).max()
    assert worst < within, f"the sides compute different losses: {losses}"
    return worst
