"""The target's cache with a length a row, behind the interface of transformers' `Cache`.

An unmodified Hugging Face model runs on it: before each forward `begin` says where each row's new
tokens go, and the masks built here say which keys they see. Rolling a row back is forgetting: the
next forward begins earlier and overwrites. Legend: B rows, Q new tokens, C keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from deepspec.decoding.packing import Packing, can_pack, own_attention
from deepspec.drafters.cache import RowKV
from deepspec.drafters.compiling import compiled
from deepspec.targets import Target, TargetOutput, attention_kinds


class RowState:
    """A `TargetState` (see `state`) of keys and values with a length a row, all rows in one
    forward. `fixed`: the width of forwards that run compiled, after the first; None compiles
    nothing."""

    def __init__(self, target: Target, fixed: int | None = None) -> None:
        self._target = target
        self._cache = RowCache(target.num_layers)
        self._masks = AttentionMasks(target.config, target.dtype)
        self._can_pack = can_pack(target.model)
        self._fixed = fixed

    def forward(
        self,
        tokens: Tensor,
        starts: Tensor,
        end: int,
        with_context: bool,
        lengths: Sequence[int] | None = None,
    ) -> TargetOutput:
        """See `TargetState.forward`. Padding is not computed where the target's attention can do
        without, and the forward is not compiled; elsewhere no real token sees it."""
        width = tokens.shape[1]
        if self._fixed is not None and self._cache.written and width <= self._fixed:
            return self._compiled(tokens, starts, end, with_context)
        positions = starts[:, None] + torch.arange(width, device=tokens.device)
        masks = self._masks(positions, end)
        if lengths is None or min(lengths) == width or not self._can_pack:
            self._cache.begin(starts, end)
            # a single query is what Transformers' own function does best
            faster = self._can_pack and width > 1 and self._target.device.type == "cpu"
            with own_attention(self._target.config, None) if faster else nullcontext():
                return self._target.forward(
                    tokens, positions, self._cache, masks, with_context=with_context
                )
        packing = Packing.of(lengths, width, tokens.device)
        self._cache.begin(starts, end, packing)
        with own_attention(self._target.config, packing):
            output = self._target.forward(
                packing.pack(tokens)[None],
                packing.pack(positions)[None],
                self._cache,
                masks,
                with_context=with_context,
            )
        context = None if output.context is None else packing.unpack(output.context[0])
        return TargetOutput(packing.unpack(output.final[0]), context)

    def _compiled(
        self, tokens: Tensor, starts: Tensor, end: int, with_context: bool
    ) -> TargetOutput:
        """Padded to the one width, over the whole buffers: few shapes, few compilations."""
        width = tokens.shape[1]
        assert self._fixed is not None
        tokens = F.pad(tokens, (0, self._fixed - width))
        positions = starts[:, None] + torch.arange(self._fixed, device=tokens.device)
        self._cache.begin_fixed(positions, end - width + self._fixed)
        ours = self._can_pack and self._target.device.type == "cpu"
        with own_attention(self._target.config, None) if ours else nullcontext():
            final, context = compiled(_forward)(
                self._target, tokens, positions, self._cache, self._masks, with_context
            )
        return TargetOutput(final[:, :width], None if context is None else context[:, :width])

    def keep(self, counts: Sequence[int]) -> None:
        """Nothing to do: the next forward begins behind what was kept."""

    def select(self, rows: Sequence[int]) -> None:
        """See `TargetState.select`."""
        self._cache.select(torch.tensor(rows, device=self._target.device))

    def join(self, other: RowState) -> None:
        """See `TargetState.join`."""
        self._cache.join(other._cache)


def _forward(
    target: Target,
    tokens: Tensor,
    positions: Tensor,
    cache: RowCache,
    masks: AttentionMasks,
    with_context: bool,
) -> tuple[Tensor, Tensor | None]:
    output = target.forward(
        tokens, positions, cache, masks(positions, cache.end), with_context=with_context
    )
    return output.final, output.context


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
        if owner.fixed:
            return self.rows.write_fixed(key_states, value_states, owner.positions)
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
    rows are packed, `packing` does too, with the `positions` [N] of its tokens. A `fixed` one sees
    the whole buffers, `end` long, and has `positions` [B, Q]."""

    starts: Tensor
    end: int
    packing: Packing | None
    positions: Tensor
    fixed: bool

    def __init__(self, num_layers: int) -> None:
        self._rows = [_RowLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._rows))
        self.end = 0

    @property
    def written(self) -> bool:
        """Whether there was a forward before."""
        return self.end > 0

    def begin(self, starts: Tensor, end: int, packing: Packing | None = None) -> None:
        """The next forward writes row b from `starts[b]`; `end` = max(starts) + Q, on the host."""
        self.starts, self.end, self.packing, self.fixed = starts, end, packing, False
        if packing is not None:
            self.positions = starts[packing.rows] + packing.columns

    def begin_fixed(self, positions: Tensor, end: int) -> None:
        """The next forward writes at `positions` [B, Q], all below `end`, over whole buffers."""
        # layers that take their keys and values of others (Gemma 4) never write
        written = [layer.rows for layer in self._rows if layer.rows.written]
        self.end = max(rows.reserve(len(positions), end) for rows in written)
        self.positions, self.packing, self.fixed = positions, None, True

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

    def join(self, other: RowCache) -> None:
        """Append the rows of `other`."""
        for layer, joining in zip(self._rows, other._rows, strict=True):
            layer.rows.join(joining.rows)


class AttentionMasks:
    """Masks for queries at given positions, as the model of `config` takes them.

    A key at index k is position k. Where all layers attend alike one mask, else a dict by layer
    type. [B, 1, Q, C]: 0 or -inf in `dtype`, to be added to the scores; bool for sdpa on CUDA.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        kinds = attention_kinds(config)
        self._window = config.sliding_window if "sliding_attention" in kinds else None
        self._by_type = bool(getattr(config, "layer_types", None))
        self._dtype = dtype
        self._eager = config._attn_implementation == "eager"

    def __call__(self, positions: Tensor, end: int) -> Any:
        """Of queries at `positions` [B, Q] and keys 0 to `end` - 1."""
        keys = torch.arange(end, device=positions.device)
        place = positions[:, None, :, None]
        full = keys <= place
        if self._window is None:
            return self._as_taken(full)
        sliding = self._as_taken(full & (keys > place - self._window))
        if not self._by_type:
            return sliding
        return {"full_attention": self._as_taken(full), "sliding_attention": sliding}

    def _as_taken(self, seen: Tensor) -> Tensor:
        """sdpa on a CPU takes both, but makes numbers of bools anew in every layer."""
        if seen.is_cuda and not self._eager:
            return seen
        scores = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
        return scores.masked_fill_(
            ~seen, torch.finfo(self._dtype).min if self._eager else -torch.inf
        )
