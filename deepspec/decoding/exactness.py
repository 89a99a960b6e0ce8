"""How far two greedy outputs of the same target agree, and whether rounding explains the rest.

In fp32 they are equal. In bf16 a block forward rounds differently from one-token forwards, so
where the target's two best tokens nearly tie, either may win. A difference counts as an error only
where the gap between them exceeds the noise: between two ways of computing the same logits, and
from one number of their dtype to the next, which a third way (another batch) may make of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepspec.decoding.rows import Rows
from deepspec.targets import Target


@dataclass(frozen=True)
class Difference:
    """The first token at which two outputs part.

    `gap` between the two logits in question, `noise` of them (both in logit units); `explained`
    when the gap is within the noise.
    """

    request: str
    index: int
    gap: float
    noise: float

    @property
    def explained(self) -> bool:
        """Whether rounding alone can account for it."""
        return self.gap <= self.noise


@torch.inference_mode()
def first_difference(
    target: Target,
    request: str,
    prompt: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
) -> Difference | None:
    """None when `expected` (plain decoding) and `found` are the same tokens."""
    if tuple(expected) == tuple(found):
        return None
    shared = 0
    for a, b in zip(expected, found, strict=False):
        if a != b:
            break
        shared += 1
    if shared == min(len(expected), len(found)):
        return Difference(request, shared, float("inf"), 0.0)  # one ends where the other goes on
    prefix = [*prompt, *expected[:shared]]
    pair = [expected[shared], found[shared]]
    block = _logits(target, prefix, len(prefix))[pair]
    single = _logits(target, prefix, 1)[pair]
    spacing = torch.finfo(block.dtype).eps * block.abs().max()
    noise = 2 * ((block - single).abs().max() + spacing)  # either logit may move by it
    return Difference(request, shared, float((block[0] - block[1]).abs()), float(noise))


def _logits(target: Target, tokens: Sequence[int], step: int) -> torch.Tensor:
    """Next-token logits [V] after `tokens`, the last ones fed `step` at a time."""
    head = len(tokens) - 1 if step == 1 and len(tokens) > 1 else len(tokens)
    rows = Rows(target, ["x"], [list(tokens[:head])], 1, [])
    _, output = rows.prefill(with_context=False)
    if head < len(tokens):
        last = torch.tensor([[tokens[-1]]], device=target.device)
        start = torch.tensor([head], device=target.device)
        output = rows.forward(last, start, head + 1, with_context=False)
    return target.head(output.final[0, -1])
