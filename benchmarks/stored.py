"""A training of recipe=tiny on a store of features, for the scripts beside this file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from deepspec.commands import stages
from deepspec.commands.feature_sources import feature_source, open_store
from deepspec.config.loading import load_config
from deepspec.drafters.registry import drafter_kind
from deepspec.training.engine import open_engine
from deepspec.training.run_folder import RunFolder
from deepspec.training.trainer import Trainer


@contextmanager
def training_on(store: Path, *words: str) -> Iterator[Trainer]:
    """A new trainer under the settings `words`; its run folder is deleted behind it."""
    given = ["features=stored", f"features.path={store}", "training.epochs=1000", *words]
    config = load_config("tiny", given)
    with tempfile.TemporaryDirectory() as out:
        folder = RunFolder(Path(out))
        engine = open_engine(config.engine, config.training, config.tracking, folder.path)
        target = stages.open_ends(config)
        opened = open_store(config, target)
        data = stages.load_samples(config, target, folder.answers, opened)
        source = feature_source(config, target, data, folder, engine, opened)
        kind = drafter_kind(config.drafter.kind)
        torch.manual_seed(config.seed)
        drafter = kind.build(kind.resolve(config.drafter, target))
        yield Trainer(config, target, source, drafter, data.samples, [], folder, engine)
        source.close()
