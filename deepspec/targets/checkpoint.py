"""The target's files as Transformers reads them: config, tokenizer and shapes, in any format."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deepspec.config.schema import TargetConfig
from deepspec.data.special_tokens import media_tokens
from deepspec.errors import TargetError, first_line
from deepspec.json_files import read_as, read_json
from deepspec.machine import lacks_bf16
from deepspec.model_files import read_model_config
from deepspec.progress import say_once
from deepspec.targets.files import WeightFiles
from deepspec.targets.gguf import SUFFIX, GgufFile, alone, is_gguf

DTYPES: dict[str, Any] = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


def checked_path(config: TargetConfig) -> str:
    """What transformers is to load. Raises TargetError for a folder that holds no checkpoint."""
    if config.dtype not in DTYPES:
        raise TargetError(f"target.dtype={config.dtype} is not one of {', '.join(DTYPES)}")
    path = os.path.expanduser(config.path)
    if is_gguf(path):
        if not Path(path).is_file():
            raise TargetError(
                f"target.path={config.path}: no such {SUFFIX} file; fetch it and give its path"
            )
        return path
    adapter = Path(path, "adapter_config.json")
    if adapter.is_file() and not Path(path, "config.json").is_file():
        found = read_json(adapter, TargetError, "fetch it again")
        base = f"{found.get('base_model_name_or_path') or 'BASE':.200}"
        raise TargetError(
            f"target.path={config.path} is an adapter (adapter_config.json without config.json), "
            f"not a whole model; merge it into its base model ({base}) by PEFT's "
            "merge_and_unload(), write the result and the base model's tokenizer into a folder by "
            "save_pretrained(FOLDER), and set target.path=FOLDER"
        )
    there = Path(path).exists()
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    if (there or looks_local) and not Path(path, "config.json").is_file():
        missing = "" if there else " (no such folder)"
        raise TargetError(
            f"target.path={config.path}: no config.json there{missing}; give the folder of a "
            "Hugging Face checkpoint or the name of one on the hub"
        )
    if there:
        read_model_config(Path(path, "config.json"), TargetError, "mend or fetch it again")
        _check_generation_config(Path(path, "generation_config.json"))
    return path


@dataclass(frozen=True)
class _Generation:
    eos_token_id: int | list[int] | None = None


def _check_generation_config(file: Path) -> None:
    """Raise TargetError for a broken file, which Transformers would take as missing."""
    with suppress(FileNotFoundError):
        way_out = "mend or fetch it again: it names the tokens at which generation stops"
        read_as(_Generation, file, TargetError, way_out)


def _check_json(path: str) -> None:
    """Raise TargetError that names the first file of the folder `path` that is no JSON: what reads
    them elsewhere names the folder at best."""
    for file in sorted(Path(path).glob("*.json")):
        read_as(Any, file, TargetError, "mend or fetch it again")


@contextmanager
def explained(config: TargetConfig) -> Iterator[None]:
    """Turns what transformers, safetensors and the hub raise into TargetError."""
    try:
        yield
    except TargetError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise TargetError(
                f"target.path={config.path} comes with Python code of its own (auto_map in its "
                "config.json), which has to run to load it; read that code, and where you trust "
                "it set target.trust_remote_code=true"
            ) from error
        _check_json(os.path.expanduser(config.path))
        where = f"target.path={config.path}"
        if isinstance(error, OSError) and not os.path.exists(os.path.expanduser(config.path)):
            where += f" is no folder in {Path.cwd()}, and as a name on the hub it"
        raise TargetError(
            f"{where} could not be loaded ({type(error).__name__}: {first_line(error)}); "
            "check the path or hub name, target.revision, and that its files are complete"
        ) from error


@contextmanager
def loaded_from(config: TargetConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what Transformers loads the target from: a folder or hub name, and options for it."""
    path = checked_path(config)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if not is_gguf(path):
        yield path, options
        return
    with alone(path) as (folder, file):
        try:
            yield folder, {**options, "gguf_file": file}
        except Exception as error:
            if folder not in str(error):
                raise
            why = first_line(error).replace(f"{folder}/", "").replace(folder, path)
            raise TargetError(f"target.path={config.path} could not be loaded ({why})") from error


def read_config(config: TargetConfig) -> Any:
    """Transformers' config of the target. Raises TargetError for a GGUF file that it does not
    describe whole."""
    from transformers import AutoConfig

    with loaded_from(config) as (path, options):
        found = AutoConfig.from_pretrained(path, **options)
    if is_gguf(config.path):
        GgufFile(config.path).complete(found)
    return found


def dtype_of(config: TargetConfig) -> Any:
    """The number type that `target.dtype` means for this target; "auto": that of its files."""
    if config.dtype == "auto" and is_gguf(config.path):
        return torch.float32  # so llama.cpp computes, whatever the blocks were quantised from
    return DTYPES[config.dtype]


