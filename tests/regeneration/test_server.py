"""Answers through a server: `transformers serve` for the real thing, and a scripted HTTP server on
loopback for everything that goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepspec.config.schema import DataConfig, RegenerateConfig
from deepspec.errors import ConfigError, ServerError
from deepspec.regeneration import (
    RegenerationCounts,
    ServerAnswerer,
    TargetAnswerer,
    api_key_of,
    regenerate,
)
from deepspec.targets import Target
from tests.regeneration.conftest import TOOLS, agentic, chats, questions, talk

DATA = DataConfig(path=["-"], max_length=400)
PAUSE = 0.02
Reply = tuple[int, Any]
CUT: Reply = (0, None)  # the connection is closed instead of an answer


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def completion(text: Any, reason: str = "stop") -> Reply:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return 200, {"choices": [choice], "usage": {"completion_tokens": len(text)}}


class Scripted:
    """A server whose answers are `reply(request, times this prompt was asked)`."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply], port: int = 0) -> None:
        self.models = ["tiny"]
        self.headers: list[str | None] = []
        self.refuse: Callable[[str], Reply | None] = lambda path: None
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.running = self.most_running = 0
        lock, asked = threading.Lock(), Counter[str]()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet a reply: many small ones wait for each other

            def do_GET(self) -> None:
                if not self.refused():
                    self.send(200, {"data": [{"id": name} for name in scripted.models]})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.refused():
                    return
                with lock:
                    scripted.requests.append(request)
                    scripted.times.append(time.monotonic())
                    scripted.running += 1
                    scripted.most_running = max(scripted.running, scripted.most_running)
                    prompt = json.dumps(request["messages"])
                    asked[prompt] += 1
                status, body = reply(request, asked[prompt])
                with lock:
                    scripted.running -= 1
                self.send(status, body)

            def refused(self) -> bool:
                scripted.headers.append(self.headers["Authorization"])
                if (answer := scripted.refuse(self.path)) is not None:
                    self.send(*answer)
                return answer is not None

            def send(self, status: int, body: Any) -> None:
                self.close_connection = (status, body) == CUT
                if self.close_connection:
                    return
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.handle_error = lambda *args: None  # type: ignore[method-assign]  # clients leave
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def echo(request: dict[str, Any], asked: int) -> Reply:
    return completion(f"answer to {request['messages'][-1]['content']}")


def run(
    url: str,
    out: Path,
    conversations: list,
    data: DataConfig = DATA,
    key: str | None = None,
    **options: Any,
) -> tuple[RegenerationCounts, dict[str, Any], dict[str, Any]]:
    """Counts, rows by id, failures by id."""
    config = RegenerateConfig(**{"timeout": 5.0, "retries": 2, "concurrency": 4, **options})
    answerer = ServerAnswerer(url, config.server_model, data, key, first_pause=PAUSE)
    counts = regenerate(conversations, answerer, config, out, show=False)
    return counts, rows_of(out), rows_of(out.with_suffix(".failed.jsonl"))


def rows_of(path: Path) -> dict[str, Any]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def test_what_is_asked(tmp_path: Path) -> None:
    """Every sampling key reaches the server; history holds the server's own answers."""
    conversation = talk("a", "one", "dropped", "two", "dropped")
    data = DataConfig(path=["-"], system_prompt="Be brief.", thinking=True)
    data.template_options["reasoning_effort"] = "low"
    with Scripted(echo) as server:
        options = {"temperature": 0.3, "top_p": 0.9, "top_k": 5, "max_new_tokens": 7}
        counts, rows, _ = run(
            server.url + "/", tmp_path / "a.jsonl", [conversation], data, **options
        )
        first, second = server.requests
        assert first["seed"] != second["seed"]
        assert all(0 <= request["seed"] < 2**31 for request in server.requests)
        options = second.pop("chat_template_kwargs")
        assert options.items() >= {"enable_thinking": True, "reasoning_effort": "low"}.items()
        assert {key: value for key, value in second.items() if key != "seed"} == {
            "model": "tiny",
            "temperature": 0.3,
            "top_p": 0.9,
            "top_k": 5,
            "max_tokens": 7,
            "return_token_ids": True,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "answer to one"},
                {"role": "user", "content": "two"},
            ],
        }
        run(server.url, tmp_path / "b.jsonl", [conversation], top_k=0)
        assert "top_k" not in server.requests[-1]
    expected = [
        "one",
        "answer to one",
        "two",
        "answer to two",
    ]  # the encoder adds the system prompt
    assert [message["content"] for message in rows["a"]["messages"]] == expected
    assert counts.tokens == len("answer to one" + "answer to two")


