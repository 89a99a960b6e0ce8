"""The whole configuration, typed. Defaults here are the library's; recipes state their choices.

`configs/<group>/*.yaml` describe the keys for readers; this file is what validates them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from deepspec.config.references import each_text, for_saving, texts_in
from deepspec.secrets import shown_url

# keys that hold a mapping, which is a value as lists are and no group of keys
MAPPINGS = ("data.fields.roles", "data.template_options")
ROLES = ("system", "developer", "user", "assistant", "tool")
URL = {"url": True}  # of a key that holds URLs, which may have a password
COLLECTIVE = ("tensor", "zero3")  # target.parallel: each forward is one of all processes

_NOTHING = object()

# the paper's table 1 and figures 2 to 8
FIGURES = tuple("table1 positions depth blocks thresholds reliability throughput budget".split())


@dataclass
class Group:
    """Keys that belong together.

    `written`: by the name of a key whose value depends on the environment, what is written instead
    of the value, and the value. It is no key itself.
    """

    written: dict[str, tuple[Any, Any]] = field(
        default_factory=dict,
        kw_only=True,
        repr=False,
        compare=False,
        metadata={"omegaconf_ignore": True},
    )


@dataclass
class TargetConfig(Group):
    """The frozen model that is drafted for."""

    path: str = MISSING
    revision: str | None = None
    dtype: str = "auto"  # auto | float32 | bfloat16
    layer_ids: list[int] | None = None
    num_layer_ids: int = 5
    context_length: int | None = None
    attention: str = "auto"
    rollback: str = "auto"  # auto | rows | snapshot
    parallel: str = "replicated"  # replicated | tensor | zero3 | device_map
    max_memory: str | None = None
    offload_folder: str | None = None
    trust_remote_code: bool = False


@dataclass
class FieldsConfig(Group):
    """Where a data row keeps its parts; the first listed name that is present wins."""

    messages: list[str] = field(default_factory=lambda: ["messages", "conversations", "turns"])
    role: list[str] = field(default_factory=lambda: ["role", "from"])
    content: list[str] = field(default_factory=lambda: ["content", "value"])
    reasoning: list[str] = field(
        default_factory=lambda: ["reasoning_content", "reasoning", "thinking"]
    )
    tool_calls: list[str] = field(default_factory=lambda: ["tool_calls"])
    tools: list[str] = field(default_factory=lambda: ["tools", "functions"])
    system: list[str] = field(default_factory=lambda: ["system", "system_prompt"])
    id: list[str] = field(default_factory=lambda: ["id", "sample_id", "question_id", "uid"])
    roles: dict[str, str] = field(
        default_factory=lambda: {
            "system": "system",
            "developer": "developer",
            "user": "user",
            "human": "user",
            "prompter": "user",
            "assistant": "assistant",
            "gpt": "assistant",
            "chatgpt": "assistant",
            "bot": "assistant",
            "model": "assistant",
            "tool": "tool",
            "function": "tool",
            "ipython": "tool",
            "observation": "tool",
            "tool_response": "tool",
            "function_response": "tool",
        }
    )


@dataclass
class DataConfig(Group):
    """Conversations or prompts to train on."""

    path: list[str] = MISSING
    split: str = "train"
    subset: str | None = None
    streaming: bool = False
    limit: int | None = None
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    max_length: int = 4096
    thinking: bool = False
    system_prompt: str | None = None
    date: str = "2026-01-01"
    template_options: dict[str, Any] = field(default_factory=dict)


@dataclass
class RegenerateConfig(Group):
    """Answers by the target itself, replacing the data's assistant turns."""

    enabled: bool = True
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20
    max_new_tokens: int = 2048
    samples_per_prompt: int = 1
    batch_size: int = 32
    seed: int = 0
    server: str | None = field(default=None, metadata=URL)
    server_model: str | None = None
    api_key_env: str | None = None
    concurrency: int = 32
    retries: int = 5
    timeout: float = 600.0


@dataclass
class DrafterConfig(Group):
    """The drafter's shape. A null is taken from the target."""

    kind: str = "dspark"  # dspark | dflash | dspark_v4 | eagle3 | mtp | ngram
    num_layers: int = 5
    block_size: int = 7
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    markov_head: str = "vanilla"  # vanilla | gated | rnn
    markov_rank: int = 256
    confidence_head: bool = True
    confidence_with_markov: bool = True
    confidence_detached: bool = False
    qk_norm: bool = True
    mask_token_id: int | None = None
    ngram_max: int = 3
    ngram_min: int = 1
    draft_vocab_size: int | None = None
    init_from: str | None = None


@dataclass
class ObjectiveConfig(Group):
    """Loss weights (paper: 0.1, 0.9, 1.0) and how the loss is computed."""

    ce_weight: float = 0.1
    l1_weight: float = 0.9
    confidence_weight: float = 1.0
    decay: float | None = None
    implementation: str = "fused"  # fused | eager
    chunk_size: int = 256
    compile: str = "auto"  # auto | always | never


@dataclass
class FeaturesConfig(Group):
    """Where the training loop gets the target's features from."""

    source: str = "online"  # online | stored | hybrid | remote
    path: str | None = None
    servers: list[str] = field(default_factory=list, metadata=URL)
    prefetch: int = 8
    overlap: bool = False
    verify: bool = True
    timeout: float = 120.0
    patience: float = 600.0


