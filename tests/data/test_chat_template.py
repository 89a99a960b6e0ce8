"""The loss mask: decoding the masked tokens gives the assistant's words and nothing else."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from deepspec.data.chat_template import ChatEncoder, encode_all
from deepspec.data.conversations import Conversation, SkipCounts
from deepspec.data.stops import ASKED
from deepspec.errors import TemplateError, TemplateRefusal
from tests.conftest import MARKED, UNMARKED, is_plain, make_tokenizer

WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30
).filter(lambda text: text.strip() and is_plain(text))
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
    assert cut.input_ids.tolist() == ended.input_ids[:-1].tolist()
    assert ended.input_ids[-1] == 2
    assert cut.loss_mask.tolist() == ended.loss_mask[:-1].tolist()


def test_template_mistakes_are_named() -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        ChatEncoder(make_tokenizer(None), 100)
    strict = make_tokenizer("{{ raise_exception('no system prompts') }}" + UNMARKED)
    with pytest.raises(TemplateRefusal, match=r"sample s, turn 2: .*refuses it: no system prompts"):
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
    history = tokenizer.decode(samples[1].input_ids)
    assert "well" not in history  # thoughts about the first turn are gone in the second
    (cut,) = encoder.encode(conversation_of([("a?", first)], truncated=True))
    assert tokenizer.decode(cut.input_ids[cut.loss_mask]) == first


def test_a_template_that_refuses_thoughts_in_answers() -> None:
    encoder = ChatEncoder(with_channels(CHANNELS_REFUSED), 4096)
    with pytest.raises(TemplateRefusal, match="no place for the thought"):
        encoder.encode(conversation_of([("a?", WELL + "b")]))


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
    assert skips == {
        "no answer (first in q)": 1,
        "answers after data.max_length (first in s)": 1,
    }


def test_a_conversation_that_the_template_refuses_is_counted() -> None:
    picky = "{%- if messages[0].role == 'system' %}{{ raise_exception('no') }}{%- endif %}"
    skips, encoder = SkipCounts(), ChatEncoder(make_tokenizer(picky + UNMARKED), 4096)
    fine = conversation_of([("a", "b")])
    refused = Conversation("r", ({"role": "system", "content": "be brief"}, *fine.messages))
    assert [sample.sample_id for sample in encode_all([refused, fine], encoder, skips)] == ["s"]
    assert skips == {"refused by the chat template: no (first in r)": 1}


# What the target emits, for templates in the shape of public ones.


def with_marks(
    template: str, marks: Sequence[str] = (), plain: Sequence[str] = (), eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """`marks` are special tokens that the tokenizer's config does not name, `plain` added ones."""
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in plain])
    tokenizer.eos_token = eos
    return tokenizer


def turns(end: str, after: str = "", marks: tuple[str, str] = ("", "")) -> str:
    """A template that ends each turn with `end` and the conversation with `after`."""
    said = "{{ '<start>' + m.role + '\n' + m.content + '" + end + "' }}"
    return (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        + (marks[0] + said + marks[1])
        + "{%- else %}"
        + said
        + "{%- endif %}{%- endfor %}"
        + after
        + "{%- if add_generation_prompt %}{{ '<start>assistant\n' }}{%- endif %}"
    )


