"""Answers by the target in process, against transformers' own `generate`."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepspec.cli import main
from deepspec.config.schema import DataConfig, RegenerateConfig, TargetConfig
from deepspec.data.chat_template import ChatEncoder
from deepspec.data.conversations import Conversation, SkipCounts, load_conversations
from deepspec.errors import DataError
from deepspec.regeneration import TargetAnswerer, regenerate
from deepspec.regeneration.dialogue import make_dialogues
from deepspec.targets import Target, load_target
from tests.regeneration.conftest import END, TOOLS, agentic, chats, questions, shortened, talk

DATA = DataConfig(path=["-"], max_length=400)
FRAME = len("IuserN" + "EN" + "IassistantN")  # tokens that the template puts around a prompt


def sampled(**options: object) -> RegenerateConfig:
    """Sampling that the `writer` target spells in ASCII."""
    standard = {"temperature": 1.0, "top_p": 1.0, "top_k": 8, "max_new_tokens": 24}
    return RegenerateConfig(**{**standard, **options})


def greedy(**options: object) -> RegenerateConfig:
    return sampled(temperature=0.0, **options)


def load(out: Path) -> dict[str, Conversation]:
    """The output, through the reader that training uses."""
    skips = SkipCounts()
    rows = list(load_conversations(DataConfig(path=[str(out)]), skips))
    assert not skips
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "token_ids"}


def run(target: Target, conversations: list[Conversation], out: Path, config: RegenerateConfig):
    counts = regenerate(conversations, TargetAnswerer(target, DATA), config, out, show=False)
    return counts, load(out)


def generated(target: Target, messages: list[dict[str, str]], limit: int) -> list[int]:
    """What transformers' greedy `generate` adds to the rendered messages."""
    ids = target.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = target.model.generate(**ids, do_sample=False, max_new_tokens=limit, pad_token_id=0)
    return out[0, ids["input_ids"].shape[1] :].tolist()


