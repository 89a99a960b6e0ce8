"""Block attention: every block sees its sample's context before the anchor, and itself.

One function, two implementations of the same mask. SDPA goes sample by sample, so the mask it
builds is [n*Q, T_sample + n*P]; FlexAttention takes the whole pack and skips empty tiles (CUDA:
it has no backward on CPU). Legend: N blocks, K block size, T context tokens, H heads,
G key/value heads, E head dimension; Q queries and P keys of a block: K and K where its slots go at
once, one query and the keys of all slots so far where they go one after the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.records import BlockBatch


@dataclass(frozen=True)
class Segment:
    """One sample's stretch of the pack: context rows, blocks, and who may see whom."""

    context: slice
    blocks: slice
    mask: Tensor  # [n*Q, T_sample + n*P] bool


@dataclass(frozen=True)
class Visibility:
    """The attention mask of a batch, built once and used by every layer."""

    segments: tuple[Segment, ...] | None
    block_mask: Any | None


def build_visibility(
    batch: BlockBatch,
    implementation: str | None = None,
    *,
    limits: Tensor | None = None,
    queries: int | None = None,
    keys: int | None = None,
) -> Visibility:
    """The mask of dspark.md ("Backbone"): context < anchor of the same sample, and own block.

    `implementation`: "sdpa" or "flex"; None chooses flex on CUDA, sdpa elsewhere. `limits` [N]:
    the position below which a block sees context, its anchor where not given. `queries` and `keys`
    of a block are its size where not given.
    """
    limits = batch.anchors if limits is None else limits
    queries, keys = queries or batch.block_size, keys or batch.block_size
    implementation = implementation or ("flex" if batch.rows.is_cuda else "sdpa")
    if implementation == "flex":
        return Visibility(None, _flex_mask(batch, limits, queries, keys))
    return Visibility(tuple(_segments(batch, limits, queries, keys)), None)


@partial(torch.compiler.disable, recursive=False)  # its own kernels; masks differ a batch
def block_attention(
    queries: Tensor,
    context_keys: Tensor,
    context_values: Tensor,
    block_keys: Tensor,
    block_values: Tensor,
    visibility: Visibility,
) -> Tensor:
    """Attention of blocks over context and themselves.

    `queries` [N, Q, H, E]; `context_*` [T, G, E]; `block_*` [N, P, G, E] -> [N, Q, H, E].
    """
    if visibility.segments is None:
        return _flex_attention(
            queries, context_keys, context_values, block_keys, block_values, visibility.block_mask
        )
    outputs = []
    group = queries.shape[2] // context_keys.shape[1]
    for segment in visibility.segments:
        keys = torch.cat((context_keys[segment.context], block_keys[segment.blocks].flatten(0, 1)))
        values = torch.cat(
            (context_values[segment.context], block_values[segment.blocks].flatten(0, 1))
        )
        block = queries[segment.blocks]
        attended = F.scaled_dot_product_attention(
            block.flatten(0, 1).transpose(0, 1)[None],
            keys.repeat_interleave(group, dim=1).transpose(0, 1)[None],
            values.repeat_interleave(group, dim=1).transpose(0, 1)[None],
            attn_mask=segment.mask,
        )
        outputs.append(attended[0].transpose(0, 1).reshape(block.shape))
    return torch.cat(outputs)


def _segments(batch: BlockBatch, limits: Tensor, queries: int, keys: int) -> list[Segment]:
    samples = len(batch.sample_ids)
    context_counts = torch.bincount(batch.document_ids, minlength=samples).tolist()
    block_counts = torch.bincount(batch.block_documents, minlength=samples).tolist()
    segments, row, block = [], 0, 0
    for context_count, count in zip(context_counts, block_counts, strict=True):
        if count:
            own = limits[block : block + count]
            sees_context = torch.arange(context_count, device=own.device) < own[:, None]
            own_block = torch.eye(count, dtype=torch.bool, device=own.device)
            mask = torch.cat((sees_context, own_block.repeat_interleave(keys, 1)), dim=1)
            segments.append(
                Segment(
                    slice(row, row + context_count),
                    slice(block, block + count),
                    mask.repeat_interleave(queries, 0),
                )
            )
        row, block = row + context_count, block + count
    return segments


def _flex_mask(batch: BlockBatch, limits: Tensor, queries: int, keys: int) -> Any:
    context, blocks = batch.document_ids.shape[0], batch.anchors.shape[0]
    document_ids, positions = batch.document_ids, batch.positions
    block_documents = batch.block_documents

    def visible(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // queries
        token = key.clamp(max=context - 1)
        in_context = (
            (key < context)
            & (document_ids[token] == block_documents[block])
            & (positions[token] < limits[block])
        )
        return in_context | ((key >= context) & ((key - context) // keys == block))

    return _flex(limits.is_cuda).create_block_mask(
        visible, None, None, blocks * queries, context + blocks * keys, device=str(limits.device)
    )


class _Flex(NamedTuple):
    create_block_mask: Any
    flex_attention: Any


@functools.cache
def _flex(compiled: bool, backend: str = "inductor") -> _Flex:
    """FlexAttention and the maker of its masks. Compiled, each is one graph for batches of any
    shape, or two where sizes compare otherwise (a pack of a single tile), and the mask is never
    held element by element: that would be a number for each query and key of the pack."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not compiled:
        return _Flex(create_block_mask, flex_attention)
    return _Flex(
        torch.compile(create_block_mask, dynamic=True, backend=backend),
        torch.compile(flex_attention, dynamic=True, backend=backend),
    )


def _flex_attention(
    queries: Tensor,
    context_keys: Tensor,
    context_values: Tensor,
    block_keys: Tensor,
    block_values: Tensor,
    block_mask: Any,
) -> Tensor:
    def heads_first(states: Tensor) -> Tensor:
        return states.transpose(0, 1)[None]

    # Autocast on CUDA norms and rotates queries and keys in fp32, and leaves values in the dtype of
    # products. It casts for SDPA, but in older torch not for FlexAttention, which wants one dtype.
    dtype = context_values.dtype
    queries, context_keys, block_keys = (
        states.to(dtype) for states in (queries, context_keys, block_keys)
    )
    attended = _flex(queries.is_cuda).flex_attention(
        heads_first(queries.flatten(0, 1)),
        heads_first(torch.cat((context_keys, block_keys.flatten(0, 1)))),
        heads_first(torch.cat((context_values, block_values.flatten(0, 1)))),
        block_mask=block_mask,
        enable_gqa=queries.shape[2] != context_keys.shape[1],
    )
    return attended[0].transpose(0, 1).reshape(queries.shape)