SHORT = ["<start>", "<end>", "<eos>"]
END_BEFORE_NEXT = (  # Apertus, Hunyuan 3, Apriel 1.6
    "{%- for m in messages %}{{ '<start>' + m.role + '\n' + m.content }}"
    "{%- if not (loop.last and m.role == 'assistant') %}{{ '<end>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start>assistant\n' }}{%- endif %}"
)
ROLES_END = (  # GLM: a turn ends where the next role begins
    "{%- for m in messages %}{{ '<|' + m.role + '|>' }}{%- if m.role == 'assistant' %}"
    "{{ '<think>' + (m.content.split('</think>')[0].split('<think>')[-1] | trim"
    " if '</think>' in m.content else '') + '</think>' + m.content.split('</think>')[-1] | trim }}"
    "{%- else %}{{ m.content }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "{{ '<|assistant|>' + ('<think>' if enable_thinking else '<think></think>') }}{%- endif %}"
)
OPENS_THOUGHT = (  # QwQ, Qwen3 Thinking
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n'"
    " + m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
LAST_THOUGHT = (  # LFM2.5: earlier answers lose their thoughts
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    "{% generation %}{{ (m.content if loop.last else m.content.split('</think>')[-1] | trim)"
    " + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{%- else %}{{ m.content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
RESPONSE = (  # Command R7B: the answer has marks of its own before the turn's end
    "{%- for m in messages %}{{ '<start>' + m.role }}{%- if m.role == 'assistant' %}"
    "{{ '<answer>' + m.content + '</answer><end>' }}{%- else %}{{ m.content + '<end>' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{ '<start>assistant' }}{%- endif %}"
)
SYSTEM_LAST = (  # Mistral Nemo: the system prompt stands in the last turn, if it is a question
    "{%- for m in messages %}{%- if m.role == 'user' %}{{ '<start>' }}"
    "{%- if loop.last and messages[0].role == 'system' %}{{ messages[0].content + ' ' }}"
    "{%- endif %}{{ m.content + '</start>' }}{%- elif m.role == 'assistant' %}"
    "{{ m.content + '<end>' }}{%- endif %}{%- endfor %}"
)
HM = "<think>\nhm\n</think>\n\nYes."
GENERATION = ("{% generation %}", "{% endgeneration %}")


@pytest.mark.parametrize(
    ("tokenizer", "answer", "thinking", "right"),
    [
        pytest.param(
            with_marks(turns("<end>\n"), SHORT, eos="<eos>"),
            *("Yes.", False, "Yes.<end>"),
            id="the end of a turn is special but has no name: Gemma 3, Phi 3",
        ),
        pytest.param(
            with_marks(
                turns("<end>\n", "{%- if not add_generation_prompt %}<eos>{%- endif %}"),
                *(SHORT, (), "<eos>"),
            ),
            *("Yes.", False, "Yes.<end>"),
            id="eos after the end of the turn: Phi 3.5, Apriel 1.5",
        ),
        pytest.param(
            with_marks(END_BEFORE_NEXT, SHORT, eos="<end>"),
            *("Yes.", False, "Yes.<end>"),
            id="the end is rendered only before a next turn: Apertus, Hunyuan 3",
        ),
        pytest.param(
            with_marks(ROLES_END, ["<|user|>", "<|assistant|>"], ["<think>", "</think>"]),
            *("Yes.", False, "Yes.<|user|>"),
            id="a turn ends where the next role begins: GLM",
        ),
        pytest.param(
            with_marks(ROLES_END, ["<|user|>", "<|assistant|>"], ["<think>", "</think>"]),
            *(HM, True, "hm</think>Yes.<|user|>"),
            id="the prompt opens the thought and the answer repeats it: GLM 4.7",
        ),
        pytest.param(
            with_marks(OPENS_THOUGHT, (), ["<think>", "</think>"]),
            *(HM, True, "hm\n</think>\n\nYes.<|im_end|>"),
            id="the prompt opens the thought, the template drops it: QwQ",
        ),
        pytest.param(
            with_marks(OPENS_THOUGHT, (), ["<think>", "</think>"]),
            *("hm\n</think>\n\nYes.", True, "hm\n</think>\n\nYes.<|im_end|>"),
            id="the answer closes a thought that the prompt opened",
        ),
        pytest.param(
            with_marks(turns("<end>\n", marks=GENERATION), SHORT, eos="<end>"),
            *("Yes.", False, "Yes.<end>"),
            id="markers around the role and the line break: Laguna, LFM2.5",
        ),
        pytest.param(
            with_marks(RESPONSE, [*SHORT, "<answer>", "</answer>"], eos="<eos>"),
            *("Yes.", False, "<answer>Yes.</answer><end>"),
            id="marks around the answer: Command R7B",
        ),
    ],
)
def test_supervised_is_what_the_target_emits(
    tokenizer: PreTrainedTokenizerFast, answer: str, thinking: bool, right: str
) -> None:
    encoder = ChatEncoder(tokenizer, 4096, thinking)
    conversation = conversation_of([("Well?", answer)])
    (sample,) = encoder.encode(conversation)
    prompt = encoder.prompt(conversation.messages[:1])
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == right
    assert sample.loss_mask.tolist() == [False] * len(prompt) + [True] * (len(sample) - len(prompt))
    (cut,) = encoder.encode(conversation_of([("Well?", answer)], truncated=True))
    spoken = tokenizer.decode(cut.input_ids[cut.loss_mask])
    assert right.startswith(spoken)
    assert spoken.endswith("Yes.")  # and is not taught to end


def test_earlier_thoughts_are_dropped_and_every_answer_keeps_its_own() -> None:
    tokenizer = with_marks(LAST_THOUGHT, (), ["<think>", "</think>"])
    samples = ChatEncoder(tokenizer, 4096, True).encode(conversation_of([("a?", HM), ("b?", HM)]))
    for sample in samples:
        assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == HM + "<|im_end|>"
    assert tokenizer.decode(samples[1].input_ids).count("hm") == 1


def test_a_system_prompt_that_moves_with_the_last_question() -> None:
    tokenizer = with_marks(SYSTEM_LAST, ["<start>", "</start>", "<end>"], eos="<end>")
    encoder = ChatEncoder(tokenizer, 4096, system_prompt="Be brief.")
    (sample,) = encoder.encode(conversation_of([("a?", "b")]))
    assert tokenizer.decode(sample.input_ids) == "<start>Be brief. a?</start>b<end>"
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == "b<end>"


def test_thoughts_where_thinking_is_off_are_refused_by_name() -> None:
    tokenizer = with_marks(THOUGHTS, (), ["<think>", "</think>"])
    with pytest.raises(TemplateRefusal, match=r"data\.thinking=true"):
        ChatEncoder(tokenizer, 4096).encode(conversation_of([("Well?", HM)]))
    (sample,) = ChatEncoder(tokenizer, 4096, True).encode(conversation_of([("Well?", HM)]))
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == HM + "<|im_end|>"


def test_an_empty_thought_where_thinking_is_off_is_the_prompts() -> None:
    tokenizer = with_marks(THOUGHTS, (), ["<think>", "</think>"])
    conversation = conversation_of([("Well?", "<think>\n\n</think>\n\nYes.")])
    (sample,) = ChatEncoder(tokenizer, 4096).encode(conversation)
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == "Yes.<|im_end|>"
    assert tokenizer.decode(sample.input_ids).count("<think>") == 1


def test_an_answer_without_thought_behind_an_opened_one_is_refused() -> None:
    encoder = ChatEncoder(with_marks(OPENS_THOUGHT, (), ["<think>", "</think>"]), 4096, True)
    with pytest.raises(TemplateRefusal, match="the prompt opens a thought"):
        encoder.encode(conversation_of([("Well?", "Yes.")]))


def test_a_stop_token_inside_an_answer_is_refused() -> None:
    encoder = ChatEncoder(TOKENIZERS["unmarked"], 4096, stop_token_ids=[2])
    with pytest.raises(TemplateRefusal, match=r"holds <\|im_end\|>"):
        encoder.encode(conversation_of([("a", "b<|im_end|>c")]))


@pytest.mark.parametrize("name", ["thinking", "enable_thinking"])
def test_the_switch_for_thoughts_has_two_names(name: str) -> None:
    tokenizer = make_tokenizer("{{ 'aloud' if " + name + " else 'briefly' }}" + UNMARKED)
    on, off = (ChatEncoder(tokenizer, 99, value).prompt(ASKED) for value in (True, False))
    assert on != off


def test_another_switch_for_thoughts_is_named() -> None:
    tokenizer = make_tokenizer("{{ 'Effort: ' + (reasoning_effort or 'low') }}" + UNMARKED)
    with pytest.raises(TemplateError, match=r"data\.template_options=\{reasoning_effort: high\}"):
        ChatEncoder(tokenizer, 99, True)
    encoder = ChatEncoder(tokenizer, 99, options={"reasoning_effort": "high"})
    assert tokenizer.decode(encoder.prompt(ASKED)).startswith("Effort: high")


def test_the_date_is_the_configs() -> None:
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y') }}" + UNMARKED)
    day = datetime.date(2024, 2, 29)
    prompt = ChatEncoder(tokenizer, 99, today=day).prompt(ASKED)
    assert tokenizer.decode(prompt).startswith("29 Feb 2024")


def test_an_answer_before_any_question_is_context_only() -> None:
    skips = SkipCounts()
    messages = (
        {"role": "assistant", "content": "Ask me."},
        *conversation_of([("a", "b")]).messages,
    )
    encoder = ChatEncoder(TOKENIZERS["unmarked"], 4096)
    (sample,) = encode_all([Conversation("s", messages)], encoder, skips)
    assert encoder.tokenizer.decode(sample.input_ids[sample.loss_mask]) == "b<|im_end|>"
    assert "Ask me." in encoder.tokenizer.decode(sample.input_ids)
    assert skips == {"an assistant turn before any question (first in s)": 1}


@pytest.mark.parametrize(
    "error", ["{%- for t in tools %}{{ t }}{%- endfor %}", "{{ 1 / 0 }}", "{{ missing.name }}"]
)
def test_whatever_a_template_raises_is_a_refusal(error: str) -> None:
    encoder = ChatEncoder(make_tokenizer(error + UNMARKED), 4096)
    with pytest.raises(TemplateRefusal, match="refuses it"):
        encoder.encode(conversation_of([("a", "b")]))


def test_sampled_ids_are_trained_on_as_they_are() -> None:
    """Special tokens and text that a template would render differently, as the target wrote it."""
    encoder = ChatEncoder(TOKENIZERS["unmarked"], 4096)
    first, second = ([1, *encoder.tokenizer(text)["input_ids"], 3] for text in "bd")
    first[-1] = 2
    messages = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "token_ids": first},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "token_ids": second},
    )
    samples = encoder.encode(Conversation("s", messages, truncated=True))
    assert [s.input_ids[s.loss_mask].tolist() for s in samples] == [first, second]
    for sample, asked in zip(samples, (messages[:1], messages[:3]), strict=True):
        prompt = encoder.prompt(asked)
        assert sample.input_ids[: len(prompt)].tolist() == prompt


