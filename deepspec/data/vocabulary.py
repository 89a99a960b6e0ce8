"""The tokens that a drafter of a reduced vocabulary drafts: the most frequent ones of the answers.

Legend: V vocabulary, V_draft tokens that can be drafted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from deepspec.errors import ConfigError
from deepspec.records import Sample

SAMPLES_AT_ONCE = 1024


def count_tokens(samples: Sequence[Sample], vocab_size: int) -> Tensor:
    """How often each token is in the answers [V]; nothing but supervised tokens is ever drafted."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for first in range(0, len(samples), SAMPLES_AT_ONCE):
        some = samples[first : first + SAMPLES_AT_ONCE]
        answers = torch.cat([sample.input_ids[sample.loss_mask] for sample in some])
        counts += torch.bincount(answers, minlength=vocab_size)
    return counts


def frequent_tokens(counts: Tensor, size: int, always: Iterable[int]) -> Tensor:
    """Ids [V_draft] of the `size` most frequent tokens, ascending; of equals the lower ids.

    The tokens `always`, those that end an answer, are among them however rare. Raises ConfigError
    where they do not fit in.
    """
    always = sorted(set(always))
    if len(always) > size:
        raise ConfigError(
            f"drafter.draft_vocab_size={size} has no room for the {len(always)} tokens that end an "
            "answer; raise it"
        )
    ranked = counts.clone()
    ranked[always] = counts.max() + 1
    return ranked.argsort(descending=True, stable=True)[:size].sort().values


def coverage(counts: Tensor, ids: Tensor) -> float:
    """The share of the answers' tokens that can be drafted; any other ends a block."""
    return float(counts[ids].sum()) / max(1, int(counts.sum()))
