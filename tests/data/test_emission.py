"""What the target emits: templates built from parts, where the truth is known, and hard answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepspec.data.chat_template import ChatEncoder
from deepspec.data.conversations import Conversation, SkipCounts
from deepspec.data.tool_calls import OTHER
from deepspec.errors import TemplateRefusal
from tests.conftest import UNMARKED, is_plain, make_tokenizer
from tests.data.test_chat_template import CALLS, THOUGHTS, conversation_of, with_marks

THINK = ["<think>", "</think>"]


def answers_of(encoder: ChatEncoder, conversation: Conversation) -> list[tuple[str, str]]:
    """(what stands before it, the answer) of each supervised stretch, as text."""
    decode, found = encoder.tokenizer.decode, []
    for sample in encoder.encode(conversation):
        ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
        place = 0
        while True in mask[place:]:
            start = mask.index(True, place)
            place = mask.index(False, start) if False in mask[start:] else len(mask)
            found.append((decode(ids[:start]), decode(ids[start:place])))
    return found


@dataclass(frozen=True)
class Parts:
    """A template's parts: `{start}{role}{close}{lead}{content}{end}{gap}` is a turn."""

    bos: str
    start: str
    close: str
    lead: str  # before each content, but not in the generation prompt
    end: str  # empty: a turn ends where the next one starts
    gap: str
    eos: bool  # behind a conversation that is not to be answered
    open_end: bool  # the last answer is rendered without its end
    trim: bool
    thoughts: str  # "none"; "off", "on": as Qwen3; "open": the prompt opens the thought

    def template(self) -> str:
        content = "(m.content | trim)" if self.trim else "m.content"
        end = (
            "{%- if not (loop.last and m.role == 'assistant') %}" if self.open_end else "{% if 1 %}"
        )
        return (
            f"{{{{ {self.bos!r} }}}}{{%- for m in messages %}}{{{{ {self.start!r} + m.role"
            f" + {self.close!r} + {self.lead!r} }}}}"
            + (
                "{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n' +"
                " (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}"
                if self.thoughts != "none"
                else ""
            )
            + f"{{{{ {content} }}}}{end}{{{{ {self.end!r} + {self.gap!r} }}}}"
            + "{% endif %}{%- endfor %}"
            + f"{{%- if add_generation_prompt %}}{{{{ {self.opening()!r} }}}}"
            + ("{%- else %}<eos>" if self.eos else "")
            + "{%- endif %}"
        )

    def opening(self) -> str:
        thought = {"off": "<think>\n\n</think>\n\n", "open": "<think>\n"}.get(self.thoughts, "")
        return f"{self.start}assistant{self.close}{thought}"

    def said(self, content: str) -> str:
        return content.strip() if self.trim else content

    def prompt(self, turns: list[tuple[str, str]]) -> str:
        """What the target is given: every turn as it was said, without thoughts."""
        shown = (
            f"{self.start}{role}{self.close}{self.lead}{self.said(content)}{self.end}{self.gap}"
            for role, content in turns
        )
        return self.bos + "".join(shown) + self.opening()

    def emitted(self, thought: str, content: str, cut: bool) -> str:
        """What the target writes after the prompt, up to its stop."""
        written = {"on": f"<think>\n{thought}\n</think>\n\n", "open": f"{thought}\n</think>\n\n"}
        text = self.lead + written.get(self.thoughts, "") + self.said(content)
        stop = self.end or self.gap + self.start
        return text if cut else text + stop


