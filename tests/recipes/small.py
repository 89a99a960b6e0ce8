"""Overrides under which a shipped recipe runs whole, on the random target, in a second or two."""

from __future__ import annotations

import json
from pathlib import Path

PROMPTS = 10
STEPS = 2


def write_prompts(path: Path) -> Path:
    """A few prompts without answers, named p0, p1, ..."""
    rows = ({"id": f"p{i}", "turns": [f"Say {i}."]} for i in range(PROMPTS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small(target: Path, prompts: Path) -> dict[str, str]:
    """Settings by key; `words` puts them on a command line."""
    return {
        "target.path": str(target),
        "target.num_layer_ids": "2",
        "data.path": str(prompts),
        "data.limit": "8",
        "data.max_length": "64",
        "regenerate.max_new_tokens": "12",
        "drafter.num_layers": "1",
        "training.epochs": "9",
        "training.max_steps": str(STEPS),
        "training.batch_size": "4",
        "training.micro_batch_size": "4",
        "training.anchors_per_sample": "4",
        "training.learning_rate": "0.002",
        "training.log_every": "1",
        "training.evaluate_every": "1",
        "training.save_every": "1",
        "engine.device": "cpu",
        "decoding.max_new_tokens": "8",
        "evaluation.benchmarks": str(prompts),
        "evaluation.limit": "1",
        "evaluation.baseline_prompts": "1",
        "evaluation.temperatures": "0",
    }


def words(settings: dict[str, str]) -> list[str]:
    """As `key=value` words."""
    return [f"{key}={value}" for key, value in settings.items()]
