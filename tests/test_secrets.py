"""Secrets are in no file and no line: canaries in variables, URLs and headers are looked for."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import sys
import threading
import traceback
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deepspec.cli import main
from deepspec.config.schema import DataConfig, FeaturesConfig, RegenerateConfig
from deepspec.data.conversations import Conversation
from deepspec.errors import ConfigError, ServerError
from deepspec.features.remote import RemoteTarget
from deepspec.regeneration import ServerAnswerer, regenerate
from deepspec.secrets import hide, mask_streams, masked, shown_url, token_of
from deepspec.training.checkpoint import DESCRIPTION, list_checkpoints
from tests.conftest import MARKED, make_tokenizer

CANARIES = {
    "PROMPT": "canary-prompt-1",
    "OPTION": "canary-option-2",
    "PROJECT": "canary-project-3",
    "FOLDER": "canary-folder-4",
    "DEEPSPEC_TOKEN": "canary-token-5",
    "HF_TOKEN": "hf_canary6",
    "WANDB_API_KEY": "canary7" * 6,
    "OUR_KEY": "sk-canary-8",
}
PASSWORD = "canary-password-9"
RECIPE = """\
defaults: [base, _self_]
description: "of ${{oc.env:PROJECT}}"
target: {{path: {target}, dtype: float32, num_layer_ids: 3}}
data:
  path: ["{folder}/${{oc.env:FOLDER}}/prompts.jsonl"]
  max_length: 128
  system_prompt: "key ${{oc.env:PROMPT}}"
  template_options: {{key: "${{oc.env:OPTION}}"}}
features: {{servers: ["http://me:{password}@127.0.0.1:9"]}}
regenerate: {{max_new_tokens: 8, batch_size: 4, api_key_env: OUR_KEY}}
drafter: {{num_layers: 1, markov_rank: 8, block_size: 4}}
training: {{max_steps: 2, batch_size: 4, micro_batch_size: 2, anchors_per_sample: 8, save_every: 1,
  evaluate_every: 1, validation_samples: 2, precision: fp32}}
tracking: {{trackers: {trackers}}}
decoding: {{max_new_tokens: 8}}
engine: {{device: cpu}}
evaluation: {{benchmarks: ["{folder}/${{oc.env:FOLDER}}/prompts.jsonl"], limit: 2,
  temperatures: [0.0], baseline_prompts: 1, ngram: false}}
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test hides is printed by others."""
    monkeypatch.setattr("deepspec.secrets._hidden", {})


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["deepspec", f"regenerate.server=http://me:{PASSWORD}@h"])


@pytest.fixture(scope="module")
def reading(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target with a template that reads the option `key`."""
    folder = tmp_path_factory.mktemp("reading") / "target"
    shutil.copytree(target_folder, folder)
    template = "{%- if key is defined and messages[-1].content == key -%}{%- endif -%}" + MARKED
    make_tokenizer(template).save_pretrained(folder)
    return folder


def write_recipe(folder: Path, target: Path, trackers: str = "[]") -> Path:
    prompts = folder / CANARIES["FOLDER"] / "prompts.jsonl"
    prompts.parent.mkdir()
    rows = ({"id": f"p{i}", "turns": [f"Say something about {i}."]} for i in range(10))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "own.yaml"
    path.write_text(
        RECIPE.format(target=target, folder=folder, password=PASSWORD, trackers=trackers)
    )
    return path


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below `folder`, packed ones also unpacked."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield str(file), file.read_bytes()
        with suppress(gzip.BadGzipFile, EOFError):
            yield f"{file} unpacked", gzip.decompress(file.read_bytes())
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                yield from ((f"{file}/{name}", archive.read(name)) for name in archive.namelist())


def leaks(text: str | bytes) -> list[str]:
    raw = text.encode() if isinstance(text, str) else text
    header = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    return [each for each in (*CANARIES.values(), PASSWORD, header) if each.encode() in raw]


def assert_kept(folder: Path, printed: str) -> None:
    assert leaks(printed) == [], printed
    assert [(name, found) for name, raw in contents(folder) if (found := leaks(raw))] == []