def test_turns_that_are_context_only_are_not_supervised() -> None:
    encoder = ChatEncoder(TOKENIZERS["unmarked"], 4096)
    conversation = conversation_of([("a", "b"), ("c", "d")])
    conversation.messages[1]["supervised"] = False
    (sample,) = encoder.encode(conversation)
    assert encoder.tokenizer.decode(sample.input_ids[sample.loss_mask]) == "d<|im_end|>"
    conversation.messages[3]["supervised"] = False
    skips = SkipCounts()
    assert encode_all([conversation], encoder, skips) == []
    assert skips == {"no supervised answer (first in s)": 1}


CALLS = (  # Qwen: calls after the content; results from a role of their own
    "{%- if tools %}{{ tools | tojson }}{%- endif %}{%- for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}{%- for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{%- endfor %}"
    "{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 17, "b": "two"}}}


def call_conversation(content: str) -> Conversation:
    messages = (
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "content": "19"},
        {"role": "assistant", "content": "Nineteen."},
    )
    return Conversation("s", messages, tools=({"name": "add"},))


@pytest.mark.parametrize("content", ["", "Let me add."])
def test_tool_calls_are_supervised_with_their_end(content: str) -> None:
    tokenizer = with_marks(CALLS, (), ["<call>", "</call>"])
    (sample,) = ChatEncoder(tokenizer, 4096).encode(call_conversation(content))
    call = '<call>add{"a": 17, "b": "two"}</call>'
    spoken = tokenizer.decode(sample.input_ids[sample.loss_mask])
    assert spoken == f"{content}{call}<|im_end|>Nineteen.<|im_end|>"
    assert '"name": "add"' in tokenizer.decode(sample.input_ids)


