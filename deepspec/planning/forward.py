"""Bytes of one micro-batch's forward and backward beside the drafter: target and objective.

Legend: see `shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepspec.objective.kernels import tile_rows
from deepspec.planning.shapes import FP32, Job, MicroBatch
from deepspec.targets.attributes import common


def features_bytes(job: Job, batch: MicroBatch) -> int:
    """L captured layers and the final hidden state of each token: (L+1)*D numbers.

    The most, for final states are kept only where a supervised token follows, but for MTP.
    """
    return batch.tokens * _width(job) * job.value


def target_bytes(job: Job, batch: MicroBatch) -> int:
    """The most that the target's forward holds, its features included; without gradients."""
    text, hidden = job.shapes.text, job.shapes.drafter.hidden_size
    captured = len(job.shapes.drafter.target_layer_ids)
    head_dim = common(text, "head_dim") or hidden // text.num_attention_heads
    width = text.num_attention_heads * head_dim
    # inside a late layer: the embeddings, the layer's input, the residual and its norm; and the
    # widest of what a layer computes
    inner = max(
        3 * (getattr(text, "intermediate_size", None) or 0),  # act(gate), up and their product
        6 * width,  # queries, keys and values before and after they are rotated or repeated
        _experts(job),
    )
    inside = batch.padded * (4 * hidden + inner)
    if text._attn_implementation == "eager":  # scores and their softmax
        inside += 2 * text.num_attention_heads * max(batch.contexts) * batch.padded
    # beside it what was captured so far, without padding; in the end the final states, packed too
    packed = batch.tokens * captured * hidden
    left = (batch.padded + batch.tokens) * hidden
    return (packed + max(inside, left)) * job.value


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
class Objective:
    """Bytes of the loss besides the drafter's activations: `forward` and `backward` the most in
    each, `left` the gradients of draft states and W2 while the drafter's backward goes on."""

    forward: int
    backward: int
    left: int


def objective_bytes(job: Job, batch: MicroBatch) -> Objective:
    """The loss computes in fp32; its products too, but on CUDA they are of training.precision."""
    shape, config, slots = job.shapes.drafter, job.config.objective, batch.slots
    vocabulary, hidden, rank = shape.vocab_size, shape.hidden_size, job.shapes.rank
    drafted = job.shapes.drafted
    product = job.work if job.cuda else FP32
    # a head saved in another precision than that of the draft's products is copied
    head = drafted * hidden * product if job.value != product else 0
    states = slots * (hidden + rank) * product
    shared = drafted * rank * FP32
    if config.implementation == "eager":
        finals = slots * hidden * job.value  # the target's state behind each slot
        # base and biased logits, log-softmax, its exp, the target's softmax, the distance; and in
        # the backward one less. Fewer drafts' logits come before they are put among all
        logits = slots * vocabulary * FP32
        fewer = slots * drafted * FP32 if drafted < vocabulary else 0
        most, least = 6 * logits + 2 * fewer, 5 * logits + fewer
        return Objective(most + finals + head, least + head, states + shared)
    # slots of weight zero are left out, so what is left is a copy: counted as if all weighed
    picked = states + batch.positions * hidden * job.value
    return Objective(
        forward=picked + _chunk_bytes(job, batch) + states + shared + head,
        backward=2 * (states + shared),  # scaled by the gradient of the loss: a copy
        left=states + shared,
    )


def _chunk_bytes(job: Job, batch: MicroBatch) -> int:
    """Buffers of one chunk's slots."""
    chunk = min(job.config.objective.chunk_size, batch.slots)
    drafted, vocabulary = job.shapes.drafted, job.shapes.drafter.vocab_size
    compiled = job.config.objective.compile == "always" or (
        job.config.objective.compile == "auto" and job.cuda
    )
    # p and q; a bias that slots share, or the gradient as compiled code makes it
    own = 2 * FP32 + (job.work if compiled else FP32 * job.shapes.by_token)
    own += 2 * FP32 * job.shapes.soft_cap  # its slope, and a product
    # where fewer tokens are drafted, all of the target's distribution beside what of it is q
    whole = FP32 if drafted < vocabulary else 0
    tile = 0 if compiled else tile_rows(chunk, drafted, torch.device("cuda" if job.cuda else "cpu"))
    size = chunk * (drafted * own + vocabulary * whole) + tile * drafted * FP32
    if job.value != FP32 and not job.cuda:  # target logits before they become fp32
        size += min(chunk, -(-chunk * batch.positions // batch.slots)) * vocabulary * job.value
    return size
