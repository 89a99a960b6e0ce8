"""Granite: embeddings and logits are scaled by factors of the config."""

from __future__ import annotations

from typing import Any

from deepspec.targets.families.base import Family


class Granite(Family):
    """A dense family of which only two numbers differ."""

    needs = ("embedding_multiplier", "logits_scaling")

    def embedding_scale(self, config: Any) -> float:
        """What the config says."""
        return float(config.embedding_multiplier)

    def logit_scale(self, config: Any) -> float:
        """The config holds the divisor."""
        return 1 / float(config.logits_scaling)
