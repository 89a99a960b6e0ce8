"""The objective without ever holding [S, V]: chunks of slots, gradients computed in the forward.

One pass over a chunk's logits gives loss and gradient with respect to them (`kernels`), and that is
pushed through the frozen head at once. The backward only scales what the forward left. Slots of
weight zero are never touched. Slots are sorted, so that what several of them have in common is
computed once: the target's distribution at a position, which is behind up to K slots (of as many
blocks), and the bias of a latent, where that depends on the previous token alone. A chunk is cut
without regard to that; what lies across its border is computed in both.
Chunk buffers are allocated once a call and reused: shapes that change fragment the heap.
Of a drafter with a vocabulary of its own, z and p are over that, and the mass that q has outside of
it is added to the L1 distance: a constant.
Legend: S slots, C chunk, P target positions, U different latents, D draft hidden, E target hidden,
R rank, V vocabulary, V_draft tokens that can be drafted (V or fewer).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.config.schema import ObjectiveConfig
from deepspec.objective.inputs import LossInputs, LossOutput
from deepspec.objective.kernels import Chunk, Terms, compiled_terms, in_tiles, tile_rows
from deepspec.targets import FrozenHead


def fused_loss(
    inputs: LossInputs,
    draft_head: FrozenHead,
    target_head: FrozenHead,
    config: ObjectiveConfig,
    denominator: float,
) -> LossOutput:
    """Same numbers as `eager_loss`, in a chunk's memory."""
    # compiled chunks have no bias of their own: where a compiler is, its product costs less than
    # the passes that would save it
    expression = compiled_terms(config.compile, inputs.hidden.device)
    ids = None if inputs.latent is None or expression is not None else inputs.latent_ids
    order = _order(inputs, ids)

    def pick(values: Tensor) -> Tensor:
        return values.index_select(0, order)

    weights, labels = pick(inputs.weights), pick(inputs.labels)
    taught = weights  # by cross-entropy: not where the label cannot be drafted
    if inputs.vocabulary is not None:
        tokens, vocabulary = labels, inputs.vocabulary
        labels = torch.searchsorted(vocabulary, tokens).clamp_(max=len(vocabulary) - 1)
        taught = torch.where(vocabulary[labels] == tokens, weights, 0)
    size = config.chunk_size if expression else max(1, min(config.chunk_size, len(order)))
    rows = pick(inputs.target_rows)
    targets, latents = _shared(rows, size), None if ids is None else _shared(pick(ids), size)
    latent = inputs.latent
    if latent is not None:
        latent = pick(latent) if latents is None else latent[order[latents.firsts]]
    fixed = _Fixed(
        final=inputs.target_final[rows[targets.firsts]],
        targets=targets,
        latents=latents,
        labels=labels,
        weights=weights,
        taught=taught,
        vocabulary=inputs.vocabulary,
        draft_head=draft_head,
        target_head=target_head,
        config=config,
        size=size,
        expression=expression,
    )
    loss, ce_sum, l1_sum, acceptance = _Distillation.apply(
        pick(inputs.hidden), latent, inputs.bias_weight, fixed
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
        acceptance=scattered.index_copy(0, order, acceptance),
    )


def _order(inputs: LossInputs, ids: Tensor | None) -> Tensor:
    """Slots that weigh something, sorted by latent `ids` and then by target position."""
    active = inputs.weights.nonzero().squeeze(1)
    key = inputs.target_rows
    if ids is not None:
        key = key + ids * len(inputs.target_final)
    return active[key[active].argsort(stable=True)]


class _Shared(NamedTuple):
    """Sorted slots by what they have in common: `of` [S] the group of each, `firsts` [G] the first
    slot of each group, `spans` the groups that each chunk has to do with."""

    of: Tensor
    firsts: Tensor
    spans: list[slice]


def _shared(ids: Tensor, size: int) -> _Shared:
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids[1:] != ids[:-1]
    of = begins.cumsum(0) - 1
    first = torch.arange(0, len(ids), size, device=ids.device)
    last = (first + size - 1).clamp(max=len(ids) - 1)
    spans = [slice(a, b + 1) for a, b in torch.stack((of[first], of[last]), dim=1).tolist()]
    return _Shared(of, begins.nonzero().squeeze(1), spans)


