"""The loss mask: decoding the masked tokens gives the assistant's words and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deepspec.data.chat_template import ChatEncoder, encode_all
from deepspec.data.conversations import Conversation, SkipCounts
from deepspec.errors import TemplateError, TemplateRefusal
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
# In the shape of Gemma 4: an empty thought channel in the prompt where thinking is off, and none in
# any answer that was given.
CHANNELS = (
    "{%- macro spoken(text) -%}{%- for part in text.split('<channel|>') -%}"
    "{{ part.split('<|channel>')[0] }}{%- endfor -%}{%- endmacro -%}"
    "{%- if enable_thinking %}{{ '<|turn>system\n<|think|><turn|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{{ spoken(message.content) | trim }}{{ '<turn|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|turn>model\n' }}"
    "{%- if not enable_thinking %}{{ '<|channel>thought\n<channel|>' }}{%- endif %}{%- endif %}"
)
# In the shape of Qwen3: thoughts stay in the last answer only; empty ones in the prompt where
# thinking is off.
THOUGHTS = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- set parts = message.content.split('</think>') %}"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (parts[0].split('<think>')[-1] | trim if parts | length > 1 else '') }}"
    "{{ '\n</think>\n\n' }}{%- endif %}"
    "{{ parts[-1].lstrip('\n') + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
# In the shape of gpt-oss: channels in an answer's text are refused.
CHANNELS_REFUSED = (
    "{%- for message in messages %}{%- if '<|channel>' in message.content %}"
    "{{ raise_exception('no channels in content') }}{%- endif %}"
    "{{ '<|turn>' + message.role + message.content + '<turn|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|turn>assistant' }}{%- endif %}"
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
    strict = make_tokenizer("{{ raise_exception('no system prompts') }}" + UNMARKED)
    with pytest.raises(TemplateError, match=r"sample s: .*refuses it: no system prompts"):
        ChatEncoder(strict, 100).encode(conversation_of([("a", "b")]))


def test_a_template_that_rewrites_earlier_answers_gives_a_sample_an_answer() -> None:
    """As Qwen3 does: the last answer keeps its (empty) thoughts, earlier ones lose them."""
    tokenizer = make_tokenizer(REWRITING)
    first, second = ChatEncoder(tokenizer, 4096).encode(conversation_of([("a?", "b"), ("c?", "d")]))
    assert (first.sample_id, second.sample_id) == ("s#1", "s#2")
    assert (first.conversation_id, second.conversation_id) == ("s", "s")
    for sample, answer in ((first, "b"), (second, "d")):
        assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == f"{answer}<|im_end|>"
    assert tokenizer.decode(second.input_ids).count("<think>") == 1


WELL, EMPTY = "<|channel>thought\nwell<channel|>", "<|channel>thought\n<channel|>"


def with_channels(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(template)
    marks = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *marks]})
    return tokenizer


@pytest.mark.parametrize(
    ("template", "thinking", "first", "second", "end"),
    [
        (CHANNELS, True, WELL + "b", EMPTY + "d", "<turn|>"),
        (CHANNELS, False, "b", "d", "<turn|>"),
        (THOUGHTS, True, "<think>\nwell\n</think>\n\nb", "<think>\n\n</think>\n\nd", "<|im_end|>"),
        (THOUGHTS, False, "b", "d", "<|im_end|>"),
    ],
)
def test_thoughts_are_supervised_where_the_target_wrote_them(
    template: str, thinking: bool, first: str, second: str, end: str
) -> None:
    """What is given is the prompt as the target gets it, what is supervised all that it wrote."""
    tokenizer = with_channels(template)
    encoder = ChatEncoder(tokenizer, 4096, thinking)
    conversation = conversation_of([("a?", first), ("c?", second)])
    samples = encoder.encode(conversation)
    assert [sample.sample_id for sample in samples] == ["s#1", "s#2"]
    for sample, answer, said in zip(samples, (first, second), (1, 3), strict=True):
        prompt = encoder.prompt(conversation.messages[:said])
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        assert not sample.loss_mask[: len(prompt)].any()
        spoken = sample.input_ids[sample.loss_mask]
        assert tokenizer.decode(spoken) == answer + end
        assert encoder.answered(conversation.messages[: said + 1]) == sample.input_ids.tolist()
    history = tokenizer.decode(samples[1].input_ids)
    assert "well" not in history  # thoughts about the first turn are gone in the second
    (cut,) = encoder.encode(conversation_of([("a?", first)], truncated=True))
    assert tokenizer.decode(cut.input_ids[cut.loss_mask]) == first


def test_a_template_that_refuses_thoughts_in_answers() -> None:
    tokenizer = with_channels(CHANNELS_REFUSED)
    encoder = ChatEncoder(tokenizer, 4096)
    answer = WELL + "b"
    (sample,) = encoder.encode(conversation_of([("a?", answer)]))
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == answer + "<|im_end|>"
    with pytest.raises(TemplateRefusal, match="no channels in content"):
        encoder.prompt(conversation_of([("a?", answer)]).messages)


def test_a_template_that_renders_the_prompt_otherwise_once_it_is_answered() -> None:
    tokenizer = make_tokenizer("{{ messages | length }}" + UNMARKED)
    encoder = ChatEncoder(tokenizer, 100)
    samples = encoder.encode(conversation_of([("a", "b"), ("c", "d")]))
    for sample, length, answer in zip(samples, "13", "bd", strict=True):
        assert tokenizer.decode(sample.input_ids).startswith(length)
        assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == f"{answer}<|im_end|>"


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
