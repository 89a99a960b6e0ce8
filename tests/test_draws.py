"""The quick suite draws the same inputs each time: it fails by a fault, never by chance."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.conftest import FRESH, seed_generators

# generators that no seed was given to
UNSEEDED = re.compile(
    r"default_rng\(\)|\bRandom\(\)|Generator\([^()]*\)(?!\.manual_seed)|SystemRandom|urandom"
    r"|\bimport secrets\b|\bfrom secrets\b|\buuid4\b|\.seed\(\)"
)


def draws() -> list[float]:
    return [torch.rand(1).item(), float(np.random.rand()), random.random()]


def test_hypothesis_draws_the_same_examples_unless_asked(request: pytest.FixtureRequest) -> None:
    fresh = request.config.getoption("--hypothesis-profile") == FRESH
    assert settings.default.derandomize is not fresh
    assert settings.default.deadline is None  # a busy machine is no fault
    assert settings.get_profile(FRESH).print_blob


@pytest.fixture
def drawn_before() -> list[float]:
    return draws()


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_tests_draws_depend_on_its_name_alone(
    name: str, drawn_before: list[float], request: pytest.FixtureRequest
) -> None:
    """Whichever tests ran before, and whichever fixtures they had made."""
    found = draws()
    seed_generators(f"{request.node.nodeid} call")
    assert found == draws()
    seed_generators(f"{request.node.nodeid} setup")
    assert drawn_before == draws()
    assert len({*found, *drawn_before}) == 6


def test_no_generator_is_without_a_seed() -> None:
    here = Path(__file__)
    found = [
        f"{path.relative_to(here.parent)}:{number}: {line.strip()}"
        for path in sorted(here.parent.rglob("*.py"))
        if path != here
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if UNSEEDED.search(line)
    ]
    assert not found, found
