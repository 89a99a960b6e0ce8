"""Floating-point operations of a training, and the hours they take at a stated rate.

Counted are matrix products, a multiplication and an addition each; a backward costs twice its
forward. Norms, rotations, softmax and everything a device waits for are not in it: the rate that a
plan divides by is what a device reaches, not its peak. Legend: see `shapes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deepspec.config.schema import RunConfig
from deepspec.drafters.dspark_v4 import DSparkV4Config
from deepspec.planning.dspark_v4 import v4_flops
from deepspec.planning.memory import ELSEWHERE
from deepspec.planning.shapes import Job, MicroBatch, shapes_of
from deepspec.targets import TargetEnds
from deepspec.targets.attributes import common

# bf16 on an H100: 989e12 at its peak, of which trainings of this kind reach about two fifths
H100 = 400e12


def target_flops(job: Job, batch: MicroBatch) -> int:
    """The frozen target's forward over `batch`, without logits; 0 where features are read."""
    if job.config.features.source in ELSEWHERE:
        return 0
    text, hidden = job.shapes.text, job.shapes.drafter.hidden_size
    head_dim = common(text, "head_dim") or hidden // text.num_attention_heads
    # causal: half of all pairs; a sliding window, which sees fewer, is counted as if it did not
    pairs = sum(tokens * tokens for tokens in batch.contexts) // 2
    attention = 4 * pairs * text.num_attention_heads * head_dim * text.num_hidden_layers
    return 2 * batch.tokens * job.shapes.target_active + attention


def drafter_flops(job: Job, batch: MicroBatch) -> int:
    """Forward and backward of the drafter's backbone; a block sees half of its context. What is
    computed twice to save memory is counted once."""
    shape, kind = job.shapes.drafter, job.config.drafter.kind
    if isinstance(shape, DSparkV4Config):
        return v4_flops(shape, batch)
    hidden, layers = shape.hidden_size, shape.num_layers
    width = shape.num_attention_heads * shape.head_dim
    wide = 2 * hidden if kind == "eagle3" else hidden  # what q, k and v take
    shared = 2 * wide * shape.num_key_value_heads * shape.head_dim
    # MTP mixes token and feature of every pair, the others project the captured layers
    mixed = 2 * hidden * hidden if kind == "mtp" else 0
    fused = mixed or len(shape.target_layer_ids) * hidden * hidden
    layer = wide * width + shared + width * hidden + 3 * hidden * shape.intermediate_size
    seen = sum(
        blocks * shape.block_size * (context // 2 + shape.block_size)
        for context, blocks in zip(batch.contexts, batch.blocks, strict=True)
    )
    return (
        4 * batch.tokens * fused  # nothing behind it learns: no gradient of its input
        + 6 * batch.tokens * layers * shared
        + 6 * batch.slots * (layers * layer + mixed)
        + 12 * seen * width * layers
    )


def objective_flops(job: Job, batch: MicroBatch) -> int:
    """Logits of target (a position once) and draft, gradients of hidden states, latents and W2."""
    shape = job.shapes.drafter
    target = 2 * shape.vocab_size * shape.hidden_size
    draft = job.shapes.drafted * (4 * shape.hidden_size + 6 * job.shapes.rank)
    if job.config.objective.implementation == "eager":
        return batch.slots * (target + draft)
    return batch.positions * target + batch.slots * draft


def batch_flops(job: Job, batch: MicroBatch) -> int:
    """All of a training's work on `batch`."""
    return target_flops(job, batch) + drafter_flops(job, batch) + objective_flops(job, batch)


def work_of(config: RunConfig, target: TargetEnds) -> Callable[[Sequence[int], Sequence[int]], int]:
    """`batch_flops` by the tokens and the blocks of a micro-batch's samples."""
    job = Job(config, shapes_of(target, config.drafter), world=1, cuda=target.device.type == "cuda")

    def work(contexts: Sequence[int], blocks: Sequence[int]) -> int:
        return batch_flops(
            job, MicroBatch(tuple(contexts), tuple(blocks), job.shapes.drafter.block_size)
        )

    return work
