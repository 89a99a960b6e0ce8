"""Real servers on loopback: the same numbers, whatever happens to them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load, save

from deepspec.config.schema import FeaturesConfig, ServeConfig
from deepspec.errors import ConfigError, ServerError
from deepspec.features.encoding import token_bytes
from deepspec.features.remote import TOKEN, RemoteTarget
from deepspec.features.server import FeatureServer, serve
from deepspec.features.sources import Ahead
from deepspec.records import Sample, TargetFeatures
from deepspec.targets import Target
from deepspec.training.trainer import Trainer
from tests.conftest import make_model, make_tokenizer
from tests.trainers import MakeTrainer, make_samples

RECIPE = """\
defaults: [base, _self_]
target: {{path: {target}, dtype: float32, num_layer_ids: 3}}
data: {{path: [unused.jsonl]}}
engine: {{device: cpu}}
serve: {{port: 0}}
"""
SAMPLES = make_samples(5)


@pytest.fixture(scope="module")
def recipe(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "served.yaml"
    path.write_text(RECIPE.format(target=target_folder))
    return path


StartServers = Callable[[int], list[tuple[subprocess.Popen[str], str]]]


@pytest.fixture
def start_servers(recipe: Path) -> Iterator[StartServers]:
    """`start_servers(n)`: n times (process, address); they start side by side."""
    started: list[subprocess.Popen[str]] = []

    def start(count: int) -> list[tuple[subprocess.Popen[str], str]]:
        command = [sys.executable, "-m", "deepspec", "serve-target", f"recipe={recipe}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        own = [
            subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
            for _ in range(count)
        ]
        started.extend(own)
        return [(process, address_of(process)) for process in own]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert " at http://" in line, line
    return line.split(" at ")[1].strip()


@contextmanager
def serving(target: Target, config: ServeConfig, token: str | None = None) -> Iterator[str]:
    """A server in a thread of this process, whose target a test may slow down."""
    server = FeatureServer(target, config, token).http_server()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)


def client(*servers: str, **options: object) -> RemoteTarget:
    return RemoteTarget(FeaturesConfig(servers=list(servers), **{"patience": 20, **options}))


def weights(trainer: Trainer, steps: int, after: dict[int, Callable[[], None]]) -> list:
    for step in range(steps):
        trainer.train_step()
        after.get(step, lambda: None)()
    return [parameter.detach().clone() for parameter in trainer.distillation.parameters()]


@pytest.mark.slow  # the short storm kills one too
def test_a_killed_server_loses_nothing(
    start_servers: StartServers, make_trainer: MakeTrainer, target: Target
) -> None:
    """One of two dies in mid-training: bitwise the weights of online training."""
    online = weights(make_trainer("online"), 9, {})
    (first, one), (_, two) = start_servers(2)
    remote = client(one, two)
    source = Ahead(remote.features, 3, remote.close)
    trainer = make_trainer("remote", "features.prefetch=3", source=source)
    found = weights(trainer, 9, {3: first.kill})
    for own, other in zip(found, online, strict=True):
        assert torch.equal(own, other)
    assert f"{remote.tokens} tokens fetched" in source.close()
    # on the wire: the features, and a header a reply
    expected = token_bytes("float32", 3, target.hidden_size)
    assert expected <= remote.received / remote.tokens < expected + 10


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("auto", 0), ("bfloat16", 2**-8), ("float8", 2**-3)]
)
def test_dtypes_on_the_wire(target: Target, dtype: str, tolerance: float) -> None:
    expected = target.features(SAMPLES).context
    with serving(target, ServeConfig(dtype=dtype)) as address:
        found = client(address).features(SAMPLES).context
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_final_states_that_are_not_read_are_not_sent(
    target: Target, make_trainer: MakeTrainer
) -> None:
    """A training ends with bitwise the same weights, and the wire carries less by just these."""
    received, found, samples = {}, {}, make_samples(13)
    with serving(target, ServeConfig()) as address:
        for every in (True, False):
            remote = RemoteTarget(FeaturesConfig(servers=[address]), every)
            remote.features(samples)
            received[every] = remote.received
            source = Ahead(remote.features, 1, remote.close)
            found[every] = weights(make_trainer(f"remote-{every}", source=source), 4, {})
            source.close()
    assert all(torch.equal(*pair) for pair in zip(found[True], found[False], strict=True))
    unread = sum(len(sample) - int(sample.loss_mask[1:].sum()) for sample in samples)
    saved, header = received[True] - received[False], 16  # in which lengths are
    assert saved == pytest.approx(unread * target.hidden_size * 4, abs=header)


def test_limits(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too much, too many, rubbish, strangers: each has its status, and the server goes on."""
    config = ServeConfig(max_body_mib=1, max_tokens=100, queue=1)
    with serving(target, config, "secret") as address:
        url, auth = f"{address}/v1/features", {"Authorization": "Bearer secret"}

        def post(body: bytes, headers: dict[str, str] = auth) -> httpx.Response:
            return httpx.post(url, content=body, headers=headers, timeout=20)

        def request(ids: list[int], lengths: list[int]) -> bytes:
            tensors = {"input_ids": torch.tensor(ids), "lengths": torch.tensor(lengths)}
            return save(tensors)

        good = request([5, 6, 7], [2, 1])
        assert post(good, {}).status_code == 401
        assert post(good, {"Authorization": "Bearer secre"}).status_code == 401
        assert httpx.get(f"{address}/v1/target").status_code == 401
        assert post(b"x" * 2**21).status_code == 413
        assert post(request([5] * 60, [50, 5, 5])).status_code == 413
        for bad in (b"", b"rubbish", save({"input_ids": torch.ones(3)}), request([5, 6], [3])):
            assert post(bad).status_code == 400
        assert post(request([5, 260], [2])).status_code == 400
        assert post(request([5, -1], [2])).status_code == 400
        assert post(request([], [])).status_code == 400
        short = {"loss_mask": torch.ones(2).bool(), **load(good)}
        assert post(save(short)).status_code == 400
        reply = post(good)
        assert reply.status_code == 200
        assert load(reply.content)["context"].shape == (3, 3 * target.hidden_size)
        assert httpx.get(f"{address}/health").text == "ok"
        metrics = httpx.get(f"{address}/metrics").text
        assert 'deepspec_requests_total{status="400"} 8.0' in metrics
        assert "deepspec_tokens_total 3.0" in metrics

        monkeypatch.setenv(TOKEN, "secret")
        with pytest.raises(ServerError, match=r"413.*serve\.max_tokens"):
            client(address).features([Sample(torch.ones(101).long(), torch.ones(101), "long")])
        monkeypatch.setenv(TOKEN, "wrong")
        with pytest.raises(ServerError, match=f"401.*{TOKEN}"):
            client(address)


