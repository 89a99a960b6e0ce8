"""What the objective takes and gives. Legend: S slots (N*K flattened), F final states of the
target, D hidden size of the draft, E hidden size of the target, R Markov rank, V vocabulary,
V_draft tokens that can be drafted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepspec.drafters.base import Drafter, DraftOutput
from deepspec.records import BlockBatch, TargetFeatures


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch's slots.

    `hidden` [S, D]; `latent` [S, R] and `bias_weight` [V_draft, R] or both None (rank 0);
    `confidence_logits` [S] or None; `target_final` [F, E], of which slots are held against the rows
    `target_rows` [S]; `labels` [S]; `weights` [S], 0 where a slot does not count. `latent_ids` [S]:
    slots of the same one have the same latent; None: each has its own. `vocabulary` [V_draft]: the
    target's ids that the draft head's rows stand for, ascending; None: all V, in order. Gradients
    flow to the first four; that of a shared latent may come to one of the slots that have it.
    """

    hidden: Tensor
    latent: Tensor | None
    bias_weight: Tensor | None
    confidence_logits: Tensor | None
    target_final: Tensor
    target_rows: Tensor
    labels: Tensor
    weights: Tensor
    latent_ids: Tensor | None = None
    vocabulary: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """`loss`: scalar, its terms' weighted sums over the *step's* denominator. The sums are
    detached; `acceptance` [S] = 1 - 0.5 ||p_draft - p_target||_1, 0 where the weight is 0."""

    loss: Tensor
    ce_sum: Tensor
    l1_sum: Tensor
    confidence_sum: Tensor
    acceptance: Tensor


def slots_of(
    output: DraftOutput,
    drafter: Drafter,
    batch: BlockBatch,
    features: TargetFeatures,
    vocabulary: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> LossInputs:
    """What `drafter` gave and the target's features, slot by slot; see `LossInputs`.

    `dtype`: that of the products over the vocabulary, None: as the drafter gave what goes in.
    """
    hidden = output.hidden.flatten(0, 1)
    dtype = dtype or hidden.dtype
    return LossInputs(
        hidden=hidden.to(dtype),
        latent=None if output.latent is None else output.latent.flatten(0, 1).to(dtype),
        bias_weight=drafter.bias_weight,
        confidence_logits=(
            None if output.confidence_logits is None else output.confidence_logits.flatten()
        ),
        target_final=features.final,
        target_rows=(batch.slot_rows if features.all_finals else batch.followed_rows).flatten(),
        labels=batch.labels.flatten(),
        weights=batch.weights.flatten(),
        latent_ids=batch.previous.flatten() if drafter.latent_of_token else None,
        vocabulary=vocabulary,
    )
