"""Latent attention of a block over a window of context and itself.

Keys and values are one latent, shared by all heads, that was rotated by position; rotating the
output back by the query's position leaves values rotated by their distance. A window is small, so
it is gathered: every block has its own [J, E] latents, and no mask over the whole context exists.
Legend: N blocks, K block size, J latents that a block sees, H heads, E head dimension, R rotated
dimensions of E, G groups of heads, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.drafters.dspark_v4.config import DSparkV4Config
from deepspec.drafters.rotary import Rotation, rotate_pairs

# a block's own latents [N, K, E] -> all that it sees [N, J, E], and which of them are there [N, J]
See = Callable[[Tensor], tuple[Tensor, Tensor]]


class LatentAttention(nn.Module):
    """Low-rank queries, one latent for keys and values, a sink a head, grouped low-rank output."""

    def __init__(self, config: DSparkV4Config) -> None:
        super().__init__()
        heads, size, eps = config.num_attention_heads, config.head_dim, config.rms_norm_eps
        self.heads, self.groups, self.eps = heads, config.o_groups, eps
        self.wq_a = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_norm = nn.RMSNorm(config.q_lora_rank, eps=eps)
        self.wq_b = nn.Linear(config.q_lora_rank, heads * size, bias=False)
        self.wkv = nn.Linear(config.hidden_size, size, bias=False)
        self.kv_norm = nn.RMSNorm(size, eps=eps)
        self.wo_a = GroupedLinear(heads * size, config.o_groups, config.o_lora_rank)
        self.wo_b = nn.Linear(config.o_groups * config.o_lora_rank, config.hidden_size, bias=False)
        self.attn_sink = nn.Parameter(torch.zeros(heads))

    def latent(self, states: Tensor, rotation: Rotation) -> Tensor:
        """Keys and values at once: `states` [.., D] at `rotation` [.., R] -> [.., E]."""
        latent = self.kv_norm(self.wkv(states))
        return rotate_pairs(latent[..., None, :], rotation)[..., 0, :]

    def forward(self, states: Tensor, rotation: Rotation, see: See) -> Tensor:
        """`states` [N, K, D] at `rotation` [N, K, R] -> [N, K, D]."""
        queries = self.wq_b(self.q_norm(self.wq_a(states))).unflatten(-1, (self.heads, -1))
        queries = F.rms_norm(queries, queries.shape[-1:], eps=self.eps)
        attended = attend(
            rotate_pairs(queries, rotation), *see(self.latent(states, rotation)), self.attn_sink
        )
        attended = rotate_pairs(attended, rotation, inverse=True)
        return self.wo_b(self.wo_a(attended.flatten(-2)))


class GroupedLinear(nn.Linear):
    """Each of G groups of inputs [I/G] has its own product: weight [G*R, I/G], [.., I] -> [.., G*R]
    (R here the rank of a group)."""

    def __init__(self, inputs: int, groups: int, rank: int) -> None:
        super().__init__(inputs // groups, groups * rank, bias=False)
        self.groups = groups

    def forward(self, states: Tensor) -> Tensor:
        """[.., I] -> [.., G*R]."""
        grouped = states.unflatten(-1, (self.groups, -1))
        weight = self.weight.unflatten(0, (self.groups, -1))
        return torch.einsum("...gi,gri->...gr", grouped, weight).flatten(-2)


def attend(queries: Tensor, latents: Tensor, visible: Tensor, sinks: Tensor) -> Tensor:
    """`queries` [N, K, H, E] over `latents` [N, J, E], of which `visible` [N, J]; all of a block
    see the same. A head's sink [H] is a score that no value belongs to. -> [N, K, H, E].
    """
    scores = torch.einsum("nkhe,nje->nkhj", queries, latents) * queries.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(scores.dtype, sinks.dtype))
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    sink = sinks.to(scores.dtype)[:, None].expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("nkhj,nje->nkhe", weights.to(latents.dtype), latents)
