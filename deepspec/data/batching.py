"""Which samples make up which optimizer step: a pure function of (seed, epoch)."""

from __future__ import annotations

import random
from collections.abc import Sequence


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Sample indices of every step of an epoch: shuffled, each once, the last step may be short."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return [order[first : first + batch_size] for first in range(0, count, batch_size)]


def split_batch(
    batch: Sequence[int], lengths: Sequence[int], ranks: int, micro_batch_size: int
) -> list[list[list[int]]]:
    """One step's samples as [rank][micro-batch] lists of indices.

    Longest first onto the rank with the fewest tokens, so ranks finish together. Every rank gets
    the same number of micro-batches (collectives must match); some may be empty.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(batch, key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    micro_batches = max(-(-len(share) // micro_batch_size) for share in shares)
    return [
        [share[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(micro_batches)]
        for share in shares
    ]
