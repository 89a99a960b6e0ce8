"""Which samples are trained on, and which make up which optimizer step: pure functions."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from deepspec.data.conversations import SkipCounts
from deepspec.records import Sample


def cut_samples(
    samples: Iterable[Sample], max_length: int, context: int | None, skips: SkipCounts
) -> list[Sample]:
    """Cut `samples` at `max_length` tokens and at the end of the target's `context`.

    `skips` counts the samples that are cut, and those dropped because no two supervised tokens
    in a row are left.
    """
    most, limit = max_length, f"data.max_length={max_length}"
    if context is not None and context < max_length:
        most, limit = context, f"the end of the target's context, {context}"
    kept = []
    for sample in samples:
        if len(sample) > most:
            ids, mask = sample.input_ids[:most].clone(), sample.loss_mask[:most].clone()
            if not bool((mask[1:] & mask[:-1]).any()):
                skips[f"answers after {limit}"] += 1
                continue
            skips[f"the rest of a sample after {limit}"] += 1
            sample = replace(sample, input_ids=ids, loss_mask=mask)
        kept.append(sample)
    return kept


def hold_out(samples: Sequence[Sample], count: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation) samples: whole conversations drawn by `seed`, until they have `count`
    samples, but at most a fifth of all conversations: no prompt is in both.

    Both come sorted by id, whatever the order in which answers were written.
    """
    ordered = sorted(samples, key=lambda sample: sample.sample_id)
    conversations: dict[str | int, list[int]] = defaultdict(list)
    for index, sample in enumerate(ordered):
        conversations[sample.conversation_id or index].append(index)
    whole, chosen = list(conversations.values()), set[int]()
    most = min(count, len(whole) // 5)
    for indices in random.Random(f"validation/{seed}").sample(whole, most):
        if len(chosen) < count:
            chosen.update(indices)
    training = [sample for index, sample in enumerate(ordered) if index not in chosen]
    return training, [ordered[index] for index in sorted(chosen)]


@functools.lru_cache(maxsize=2)  # asked for at every step
def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> tuple[list[int], ...]:
    """Sample indices of every step of an epoch: shuffled, each once, the last step may be short."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order[first : first + batch_size] for first in range(0, count, batch_size))


def split_batch(
    batch: Sequence[int], loads: Sequence[int], ranks: int, micro_batch_size: int
) -> list[list[list[int]]]:
    """One step's samples as [rank][micro-batch] lists of indices; `loads`: what each sample costs.

    The costliest first onto the rank with the least to do, so ranks finish together, but no rank
    takes more than its share of the count: a micro-batch more in one would be one more in all.
    Every rank gets the same number of micro-batches (collectives must match); some may be empty.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    work, most = [0] * ranks, -(-len(batch) // ranks)
    for index in sorted(batch, key=lambda i: (-loads[i], i)):
        open_ranks = [rank for rank in range(ranks) if len(shares[rank]) < most]
        rank = min(open_ranks, key=lambda r: (work[r], r))
        shares[rank].append(index)
        work[rank] += loads[index]
    micro_batches = max(-(-len(share) // micro_batch_size) for share in shares)
    return [
        [share[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(micro_batches)]
        for share in shares
    ]
