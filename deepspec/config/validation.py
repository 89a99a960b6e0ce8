"""What types cannot say: ranges, choices, and keys that must agree."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from deepspec.config.keys import KEYS
from deepspec.config.schema import COLLECTIVE, FIGURES, ROLES, RunConfig, addresses
from deepspec.errors import ConfigError
from deepspec.secrets import has_unquoted_password, shown_url

CHOICES: dict[str, Sequence[str]] = {
    "target.dtype": ("auto", "float32", "bfloat16"),
    "target.rollback": ("auto", "rows", "snapshot"),
    "target.parallel": ("replicated", "tensor", "zero3", "device_map"),
    "drafter.kind": ("dspark", "dflash", "dspark_v4", "eagle3", "mtp", "ngram"),
    "drafter.markov_head": ("vanilla", "gated", "rnn"),
    "objective.implementation": ("fused", "eager"),
    "objective.compile": ("auto", "always", "never"),
    "features.source": ("online", "stored", "hybrid", "remote"),
    "extract.dtype": ("auto", "bfloat16", "float8"),
    "serve.dtype": ("auto", "bfloat16", "float8"),
    "training.precision": ("bf16", "fp32"),
    "engine.kind": ("single", "zero0", "zero1", "zero2", "zero3"),
    "engine.device": ("auto", "cpu", "cuda"),
    "engine.offload": ("none", "cpu"),
    "decoding.scheduler": ("none", "fixed", "threshold", "algorithm1", "async"),
    "decoding.calibration": ("auto", "none"),
    "tracking.wandb_mode": ("offline", "online", "disabled"),
    "export.format": ("flat", "speculators", "deepseek_v4"),
    "export.profile": ("serving", "full"),
}
# kinds of drafter that a setting is for
REDUCIBLE = ("dspark", "dflash", "eagle3")
COMPILABLE = ("dspark", "dflash")
RECOMPUTABLE = ("dspark", "dflash", "dspark_v4")  # a step of the others has effects besides
AT_LEAST_ONE = (
    "target.num_layer_ids",
    "target.context_length",
    "data.max_length",
    "regenerate.max_new_tokens",
    "regenerate.samples_per_prompt",
    "regenerate.batch_size",
    "regenerate.concurrency",
    "drafter.num_layers",
    "drafter.block_size",
    "drafter.intermediate_size",
    "drafter.num_attention_heads",
    "drafter.num_key_value_heads",
    "drafter.head_dim",
    "drafter.ngram_max",
    "drafter.ngram_min",
    "drafter.draft_vocab_size",
    "objective.chunk_size",
    "extract.batch_tokens",
    "serve.queue",
    "serve.max_body_mib",
    "serve.bodies_mib",
    "serve.max_tokens",
    "serve.connections",
    "serve.connections_per_client",
    "training.batch_size",
    "training.micro_batch_size",
    "training.anchors_per_sample",
    "training.evaluate_every",
    "training.save_every",
    "training.keep_last",
    "training.log_every",
    "engine.bucket_size",
    "decoding.max_new_tokens",
    "decoding.batch_size",
    "reproduce.seeds",
    "reproduce.jobs",
    "reproduce.samples",
    "reproduce.steps",
    "reproduce.prompts",
    "reproduce.batch_size",
    "reproduce.block_size",
    "reproduce.calibration_prompts",
    "reproduce.calibration_seeds",
)
# Below it a draw decides at most between logits that their rounding does not tell apart, and far
# below it a division by it overflows.
LEAST_TEMPERATURE = 1e-6
NOT_NEGATIVE = (
    "regenerate.top_k",
    "regenerate.retries",
    "drafter.markov_rank",
    "objective.ce_weight",
    "objective.l1_weight",
    "objective.confidence_weight",
    "training.min_learning_rate",
    "training.weight_decay",
    "features.prefetch",
    "training.validation_samples",
    "decoding.top_k",
    "decoding.threshold",
    "engine.persistence_threshold",
    "evaluation.baseline_prompts",
)
POSITIVE = (
    "regenerate.timeout",
    "objective.decay",
    "training.epochs",
    "training.learning_rate",
    "training.max_grad_norm",
    "training.max_steps",
    "engine.timeout",
    "engine.peak_tflops",
    "features.timeout",
    "features.patience",
    "serve.request_seconds",
    "extract.limit_gib",
    "extract.shard_mib",
    "data.limit",
    "evaluation.limit",
    "reproduce.load_seconds",
)
SHARES = ("regenerate.top_p", "decoding.top_p")
SEEDS = range(2**63)  # what torch takes


def value_of(config: RunConfig, key: str) -> Any:
    """The value at a dotted key."""
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


def validate(config: RunConfig) -> None:
    """Raises ConfigError naming the key, what it is, and what it may be."""
    for key, choices in CHOICES.items():
        _require(value_of(config, key) in choices, config, key, f"one of {', '.join(choices)}")
    for key, kind in KEYS.items():
        if kind is float:
            value = value_of(config, key)
            _require(value is None or math.isfinite(value), config, key, "a finite number")
    for key in AT_LEAST_ONE:
        value = value_of(config, key)
        _require(value is None or value >= 1, config, key, "at least 1")
    for key in NOT_NEGATIVE:
        _require(value_of(config, key) >= 0, config, key, "at least 0")
    for key in POSITIVE:
        value = value_of(config, key)
        _require(value is None or value > 0, config, key, "greater than 0")
    for key in SHARES:
        _require(0 < value_of(config, key) <= 1, config, key, "greater than 0 and at most 1")
    most = "decoding.threshold"
    _require(value_of(config, most) <= 1, config, most, "at most 1")
    length = config.decoding.verify_length
    _require(length is None or length >= 0, config, "decoding.verify_length", "at least 0")
    warmup = "training.warmup_ratio"
    _require(0 <= value_of(config, warmup) < 1, config, warmup, "at least 0 and below 1")
    betas = config.training.betas
    fine = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    _require(fine, config, "training.betas", "two numbers from 0 to below 1")
    temperatures = config.evaluation.temperatures
    fine = _once(temperatures) and all(map(is_temperature, temperatures))
    each = f"0 or at least {LEAST_TEMPERATURE:g}"
    _require(fine, config, "evaluation.temperatures", f"a list of different numbers, each {each}")
    _require(is_temperature(config.regenerate.temperature), config, "regenerate.temperature", each)
    for key in ("seed", "regenerate.seed"):
        _require(value_of(config, key) in SEEDS, config, key, "from 0 to 2**63 - 1")
    seeds = config.evaluation.seeds
    fine = _once(seeds) and all(seed in SEEDS for seed in seeds)
    expected = "a list of different numbers from 0 to 2**63 - 1"
    _require(fine, config, "evaluation.seeds", expected)
    key = "evaluation.benchmarks"
    short = [Path(name).stem for name in value_of(config, key)]  # what results call them
    fine = len(short) == len(set(short))
    _require(fine, config, key, "a list of names that differ without folder and ending")
    for key in ("out", "target.path"):
        _require(bool(value_of(config, key)), config, key, "a path")
    trackers = config.tracking.trackers
    fine = set(trackers) <= {"wandb", "tensorboard"}
    _require(fine, config, "tracking.trackers", "a list of wandb and tensorboard")
    _require(config.serve.port in range(65536), config, "serve.port", "from 0 to 65535")
    fine = config.serve.bodies_mib >= config.serve.max_body_mib
    _require(fine, config, "serve.bodies_mib", "at least serve.max_body_mib")
    _conversations(config)
    _reproduction(config)
    _cross(config)


def _conversations(config: RunConfig) -> None:
    """The keys of data and of their answers."""
    _require(all(config.data.path), config, "data.path", "one or several paths")
    _require(_is_day(config.data.date), config, "data.date", "a day, such as 2026-01-01")
    key = "data.fields.roles"
    fine = set(value_of(config, key).values()) <= set(ROLES)
    _require(fine, config, key, f"a mapping to {', '.join(ROLES)}")
    for url in addresses(config):
        if has_unquoted_password(url):
            raise ConfigError(
                f"{shown_url(url)}: write the signs / ? # of its password as %2F %3F %23"
            )
    variable = config.regenerate.api_key_env
    if variable is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", variable):
        raise ConfigError(  # the value is not printed: it may be the key
            "regenerate.api_key_env must be the name of an environment variable (capital letters, "
            "digits and _), such as OPENAI_API_KEY, not the API key itself"
        )


def _reproduction(config: RunConfig) -> None:
    wanted = config.reproduce
    key = "reproduce.figures"
    fine = _once(wanted.figures) and set(wanted.figures) <= set(FIGURES)
    _require(fine, config, key, f"some of {', '.join(FIGURES)}")
    for key in ("reproduce.depths", "reproduce.blocks", "reproduce.loads"):
        sizes = value_of(config, key)
        fine = bool(sizes) and sizes == sorted(set(sizes)) and sizes[0] >= 1
        _require(fine, config, key, "a list of ascending numbers of at least 1")
    key, steps = "reproduce.thresholds", wanted.thresholds
    fine = bool(steps) and steps == sorted(set(steps)) and steps[0] >= 0 and steps[-1] <= 1
    _require(fine, config, key, "a list of ascending numbers from 0 to 1")


def is_temperature(value: float) -> bool:
    """Whether logits can be sampled at `value`; 0 is greedy."""
    return value == 0 or LEAST_TEMPERATURE <= value < math.inf


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _once(values: Sequence[object]) -> bool:
    """Whether there are some, each once."""
    return 0 < len(values) == len(set(values))


def _cross(config: RunConfig) -> None:
    layer_ids = config.target.layer_ids
    if layer_ids is not None and (layer_ids != sorted(set(layer_ids)) or not layer_ids):
        raise ConfigError(f"target.layer_ids={layer_ids} must be distinct and ascending")
    if (config.drafter.head_dim or 0) % 2:
        raise ConfigError(
            f"drafter.head_dim={config.drafter.head_dim} must be even: rotary positions turn pairs"
        )
    if config.drafter.ngram_min > config.drafter.ngram_max:
        raise ConfigError(
            f"drafter.ngram_min={config.drafter.ngram_min} exceeds "
            f"drafter.ngram_max={config.drafter.ngram_max}; lower it"
        )
    if config.engine.offload != "none" and config.engine.kind in ("single", "zero0"):
        raise ConfigError(
            f"engine.offload={config.engine.offload} needs DeepSpeed; set engine=zero1, zero2 or "
            "zero3"
        )
    _cross_features(config)
    if config.training.micro_batch_size > config.training.batch_size:
        raise ConfigError(
            f"training.micro_batch_size={config.training.micro_batch_size} exceeds "
            f"training.batch_size={config.training.batch_size}; lower it"
        )
    if config.training.min_learning_rate > config.training.learning_rate:
        raise ConfigError(
            f"training.min_learning_rate={config.training.min_learning_rate} exceeds "
            f"training.learning_rate={config.training.learning_rate}; lower it"
        )
    if config.decoding.scheduler == "fixed" and config.decoding.verify_length is None:
        raise ConfigError(
            "decoding.scheduler=fixed needs decoding.verify_length=N, the drafts to verify a round"
        )
    if config.decoding.scheduler in ("algorithm1", "async") and config.decoding.throughput is None:
        raise ConfigError(
            f"decoding.scheduler={config.decoding.scheduler} needs decoding.throughput=FILE, the "
            "steps a second by tokens verified: a table of deepspec profile, or your own as .csv"
        )
    _cross_kind(config)
    if config.training.compile and config.engine.kind == "zero3":
        raise ConfigError(
            "training.compile=true needs whole layers, but engine=zero3 shards them; set engine="
            "zero2, or training.compile=false"
        )
    if config.objective.ce_weight == 0 and config.objective.l1_weight == 0:
        raise ConfigError(
            "objective.ce_weight and objective.l1_weight are both 0: nothing would teach the drafts"
        )


def _cross_kind(config: RunConfig) -> None:
    """What only some kinds of drafter can do."""
    if config.drafter.draft_vocab_size is not None and config.drafter.kind not in REDUCIBLE:
        raise ConfigError(
            f"drafter.draft_vocab_size={config.drafter.draft_vocab_size} is for drafter.kind="
            f"{', '.join(REDUCIBLE)}, not {config.drafter.kind}; set it to null"
        )
    if not config.drafter.qk_norm and config.drafter.kind != "eagle3":
        raise ConfigError(
            "drafter.qk_norm=false is for drafter.kind=eagle3, not "
            f"{config.drafter.kind}, whose heads are normed; set it to true"
        )
    for key, kinds in (("compile", COMPILABLE), ("activation_checkpointing", RECOMPUTABLE)):
        if value_of(config, f"training.{key}") and config.drafter.kind not in kinds:
            raise ConfigError(
                f"training.{key}=true is for drafter.kind={', '.join(kinds)}, not "
                f"{config.drafter.kind}; set it to false"
            )


def _cross_features(config: RunConfig) -> None:
    if config.features.source == "stored" and config.features.path is None:
        raise ConfigError(
            "features.source=stored needs features.path=DIR, a store made by deepspec extract"
        )
    if config.features.overlap and config.features.source != "online":
        raise ConfigError(
            f"features.overlap=true is for features=online, not {config.features.source}, which "
            "reads ahead by itself (stored, remote) or does not (hybrid); set it to false"
        )
    if config.features.overlap and config.target.parallel in COLLECTIVE:
        raise ConfigError(
            f"features.overlap=true: the forwards of target.parallel={config.target.parallel} are "
            "for all processes in one order, which a thread beside the training does not keep; set "
            "it to false, or target.parallel=replicated"
        )
    if config.features.source == "hybrid" and config.target.parallel in COLLECTIVE:
        raise ConfigError(
            "features.source=hybrid asks the target only for what a process has not stored, but "
            f"the forwards of target.parallel={config.target.parallel} are for all processes; set "
            "features=online, or target.parallel=replicated, or train on a store (deepspec extract "
            "target.parallel=device_map, then features=stored)"
        )
    if config.features.source == "remote" and not config.features.servers:
        raise ConfigError(
            "features.source=remote needs features.servers=[http://host:port, ...], servers "
            "started by deepspec serve-target"
        )
    several = config.engine.kind != "single"
    if (
        config.features.source == "remote"
        and several
        and config.features.patience >= config.engine.timeout
    ):
        raise ConfigError(
            f"features.patience={config.features.patience:g} must be below engine.timeout="
            f"{config.engine.timeout:g}: a process that waits for a feature server would look "
            "dead to the others"
        )
    if (
        config.features.source == "remote"
        and config.regenerate.enabled
        and not config.regenerate.server
    ):
        raise ConfigError(
            "features.source=remote has no target here to answer the prompts: make the answers "
            "first (deepspec regenerate) and set data.path=[FILE] regenerate.enabled=false, or set "
            "regenerate.server"
        )


def _require(fine: bool, config: RunConfig, key: str, expected: str) -> None:
    if not fine:
        raise ConfigError(f"{key}={value_of(config, key)} must be {expected}")
