"""The `mtp.*` tensors, written and read.

Known to be right by: names, shapes and dtypes written out here from the layout's description
(D 64, 4 heads of 16, 2 groups, 18 experts of width 8, rank 6, V 260, 2 stages); a round trip whose
logits equal, bit for bit, those of the drafter with its weights rounded to bf16; and a checkpoint
as it is published, in shards, quantised here by loops over single blocks, that gives exactly what
loops over single blocks make of its bytes.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, DeepseekV4Config

from deepspec.checks.export import check_export
from deepspec.commands.beginnings import adopt_origin, first_drafter
from deepspec.commands.sources import open_source
from deepspec.commands.stages import check_fit, export_drafter
from deepspec.config.loading import config_from
from deepspec.config.schema import RunConfig, TargetConfig, as_dict
from deepspec.data.blocks import build_blocks
from deepspec.drafters.dspark_v4 import DSparkV4Drafter
from deepspec.errors import CheckpointError
from deepspec.export import LAYOUTS, files, is_export, model_card, write_export
from deepspec.export.block_scales import dequantised
from deepspec.export.deepseek_v4 import (
    deepseek_v4_config,
    deepseek_v4_shape,
    deepseek_v4_tensors,
    load_deepseek_v4,
    published_names,
)
from deepspec.export.files import headers_of
from deepspec.records import Sample, TargetFeatures
from deepspec.targets import Target
from tests.deepseek_v4 import LAYER_IDS, load_v4, make_native, save_v4
from tests.trainers import build_trainer

STAGE = {
    "attn.wq_a.weight": [20, 64],
    "attn.wq_b.weight": [64, 20],
    "attn.wkv.weight": [16, 64],
    "attn.wo_a.weight": [24, 32],
    "attn.wo_b.weight": [64, 24],
    "attn.q_norm.weight": [20],
    "attn.kv_norm.weight": [16],
    "attn.attn_sink": [4],
    "attn_norm.weight": [64],
    "ffn_norm.weight": [64],
    "ffn.gate.weight": [18, 64],
    "ffn.gate.bias": [18],
    "ffn.shared_experts.w1.weight": [8, 64],
    "ffn.shared_experts.w2.weight": [64, 8],
    "ffn.shared_experts.w3.weight": [8, 64],
    **{f"ffn.experts.{e}.w1.weight": [8, 64] for e in range(18)},
    **{f"ffn.experts.{e}.w2.weight": [64, 8] for e in range(18)},
    **{f"ffn.experts.{e}.w3.weight": [8, 64] for e in range(18)},
    "hc_attn_fn": [24, 256],
    "hc_attn_base": [24],
    "hc_attn_scale": [3],
    "hc_ffn_fn": [24, 256],
    "hc_ffn_base": [24],
    "hc_ffn_scale": [3],
}
FIRST = {"main_proj.weight": [64, 192], "main_norm.weight": [64]}
LAST = {
    "norm.weight": [64],
    "markov_head.markov_w1.weight": [260, 6],
    "markov_head.markov_w2.weight": [260, 6],
    "confidence_head.proj.weight": [1, 70],
    "hc_head_fn": [4, 256],
    "hc_head_base": [4],
    "hc_head_scale": [1],
}
TENSORS = {
    **{f"mtp.0.{name}": shape for name, shape in (STAGE | FIRST).items()},
    **{f"mtp.1.{name}": shape for name, shape in (STAGE | LAST).items()},
}


def is_fp32(name: str) -> bool:
    return "hc_" in name or name.endswith(("attn_sink", "gate.bias"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_v4(save_v4(tmp_path_factory.mktemp("v4")))


@pytest.fixture(scope="module")
def drafter(target: Target) -> DSparkV4Drafter:
    return make_native(target)


@pytest.fixture(scope="module")
def exported(
    target: Target, drafter: DSparkV4Drafter, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return export(drafter, target, tmp_path_factory.mktemp("export") / "out")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def export(drafter: DSparkV4Drafter, target: Target, out: Path) -> Path:
    what = ("deepseek_v4", "dspark_v4", drafter, target, out, "serving", 32)
    assert write_export(*what, card=lambda config, traits: "a card\n").layout == "deepseek_v4"
    return out


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors as another program would: without the recorded hash."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["deepspec"].pop("sha256", None)
    (folder / "config.json").write_text(json.dumps(config))


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


# --------------------------------------------------------------------------------------- on disk


def test_names_shapes_and_dtypes(exported: Path, tmp_path: Path) -> None:
    with safe_open(exported / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: found.get_shape() for name, found in slices.items()} == TENSORS
        dtypes = {name: found.get_dtype() for name, found in slices.items()}
    assert dtypes == {name: "F32" if is_fp32(name) else "BF16" for name in TENSORS}
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (exported / "README.md").read_text() == "a card\n"


def test_what_is_served_in_fp32_is_what_is_exported_in_it(target: Target) -> None:
    served = make_native(target).to_serve(target.device, torch.bfloat16)
    for name, tensor in served.state_dict().items():
        published = published_names(name, served.config)[0]
        assert tensor.dtype == (torch.float32 if is_fp32(published) else torch.bfloat16)


def test_config_is_the_targets_with_the_published_keys(exported: Path, target: Target) -> None:
    config = json.loads((exported / "config.json").read_text())
    expected = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "dtype": "bfloat16",
        "hidden_size": 64,
        "num_hidden_layers": 5,
        "qk_rope_head_dim": 8,
        "num_hash_layers": 1,
        "compress_ratios": [0, 4, 8, 4, 0, 0, 0],  # five layers and two stages
        "dspark_block_size": 4,
        "dspark_noise_token_id": 3,
        "dspark_target_layer_ids": LAYER_IDS,
        "dspark_markov_rank": 6,
        "dspark_num_layers": 2,
    }
    assert expected.items() <= config.items()
    assert "quantization_config" not in config
    extra = config["deepspec"]
    assert extra["identity"] == target.identity
    assert "/" not in extra["target"], "a published file names no private path"
    assert str(Path(target.name).parent) not in (exported / "config.json").read_text()
    read = AutoConfig.from_pretrained(exported)
    assert isinstance(read, DeepseekV4Config)
    same = ("layer_types", "mlp_layer_types", "rope_parameters", "compress_rates", "head_dim")
    assert all(getattr(read, key) == getattr(target.config, key) for key in same)


def test_a_quantised_targets_scheme_is_not_the_drafters(
    target: Target, drafter: DSparkV4Drafter
) -> None:
    target.config.quantization_config = {"quant_method": "fp8"}
    try:
        assert "quantization_config" not in deepseek_v4_config(drafter.config, target, "serving", 1)
    finally:
        del target.config.quantization_config


def test_only_an_earlier_export_is_replaced(
    target: Target, drafter: DSparkV4Drafter, folder: Path
) -> None:
    export(drafter, target, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"not just an earlier export .*notes\.txt"):
        export(drafter, target, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    edit(folder, deepspec=None)  # as published, perhaps with a whole target inside
    with pytest.raises(CheckpointError, match="not just an earlier export"):
        export(drafter, target, folder)


# ------------------------------------------------------------------------------------ round trip


def logits(drafter: DSparkV4Drafter, target: Target) -> tuple[Tensor, Tensor]:
    sample = Sample(torch.arange(5, 45), torch.ones(40, dtype=torch.bool), "a")
    batch = build_blocks([sample], [torch.tensor([1, 12, 30])], drafter.config.block_size, 4.0)
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(40, 3 * 64, generator=generator)
    with torch.no_grad():
        output = drafter(TargetFeatures(context, context), batch, target.embedding)
        return (
            target.head(output.hidden) + output.latent @ drafter.bias_weight.T,
            output.confidence_logits,
        )


def test_round_trip(exported: Path, drafter: DSparkV4Drafter, target: Target) -> None:
    assert is_export(exported)
    assert deepseek_v4_shape(exported) == drafter.config
    loaded = load_deepseek_v4(exported, target)
    assert not loaded.training
    rounded = make_native(target)
    for name, tensor in rounded.state_dict().items():
        if not (name.startswith("hc_") or ".hc_" in name or is_fp32(name)):
            tensor.copy_(tensor.bfloat16())
    own = loaded.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in rounded.state_dict().items())
    assert not torch.equal(own["main_proj.weight"], drafter.main_proj.weight)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for got, expected in zip(logits(loaded, target), logits(rounded, target), strict=True):
        assert torch.equal(got, expected)


def test_a_loaded_drafter_is_written_back_as_it_was(
    exported: Path, target: Target, tmp_path: Path
) -> None:
    again = export(load_deepseek_v4(exported), target, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (
        exported / "model.safetensors"
    ).read_bytes()


# ------------------------------------------------------------------ as published: shards, FP8, FP4

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values and a power of two for every 128 x 128 block, one block at a time."""
    rows, columns = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
    values, scales = torch.empty(weight.shape).to(torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            largest = float(weight[block].abs().max())
            scales[i, j] = 2.0 ** math.ceil(math.log2(largest / 448))
            values[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales.to(torch.float8_e8m0fnu)


def from_fp8(values: Tensor, scales: Tensor) -> Tensor:
    out = torch.empty(values.shape)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            out[i, j] = float(values[i, j]) * float(scales[i // 128, j // 128])
    return out


def to_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 values, two a byte, and a power of two for every 32 numbers of a row."""
    rows, blocks = weight.shape[0], -(-weight.shape[1] // 32)
    packed = torch.empty(rows, weight.shape[1] // 2, dtype=torch.uint8)
    scales = torch.empty(rows, blocks)
    for i in range(rows):
        bits = []
        for j in range(blocks):
            own = weight[i, 32 * j : 32 * (j + 1)]
            scales[i, j] = 2.0 ** math.ceil(math.log2(float(own.abs().max()) / 6))
            for value in (own / scales[i, j]).tolist():
                nearest = min(range(8), key=lambda m: abs(MAGNITUDES[m] - abs(value)))
                bits.append(nearest | (8 if value < 0 else 0))
        for k in range(len(bits) // 2):
            packed[i, k] = bits[2 * k] | bits[2 * k + 1] << 4
    return packed.view(torch.int8), scales.to(torch.float8_e8m0fnu)


def from_fp4(packed: Tensor, scales: Tensor) -> Tensor:
    out = torch.empty(packed.shape[0], 2 * packed.shape[1])
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            byte = int(packed[i, j // 2]) % 256
            bits = byte >> 4 if j % 2 else byte & 15
            sign = -1.0 if bits & 8 else 1.0
            out[i, j] = sign * MAGNITUDES[bits & 7] * float(scales[i, j // 32])
    return out


def is_fp8(name: str) -> bool:
    return any(part in name for part in ("main_proj", ".attn.w", ".shared_experts."))


@pytest.fixture(scope="module")
def quantised(exported: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The drafter's tensors as they are published, and what they stand for."""
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, weight in load_file(exported / "model.safetensors").items():
        scale = f"{name.removesuffix('weight')}scale"
        if ".ffn.experts." in name:
            stored[name], stored[scale] = to_fp4(weight.float())
            expected[name] = from_fp4(stored[name], stored[scale])
        elif is_fp8(name):
            stored[name], stored[scale] = to_fp8(weight.float())
            expected[name] = from_fp8(stored[name], stored[scale])
        else:
            stored[name], expected[name] = weight, weight.float()
    return stored, expected


@pytest.mark.parametrize("suffix", ["scale", "weight_scale_inv"])
def test_a_published_checkpoint(
    exported: Path, target: Target, tmp_path: Path, quantised: Any, suffix: str
) -> None:
    """The target's tensors and the drafter's, quantised, over three shards."""
    stored = {re.sub(r"\.scale$", f".{suffix}", name): t for name, t in quantised[0].items()}
    expected = quantised[1]
    folder = tmp_path / "published"
    folder.mkdir()
    names = sorted(stored)
    shards = {
        "model-00001-of-00003.safetensors": {"embed.weight": target.embedding.clone()},
        "model-00002-of-00003.safetensors": {n: stored[n] for n in names[::2]},
        "model-00003-of-00003.safetensors": {n: stored[n] for n in names[1::2]},
    }
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((exported / "config.json").read_text())
    del config["deepspec"], config["dspark_num_layers"]  # as published
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model-00001-of-00003.safetensors").unlink()  # holds nothing that is needed

    assert is_export(folder)
    loaded = load_deepseek_v4(folder, target)
    again = load_file(export(loaded, target, tmp_path / "again") / "model.safetensors")
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(again[name].float(), tensor), name  # exact in bf16 too

    source = open_source(folder, [f"target.layer_ids={LAYER_IDS}"])
    assert (source.kind, source.config.target.path) == ("dspark_v4", str(folder))


def test_blocks_larger_than_one_and_cut_at_the_end() -> None:
    weight = torch.randn(150, 290, generator=torch.Generator().manual_seed(0)) * 5
    weight[128:, 256:] *= 1000
    values, scales = to_fp8(weight)
    assert scales.shape == (2, 3)
    assert torch.equal(dequantised("w", values, scales), from_fp8(values, scales))
    assert (dequantised("w", values, scales) - weight).abs().max() < 0.07 * weight.abs().max()
    packed, scales = to_fp4(weight[:6, :72])
    assert scales.shape == (6, 3)
    got = dequantised("w", packed, scales)
    assert torch.equal(got, from_fp4(packed, scales))
    assert (got - weight[:6, :72]).abs().max() < 0.3 * weight[:6, :72].abs().max()
    # the same bytes under other names of their dtypes
    assert torch.equal(dequantised("w", packed.view(torch.float4_e2m1fn_x2), scales), got)
    assert torch.equal(dequantised("w", packed, scales.view(torch.uint8)), got)
    assert torch.equal(dequantised("w", packed, scales.float()), got)


@pytest.mark.parametrize(
    ("stored", "scale", "expected"),
    [
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), None, "there are no scales beside it"),
        (torch.zeros(4, 4, dtype=torch.int8), None, "there are no scales beside it"),
        (
            torch.zeros(4, 4).to(torch.float8_e4m3fn),
            torch.ones(1, 2),
            r"\[1, 2\], expected \[1, 1\]",
        ),
        (torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 1), r"\[4, 1\], expected \[4, 2\]"),
        (torch.zeros(4, 4, dtype=torch.int32), torch.ones(1, 1), r"w is torch.int32 with a scale"),
        (torch.zeros(4, 4).to(torch.float8_e5m2), torch.ones(1, 1), r"w is torch.float8_e5m2"),
        (torch.zeros(4, 4), torch.ones(1, 1), r"w is torch.float32 with a scale"),
    ],
)
def test_what_is_not_dequantised(stored: Tensor, scale: Tensor | None, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        dequantised("w", stored, scale)


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("mtp.1.norm.weight"), r"mtp\.1\.norm\.weight is missing"),
        (
            lambda t: t.pop("mtp.0.ffn.experts.17.w2.weight"),
            r"mtp\.0\.ffn\.experts\.17\.w2\.weight is missing",
        ),
        (
            lambda t: t.update({"mtp.0.e_proj.weight": torch.zeros(1)}),
            r"mtp\.0\.e_proj\.weight is not called for",
        ),
        (
            lambda t: t.update({"mtp.1.attn.attn_sink": torch.zeros(5)}),
            r"attn_sink is \[5\], expected \[4\]",
        ),
        (
            lambda t: t.update({"mtp.0.ffn.experts.1.w1.weight": torch.zeros(8, 63)}),
            r"mtp\.0\.ffn\.experts\.1\.w1\.weight is \[8, 63\], expected \[8, 64\]",
        ),
        (
            lambda t: t.update({"mtp.0.attn.wkv.weight": torch.zeros(16, 64, dtype=torch.int32)}),
            r"mtp\.0\.attn\.wkv\.weight is torch\.int32",
        ),
        (
            lambda t: t.update(
                {"mtp.0.attn.wkv.weight": torch.zeros(16, 64).to(torch.float8_e4m3fn)}
            ),
            r"mtp\.0\.attn\.wkv\.weight is .*no scales",
        ),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Any, expected: str) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=expected):
        load_deepseek_v4(folder)


