"""The target's cache with a length a row, behind the interface of transformers' `Cache`.

An unmodified Hugging Face model runs on it: before each forward `begin` says where each row's new
tokens go, and the mask built here says which keys they see. Rolling a row back is forgetting: the
next forward begins earlier and overwrites.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from deepspec.decoding.packing import Packing
from deepspec.drafters.cache import RowKV


class _RowLayer(CacheLayerMixin):
    """One decoder layer's `RowKV`."""

    is_sliding = False

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self.rows = RowKV()
        self._owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers are made by the first write."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write `[B, G, Q, E]`, or `[1, G, N, E]` packed, behind the rows' starts; everything below
        the current end."""
        owner, packing = self._owner, self._owner.packing
        if packing is None:
            return self.rows.write(key_states, value_states, owner.starts, owner.end)
        rows = packing.rows.to(key_states.device)
        positions = owner.positions.to(key_states.device)
        return self.rows.write_packed(
            key_states[0], value_states[0], rows, positions, packing.shape[0], owner.end
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that the forward sees."""
        return self._owner.end, 0

    def get_seq_length(self) -> int:
        """Longest row before the current forward."""
        return self._owner.end

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class RowCache(Cache):
    """Keys and values of all layers. `starts` [B] and `end` describe the current forward; where its
    rows are packed, `packing` does too, with the `positions` [N] of its tokens."""

    starts: Tensor
    end: int
    packing: Packing | None
    positions: Tensor

    def __init__(self, num_layers: int) -> None:
        self._rows = [_RowLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._rows))
        self.end = 0

    def begin(self, starts: Tensor, end: int, packing: Packing | None = None) -> None:
        """The next forward writes row b from `starts[b]`; `end` = max(starts) + Q, on the host."""
        self.starts, self.end, self.packing = starts, end, packing
        if packing is not None:
            self.positions = starts[packing.rows] + packing.columns

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """See `_RowLayer.update`."""
        return self._rows[layer_idx].update(key_states, value_states)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'], in this order."""
        for layer in self._rows:
            layer.rows.select(rows)


def attention_masks(config: Any, positions: Tensor, end: int) -> Any:
    """Bool masks [B, 1, Q, end] for queries at `positions` [B, Q], as `config`'s model takes them.

    A key at index k is position k. One mask where all layers attend fully; else a dict by layer
    type, with the window of sliding layers.
    """
    keys = torch.arange(end, device=positions.device)
    place = positions[:, None, :, None]
    full = keys <= place
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" not in kinds:
        return full
    return {
        "full_attention": full,
        "sliding_attention": full & (keys > place - config.sliding_window),
    }
