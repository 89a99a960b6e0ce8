"""How fast a step is: tokens a second, and the share of the device's peak (MFU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepspec.records import Sample

Work = Callable[[Sequence[int], Sequence[int]], float]
"""Tokens of each sample of a micro-batch and its blocks -> floating-point operations."""


@dataclass(frozen=True)
class Speed:
    """`work`: what a micro-batch takes by formula, whatever it is computed with; `peak`: operations
    a second that this process's device can do, None where that is not known."""

    work: Work
    peak: float | None

    def note(self, micro_batches: Sequence[Sequence[Sample]], anchors: int, seconds: float) -> str:
        """Of one step of this process, of `anchors` a sample: `9.3k tokens/s  MFU 41 %`."""
        tokens, flops = 0, 0.0
        for samples in micro_batches:
            if samples:
                lengths = [len(sample) for sample in samples]
                supervised = (int(sample.loss_mask.sum()) - 1 for sample in samples)
                flops += self.work(lengths, [max(1, min(anchors, count)) for count in supervised])
                tokens += sum(lengths)
        rate = tokens / seconds
        shown = f"{rate / 1e3:.3g}k tokens/s" if rate >= 1e3 else f"{rate:.3g} tokens/s"
        return shown if self.peak is None else f"{shown}  MFU {flops / seconds / self.peak:.0%}"
