"""A GGUF file as the target: the quantised model that llama.cpp serves.

Transformers dequantises the weights and makes config and tokenizer from the file's metadata. It
takes over only some of the metadata, in silence. Therefore the config is completed here, and a
file is refused if its metadata ask for more than Transformers computes.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.errors import TargetError
from deepspec.targets.files import update_digest
from deepspec.targets.hashes import HashedFiles, Span, Spans

SUFFIX = ".gguf"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# those of which tests/targets/test_gguf.py proves that Transformers computes what is in the file
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")
CONTROL = 3  # gguf.TokenType.CONTROL
# factors by which llama.cpp divides rotary frequencies: how it writes Llama 3's scaling down
ROPE_FACTORS = "rope_freqs.weight"
# Metadata under the architecture's name, and what a config calls it. Each is written into the
# config where Transformers leaves the default of the family.
MEANING = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
ROPE = {
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
FINETUNED = "rope.scaling.finetuned"  # computes nothing
ROPE_TYPES = {"none": "default", "linear": "linear", "yarn": "yarn"}
# what Transformers needs besides `factor` to compute Llama 3's scaling; the same in all its models
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# llama.cpp ends an answer at each of these, whatever the metadata are (llama-vocab.cpp)
ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<end_of_utterance>",
)


def is_gguf(path: str) -> bool:
    """Whether `target.path` means a GGUF file."""
    return path.endswith(SUFFIX)


@contextmanager
def alone(path: str) -> Iterator[tuple[str, str]]:
    """A folder with nothing but the file `path`, and the file's name there.

    Transformers prefers a tokenizer.json beside the file to the tokenizer in it.
    """
    file = Path(path).resolve()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).symlink_to(file)
        yield folder, file.name


class GgufFile(HashedFiles):
    """Tensors of a GGUF file by its own names, dequantised to float32, read one at a time.

    `path` names it in messages. Raises TargetError for one part of a split file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        file = os.path.expanduser(path)
        self._fields, self._tensors = _read(file, os.stat(file).st_mtime_ns)
        if (parts := self.value("split.count") or 1) > 1:
            raise TargetError(
                f"target.path={path} is one of {parts} parts; make one file of them: "
                "llama-gguf-split --merge FIRST_PART WHOLE"
            )

    def names(self) -> set[str]:
        """All tensors."""
        return set(self._tensors)

    def name_of_end(self, is_head: bool) -> str:
        """The name of the LM head or of the embedding; a tied head has none of its own."""
        return HEAD if is_head and HEAD in self._tensors else EMBEDDING

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU."""
        return _Rows(self._tensors[name])[:]

    def fingerprint(self) -> str:
        """A hash of names, shapes and a few values of every tensor; reads some pages of each."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            update_digest(digest, name, _shape(tensor), _Rows(tensor))
        return digest.hexdigest()[:32]

    def spans(self, names: Collection[str] | None = None) -> Iterator[Spans]:
        """See `HashedFiles.spans`: the one file, quantised as it is."""
        yield (
            Path(os.path.expanduser(self.path)),
            {
                name: Span(
                    tensor.tensor_type.name,
                    _shape(tensor),
                    int(tensor.data_offset),
                    int(tensor.n_bytes),
                )
                for name, tensor in self._tensors.items()
            },
        )

    def value(self, key: str) -> Any:
        """The metadata under `key`, None where there is none."""
        return self._fields[key].contents() if key in self._fields else None

    @property
    def parameters(self) -> int:
        """How many weights of a model are inside."""
        weights = (shape for name, shape in self._shapes() if name != ROPE_FACTORS)
        return sum(math.prod(shape) for shape in weights)

    def _shapes(self) -> Iterator[tuple[str, list[int]]]:
        return ((name, _shape(tensor)) for name, tensor in self._tensors.items())

    def end_ids(self) -> list[int]:
        """Tokens at which llama.cpp ends an answer."""
        named = (self.value(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
        ids = {token for token in named if token is not None}
        kinds = self.value("tokenizer.ggml.token_type") or []
        tokens = self._fields["tokenizer.ggml.tokens"]
        for index, kind in enumerate(kinds):
            if kind == CONTROL and tokens.contents(index) in ENDS:
                ids.add(index)
        return sorted(ids)

    def complete(self, config: Any) -> None:
        """Write into `config`, which Transformers made of this file, all that the file holds.

        Raises TargetError for what Transformers would compute otherwise.
        """
        architecture, text = self.value("general.architecture"), config.get_text_config()
        if architecture not in ARCHITECTURES:
            raise TargetError(
                f"target.path={self.path} is of architecture {architecture}; of GGUF files only "
                f"{', '.join(ARCHITECTURES)} are read: give the safetensors checkpoint instead"
            )
        rope: dict[str, Any] = {}
        said = {key for key in self._fields if key.startswith(f"{architecture}.")}
        for key in sorted(said - {f"{architecture}.{FINETUNED}"}):
            name, value = key.removeprefix(f"{architecture}."), self.value(key)
            meaning = MEANING.get(name)
            if name in ROPE:
                rope[ROPE[name]] = value
            elif meaning and hasattr(text, meaning) and not isinstance(value, list):
                setattr(text, meaning, value)
            elif meaning != "head_dim" or value != text.hidden_size // text.num_attention_heads:
                raise self._unread(f"{key}={value}")  # Qwen2 has no key for its heads' size
        self._rotate(text, rope)
        config.eos_token_id = self.end_ids() or None

    def _rotate(self, text: Any, said: dict[str, Any]) -> None:
        """Complete the rotation of `text` by the file's metadata, `said`."""
        kind = said.pop("rope_type", "none")
        if kind not in ROPE_TYPES:
            raise self._unread(f"rope.scaling.type={kind}")
        if kind == "none":
            said = {key: value for key, value in said.items() if key == "rope_theta"}
        text.rope_parameters |= {**said, "rope_type": ROPE_TYPES[kind]}
        if ROPE_FACTORS in self._tensors:
            base = text.rope_parameters["rope_theta"]
            text.rope_parameters = self._llama3(base, text.head_dim)

    def _llama3(self, base: float, head_dim: int) -> dict[str, Any]:
        """Llama 3's scaling where it gives exactly the factors in this file."""
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        factors = self.read(ROPE_FACTORS)
        rope = {**LLAMA3, "rope_theta": base, "factor": round(float(factors.max()), 4)}
        scaled = LlamaConfig(head_dim=head_dim, rope_parameters=dict(rope))
        with torch.device("cpu"):
            found, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
            plain = base ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        if found.shape != factors.shape or not torch.allclose(plain / found, factors, rtol=1e-3):
            raise self._unread(f"{ROPE_FACTORS} is not Llama 3's scaling")
        return rope

    def check(self, model: Any) -> None:
        """Raises TargetError unless `model` has as many weights as the file: Transformers leaves
        out those it has no name for, and makes up those that are missing."""
        wanted = sum(parameter.numel() for parameter in model.parameters())
        if wanted != self.parameters:
            raise self._unread(
                f"{self.parameters:,} weights, where {type(model).__name__} has {wanted:,}"
            )

    def _unread(self, what: str) -> TargetError:
        return TargetError(
            f"target.path={self.path} holds {what}, which Transformers does not read from a GGUF "
            "file: it would compute another model; give the safetensors checkpoint instead"
        )


class _Rows:
    """Rows of a tensor, dequantised when they are read."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __getitem__(self, rows: slice) -> Tensor:
        from gguf import dequantize

        return torch.tensor(dequantize(self._tensor.data[rows], self._tensor.tensor_type))


def _shape(tensor: Any) -> list[int]:
    """In torch's order; GGUF names the fastest dimension first."""
    return [int(size) for size in reversed(tensor.shape)]


@functools.lru_cache(maxsize=2)
def _read(path: str, changed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of the file at `path`, parsed once (seconds) until it has `changed`."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return dict(reader.fields), {tensor.name: tensor for tensor in reader.tensors}
