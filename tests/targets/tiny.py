"""A tiny random model of every listed family, with each kind of attention and MLP it has.

Windows and compression ratios are shorter than the texts of the checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM

from deepspec.targets import Target
from tests.conftest import make_tokenizer

DENSE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
MULTI_HEAD = {"num_key_value_heads": 4}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
WINDOWED = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MROPE = {
    "rope_type": "default",
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.5,
    "mrope_interleaved": True,
    "mrope_section": [2, 1, 1],
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**DENSE, rope_parameters=LLAMA3),
    "mistral": lambda: hf.MistralConfig(**DENSE, sliding_window=16),
    "qwen3": lambda: hf.Qwen3Config(**DENSE, tie_word_embeddings=True),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**DENSE, **EXPERTS, mlp_only_layers=[0]),
    "glm4_moe": lambda: hf.Glm4MoeConfig(**DENSE, **ROUTED, use_qk_norm=True),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **{key: value for key, value in DENSE.items() if key != "head_dim"} | MULTI_HEAD,
        **ROUTED,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_group=2,
        topk_group=1,
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **DENSE, **WINDOWED, num_local_experts=4, num_experts_per_tok=2
    ),
    "gemma3_text": lambda: hf.Gemma3TextConfig(
        **DENSE, **WINDOWED, query_pre_attn_scalar=16, final_logit_softcapping=5.0
    ),
    "gemma4_text": lambda: hf.Gemma4TextConfig(
        **{**DENSE, "num_hidden_layers": 6},
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=260,
        global_head_dim=32,
        final_logit_softcapping=5.0,
    ),
    "gemma4_text-moe": lambda: hf.Gemma4TextConfig(
        **DENSE,
        **WINDOWED,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        global_head_dim=32,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
        final_logit_softcapping=5.0,
    ),
    "gemma4_unified_text": lambda: hf.Gemma4UnifiedTextConfig(
        **DENSE, **WINDOWED, global_head_dim=32, final_logit_softcapping=5.0
    ),
    "granite": lambda: hf.GraniteConfig(
        **{key: value for key, value in DENSE.items() if key != "head_dim"},
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        residual_multiplier=0.22,
        attention_multiplier=0.1,
    ),
    "hyperclovax": lambda: hf.HyperCLOVAXConfig(
        **DENSE,
        embedding_multiplier=10.0,
        logits_scaling=0.125,
        residual_multiplier=0.5,
        attention_multiplier=0.25,
    ),
    "qwen3_next": lambda: hf.Qwen3NextConfig(
        **DENSE, **EXPERTS, **LINEAR, shared_expert_intermediate_size=32, mlp_only_layers=[0]
    ),
    "qwen3_5_text": lambda: hf.Qwen3_5TextConfig(**DENSE, **LINEAR, rope_parameters=MROPE),
    "qwen3_5_moe_text": lambda: hf.Qwen3_5MoeTextConfig(
        **{key: value for key, value in DENSE.items() if key != "intermediate_size"},
        **EXPERTS,
        **LINEAR,
        shared_expert_intermediate_size=32,
    ),
    "deepseek_v4": lambda: hf.DeepseekV4Config(
        **{**DENSE, "num_key_value_heads": 1},
        layer_types=[
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 12},
        sliding_window=16,
        hc_sinkhorn_iters=4,
        num_hash_layers=2,
        q_lora_rank=32,
        o_lora_rank=16,
        o_groups=2,
        index_n_heads=32,  # with few, all scores of an entry may be 0, and ties go either way
        index_head_dim=16,
        index_topk=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        partial_rotary_factor=0.5,
    ),
}


def make_causal_lm(config: Any, seed: int = 0) -> Any:
    """A random model of `config` in fp32, where a family routes by token with random routes."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # DeepSeek V4: token -> its experts, distinct
            table.copy_(torch.rand(len(table), 4).argsort(dim=1)[:, : table.shape[1]])
    return model


def make_target(name: str, rollback: str = "auto", dtype: torch.dtype = torch.float32) -> Target:
    """The tiny target `name` of CONFIGS, capturing the embedding and two layers."""
    model = make_causal_lm(CONFIGS[name]()).to(dtype)
    layer_ids = [-1, 0, 3 if name == "deepseek_v4" else 2]  # V4's last layer may be captured
    return Target(model, make_tokenizer(), layer_ids, name, rollback=rollback)
