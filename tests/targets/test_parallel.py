"""Targets that are split, quantised, or named otherwise in their files give the same features.

What needs several processes is in tests/training/test_zero.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV4Config, GptOssConfig, LlamaConfig

from deepspec.config.schema import TargetConfig
from deepspec.errors import TargetError
from deepspec.records import TargetFeatures
from deepspec.targets import Target, load_ends, load_target
from tests.conftest import make_tokenizer
from tests.trainers import make_samples

SAMPLES = make_samples(5)
SMALL: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def config_of(path: Path, **options: Any) -> TargetConfig:
    return TargetConfig(path=str(path), num_layer_ids=3, **{"dtype": "float32", **options})


def save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def assert_equal(found: TargetFeatures, expected: TargetFeatures) -> None:
    torch.testing.assert_close(found.context, expected.context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.final, expected.final, rtol=1e-5, atol=1e-5)


def test_device_map_puts_on_disk_what_memory_does_not_hold(
    target: Target, target_folder: Path, tmp_path: Path
) -> None:
    options = {"max_memory": "100KB", "offload_folder": str(tmp_path)}
    split = load_target(config_of(target_folder, parallel="device_map", **options), "cpu")
    assert "disk" in split.model.hf_device_map.values()
    assert_equal(split.features(SAMPLES), target.features(SAMPLES))
    assert torch.equal(split.embedding, target.embedding)
    assert split.identity == target.identity


def test_fp8_is_loaded_as_transformers_loads_it(target_folder: Path, tmp_path: Path) -> None:
    """Block scales of 16; without a GPU Transformers dequantises, which is done by hand here."""
    weights = load_file(target_folder / "model.safetensors")
    quantised, by_hand = {}, {}
    for name, value in weights.items():
        quantised[name] = by_hand[name] = value
        if (
            "_proj" in name
            and value.dim() == 2
            and not (value.shape[0] % 16 or value.shape[1] % 16)
        ):
            blocks = value.view(value.shape[0] // 16, 16, value.shape[1] // 16, 16)
            scale = blocks.abs().amax((1, 3)) / 448
            eighth = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            quantised[name] = eighth.view(value.shape)
            quantised[f"{name}_scale_inv"] = scale
            by_hand[name] = (eighth.float() * scale[:, None, :, None]).view(value.shape)
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
    }
    for name, tensors in (("fp8", quantised), ("plain", by_hand)):
        shutil.copytree(target_folder, tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    file = tmp_path / "fp8" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    found = load_target(config_of(tmp_path / "fp8"), "cpu")
    expected = load_target(config_of(tmp_path / "plain"), "cpu")
    assert any("scale_inv" in name for name in quantised)
    assert_equal(found.features(SAMPLES), expected.features(SAMPLES))
    assert torch.equal(load_ends(config_of(tmp_path / "fp8"), "cpu").embedding, found.embedding)


def test_ends_that_have_other_names_in_the_files(tmp_path: Path) -> None:
    """DeepSeek V4 is published with `embed.weight` and `head.weight`."""
    config = DeepseekV4Config(
        **{**SMALL, "num_key_value_heads": 1, "head_dim": 32},
        q_lora_rank=32,
        o_lora_rank=16,
        o_groups=2,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        sliding_window=16,
        num_hash_layers=1,
    )
    folder = save(config, tmp_path)
    names = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in names
    options = {"attention": "eager"}
    whole = load_target(config_of(folder, **options), "cpu")
    ends = load_ends(config_of(folder, **options), "cpu")
    assert torch.equal(ends.embedding, whole.embedding)
    assert torch.equal(ends.head.weight, whole.head.weight)
    assert not torch.equal(ends.head.weight, ends.embedding)


@pytest.mark.parametrize(
    ("kind", "world", "family", "message"),
    [
        ("tensor", 1, LlamaConfig(**SMALL), "there is one; start more"),
        ("zero3", 1, LlamaConfig(**SMALL), r"target\.parallel=device_map"),
        ("tensor", 4, LlamaConfig(**SMALL), "2 num_key_value_heads cannot be split over 4"),
        ("tensor", 2, GptOssConfig(**SMALL, num_local_experts=4), "gpt_oss.*no tensor-parallel"),
        (
            "zero3",
            2,
            LlamaConfig(**SMALL, quantization_config={"quant_method": "fp8"}),
            "does not split quantised",
        ),
    ],
)
def test_what_cannot_be_split_is_said_before_weights_are_read(
    kind: str,
    world: int,
    family: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family.save_pretrained(tmp_path)  # no weights: reading them would fail otherwise
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    # Transformers gives one family after another a plan: this one got its in 5.24.
    monkeypatch.setattr(GptOssConfig, "base_model_tp_plan", None, raising=False)
    with pytest.raises(TargetError, match=message):
        load_target(config_of(tmp_path, parallel=kind, attention="eager"), "cpu")
