"""HyperCLOVA X: the key by which Granite divides its logits multiplies them."""

from __future__ import annotations

from typing import Any

from deepspec.targets.families.base import Family


class HyperClovaX(Family):
    """A dense family with Granite's config keys."""

    def logit_scale(self, config: Any) -> float:
        """The config holds the factor."""
        return float(config.logits_scaling)
