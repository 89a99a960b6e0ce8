"""What a drafter would learn: shown, counted and held against the rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from deepspec.checks.data import check_data, spans_of
from deepspec.cli import main
from deepspec.data.chat_template import ChatEncoder
from deepspec.data.conversations import Conversation
from deepspec.records import Sample
from tests.conftest import UNMARKED, make_model, make_tokenizer

END = [2]  # <|im_end|>


def talk(name: str, *texts: str, **options: object) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    messages = ({"role": r, "content": t} for r, t in zip(roles, texts, strict=False))
    return Conversation(name, tuple(messages), **options)


def encoder_of(max_length: int = 4096) -> ChatEncoder:
    return ChatEncoder(make_tokenizer(UNMARKED), max_length, stop_token_ids=END)


def test_counts_and_spans() -> None:
    talks = [talk("a", "Hi", "Hello."), talk("b", "Hi", "Hel", truncated=True), talk("c", "Hi")]
    found = check_data(talks, encoder_of(), END)
    assert (found.conversations, found.prompts, len(found.lengths)) == (3, 1, 2)
    assert (found.ended, found.open_ended) == (1, 1)
    assert found.supervised == len("Hello.") + 1 + len("Hel")
    assert all(finding.holds for finding in found.findings)
    name, spans = found.shown[0]
    assert name == "a"
    assert [(span.text, span.supervised) for span in spans] == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello.<|im_end|>", True),
    ]


class Wrong(ChatEncoder):
    """Gives samples that break a rule."""

    change: Callable[[Sample], Sample]

    def encode(self, conversation: Conversation, skips: object = None) -> list[Sample]:
        return [self.change(sample) for sample in super().encode(conversation)]


def more(sample: Sample) -> Sample:
    mask = sample.loss_mask.clone()
    mask[int(mask.int().argmax()) - 1] = True
    return Sample(sample.input_ids, mask, sample.sample_id)


def doubled(sample: Sample) -> Sample:
    ids = torch.cat([sample.input_ids, torch.tensor(END)])
    return Sample(ids, torch.cat([sample.loss_mask, torch.tensor([True])]), sample.sample_id)


@pytest.mark.parametrize(
    ("change", "rule"), [(more, "follow the prompt"), (doubled, "after generation stops")]
)
def test_broken_rules_are_found(change: Callable[[Sample], Sample], rule: str) -> None:
    encoder = Wrong(make_tokenizer(UNMARKED), 4096, stop_token_ids=END)
    encoder.change = change  # type: ignore[method-assign]
    found = check_data([talk("a", "Hi", "Hello.")], encoder, END)
    failed = [finding.what for finding in found.findings if not finding.holds]
    assert len(failed) == 1
    assert rule in failed[0]


def test_spans_join_to_the_text() -> None:
    encoder = encoder_of()
    (sample,) = encoder.encode(talk("a", "Hi", "Hello.", "And?", "Bye."))
    spans = list(spans_of(encoder.tokenizer, sample))
    assert [span.supervised for span in spans] == [False, True, False, True]
    assert "".join(span.text for span in spans) == encoder.tokenizer.decode(sample.input_ids)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(UNMARKED)
    model = make_model()
    model.generation_config.eos_token_id = END
    model.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def test_command(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, page = tmp_path / "chats.jsonl", tmp_path / "page.html"
    rows = [
        {"id": "ok", "messages": [*talk("", "Hi", "Hello <b>you</b>\x1b[31m.").messages]},
        {"id": "odd", "messages": [*talk("", "Hi", "a<|im_end|>b").messages]},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["check", f"data={data}", f"target={target}", f"out={page}"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed
    assert "1 x an answer holds a stop token" in " ".join(printed.split())
    text = page.read_text()
    assert "<mark>Hello &lt;b&gt;you&lt;/b&gt;" in text
    data.write_text(json.dumps(rows[0]) + "\n")
    main(words)
    assert "all checks hold" in capsys.readouterr().out


def test_command_without_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", f"data={tmp_path}"])
    assert ended.value.code == 2
    assert "target= is missing" in capsys.readouterr().err


def test_a_reason_names_the_first_conversation_that_has_it() -> None:
    talks = [
        talk("a", "Hi", "Hello."),
        talk("b", "Hi", "Hel<|im_end|>lo."),
        talk("c", "Hi", "<|im_end|>."),
    ]
    found = check_data(talks, encoder_of(), END)
    assert found.skips == {"an answer holds a stop token (first in b)": 2}


@pytest.mark.parametrize(
    ("out", "expected"),
    [("page.txt", "must be named *.html"), ("folder.html", "is a folder")],
)
def test_a_page_that_cannot_be_is_refused_before_the_data_is_read(
    out: str,
    expected: str,
    target_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "a.jsonl").write_text('{"turns": ["Hi"]}')
    with pytest.raises(SystemExit) as end:
        main(
            [
                "check",
                f"data={tmp_path}/a.jsonl",
                f"target={target_folder}",
                f"out={tmp_path}/{out}",
            ]
        )
    printed = capsys.readouterr()
    assert (end.value.code, printed.out) == (2, "")
    assert f"out={tmp_path}/{out} {expected}" in printed.err


def test_the_folder_of_a_page_is_made(target_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"turns": ["Hi"]}')
    page = tmp_path / "new" / "page.html"
    main(["check", f"data={tmp_path}/a.jsonl", f"target={target_folder}", f"out={page}"])
    assert page.is_file()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (UNMARKED, {"tools are not shown by the template (first in a)": 2}),
        ("{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + UNMARKED, {}),
    ],
)
def test_tools_that_the_template_ignores_are_counted(
    template: str, expected: dict[str, int]
) -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    talks = [
        talk("a", "Hi", tools=(tool,)),
        talk("b", "Hi", "Hello.", tools=(tool,)),
        talk("c", "Hi", "Hello."),
    ]
    encoder = ChatEncoder(make_tokenizer(template), 4096, stop_token_ids=END)
    assert check_data(talks, encoder, END).skips == expected