def test_tool_calls_that_the_template_drops_are_refused() -> None:
    encoder = ChatEncoder(TOKENIZERS["unmarked"], 4096)
    with pytest.raises(TemplateRefusal, match="content and the tool calls"):
        encoder.encode(call_conversation("Let me add."))
    skips = SkipCounts()
    assert encoder.encode(call_conversation(""), skips) == []
    assert skips == {
        "an answer is not shown by the template": 1,
        "tool calls or results are not shown by the template": 1,  # before the last answer
    }


def test_ids_of_another_tokenizer_are_refused() -> None:
    encoder = ChatEncoder(TOKENIZERS["unmarked"], 4096)
    for ids in ([100, 101, 2], [4, 10**6]):
        answer = {"role": "assistant", "content": "Hello.", "token_ids": ids}
        with pytest.raises(TemplateRefusal, match="another tokenizer"):
            encoder.encode(Conversation("s", ({"role": "user", "content": "a"}, answer)))


def test_tool_calls_and_results_that_the_prompt_lacks_are_refused() -> None:
    """A template that drops them would have the target answer a broken conversation."""
    conversation = call_conversation("")
    with_calls = ChatEncoder(with_marks(CALLS, (), ["<call>", "</call>"]), 4096)
    assert with_calls.prompt(conversation.messages[:3], conversation.tools)
    without = ChatEncoder(TOKENIZERS["unmarked"], 4096)
    with pytest.raises(TemplateRefusal, match="does not show the tool calls or results"):
        without.prompt(conversation.messages[:3], conversation.tools)
    users_only = "{%- for m in messages if m.role == 'user' %}{{ m.content }}{%- endfor %}"
    result = [*ASKED, {"role": "tool", "content": "nineteen"}]
    with pytest.raises(TemplateRefusal, match="does not show the tool calls or results"):
        ChatEncoder(make_tokenizer(users_only), 4096).prompt(result)


def test_options_that_the_template_does_not_read_are_refused() -> None:
    with pytest.raises(TemplateError, match=r"data\.template_options has efort"):
        ChatEncoder(make_tokenizer(UNMARKED), 99, options={"efort": "high"})
