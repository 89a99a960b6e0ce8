"""Shared by every test: a tiny tokenizer with a Qwen-style template, and tiny random targets."""

from __future__ import annotations

import gc
import os
import random
import re
import zlib
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from deepspec.config import loading
from deepspec.config.resources import resource
from deepspec.config.schema import TargetConfig
from deepspec.data.thoughts import KNOWN
from deepspec.targets import Target, load_target
from deepspec.targets.hashes import CACHE
from deepspec.training.run_folder import RunFolder
from deepspec.training.trainer import Trainer
from tests.forked import command, kill_all, succeed
from tests.jobs import LAST, kill_jobs, write_recipe
from tests.trainers import MakeTrainer, build_trainer

# Tests share the cores, and threads that wait for one another there take four times as long; those
# of the processes that tests start too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Hypothesis draws the same examples each time, on any machine; with --hypothesis-profile=fresh
# (`make test-slow`) it draws new ones, and prints how to repeat one that fails. No deadline: tests
# share the cores.
FIXED, FRESH = "fixed", "fresh"
settings.register_profile(FIXED, derandomize=True, deadline=None)
settings.register_profile(FRESH, derandomize=False, deadline=None, print_blob=True)
settings.load_profile(FIXED)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
MARKED = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}{{- message['content'] + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def is_plain(text: str) -> bool:
    """Whether drawn text has no mark: hypothesis draws constants of the code under test too."""
    marks = ("<|", "|>", *(mark for pair in KNOWN for mark in pair))
    return not re.search(r"</?\w+>", text) and not any(mark in text for mark in marks)


# MARKED, with the calls of a turn after its content.
CALLING = MARKED.replace(
    "message['content'] + '<|im_end|>' -}}",
    "message['content'] -}}{%- for call in message.tool_calls or [] -%}"
    "{{- '[' + call.function.name + (call.function.arguments | tojson) + ']' -}}{%- endfor -%}"
    "{{- '<|im_end|>' -}}",
)
UNMARKED = MARKED.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


# Files whose tests start jobs come first: what is long and last leaves a core idle.
LONG = ("faults", "training", "launch", "commands")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of `LONG` first, and keep what was imported out of the garbage collector."""
    folders = [item.path.relative_to(Path(__file__).parent).parts[0] for item in items]
    order = [LONG.index(folder) if folder in LONG else len(LONG) for folder in folders]
    items[:] = [items[index] for index in sorted(range(len(items)), key=order.__getitem__)]
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def compose_once() -> Iterator[None]:
    """Hydra takes half a second for a recipe; the shipped ones do not change during the tests."""
    compose = loading._composed
    known = cache(compose)

    def composed(path: Path, *choices: str) -> dict[Any, Any]:
        shipped = path.parent == resource("recipes")
        return deepcopy(known(path, *choices)) if shipped else compose(path, *choices)

    loading._composed = composed
    yield
    loading._composed = compose


def seed_generators(name: str) -> None:
    """Seed the global generators by `name`, so that draws without a seed of their own repeat."""
    seed = zlib.crc32(name.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures are made."""
    seed_generators(f"{item.nodeid} setup")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Once more before the test, because which fixtures are made depends on the tests before."""
    seed_generators(f"{item.nodeid} call")


def make_tokenizer(template: str | None = MARKED) -> PreTrainedTokenizerFast:
    """Bytes and four markers: 260 entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        mask_token=SPECIAL[3],
        additional_special_tokens=[SPECIAL[1]],
    )
    wrapped.chat_template = template
    return wrapped


def make_model(vocabulary: int = 260, layers: int = 6, seed: int = 0) -> Qwen3ForCausalLM:
    """A random Qwen3 in fp32, peaked enough that greedy choices are not all ties."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hashes of the tiny targets' weights are of no use to whoever runs the tests."""
    os.environ[CACHE] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target as a Hugging Face checkpoint on disk."""
    folder = tmp_path_factory.mktemp("target")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def target(target_folder: Path) -> Target:
    """That checkpoint, loaded."""
    config = TargetConfig(path=str(target_folder), dtype="float32", num_layer_ids=3)
    return load_target(config, "cpu")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose template has generation markers."""
    return make_tokenizer()


@pytest.fixture
def make_trainer(target: Target, tmp_path: Path) -> Iterator[MakeTrainer]:
    """`make_trainer(name, *overrides, **options)`: `build_trainer` in a run folder of its own."""
    folders: list[RunFolder] = []

    def make(name: str, *overrides: str, **options: Any) -> Trainer:
        trainer = build_trainer(target, tmp_path / name, *overrides, **options)
        folders.append(trainer.folder)
        return trainer

    yield make
    for folder in folders:
        folder.__exit__(None, None, None)


@pytest.fixture(scope="session")
def recipe(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of `jobs.STEPS` steps on that target."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), target_folder)


@pytest.fixture(scope="session")
def quiet(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last weights of a run of `recipe` that nothing disturbed, in one process."""
    out = tmp_path_factory.mktemp("quiet")
    succeed(command("train", f"recipe={recipe}", f"out={out}"))
    return out / LAST


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """A job that hangs fails its test, and does not outlive it."""
    yield
    kill_jobs(tmp_path)
    kill_all()
