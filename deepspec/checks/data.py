"""The tokens of data that a drafter would learn, and whether they are what the target emits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import quantiles
from typing import Any

from deepspec.checks.finding import Finding
from deepspec.data.chat_template import ChatEncoder
from deepspec.data.conversations import Conversation, SkipCounts, counter_of
from deepspec.errors import TemplateRefusal
from deepspec.records import Sample

COMPARED = 200  # conversations whose prompts are rendered again


@dataclass(frozen=True)
class Span:
    """A run of a sample's text that is `supervised` as a whole or not at all."""

    text: str
    supervised: bool


@dataclass
class DataCheck:
    """Counts of `conversations` read and of their samples, and the first of them in `shown`.

    `lengths` in tokens, one per sample; `supervised` of all `tokens` are trained on. `ended`
    answers end with a stop token, `open_ended` ones do not. `apart`: answers that do not follow the
    rendered prompt; `inside`: answers with a stop token before their end.
    """

    conversations: int = 0
    prompts: int = 0
    tokens: int = 0
    supervised: int = 0
    cut: int = 0
    ended: int = 0
    open_ended: int = 0
    apart: int = 0
    inside: int = 0
    lengths: list[int] = field(default_factory=list)
    skips: SkipCounts = field(default_factory=SkipCounts)
    shown: list[tuple[str, list[Span]]] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """Whether each rule of the loss mask holds."""
        left_out = ", ".join(f"{n} x {reason}" for reason, n in self.skips.most_common() if n)
        answers = self.ended + self.open_ended
        return [
            Finding(
                "answers follow the prompt that the target is given",
                not self.apart,
                None,
                f"{self.apart} of the answers of the first {COMPARED} conversations do not"
                if self.apart
                else f"compared for the first {min(COMPARED, self.conversations)} conversations",
            ),
            Finding(
                "nothing is supervised after generation stops",
                not self.inside,
                None,
                f"{self.inside} of {answers} answers go on after a stop token"
                if self.inside
                else f"{self.ended} of {answers} answers end with a stop token, "
                f"{self.open_ended} were cut by a length limit or data.max_length",
            ),
            Finding("nothing is left out", not left_out, None, left_out or "all rows are used"),
        ]

    @property
    def facts(self) -> dict[str, str]:
        """Counts and lengths, to be printed."""
        only = self.prompts == self.conversations
        found = {
            "conversations": f"{self.conversations}",
            "prompts without an answer": f"{self.prompts}",
            "samples": f"{len(self.lengths)}"
            + (" (the target answers the prompts: regenerate.enabled=true)" if only else ""),
            "tokens": f"{self.tokens}",
        }
        if self.tokens:
            share = self.supervised / self.tokens
            found["supervised"] = f"{self.supervised} ({share:.1%})"
        if len(self.lengths) > 1:
            steps = quantiles(self.lengths, n=10, method="inclusive")
            found["length of a sample"] = (
                f"{min(self.lengths)} to {max(self.lengths)} tokens, median {steps[4]:.0f}, "
                f"90 % up to {steps[8]:.0f}"
            )
        found["cut at the length limit"] = f"{self.cut}"
        return found


def check_data(
    conversations: Iterable[Conversation],
    encoder: ChatEncoder,
    stop_token_ids: Sequence[int],
    show: int = 3,
) -> DataCheck:
    """Encode `conversations` as training does and hold the result against the rules.

    Prompts without answers are counted; where there is nothing else, they are shown.
    """
    check, stops = DataCheck(), set(stop_token_ids)
    skip = counter_of(check.skips)
    for conversation in conversations:
        check.conversations += 1
        if check.conversations <= COMPARED and _hides_tools(conversation, encoder):
            skip("tools are not shown by the template", conversation.id)
        if not any(message["role"] == "assistant" for message in conversation.messages):
            check.prompts += 1
            shown = len(check.shown) < show
            if refused := _render_prompt(check, conversation, encoder, shown):
                skip(refused, conversation.id)
            continue
        left_out = SkipCounts()
        samples = encoder.encode(conversation, left_out)
        for reason in left_out.elements():
            skip(reason, conversation.id)
        prompts = _prompts(conversation, encoder) if check.conversations <= COMPARED else None
        for sample in samples:
            _count(check, sample, stops, prompts)
            check.cut += len(sample) == encoder.max_length
            if len(check.shown) < show:
                spans = list(spans_of(encoder.tokenizer, sample))
                check.shown.append((sample.sample_id, spans))
    return check


def spans_of(tokenizer: Any, sample: Sample) -> Iterator[Span]:
    """The text of `sample` in stretches that are supervised as a whole or not at all."""
    pairs = zip(sample.loss_mask.tolist(), sample.input_ids.tolist(), strict=True)
    for supervised, group in groupby(pairs, key=lambda pair: pair[0]):
        ids = [token for _, token in group]
        yield Span(tokenizer.decode(ids, clean_up_tokenization_spaces=False), bool(supervised))


def _render_prompt(
    check: DataCheck, conversation: Conversation, encoder: ChatEncoder, show: bool
) -> str:
    """Return why the prompt cannot be answered, or an empty text; append it to `check.shown`."""
    try:
        ids = encoder.prompt(conversation.messages, conversation.tools)
    except TemplateRefusal as refusal:
        return refusal.reason
    if len(ids) >= encoder.max_length:
        return "a prompt of data.max_length or more"
    if show:
        text = encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        check.shown.append((conversation.id, [Span(text, False)]))
    return ""


def _hides_tools(conversation: Conversation, encoder: ChatEncoder) -> bool:
    """Whether the conversation has tools, and the prompt is the same without them."""
    if not conversation.tools:
        return False
    roles = [message["role"] for message in conversation.messages]
    asked = conversation.messages[: roles.index("user") + 1]
    try:
        return encoder.prompt(asked, conversation.tools) == encoder.prompt(asked)
    except TemplateRefusal:  # counted where the conversation is encoded
        return False


def _prompts(conversation: Conversation, encoder: ChatEncoder) -> set[tuple[int, ...]]:
    """The prompt before each assistant turn, in token ids."""
    found = set()
    for index, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and index:
            try:
                before = encoder.prompt(conversation.messages[:index], conversation.tools)
            except TemplateRefusal:
                continue
            found.add(tuple(before))
    return found


def _count(
    check: DataCheck, sample: Sample, stops: set[int], prompts: set[tuple[int, ...]] | None
) -> None:
    ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
    check.lengths.append(len(ids))
    check.tokens += len(ids)
    check.supervised += sum(mask)
    place = 0
    for supervised, group in groupby(mask):
        end = place + len(list(group))
        if supervised:
            if prompts is not None and tuple(ids[:place]) not in prompts:
                check.apart += 1
            answer = ids[place:end]
            check.inside += bool(stops & set(answer[:-1]))
            ended = answer[-1] in stops
            check.ended += ended
            check.open_ended += not ended
        place = end
