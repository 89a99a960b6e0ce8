"""Bytes of one micro-batch's forward and backward: target, drafter, objective.

Parameters are fp32 and so is everything a norm touches (the residual stream, queries and keys until
they are rotated); what a product takes or gives is `work` bytes a number: 2 under
training.precision=bf16, else 4. Counted is what autograd keeps. Legend: see `shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepspec.planning.shapes import BF16, FP32, Job, MicroBatch
from deepspec.targets.attributes import common


def features_bytes(job: Job, batch: MicroBatch) -> int:
    """L captured layers and the final hidden state of each token: (L+1)*D numbers."""
    return batch.tokens * _width(job) * job.value


def target_bytes(job: Job, batch: MicroBatch) -> int:
    """The most that the target's forward holds, its features included; without gradients."""
    text, hidden = job.shapes.text, job.shapes.drafter.hidden_size
    captured = len(job.shapes.drafter.target_layer_ids)
    head_dim = common(text, "head_dim") or hidden // text.num_attention_heads
    width = text.num_attention_heads * head_dim
    # inside a late layer: the captured outputs; the embeddings, the layer's input, the residual and
    # its norm; and the widest of what a layer computes
    inner = max(
        3 * (getattr(text, "intermediate_size", None) or 0),  # act(gate), up and their product
        6 * width,  # queries, keys and values before and after they are rotated or repeated
        _experts(job),
    )
    inside = batch.padded * ((captured + 4) * hidden + inner)
    if job.config.target.attention == "eager":  # scores and their softmax
        inside += 2 * text.num_attention_heads * max(batch.contexts) * batch.padded
    # then the captured outputs are put side by side, and the padding is left out: a copy each time
    joined = batch.padded * (_width(job) + captured * hidden)
    packed = (batch.padded + batch.tokens) * _width(job)
    return max(inside, joined, packed) * job.value


def _experts(job: Job) -> int:
    """Numbers a token of a mixture of experts: a copy of its state in and out of each expert."""
    text = job.shapes.text
    chosen = getattr(text, "num_experts_per_tok", None)
    if not chosen:
        return 0
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    return int(chosen * (2 * text.hidden_size + 3 * width))


def _width(job: Job) -> int:
    shape = job.shapes.drafter
    return (len(shape.target_layer_ids) + 1) * shape.hidden_size


@dataclass(frozen=True)
class Activations:
    """What the drafter's forward keeps for its backward, in bytes.

    `context`: once for all layers; `layer`: each of `layers`; `heads`: behind the last layer;
    `casts`: the weights in bf16, which autocast keeps.
    """

    context: int
    layer: int
    layers: int
    heads: int
    casts: int

    @property
    def total(self) -> int:
        """All of it, as it is when the forward ends."""
        return self.context + self.layer * self.layers + self.heads + self.casts


def drafter_activations(job: Job, batch: MicroBatch) -> Activations:
    """See `Activations`."""
    shape, work = job.shapes.drafter, job.work
    tokens, slots = batch.tokens, batch.slots
    hidden, rank = shape.hidden_size, shape.markov_rank
    # features as the first product takes them; only fp32 features in fp32 work are not copied
    copied = 0 if job.value == work == FP32 else len(shape.target_layer_ids) * hidden * work
    context = tokens * (copied + _norm(hidden) + hidden * work)
    context += (tokens + slots) * 2 * shape.head_dim * FP32  # cosines and sines
    # the last norm; its output has the size of the first norm's input, which is not kept, as
    # nothing learns through the embedding
    heads = slots * _norm(hidden)
    if rank:
        heads += slots * (rank * FP32 + _markov(shape.markov_head, hidden, rank) * work)
    if shape.confidence_head:  # its input [h; W1 x] and its logit
        heads += slots * ((hidden + rank * shape.confidence_with_markov) * work + FP32)
    return Activations(
        context=context,
        layer=_layer(job, batch),
        layers=shape.num_layers,
        heads=heads,
        casts=job.shapes.casts * BF16 if work == BF16 else 0,
    )