class _Fixed(NamedTuple):
    """What no gradient flows to. `final` [P, E]; `labels` [S] are rows of the draft head, `weights`
    [S] those of L1, `taught` [S] those of CE; `latents`: None where every slot has its own;
    `size`: C; `expression`: `kernels.terms`, compiled, or None."""

    final: Tensor
    targets: _Shared
    latents: _Shared | None
    labels: Tensor
    weights: Tensor
    taught: Tensor
    vocabulary: Tensor | None
    draft_head: FrozenHead
    target_head: FrozenHead
    config: ObjectiveConfig
    size: int
    expression: Any


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
        work = _Chunks(hidden, latent, bias_weight, fixed, any(ctx.needs_input_grad[:3]))
        precise, config = work.precise, fixed.config
        ce = hidden.new_empty(len(hidden), dtype=precise)
        l1 = torch.empty_like(ce)
        for index in range(len(fixed.targets.spans)):
            part = work.slots(index)
            ce[part], l1[part] = work.terms(index, part)
        ctx.save_for_backward(
            work.grad_hidden,
            work.grad_latent,
            None if work.grad_w2 is None else work.grad_w2.to(bias_weight.dtype),  # type: ignore[union-attr]
        )
        ce_sum, l1_sum = fixed.taught.to(precise) @ ce, fixed.weights.to(precise) @ l1
        acceptance = 1 - 0.5 * l1
        ctx.mark_non_differentiable(ce_sum, l1_sum, acceptance)
        return config.ce_weight * ce_sum + config.l1_weight * l1_sum, ce_sum, l1_sum, acceptance

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        def scaled(gradient: Tensor | None) -> Tensor | None:
            return None if gradient is None else gradient * grad_loss.to(gradient.dtype)

        return (*(scaled(gradient) for gradient in ctx.saved_tensors), None)