PARTS = st.builds(
    Parts,
    bos=st.sampled_from(["", "<bos>", "\n"]),
    start=st.sampled_from(["<start>", "<|", "<start>\n"]),
    close=st.sampled_from(["<close>", "\n", "|>\n", ": "]),
    lead=st.sampled_from(["", " ", "\n"]),
    end=st.sampled_from(["", "<end>", " <end>", "\n<end>"]),
    gap=st.sampled_from(["", "\n", "\n\n"]),
    eos=st.booleans(),
    open_end=st.booleans(),
    trim=st.booleans(),
    thoughts=st.sampled_from(["none", "off", "on", "open"]),
).filter(
    # what ends a turn is shown: the end, or the special token that starts the next one
    lambda p: (
        (p.end != "" or (p.start == "<start>" and not p.open_end))
        and not (p.eos and (p.open_end or not p.end))
        and (p.thoughts == "none" or p.lead == "")  # a thought stands right after the prompt
    )
)
PIECES = ["assistant", "user", "final", "Zanswerz", "Zthoughtz", "Zquestionz", "Znextz", OTHER]
CONTENTS = st.lists(
    st.sampled_from(
        [*PIECES, " ", "\n", "\n\n", "\t", r"\1.*(?P<x>[", "{{ m }}", "é🎉", "<|", ": "]
    )
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8).filter(
        is_plain
    ),
    min_size=1,
    max_size=5,
).map("".join)
SAID = CONTENTS.filter(lambda text: bool(text.strip()))


@settings(max_examples=60, deadline=None)
@given(
    parts=PARTS,
    talk=st.lists(st.tuples(SAID, SAID.map(str.strip), SAID), min_size=1, max_size=3),
    cut=st.booleans(),
    known=st.booleans(),
)
def test_templates_built_from_parts(
    parts: Parts, talk: list[tuple[str, str, str]], cut: bool, known: bool
) -> None:
    """(question, thought, answer) in `talk`; the truth is put together without the template."""
    marks = ["<start>", "<close>", "<end>", "<bos>", "<eos>"]
    tokenizer = with_marks(parts.template(), marks, THINK, eos="<end>")
    stop = "<end>" if parts.end else "<start>"
    ids = [tokenizer.convert_tokens_to_ids(stop)] if known else []
    messages, turns, right = [], [], []
    for index, (question, thought, answer) in enumerate(talk):
        turns.append(("user", question))
        last = cut and index == len(talk) - 1
        right.append((parts.prompt(turns), parts.emitted(thought, answer, last)))
        turns.append(("assistant", answer))
        field = {"reasoning_content": thought} if parts.thoughts in ("on", "open") else {}
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, **field})
    encoder = ChatEncoder(tokenizer, 10**6, parts.thoughts in ("on", "open"), stop_token_ids=ids)
    conversation = Conversation("s", tuple(messages), truncated=cut)
    assert answers_of(encoder, conversation) == right


# Tokenizers


def sentencepiece(template: str, scheme: str) -> PreTrainedTokenizerFast:
    """Bytes and words in the manner of Llama 2, with a space put in front of texts."""
    words = ["▁", "▁Yes", "Yes", ".", "Q", "\n", "</s>", "<s>", "▁Q"]
    letters = sorted(set("USER: ASSISTANT:[INST]/▁"))
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {
        w: i for i, w in enumerate(dict.fromkeys([*names, *words, "Ye", *letters, "e", "s"]))
    }
    merges = [("Y", "e"), ("Ye", "s"), ("▁", "Yes"), ("▁", "Q")]
    vocabulary.setdefault("Y", len(vocabulary))
    model = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_no_space_is_put_between_prompt_and_answer(scheme: str) -> None:
    """The prompt ends with the space that a tokenizer would join with the answer's first word."""
    tokenizer = sentencepiece(
        "{%- for m in messages %}{{ ('A: ' if m.role == 'assistant' else 'U: ') + m.content }}"
        "{{ '</s>' }}{%- endfor %}{%- if add_generation_prompt %}{{ 'A: ' }}{%- endif %}",
        scheme,
    )
    encoder = ChatEncoder(tokenizer, 99, stop_token_ids=[tokenizer.eos_token_id])
    conversation = conversation_of([("Q", "Yes.")])
    (sample,) = encoder.encode(conversation)
    assert sample.input_ids[~sample.loss_mask].tolist() == encoder.prompt(conversation.messages[:1])
    assert tokenizer.convert_ids_to_tokens(sample.input_ids[sample.loss_mask]) == [
        "Yes",
        ".",
        "</s>",
    ]


