"""Manifold hyper-connections: a residual of n streams that every block reads and writes mixed.

Computed in fp32 also under autocast: the streams are what all rounding would pile up in.
Legend: n streams, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.drafters.dspark_v4.config import DSparkV4Config


class HyperConnection(nn.Module):
    """Around one block: its input is a mix of the streams, its output goes into all of them."""

    def __init__(self, config: DSparkV4Config) -> None:
        super().__init__()
        self.streams = config.hc_mult
        self.rounds = config.hc_sinkhorn_iters - 1
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        mixes = (2 + self.streams) * self.streams
        self.fn = nn.Parameter(torch.empty(mixes, self.streams * config.hidden_size))
        self.base = nn.Parameter(torch.zeros(mixes))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, streams: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """`streams` [.., n, D], `block` [.., D] -> [.., D]: the streams behind the block."""
        with torch.autocast(streams.device.type, enabled=False):
            states, post, comb = self.mix(streams)
        output = block(states)
        with torch.autocast(streams.device.type, enabled=False):
            written = post[..., None] * output[..., None, :]
            return (written + comb.mT @ streams).to(streams.dtype)

    def mix(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block's input [.., D], and how its output and the streams are mixed afterwards:
        post [.., n] and comb [.., n, n], which is doubly stochastic."""
        n = self.streams
        pre, post, comb = projected(streams, self.fn, self.norm_eps).split((n, n, n * n), dim=-1)
        pre_base, post_base, comb_base = self.base.split((n, n, n * n))
        pre = torch.sigmoid(pre * self.scale[0] + pre_base) + self.eps
        post = 2 * torch.sigmoid(post * self.scale[1] + post_base)
        comb = (comb * self.scale[2] + comb_base).unflatten(-1, (n, n)).softmax(-1) + self.eps
        comb = self._sinkhorn(comb).to(streams.dtype)
        return weighted(pre, streams), post.to(streams.dtype), comb

    def _sinkhorn(self, comb: Tensor) -> Tensor:
        """Columns, then rows and columns in turn: what is left is doubly stochastic."""
        comb = comb / (comb.sum(-2, keepdim=True) + self.eps)
        for _ in range(self.rounds):
            comb = comb / (comb.sum(-1, keepdim=True) + self.eps)
            comb = comb / (comb.sum(-2, keepdim=True) + self.eps)
        return comb


class HyperHead(nn.Module):
    """Behind the last block: the streams become one state."""

    def __init__(self, config: DSparkV4Config) -> None:
        super().__init__()
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.base = nn.Parameter(torch.zeros(config.hc_mult))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, streams: Tensor) -> Tensor:
        """[.., n, D] -> [.., D]."""
        with torch.autocast(streams.device.type, enabled=False):
            mixes = projected(streams, self.fn, self.norm_eps)
            return weighted(torch.sigmoid(mixes * self.scale + self.base) + self.eps, streams)


def projected(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """`fn` [m, n*D] of the flattened streams [.., n, D], divided by their RMS: [.., m], at least
    fp32."""
    flat = streams.flatten(-2)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return F.linear(flat, fn.to(flat.dtype)) * (flat.square().mean(-1, keepdim=True) + eps).rsqrt()


def weighted(weights: Tensor, streams: Tensor) -> Tensor:
    """The sum of streams [.., n, D] by weights [.., n]: [.., D], in the streams' dtype."""
    return (weights[..., None] * streams).sum(-2).to(streams.dtype)