def test_weights_in_several_files(
    target: Target, drafter: DSparkV4Drafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_deepseek_v4(export(drafter, target, tmp_path / "whole"), target)
    monkeypatch.setattr(files, "SHARD_BYTES", 50_000)
    folder = export(drafter, target, tmp_path / "out")
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 2
    loaded = load_deepseek_v4(folder, target).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.state_dict().items())
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(CheckpointError, match=rf"{parts[1].name} is corrupt"):
        load_deepseek_v4(folder, target)


def test_files_that_are_damaged(folder: Path) -> None:
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match="sha256 is not the one"):
        load_deepseek_v4(folder)
    weights.write_bytes(raw[:1000])
    with pytest.raises(CheckpointError, match="missing, corrupt or incomplete"):
        load_deepseek_v4(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_deepseek_v4(folder)
    save_file({"embed.weight": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError, match=r"there are no mtp\.\* tensors"):
        deepseek_v4_shape(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "qwen3"}, "model_type 'qwen3', expected 'deepseek_v4'"),
        ({"dspark_markov_rank": None}, "misses dspark_markov_rank"),
        ({"dspark_target_layer_ids": 3}, "describes no V4 drafter"),
        ({"hidden_size": "many"}, "describes no V4 drafter"),
    ],
)
def test_configs_that_describe_none(folder: Path, changes: Any, expected: str) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=expected):
        load_deepseek_v4(folder)


