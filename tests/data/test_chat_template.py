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
    sample = encoder.encode(conversation_of(turns))
    assert sample is not None
    spoken = tokenizer.decode(sample.input_ids[sample.loss_mask])
    assert spoken == "".join(answer + "<|im_end|>" for _, answer in turns)


def test_both_ways_agree() -> None:
    conversation = conversation_of([("a?", "b."), ("c?", "d.")])
    samples = [ChatEncoder(t, 4096).encode(conversation) for t in TOKENIZERS.values()]
    assert samples[0].loss_mask.tolist() == samples[1].loss_mask.tolist()


def test_prompt_is_a_prefix_of_the_sample() -> None:
    encoder = ChatEncoder(TOKENIZERS["marked"], 4096)
    conversation = conversation_of([("a?", "b.")])
    sample = encoder.encode(conversation)
    prompt = encoder.prompt(conversation.messages[:1])
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert sample.loss_mask.nonzero()[0].item() == len(prompt)


def test_truncation() -> None:
    conversation = conversation_of([("a?", "b" * 50)])
    whole = ChatEncoder(TOKENIZERS["marked"], 4096).encode(conversation)
    cut = ChatEncoder(TOKENIZERS["marked"], 40).encode(conversation)
    assert len(cut) == 40
    assert cut.input_ids.tolist() == whole.input_ids[:40].tolist()
    assert ChatEncoder(TOKENIZERS["marked"], 10).encode(conversation) is None


def test_an_answer_cut_by_a_length_limit_is_not_taught_to_end() -> None:
    encoder = ChatEncoder(TOKENIZERS["marked"], 4096)
    ended = encoder.encode(conversation_of([("a?", "b")]))
    cut = encoder.encode(conversation_of([("a?", "b")], truncated=True))
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
    with pytest.raises(TemplateError, match="renders turn 1 differently"):
        ChatEncoder(forgetful, 100).encode(conversation_of([("a", "b"), ("c", "d")]))


def test_left_out_samples_are_counted() -> None:
    skips = SkipCounts()
    encoder = ChatEncoder(TOKENIZERS["marked"], 45)
    question_only = Conversation("q", ({"role": "user", "content": "a"},))
    late = conversation_of([("a" * 60, "b")])
    samples = encode_all([question_only, late, conversation_of([("a", "b")])], encoder, skips)
    assert len(samples) == 1
    assert skips == {"no answer": 1, "answers behind max_length": 1}
