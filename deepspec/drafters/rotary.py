"""Rotary position embedding, angles always in fp32. Two conventions: which dimensions make a pair.

Computed from the config on first use and never a module buffer: a buffer would follow
`.to(bfloat16)`, and bf16 frequencies silently ruin long positions.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Rotation = tuple[Tensor, Tensor]


class Rotary:
    """Cosines and sines for `head_dim` at any positions."""

    def __init__(
        self, head_dim: int, parameters: dict[str, Any], max_position_embeddings: int
    ) -> None:
        self._inverse_frequency, self._scale = _frequencies(
            head_dim, json.dumps(parameters, sort_keys=True), max_position_embeddings
        )

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """`positions` [...] -> (cos, sin), each [..., head_dim] in `dtype`."""
        if self._inverse_frequency.device != positions.device:
            self._inverse_frequency = self._inverse_frequency.to(positions.device)
        angles = positions[..., None].float() * self._inverse_frequency
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self._scale).to(dtype), (angles.sin() * self._scale).to(dtype)


@lru_cache
def _frequencies(
    head_dim: int, parameters: str, max_position_embeddings: int
) -> tuple[Tensor, float]:
    rope = json.loads(parameters)  # as text, because a cache asks for keys that hash
    kind = rope["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
        return 1.0 / rope["rope_theta"] ** exponents, 1.0
    config = Qwen3Config(
        head_dim=head_dim, rope_parameters=rope, max_position_embeddings=max_position_embeddings
    )
    with torch.device("cpu"):  # also where a drafter is built on meta: all share this result
        frequency, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequency.float(), float(scale)


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Rotate `states` [..., H, head_dim] by `rotation` [..., head_dim] (no head axis).

    Half rotation (NeoX): a pair is dimensions i and i + head_dim / 2.
    """
    cos, sin = rotation[0].unsqueeze(-2), rotation[1].unsqueeze(-2)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def rotate_pairs(states: Tensor, rotation: Rotation, *, inverse: bool = False) -> Tensor:
    """Rotate the last R dimensions of `states` [..., H, head_dim] by `rotation` [..., R], or back.

    Interleaved (GPT-J): a pair is dimensions 2i and 2i + 1.
    """
    cos, sin = (table.unsqueeze(-2).chunk(2, dim=-1)[0] for table in rotation)
    sin = -sin if inverse else sin
    plain, turned = states.split((states.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((plain.to(turned.dtype), turned), dim=-1)