def test_passing_failures_are_tried_again_with_growing_pauses(tmp_path: Path) -> None:
    """500, 429, a cut connection and a hang, then an answer; each pause at least doubles."""

    def reply(request: dict[str, Any], asked: int) -> Reply:
        if asked == 4:
            time.sleep(0.6)
        return {1: (500, {}), 2: (429, {}), 3: CUT}.get(asked) or echo(request, asked)

    with Scripted(reply) as server:
        counts, rows, failed = run(
            server.url, tmp_path / "a.jsonl", [talk("a", "x")], retries=4, timeout=0.3
        )
        pauses = [after - before for before, after in itertools.pairwise(server.times)]
    assert len(pauses) == 4
    assert all(pause >= PAUSE * 2**index for index, pause in enumerate(pauses))
    assert (counts.file.rows, counts.failed, failed) == (1, {}, {})
    assert rows["a"]["finish_reason"] == "stop"


def test_lasting_failures_are_written_and_tried_again_at_the_next_start(tmp_path: Path) -> None:
    broken = {
        "500": ((500, {"error": "boom"}), "HTTP 500", 3),
        "hang": (None, "timeout", 3),
        "422": ((422, {"detail": "Unexpected fields: {'top_k'}"}), "HTTP 422", 1),
        "html": ((200, b"<html>"), "not a chat completion", 1),
        "parts": (completion(["x"]), "not a chat completion", 1),
        "thinks": (
            (
                200,
                {
                    "choices": [
                        {
                            "message": {"content": "4", "reasoning_content": "2 + 2"},
                            "finish_reason": "stop",
                        }
                    ]
                },
            ),
            "answer is not whole",
            1,
        ),
        "tool": (completion("x", "tool_calls"), "finish reason tool_calls", 1),
        "silent": (completion(" "), "empty answer", 1),
        "half": (completion("half an emoji \ud83d"), "half a surrogate pair", 1),
    }
    healthy = False

    def reply(request: dict[str, Any], asked: int) -> Reply:
        name = request["messages"][-1]["content"]
        if healthy or name not in broken:
            return echo(request, asked)
        scripted = broken[name][0]
        if scripted is None:
            time.sleep(0.8)
        return scripted or echo(request, asked)

    conversations = [*questions(6), *(talk(name, name) for name in broken)]
    out = tmp_path / "a.jsonl"
    with Scripted(reply) as server:
        counts, rows, failed = run(server.url, out, conversations, timeout=0.5)
        assert counts.failed == Counter(reason for _, reason, _ in broken.values())
        assert {name: row["reason"] for name, row in failed.items()} == {
            name: reason for name, (_, reason, _) in broken.items()
        }
        asked = Counter(request["messages"][-1]["content"] for request in server.requests)
        assert {name: asked[name] for name in broken} == {n: t for n, (_, _, t) in broken.items()}
        assert "regenerate.top_k=0" in failed["422"]["detail"]
        assert "boom" in failed["500"]["detail"]
        assert set(rows) == {c.id for c in questions(6)}

        healthy, already = True, len(server.requests)
        counts, rows, failed = run(server.url, out, conversations)
        assert (counts.resumed, counts.file.rows, counts.failed, failed) == (
            6,
            6 + len(broken),
            {},
            {},
        )
        assert len(server.requests) - already == len(broken)