def test_a_v4_without_a_drafter_is_none(target: Target, tmp_path: Path) -> None:
    assert not is_export(Path(target.name))
    assert not is_export(tmp_path / "nowhere")


def test_another_target_is_refused(
    exported: Path, target: Target, folder: Path, tmp_path: Path
) -> None:
    other = load_v4(save_v4(tmp_path / "other", vocab_size=261))
    with pytest.raises(CheckpointError, match=r"embedding_and_head.*vocab_size \(260, not 261\)"):
        load_deepseek_v4(exported, other)
    kept = target.layer_ids
    target.layer_ids = [0, 1, 3]
    try:
        with pytest.raises(CheckpointError, match=r"reads the target's layers \[0, 2, 4\]"):
            load_deepseek_v4(exported, target)
    finally:
        target.layer_ids = kept


def test_another_family_is_refused(exported: Path, target_folder: Path) -> None:
    from deepspec.targets import load_target

    qwen = load_target(TargetConfig(path=str(target_folder), num_layer_ids=3), "cpu")
    with pytest.raises(CheckpointError, match=r"family \(deepseek_v4, not qwen3\)"):
        load_deepseek_v4(exported, qwen)


# -------------------------------------------------------------------------------------- the check


def test_the_check_finds_a_sound_one_sound(exported: Path, target: Target) -> None:
    found = check_export(exported)
    assert (found.layout, found.faults, found.doubts) == ("deepseek_v4", [], [])
    assert [entry.engine for entry in found.support if entry.loads] == [
        "vLLM",
        "SGLang",
        "llama.cpp",
        "this library",
    ]
    assert check_export(exported, target) == found, "its last layer may be captured"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.pop("mtp.1.norm.weight"), "mtp.1.norm.weight is missing"),
        (lambda t: t.update({"mtp.0.e_proj.weight": torch.zeros(1)}), "mtp.0.e_proj.weight is not"),
        (lambda t: t.clear() or t.update(x=torch.zeros(1)), "there are no mtp.* tensors"),
        (
            lambda t: t.update({"mtp.1.hc_head_base": torch.zeros(5)}),
            "hc_head_base is [5], expected [4]",
        ),
        (
            lambda t: t.update({"mtp.1.hc_head_base": torch.zeros(4).bfloat16()}),
            "hc_head_base is BF16 without a scale, expected F32",
        ),
        (
            lambda t: t.update({"mtp.0.attn.wkv.weight": torch.zeros(16, 64).half()}),
            "wkv.weight is F16 without a scale, expected BF16",
        ),
    ],
)
def test_the_check_finds_tensors_that_are_broken(folder: Path, change: Any, fault: str) -> None:
    rewrite(folder, change)
    found = check_export(folder)
    assert any(fault in text for text in found.faults), found.faults
    assert not any(entry.loads for entry in found.support)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"dspark_target_layer_ids": [0, 2, 5]}, "[0, 2, 5] of 5 have [5], no layer's output"),
        ({"dspark_target_layer_ids": [2, 2, 3]}, "[2, 2, 3] are not distinct and ascending"),
        ({"dspark_noise_token_id": 260}, "dspark_noise_token_id 260 is none of 260 tokens"),
        ({"dspark_markov_rank": 7}, "markov_w1.weight is [260, 6], expected [260, 7]"),
        ({"hidden_size": "many"}, "describes no V4 drafter"),
        ({"layer_types": [8]}, "describes no V4 drafter"),
        ({"dspark_block_size": None}, "which no layout calls itself"),
    ],
)
def test_the_check_finds_keys_that_are_broken(folder: Path, changes: Any, fault: str) -> None:
    edit(folder, **changes)
    assert any(fault in text for text in check_export(folder).faults)


