"""Rotary position embedding, half-rotation (NeoX) convention, angles always in fp32.

Computed from the config on first use and never a module buffer: a buffer would follow
`.to(bfloat16)`, and bf16 frequencies silently ruin long positions.
"""

from __future__ import annotations

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
            head_dim, tuple(sorted(parameters.items())), max_position_embeddings
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
    head_dim: int, parameters: tuple[tuple[str, Any], ...], max_position_embeddings: int
) -> tuple[Tensor, float]:
    rope = dict(parameters)
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
    """Rotate `states` [..., H, head_dim] by `rotation` [..., head_dim] (no head axis)."""
    cos, sin = rotation[0].unsqueeze(-2), rotation[1].unsqueeze(-2)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