def expected(target: Target, conversation: Conversation, limit: int):
    """(messages, sampled ids, whether the limit ended it) by `generate`, turn after turn."""
    messages: list[dict[str, str]] = []
    written: list[int] = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            continue
        messages.append(message)
        if message["role"] == "user":
            tokens = generated(target, messages, limit)
            if tokens == [END]:
                return messages[:-1], written, False
            text = target.tokenizer.decode(tokens, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": text})
            written += tokens
            if tokens[-1] != END:
                return messages, written, True
    return messages, written, False


def test_every_answer_is_the_targets_own(writer: Target, tmp_path: Path) -> None:
    """Against `generate` with its own answers as history; the loss mask finds just them again."""
    conversations = [*questions(10), *chats(10)]
    for i in range(10):
        conversations += [
            talk(f"system {i}", f"What is {i}?", "the data's answer", system="Be brief."),
            Conversation(f"prompts {i}", tuple({"role": "user", "content": f"{i}"} for _ in "abc")),
        ]
    counts, rows = run(writer, conversations, tmp_path / "a.jsonl", greedy())
    encoder = ChatEncoder(writer.tokenizer, 4096)
    answers, tokens, truncated = Counter[int](), 0, 0
    for conversation in conversations:
        messages, written, cut = expected(writer, conversation, 24)
        answers[sum(message["role"] == "assistant" for message in messages)] += 1
        tokens += len(written)
        truncated += cut
        if not written:
            assert conversation.id not in rows
            continue
        row = rows[conversation.id]
        assert [without_ids(message) for message in row.messages] == messages
        ids = [m["token_ids"] for m in row.messages if m["role"] == "assistant"]
        assert list(itertools.chain(*ids)) == written
        assert row.truncated == cut
        (sample,) = encoder.encode(row)
        assert sample.input_ids[sample.loss_mask].tolist() == written
    assert counts.samples == len(conversations) == len(rows) + answers[0]
    assert sum(counts.failed.values()) == answers[0]
    assert (counts.file.truncated, counts.file.as_text) == (truncated, 0)
    assert counts.file.answers == sum(count * number for count, number in answers.items())
    assert counts.file.kept == counts.file.called == 0
    assert counts.tokens >= tokens  # an end of turn without an answer counts as well
    assert all(answers[count] for count in (1, 2, 3))
    assert 0 < truncated < len(rows)


def test_samples_of_a_prompt_differ_and_ids_never_repeat(writer: Target, tmp_path: Path) -> None:
    conversations = [talk("a", "What is 3?"), talk("b", "What is 3?"), talk("a", "What is 3?")]
    out, config = tmp_path / "a.jsonl", sampled(samples_per_prompt=4)
    counts, rows = run(writer, conversations, out, config)
    assert counts.samples == 12
    assert len(rows) + sum(counts.failed.values()) == 12
    assert set(rows) <= {f"{name}#{i}" for name in ("a", "b", "a~2") for i in range(4)}
    assert all(any(row.startswith(f"{name}#") for row in rows) for name in ("a", "b", "a~2"))
    assert all(row.conversation_id == name.partition("#")[0] for name, row in rows.items())
    assert len({row.messages[-1]["content"] for row in rows.values()}) > len(rows) // 2


def test_batches_and_seeds(writer: Target, tmp_path: Path) -> None:
    """A sample's answer depends on the seed and its id, not on its batch."""
    several = [*questions(8), talk("long", "one", "-", "two", "-", "three")]
    alone = run(writer, several, tmp_path / "1.jsonl", sampled(batch_size=1))[1]
    together = run(writer, several[::-1], tmp_path / "7.jsonl", sampled(batch_size=7))[1]
    other = run(writer, several, tmp_path / "s.jsonl", sampled(seed=1))[1]
    assert alone == together
    assert all(other[name] != alone[name] for name in alone)


def test_answers_keep_the_ids_that_were_sampled(target: Target, tmp_path: Path) -> None:
    """A random byte-level target writes bytes that are no text: its text has other ids, of which
    nothing is left but the ids that are stored. Half a character ends no text, but it is in the
    ids of an answer that the limit cut."""
    config = sampled(top_k=0, max_new_tokens=6, samples_per_prompt=4)
    counts, rows = run(target, questions(25), tmp_path / "a.jsonl", config)
    answers = [(row, row.messages[-1]) for row in rows.values()]
    other = halved = 0
    for row, answer in answers:
        text, ids = answer["content"], answer["token_ids"]
        assert (ids[-1] == END) is not row.truncated
        assert len(ids) == 6 or not row.truncated
        decoded = target.tokenizer.decode(ids if row.truncated else ids[:-1])
        assert text == (decoded.rstrip("\ufffd") if row.truncated else decoded)
        other += target.tokenizer(text)["input_ids"] != ids[: len(ids) - (not row.truncated)]
        halved += text != decoded
    assert other > halved > 0
    assert counts.file.rows + counts.failed.get("empty answer", 0) == 100


def test_answers_end_at_the_context(writer_folder: Path, tmp_path: Path) -> None:
    """A prompt that leaves room for a token is answered, as decoding would: up to the context."""
    target = shortened(writer_folder, tmp_path / "short", 100)
    target.stop_token_ids = []  # nothing else ends an answer
    conversations = [talk(f"{room}", "x" * (100 - room - FRAME)) for room in (40, 3, 1, 0)]
    data = replace(DATA, max_length=4096)
    out = tmp_path / "a.jsonl"
    answerer = TargetAnswerer(target, data)
    counts = regenerate(conversations, answerer, greedy(max_new_tokens=24), out, show=False)
    rows = load(out)
    assert set(rows) == {"40", "3", "1"}
    lengths = {name: len(row.messages[-1]["token_ids"]) for name, row in rows.items()}
    assert lengths == {"40": 24, "3": 3, "1": 1}
    assert counts.file.truncated == 3
    assert counts.failed == {"prompt too long": 1}


def test_calls_with_results_stay_and_are_not_supervised(writer: Target, tmp_path: Path) -> None:
    """The target answers where the data have an answer, or a call without a result."""
    conversations = [agentic(f"{i}") for i in range(6)]
    out = tmp_path / "a.jsonl"
    counts, rows = run(writer, conversations, out, greedy())
    own = 0
    for conversation in conversations:
        row = rows[conversation.id]
        given = conversation.messages
        kept = {0: given[0], 2: given[2], 4: given[4]}
        assert row.tools == TOOLS
        assert len(row.messages) in (8, 10)  # the first answer may be cut
        for place, message in enumerate(row.messages):
            if place in kept:
                assert message == {**without_ids(kept[place]), "supervised": False}
            elif message["role"] == "assistant":
                assert message.get("supervised", True)
                assert message["token_ids"]
                own += 1
            else:
                assert message == given[place]
    assert any(len(row.messages) == 10 for row in rows.values())
    assert (counts.file.answers, counts.file.kept) == (own, 3 * len(rows))
    assert f"{3 * len(rows)} assistant turns were kept from the data" in str(counts)
    again, _ = run(writer, conversations, out, greedy())
    assert again.resumed == len(rows)


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>', True),
        ("<function=add>", True),
        ("functions.add:0", True),
        ("call:add{a:1}", True),
        ("[add(a=1)]", True),
        ("Let me add. I add", False),
        ("an address(book)", False),
    ],
)
def test_a_call_of_the_target_ends_the_conversation(text: str, called: bool) -> None:
    """The data have no result for it; an answer that only has the tool's name in it is none."""
    (dialogue,) = make_dialogues([replace(talk("a", "1", "-", "2"), tools=TOOLS)], 1)
    dialogue.answer({"content": text}, 9, truncated=False)
    assert dialogue.open is not called
    if called:
        assert dialogue.row()["finish_reason"] == "tool_calls"
        assert len(dialogue.messages) == 2


