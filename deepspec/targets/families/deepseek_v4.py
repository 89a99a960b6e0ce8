"""DeepSeek V4: hyper-connection streams, and compressed attention whose state keeps no positions.

Legend: B rows, T tokens, S streams, D hidden size.
"""

from __future__ import annotations

from torch import Tensor

from deepspec.targets.families.base import SNAPSHOT, Family


class DeepseekV4(Family):
    """A layer's output is S parallel streams, of which drafters read the mean. The LM head's input
    is another mixture of them, so that the last layer's mean is a feature too (the published
    drafter reads it)."""

    rollback = SNAPSHOT
    last_layer = True
    needs = ("hc_mult", "layer_types", "compress_rates", "sliding_window")

    def feature(self, output: Tensor) -> Tensor:
        """[B, T, S, D] -> [B, T, D]."""
        return output.mean(dim=2)
