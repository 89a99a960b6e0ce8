"""The parts that drafters' decoder layers are made of, as Qwen3 has them.

Legend: K queries of a block, D hidden size, H heads, G key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.drafters.rotary import Rotation, rotate
from deepspec.drafters.shape import DrafterShape

# (queries [.., K, H, E], keys [.., K, G, E], values) of the block -> attended [.., K, H, E]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Queries, keys and values of a block; what else they see is `attend`'s affair.

    `input_size` is what the projections take, `hidden_size` where it is not given. `qk_norm`:
    whether the heads of queries and keys are normed.
    """

    def __init__(
        self, config: DrafterShape, input_size: int | None = None, qk_norm: bool = True
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inputs = input_size or config.hidden_size
        width = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(inputs, width, bias=False)
        self.k_proj = nn.Linear(inputs, shared, bias=False)
        self.v_proj = nn.Linear(inputs, shared, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        norm = partial(nn.RMSNorm, config.head_dim, eps=config.rms_norm_eps)
        self.q_norm: Any = norm() if qk_norm else nn.Identity()
        self.k_norm: Any = norm() if qk_norm else nn.Identity()

    def keys_values(self, states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """`states` [.., input] at `rotation` [.., E] -> keys and values [.., G, E]."""
        keys = self.k_proj(states).unflatten(-1, (-1, self.head_dim))
        values = self.v_proj(states).unflatten(-1, (-1, self.head_dim))
        return rotate(self.k_norm(keys), rotation), values

    def forward(self, states: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """`states` [.., K, input] -> [.., K, D]."""
        queries = self.q_proj(states).unflatten(-1, (-1, self.head_dim))
        queries = rotate(self.q_norm(queries), rotation)
        keys, values = self.keys_values(states, rotation)
        return self.o_proj(attend(queries, keys, values).flatten(-2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))


def initialise(module: nn.Module, std: float) -> None:
    """A Linear's or Embedding's weight from N(0, std); biases zero. For `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
