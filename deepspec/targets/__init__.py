"""The frozen target model and its features."""

from deepspec.targets.checkpoint import load_text_side
from deepspec.targets.ends import TargetEnds, load_ends
from deepspec.targets.families import attention_kinds
from deepspec.targets.features import check_layer_ids, default_layer_ids
from deepspec.targets.head import FrozenHead
from deepspec.targets.loading import load_target
from deepspec.targets.target import Target, TargetOutput

__all__ = [
    "FrozenHead",
    "Target",
    "TargetEnds",
    "TargetOutput",
    "attention_kinds",
    "check_layer_ids",
    "default_layer_ids",
    "load_ends",
    "load_target",
    "load_text_side",
]
