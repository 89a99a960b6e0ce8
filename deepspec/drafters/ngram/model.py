"""The module of a drafter without one."""

from __future__ import annotations

from deepspec.drafters.base import Drafter
from deepspec.drafters.ngram.config import NgramConfig


class NgramDrafter(Drafter):
    """No parameter, no training forward: it brings its config to where a drafter is expected."""

    def __init__(self, config: NgramConfig) -> None:
        super().__init__()
        self.config = config
