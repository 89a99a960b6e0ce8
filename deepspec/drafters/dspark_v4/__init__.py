"""DSpark as DeepSeek V4 ships it: hyper-connections, latent attention in a window, experts."""

from deepspec.drafters.dspark_v4.config import DSparkV4Config, resolve_config, shape_for
from deepspec.drafters.dspark_v4.model import DSparkV4Drafter
from deepspec.drafters.dspark_v4.proposer import DSparkV4Proposer

__all__ = ["DSparkV4Config", "DSparkV4Drafter", "DSparkV4Proposer", "resolve_config", "shape_for"]