# ------------------------------------------------------------------------------- around the layout


def test_a_training_ends_in_this_layout(target: Target, tmp_path: Path) -> None:
    words = ["drafter.kind=dspark_v4", "export.format=deepseek_v4", "drafter.block_size=4"]
    trainer = build_trainer(target, tmp_path / "run", *words)
    trainer.train_step()
    source = open_source(trainer.save())
    out = tmp_path / "out"
    export_drafter(source, target, source.load(target), out, None)
    assert json.loads((out / "config.json").read_text())["dspark_block_size"] == 4
    loaded = load_deepseek_v4(out, target).state_dict()
    for name, tensor in trainer.distillation.drafter.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, atol=1e-6, rtol=2**-8)
    exported = open_source(out, [f"target.path={target.name}"])
    assert exported.kind == source.kind == "dspark_v4"
    assert "1 optimizer steps" in (out / "README.md").read_text()
    trainer.folder.__exit__(None, None, None)


def test_a_training_begins_with_one(exported: Path, target: Target, tmp_path: Path) -> None:
    raw = {"recipe": "r", "target": {"path": target.name}, "data": {"path": ["d"]}}
    config = config_from(raw, [f"drafter.init_from={exported}", "export.format=deepseek_v4"])
    adopted = adopt_origin(config, [], tmp_path)
    assert (adopted.drafter.kind, adopted.drafter.markov_rank) == ("dspark_v4", 6)
    assert adopted.target.layer_ids == LAYER_IDS
    check_fit(adopted, target)
    own, found = first_drafter(adopted, target, [], None), load_deepseek_v4(exported, target)
    assert own.config == found.config
    for name, tensor in found.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor)


def test_the_card_tells_of_it(target: Target, drafter: DSparkV4Drafter) -> None:
    run = as_dict(RunConfig(recipe="r", target=TargetConfig(path="x")))
    run["data"]["path"], run["training"]["anchors_per_sample"] = ["owner/prompts"], 32
    config = deepseek_v4_config(drafter.config, target, "serving", 32)
    traits = LAYOUTS["deepseek_v4"].traits(config, headers_of(deepseek_v4_tensors(drafter)))
    card = model_card("mine", drafter.config, config, traits, run, 7, None)
    head, body = card.split("---")[1], card.split("---", 2)[2]
    assert yaml.safe_load(head)["pipeline_tag"] == "text-generation"
    assert "| draft layers | 2, hidden size 64 |" in body
    assert "| target layers read | 0, 2, 4 of 5 " in body
    assert "| Markov head | vanilla, rank 6 |" in body
    assert "up to 32 anchors each" in body
    assert "| vLLM | yes |" in body