@dataclass
class ExtractConfig(Group):
    """A store of features."""

    dtype: str = "auto"  # auto | bfloat16 | float8
    shard_mib: float = 256.0
    batch_tokens: int = 16384
    limit_gib: float = 50.0
    yes: bool = False


@dataclass
class ServeConfig(Group):
    """A server of features."""

    host: str = "127.0.0.1"
    port: int = 8300
    dtype: str = "auto"  # auto | bfloat16 | float8
    queue: int = 64
    max_body_mib: int = 16
    bodies_mib: int = 256
    max_tokens: int = 131072
    request_seconds: float = 20.0
    connections: int = 512
    connections_per_client: int = 128


@dataclass
class TrainingConfig(Group):
    """The optimizer, the schedule, and when to look and save."""

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 512
    micro_batch_size: int = 1
    anchors_per_sample: int = 512
    learning_rate: float = 6e-4
    min_learning_rate: float = 0.0
    warmup_ratio: float = 0.04
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float = 1.0
    precision: str = "bf16"  # bf16 | fp32
    compile: bool = False
    activation_checkpointing: bool = False
    validation_samples: int = 64
    evaluate_every: int = 500
    save_every: int = 500
    keep_last: int = 2
    log_every: int = 10
    resume: str = "auto"


@dataclass
class EngineConfig(Group):
    """How the optimizer state and gradients are laid out over processes."""

    kind: str = "single"  # single | zero0 | zero1 | zero2 | zero3
    device: str = "auto"  # auto | cpu | cuda
    offload: str = "none"  # none | cpu
    bucket_size: int = 50_000_000
    overlap_comm: bool = True
    persistence_threshold: int = 100_000
    timeout: float = 1800.0
    peak_tflops: float | None = None


@dataclass
class TrackingConfig(Group):
    """Where metrics go besides metrics.jsonl."""

    trackers: list[str] = field(default_factory=list)  # wandb, tensorboard
    project: str = "deepspec"
    wandb_mode: str = "offline"


@dataclass
class DecodingConfig(Group):
    """The verifying decoder."""

    max_new_tokens: int = 2048
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 1
    stop_token_ids: list[int] | None = None
    compile: bool = False
    scheduler: str = "none"  # none | fixed | threshold | algorithm1 | async
    verify_length: int | None = None
    threshold: float = 0.5
    throughput: str | None = None
    calibration: str = "auto"  # auto | none


@dataclass
class EvaluationConfig(Group):
    """What the acceptance report is measured on."""

    benchmarks: list[str] = field(default_factory=lambda: ["gsm8k", "math500", "mbpp"])
    limit: int | None = 64
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    seeds: list[int] = field(default_factory=lambda: [0])
    baseline_prompts: int = 8
    ngram: bool = True
    enabled: bool = True


@dataclass
class ExportConfig(Group):
    """Files for serving engines."""

    format: str = "flat"  # flat | speculators | deepseek_v4
    profile: str = "serving"  # serving | full


@dataclass
class ReproduceConfig(Group):
    """The paper's figures: which, and how much work goes into them."""

    figures: list[str] = field(default_factory=lambda: list(FIGURES))
    seeds: int = 1
    jobs: int = 2
    samples: int | None = None
    steps: int = 700
    prompts: int | None = 40
    batch_size: int = 16
    block_size: int = 7
    depths: list[int] = field(default_factory=lambda: [1, 2, 5])
    blocks: list[int] = field(default_factory=lambda: [4, 8, 12, 16])
    thresholds: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
    calibration_prompts: int | None = None
    calibration_seeds: int = 2
    loads: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    load_seconds: float = 10.0


@dataclass
class RunConfig(Group):
    """Everything a run is made of; goes resolved into every checkpoint and report."""

    recipe: str = MISSING
    description: str = ""
    out: str = "runs/${recipe}"
    seed: int = 0
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    reproduce: ReproduceConfig = field(default_factory=ReproduceConfig)


def as_dict(config: Group) -> dict[str, Any]:
    """A config, or a group of one, as plain containers, as it is written and printed: what comes
    from the environment by its name (see `config.environment`), URLs without passwords."""
    found: dict[str, Any] = {}
    for each in fields(config):
        value = vars(config)[each.name]
        written, was = config.written.get(each.name, (None, _NOTHING))
        if each.name == "written":
            continue
        if isinstance(value, Group):
            found[each.name] = as_dict(value)
            continue
        found[each.name] = each_text(written, str) if value == was else for_saving(value)
        if each.metadata == URL:
            found[each.name] = each_text(found[each.name], shown_url)
    return found


def addresses(config: Group) -> Iterator[str]:
    """The URLs in `config`."""
    for each in fields(config):
        value = vars(config)[each.name]
        if isinstance(value, Group):
            yield from addresses(value)
        elif each.metadata == URL:
            yield from texts_in(value)


def group_of(config: RunConfig, key: str) -> tuple[Group, str]:
    """The group of a dotted key, and the key's name in it."""
    *groups, name = key.split(".")
    group: Group = config
    for part in groups:
        group = getattr(group, part)
    return group, name


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"training.learning_rate": 6e-4, ...}; lists and MAPPINGS stay values."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in MAPPINGS:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
