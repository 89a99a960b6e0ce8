"""EAGLE-3: one layer over fused features, autoregressive."""

from deepspec.drafters.eagle3.config import Eagle3Config, resolve_config
from deepspec.drafters.eagle3.model import Eagle3Drafter

__all__ = ["Eagle3Config", "Eagle3Drafter", "resolve_config"]
