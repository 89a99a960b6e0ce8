"""A target whose outputs can be counted."""

from __future__ import annotations

import pytest

from deepspec.targets import Target
from tests.conftest import make_model, make_tokenizer
from tests.decoding.chi_square import VOCABULARY


@pytest.fixture(scope="session")
def small() -> Target:
    """Seven tokens."""
    return Target(make_model(VOCABULARY, layers=5, seed=1), make_tokenizer(), 2, "small")
