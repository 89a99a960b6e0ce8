"""Anchors: where blocks begin. Drawn from (seed, epoch, sample id) and nothing else.

So the same sample gets the same anchors on any number of processes and after any resume
(house plan, decision 1).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from deepspec.records import Sample


def anchor_candidates(loss_mask: Tensor) -> Tensor:
    """Positions [M] whose own token and next token are both supervised; `loss_mask` [T] bool."""
    return (loss_mask[:-1] & loss_mask[1:]).nonzero().squeeze(1)


def draw_anchors(sample: Sample, count: int, seed: int, epoch: int) -> Tensor:
    """At most `count` anchors, distinct and ascending, int64."""
    candidates = anchor_candidates(sample.loss_mask)
    if len(candidates) <= count:
        return candidates
    key = f"{seed}/{epoch}/{sample.sample_id}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    # torch.Generator takes 64-bit seeds; the sign bit is left free
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    chosen = torch.randperm(len(candidates), generator=generator)[:count]
    return candidates[chosen.sort().values]