def test_a_turn_that_fails_leaves_no_call_behind() -> None:
    """What is kept ends with an answer of the target."""
    conversation = agentic("a")
    first, *rest = conversation.messages[:4]
    user = {"role": "user", "content": "Hello"}
    messages = (first, user, {"role": "assistant", "content": "-"}, *rest)
    (dialogue,) = make_dialogues([replace(conversation, messages=messages)], 1)
    dialogue.answer({"content": "Hi", "token_ids": [5, 2]}, 2, truncated=False)
    assert dialogue.messages[-1] == rest[-1]
    dialogue.give_up("prompt too long", "")
    assert [m["content"] for m in dialogue.row()["messages"]] == ["Ask me.", "Hello", "Hi"]


def test_failures_are_written_counted_and_tried_again(writer_folder: Path, tmp_path: Path) -> None:
    """Prompts that are too long at once, or in their second turn (which leaves the first); one that
    the template refuses; and one that is answered by a stop token, made one for this test."""
    config = TargetConfig(path=str(writer_folder), dtype="float32", num_layer_ids=3)
    target = load_target(config, "cpu")
    silent = talk("silent", "Say nothing")
    first = generated(target, [dict(m) for m in silent.messages], 1)[0]
    target.model.generation_config.eos_token_id = [END, first]
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no systems') }}{% endif %}"
    target.tokenizer.chat_template = refuse + target.tokenizer.chat_template
    conversations = [
        talk("long", "x" * 400),
        *(talk(f"later {i}", f"What is {i}?", "-", "y" * 400) for i in range(8)),
        talk("window", "z" * 390),
        talk("system", "What is 3?", system="Be brief."),
        silent,
        *questions(6),
    ]
    out, failed = tmp_path / "a.jsonl", tmp_path / "a.failed.jsonl"
    for attempt in range(2):
        counts, rows = run(target, conversations, out, greedy(max_new_tokens=120))
        reasons = Counter(counts.failed)
        assert reasons["prompt too long"] == 2
        assert sum(n for why, n in reasons.items() if why.startswith("refused by the chat")) == 1
        assert reasons["empty answer"] >= 1
        lines = [json.loads(line) for line in failed.read_text().splitlines()]
        assert Counter(line["reason"] for line in lines) == reasons
        assert {"long", "window", "system", "silent"} <= {line["id"] for line in lines}
        assert {line["id"] for line in lines}.isdisjoint(rows)
        assert counts.file.rows + reasons.total() == counts.samples
        assert counts.resumed == attempt * counts.file.rows
    later = [row for name, row in rows.items() if name.startswith("later")]
    assert all(len(row.messages) == 2 for row in later)
    assert any(not row.truncated for row in later)


def test_nothing_answered_is_an_error(writer: Target, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompt too long \(.* data\.max_length=400\)"):
        run(writer, [talk("a", "x" * 500)], tmp_path / "a.jsonl", greedy())


def test_a_tilde_is_the_home_folder(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    main(["regenerate", f"recipe={recipe}", "data.limit=4", "out=~/a.jsonl"])
    assert len(load(tmp_path / "home" / "a.jsonl")) == 4
