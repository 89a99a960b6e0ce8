"""What runs: a job is one command of this program, a training is a drafter's shape and seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

LABELS = {"dspark": "DSpark", "dflash": "DFlash", "eagle3": "EAGLE-3", "mtp": "MTP-1"}
# what each kind has of its own; the rest is the recipe's
SHAPES: dict[str, dict[str, object]] = {
    "dspark": {"confidence_head": True},
    "dflash": {"markov_rank": 0, "confidence_head": False},
    "eagle3": {"markov_rank": 0, "confidence_head": False},
    "mtp": {"markov_rank": 0, "confidence_head": False},
}
FORMATS = {"eagle3": "speculators"}  # the others' layout is the recipe's
LAYER_IDS = {"eagle3": 3, "mtp": 1}  # low, middle and high; the last hidden state alone


@dataclass(frozen=True)
class Job:
    """`deepspec WORDS`, started once all of `needs` are done.

    `work`: seconds that it is expected to take on the machine of `estimate`. `alone`: nothing runs
    beside it, and it may use all threads.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    work: float = 0.0
    alone: bool = False


@dataclass(frozen=True)
class Training:
    """A drafter: its kind, decoder layers, drafts a round, sequential head and seed."""

    kind: str
    layers: int
    block: int
    head: str = "vanilla"
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its job and its folder."""
        head = "" if self.head == "vanilla" else f"-{self.head}"
        return f"{self.kind}{head}-layers{self.layers}-block{self.block}-seed{self.seed}"

    @property
    def words(self) -> list[str]:
        """The settings that make it, on top of a recipe's."""
        shape = {
            "kind": self.kind,
            "num_layers": self.layers,
            "block_size": self.block,
            "markov_head": self.head,
            **SHAPES[self.kind],
        }
        words = [f"drafter.{key}={str(value).lower()}" for key, value in shape.items()]
        if self.kind in LAYER_IDS:
            words.append(f"target.num_layer_ids={LAYER_IDS[self.kind]}")
        if self.kind in FORMATS:
            words.append(f"export.format={FORMATS[self.kind]}")
        return [*words, f"seed={self.seed}"]


def listed(values: list[Any]) -> str:
    """A list as the value of a key=value word; texts in quotes, so a path may hold any sign."""
    return json.dumps(values)
