"""What a target is, as a fingerprint: a drafter refuses to meet another one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor

from deepspec.progress import say_once
from deepspec.targets.files import update_digest
from deepspec.targets.hashes import combined, combined_ends, hash_of_tensor

Identity = dict[str, str]
# before a name: of all values, where the name alone is of a few rows of each tensor, as older
# versions recorded
ALL = "all_"


def identity_of_ends(
    text_config: Any,
    tokenizer: Any,
    embedding: Tensor,
    head: Tensor,
    rotated_for: int | None = None,
    all_ends: str | None = None,
) -> Identity:
    """Fingerprints of architecture, embedding and head, tokenizer, template: no decoder layer.

    `all_ends`: the hash of all values of embedding and head; without it, that of these tensors.
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
    if all_ends is None:
        own = hash_of_tensor(embedding)
        all_ends = combined_ends(own, own if head is embedding else hash_of_tensor(head))
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "architecture": json.dumps(architecture, sort_keys=True),
        "embedding_and_head": ends.hexdigest()[:32],
        f"{ALL}embedding_and_head": all_ends,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:32],
        "template": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:32],
    }


def fingerprint_of_model(model: Any) -> str:
    """As `WeightFiles.fingerprint`, of a model that came from no safetensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        update_digest(digest, name, list(tensor.shape), tensor)
    return digest.hexdigest()[:32]


def hash_of_model(model: Any) -> str:
    """As `WeightFiles.hash_of_all`, of a model that came from no files."""
    return combined({name: hash_of_tensor(own) for name, own in model.state_dict().items()})


def differing(known: Identity, other: Identity) -> list[str]:
    """Which parts of `known` are another's in `other`.

    Where one was recorded by an older version, weights are compared by the few rows that both have;
    that is said.
    """
    recorded = {key for key in {*known, *other} if key.startswith(ALL)}
    partly = {key for key in recorded if not (key in known and key in other)}
    if any(key.removeprefix(ALL) in known and key.removeprefix(ALL) in other for key in partly):
        say_once(
            "a target is compared by a few rows of each of its weights: what it is compared with "
            "was written by an earlier version, which did not hash all of them"
        )
    unequal = (key for key in known if key not in partly and other.get(key) != known[key])
    return list(dict.fromkeys(key.removeprefix(ALL) for key in unequal))
