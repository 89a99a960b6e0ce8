"""Rows of different lengths in one forward, without computing what is behind the shorter ones.

All of a model but attention works on one token alone, so the tokens of all rows go through it in
one sequence of N. In attention each row's queries are laid beside its own keys, by a function that
Transformers calls in place of its own; on a CPU also where nothing is packed, because it is faster.
Legend: B rows, Q tokens of the longest, N of all rows, H heads, G key/value heads, C keys, E head
size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deepspec.decoding.transfers import upload

PADDED, PACKED = "deepspec_rows", "deepspec_packed_rows"


@dataclass(frozen=True)
class Packing:
    """Where N packed tokens are: token `columns` [N] of row `rows` [N], in `shape` (B, Q)."""

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, device: torch.device) -> Self:
        """Row b has `lengths[b]` of `width` tokens."""
        rows = np.repeat(np.arange(len(lengths)), lengths)
        columns = np.concatenate([np.arange(length) for length in lengths])
        index = upload(torch.from_numpy(np.stack((rows, columns))), device)
        return cls(index[0], index[1], (len(lengths), width))

    def pack(self, values: Tensor) -> Tensor:
        """[B, Q, ..] -> [N, ..]"""
        rows, columns = self.rows.to(values.device), self.columns.to(values.device)
        return values[rows, columns]

    def unpack(self, values: Tensor) -> Tensor:
        """[N, ..] -> [B, Q, ..], zeros where no token is."""
        rows, columns = self.rows.to(values.device), self.columns.to(values.device)
        unpacked = values.new_zeros(*self.shape, *values.shape[1:])
        unpacked[rows, columns] = values
        return unpacked


def packed(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """The first `lengths[b]` of each row of `values` [B, Q, ..], row after row: [N, ..]."""
    if min(lengths) == values.shape[1]:
        return values.flatten(0, 1)
    return Packing.of(lengths, values.shape[1], values.device).pack(values)


def can_pack(model: Any) -> bool:
    """Whether `model`, as it was loaded, lets its attention be replaced."""
    implementation = model.config.get_text_config()._attn_implementation
    return bool(model._supports_attention_backend) and implementation == "sdpa"


_current: ContextVar[Packing] = ContextVar("packing of the forward that runs")


@contextmanager
def own_attention(config: Any, packing: Packing | None) -> Iterator[None]:
    """Inside, the model of `config` attends by a function of ours: queries [B, H, Q, E], or
    [1, H, N, E] where they are packed, and keys of all rows [B, G, C, E]."""
    before, token = config._attn_implementation, None
    if packing is not None:
        token = _current.set(packing)
    config._attn_implementation = PADDED if packing is None else PACKED
    try:
        yield
    finally:
        config._attn_implementation = before
        if token is not None:
            _current.reset(token)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As Transformers' attention functions: output [B, Q, H, E]; `attention_mask` [B, 1, Q, C],
    which some families pass by this name.

    Transformers' own repeats the keys of a group for each of its heads, because CUDA's kernels want
    it so where there is a mask; the CPU's does not.
    """
    special = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    if query.device.type != "cpu" or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        scale=options.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2), None


def _attend_packed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The same for packed queries: output [1, N, H, E]."""
    packing = _current.get()
    queries = packing.unpack(query[0].transpose(0, 1)).transpose(1, 2)
    output, _ = _attend(module, queries, key, value, attention_mask, **options)
    return packing.pack(output)[None], None


AttentionInterface.register(PADDED, _attend)
AttentionInterface.register(PACKED, _attend_packed)
