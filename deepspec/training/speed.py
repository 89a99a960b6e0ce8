"""How fast a step is: tokens a second, and the share of the device's peak (MFU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepspec.records import Sample

Work = Callable[[Sequence[int], Sequence[int]], float]
"""Tokens of each sample of a micro-batch and its blocks -> floating-point operations."""


@dataclass
class Speed:
    """`work`: what a micro-batch takes by formula, whatever it is computed with; None for a kind of
    drafter without formulas. `peak`: operations per second that this process's device can do, None
    where that is not known. `measure`: how the peak was measured, None where it was given.

    A step that is faster than a measured peak shows that other work disturbed the measurement: the
    peak is measured again, and if the step is still faster, MFU is not shown any more.
    """

    work: Work | None
    peak: float | None
    measure: Callable[[], float] | None = None

    def note(self, micro_batches: Sequence[Sequence[Sample]], anchors: int, seconds: float) -> str:
        """Of one step of this process, of `anchors` a sample: `9.3k tokens/s  MFU 41 %`."""
        rate = sum(len(sample) for samples in micro_batches for sample in samples) / seconds
        shown = f"{rate / 1e3:.3g}k tokens/s" if rate >= 1e3 else f"{rate:.3g} tokens/s"
        if self.work is None or self.peak is None:
            return shown
        flops = 0.0
        for samples in micro_batches:
            if samples:
                supervised = (int(sample.loss_mask.sum()) - 1 for sample in samples)
                blocks = [max(1, min(anchors, count)) for count in supervised]
                flops += self.work([len(sample) for sample in samples], blocks)
        reached = flops / seconds
        if self.measure is not None and reached > self.peak:
            again = self.measure()
            self.peak = again if reached <= again else None
        return shown if self.peak is None else f"{shown}  MFU {reached / self.peak:.0%}"
