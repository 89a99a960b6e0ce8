"""MTP: DeepSeek-V3's module for the next token (section 2.2 of its report).

The newest token's embedding and the target's last hidden state, each normed, projected together
into an ordinary decoder layer. The hidden state is the LM head's input, so after the target's final
norm: what engines hand to the module. One draft a round (MTP-1); of more, the module reads its own
output, as engines run it. Legend: see `causal`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.config.schema import DrafterConfig
from deepspec.drafters.causal import CausalDrafter, resolve_layer
from deepspec.drafters.layers import initialise
from deepspec.drafters.shape import DrafterShape
from deepspec.records import TargetFeatures


def resolve_config(config: DrafterConfig, target: Any) -> DrafterShape:
    """The drafter's shape for `target`; nulls taken from it. Raises ConfigError."""
    return DrafterShape(**resolve_layer(config, target))


class MtpDrafter(CausalDrafter):
    """Parameter names are DeepSeek's, apart from `norm`, its shared_head.norm."""

    def __init__(self, config: DrafterShape) -> None:
        size = config.hidden_size
        super().__init__(config, attention_input=size)
        self.enorm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.apply(partial(initialise, std=config.initializer_range))

    def fuse(self, features: TargetFeatures) -> Tensor:
        """The last hidden state as it is; captured layers are not read."""
        assert features.all_finals, "see DrafterKind.all_finals"
        return features.final.to(self.dtype)

    def mix(self, embedded: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """W = D."""
        pair = torch.cat((self.enorm(embedded), self.hnorm(feature)), dim=-1)
        states = self.eh_proj(pair).to(self.dtype)
        return self.input_layernorm(states), states
