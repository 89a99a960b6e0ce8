"""Compilation of a round's forwards (decoding.compile)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class Compilable(Protocol):
    """A proposer that can run its own forward compiled."""

    def compile(self) -> None:
        """Do so from now on."""


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first calls, a compilation a kind of shape.

    Once for all who ask: the objects that it works on are arguments. Not as CUDA graphs, which
    Inductor leaves out where inputs are written, as caches are.
    """
    return torch.compile(function)
