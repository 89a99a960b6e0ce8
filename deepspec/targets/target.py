"""The frozen target: loading, packed features for training, block forwards for decoding.

Legend: B rows, Q new tokens, T packed tokens, D hidden size, L captured layers, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.config.schema import TargetConfig
from deepspec.errors import TargetError
from deepspec.records import Sample, TargetFeatures
from deepspec.targets.families import find_parts
from deepspec.targets.features import FeatureCapture, check_layer_ids, default_layer_ids
from deepspec.targets.identity import fingerprint

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TargetOutput:
    """`final` [B, Q, D] the LM head's input; `context` [B, Q, L*D], None unless asked for."""

    final: Tensor
    context: Tensor | None


class Target:
    """A frozen Hugging Face causal LM with what a drafter shares of it."""

    def __init__(self, model: Any, tokenizer: Any, layer_ids: Sequence[int] | int, name: str):
        parts = find_parts(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.family = parts.family
        self.config = parts.text_config
        self.embedding = parts.embedding
        self.head = parts.head
        self.hidden_size = int(self.embedding.shape[1])
        self.vocab_size = int(self.head.weight.shape[0])
        self.num_layers = len(parts.layers)
        self.layer_ids = (
            default_layer_ids(self.num_layers, layer_ids)
            if isinstance(layer_ids, int)
            else check_layer_ids(layer_ids, self.num_layers)
        )
        self._backbone = parts.backbone
        self._capture = FeatureCapture(parts, self.layer_ids)
        self._identity: dict[str, str] | None = None

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprint of weights, tokenizer and template; see `identity.fingerprint`."""
        if self._identity is None:
            self._identity = fingerprint(self.model, self.tokenizer)
        return self._identity

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and so where inputs go."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        return self.embedding.dtype

    @property
    def stop_token_ids(self) -> list[int]:
        """End-of-text tokens of the generation config and tokenizer."""
        stop = self.model.generation_config.eos_token_id
        ids = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return sorted(set(ids))

    @torch.no_grad()
    def features(self, samples: Sequence[Sample]) -> TargetFeatures:
        """What the target computes for `samples`, packed end to end.

        Right padding needs no mask in a causal model: no real token sees what is behind it.
        """
        lengths = [len(sample) for sample in samples]
        ids = torch.zeros(len(samples), max(lengths), dtype=torch.int64)
        for row, sample in enumerate(samples):
            ids[row, : len(sample)] = sample.input_ids
        with self._capture.recording():
            hidden = self._backbone(ids.to(self.device), use_cache=False).last_hidden_state
            context = self._capture.take()
        return TargetFeatures(
            context=torch.cat([context[row, :length] for row, length in enumerate(lengths)]),
            final=torch.cat([hidden[row, :length] for row, length in enumerate(lengths)]),
        )

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cache: Any,
        attention_mask: Any,
        *,
        with_context: bool = True,
    ) -> TargetOutput:
        """New tokens `input_ids` [B, Q] at `positions` [B, Q] on top of `cache`.

        `attention_mask` as the model takes it (4-D bool [B, 1, Q, C], a dict of those by layer
        type, or None where causal order says all). Logits come from `self.head(final)`.
        """
        arguments = {
            "input_ids": input_ids,
            "position_ids": positions,
            "past_key_values": cache,
            "attention_mask": attention_mask,
            "use_cache": True,
        }
        if not with_context:
            return TargetOutput(self._backbone(**arguments).last_hidden_state, None)
        with self._capture.recording():
            final = self._backbone(**arguments).last_hidden_state
            return TargetOutput(final, self._capture.take())


def load_target(config: TargetConfig, device: torch.device | str) -> Target:
    """The target of `config` on `device`, frozen. Raises TargetError with what to change.

    On "meta" only its config and tokenizer are read: shapes without weights, at any size.
    """
    from transformers import AutoTokenizer

    if config.dtype not in DTYPES:
        raise TargetError(f"target.dtype={config.dtype} is not one of {', '.join(DTYPES)}")
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    path = os.path.expanduser(config.path)
    if looks_local and not Path(path, "config.json").is_file():
        raise TargetError(
            f"target.path={config.path}: no config.json there; give the folder of a Hugging Face "
            "checkpoint or the name of one on the hub"
        )
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = _load_model(config, path, torch.device(device), options)
    except Exception as error:  # transformers, safetensors and the hub each raise their own kinds
        first = (str(error).splitlines() or [""])[0]
        raise TargetError(
            f"target.path={config.path} could not be loaded ({type(error).__name__}: {first}); "
            "check the path or hub name, target.revision, and that its files are complete"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of nothing
        raise TargetError(
            f"target.path={config.path} has no tokenizer (tokenizer.json is missing); put the "
            "files of the model's tokenizer there"
        )
    layers = config.num_layer_ids if config.layer_ids is None else list(config.layer_ids)
    return Target(model, tokenizer, layers, config.path)


def _load_model(
    config: TargetConfig, path: str, device: torch.device, options: dict[str, Any]
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype: Any = DTYPES[config.dtype]
    if device.type != "meta":
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=config.attention, **options
        )
        return model.to(device)  # type: ignore[arg-type]
    shape = AutoConfig.from_pretrained(path, **options)
    if dtype == "auto":
        dtype = shape.get_text_config().dtype or torch.float32
    with device:
        return AutoModelForCausalLM.from_config(
            shape,
            dtype=dtype,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
        )
