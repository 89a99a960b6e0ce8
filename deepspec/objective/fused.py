"""The objective without ever holding [S, V]: chunks of slots, gradients computed in the forward.

With z the draft logits, p = softmax(z), q the target's distribution, y the label, w the weight:

    d CE / dz = p - onehot(y)
    d ||p - q||_1 / dz = p * (s - <s, p>),   s = sign(p - q)

so one pass over a chunk's logits gives loss and gradient, and dz is pushed through the frozen head
at once. The backward only scales what the forward left. Slots of weight zero are never touched.
Chunk buffers are allocated once a call and reused: shapes that change fragment the heap.
Of a drafter with a vocabulary of its own, z and p are over that, and the mass that q has outside of
it is added to the L1 distance: a constant.
Legend: S slots, C chunk, D draft hidden, R rank, V vocabulary, V_draft tokens that can be drafted
(V or fewer).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.config.schema import ObjectiveConfig
from deepspec.objective.inputs import LossInputs, LossOutput
from deepspec.targets import FrozenHead


def fused_loss(
    inputs: LossInputs,
    draft_head: FrozenHead,
    target_head: FrozenHead,
    config: ObjectiveConfig,
    denominator: float,
) -> LossOutput:
    """Same numbers as `eager_loss`, in a chunk's memory."""
    active = inputs.weights.nonzero().squeeze(1)

    def pick(values: Tensor) -> Tensor:
        return values.index_select(0, active)

    weights, labels = pick(inputs.weights), pick(inputs.labels)
    taught = weights  # by cross-entropy: not where the label cannot be drafted
    if inputs.vocabulary is not None:
        tokens, vocabulary = labels, inputs.vocabulary
        labels = torch.searchsorted(vocabulary, tokens).clamp_(max=len(vocabulary) - 1)
        taught = torch.where(vocabulary[labels] == tokens, weights, 0)
    fixed = _Fixed(
        pick(inputs.target_final),
        labels,
        weights,
        taught,
        inputs.vocabulary,
        draft_head,
        target_head,
        config,
    )
    loss, ce_sum, l1_sum, acceptance = _Distillation.apply(
        pick(inputs.hidden),
        None if inputs.latent is None else pick(inputs.latent),
        inputs.bias_weight,
        fixed,
    )
    confidence_sum = torch.zeros_like(ce_sum)
    if inputs.confidence_logits is not None:
        logits = pick(inputs.confidence_logits).to(acceptance.dtype)
        terms = F.binary_cross_entropy_with_logits(logits, acceptance.clamp(0, 1), reduction="none")
        confidence = (weights * terms).sum()
        loss = loss + config.confidence_weight * confidence
        confidence_sum = confidence.detach()
    scattered = acceptance.new_zeros(inputs.weights.shape[0])
    return LossOutput(
        loss=loss / denominator,
        ce_sum=ce_sum,
        l1_sum=l1_sum,
        confidence_sum=confidence_sum,
        acceptance=scattered.index_copy(0, active, acceptance),
    )


class _Fixed(NamedTuple):
    """What no gradient flows to. `labels` [S] are rows of the draft head, `weights` [S] those of
    L1, `taught` [S] those of CE."""

    target_final: Tensor
    labels: Tensor
    weights: Tensor
    taught: Tensor
    vocabulary: Tensor | None
    draft_head: FrozenHead
    target_head: FrozenHead
    config: ObjectiveConfig