def test_a_later_turn_that_does_not_fit_keeps_the_earlier_ones(tmp_path: Path) -> None:
    def reply(request: dict[str, Any], asked: int) -> Reply:
        if len(request["messages"]) > 2:
            return 400, {"error": "maximum context length is 8 tokens"}
        text = request["messages"][0]["content"]
        return completion("cut \ufffd", "length") if text == "cut" else echo(request, asked)

    conversations = [talk("a", "one", "-", "two", "-", "three"), talk("cut", "cut", "-", "more")]
    with Scripted(reply) as server:
        counts, rows, _ = run(server.url, tmp_path / "a.jsonl", conversations)
        assert len(server.requests) == 3
    assert [m["content"] for m in rows["a"]["messages"]] == ["one", "answer to one"]
    assert rows["a"]["finish_reason"] == "stop"
    assert [m["content"] for m in rows["cut"]["messages"]] == ["cut", "cut "]
    assert rows["cut"]["finish_reason"] == "length"
    assert counts.file.truncated == 1


def with_ids(message: dict[str, Any], reason: str, ids: list[int]) -> Reply:
    """As vLLM answers `return_token_ids`."""
    choice = {"message": message, "finish_reason": reason, "token_ids": ids}
    return 200, {"choices": [choice], "prompt_token_ids": [1, 2, 3]}


def test_token_ids_are_kept_where_the_server_returns_them(tmp_path: Path) -> None:
    """With them an answer is whole, even where the server parsed the text to pieces."""
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    replies = {
        "plain": with_ids({"content": "4"}, "stop", [23, 2]),
        "cut": with_ids({"content": "half \ufffd"}, "length", [75, 76, 161]),
        "thinks": with_ids({"content": "4", "reasoning": "2 + 2"}, "stop", [9, 23, 2]),
        "calls": with_ids({"content": None, "tool_calls": [call]}, "tool_calls", [8, 2]),
        "text": completion("4"),
        "silent": with_ids({"content": ""}, "stop", [2]),
    }

    def reply(request: dict[str, Any], asked: int) -> Reply:
        assert request["return_token_ids"] is True
        return replies[request["messages"][0]["content"]]

    with Scripted(reply) as server:
        talks = [talk(name, name) for name in replies]
        counts, rows, _ = run(server.url, tmp_path / "a.jsonl", talks)
    answers = {name: row["messages"][-1] for name, row in rows.items()}
    nested = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    own = {"role": "assistant"}
    assert answers == {
        "plain": {**own, "content": "4", "token_ids": [23, 2]},
        "cut": {**own, "content": "half ", "token_ids": [75, 76, 161]},
        "thinks": {**own, "content": "4", "reasoning_content": "2 + 2", "token_ids": [9, 23, 2]},
        "calls": {**own, "content": "", "tool_calls": [nested], "token_ids": [8, 2]},
        "text": {**own, "content": "4"},
    }
    assert {name for name, row in rows.items() if row["finish_reason"] == "length"} == {"cut"}
    assert counts.failed == {"empty answer": 1}
    assert counts.file.as_text == 1
    assert "1 rows as text: the server returns no token ids" in str(counts)


@pytest.mark.parametrize(
    "refusal", [(400, {"error": "bad request"}), (422, {"detail": "extra: return_token_ids"})]
)
def test_a_server_that_refuses_the_ids_is_asked_for_text(tmp_path: Path, refusal: Reply) -> None:
    """Once, whether or not it says which field it does not know."""

    def reply(request: dict[str, Any], asked: int) -> Reply:
        return refusal if "return_token_ids" in request else echo(request, asked)

    with Scripted(reply) as server:
        counts, _, failed = run(server.url, tmp_path / "a.jsonl", questions(12), concurrency=1)
        assert len(server.requests) == 13
    assert (counts.file.rows, counts.file.as_text, failed) == (12, 12, {})


