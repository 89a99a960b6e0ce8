"""Verification by rejection sampling: what makes speculative decoding lossless.

dspark.md, "Verification": accept x_k with probability min(1, p_t / p_d), left to right; at the
first rejection sample from normalize(max(p_t - p_d, 0)); after full acceptance sample one bonus
token from p_t. Then every emitted token is distributed as the target's own (Leviathan et al. 2023,
appendix A.1). Legend: B rows, W verified drafts, V vocabulary.
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
    `target_logits` [B, W + 1, V]: the target's, at the anchor and at each draft.
    `uniforms` [B, >= W + 1] in [0, 1): one an acceptance; the last column, whatever W, for the last
    token, so that a row's draws do not depend on its batch mates' widths. Unused when greedy.
    """
    width = tokens.shape[1]
    looked_at = torch.arange(width, device=tokens.device) < scheduled[:, None]
    if sampling.greedy:
        choice = target_logits.argmax(-1)
        accepted = _prefix((tokens == choice[:, :width]) & looked_at)
        return Verification(accepted, choice.gather(1, accepted[:, None]).squeeze(1))

    assert uniforms is not None
    target = sampling.probabilities(target_logits)
    index = tokens[..., None]
    p = target[:, :width].gather(2, index).squeeze(2)
    q = torch.ones_like(p) if draft is None else draft.gather(2, index).squeeze(2)
    accepted = _prefix((uniforms[:, :width] * q < p) & looked_at)

    row = torch.arange(tokens.shape[0], device=tokens.device)
    last = target[row, accepted]
    if width:
        place = accepted.clamp(max=width - 1)  # where a rejected draft stood
        if draft is None:
            proposed = torch.zeros_like(last).scatter_(1, tokens[row, place][:, None], 1.0)
        else:
            proposed = draft[row, place]
        rejected = (accepted < scheduled)[:, None]
        last = torch.where(rejected, residual(last, proposed), last)
    return Verification(accepted, draw(last, uniforms[:, -1]))


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """max(p_t - p_d, 0) [B, V], unnormalised (`draw` takes any scale).

    Where rounding leaves nothing (p_t equals p_d up to it), the target's distribution itself.
    """
    left = (target - draft).clamp(min=0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, target)


def _prefix(accepted: Tensor) -> Tensor:
    """[B, W] bool -> how many are true before the first false [B]."""
    return accepted.long().cumprod(dim=1).sum(dim=1)
