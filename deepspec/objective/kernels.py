"""What happens to a chunk's logits between the products: loss terms and their gradient.

Two ways to the same numbers. `in_tiles` works in place on a few rows at a time, so that they stay
in a processor's cache from one pass to the next. `compiled` is one expression for torch.compile,
which makes a few passes of it; every chunk has the same shape there, so it is compiled once.
With z the draft logits, p = softmax(z), q the target's distribution, y the label:

    d CE / dz = p - onehot(y)
    d ||p - q||_1 / dz = p * (s - <s, p>),   s = sign(p - q)

Legend: C slots of a chunk, P target positions behind them, U different latents, V vocabulary of the
drafts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from deepspec.errors import MissingDependencyError

TILE = 2**18  # numbers a tile: several passes over 1 MiB, which a core's cache holds


@dataclass(frozen=True)
class Chunk:
    """`logits` [C, V], to which row `bias_rows` [C] of `bias` [U, V] is added where there is one;
    `target` [P, V] probabilities, of which a slot is held against row `target_rows` [C]; `labels`
    [C]; `l1`, `ce` [C]: what the terms weigh."""

    logits: Tensor
    bias: Tensor | None
    bias_rows: Tensor | None
    target: Tensor
    target_rows: Tensor
    labels: Tensor
    l1: Tensor
    ce: Tensor


Terms = tuple[Tensor, Tensor, Tensor]
"""CE [C], the L1 distance over V [C], and d(l1 * L1 + ce * CE) / d logits [C, V]."""


def tile_rows(chunk_size: int, vocabulary: int, device: torch.device) -> int:
    """Rows that `in_tiles` takes at a time; on CUDA a launch costs more than a cache gives."""
    return chunk_size if device.type == "cuda" else min(chunk_size, max(1, TILE // vocabulary))


def in_tiles(chunk: Chunk, scratch: Tensor, wanted: bool) -> Terms:
    """`scratch` [tile, V]. The gradient, where `wanted`, takes the place of the logits."""
    slots, step = len(chunk.logits), len(scratch)
    ce, distance = chunk.ce.new_empty(slots), chunk.l1.new_empty(slots)
    for first in range(0, slots, step):
        rows = slice(first, min(first + step, slots))
        p, other = chunk.logits[rows], scratch[: rows.stop - first]
        if chunk.bias is not None and chunk.bias_rows is not None:
            p.add_(torch.index_select(chunk.bias, 0, chunk.bias_rows[rows], out=other))
        label = chunk.labels[rows, None]
        ce[rows] = _softmax_(p, label)
        torch.index_select(chunk.target, 0, chunk.target_rows[rows], out=other)
        sign = torch.sub(p, other, out=other)
        distance[rows] = torch.linalg.vector_norm(sign, 1, dim=1)
        if wanted:
            l1, teaching = chunk.l1[rows, None], chunk.ce[rows, None]
            signed = sign.sign_().mul_(p)
            # l1 * s * p + (ce - l1 * <s, p>) * p - ce * onehot(y)
            p.mul_(teaching - l1 * signed.sum(dim=1, keepdim=True)).addcmul_(signed, l1)
            p.scatter_add_(1, label, -teaching)
    return ce, distance, chunk.logits


def _softmax_(logits: Tensor, label: Tensor) -> Tensor:
    """Softmax in place over the last dimension; gives -log p[label] [C], however small p is."""
    chosen, largest = logits.gather(1, label).squeeze(1), logits.amax(dim=1)
    torch.softmax(logits, dim=1, out=logits)
    # the largest probability is one over the sum of exponentials
    return largest - logits.amax(dim=1).log() - chosen


def terms(
    logits: Tensor,
    target: Tensor,
    target_rows: Tensor,
    labels: Tensor,
    l1: Tensor,
    ce: Tensor,
    dtype: torch.dtype,
) -> Terms:
    """The same without a bias of its own, as an expression; the gradient in `dtype`."""
    total = logits.logsumexp(dim=1, keepdim=True)
    log_p = logits - total
    p = log_p.exp()
    difference = p - target[target_rows]
    sign = difference.sign()
    mean = (sign * p).sum(dim=1, keepdim=True)
    taught = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    gradient = p * (l1[:, None] * (sign - mean) + ce[:, None]) - torch.where(taught, ce[:, None], 0)
    cross_entropy = -log_p.gather(1, labels[:, None]).squeeze(1)
    return cross_entropy, difference.abs().sum(dim=1), gradient.to(dtype)


def compiled_terms(wanted: str, device: torch.device) -> Callable[..., Terms] | None:
    """`terms` as torch.compile makes it, where objective.compile=`wanted` asks for it: auto does on
    CUDA, if Triton is there. Raises MissingDependencyError for always where it is not."""
    if wanted == "never" or (wanted == "auto" and device.type != "cuda"):
        return None
    if device.type == "cuda" and find_spec("triton") is None:
        if wanted == "auto":
            return None
        raise MissingDependencyError(
            "objective.compile=always needs Triton on CUDA; run: pip install triton, or set "
            "objective.compile=auto, which goes without"
        )
    return _compiled()


@functools.cache
def _compiled() -> Callable[..., Terms]:
    return torch.compile(terms, dynamic=False, fullgraph=True)