def test_an_answer_may_end_at_the_servers_context(tmp_path: Path) -> None:
    """vLLM refuses a max_tokens that does not fit behind the prompt; without, the context is it."""

    def reply(request: dict[str, Any], asked: int) -> Reply:
        if "max_tokens" in request:
            return 400, {"error": "'max_tokens' is too large: 7. This model's maximum context ..."}
        return with_ids({"content": "to the end"}, "length", [1, 2, 3])

    with Scripted(reply) as server:
        counts, rows, failed = run(
            server.url, tmp_path / "a.jsonl", [talk("a", "x")], max_new_tokens=7
        )
        assert len(server.requests) == 2
    assert rows["a"]["finish_reason"] == "length"
    assert (counts.file.truncated, counts.file.as_text, failed) == (1, 0, {})


def test_tools_and_calls_are_sent_as_openai_has_them(tmp_path: Path) -> None:
    """The arguments as text; no key of ours; calls are to stay in the text."""
    with Scripted(echo) as server:
        _, rows, _ = run(server.url, tmp_path / "a.jsonl", [agentic("1")])
        first, second = server.requests
    sent = {"id": "call_0", "type": "function"}
    sent["function"] = {"name": "add", "arguments": '{"a": 1}'}  # type: ignore[assignment]
    assert first["tools"] == list(TOOLS)
    assert first["tool_choice"] == "none"
    assert first["messages"][:3] == [
        {"role": "assistant", "content": "Ask me."},
        {"role": "user", "content": "Add 1"},
        {"role": "assistant", "content": "", "tool_calls": [sent]},
    ]
    assert [m["role"] for m in second["messages"][3:]] == (
        "tool assistant tool tool assistant user".split()
    )
    assert second["messages"][7]["content"] == "answer to 4"
    assert rows["1"]["tools"] == list(TOOLS)


def test_requests_run_side_by_side(tmp_path: Path) -> None:
    def reply(request: dict[str, Any], asked: int) -> Reply:
        time.sleep(0.05)
        return echo(request, asked)

    with Scripted(reply) as server:
        counts, _, _ = run(server.url, tmp_path / "a.jsonl", questions(30), concurrency=6)
        assert server.most_running == 6
    assert counts.file.rows == 30


def test_a_server_that_dies_is_noticed_and_the_run_resumed(tmp_path: Path) -> None:
    """After 20 answers nothing but 503: the run stops long before all 200 prompts have failed."""
    conversations, out = questions(200), tmp_path / "a.jsonl"
    alive = True

    def reply(request: dict[str, Any], asked: int) -> Reply:
        return echo(request, asked) if alive and len(server.requests) <= 20 else (503, {})

    with Scripted(reply) as server:
        with pytest.raises(ServerError, match="failed 10 samples in a row; the last with HTTP 503"):
            run(server.url, out, conversations)
        assert len(rows_of(out)) == 20
        assert 10 <= len(rows_of(out.with_suffix(".failed.jsonl"))) < 20
    with Scripted(echo) as again:
        counts, rows, failed = run(again.url, out, conversations)
        assert len(again.requests) == 180
    assert (counts.resumed, counts.file.rows, failed) == (20, 200, {})
    assert set(rows) == {conversation.id for conversation in conversations}


def test_nothing_answered_is_an_error(tmp_path: Path) -> None:
    refuse: Callable[..., Reply] = lambda request, asked: (401, {"error": "no key"})  # noqa: E731
    with Scripted(refuse) as server, pytest.raises(ServerError, match=r"HTTP 401 .*no key"):
        run(server.url, tmp_path / "a.jsonl", questions(3))


def test_an_unreachable_server_is_named_at_once(tmp_path: Path) -> None:
    begun = time.monotonic()
    for url in (f"http://127.0.0.1:{free_port()}/v1", "localhost:1/v1", "http://[/v1"):
        with pytest.raises(ServerError, match=r"regenerate\.server=.* cannot be reached"):
            run(url, tmp_path / "a.jsonl", questions(3), retries=9)
    assert time.monotonic() - begun < 5
    assert not (tmp_path / "a.jsonl").exists()