class _Distillation(torch.autograd.Function):
    """ce_weight * sum w CE + l1_weight * sum w L1, and their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latent: Tensor | None,
        bias_weight: Tensor | None,
        fixed: _Fixed,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config, slots, compute = fixed.config, hidden.shape[0], hidden.dtype
        precise = torch.promote_types(compute, torch.float32)
        head, soft_cap = fixed.draft_head.weight.to(compute), fixed.draft_head.soft_cap
        w2 = None if bias_weight is None else bias_weight.detach().to(compute)
        weights, taught = fixed.weights.to(precise), fixed.taught.to(precise)
        wanted = any(ctx.needs_input_grad[:3])

        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_latent = torch.empty_like(latent) if wanted and latent is not None else None
        grad_w2 = torch.zeros_like(w2, dtype=precise) if wanted and w2 is not None else None
        ce, l1 = hidden.new_empty(slots, dtype=precise), hidden.new_empty(slots, dtype=precise)

        size = max(1, min(config.chunk_size, slots))
        buffers = hidden.new_empty(3, size, len(head), dtype=precise)
        whole = buffers[1]
        if fixed.vocabulary is not None:
            whole = hidden.new_empty(size, len(fixed.target_head.weight), dtype=precise)
        for first in range(0, slots, size):
            part = slice(first, min(first + size, slots))
            rows = part.stop - first
            p, q, scratch = buffers[:, :rows]
            h, m = hidden[part], None if latent is None else latent[part]
            cap_slope = _logits_into(p, h, head, soft_cap, m, w2, wanted)
            label = fixed.labels[part, None]
            ce[part] = _softmax_(p, label)
            outside = _target_into(q, whole[:rows], fixed.target_final[part], fixed)
            sign = q.sub_(p)  # q - p, whose sign is -s
            l1[part] = torch.abs(sign, out=scratch).sum(dim=1) + outside
            if not wanted:
                continue
            distance = config.l1_weight * weights[part, None]
            teaching = config.ce_weight * taught[part, None]
            grad = _slot_gradient(p, sign, scratch, label, distance, teaching).to(compute)
            if grad_latent is not None and grad_w2 is not None and m is not None and w2 is not None:
                torch.mm(grad, w2, out=grad_latent[part])
                _add_product(grad_w2, grad.T, m)
            if cap_slope is not None:
                grad = grad * cap_slope.to(compute)
            assert grad_hidden is not None
            torch.mm(grad, head, out=grad_hidden[part])
        ctx.save_for_backward(
            grad_hidden,
            grad_latent,
            None if grad_w2 is None else grad_w2.to(bias_weight.dtype),  # type: ignore[union-attr]
        )
        ce_sum, l1_sum = taught @ ce, weights @ l1
        acceptance = 1 - 0.5 * l1
        ctx.mark_non_differentiable(ce_sum, l1_sum, acceptance)
        return config.ce_weight * ce_sum + config.l1_weight * l1_sum, ce_sum, l1_sum, acceptance

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        def scaled(gradient: Tensor | None) -> Tensor | None:
            return None if gradient is None else gradient * grad_loss.to(gradient.dtype)

        return (*(scaled(gradient) for gradient in ctx.saved_tensors), None)


def _target_into(q: Tensor, whole: Tensor, final: Tensor, fixed: _Fixed) -> Tensor | float:
    """The target's distribution into `whole` [C, V], and what of it can be drafted into `q`, which
    is `whole` where all can. Gives the mass outside [C]."""
    _logits_into(whole, final, fixed.target_head.weight, fixed.target_head.soft_cap)
    _softmax_(whole)
    if fixed.vocabulary is None:
        return 0.0
    torch.index_select(whole, 1, fixed.vocabulary, out=q)
    return (1 - q.sum(dim=1)).clamp_(min=0)


def _logits_into(
    out: Tensor,
    hidden: Tensor,
    head: Tensor,
    soft_cap: float | None,
    latent: Tensor | None = None,
    w2: Tensor | None = None,
    slope_wanted: bool = False,
) -> Tensor | None:
    """soft_cap(hidden @ head.T) + latent @ w2.T into `out`; the soft cap's slope where wanted."""
    slope = None
    if out.dtype == hidden.dtype == head.dtype:
        torch.mm(hidden, head.T, out=out)
    else:
        out.copy_(hidden @ head.to(hidden.dtype).T)
    if soft_cap is not None:
        out.div_(soft_cap).tanh_()
        slope = 1 - out * out if slope_wanted else None
        out.mul_(soft_cap)
    if latent is not None and w2 is not None:
        _add_product(out, latent, w2.T)
    return slope


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right; a temporary as large as `out` only where their precisions differ."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


def _softmax_(logits: Tensor, label: Tensor | None = None) -> Tensor:
    """Softmax in place over the last dimension; gives -log p[label] [C] where labels are given."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    chosen = logits.gather(1, label).squeeze(1) if label is not None else None
    total = logits.exp_().sum(dim=1, keepdim=True)
    logits.div_(total)
    log_total = total.log_().squeeze(1)
    return log_total if chosen is None else log_total - chosen


def _slot_gradient(
    p: Tensor,
    minus_sign: Tensor,
    scratch: Tensor,
    label: Tensor,
    l1: Tensor,
    ce: Tensor,
) -> Tensor:
    """d(l1 * L1 + ce * CE) / dz, overwriting the buffers [C, V_draft]; `l1`, `ce` [C, 1]."""
    sign = minus_sign.sign_().neg_()
    # p * (l1 * (s - <s, p>) + ce) - ce * onehot(y)
    mean = torch.mul(sign, p, out=scratch).sum(dim=1, keepdim=True)
    gradient = sign.sub_(mean).mul_(l1).add_(ce).mul_(p)
    return gradient.scatter_add_(1, label, -ce)
