"""The settings that a drafter's weights depend on: checkpoints of one run have the same."""

from __future__ import annotations

from collections.abc import Mapping
from operator import eq
from typing import Any

from deepspec.config.places import PATHS, same_place
from deepspec.config.schema import RunConfig, as_dict, dotted

GROUPS = ("seed", "target", "data", "regenerate", "drafter", "objective", "training")
NEUTRAL = {  # of these groups, what the weights do not depend on
    "target.attention",
    "target.parallel",
    "target.max_memory",
    "target.offload_folder",
    "drafter.ngram_max",
    "drafter.ngram_min",
    "regenerate.api_key_env",
    "regenerate.batch_size",
    "regenerate.concurrency",
    "regenerate.retries",
    "regenerate.timeout",
    "objective.implementation",
    "objective.chunk_size",
    "objective.compile",
    "training.micro_batch_size",
    "training.compile",
    "training.activation_checkpointing",
    "training.evaluate_every",
    "training.save_every",
    "training.keep_last",
    "training.log_every",
    "training.resume",
}


def decides(key: str) -> bool:
    """Whether a drafter's weights depend on the dotted `key`."""
    return key.partition(".")[0] in GROUPS and key not in NEUTRAL


def changed(config: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `config` that `before` has otherwise, by dotted key; one that `before` lacks, as a
    config of an older version may, had its default. A path written in another way is the same."""
    known = dotted(as_dict(RunConfig())) | dotted(before)
    return {
        key: value
        for key, value in dotted(config).items()
        if decides(key) and not (same_place if key in PATHS else eq)(known.get(key), value)
    }
