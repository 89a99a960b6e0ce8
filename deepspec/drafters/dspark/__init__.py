"""DSpark (and DFlash, its rank 0): block-parallel backbone with low-rank sequential heads."""

from deepspec.drafters.dspark.config import DSparkConfig, resolve_config
from deepspec.drafters.dspark.model import DSparkDrafter
from deepspec.drafters.dspark.proposer import DSparkProposer

__all__ = ["DSparkConfig", "DSparkDrafter", "DSparkProposer", "resolve_config"]