def test_tokens_that_take_the_end_of_the_prompt_are_refused() -> None:
    tokenizer = make_tokenizer(UNMARKED)
    tokenizer.add_tokens([AddedToken("<end>", special=True, lstrip=True)])
    tokenizer.chat_template = UNMARKED.replace("<|im_end|>", "<end>")
    skips = SkipCounts()
    encoder = ChatEncoder(tokenizer, 99, stop_token_ids=[len(tokenizer) - 1])
    assert encoder.encode(conversation_of([("a", " ")]), skips) == []
    assert skips == {"the tokenizer cannot split prompt and answer": 1}


def test_a_stop_without_text_is_no_stop_of_all_texts() -> None:
    encoder = ChatEncoder(make_tokenizer(UNMARKED), 99, stop_token_ids=[2, 10**6])
    assert [answer for _, answer in answers_of(encoder, conversation_of([("a", "b")]))] == [
        "b<|im_end|>"
    ]


def test_placeholders_of_images_in_a_text_are_refused() -> None:
    """Their ids may lie beyond the embedding of a text-only model."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<image_soft_token>"},
    )
    tokenizer.chat_template = UNMARKED
    encoder, skips = ChatEncoder(tokenizer, 999), SkipCounts()
    for talk in (("<image_soft_token>?", "b"), ("a", "<image_soft_token>")):
        assert encoder.encode(conversation_of([talk]), skips) == []
    assert skips == {"a placeholder of an image or sound": 2}
    with pytest.raises(TemplateRefusal, match="<image_soft_token>"):
        encoder.prompt([{"role": "user", "content": "<image_soft_token>?"}])
    assert encoder.encode(conversation_of([("a", "<image_soft_toke")]))


def test_a_conversation_end_is_not_the_counterpart_of_the_answers_opening() -> None:
    """Phi 4 mini: `<|assistant|>` opens, `<|end|>` ends, and `<|endoftext|>` only once."""
    template = (
        "{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- else %}<|endoftext|>{%- endif %}"
    )
    marks = ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    encoder = ChatEncoder(with_marks(template, marks, eos="<|endoftext|>"), 999)
    found = answers_of(encoder, conversation_of([("a", "b"), ("c", "d")]))
    assert [answer for _, answer in found] == ["b<|end|>", "d<|end|>"]


# Thoughts


@pytest.mark.parametrize(
    "content", ["The tag </think> ends it.", "Write <think>x</think> there.", "[THINK] opens it."]
)
def test_marks_of_thoughts_in_the_words_of_a_template_without_thoughts(content: str) -> None:
    encoder = ChatEncoder(make_tokenizer(UNMARKED), 999)
    ((_, answer),) = answers_of(encoder, conversation_of([("a", content)]))
    assert answer == content + "<|im_end|>"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"content": "Write <think>x</think> there."}, "not shown"),
        ({"content": "<think>abc"}, "not closed"),
        ({"content": "<think>\none\n</think>\n\nb", "reasoning_content": "two"}, "two thoughts"),
    ],
)
def test_thoughts_that_cannot_be_told_from_the_answer_are_refused(
    turn: dict[str, Any], reason: str
) -> None:
    encoder = ChatEncoder(with_marks(THOUGHTS, (), THINK), 999, True)
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", **turn})
    skips = SkipCounts()
    assert encoder.encode(Conversation("s", messages), skips) == []
    assert reason in "".join(skips)


def test_a_thought_in_the_content_and_in_its_field_is_one() -> None:
    encoder = ChatEncoder(with_marks(THOUGHTS, (), THINK), 999, True)
    content = "<think>\nhm\n</think>\n\nYes."
    messages = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": content, "reasoning_content": "hm"},
    )
    ((_, answer),) = answers_of(encoder, Conversation("s", messages))
    assert answer == content + "<|im_end|>"


@pytest.mark.parametrize(
    "turn",
    [
        {"content": [{"type": "text", "text": "b"}]},
        {"content": "", "tool_calls": ["add"]},
        {"content": "", "tool_calls": {"name": "add"}},
        {"content": "", "tool_calls": [{"function": {"arguments": "{}"}}]},
    ],
)
def test_unreadable_turns_are_refused(turn: dict[str, Any]) -> None:
    skips, encoder = SkipCounts(), ChatEncoder(make_tokenizer(UNMARKED), 999)
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", **turn})
    assert encoder.encode(Conversation("s", messages), skips) == []
    assert skips == {"unreadable turn": 1}


def test_a_conversation_without_turns_gives_nothing() -> None:
    encoder = ChatEncoder(make_tokenizer(UNMARKED), 999, system_prompt="Be brief.")
    assert encoder.encode(Conversation("s", ())) == []


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"content": "b", "token_ids": []}, "an empty answer"),
        ({"content": "b", "token_ids": [9, 2, 9]}, "an answer holds a stop token"),
        ({"content": " \n"}, "an empty answer"),
    ],
)
def test_cut_or_sampled_answers_without_a_right_end_are_refused(
    turn: dict[str, Any], reason: str
) -> None:
    skips, encoder = SkipCounts(), ChatEncoder(make_tokenizer(UNMARKED), 99, stop_token_ids=[2])
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", **turn})
    assert encoder.encode(Conversation("s", messages, truncated=True), skips) == []
    assert skips == {reason: 1}


ARGUMENTS: list[Any] = [
    {"a": "1", "b": "e"},
    {"a": "im_end", "b": "tool"},
    {"a": ""},
    {},
    {"nested": {"list": [1, {"x": 'say "hi"\n\\o/'}], "none": None, "yes": True, "half": 0.5}},
    {"where": "Zürich 日本 <&'>"},
    {"a": f"Zanswerz Znextz {OTHER}"},
    [1, 2],
]


def called(*calls: tuple[str, Any]) -> Conversation:
    made = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    messages = (
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": None, "tool_calls": made},
        *({"role": "tool", "content": "done"} for _ in calls),
        {"role": "assistant", "content": "Fine."},
    )
    return Conversation("s", messages)


def spellings() -> Iterator[tuple[Any, Any]]:
    for arguments in ARGUMENTS:
        yield arguments, arguments
        if isinstance(arguments, dict):
            yield arguments, json.dumps(arguments)
    yield {}, ""


AS_TEXT = CALLS.replace("(c.function.arguments | tojson)", "c.function.arguments")
AS_IS = CALLS.replace("(c.function.arguments | tojson)", "c.function.arguments ~ ''")


@pytest.mark.parametrize("template", [CALLS, AS_TEXT, AS_IS])
@pytest.mark.parametrize(("arguments", "spelled"), spellings())
def test_arguments_of_calls(template: str, arguments: Any, spelled: Any) -> None:
    """Objects or JSON text in the data, objects or JSON text in the template: always JSON."""
    encoder = ChatEncoder(with_marks(template, (), ["<call>", "</call>"]), 999)
    (_, calls), (_, answer) = answers_of(encoder, called(("f", {"a": 1}), ("g", spelled)))
    shown, _, rest = calls.partition("<call>g")[2].partition("</call>")
    assert json.loads(shown) == arguments
    assert (calls.count("<call>"), rest, answer) == (2, "<|im_end|>", "Fine.<|im_end|>")


def test_the_end_of_a_call_after_a_thought_is_that_before_its_result() -> None:
    """GLM: a call ends where the result begins, which no rendering without one shows."""
    template = (
        "{%- for m in messages %}{{ '<|' + m.role + '|>' }}{%- if m.reasoning_content %}"
        "{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif %}{{ m.content }}"
        "{%- for c in m.tool_calls or [] %}{{ '<call>' + c.function.name }}"
        "{{ (c.function.arguments | tojson) + '</call>' }}{%- endfor %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
    )
    marks = ["<|user|>", "<|assistant|>", "<|tool|>"]
    tokenizer = with_marks(template, marks, ["<call>", "</call>", *THINK])
    stops = [tokenizer.convert_tokens_to_ids(mark) for mark in ("<|user|>", "<|tool|>")]
    encoder = ChatEncoder(tokenizer, 999, stop_token_ids=stops)
    conversation = called(("f", {"a": "Znextz"}))
    conversation.messages[1]["reasoning_content"] = "hm"
    (_, call), (_, answer) = answers_of(encoder, conversation)
    assert call == '<think>hm</think><call>f{"a": "Znextz"}</call><|tool|>'
    assert answer == "Fine.<|user|>"
