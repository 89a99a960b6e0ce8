"""Verification by rejection sampling: what makes speculative decoding lossless.

dspark.md, "Verification": accept x_k with probability min(1, p_t / p_d), left to right; at the
first rejection sample from normalize(max(p_t - p_d, 0)); after full acceptance sample one bonus
token from p_t. Then every emitted token is distributed as the target's own (Leviathan et al. 2023,
appendix A.1). Legend: B rows, W drafts of the longest row, N verified positions of all rows,
V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.decoding.sampling import Sampling, draw
from deepspec.records import Verification


def verify(
    tokens: Tensor,
    draft: Tensor | None,
    target_logits: Tensor,
    scheduled: Tensor,
    sampling: Sampling,
    uniforms: Tensor | None,
) -> Verification:
    """Judge `tokens` [B, W], of which row b's first `scheduled[b]` were verified.

    `draft` [B, W, V]: the distribution each token was drawn from, None for point masses.
    `target_logits` [N, V]: the target's, at each row's anchor and its verified drafts, row after
    row.
    `uniforms` [B, >= W + 1] in [0, 1): one an acceptance; the last column, whatever W, for the last
    token, so that a row's draws do not depend on its batch mates' widths. Unused when greedy.
    """
    width = tokens.shape[1]
    if not width:  # a plain step, at the cost of one
        return Verification(scheduled, _last(target_logits, sampling, uniforms))
    slots = torch.arange(width, device=tokens.device)
    looked_at = slots < scheduled[:, None]
    anchor = (scheduled + 1).cumsum(0) - (scheduled + 1)  # where each row begins among the N
    place = (anchor[:, None] + slots).clamp(max=target_logits.shape[0] - 1)
    if sampling.greedy:
        choice = target_logits.argmax(-1)
        accepted = _prefix((tokens == choice[place]) & looked_at)
        return Verification(accepted, choice[anchor + accepted])

    assert uniforms is not None
    target = sampling.probabilities(target_logits)
    p = target[place, tokens]
    q = torch.ones_like(p) if draft is None else draft.gather(2, tokens[..., None]).squeeze(2)
    accepted = _prefix((uniforms[:, :width] * q < p) & looked_at)

    row = torch.arange(tokens.shape[0], device=tokens.device)
    last = target[anchor + accepted]
    slot = accepted.clamp(max=width - 1)  # where a rejected draft stood
    if draft is None:
        proposed = torch.zeros_like(last).scatter_(1, tokens[row, slot][:, None], 1.0)
    else:
        proposed = draft[row, slot]
    rejected = (accepted < scheduled)[:, None]
    last = torch.where(rejected, residual(last, proposed), last)
    return Verification(accepted, draw(last, uniforms[:, -1]))


def _last(logits: Tensor, sampling: Sampling, uniforms: Tensor | None) -> Tensor:
    """The next token [B] by the target's `logits` [B, V] alone."""
    if sampling.greedy:
        return logits.argmax(-1)
    assert uniforms is not None
    return draw(sampling.probabilities(logits), uniforms[:, -1])


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """max(p_t - p_d, 0) [B, V], unnormalised (`draw` takes any scale).

    Where rounding leaves nothing (p_t equals p_d up to it), the target's distribution itself.
    """
    left = (target - draft).clamp(min=0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, target)


def _prefix(accepted: Tensor) -> Tensor:
    """[B, W] bool -> how many are true before the first false [B]."""
    return accepted.long().cumprod(dim=1).sum(dim=1)
