"""A small drafter of any kind for the tiny target, with weights that are not at their start."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deepspec.config.schema import DrafterConfig, TargetConfig
from deepspec.drafters.dspark import DSparkDrafter, resolve_config
from deepspec.targets import Target, load_target
from tests.conftest import make_tokenizer

KINDS = ("vanilla", "gated", "rnn", "rank0")


def make_drafter(
    target: Target, kind: str, confidence: bool = True, draft_vocab_size: int | None = None
) -> DSparkDrafter:
    """Two layers, block 4, rank 6; weights outside the bf16 grid. Of a draft vocabulary, tokens
    that are spread over the target's."""
    config = DrafterConfig(
        num_layers=2,
        block_size=4,
        intermediate_size=48,
        markov_head="vanilla" if kind == "rank0" else kind,
        markov_rank=0 if kind == "rank0" else 6,
        confidence_head=confidence,
        draft_vocab_size=draft_vocab_size,
    )
    drafter = DSparkDrafter(resolve_config(config, target))
    torch.manual_seed(1)
    for name, parameter in drafter.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    if draft_vocab_size is not None:
        drafter.restrict(torch.randperm(260)[:draft_vocab_size].sort().values)
    return drafter.eval()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A target of another family: no q/k norms, no head_dim of its own, an untied LM head."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=False,
        eos_token_id=[0, 2],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return load_target(TargetConfig(path=str(folder), dtype="float32", num_layer_ids=3), "cpu")


@pytest.fixture
def drafter(target: Target) -> DSparkDrafter:
    """The default kind: vanilla, with confidence."""
    return make_drafter(target, "vanilla")
