"""Samples and their anchors packed into one BlockBatch (shapes in `records.BlockBatch`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec.records import BlockBatch, Sample


def build_blocks(
    samples: Sequence[Sample],
    anchors: Sequence[Tensor],
    block_size: int,
    decay: float,
) -> BlockBatch:
    """Pack `samples` end to end with `anchors[i]` [n_i] of sample i.

    Slot j of a block at anchor a is labelled by token a + j + 1 and weighs exp(-j / decay) while
    that position lies in the sample and every label up to it is supervised (dspark.md,
    "Objective"); else 0.
    """
    lengths = torch.tensor([len(sample) for sample in samples])
    starts = lengths.cumsum(0) - lengths
    counts = torch.tensor([len(own) for own in anchors])
    documents = torch.arange(len(samples))
    block_documents = documents.repeat_interleave(counts)
    anchor = torch.cat([*anchors]) if len(anchors) else torch.empty(0, dtype=torch.int64)

    tokens = torch.cat([sample.input_ids for sample in samples])
    supervised = torch.cat([sample.loss_mask for sample in samples])
    followed = torch.cat([sample.followed for sample in samples])
    slots = torch.arange(block_size)
    position = anchor[:, None] + slots  # of the token before each label
    inside = position + 1 < lengths[block_documents][:, None]
    row = (starts[block_documents][:, None] + position).clamp(max=len(tokens) - 1)
    label_row = (row + 1).clamp(max=len(tokens) - 1)
    counted = (supervised[label_row] & inside).long().cumprod(dim=1).bool()

    return BlockBatch(
        tokens=tokens,
        document_ids=documents.repeat_interleave(lengths),
        positions=torch.arange(len(tokens)) - starts.repeat_interleave(lengths),
        block_documents=block_documents,
        anchors=anchor,
        rows=starts[block_documents] + anchor,
        # the token before a counted label is always real; behind the counted slots it is
        # some token of the pack, and weighs nothing
        previous=tokens[row],
        labels=torch.where(counted, tokens[label_row], 0),
        weights=torch.where(counted, torch.exp(-slots / decay), 0.0),
        followed_rows=(followed.cumsum(0) - 1).clamp(min=0)[row],
        sample_ids=tuple(sample.sample_id for sample in samples),
    )
