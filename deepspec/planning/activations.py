"""Bytes that the drafter's forward keeps for its backward.

Parameters are fp32 and so is everything a norm touches (the residual stream, queries and keys until
they are rotated); what a product takes or gives is `work` bytes a number: 2 under
training.precision=bf16, else 4. Counted is what autograd keeps. Legend: see `shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepspec.drafters.dspark import DSparkConfig
from deepspec.planning.shapes import BF16, FP32, Job, MicroBatch


@dataclass(frozen=True)
class Activations:
    """In bytes. `context`: once for all layers; `layers`: each of them, first to last, or each step
    of an autoregressive drafter; `heads`: behind the last; `casts`: the weights in bf16, which
    autocast keeps. `mlp`: not kept, but the widest that the backward of a layer holds.
    """

    context: int
    layers: tuple[int, ...]
    heads: int
    casts: int
    mlp: int

    @property
    def total(self) -> int:
        """All of it, as it is when the forward ends."""
        return self.context + sum(self.layers) + self.heads + self.casts


def drafter_activations(job: Job, batch: MicroBatch) -> Activations:
    """See `Activations`."""
    if isinstance(job.shapes.drafter, DSparkConfig):
        return _block_parallel(job, job.shapes.drafter, batch)
    return _autoregressive(job, batch)


def _block_parallel(job: Job, shape: DSparkConfig, batch: MicroBatch) -> Activations:
    """DSpark and DFlash: all slots at once, layer after layer."""
    work, tokens, slots = job.work, batch.tokens, batch.slots
    hidden, rank, size = shape.hidden_size, shape.markov_rank, batch.block_size
    context = tokens * (_copied(job) + norm_bytes(hidden) + hidden * work)
    context += (tokens + slots) * 2 * shape.head_dim * FP32  # cosines and sines
    # the last norm; its output has the size of the first norm's input, which is not kept, as
    # nothing learns through the embedding
    heads = slots * norm_bytes(hidden)
    if rank:
        heads += slots * (rank * FP32 + _markov(shape.markov_head, hidden, rank) * work)
    if shape.confidence_head:  # its input [h; W1 x] and its logit
        heads += slots * ((hidden + rank * shape.confidence_with_markov) * work + FP32)
    # a norm before attention, whose output is the input of q, k and v; keys of the context
    layer = slots * (norm_bytes(hidden) + _inputs(job, 3, hidden))
    layer += tokens * norm_bytes(shape.head_dim, shape.num_key_value_heads)
    layer += _attention(job, slots, batch.pairs(size, size), tokens + slots) + _mlp(job, slots)
    return Activations(
        context=context,
        layers=(layer,) * shape.num_layers,
        heads=heads,
        casts=job.shapes.casts * BF16 if work == BF16 else 0,
        mlp=2 * slots * shape.intermediate_size * work,
    )


def _autoregressive(job: Job, batch: MicroBatch) -> Activations:
    """EAGLE-3 and MTP: the pairs of the context once, then a slot of every block at a time."""
    shape, work, tokens = job.shapes.drafter, job.work, batch.tokens
    hidden, blocks = shape.hidden_size, sum(batch.blocks)
    fused = job.config.drafter.kind == "eagle3"
    rotation = 2 * shape.head_dim * FP32  # cosines and sines
    if fused:  # features as fc takes them, the norm of what it gives; the pair is k's and v's input
        pair = _copied(job) + norm_bytes(hidden) + _normed(hidden) + _inputs(job, 2, 2 * hidden)
    else:  # two norms of what does not learn, eh_proj's input, a norm, the input of k and v
        pair = 2 * _normed(hidden) + _inputs(job, 1, 2 * hidden)
        pair += norm_bytes(hidden) + _inputs(job, 2, hidden)
    normed = getattr(shape, "qk_norm", True)
    context = tokens * (pair + rotation)
    context += tokens * normed * norm_bytes(shape.head_dim, shape.num_key_value_heads)
    own = _normed(hidden) + norm_bytes(hidden) + rotation
    if fused:
        own += _inputs(job, 3, 2 * hidden)
    else:
        own += _inputs(job, 1, 2 * hidden) + norm_bytes(hidden) + _inputs(job, 3, hidden)
    steps = []
    for slot in range(batch.block_size):
        pairs = batch.pairs(1, slot + 1)
        keys = tokens + blocks * (slot + 1)
        attention = _attention(job, blocks, pairs, keys, normed)
        steps.append(blocks * own + attention + _mlp(job, blocks))
    return Activations(
        context=context,
        layers=tuple(steps),
        heads=batch.slots * norm_bytes(hidden),
        casts=job.shapes.casts * BF16 if work == BF16 else 0,
        mlp=2 * blocks * shape.intermediate_size * work,
    )


def _copied(job: Job) -> int:
    """Features of a token as the first product takes them; fp32 ones in fp32 are not copied."""
    shape = job.shapes.drafter
    same = job.value == job.work == FP32
    return 0 if same else len(shape.target_layer_ids) * shape.hidden_size * job.work


def norm_bytes(size: int, rows: int = 1) -> int:
    """RMSNorm keeps its input and the normed one in fp32, and a scale a row."""
    return rows * (2 * size + 1) * FP32


def _normed(size: int) -> int:
    """Where nothing learns through its input, only the normed one."""
    return size * FP32


def _inputs(job: Job, products: int, size: int) -> int:
    """What several products take: shared in fp32, but autocast makes a copy for each."""
    return (products if job.work == BF16 else 1) * size * job.work


def _markov(kind: str, hidden: int, rank: int) -> int:
    """Numbers a slot that the gate or the recurrence keeps besides W1[x]."""
    return {"vanilla": 0, "gated": hidden + 3 * rank, "rnn": hidden + 10 * rank}[kind]


def _mlp(job: Job, slots: int) -> int:
    """Its norm, the input of gate and up; gate, act(gate), up and the product."""
    shape = job.shapes.drafter
    inputs = norm_bytes(shape.hidden_size) + _inputs(job, 2, shape.hidden_size)
    return slots * (inputs + 4 * shape.intermediate_size * job.work)


def _attention(
    job: Job, slots: int, pairs: tuple[tuple[int, int], ...], keys: int, normed: bool = True
) -> int:
    """Of `slots` queries; `pairs`: (queries, keys that they meet) of each sample, `keys` in all.

    `normed`: whether heads are.
    """
    shape, work = job.shapes.drafter, job.work
    heads, shared = shape.num_attention_heads, shape.num_key_value_heads
    width = heads * shape.head_dim
    # norms of queries and keys; queries, output, the log of each softmax's sum; attended values as
    # the output projection takes them
    norms = norm_bytes(shape.head_dim, heads) + norm_bytes(shape.head_dim, shared)
    kept = slots * (norms * normed + 3 * width * work + heads * FP32)
    if job.cuda:  # FlexAttention: keys and values once, no mask
        return kept + 2 * keys * shared * shape.head_dim * work
    for own, met in pairs:  # SDPA: keys and values repeated a head, mask as numbers
        kept += 2 * met * width * work + own * met * work
    return kept
