"""A GGUF file as the target is the model whose weights were written into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf
from torch import Tensor

from deepspec.config.schema import TargetConfig
from deepspec.errors import TargetError
from deepspec.targets import Target, load_ends, load_target
from deepspec.targets.checkpoint import load_tokenizer
from deepspec.targets.identity import differing
from tests.conftest import UNMARKED, make_tokenizer
from tests.targets.test_target import samples_of
from tests.targets.tiny import DENSE, EXPERTS, LLAMA3, make_causal_lm

HEADS = {**DENSE, "vocab_size": 272, "rms_norm_eps": 1e-5}
LONG = {**LLAMA3, "original_max_position_embeddings": 8192}
MODELS: dict[str, Any] = {
    "llama": hf.LlamaConfig(**HEADS, rope_parameters=LONG, tie_word_embeddings=True),
    "qwen2": hf.Qwen2Config(
        **{key: value for key, value in HEADS.items() if key != "head_dim"},
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3": hf.Qwen3Config(
        **HEADS,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen3moe": hf.Qwen3MoeConfig(**HEADS, **EXPERTS, norm_topk_prob=True),
}
ENDING = "<end_of_turn>"


def tokenizer_of(vocabulary: int) -> Any:
    """Bytes, four markers and an end of turn that no metadata names."""
    tokenizer = make_tokenizer(UNMARKED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", ENDING]})
    assert len(tokenizer) < vocabulary
    return tokenizer


def write_gguf(
    folder: Path,
    name: str,
    quantise: bool = False,
    extra: dict[str, Tensor] | None = None,
    **metadata: Any,
) -> tuple[Path, Any]:
    """The random model `name` as folder/model.gguf, as llama.cpp's converter writes it with `extra`
    tensors, and the model itself."""
    config = MODELS[name]
    model = make_causal_lm(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms of 1 and biases of 0 would hide mistakes
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, name)
    write_metadata(writer, config, metadata)
    write_tokenizer(writer, tokenizer_of(config.vocab_size), config.vocab_size)
    names = gguf.get_tensor_name_map(ARCHITECTURES[name], config.num_hidden_layers)
    for key, tensor in tensors_of(model, name).items():
        kind, data = gguf.GGMLQuantizationType.F32, tensor.numpy()
        base, _, suffix = key.rpartition(".")
        if quantise and tensor.dim() > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(data, kind)
        writer.add_tensor(f"{names.get_name(base) or base}.{suffix}", data, raw_dtype=kind)
    factors = {"rope_freqs.weight": llama3_factors(config)} if name == "llama" else {}
    for key, tensor in (factors | (extra or {})).items():
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
}


def write_metadata(writer: gguf.GGUFWriter, config: Any, more: dict[str, Any]) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.rope_parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        original = config.rope_parameters["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_finetuned(True)
    for key, value in more.items():
        writer.add_float32(f"{writer.arch}.{key}", value)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    """As llama.cpp's converter does: rows without a token are called [PAD<id>]."""
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    vocabulary[len(tokenizer)] = "ab"  # Transformers wants a merge
    kinds = [
        gguf.TokenType.UNUSED
        if index not in vocabulary
        else gguf.TokenType.CONTROL
        if index in tokenizer.added_tokens_decoder
        else gguf.TokenType.NORMAL
        for index in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocabulary.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def tensors_of(model: Any, name: str) -> dict[str, Tensor]:
    """The weights by Transformers' names, each stored as llama.cpp wants it."""
    config, found = model.config, {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name == "llama" and ".q_proj." in key:
            tensor = interleaved(tensor, config.num_attention_heads)
        if name == "llama" and ".k_proj." in key:
            tensor = interleaved(tensor, config.num_key_value_heads)
        if key.endswith("experts.gate_up_proj"):
            base = key.removesuffix("gate_up_proj")
            gate, up = tensor.chunk(2, dim=1)
            found |= {f"{base}gate_proj.weight": gate, f"{base}up_proj.weight": up}
        elif key.endswith("experts.down_proj"):
            found[f"{key}.weight"] = tensor
        else:
            found[key] = tensor
    return {key: tensor.contiguous() for key, tensor in found.items()}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbouring dimensions of a head, Transformers its halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def llama3_factors(config: Any) -> Tensor:
    scaled, _ = hf.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    base = config.rope_parameters["rope_theta"]
    plain = base ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    assert not torch.allclose(plain, scaled)
    return plain / scaled


def load(path: Path, **options: Any) -> Target:
    return load_target(TargetConfig(path=str(path), num_layer_ids=1, **options), "cpu")


@pytest.mark.parametrize("name", list(MODELS))
def test_a_gguf_is_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    """The same weights from safetensors give the same features and logits, and but for the names
    of tensors the same identity."""
    path, model = write_gguf(tmp_path, name)
    folder = tmp_path / "safetensors"
    model.save_pretrained(folder)
    tokenizer_of(model.config.vocab_size).save_pretrained(folder)
    found, expected = load(path), load(folder)
    assert found.dtype == torch.float32
    samples = samples_of(9, 70)
    mine, its = found.features(samples), expected.features(samples)
    torch.testing.assert_close(mine.context, its.context, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.head(mine.final), expected.head(its.final), rtol=1e-4, atol=1e-4
    )
    assert set(differing(found.identity, expected.identity)) <= {"weights", "tokenizer"}
    assert found.tied == expected.tied
    assert found.context_length == expected.context_length


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_ends_are_dequantised_as_the_model_is(name: str, tmp_path: Path) -> None:
    path, model = write_gguf(tmp_path, name, quantise=True)
    ends, whole = load_ends(TargetConfig(path=str(path), num_layer_ids=1), "cpu"), load(path)
    assert torch.equal(ends.embedding, whole.embedding)
    assert torch.equal(ends.head.weight, whole.head.weight)
    rounded = (whole.embedding - model.get_input_embeddings().weight).abs().max()
    assert 0 < rounded < 0.01
    assert ends.identity.items() < whole.identity.items()
    assert load(path).identity == whole.identity


def test_tokenizer_template_and_ends_are_those_in_the_file(tmp_path: Path) -> None:
    path, _ = write_gguf(tmp_path, "llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_text("{}")  # another model's, which Transformers would prefer
    tokenizer = load_tokenizer(TargetConfig(path=str(path)))
    assert tokenizer.chat_template == UNMARKED
    own = make_tokenizer(UNMARKED)
    text = "<|im_start|>user\nWell, 17 of them?<|im_end|>"
    assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    ending = tokenizer.get_vocab()[ENDING]
    assert load(path).stop_token_ids == [0, 2, ending]  # <|endoftext|>, <|im_end|>
    ends = load_ends(TargetConfig(path=str(path), num_layer_ids=1), "cpu")
    assert ends.config.eos_token_id == [0, 2, ending]


def test_what_transformers_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    def refused(config: TargetConfig, why: str) -> None:
        for open_target in (load_ends, load_target):
            with pytest.raises(TargetError, match=why):
                open_target(config, "cpu")

    path, _ = write_gguf(tmp_path, "llama", **{"logit_scale": 4.0})
    config = TargetConfig(path=str(path), num_layer_ids=1)
    refused(config, r"holds llama\.logit_scale=4\.0, which Transformers does not read")
    write_gguf(tmp_path, "llama", extra={"blk.1.attn_q.bias": torch.ones(64)})
    refused(config, r"holds [\d,]+ weights, where LlamaForCausalLM has")
    write_gguf(tmp_path, "llama", extra={"rope_freqs.weight": torch.ones(8) * 3})
    refused(config, r"rope_freqs\.weight is not Llama 3's scaling")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"llama", b"gemma"))
    refused(config, "could not be loaded|of GGUF files only llama, qwen2, qwen3, qwen3moe are read")
    refused(TargetConfig(path=str(tmp_path / "other.gguf")), r"no such \.gguf file")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path, _ = write_gguf(tmp_path, "qwen3")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TargetError, match="could not be loaded"):
        load(path)


def test_a_split_target_is_refused(tmp_path: Path) -> None:
    from deepspec.targets.parallel import check_parallel

    path, model = write_gguf(tmp_path, "llama")
    config = TargetConfig(path=str(path), parallel="zero3")
    with pytest.raises(TargetError, match="does not split a GGUF file"):
        check_parallel(config, model.config)
