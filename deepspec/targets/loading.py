"""Loading a target from its files, whole or split as `target.parallel` says."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deepspec.config.schema import TargetConfig, as_dict
from deepspec.errors import TargetError
from deepspec.targets.agreement import check_agreement, check_ends
from deepspec.targets.checkpoint import (
    attention_of,
    check_tokens,
    dtype_of,
    explained,
    layers_of,
    load_tokenizer,
    loaded_from,
    meta_model,
    open_files,
    read_config,
    with_dtype,
)
from deepspec.targets.ends import names_of_ends, read_ends
from deepspec.targets.families import find_parts
from deepspec.targets.gguf import GgufFile, is_gguf
from deepspec.targets.parallel import (
    TensorParallelTarget,
    check_parallel,
    placement,
    zero3_backbone,
    zero3_loading,
)
from deepspec.targets.target import Target


def load_target(config: TargetConfig, device: torch.device | str, checked: bool = True) -> Target:
    """The target of `config` on `device`, frozen. Raises TargetError with what to change.

    On "meta" only its config and tokenizer are read: shapes without weights, at any size.
    `checked`: whether a target whose logits or embedding are not what DeepSpec takes them for is
    refused (`deepspec check` reports it instead).
    """
    tokenizer, device = load_tokenizer(config), torch.device(device)
    if device.type == "meta":
        model = meta_model(config)
        return Target(
            model,
            tokenizer,
            layers_of(config),
            as_dict(config)["path"],
            rollback=config.rollback,
            context_length=config.context_length,
        )
    config = with_dtype(config, device)
    shapes = meta_model(config) if config.parallel != "replicated" else None
    if shapes is not None:
        check_parallel(config, shapes.config)
    # the dtype in which DeepSpeed holds it
    zero3 = shapes.dtype if shapes is not None and config.parallel == "zero3" else None
    with explained(config):
        files = open_files(config)
        with zero3_loading(zero3) if zero3 else nullcontext():
            model = _from_pretrained(config)
        files.begin_hashing()  # now: loading has just read the files into memory
        if shapes is None:
            model.to(device)
        parts = find_parts(model)
        if shapes is not None:
            parts = read_ends(parts, shapes, config, device)
        else:
            names = names_of_ends(model, files, config)
            parts = replace(parts, hash_of_ends=partial(files.hash_of, names))
        check_tokens(tokenizer, len(parts.embedding), config.path)
        if zero3:
            zero3_backbone(parts, zero3, device)
    kind = TensorParallelTarget if config.parallel == "tensor" else Target
    target = kind(
        model,
        tokenizer,
        layers_of(config),
        as_dict(config)["path"],
        files,
        parts,
        config.rollback,
        config.context_length,
    )
    if checked and zero3:  # its LM head is in pieces
        check_ends(target, shapes)
    elif checked:
        check_agreement(target)
    return target


def _from_pretrained(config: TargetConfig) -> Any:
    from transformers import AutoModelForCausalLM

    wanted = dtype_of(config)
    with loaded_from(config) as (path, options):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=wanted,
            attn_implementation=attention_of(config),
            output_loading_info=True,
            **options,
            **placement(config),
            **(_gguf_options(config) if is_gguf(config.path) else {}),
        )
    model, info = loaded
    if is_gguf(config.path):
        GgufFile(config.path).check(model)
    if is_gguf(config.path) and info["missing_keys"]:
        raise TargetError(
            f"target.path={config.path} lacks {', '.join(sorted(info['missing_keys'])[:3])}, which "
            "Transformers would make up; convert the model again, or give its safetensors"
        )
    # a quantised checkpoint that had to be dequantised keeps the dtype of what was not quantised
    plain = wanted != "auto" and not getattr(model, "is_quantized", False)
    if plain and any(p.dtype != wanted for p in model.parameters() if p.is_floating_point()):
        model.to(wanted)
    return model


def _gguf_options(config: TargetConfig) -> dict[str, Any]:
    """Config and weights of a GGUF file as plain tensors, also where kernels for blocks exist."""
    import transformers

    options = {"config": read_config(config)}
    if hasattr(transformers, "GgufConfig"):  # older versions know no other way
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options
