"""Holds the loss mask of public chat templates against what their models emit.

    python benchmarks/templates.py FOLDER

FOLDER has `*.jinja` files, such as `models/templates` in llama.cpp's source. Each template is tried
on ten kinds of conversation. A cell of the table is `right`, `refused` (with the reason, in
--reasons) or `WRONG`; the exit status is 1 where one is wrong.

What is right is written here apart from the library: the mark at which each model's generation
stops, the marks of its thoughts and of its answers. Supervised must be exactly the
thought, the answer and the calls as given, once each, in those marks, and the stop at the end.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepspec.data.chat_template import ChatEncoder
from deepspec.data.conversations import Conversation, SkipCounts
from deepspec.errors import DeepSpecError, TemplateError

# The mark at which generation stops, by the model's generation config; `*` the other templates.
# None: what the model writes after an answer cannot be told from the template.
STOPS: dict[str, str | None] = {
    "Apertus": "<|assistant_end|>",
    "Apriel": "<|end|>",
    "Bielik": "<|im_end|>",
    "ByteDance": "<seed:eos>",
    "Cohere": "<|END_OF_TURN_TOKEN|>",
    "GLM": "<|user|>",
    "GigaChat": "<|message_sep|>",
    "SmolLM3": "<|im_end|>",
    "Kimi": "<|im_end|>",
    "LFM2": "<|im_end|>",
    "MiMo": "<|im_end|>",
    "MiniMax": "[e~[",
    "Mistral": "</s>",
    "mistral": "</s>",
    "Nemotron-3": "<|im_end|>",
    "Nemotron-Nano-v2": "<SPECIAL_12>",
    "Hermes": "<|im_end|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "Qwen-": "<|im_end|>",
    "Qwen3": "<|im_end|>",
    "Reka": "<sep>",
    "StepFun": "<|im_end|>",
    "firefunction": "<|eot_id|>",
    "gemma-2": "<end_of_turn>",
    "gemma-4": "<turn|>",
    "granite": "<|end_of_text|>",
    "rwkv": None,
    "functionary": "<|eot_id|>",
    "Llama-3": "<|eot_id|>",
    "Phi-3.5": "<|end|>",
    "gpt-oss": "<|return|>",
    "MiniCPM5": "<|im_end|>",
    "Laguna": "</assistant>",
    "Hy3": "<｜hy_eos:opensource｜>",
    "Solar": "<|end|>",
}
# Where a model ends a tool call with another mark.
CALL_STOPS = {
    "GLM": "<|observation|>",
    "gpt-oss": "<|call|>",
    "Apertus": "<|tools_suffix|>",
    "Solar": "<|calls|>",
    "gemma-4-31B-it-interleaved": "<turn|>",
    "gemma-4": "<|tool_response>",
    "functionary-medium-v3.1": "<|eom_id|>",
}
EOS = {
    "deepseek": "<｜end▁of▁sentence｜>",
    "Mistral": "</s>",
    "mistral": "</s>",
    "Llama-3": "<|eot_id|>",
}
THOUGHTS = (
    ("gpt-oss", "<|channel|>analysis<|message|>", "<|end|>"),
    ("gemma-4", "<|channel>thought", "<channel|>"),
    ("Cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
    ("Solar", "<|think|>", "<|end|>"),
    ("ByteDance", "<seed:think>", "</seed:think>"),
    ("Hy3", "<think:opensource>", "</think:opensource>"),
    ("Ministral", "[THINK]", "[/THINK]"),
    ("Apriel", "Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    ("", "<think>", "</think>"),
)
SPECIAL = re.compile(
    r"<\|[^<>|\s{}']+\|>|<｜[^<>｜\s{}']+｜>|<\|[A-Za-z_]+>|<[A-Za-z_]+\|>|</?s>|\[/?[A-Z_]+\]"
    r"|<(?:start|end)_of_turn>|<bos>|<eos>|<sep>|<SPECIAL_\d+>|</?(?:assistant|user|system)>"
    r"|<seed:[a-z]+>|\]~b\]|\[e~\[|\]~!b\["
)
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "lookup", "arguments": {"city": "Oslo", "days": 3}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks up the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A city."},
                "days": {"type": "integer", "description": "How many."},
            },
            "required": ["city"],
        },
    },
}
FINE = ("an assistant turn before any question",)  # it answers nothing
THOUGHT, FIRST, SECOND = "First I add them.", "It is forty-two.", "Then it was nine."


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def scenarios() -> Iterator[tuple[str, bool, Conversation, list[list[str]]]]:
    """(name, thinking, conversation, the pieces of each supervised answer in order)."""
    ask, more = user("How many?"), user("And before?")
    inline = assistant(f"<think>\n{THOUGHT}\n</think>\n\n{FIRST}")
    field = assistant(FIRST, reasoning_content=THOUGHT)

    def talk(*messages: dict[str, Any], **options: Any) -> Conversation:
        return Conversation("s", tuple(messages), **options)

    yield "one turn", False, talk(ask, assistant(FIRST)), [[FIRST]]
    yield (
        "many turns",
        False,
        talk(ask, assistant(FIRST), more, assistant(SECOND)),
        [[FIRST], [SECOND]],
    )
    yield (
        "system",
        False,
        talk({"role": "system", "content": "Be brief."}, ask, assistant(FIRST)),
        [[FIRST]],
    )
    yield "thought, on", True, talk(ask, inline), [[THOUGHT, FIRST]]
    yield "thought field, on", True, talk(ask, field), [[THOUGHT, FIRST]]
    yield "thought, off", False, talk(ask, inline), [[THOUGHT, FIRST]]
    yield "plain answer, on", True, talk(ask, assistant(FIRST)), [[FIRST]]
    yield (
        "tool call",
        False,
        talk(
            ask,
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "content": "Sunny.", "name": "lookup", "tool_call_id": CALL["id"]},
            assistant(FIRST),
            tools=(TOOL,),
        ),
        [["lookup", "Oslo", "3"], [FIRST]],
    )
    yield "cut", False, talk(ask, assistant(FIRST), truncated=True), [[FIRST]]
    yield (
        "assistant first",
        False,
        talk(assistant("Ask me."), ask, assistant(FIRST)),
        [[FIRST]],
    )


def of(name: str, table: dict[str, Any]) -> Any:
    """The entry of `table` whose key the template's name contains."""
    return next((value for key, value in table.items() if key in name), None)


