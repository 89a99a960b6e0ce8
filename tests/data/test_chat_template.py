"""The loss mask: decoding the masked tokens gives the assistant's words and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.data.chat_template import ChatEncoder, encode_all
from deepspec.data.conversations import Conversation, SkipCounts
from deepspec.errors import TemplateError
from tests.conftest import MARKED, UNMARKED, make_tokenizer

WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30
).filter(str.strip)
REWRITING = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if loop.last and message.role == 'assistant' %}{{ '<think></think>' }}{%- endif %}"
    "{{ message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think></think>' }}{%- endif %}"
)
TOKENIZERS = {"marked": make_tokenizer(MARKED), "unmarked": make_tokenizer(UNMARKED)}


def conversation_of(turns: list[tuple[str, str]], **options: object) -> Conversation:
    messages = []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return Conversation("s", tuple(messages), **options)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
    system=st.none() | WORDS,
    kind=st.sampled_from(sorted(TOKENIZERS)),
)
def test_masked_tokens_are_the_answers_and_their_ends(
    turns: list[tuple[str, str]], system: str | None, kind: str
) -> None:
    tokenizer = TOKENIZERS[kind]
    encoder = ChatEncoder(tokenizer, 4096, system_prompt=system)
    (sample,) = encoder.encode(conversation_of(turns))
    spoken = tokenizer.decode(sample.input_ids[sample.loss_mask])
    assert spoken == "".join(answer + "<|im_end|>" for _, answer in turns)


def test_both_ways_agree() -> None:
    conversation = conversation_of([("a?", "b."), ("c?", "d.")])
    samples = [ChatEncoder(t, 4096).encode(conversation)[0] for t in TOKENIZERS.values()]
    assert samples[0].loss_mask.tolist() == samples[1].loss_mask.tolist()


def test_prompt_is_a_prefix_of_the_sample() -> None:
    encoder = ChatEncoder(TOKENIZERS["marked"], 4096)
    conversation = conversation_of([("a?", "b.")])
    (sample,) = encoder.encode(conversation)
    prompt = encoder.prompt(conversation.messages[:1])
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert sample.loss_mask.nonzero()[0].item() == len(prompt)


def test_truncation() -> None:
    conversation = conversation_of([("a?", "b" * 50)])
    (whole,) = ChatEncoder(TOKENIZERS["marked"], 4096).encode(conversation)
    (cut,) = ChatEncoder(TOKENIZERS["marked"], 40).encode(conversation)
    assert len(cut) == 40
    assert cut.input_ids.tolist() == whole.input_ids[:40].tolist()
    assert ChatEncoder(TOKENIZERS["marked"], 10).encode(conversation) == []


def test_an_answer_cut_by_a_length_limit_is_not_taught_to_end() -> None:
    encoder = ChatEncoder(TOKENIZERS["marked"], 4096)
    (ended,) = encoder.encode(conversation_of([("a?", "b")]))
    (cut,) = encoder.encode(conversation_of([("a?", "b")], truncated=True))
    assert ended.loss_mask.sum() - cut.loss_mask.sum() == 1
    assert cut.input_ids[ended.loss_mask & ~cut.loss_mask].tolist() == [2]


def test_template_mistakes_are_named() -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        ChatEncoder(make_tokenizer(None), 100)
    everything = make_tokenizer("{% generation %}" + UNMARKED + "{% endgeneration %}")
    with pytest.raises(TemplateError, match=r"sample s: .*all ones"):
        ChatEncoder(everything, 100).encode(conversation_of([("a", "b")]))
    nothing = make_tokenizer(UNMARKED + "{% generation %}{% endgeneration %}")
    with pytest.raises(TemplateError, match=r"sample s: .*empty"):
        ChatEncoder(nothing, 100).encode(conversation_of([("a", "b")]))
    forgetful = make_tokenizer("{{ messages | length }}" + UNMARKED)
    with pytest.raises(TemplateError, match=r"sample s: .*prompt of turn 1 differently"):
        ChatEncoder(forgetful, 100).encode(conversation_of([("a", "b"), ("c", "d")]))
    strict = make_tokenizer("{{ raise_exception('no system prompts') }}" + UNMARKED)
    with pytest.raises(TemplateError, match=r"sample s: .*refuses it: no system prompts"):
        ChatEncoder(strict, 100).encode(conversation_of([("a", "b")]))


def test_a_template_that_rewrites_earlier_answers_gives_a_sample_an_answer() -> None:
    """As Qwen3 does: the last answer keeps its (empty) thoughts, earlier ones lose them."""
    tokenizer = make_tokenizer(REWRITING)
    first, second = ChatEncoder(tokenizer, 4096).encode(conversation_of([("a?", "b"), ("c?", "d")]))
    assert (first.sample_id, second.sample_id) == ("s#1", "s#2")
    for sample, answer in ((first, "b"), (second, "d")):
        assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == f"{answer}<|im_end|>"
    assert tokenizer.decode(second.input_ids).count("<think>") == 1


def test_left_out_samples_are_counted() -> None:
    skips = SkipCounts()
    encoder = ChatEncoder(TOKENIZERS["marked"], 45)
    question_only = Conversation("q", ({"role": "user", "content": "a"},))
    late = conversation_of([("a" * 60, "b")])
    samples = encode_all([question_only, late, conversation_of([("a", "b")])], encoder, skips)
    assert len(samples) == 1
    assert skips == {"no answer": 1, "answers behind max_length": 1}


def test_a_conversation_that_the_template_refuses_is_counted() -> None:
    picky = "{%- if messages[0].role == 'system' %}{{ raise_exception('no') }}{%- endif %}"
    skips, encoder = SkipCounts(), ChatEncoder(make_tokenizer(picky + UNMARKED), 4096)
    fine = conversation_of([("a", "b")])
    refused = Conversation("r", ({"role": "system", "content": "be brief"}, *fine.messages))
    assert [sample.sample_id for sample in encode_all([refused, fine], encoder, skips)] == ["s"]
    assert skips == {"refused by the chat template": 1}