def command(name: str, *words: object) -> int:
    try:
        main([name, *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.usefixtures("environment")
def test_a_training_keeps_secrets_and_goes_on(
    reading: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Config, checkpoints, answers and reports have names; a run that goes on with another secret
    says that it did not compare it; one without the variable names it where it is needed."""
    recipe, out = write_recipe(tmp_path, reading), tmp_path / "out"
    assert command("train", f"recipe={recipe}", f"out={out}") == 0, capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTION", "another-value")
        assert command("train", f"recipe={recipe}", f"out={out}") == 0, capfd.readouterr()
    printed = "".join(capfd.readouterr())
    assert "not compared with the checkpoint" in printed
    assert "data.template_options={'key': '${oc.env:OPTION}'}" in printed
    assert_kept(out, printed)
    for name in ("config.yaml", "answers.json", "report.html", "report.json", "report.md"):
        assert "key ${oc.env:PROMPT}" in (out / name).read_text().replace("&#39;", "'"), name
    last = list_checkpoints(out / "checkpoints")[-1]
    config = json.loads((last / DESCRIPTION).read_text())["config"]
    assert config["description"] == "of ${oc.env:PROJECT}"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PROMPT")
        assert command("export", f"checkpoint={last}", f"out={tmp_path / 'out' / 'again'}") == 0
        assert command("evaluate", f"run={out}", f"out={out / 'third'}") == 2
    printed = "".join(capfd.readouterr())
    assert "data.system_prompt comes from the environment variable PROMPT, which is" in printed
    assert_kept(out, printed)


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_no_command_shows_a_secret(
    reading: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, reading, "[wandb, tensorboard]"), tmp_path / "out"
    given = f"recipe={recipe}"
    echo = "regenerate.server={}"
    with echoing() as url:
        for code, words in (
            (0, ("train", given, f"out={out / 'run'}")),
            (0, ("train", given, f"out={out / 'run'}")),
            (0, ("evaluate", f"run={out / 'run'}", f"out={out / 'evaluated'}")),
            (2, ("calibrate", f"run={out / 'run'}", f"out={out / 'calibrated'}")),
            (
                0,
                (
                    "export",
                    f"checkpoint={out / 'run/checkpoints/step-00000002'}",
                    f"out={out / 'export'}",
                ),
            ),
            (0, ("check", f"export={out / 'export'}")),
            (0, ("regenerate", given, f"out={out / 'a.jsonl'}")),
            (2, ("regenerate", given, f"out={out / 'b.jsonl'}", echo.format(url))),
            (0, ("extract", given, f"out={out / 'store'}")),
            (2, ("train", given, f"out={out / 'no'}", "features=remote", "--traceback")),
            (0, ("train", given, "--cfg")),
            (0, ("plan", given)),
            (2, ("reproduce", given, f"out={out / 'r'}", echo.format(url), "reproduce=short")),
        ):
            if "--traceback" in words:
                words = (*words, "features.patience=1", "regenerate.enabled=false")
                with pytest.raises(ServerError) as error:
                    main([*words])
                traceback.print_exception(error.value)
                continue
            found = command(*words)
            assert found == code, (words, capfd.readouterr())
    assert list(out.rglob("*.wandb")), "wandb has written nothing"
    assert list(out.rglob("events.out.*")), "tensorboard has written nothing"
    assert_kept(out, "".join(capfd.readouterr()))


# --------------------------------------------------------------------------------- servers


@contextmanager
def echoing(status: int = 401) -> Iterator[str]:
    """A server that answers every request with its own headers."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = f"you sent {self.headers} to {self.path}".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://me:{PASSWORD}@127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("status", [200, 401, 418])
def test_servers_that_repeat_what_they_got(status: int, tmp_path: Path) -> None:
    key = token_of("OUR_KEY")
    turn = [{"role": "user", "content": "hello"}]
    asked = RegenerateConfig(retries=0)
    with echoing(status) as url:
        for model, given in ((None, None), (None, key), ("m", key)):
            server = ServerAnswerer(url, model, DataConfig(path=["-"]), given)
            with pytest.raises(ServerError) as error:
                regenerate([Conversation("a", turn)], server, asked, tmp_path / "a.jsonl")
            assert "me:***@" in str(error.value) or "you sent" in str(error.value)
            assert_kept(tmp_path, "".join(traceback.format_exception(error.value)))
        with pytest.raises(ServerError) as error:
            RemoteTarget(FeaturesConfig(servers=[url], patience=0.1))
        assert leaks("".join(traceback.format_exception(error.value))) == []


# ---------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("value", ["", "  ", "pässwört", "tok\nen", "tok\x7fen", "тoken", "a\tb"])
def test_a_token_that_cannot_be_sent_is_refused_at_start(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSPEC_TOKEN", value)
    with pytest.raises(ConfigError, match="the environment variable DEEPSPEC_TOKEN") as error:
        token_of("DEEPSPEC_TOKEN")
    assert not value.strip() or value not in str(error.value)
    with pytest.raises(ConfigError, match="DEEPSPEC_TOKEN"):
        RemoteTarget(FeaturesConfig(servers=["http://127.0.0.1:9"], patience=0))


def test_commands_refuse_a_bad_token_before_all_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEEPSPEC_TOKEN", "pässwört")
    words = ["features=remote", "features.servers=[http://127.0.0.1:9]", "regenerate.enabled=false"]
    assert command("train", "recipe=tiny", *words, f"out={tmp_path / 'run'}") == 2
    assert command("serve-target", "recipe=tiny") == 2
    assert capsys.readouterr().err.count("the environment variable DEEPSPEC_TOKEN holds") == 2
    monkeypatch.setenv("DEEPSPEC_TOKEN", " fine \n")
    assert token_of("DEEPSPEC_TOKEN") == "fine"


# ----------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://h:1/v1", "http://h:1/v1"),
        ("http://h/a@v1", "http://h/a@v1"),
        ("http://me:pw@h:1/v1", "http://me:***@h:1/v1"),
        ("http://me:p@w:x@h", "http://me:***@h"),
        ("http://me:p/w@h/v1", "http://me:***@h/v1"),
        ("http://token@h", "http://***@h"),
        ("http://token:@h", "http://***@h"),
        ("http://me:${oc.env:PW}@h", "http://me:${oc.env:PW}@h"),
        ("http://${oc.env:U,a/b}:x@h", "http://${oc.env:U,a/b}:***@h"),
        ("http://h/v1?key=a&b=${oc.env:B}&c", "http://h/v1?key=***&b=${oc.env:B}&***"),
        ("h:8000", "h:8000"),
        ("", ""),
    ],
)
def test_urls_are_shown_without_secrets(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_what_is_printed_is_masked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_xyz")
    hide('it\'s \u00e9 "canary"\n/x', "${oc.env:A}")
    mask_streams()
    mask_streams()
    print("a hf_xyz b", 'it\'s \u00e9 "canary"\n/x')
    print(
        repr('it\'s \u00e9 "canary"\n/x'), json.dumps('it\'s \u00e9 "canary"\n/x'), file=sys.stderr
    )
    found = capsys.readouterr()
    assert found.out == "a [HF_TOKEN] b ${oc.env:A}\n"
    assert "canary" not in found.err
    assert masked("http://me:pw@h and pip@h, http://h/a@b") == (
        "http://me:***@h and pip@h, http://h/a@b"
    )
