"""The V4-native drafter's part of a plan: what autograd keeps of it, and its operations.

As in `activations`, fp32 is what norms, hyper-connections, softmax and router touch, and `work`
bytes a number is what other products take or give. Legend: besides that of `shapes`, n streams, X
experts, k of them a slot, I width of an expert, Q query rank, J latents that a block sees, P ranks
of the output's groups together.
"""

from __future__ import annotations

from deepspec.drafters.dspark_v4 import DSparkV4Config
from deepspec.planning.activations import Activations, norm_bytes
from deepspec.planning.shapes import BF16, FP32, Job, MicroBatch


def v4_activations(job: Job, shape: DSparkV4Config, batch: MicroBatch) -> Activations:
    """See `Activations`."""
    work, tokens, slots = job.work, batch.tokens, batch.slots
    hidden, rank, streams = shape.hidden_size, shape.markov_rank, shape.hc_mult
    copied = 0 if job.value == work == FP32 else len(shape.target_layer_ids) * hidden * work
    context = tokens * (copied + norm_bytes(hidden) + hidden * work)
    context += sum(batch.blocks) * shape.sliding_window * 8  # which rows a window is gathered from
    # the embeddings, as they are and once a stream; the streams behind the last stage
    heads = slots * hidden * (1 + streams) * FP32
    heads += slots * (norm_bytes(hidden) + (hidden + rank) * work + (rank + 1) * FP32)
    # the backward: gradients of queries, turned, as they were, and of what was attended, or those
    # of streams; a group of experts', whole before it is sharded (else counted as gradients)
    inner = slots * max(4 * shape.num_attention_heads * shape.head_dim, 3 * streams * hidden) * FP32
    sharded = job.config.engine.kind in ("zero2", "zero3")
    return Activations(
        context=context,
        layers=(_stage(job, shape, batch),) * shape.num_layers,
        heads=heads,
        casts=job.shapes.casts * BF16 if work == BF16 else 0,
        mlp=max(inner, job.shapes.largest * FP32 if sharded else 0),
    )


def _stage(job: Job, shape: DSparkV4Config, batch: MicroBatch) -> int:
    work, cast = job.work, job.work == BF16
    hidden, streams, size = shape.hidden_size, shape.hc_mult, shape.head_dim
    heads, width = shape.num_attention_heads, shape.moe_intermediate_size
    seen = min(shape.sliding_window, batch.tokens) + shape.block_size
    # twice: the streams, what a block takes in and its norm, what it gives; and the mixing, whose
    # normalisations each keep a matrix and what it is divided by
    mixing = 2 * shape.hc_sinkhorn_iters * (streams + 1) * streams + 4 * (2 + streams) * streams
    hyper = 2 * (streams * hidden * FP32 + norm_bytes(hidden) + mixing * FP32)
    hyper += hidden * (work + FP32) + hidden * FP32 * (3 if cast else 2)  # inputs of products
    attention = norm_bytes(shape.q_lora_rank) + norm_bytes(size) + shape.q_lora_rank * work
    # queries before and after they are turned, and the output; scores
    attention += heads * (size * (FP32 + 2 * work) + FP32)
    attention += heads * (seen + 1) * FP32 + (heads * seen * work if cast else 0)
    attention += shape.o_groups * shape.o_lora_rank * work
    inside = 6 * width * work  # gate and up before and after they are clamped, silu, product
    routed = shape.num_experts_per_tok * 2 * width * work  # gate and up alone
    kept = batch.slots * (hyper + attention + routed + inside)
    kept += sum(batch.blocks) * seen * size * work * (2 if cast else 1)  # gathered latents
    return kept + batch.tokens * (norm_bytes(size) + (hidden * work if cast else 0))


def v4_flops(shape: DSparkV4Config, batch: MicroBatch) -> int:
    """Forward and backward of the stages."""
    hidden, streams, layers = shape.hidden_size, shape.hc_mult, shape.num_layers
    width = shape.num_attention_heads * shape.head_dim
    projected = shape.o_groups * shape.o_lora_rank
    latent = hidden * shape.head_dim
    attention = shape.q_lora_rank * (hidden + width) + latent
    attention += width * shape.o_lora_rank + projected * hidden
    experts = hidden * shape.n_routed_experts
    experts += (shape.num_experts_per_tok + 1) * 3 * hidden * shape.moe_intermediate_size
    hyper = 2 * (2 + streams) * streams * streams * hidden
    seen = batch.slots * (shape.sliding_window + shape.block_size)
    return (
        4 * batch.tokens * len(shape.target_layer_ids) * hidden * hidden
        + 6 * batch.tokens * layers * latent
        + 6 * batch.slots * layers * (attention + experts + hyper)
        + 12 * seen * width * layers
    )