def test_the_model_must_be_clear(tmp_path: Path) -> None:
    with Scripted(echo) as server:
        for models in ([], ["one", "two"]):
            server.models = models
            with pytest.raises(ServerError, match=r"regenerate\.server_model"):
                run(server.url, tmp_path / "a.jsonl", questions(1))
        run(server.url, tmp_path / "a.jsonl", questions(1), server_model="two")
        assert server.requests[-1]["model"] == "two"


@pytest.fixture(scope="module")
def serving(writer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with the `writer` checkpoint, on a free port."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(writer_folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow  # half a minute until it serves
def test_transformers_serve_gives_the_answers_of_the_process(
    serving: str, writer_folder: Path, writer: Target, tmp_path: Path
) -> None:
    """Greedy, several turns: the same text from another decoder behind the wire."""
    conversations = [*questions(10), *chats(6)]
    options: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "max_new_tokens": 24}
    counts, rows, failed = run(
        serving,
        tmp_path / "server.jsonl",
        conversations,
        server_model=str(writer_folder),
        timeout=60.0,
        **options,
    )
    local = tmp_path / "local.jsonl"
    own = regenerate(
        conversations, TargetAnswerer(writer, DATA), RegenerateConfig(**options), local, show=False
    )
    expected = rows_of(local)
    for message in itertools.chain(*(row["messages"] for row in expected.values())):
        message.pop("token_ids", None)  # which this server does not return
    assert rows == expected
    assert counts.file.as_text == len(rows)
    assert set(failed) == set(rows_of(local.with_suffix(".failed.jsonl")))
    assert (counts.file.truncated, counts.tokens) == (own.file.truncated, own.tokens)
    assert any(len(row["messages"]) == 6 for row in rows.values())


# ----------------------------------------------------------------------- keys and wrong addresses

KEY = "sk-very-secret"


def wants_key(server: Scripted) -> Callable[[str], Reply | None]:
    """Refuses what comes without `KEY`, in words that repeat what came, as some servers do."""

    def refuse(path: str) -> Reply | None:
        said = server.headers[-1]
        return None if said == f"Bearer {KEY}" else (401, {"error": f"Incorrect key: {said}"})

    return refuse


def test_the_key_is_sent_and_kept_nowhere(tmp_path: Path) -> None:
    with Scripted(echo) as server:
        server.refuse = wants_key(server)
        counts, rows, _ = run(server.url, tmp_path / "a.jsonl", questions(3), key=KEY)
        assert server.headers == [f"Bearer {KEY}"] * 4
    assert counts.failed == {}
    assert len(rows) == 3
    assert not any(KEY in file.read_text() for file in tmp_path.iterdir())


@pytest.mark.parametrize("model", [None, "tiny"])
@pytest.mark.parametrize("key", [None, "sk-of-another"])
def test_a_refused_key(model: str | None, key: str | None, tmp_path: Path) -> None:
    with Scripted(echo) as server:
        server.refuse = wants_key(server)
        with pytest.raises(ServerError) as error:
            run(server.url, tmp_path / "a.jsonl", questions(30), key=key, server_model=model)
        assert len(server.headers) < 10  # the first answer is enough
    message = str(error.value)
    assert f"regenerate.server={server.url} answers HTTP 401" in message
    assert "regenerate.api_key_env" in message
    assert ("check the key" if key else "set regenerate.api_key_env") in message
    assert "sk-of-another" not in message
    assert not any("sk-of-another" in file.read_text() for file in tmp_path.iterdir())


