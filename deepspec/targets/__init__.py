"""The frozen target model and its features."""

from deepspec.targets.ends import TargetEnds, load_ends
from deepspec.targets.families import require_croppable
from deepspec.targets.features import check_layer_ids, default_layer_ids
from deepspec.targets.head import FrozenHead
from deepspec.targets.loading import load_target
from deepspec.targets.target import Target, TargetOutput

__all__ = [
    "FrozenHead",
    "Target",
    "TargetEnds",
    "TargetOutput",
    "check_layer_ids",
    "default_layer_ids",
    "load_ends",
    "load_target",
    "require_croppable",
]
