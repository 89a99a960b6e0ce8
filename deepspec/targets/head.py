"""The target's LM head, frozen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenHead(nn.Module):
    """hidden [.., D] -> logits [.., V], soft-capped as the family does: cap * tanh(x / cap).

    The weight [V, D] is a plain tensor: no parameter, no gradient, not part of a state dict.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, soft_cap: float | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.soft_cap = soft_cap

    def rows(self, ids: Tensor) -> FrozenHead:
        """A copy that gives the logits of the tokens `ids` [V_draft] alone."""
        return FrozenHead(self.weight[ids.to(self.weight.device)], self.soft_cap)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits in `hidden`'s dtype."""
        logits = F.linear(hidden, self.weight.to(hidden.dtype))
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits
