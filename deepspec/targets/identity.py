"""What a target is, as a fingerprint: a drafter refuses to meet another one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor

from deepspec.targets.files import update_digest

Identity = dict[str, str]


def identity_of_ends(
    text_config: Any,
    tokenizer: Any,
    embedding: Tensor,
    head: Tensor,
    rotated_for: int | None = None,
) -> Identity:
    """Fingerprints of architecture, embedding and head, tokenizer, template: no decoder layer.

    `rotated_for`: the length of the rotation, where it is not the config's.
    """
    architecture = {
        "model_type": text_config.model_type,
        "hidden_size": text_config.hidden_size,
        "num_hidden_layers": text_config.num_hidden_layers,
        "vocab_size": text_config.vocab_size,
        **({} if rotated_for is None else {"rotated_for": rotated_for}),
    }
    ends = hashlib.sha256()
    for name, tensor in (("embedding", embedding), ("head", head)):
        update_digest(ends, name, list(tensor.shape), tensor)
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "architecture": json.dumps(architecture, sort_keys=True),
        "embedding_and_head": ends.hexdigest()[:32],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:32],
        "template": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:32],
    }


def fingerprint_of_model(model: Any) -> str:
    """As `WeightFiles.fingerprint`, of a model that came from no safetensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        update_digest(digest, name, list(tensor.shape), tensor)
    return digest.hexdigest()[:32]


def differing(known: Identity, other: Identity) -> list[str]:
    """Which parts of `known` are another's in `other`."""
    return [key for key, value in known.items() if other.get(key) != value]
