"""A random target whose text survives tokenization, and conversations for it to answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from deepspec.config.schema import TargetConfig
from deepspec.data.conversations import Conversation
from deepspec.targets import Target, load_target
from tests.conftest import CALLING, make_model, make_tokenizer

END, PRINTABLE = 2, slice(4, 98)  # ids of "<|im_end|>", and of "!" to "~" in the test tokenizer


@pytest.fixture(scope="session")
def writer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that writes printable ASCII: all other tokens have logit 0, so no greedy or
    top-k choice falls on them, and one token is one character. It ends most turns within 40."""
    model = make_model()
    weight = torch.zeros_like(model.lm_head.weight)
    for kept in (END, PRINTABLE):
        weight[kept] = model.lm_head.weight.detach()[kept]
    weight[END] *= 2
    model.lm_head.weight = nn.Parameter(weight)
    model.config.tie_word_embeddings = False
    folder = tmp_path_factory.mktemp("writer")
    model.save_pretrained(folder)
    make_tokenizer("{{- style | default('') -}}" + CALLING).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def writer(writer_folder: Path) -> Target:
    """That checkpoint, loaded."""
    config = TargetConfig(path=str(writer_folder), dtype="float32", num_layer_ids=3)
    return load_target(config, "cpu")


def shortened(folder: Path, copy: Path, length: int) -> Target:
    """The checkpoint of `folder` with a context of `length` tokens, through `copy`."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": length}))
    return load_target(TargetConfig(path=str(copy), dtype="float32", num_layer_ids=3), "cpu")


def talk(sample_id: str, *turns: str, system: str | None = None) -> Conversation:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(sample_id, tuple(messages))


def questions(count: int) -> list[Conversation]:
    """Prompts of different lengths."""
    return [talk(f"q{i:03d}", f"What is {i}" + " or so" * (i % 5) + "?") for i in range(count)]


def chats(count: int) -> list[Conversation]:
    """Three turns of the user, with two answers of the data's own."""
    return [talk(f"chat {i}", f"Name {i}", "one", f"And {i}", "two", "More") for i in range(count)]


TOOLS = ({"type": "function", "function": {"name": "add"}},)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def agentic(name: str) -> Conversation:
    """A greeting, two calls with their results, an answer, a last question and its call."""
    call = {"role": "assistant", "content": "", "tool_calls": [CALL], "token_ids": [7]}
    messages = (
        {"role": "assistant", "content": "Ask me."},
        {"role": "user", "content": f"Add {name}"},
        call,
        {"role": "tool", "content": "2"},
        call,
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "the data's answer"},
        {"role": "user", "content": "More?"},
        call,
    )
    return Conversation(name, messages, tools=TOOLS)