class _Chunks:
    """The buffers of a call, and what is done with each chunk; gradients where they are `wanted`.

    `hidden` [S, D], `latent` [U, R] (or [S, R]) and `bias_weight` [V_draft, R] as in `LossInputs`.
    """

    def __init__(
        self,
        hidden: Tensor,
        latent: Tensor | None,
        bias_weight: Tensor | None,
        fixed: _Fixed,
        wanted: bool,
    ) -> None:
        self._hidden, self._latent, self._fixed, self._wanted = hidden, latent, fixed, wanted
        self._compute = hidden.dtype
        self.precise = torch.promote_types(hidden.dtype, torch.float32)
        self._head = fixed.draft_head.weight.to(hidden.dtype)
        self._w2 = None if bias_weight is None else bias_weight.detach().to(hidden.dtype)
        self.grad_hidden = torch.empty_like(hidden) if wanted else None
        with_head = wanted and latent is not None
        self.grad_latent = torch.zeros_like(latent) if with_head else None  # type: ignore[arg-type]
        self.grad_w2 = torch.zeros_like(self._w2, dtype=self.precise) if with_head else None  # type: ignore[arg-type]
        size, drafted = fixed.size, len(self._head)
        self._logits, self._q = self._buffer(size, drafted), self._buffer(size, drafted)
        self._bias = None if fixed.latents is None else self._buffer(size, drafted)
        self._whole = self._q  # the target's distribution over all V
        if fixed.vocabulary is not None:
            self._whole = self._buffer(size, len(fixed.target_head.weight))
        tile = tile_rows(size, drafted, hidden.device)
        self._scratch = None if fixed.expression else self._buffer(tile, drafted)

    def _buffer(self, rows: int, width: int) -> Tensor:
        return self._hidden.new_empty(rows, width, dtype=self.precise)

    def slots(self, index: int) -> slice:
        """Those of chunk `index`."""
        first = index * self._fixed.size
        return slice(first, min(first + self._fixed.size, len(self._hidden)))

    def terms(self, index: int, part: slice) -> tuple[Tensor, Tensor]:
        """CE and L1 [C] of the slots `part`, the chunk `index`; adds its share of the gradients."""
        fixed, positions = self._fixed, self._fixed.targets.spans[index]
        logits = self._logits[: part.stop - part.start]
        latents = part if fixed.latents is None else fixed.latents.spans[index]
        latent = None if self._latent is None else self._latent[latents]
        slope = self._draft_into(logits, part, latent)
        q, outside = self._target(positions)
        target_rows = fixed.targets.of[part] - positions.start
        chunk = Chunk(
            logits,
            None if self._bias is None else self._bias[: latents.stop - latents.start],
            None if fixed.latents is None else fixed.latents.of[part] - latents.start,
            q,
            target_rows,
            fixed.labels[part],
            fixed.config.l1_weight * fixed.weights[part].to(self.precise),
            fixed.config.ce_weight * fixed.taught[part].to(self.precise),
        )
        ce, l1, gradient = self._kernel(chunk)
        if outside is not None:
            l1 = l1 + outside[target_rows]
        if self._wanted:
            self._push(gradient, part, latents, latent, chunk, slope)
        return ce, l1

    def _draft_into(self, logits: Tensor, part: slice, latent: Tensor | None) -> Tensor | None:
        """The draft's logits but for a bias that slots share, which gets a buffer of its own; the
        slope of the soft cap where there is one."""
        slope = _logits_into(
            logits, self._hidden[part], self._head, self._fixed.draft_head.soft_cap, self._wanted
        )
        if latent is not None and self._w2 is not None:
            if self._bias is None:
                _add_product(logits, latent, self._w2.T)
            else:
                _product_into(self._bias[: len(latent)], latent, self._w2.T)
        return slope

    def _target(self, positions: slice) -> tuple[Tensor, Tensor | None]:
        """The target's distribution at `positions` [P], as far as it can be drafted [P, V_draft],
        and the mass outside of that [P], None where all can."""
        fixed, count = self._fixed, positions.stop - positions.start
        whole, head = self._whole[:count], fixed.target_head
        _logits_into(whole, fixed.final[positions], head.weight, head.soft_cap)
        torch.softmax(whole, dim=1, out=whole)
        if fixed.vocabulary is None:
            return whole, None
        q = torch.index_select(whole, 1, fixed.vocabulary, out=self._q[:count])
        return q, (1 - q.sum(dim=1)).clamp_(min=0)

    def _kernel(self, chunk: Chunk) -> Terms:
        if self._scratch is not None:
            return in_tiles(chunk, self._scratch, self._wanted)
        rows = len(chunk.logits)
        missing = self._fixed.size - rows  # every chunk has the same shape: compiled once

        def padded(values: Tensor) -> Tensor:
            return F.pad(values, (0, missing))

        ce, l1, gradient = self._fixed.expression(
            self._logits,
            self._q,
            *map(padded, (chunk.target_rows, chunk.labels, chunk.l1, chunk.ce)),
            self._compute,
        )
        return ce[:rows], l1[:rows], gradient[:rows]

    def _push(
        self,
        gradient: Tensor,
        part: slice,
        latents: slice,
        latent: Tensor | None,
        chunk: Chunk,
        slope: Tensor | None,
    ) -> None:
        """d loss / d logits [C, V_draft] on to hidden states, latents and W2."""
        if latent is not None:
            assert self.grad_latent is not None
            assert self.grad_w2 is not None
            assert self._w2 is not None
            summed = gradient
            if chunk.bias is not None and chunk.bias_rows is not None:
                summed = chunk.bias.zero_().index_add_(0, chunk.bias_rows, gradient)
            summed = summed.to(self._compute)
            self.grad_latent[latents].addmm_(summed, self._w2)
            _add_product(self.grad_w2, summed.T, latent)
        gradient = gradient.to(self._compute)
        if slope is not None:
            gradient = gradient * slope.to(self._compute)
        assert self.grad_hidden is not None
        torch.mm(gradient, self._head, out=self.grad_hidden[part])


def _logits_into(
    out: Tensor, hidden: Tensor, head: Tensor, soft_cap: float | None, slope_wanted: bool = False
) -> Tensor | None:
    """soft_cap(hidden @ head.T) into `out`; the soft cap's slope where wanted."""
    _product_into(out, hidden, head.to(hidden.dtype).T)
    if soft_cap is None:
        return None
    out.div_(soft_cap).tanh_()
    slope = 1 - out * out if slope_wanted else None
    out.mul_(soft_cap)
    return slope


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right; a temporary as large as `out` where their precisions differ on a CPU."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif out.is_cuda:  # sums of products stay fp32 on their way out
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(left @ right)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, likewise."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    elif out.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        out.add_(left @ right)
