"""What prompt lookup looks for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deepspec.config.schema import DrafterConfig
from deepspec.drafters.shape import read_shape


@dataclass(frozen=True)
class NgramConfig:
    """At most `block_size` drafts a round, found behind a run of `longest` to `shortest` tokens."""

    block_size: int
    longest: int
    shortest: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NgramConfig:
        """The inverse of `to_dict`. Raises CheckpointError, as `read_shape`."""
        return read_shape(cls, values)


def resolve_config(config: DrafterConfig, target: Any) -> NgramConfig:
    """Nothing of it depends on the target."""
    return NgramConfig(config.block_size, config.ngram_max, config.ngram_min)
