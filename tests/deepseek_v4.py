"""A tiny random DeepSeek V4 with every kind of layer, and a drafter of its own kind for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from deepspec.config.schema import DrafterConfig, TargetConfig
from deepspec.drafters.dspark_v4 import DSparkV4Drafter, resolve_config
from deepspec.targets import Target, load_target
from tests.conftest import make_tokenizer

LAYER_IDS = [0, 2, 4]


def v4_config(**changes: Any) -> DeepseekV4Config:
    """Five layers: sliding, compressed sparse and heavily compressed; hash-routed and routed.

    18 experts: in a drafter a group of 16 and one of 2.
    """
    settings = {
        "vocab_size": 260,
        "hidden_size": 64,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 20,
        "o_groups": 2,
        "o_lora_rank": 12,
        "n_routed_experts": 18,
        "num_experts_per_tok": 2,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
        ],
        "mlp_layer_types": ["hash_moe", *["moe"] * 4],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "sliding_window": 8,
        "swiglu_limit": 1.0,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return DeepseekV4Config(**{**settings, **changes})


def save_v4(folder: Path, **changes: Any) -> Path:
    """A random V4 and its tokenizer as a Hugging Face checkpoint in `folder`."""
    torch.manual_seed(0)
    DeepseekV4ForCausalLM(v4_config(**changes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load_v4(folder: Path) -> Target:
    """That checkpoint, of which a drafter reads `LAYER_IDS`; 4 is its last layer."""
    wanted = TargetConfig(path=str(folder), dtype="float32", layer_ids=LAYER_IDS)
    return load_target(wanted, "cpu")


def make_native(target: Target, seed: int = 1) -> DSparkV4Drafter:
    """Two stages, block 4, rank 6; nothing at its start, all of it outside the bf16 grid."""
    chosen = DrafterConfig(kind="dspark_v4", num_layers=2, block_size=4, markov_rank=6)
    drafter = DSparkV4Drafter(resolve_config(chosen, target))
    shake(drafter, seed)
    return drafter.eval()


def shake(drafter: nn.Module, seed: int = 1) -> None:
    """Random weights and buffers, of a size at which every part of the drafter has its say."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in drafter.state_dict().items():
        about_one = "norm" in name or name.endswith("scale")
        tensor.copy_(float(about_one) + 0.3 * torch.randn(tensor.shape, generator=generator))