def tokenizer_of(name: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes in which every mark of the template is a special token."""
    marks = sorted({*SPECIAL.findall(template), *filter(None, [of(name, STOPS)])})
    marks = [mark for mark in marks if "think" not in mark.lower()]
    thoughts = next(each[1:] for each in THOUGHTS if each[0] in name)
    plain = [mark for mark in thoughts if re.fullmatch(r"\S+", mark) and mark not in marks]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(
        models.BPE(
            vocab={w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", *letters])}, merges=[]
        )
    )
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    base.add_special_tokens(
        [AddedToken(m, special=True, normalized=False) for m in ("<pad>", "<bos>", "<eos>", *marks)]
    )
    base.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in plain])
    eos = of(name, EOS) or "<eos>"
    made = PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token=eos, bos_token="<bos>", pad_token="<pad>"
    )
    made.chat_template = template
    return made


def problem(
    name: str,
    encoder: ChatEncoder,
    conversation: Conversation,
    answers: list[list[str]],
    skips: Counter[str],
) -> str:
    """What is wrong with what is supervised; empty where all of it is right."""
    tokenizer = encoder.tokenizer
    stop = of(name, STOPS)
    supervised, given = [], []
    for sample in encoder.encode(conversation, skips):
        ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
        start = 0
        while True in mask[start:]:
            first = mask.index(True, start)
            end = mask.index(False, first) if False in mask[first:] else len(mask)
            supervised.append(tokenizer.decode(ids[first:end]))
            given.append((ids[:first], ids[first:end]))
            start = end
    if len(supervised) + sum(skips.values()) < len(answers):
        return f"{len(supervised)} answers for {len(answers)}"
    expected = [pieces for pieces in answers if any(pieces[-1] in text for text in supervised)]
    if len(expected) != len(supervised):
        return f"not the answers: {supervised}"
    turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    turns = [i for i in turns if i]
    for text, (prompt, _), pieces in zip(supervised, given, expected, strict=True):
        turn = turns[answers.index(pieces)]
        wanted = encoder.prompt(conversation.messages[:turn], conversation.tools)
        if prompt != wanted:
            return f"the prompt is not what the target is given: {tokenizer.decode(prompt)!r}"
        cut = conversation.truncated and turn == turns[-1]
        tail = tokenizer.decode(wanted)[-60:]
        if found := wrong_text(name, text, pieces, tail, None if cut else stop, encoder._thinking):
            return f"{found}: {text!r} after {tail[-40:]!r}"
    return ""


def wrong_text(
    name: str, text: str, pieces: list[str], prompt: str, stop: str | None, thinking: bool
) -> str:
    """What is wrong with one supervised text."""
    _, start, end = next(each for each in THOUGHTS if each[0] in name)
    if pieces[0] == "lookup":
        stop = of(name, CALL_STOPS) or stop
    if stop is not None:
        if not text.endswith(stop) or text.count(stop) != 1:
            return f"does not end with one {stop}"
        text = text.removesuffix(stop)
    elif pieces[-1] == FIRST and not text.rstrip().endswith(FIRST):
        return "goes on after a cut answer"
    places = [text.find(piece) for piece in pieces]
    if (
        -1 in places
        or places != sorted(places)
        or any(text.count(p) != 1 for p in pieces if len(p) > 3)
    ):
        return "not each piece once and in order"
    opened = prompt.rstrip().endswith(start)
    closed = prompt.rstrip().endswith(end) and not opened
    before_answer = text[: places[-1]]
    if pieces[0] == THOUGHT:
        if closed:
            return "a thought after a closed one"
        if not opened and "<think>" not in text and start not in text:
            return "the thought is not opened"
        marks = (start, end) if start in text or end in text else ("<think>", "</think>")
        if opened and start in text:
            return "opened twice"
        if marks[1] not in text[places[0] : places[1]]:
            return "the thought is not closed"
        if text[: places[0]].count(marks[1]):
            return "an empty thought, then the real one"
    elif opened and stop is None:
        return ""  # the thought itself was cut
    elif opened and end not in before_answer:
        return "an answer inside a thought"
    elif closed and (start in text or end in text):
        return "a second thought"
    rest = text
    for piece in (*pieces, start, end):
        rest = rest.replace(piece, "")
    if pieces[0] != "lookup" and len("".join(rest.split())) > 60:
        return "more than the answer"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reasons", action="store_true", help="print why cells were refused")
    parser.add_argument("--only", default="", help="templates with this in their name")
    parser.add_argument("--show", action="store_true", help="print what is supervised")
    options = parser.parse_args()
    names = [each[0] for each in scenarios()]
    totals: Counter[str] = Counter()
    print("| template | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    notes = []
    for path in sorted(options.folder.glob("*.jinja")):
        if options.only not in path.name:
            continue
        cells = []
        tokenizer = tokenizer_of(path.name, path.read_text(encoding="utf-8"))
        for scenario, thinking, conversation, answers in scenarios():
            skips: Counter[str] = SkipCounts()
            stops = [mark for mark in {of(path.name, STOPS), of(path.name, CALL_STOPS)} if mark]
            ids = [tokenizer.convert_tokens_to_ids(mark) for mark in stops]
            try:
                try:
                    encoder = ChatEncoder(tokenizer, 10**6, thinking, stop_token_ids=ids)
                except TemplateError:  # it names another switch
                    effort = {"reasoning_effort": "high"}
                    encoder = ChatEncoder(tokenizer, 10**6, False, None, ids, effort)
                wrong = problem(path.name, encoder, conversation, answers, skips)
                refused = "; ".join(key for key, n in skips.items() if n and key not in FINE)
            except DeepSpecError as error:
                wrong, refused = "", str(error)
            cell = "WRONG" if wrong else "refused" if refused else "right"
            totals[cell] += 1
            cells.append(cell)
            if wrong or (refused and options.reasons):
                notes.append(f"{path.stem}, {scenario}: {wrong or refused}")
        print(f"| {path.stem} | " + " | ".join(cells) + " |")
    print("\n".join(["", *notes, "", ", ".join(f"{n} {cell}" for cell, n in totals.items())]))
    return 1 if totals["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