def test_a_full_queue_holds_back_and_loses_nothing(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, busy = target.features, []
    expected = [compute([sample]).final for sample in SAMPLES]

    def slow(samples: list[Sample], all_finals: bool) -> TargetFeatures:
        busy.append(threading.get_ident())
        time.sleep(0.05)
        return compute(samples, all_finals)

    monkeypatch.setattr(target, "features", slow)
    with serving(target, ServeConfig(queue=2)) as address:
        remote = client(address)
        source = Ahead(remote.features, 8)
        for sample in SAMPLES:
            source.expect([sample])
        for sample, final in zip(SAMPLES, expected, strict=True):
            assert torch.equal(source.features([sample]).final, final)
        source.close()
        refused = httpx.get(f"{address}/metrics").text
        assert 'deepspec_requests_total{status="503"}' in refused
    assert len(busy) == len(SAMPLES)
    assert len(set(busy)) == 1  # one at a time


def test_servers_that_cannot_be_used(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ServerError, match=r"no feature server has answered.*features\.servers"):
        client("http://127.0.0.1:9", patience=0.1)
    assert "waiting for a feature server: http://127.0.0.1:9" in capsys.readouterr().err
    with pytest.raises(ServerError, match="nonsense is no address"):
        client("nonsense")
    other = Target(make_model(seed=1), make_tokenizer(), 3, "other")
    with (
        serving(target, ServeConfig()) as one,
        serving(other, ServeConfig()) as two,
        pytest.raises(ServerError, match="differ in identity"),
    ):
        client(one, two)
    with serving(target, ServeConfig()) as address:
        remote = client(address)
    remote._config = replace(remote._config, patience=0.3)
    with pytest.raises(ServerError, match=r"no feature server has answered for 0\.3 s"):
        remote.features(SAMPLES)


def test_nobody_waits_for_a_server_once_training_is_over(target: Target) -> None:
    """Threads that still ask would keep the process from ending."""
    with serving(target, ServeConfig()) as address:
        remote = client(address, patience=300)
    source = Ahead(remote.features, 2, remote.close)
    source.expect(SAMPLES)
    time.sleep(0.3)
    asking = [thread for thread in threading.enumerate() if thread.name.startswith("features")]
    source.close()
    for thread in asking:
        thread.join(timeout=20)
    assert asking
    assert not any(thread.is_alive() for thread in asking)


def test_a_port_that_is_taken_is_named(target: Target) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"serve.port={port} cannot be listened on"):
            serve(target, ServeConfig(port=port), None)


def test_it_does_not_listen_to_others_without_a_token(recipe: Path) -> None:
    command = [sys.executable, "-m", "deepspec", "serve-target", f"recipe={recipe}"]
    environment = {key: value for key, value in os.environ.items() if key != TOKEN}
    done = subprocess.run(
        [*command, "serve.host=0.0.0.0"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert TOKEN in done.stderr
