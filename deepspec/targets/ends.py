"""The two ends of a frozen target, embedding and LM head: what a drafter shares of it.

Training on features that were computed elsewhere needs nothing else of the target, so they are read
alone out of its files (house plan, decision 4).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deepspec.config.schema import TargetConfig, as_dict
from deepspec.errors import TargetError
from deepspec.targets.agreement import check_ends
from deepspec.targets.checkpoint import (
    check_tokens,
    dtype_of,
    explained,
    generation_eos,
    layers_of,
    load_tokenizer,
    meta_model,
    open_files,
    stop_token_ids,
    with_dtype,
)
from deepspec.targets.families import Parts, find_parts, resolve_rollback
from deepspec.targets.features import check_layer_ids, default_layer_ids
from deepspec.targets.files import WeightFiles
from deepspec.targets.gguf import GgufFile
from deepspec.targets.head import FrozenHead
from deepspec.targets.identity import Identity, differing, identity_of_ends
from deepspec.targets.rotation import checked_length, kinds_of


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
        self.stop_token_ids = stop_token_ids(eos_token_id, tokenizer)
        self.name = name
        self.rollback = rollback
        self.family = parts.family
        self.config = config
        self.embedding_scale = parts.embedding_scale
        self.logit_scale = rules.logit_scale(config)
        self.embedding = _scaled(parts.embedding, self.embedding_scale)
        self.head = FrozenHead(_scaled(parts.head, self.logit_scale), rules.soft_cap(config))
        self.in_files = (parts.embedding, parts.head)
        self._hash_of_ends = parts.hash_of_ends
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
        every = self._hash_of_ends() if self._hash_of_ends else None
        return identity_of_ends(self.config, self.tokenizer, *self.in_files, rotated_for, every)

    def adopt(self, identity: Identity, whose: str) -> None:
        """Take `identity` of the target that computed the features, which these are the ends of.

        Raises TargetError when they are another's.
        """
        if different := differing(self.identity, identity):
            raise TargetError(
                f"{whose} is of another target than target.path={self.name}: the "
                f"{', '.join(different)} differ(s); set target.path to that target"
            )
        self._identity = {**self.identity, **identity}

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
    tokenizer, config = load_tokenizer(config), with_dtype(config, device)
    model = meta_model(config)
    with explained(config):
        parts = find_parts(model)
        check_tokens(tokenizer, len(parts.embedding), config.path)
        parts = read_ends(parts, model, config, torch.device(device))
    rollback = resolve_rollback(config.rollback, model, parts)
    length, eos = config.context_length, generation_eos(config, parts.text_config)
    ends = TargetEnds(
        parts, tokenizer, layers_of(config), as_dict(config)["path"], rollback, length, eos
    )
    check_ends(ends, model)
    return ends


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

    names = names_of_ends(model, files, config)
    embedding, head = map(read, names)
    hashed = functools.partial(files.hash_of, names)
    return replace(parts, embedding=embedding, head=head, hash_of_ends=hashed)


def names_of_ends(
    model: Any, files: WeightFiles | GgufFile, config: TargetConfig
) -> tuple[str, str]:
    """What embedding and LM head of `model` are called in its files. Raises TargetError."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding, head = (_name_of(module, model, files, config) for module in ends)
    return embedding, head


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
    for name in sorted(files.names(), key=lambda name: (name != its_own, name)):
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
