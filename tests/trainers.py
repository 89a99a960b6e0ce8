"""A trainer on the tiny random target, and samples with answers of uneven length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from deepspec.config.loading import config_from
from deepspec.data.vocabulary import count_tokens, frequent_tokens
from deepspec.drafters.registry import drafter_kind
from deepspec.features.sources import FeatureSource, Online
from deepspec.records import Sample
from deepspec.targets import TargetEnds
from deepspec.training.engine import open_engine
from deepspec.training.run_folder import RunFolder
from deepspec.training.trainer import Trainer

SETTINGS = {
    "recipe": "test",
    "target": {"path": "unused"},
    "data": {"path": ["unused"]},
    "drafter": {"num_layers": 1, "markov_rank": 8, "block_size": 4},
    "training": {
        "epochs": 3.0,
        "batch_size": 4,
        "micro_batch_size": 4,
        "anchors_per_sample": 6,
        "learning_rate": 3e-3,
        "precision": "fp32",
        "log_every": 1,
        "evaluate_every": 4,
        "save_every": 3,
    },
    "engine": {"device": "cpu"},
}


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    """Prompts of 3 tokens, and answers of 2 to 20 that count up: there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        length = int(torch.randint(2, 21, (1,), generator=generator))
        first = int(torch.randint(10, 200, (1,), generator=generator))
        answer = first + torch.arange(length) % 5
        ids = torch.cat((torch.tensor([1, 20, 21]), answer))
        name = "sample" if seed == 0 else f"other-{seed}"
        samples.append(Sample(ids, torch.arange(len(ids)) >= 3, f"{name}-{index:03d}"))
    return samples


def build_trainer(
    target: TargetEnds | Callable[[], TargetEnds],
    folder: Path,
    *overrides: str,
    samples: int = 13,
    source: FeatureSource | None = None,
) -> Trainer:
    """A trainer in the run folder `folder`, which it holds until the process ends or it is let go.

    `target` may be a function: a target that is split needs the engine's processes to be loaded.

    13 samples make a last step of one: of several processes, all but one are without work.
    """
    config = config_from(SETTINGS, overrides)
    run = RunFolder(folder).__enter__()
    engine = open_engine(config.engine, config.training, config.tracking, run.path)
    target = target if isinstance(target, TargetEnds) else target()
    kind = drafter_kind(config.drafter.kind)
    torch.manual_seed(config.seed)
    drafter = kind.build(kind.resolve(config.drafter, target))
    data, validation = make_samples(samples), make_samples(4, seed=1)
    if (size := config.drafter.draft_vocab_size) is not None:
        drafter.restrict(frequent_tokens(count_tokens(data, target.vocab_size), size, []))
    source = Online(target, kind.all_finals) if source is None else source
    return Trainer(config, target, source, drafter, data, validation, run, engine)


MakeTrainer = Callable[..., Trainer]
