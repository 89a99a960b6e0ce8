"""The objective as the paper writes it: the reference that the fused version is tested against.

L = 0.1 CE(draft, token) + 0.9 ||p_draft - p_target||_1 + 1.0 BCE(c, c*), each a weighted mean over
the whole optimizer step (dspark.md, "Objective"). Holds several [S, V] tensors.

Of a drafter with a vocabulary of its own, p_draft is 0 outside of it, so what the target puts there
counts in L1 and lowers c*. A label outside has no finite CE: the slot's CE counts 0 (and still in
the mean, so that the terms keep their ratio), its L1 and BCE as ever.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.config.schema import ObjectiveConfig
from deepspec.objective.inputs import LossInputs, LossOutput
from deepspec.targets import FrozenHead


def eager_loss(
    inputs: LossInputs,
    draft_head: FrozenHead,
    target_head: FrozenHead,
    config: ObjectiveConfig,
    denominator: float,
) -> LossOutput:
    """The loss of one micro-batch; `denominator` is the weight of the whole step."""
    precise = torch.promote_types(inputs.hidden.dtype, torch.float32)
    draft_logits = draft_head(inputs.hidden).to(precise)
    if inputs.latent is not None and inputs.bias_weight is not None:
        w2 = inputs.bias_weight.to(inputs.latent.dtype)
        draft_logits = draft_logits + (inputs.latent @ w2.T).to(precise)
    with torch.no_grad():
        target = target_head(inputs.target_final[inputs.target_rows]).to(precise).softmax(-1)
    log_draft = draft_logits.log_softmax(-1)
    if inputs.vocabulary is not None:
        nowhere = torch.full_like(target, -torch.inf)
        log_draft = nowhere.index_copy(1, inputs.vocabulary, log_draft)
    weights = inputs.weights.to(precise)

    cross_entropy = F.nll_loss(log_draft, inputs.labels, reduction="none")
    if inputs.vocabulary is not None:
        inside = torch.isin(inputs.labels, inputs.vocabulary)
        cross_entropy = torch.where(inside, cross_entropy, 0)
    distance = (log_draft.exp() - target).abs().sum(-1)
    acceptance = (1 - 0.5 * distance).detach()
    confidence = torch.zeros_like(weights)
    if inputs.confidence_logits is not None:
        confidence = F.binary_cross_entropy_with_logits(
            inputs.confidence_logits.to(precise), acceptance.clamp(0, 1), reduction="none"
        )

    def total(term: Tensor) -> Tensor:
        return (weights * term).sum()

    loss = (
        config.ce_weight * total(cross_entropy)
        + config.l1_weight * total(distance)
        + config.confidence_weight * total(confidence)
    ) / denominator
    return LossOutput(
        loss=loss,
        ce_sum=total(cross_entropy).detach(),
        l1_sum=total(distance).detach(),
        confidence_sum=total(confidence).detach(),
        acceptance=torch.where(weights > 0, acceptance, 0),
    )
