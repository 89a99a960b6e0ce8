"""The two ends of a frozen target, embedding and LM head: what a drafter shares of it.

Training on features that were computed elsewhere needs nothing else of the target, so they are read
alone out of its files (house plan, decision 4).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.config.schema import TargetConfig
from deepspec.errors import TargetError
from deepspec.machine import lacks_bf16
from deepspec.progress import say_once
from deepspec.targets.agreement import check_ends
from deepspec.targets.families import Parts, find_parts, resolve_rollback
from deepspec.targets.features import check_layer_ids, default_layer_ids
from deepspec.targets.files import WeightFiles
from deepspec.targets.gguf import SUFFIX, GgufFile, alone, is_gguf
from deepspec.targets.head import FrozenHead
from deepspec.targets.identity import Identity, differing, identity_of_ends
from deepspec.targets.rotation import checked_length, kinds_of

DTYPES: dict[str, Any] = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


class TargetEnds:
    """Tokenizer, dimensions, embedding [V, D] and head of a target, without its decoder layers.

    `embedding` is what the first layer sees and `head` gives the target's logits: the weights of
    the files times `embedding_scale` and `logit_scale`. `identity` is that of the ends until the
    source of the features tells the whole target's. `rollback`: how decoding takes tokens back;
    None where no way is proven. `context_length`: target.context_length. `stop_token_ids`: the
    tokens at which generation stops, from the generation config (`eos_token_id`) and the tokenizer.
    """

    def __init__(
        self,
        parts: Parts,
        tokenizer: Any,
        layer_ids: Sequence[int] | int,
        name: str,
        rollback: str | None,
        context_length: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        rules, config = parts.rules, parts.text_config
        self.tokenizer = tokenizer
        self.stop_token_ids = _stop_token_ids(eos_token_id, tokenizer)
        self.name = name
        self.rollback = rollback
        self.family = parts.family
        self.config = config
        self.embedding_scale = parts.embedding_scale
        self.logit_scale = rules.logit_scale(config)
        self.embedding = _scaled(parts.embedding, self.embedding_scale)
        self.head = FrozenHead(_scaled(parts.head, self.logit_scale), rules.soft_cap(config))
        self.in_files = (parts.embedding, parts.head)
        self.hidden_size = int(self.embedding.shape[1])
        self.vocab_size = int(self.head.weight.shape[0])
        self.num_layers = len(parts.layers)
        self.layer_ids = (
            default_layer_ids(self.num_layers, layer_ids)
            if isinstance(layer_ids, int)
            else check_layer_ids(layer_ids, self.num_layers, rules.last_layer)
        )
        self._identity: Identity | None = None
        # most tokens that a text may have; None where nothing sets a bound
        self.context_length = checked_length(context_length, config, name)

    @property
    def identity(self) -> Identity:
        """Fingerprint of weights, tokenizer and template; what is known of it."""
        if self._identity is None:
            self._identity = self._fingerprint()
        return self._identity

    @property
    def tied(self) -> bool:
        """Whether embedding and LM head are the same in the files, where nothing is scaled."""
        return torch.equal(*self.in_files)

    def _fingerprint(self) -> Identity:
        length = self.context_length
        own = length == getattr(self.config, "max_position_embeddings", None)
        rotated_for = None if own or not kinds_of(self.config) else length
        return identity_of_ends(self.config, self.tokenizer, *self.in_files, rotated_for)

    def adopt(self, identity: Identity, whose: str) -> None:
        """Take `identity` of the target that computed the features, which these are the ends of.

        Raises TargetError when they are another's.
        """
        if different := differing(self.identity, identity):
            raise TargetError(
                f"{whose} is of another target than target.path={self.name}: the "
                f"{', '.join(different)} differ(s); set target.path to that target"
            )
        self._identity = dict(identity)

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and so where inputs go."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        return self.embedding.dtype


def load_ends(config: TargetConfig, device: torch.device | str) -> TargetEnds:
    """The ends of the target of `config` on `device`, read alone. Raises TargetError."""
    tokenizer, config = load_tokenizer(config), settled(config, device)
    model = meta_model(config)
    with explained(config):
        parts = find_parts(model)
        check_tokens(tokenizer, len(parts.embedding), config.path)
        parts = read_ends(parts, model, config, torch.device(device))
    rollback = resolve_rollback(config.rollback, model, parts)
    length, eos = config.context_length, _generation_eos(config, parts.text_config)
    ends = TargetEnds(parts, tokenizer, layers_of(config), config.path, rollback, length, eos)
    check_ends(ends, model)
    return ends


def _generation_eos(config: TargetConfig, text_config: Any) -> int | list[int] | None:
    """The ids at which generation stops, as `GenerationConfig` beside the weights has them."""
    from transformers import GenerationConfig

    path, revision = os.path.expanduser(config.path), config.revision or "main"
    with suppress(OSError):  # it has none
        if not is_gguf(path):
            return GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
    return getattr(text_config, "eos_token_id", None)


def _stop_token_ids(eos: int | Sequence[int] | None, tokenizer: Any) -> list[int]:
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if tokenizer is not None and tokenizer.eos_token_id is not None:  # planning goes without
        ids.append(tokenizer.eos_token_id)
    return sorted(set(ids))


def read_ends(parts: Parts, model: Any, config: TargetConfig, device: torch.device) -> Parts:
    """`parts` with embedding and head read from the files of `config` onto `device`.

    `model` tells their names; its own weights may be on the meta device, sharded or elsewhere. They
    are one tensor where the files hold one for both: what configs say of it may be two things in a
    multimodal model, and Transformers does not believe it against the files.
    """
    files = open_files(config)
    wanted = dtype_of(config)

    @functools.cache
    def read(name: str) -> Tensor:
        dtype = parts.embedding.dtype if wanted == "auto" else wanted
        return files.read(name).to(device, dtype)

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding, head = (read(_name_of(module, model, files, config)) for module in ends)
    return replace(parts, embedding=embedding, head=head)


def check_tokens(tokenizer: Any, rows: int, name: str) -> None:
    """Raises TargetError where text can become ids that an embedding of `rows` rows lacks."""
    placeholders = set(placeholder_tokens(tokenizer))
    vocabulary = tokenizer.get_vocab()
    beyond = {token: index for token, index in vocabulary.items() if index >= rows}
    if wrong := sorted(beyond.keys() - placeholders, key=beyond.__getitem__):
        shown = ", ".join(f"{token} ({beyond[token]})" for token in wrong[:3])
        raise TargetError(
            f"target.path={name}: the tokenizer has {len(wrong)} token(s) that its embedding of "
            f"{rows} rows lacks: {shown}{', ...' if len(wrong) > 3 else ''}; resize the model's "
            "embedding to the tokenizer it was trained with, or take them out of the tokenizer"
        )


def placeholder_tokens(tokenizer: Any) -> list[str]:
    """Tokens that stand for images or sound, which no text has; the text-only models of a
    multimodal family have them in the tokenizer and not in the embedding (Gemma 3 1B)."""
    named = getattr(tokenizer, "special_tokens_map", {})
    media = ("image_token", "audio_token", "video_token")
    return [str(named[key]) for key in media if key in named]


def open_files(config: TargetConfig) -> WeightFiles | GgufFile:
    """The weights at `target.path`, whatever they are saved in. Raises TargetError."""
    return GgufFile(config.path) if is_gguf(config.path) else WeightFiles(config)


def _scaled(weight: Tensor, scale: float) -> Tensor:
    """A copy only where there is a scale."""
    return weight if scale == 1 else weight * scale


def _name_of(module: Any, model: Any, files: WeightFiles | GgufFile, config: TargetConfig) -> str:
    """The name of `module`'s weight in the files, which Transformers may translate while it loads
    them; that of one it is tied to where they do not hold its own."""
    if isinstance(files, GgufFile):
        return files.name_of_end(module is model.get_output_embeddings())
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    own = model.state_dict(keep_vars=True)
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    wanted = {name for name, tensor in own.items() if tensor is module.weight}  # tied: two names
    its_own = next(f"{name}.weight" for name, each in model.named_modules() if each is module)
    found: str | None = None
    for name in sorted(files.names()):
        loaded, _ = rename_source_key(
            name,
            renamings,
            converters,
            base_model_prefix=model.base_model_prefix,
            meta_state_dict=own,
        )
        if loaded == its_own:
            return name
        if loaded in wanted:
            found = name
    if found is not None:
        return found
    raise TargetError(
        f"target.path={config.path}: its files do not hold {' or '.join(sorted(wanted))}"
    )


def meta_model(config: TargetConfig) -> Any:
    """The target's modules and shapes without weights, in a moment at any size."""
    from transformers import AutoModelForCausalLM

    with explained(config):
        found, wanted = read_config(config), dtype_of(config)
        dtype = getattr(found, "dtype", None) if wanted == "auto" else wanted
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                found,
                dtype=dtype or torch.float32,
                attn_implementation=attention_of(config),
                trust_remote_code=config.trust_remote_code,
            )
        if is_gguf(config.path):
            GgufFile(config.path).check(model)
    return model