def with_dtype(config: TargetConfig, device: torch.device | str) -> TargetConfig:
    """`config` with float32 for target.dtype=auto, where the checkpoint is in 16 bits and `device`
    is a processor without arithmetic for them."""
    on_processor = torch.device(device).type == "cpu" and lacks_bf16()
    if config.dtype != "auto" or is_gguf(config.path) or not on_processor:
        return config
    with explained(config):
        found = read_config(config)
    saved = getattr(found, "dtype", None) or getattr(found.get_text_config(), "dtype", None)
    quantised = getattr(found, "quantization_config", None) is not None
    if quantised or saved not in (torch.bfloat16, torch.float16):
        return config
    name = str(saved).removeprefix("torch.")
    say_once(
        f"target.dtype=auto: float32, because this processor has no arithmetic for {name}, in "
        "which the target is saved; target.dtype=bfloat16 takes half the memory and more time"
    )
    return replace(config, dtype="float32")


def meta_model(config: TargetConfig) -> Any:
    """The target's modules and shapes without weights, in a moment at any size."""
    from transformers import AutoModelForCausalLM

    with explained(config):
        found, wanted = read_config(config), dtype_of(config)
        dtype = getattr(found, "dtype", None) if wanted == "auto" else wanted
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                found,
                dtype=dtype or torch.float32,
                attn_implementation=attention_of(config),
                trust_remote_code=config.trust_remote_code,
            )
        if is_gguf(config.path):
            GgufFile(config.path).check(model)
    return model


def open_files(config: TargetConfig) -> WeightFiles | GgufFile:
    """The weights at `target.path`, whatever they are saved in. Raises TargetError."""
    return GgufFile(config.path) if is_gguf(config.path) else WeightFiles(config)


def layers_of(config: TargetConfig) -> list[int] | int:
    """The layer ids of `config`, or how many are to be spaced evenly."""
    return config.num_layer_ids if config.layer_ids is None else list(config.layer_ids)


def attention_of(config: TargetConfig) -> str | None:
    """What Transformers is asked for; None lets it take what the family has."""
    return None if config.attention == "auto" else config.attention


def load_tokenizer(config: TargetConfig) -> Any:
    """The target's tokenizer. Raises TargetError."""
    from transformers import AutoTokenizer

    lacking = TargetError(
        f"target.path={config.path} has no tokenizer (tokenizer.json is missing); copy the "
        "tokenizer files of the model there"
    )
    with explained(config), loaded_from(config) as (path, options):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
        except ImportError:  # a package that the tokenizer needs
            raise
        except Exception as error:  # tokenizers raises no type of its own
            held = is_gguf(config.path) or _holds_tokenizer(path)
            if "trust_remote_code" in str(error):
                raise
            _check_json(path)
            if Path(path, "tokenizer.json").is_file():
                raise TargetError(
                    f"{Path(path, 'tokenizer.json')}, or a file beside it, is no tokenizer "
                    f"({type(error).__name__}: {first_line(error)}); fetch it again"
                ) from error
            if held:
                raise
            raise lacking from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of nothing
        raise lacking
    return tokenizer


def _holds_tokenizer(path: str) -> bool:
    """Whether a local folder holds any tokenizer's file; of a name on the hub, True."""
    names = ("tokenizer*", "*.model", "vocab*", "*.tiktoken", "tekken.json")
    return not Path(path).is_dir() or any(
        file.name != "tokenizer_config.json" for name in names for file in Path(path).glob(name)
    )


def load_text_side(config: TargetConfig) -> tuple[Any, list[int]]:
    """The target's tokenizer and the tokens at which its generation stops, without any weights.

    Raises TargetError.
    """
    tokenizer = load_tokenizer(config)
    with explained(config):
        found = read_config(config)
    return tokenizer, stop_token_ids(generation_eos(config, found.get_text_config()), tokenizer)


def generation_eos(config: TargetConfig, text_config: Any) -> int | list[int] | None:
    """The ids at which generation stops, as `GenerationConfig` beside the weights has them."""
    from transformers import GenerationConfig

    path, revision = os.path.expanduser(config.path), config.revision or "main"
    with suppress(OSError):  # it has none
        if not is_gguf(path):
            return GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
    return getattr(text_config, "eos_token_id", None)


def stop_token_ids(eos: int | Sequence[int] | None, tokenizer: Any) -> list[int]:
    """Return `eos` and the tokenizer's end of text, sorted; `tokenizer` may be None."""
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if tokenizer is not None and tokenizer.eos_token_id is not None:  # planning goes without
        ids.append(tokenizer.eos_token_id)
    return sorted(set(ids))


def check_tokens(tokenizer: Any, rows: int, name: str) -> list[str]:
    """Return the tokens that an embedding of `rows` rows lacks and that no text has.

    Raises TargetError where text can become ids that it lacks.
    """
    placeholders = set(media_tokens(tokenizer))
    vocabulary = tokenizer.get_vocab()
    beyond = {token: index for token, index in vocabulary.items() if index >= rows}
    if wrong := sorted(beyond.keys() - placeholders, key=beyond.__getitem__):
        shown = ", ".join(f"{token} ({beyond[token]})" for token in wrong[:3])
        raise TargetError(
            f"target.path={name}: the tokenizer has {len(wrong)} token(s) that its embedding of "
            f"{rows} rows lacks: {shown}{', ...' if len(wrong) > 3 else ''}; resize the model's "
            "embedding to the tokenizer it was trained with, or take them out of the tokenizer"
        )
    return sorted(beyond)
