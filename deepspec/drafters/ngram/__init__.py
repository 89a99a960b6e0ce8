"""Prompt lookup: n-grams of the text so far, no training."""

from deepspec.drafters.ngram.config import NgramConfig, resolve_config
from deepspec.drafters.ngram.model import NgramDrafter
from deepspec.drafters.ngram.proposer import NgramProposer

__all__ = ["NgramConfig", "NgramDrafter", "NgramProposer", "resolve_config"]
