"""What a target is, as a fingerprint: a drafter refuses to meet another one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

SAMPLED_VALUES = 4096


def fingerprint(model: Any, tokenizer: Any) -> dict[str, str]:
    """Hashes of architecture, weights (names, shapes and a sample of values), tokenizer, template.

    Cheap at any size: `SAMPLED_VALUES` evenly spaced values of each tensor that is in memory.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta" and tensor.is_floating_point():
            flat = tensor.detach().flatten()
            stride = max(1, flat.numel() // SAMPLED_VALUES)
            # values in bf16: the same checkpoint loaded in fp32 or bf16 is the same target
            sample = flat[::stride].to(torch.bfloat16).view(torch.int16).cpu()
            weights.update(sample.numpy().tobytes())
    text = model.config.get_text_config()
    architecture = {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
    }
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "architecture": json.dumps(architecture, sort_keys=True),
        "weights": weights.hexdigest()[:32],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:32],
        "template": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:32],
    }
