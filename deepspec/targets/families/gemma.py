"""Gemma 3 and 4: embeddings are multiplied by sqrt(D) before the first layer.

The drafter is given the embedding as that layer sees it; so do serving engines with a Gemma
drafter. One that shares the target's table with a Qwen3 drafter does not scale it, so that an
export in such a layout has to carry the scaled table itself.
"""

from __future__ import annotations

from typing import Any

from deepspec.targets.families.base import Family


class Gemma(Family):
    """Sliding and full attention; layers that share keys and values write none."""

    needs = ("sliding_window", "layer_types")

    def embedding_scale(self, config: Any) -> float:
        """sqrt(D)."""
        return float(config.hidden_size**0.5)
