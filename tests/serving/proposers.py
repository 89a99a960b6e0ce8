"""Every kind of proposer on a target of the tests, each time the same."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deepspec.config.schema import DrafterConfig
from deepspec.decoding import NoDrafts
from deepspec.drafters.base import Proposer
from deepspec.drafters.dspark import DSparkProposer
from deepspec.drafters.ngram import NgramConfig, NgramProposer
from deepspec.drafters.registry import drafter_kind
from deepspec.targets import Target
from tests.decoding.proposers import RandomProposer
from tests.export.conftest import make_drafter


def causal(target: Target, kind: str) -> Proposer:
    torch.manual_seed(0)
    of = drafter_kind(kind)
    shape = DrafterConfig(kind=kind, num_layers=1, block_size=3)
    return of.proposer(of.build(of.resolve(shape, target)).eval(), target)


PROPOSERS: dict[str, Callable[[Target], Proposer]] = {
    "plain": lambda target: NoDrafts(),
    "random": lambda target: RandomProposer(target.vocab_size),
    "dspark": lambda target: DSparkProposer(
        make_drafter(target, "vanilla"), target.embedding, target.head
    ),
    "eagle3": lambda target: causal(target, "eagle3"),
    "ngram": lambda target: NgramProposer(NgramConfig(4, 3, 1)),
}