def read_config(config: TargetConfig) -> Any:
    """Transformers' config of the target. Raises TargetError for a GGUF file that says more."""
    from transformers import AutoConfig

    with loaded_from(config) as (path, options):
        found = AutoConfig.from_pretrained(path, **options)
    if is_gguf(config.path):
        GgufFile(config.path).complete(found)
    return found


@contextmanager
def loaded_from(config: TargetConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """What Transformers loads the target from: a folder or hub name, and options for it."""
    path = checked_path(config)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if not is_gguf(path):
        yield path, options
        return
    with alone(path) as (folder, file):
        yield folder, {**options, "gguf_file": file}


def settled(config: TargetConfig, device: torch.device | str) -> TargetConfig:
    """`config` with float32 for target.dtype=auto, where the checkpoint is in 16 bits and `device`
    is a processor without arithmetic for them."""
    on_processor = torch.device(device).type == "cpu" and lacks_bf16()
    if config.dtype != "auto" or is_gguf(config.path) or not on_processor:
        return config
    with explained(config):
        found = read_config(config)
    saved = getattr(found, "dtype", None) or getattr(found.get_text_config(), "dtype", None)
    quantised = getattr(found, "quantization_config", None) is not None
    if quantised or saved not in (torch.bfloat16, torch.float16):
        return config
    name = str(saved).removeprefix("torch.")
    say_once(
        f"target.dtype=auto: float32, because this processor has no arithmetic for {name}, in "
        "which the target is saved; target.dtype=bfloat16 takes half the memory and more time"
    )
    return replace(config, dtype="float32")


def dtype_of(config: TargetConfig) -> Any:
    """What `target.dtype` means for this target; "auto": as its files say."""
    if config.dtype == "auto" and is_gguf(config.path):
        return torch.float32  # so llama.cpp computes, whatever the blocks were quantised from
    return DTYPES[config.dtype]


def load_text_side(config: TargetConfig) -> tuple[Any, list[int]]:
    """The target's tokenizer and the tokens at which its generation stops, without any weights.

    Raises TargetError.
    """
    tokenizer = load_tokenizer(config)
    with explained(config):
        found = read_config(config)
    return tokenizer, _stop_token_ids(_generation_eos(config, found.get_text_config()), tokenizer)


def load_tokenizer(config: TargetConfig) -> Any:
    """The target's tokenizer. Raises TargetError."""
    from transformers import AutoTokenizer

    lacking = TargetError(
        f"target.path={config.path} has no tokenizer (tokenizer.json is missing); copy the "
        "tokenizer files of the model there"
    )
    with explained(config), loaded_from(config) as (path, options):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
        except (OSError, TypeError, ValueError) as error:
            if "trust_remote_code" not in str(error) and not _holds_tokenizer(path):
                raise lacking from error
            raise
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of nothing
        raise lacking
    return tokenizer


def _holds_tokenizer(path: str) -> bool:
    """Whether a local folder holds any tokenizer's file; of a name on the hub, True."""
    names = ("tokenizer*", "*.model", "vocab*", "*.tiktoken", "tekken.json")
    return not Path(path).is_dir() or any(
        file.name != "tokenizer_config.json" for name in names for file in Path(path).glob(name)
    )


def layers_of(config: TargetConfig) -> list[int] | int:
    """The layer ids of `config`, or how many are to be spaced evenly."""
    return config.num_layer_ids if config.layer_ids is None else list(config.layer_ids)


def attention_of(config: TargetConfig) -> str | None:
    """What Transformers is asked for; None lets it take what the family has."""
    return None if config.attention == "auto" else config.attention


def checked_path(config: TargetConfig) -> str:
    """What transformers is to load. Raises TargetError for a folder that holds no checkpoint."""
    if config.dtype not in DTYPES:
        raise TargetError(f"target.dtype={config.dtype} is not one of {', '.join(DTYPES)}")
    path = os.path.expanduser(config.path)
    if is_gguf(path):
        if not Path(path).is_file():
            raise TargetError(
                f"target.path={config.path}: no such {SUFFIX} file; fetch it and give its path"
            )
        return path
    adapter = Path(path, "adapter_config.json")
    if adapter.is_file() and not Path(path, "config.json").is_file():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path") or "BASE"
        raise TargetError(
            f"target.path={config.path} is an adapter (adapter_config.json without config.json), "
            f"not a whole model; merge it into its base model ({base}) by PEFT's "
            "merge_and_unload(), write the result and the base model's tokenizer into a folder by "
            "save_pretrained(FOLDER), and set target.path=FOLDER"
        )
    there = Path(path).exists()
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    if (there or looks_local) and not Path(path, "config.json").is_file():
        missing = "" if there else " (no such folder)"
        raise TargetError(
            f"target.path={config.path}: no config.json there{missing}; give the folder of a "
            "Hugging Face checkpoint or the name of one on the hub"
        )
    return path


@contextmanager
def explained(config: TargetConfig) -> Iterator[None]:
    """Turns what transformers, safetensors and the hub raise into TargetError."""
    try:
        yield
    except TargetError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        if "trust_remote_code" in str(error):
            raise TargetError(
                f"target.path={config.path} comes with Python code of its own (auto_map in its "
                "config.json), which has to run to load it; read that code, and where you trust "
                "it set target.trust_remote_code=true"
            ) from error
        where = f"target.path={config.path}"
        if isinstance(error, OSError) and not os.path.exists(os.path.expanduser(config.path)):
            where += f" is no folder in {Path.cwd()}, and as a name on the hub it"
        raise TargetError(
            f"{where} could not be loaded ({type(error).__name__}: {first}); "
            "check the path or hub name, target.revision, and that its files are complete"
        ) from error