def _norm(size: int, rows: int = 1) -> int:
    """RMSNorm keeps its input and the normed one in fp32, and a scale a row."""
    return rows * (2 * size + 1) * FP32


def _markov(kind: str, hidden: int, rank: int) -> int:
    """Numbers a slot that the gate or the recurrence keeps besides W1[x]."""
    return {"vanilla": 0, "gated": hidden + 3 * rank, "rnn": hidden + 10 * rank}[kind]


def _layer(job: Job, batch: MicroBatch) -> int:
    shape, work = job.shapes.drafter, job.work
    tokens, slots = batch.tokens, batch.slots
    width, shared = (
        shape.num_attention_heads * shape.head_dim,
        shape.num_key_value_heads * shape.head_dim,
    )
    norms = 2 * _norm(shape.hidden_size) + _norm(shape.head_dim, shape.num_attention_heads)
    norms += _norm(shape.head_dim, shape.num_key_value_heads)
    # inputs of q, k, v and of gate, up: shared in fp32, but autocast makes a copy for each
    inputs = (5 if work == BF16 else 2) * shape.hidden_size * work
    # gate, act(gate), up and the product; attended values as the output projection takes them
    products = (4 * shape.intermediate_size + width) * work
    kept = slots * (norms + inputs + products)
    kept += tokens * _norm(shape.head_dim, shape.num_key_value_heads)  # keys of the context
    # attention: queries, output, the log of each softmax's sum
    kept += slots * (2 * width * work + shape.num_attention_heads * FP32)
    if job.cuda:  # FlexAttention: keys and values once, no mask
        return kept + 2 * (tokens + slots) * shared * work
    for own, keys in batch.pairs:  # SDPA: keys and values repeated a head, mask as numbers
        kept += 2 * keys * width * work + own * keys * work
    return kept


@dataclass(frozen=True)
class Objective:
    """Bytes of the loss besides the drafter's activations: `forward` and `backward` the most in
    each, `left` the gradients of draft states and W2 while the drafter's backward goes on."""

    forward: int
    backward: int
    left: int


def objective_bytes(job: Job, batch: MicroBatch) -> Objective:
    """The loss computes in fp32 (the drafter's last norm gives fp32 at any precision)."""
    shape, config, slots = job.shapes.drafter, job.config.objective, batch.slots
    vocabulary, hidden, rank = shape.vocab_size, shape.hidden_size, shape.markov_rank
    drafted = job.shapes.drafted
    # a head saved in bf16 is copied to fp32 for the draft's logits
    head = drafted * hidden * FP32 if job.value != FP32 else 0
    finals = slots * hidden * job.value  # the target's state behind each slot
    states = slots * (hidden + rank) * FP32
    shared = drafted * rank * FP32
    if config.implementation == "eager":
        # base and biased logits, log-softmax, its exp, the target's softmax, the distance; and in
        # the backward one less. Fewer drafts' logits come before they are put among all
        logits = slots * vocabulary * FP32
        fewer = slots * drafted * FP32 if drafted < vocabulary else 0
        most, least = 6 * logits + 2 * fewer, 5 * logits + fewer
        return Objective(most + finals + head, least + head, states + shared)
    chunk = min(config.chunk_size, slots)
    # p, q and scratch; a soft cap's slope and a product; target logits before they become fp32, and
    # where fewer tokens are drafted, all of the target's distribution beside what of it is q
    wide = (job.value if job.value != FP32 else 0) + (FP32 if drafted < vocabulary else 0)
    rows = drafted * (3 * FP32 + 2 * FP32 * job.shapes.soft_cap) + vocabulary * wide
    # slots of weight zero are left out, so what is left is a copy: counted as if all weighed
    picked = states + finals
    return Objective(
        forward=finals + picked + chunk * rows + states + shared + head,
        backward=2 * (states + shared),  # scaled by the gradient of the loss: a copy
        left=states + shared,
    )
