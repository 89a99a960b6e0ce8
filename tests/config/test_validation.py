"""What a value may be. Nothing here reads the tables of validation.py: a new key without a check
shows up, because every number of the schema is tried.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from deepspec.config.keys import KEYS
from deepspec.config.loading import config_from, load_config
from deepspec.config.schema import RunConfig
from deepspec.config.validation import validate
from deepspec.errors import ConfigError

# -1 is the embedding, and the rest is held against the target
NEGATIVE_IS_FINE = {"target.layer_ids", "drafter.mask_token_id", "decoding.stop_token_ids"}
NUMBERS = [key for key, kind in KEYS.items() if kind in (int, float, list[int], list[float])]
CHOICES = {
    "target.dtype": "auto, float32, bfloat16",
    "drafter.kind": "dspark, dflash, dspark_v4, eagle3, mtp, ngram",
    "drafter.markov_head": "vanilla, gated, rnn",
    "objective.implementation": "fused, eager",
    "training.precision": "bf16, fp32",
    "engine.device": "auto, cpu, cuda",
    "tracking.wandb_mode": "offline, online, disabled",
    "export.profile": "serving, full",
}

VALID = config_from({"recipe": "r", "target": {"path": "t"}, "data": {"path": ["d"]}})


def changed(**changes: Any) -> RunConfig:
    """VALID with keys changed past the loader; `a__b` is a.b."""
    config = copy.deepcopy(VALID)
    for key, value in changes.items():
        *groups, name = key.split("__")
        node: Any = config
        for group in groups:
            node = getattr(node, group)
        setattr(node, name, value)
    return config


def refusal(key: str, value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(changed(**{key.replace(".", "__"): value}))
    return str(caught.value)


@pytest.mark.parametrize("key", [key for key in NUMBERS if key not in NEGATIVE_IS_FINE])
def test_every_number_is_checked(key: str) -> None:
    many = KEYS[key] in (list[int], list[float])
    real = KEYS[key] in (float, list[float])
    for value in (-1, math.nan, math.inf) if real else (-1,):
        message = refusal(key, [value, 0] if many else value)
        assert message.startswith(f"{key}=")
        assert " must be " in message


@pytest.mark.parametrize(
    ("key", "lowest"),
    [
        ("training.batch_size", 1),
        ("training.max_steps", 1),
        ("drafter.markov_rank", 0),
        ("drafter.head_dim", 2),
        ("training.validation_samples", 0),
        ("regenerate.temperature", 0.0),
        ("training.warmup_ratio", 0.0),
        ("decoding.top_p", 1e-9),
        ("evaluation.temperatures", [0.0]),
        ("training.betas", [0.0, 0.0]),
        ("objective.ce_weight", 0.0),
    ],
)
def test_the_lowest_value_is_fine(key: str, lowest: Any) -> None:
    name = key.replace(".", "__")
    validate(changed(**{name: lowest, "training__micro_batch_size": 1}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.batch_size", 0),
        ("drafter.num_attention_heads", 0),  # would silently be the target's
        ("data.limit", 0),
        ("decoding.top_p", 0.0),
        ("regenerate.top_p", 1.01),
        ("training.warmup_ratio", 1.0),
        ("training.betas", [0.9]),
        ("training.betas", [0.9, 1.0]),
        ("evaluation.temperatures", []),
        ("evaluation.temperatures", [0.0, 1.0, 0.0]),  # would be counted twice
        ("evaluation.seeds", []),
        ("evaluation.seeds", [3, 3]),
        ("evaluation.benchmarks", ["a/test.jsonl", "b/test.jsonl"]),
        ("seed", 2**63),
        ("out", ""),
        ("target.path", ""),
        ("data.path", [""]),
        ("data.date", "today"),
        ("data.date", "2026-13-01"),
        ("data.date", "20260101"),
        ("data.fields.roles", {"critic": "judge"}),
        ("tracking.trackers", ["mlflow"]),
        ("target.layer_ids", [3, 1]),
        ("target.layer_ids", [1, 1]),
        ("target.layer_ids", []),
        ("drafter.head_dim", 7),
    ],
)
def test_out_of_range(key: str, value: Any) -> None:
    assert refusal(key, value).startswith(f"{key}={value} must be ")


@pytest.mark.parametrize(("key", "choices"), CHOICES.items())
def test_choices_are_listed(key: str, choices: str) -> None:
    assert refusal(key, "nonsense") == f"{key}=nonsense must be one of {choices}"
    for choice in choices.split(", "):
        validate(changed(**{key.replace(".", "__"): choice}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"training__micro_batch_size": 9, "training__batch_size": 8},
            ("training.micro_batch_size=9", "training.batch_size=8"),
        ),
        (
            {"training__min_learning_rate": 2e-3, "training__learning_rate": 1e-3},
            ("training.min_learning_rate=0.002", "training.learning_rate=0.001"),
        ),
        (
            {"drafter__ngram_min": 4, "drafter__ngram_max": 3},
            ("drafter.ngram_min=4", "drafter.ngram_max=3"),
        ),
        (
            {"objective__ce_weight": 0.0, "objective__l1_weight": 0.0},
            ("objective.ce_weight", "objective.l1_weight"),
        ),
        (
            {"drafter__kind": "mtp", "drafter__draft_vocab_size": 100},
            ("drafter.draft_vocab_size=100", "mtp"),
        ),
        (
            {"drafter__kind": "mtp", "drafter__qk_norm": False},
            ("drafter.qk_norm=false", "eagle3", "mtp"),
        ),
        (
            {"drafter__kind": "dspark_v4", "training__compile": True},
            ("training.compile=true", "dspark_v4"),
        ),
        (
            {"drafter__kind": "eagle3", "training__activation_checkpointing": True},
            ("training.activation_checkpointing=true", "eagle3"),
        ),
        (
            {"engine__kind": "zero3", "training__compile": True},
            ("training.compile=true", "engine=zero3"),
        ),
    ],
)
def test_keys_that_do_not_agree_are_both_named(
    changes: dict[str, Any], named: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(changed(**changes))
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize("key", ["sk-secret", "hf_secret", "AIzaSecret"])
def test_an_api_key_is_not_taken_for_the_name_of_its_variable(key: str) -> None:
    with pytest.raises(ConfigError, match="must be the name of an environment variable") as error:
        load_config("tiny", [f"regenerate.api_key_env={key}"])
    assert key not in str(error.value)
    load_config("tiny", ["regenerate.api_key_env=OPENAI_API_KEY"])
