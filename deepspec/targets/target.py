"""The frozen target: packed features for training, block forwards for decoding.

Legend: B rows, Q new tokens, T packed tokens, D hidden size, L captured layers, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspec.records import Sample, TargetFeatures
from deepspec.targets.ends import TargetEnds
from deepspec.targets.families import Parts, find_parts, resolve_rollback
from deepspec.targets.features import FeatureCapture, Packing
from deepspec.targets.files import WeightFiles
from deepspec.targets.gguf import GgufFile
from deepspec.targets.identity import ALL, Identity, fingerprint_of_model, hash_of_model
from deepspec.targets.rotation import fix_rotation, kinds_of


@dataclass(frozen=True)
class TargetOutput:
    """`final` [B, Q, D] the LM head's input; `context` [B, Q, L*D], None unless asked for."""

    final: Tensor
    context: Tensor | None


class Target(TargetEnds):
    """A frozen Hugging Face causal LM: features for training, block forwards for decoding.

    `files`: the checkpoint it was loaded from, whose fingerprint is its identity. `parts`: where
    those of `model` are not all in one place, with whole embedding and head. `rollback`:
    target.rollback.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layer_ids: Sequence[int] | int,
        name: str,
        files: WeightFiles | GgufFile | None = None,
        parts: Parts | None = None,
        rollback: str = "auto",
        context_length: int | None = None,
    ) -> None:
        parts = find_parts(model) if parts is None else parts
        way = resolve_rollback(rollback, model, parts)
        eos = model.generation_config.eos_token_id
        super().__init__(parts, tokenizer, layer_ids, name, way, context_length, eos)
        self.model = model.eval().requires_grad_(False)
        if (kinds := kinds_of(self.config)) and self.context_length and self.device.type != "meta":
            fix_rotation(model, kinds, self.context_length)
        self._files = files
        self.backbone = parts.backbone
        self._capture = FeatureCapture(parts, self.layer_ids)
        named = inspect.signature(parts.backbone.forward).parameters
        self._cache = "cache" if "cache" in named else "past_key_values"  # renamed in 5.24

    def _fingerprint(self) -> Identity:
        files = self._files
        known = files.fingerprint() if files else fingerprint_of_model(self.model)
        every = files.hash_of_all() if files else hash_of_model(self.model)
        return {**super()._fingerprint(), "weights": known, f"{ALL}weights": every}

    @torch.no_grad()
    def features(self, samples: Sequence[Sample], all_finals: bool = True) -> TargetFeatures:
        """What the target computes for `samples`, packed end to end.

        `all_finals`: final states of all tokens, not only where a supervised one follows. Right
        padding needs no mask in a causal model: no real token sees what is behind it.
        """
        lengths = [len(sample) for sample in samples]
        finals = None if all_finals else torch.cat([sample.followed for sample in samples])
        ids = torch.zeros(len(samples), max(lengths), dtype=torch.int64)
        for row, sample in enumerate(samples):
            ids[row, : len(sample)] = sample.input_ids
        packing = Packing(lengths, len(self.layer_ids), self.device, finals)
        with self._capture.into(packing.keep):
            output = self.backbone(ids.to(self.device), use_cache=False)
        return TargetFeatures(packing.context, packing.final(output.last_hidden_state))

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
        type, or None where the cache and causal order say all). Logits: `self.head(final)`.
        """
        arguments = {
            "input_ids": input_ids,
            "position_ids": positions,
            self._cache: cache,
            "attention_mask": attention_mask,
            "use_cache": True,
        }
        if not with_context:
            final = self.backbone(**arguments).last_hidden_state
            return TargetOutput(final.to(self.device), None)
        outputs: list[Tensor] = []
        with self._capture.into(outputs.append):
            final = self.backbone(**arguments).last_hidden_state
        context = torch.cat([output.to(self.device) for output in outputs], dim=-1)
        return TargetOutput(final.to(self.device), context)