def test_a_key_without_rights(tmp_path: Path) -> None:
    """403 is of a model, or of one prompt: the others are asked all the same."""
    with Scripted(echo) as server:
        server.refuse = lambda path: (403, f"no rights for {KEY}".encode())
        with pytest.raises(ServerError, match=r"HTTP 403 to /v1/models .*check the key"):
            run(server.url, tmp_path / "a.jsonl", questions(2), key=KEY)
        with pytest.raises(ServerError, match=r"HTTP 403.*check the key") as error:
            run(server.url, tmp_path / "a.jsonl", questions(2), key=KEY, server_model="tiny")
    assert KEY not in str(error.value)
    assert KEY not in (tmp_path / "a.failed.jsonl").read_text()

    def forbid(request: dict[str, Any], asked: int) -> Reply:
        return (403, b"moderated") if "What is 1 " in str(request) else echo(request, asked)

    (tmp_path / "a.failed.jsonl").unlink()
    with Scripted(forbid) as server:
        counts, rows, _ = run(server.url, tmp_path / "b.jsonl", questions(4))
    assert (counts.failed, len(rows)) == ({"HTTP 403": 1}, 3)


@pytest.mark.parametrize("model", [None, "tiny"])
def test_a_url_without_v1(model: str | None, tmp_path: Path) -> None:
    with Scripted(echo) as server:
        server.refuse = lambda path: None if path.startswith("/v1/") else (404, b"Not Found")
        url = server.url.removesuffix("/v1")
        with pytest.raises(ServerError) as error:
            run(url, tmp_path / "a.jsonl", questions(30), server_model=model)
        assert f"HTTP 404 to /{'chat/completions' if model else 'models'}" in str(error.value)
        assert f"did you mean regenerate.server={url}/v1?" in str(error.value)
        server.refuse = lambda path: None if path == "/v1/models" else (404, b"no such model")
        with pytest.raises(ServerError, match=r"no such model.*check regenerate.server_model"):
            run(server.url, tmp_path / "b.jsonl", questions(3), server_model="tyni")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("OUR_KEY", KEY, KEY),
        ("OUR_KEY", f" {KEY}\n", KEY),
        ("OUR_KEY", None, "regenerate.api_key_env=OUR_KEY: this environment variable is not set"),
        ("OUR_KEY", "  ", "is not set"),
        ("OUR_KEY", f"{KEY}\nX-Other: 1", "holds characters that no HTTP header can carry"),
    ],
)
def test_the_key_is_in_the_environment(
    name: str, value: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    config = RegenerateConfig(api_key_env=name)
    if expected == KEY:
        assert api_key_of(config) == KEY
        return
    with pytest.raises(ConfigError) as error:
        api_key_of(config)
    assert expected in str(error.value)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("reply", [echo, lambda *_: (400, b"too long " * 30)])
def test_a_full_disk_while_answering(
    reply: Callable[[dict[str, Any], int], Reply], tmp_path: Path
) -> None:
    """One error, as from any other writer, and not a group of them: of answers and of failures."""
    conversations, out = questions(40), tmp_path / "a.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Scripted(reply) as server:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                run(server.url, out, conversations)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if reply is not echo:
            return
        counts, rows, _ = run(server.url, out, conversations)  # with room again, it goes on
    assert 0 < counts.resumed < 40
    assert len(rows) == 40


@pytest.mark.parametrize(
    ("body", "reason"),
    [(b"[" * 100_000 + b"]" * 100_000, "not a chat completion"), (b" " * 2**21, "unusable answer")],
    ids=["deep", "large"],
)
def test_answers_are_read_within_limits(
    body: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspec.regeneration.server.LARGEST_ANSWER", 2**20)

    def reply(request: dict[str, Any], asked: int) -> Reply:
        fine = request["messages"][-1]["content"] == "fine"
        return echo(request, asked) if fine else (200, body)

    conversations = [talk("good", "fine"), talk("bad", "x")]
    with Scripted(reply) as server:
        _, rows, failed = run(server.url, tmp_path / "a.jsonl", conversations, retries=0)
    assert set(rows) == {"good"}
    assert {name: row["reason"] for name, row in failed.items()} == {"bad": reason}
