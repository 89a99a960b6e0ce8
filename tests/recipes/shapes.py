"""Sizes of the published targets that shipped recipes name: configs without weights.

Read from the models' config.json on the hub; what a plan does not look at is left out.
"""

from __future__ import annotations

from pathlib import Path

from transformers import (
    DeepseekV4Config,
    Gemma4TextConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.conftest import make_tokenizer


def qwen3(hidden: int, layers: int, heads: int, width: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=width,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )


SHAPES: dict[str, PreTrainedConfig] = {
    "Qwen/Qwen3-4B": qwen3(2560, 36, 32, 9728, tied=True),
    "Qwen/Qwen3-8B": qwen3(4096, 36, 32, 12288, tied=False),
    "Qwen/Qwen3-14B": qwen3(5120, 40, 40, 17408, tied=False),
    "Qwen/Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
        max_position_embeddings=40960,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        max_position_embeddings=131072,
    ),
    "google/gemma-4-12B-it": Gemma4TextConfig(
        vocab_size=262144,
        hidden_size=3840,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=15360,
        hidden_size_per_layer_input=0,
        final_logit_softcapping=30.0,
    ),
    "openai/gpt-oss-20b": GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=2880,
        num_local_experts=32,
        num_experts_per_tok=4,
    ),
    "deepseek-ai/DeepSeek-V4-Flash": DeepseekV4Config(),
    "deepseek-ai/DeepSeek-V4-Pro": DeepseekV4Config(
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
        index_topk=1024,
    ),
}


def stand_in(name: str, folder: Path) -> Path:
    """`folder` with the config of the target `name`, a tokenizer, and no weights."""
    SHAPES[name].save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
