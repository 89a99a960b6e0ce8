"""Beginning with another drafter: its shape, its weights, and what is refused.

Known to be right by: the first checkpoint of a run whose learning rate is next to nothing, which
must hold the very weights it began with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deepspec.cli import main
from deepspec.drafters.base import Drafter
from deepspec.drafters.dspark import DSparkDrafter
from deepspec.drafters.dspark_v4 import DSparkV4Drafter
from deepspec.export import LAYOUTS, open_export, write_export
from deepspec.export.deepseek_v4 import deepseek_v4_tensors
from deepspec.targets import Target
from deepspec.training.checkpoint import (
    list_checkpoints,
    load_drafter,
    read_checkpoint,
    read_vocabulary,
)
from tests.conftest import make_model, make_tokenizer
from tests.deepseek_v4 import load_v4, make_native, save_v4
from tests.export.conftest import make_drafter
from tests.export.exports import edit
from tests.export.test_eagle3 import export as export_eagle3
from tests.export.test_eagle3 import make_eagle3
from tests.export.test_speculators import foreign
from tests.recipes.small import small, words, write_prompts

# a drafter of another shape than the tiny recipe's, for three captured layers
SHAPE = ("num_layers", "block_size", "markov_rank", "intermediate_size", "confidence_head")
STILL = ["training.learning_rate=1e-12", "training.max_steps=1", "evaluation.enabled=false"]
Train = Callable[..., Path]


def export(drafter: DSparkDrafter, target: Target, out: Path, layout: str) -> Path:
    write_export(layout, "dspark", drafter, target, out, "serving", 32, lambda *_: "a card\n")
    return out


@pytest.fixture(scope="module")
def recipe(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe as a file of its own: only what a drafter's shape does not depend on."""
    folder = tmp_path_factory.mktemp("recipe")
    settings = small(target_folder, write_prompts(folder / "prompts.jsonl"))
    del settings["target.num_layer_ids"], settings["drafter.num_layers"]
    path = folder / "mine.yaml"
    path.write_text("defaults: [base, _self_]\ntarget: {dtype: float32}\n")
    (folder / "words").write_text("\n".join(words(settings)))
    return path


@pytest.fixture
def train(recipe: Path, tmp_path: Path) -> Train:
    """`train(name, *words)`: a run that leaves the weights as they are; gives its folder."""

    def run(name: str, *more: str) -> Path:
        own = (recipe.parent / "words").read_text().splitlines()
        out = tmp_path / name
        main(["train", f"recipe={recipe}", f"out={out}", *own, *STILL, *more])
        return out

    return run


def refused(capsys: pytest.CaptureFixture[str], train: Train, *more: str) -> str:
    with pytest.raises(SystemExit) as end:
        train("refused", *more)
    assert end.value.code == 2
    return capsys.readouterr().err


def assert_began_with(run: Path, drafter: Drafter) -> None:
    first = load_drafter(read_checkpoint(list_checkpoints(run / "checkpoints")[0]))
    for name, tensor in drafter.state_dict().items():
        expected = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        torch.testing.assert_close(first.state_dict()[name], expected, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------- beginning


@pytest.mark.parametrize("which", ["flat", "speculators", "foreign speculators"])
def test_an_export_goes_on(target: Target, train: Train, tmp_path: Path, which: str) -> None:
    layout = which.split()[-1]
    size = 100 if layout == "speculators" else None
    drafter = make_drafter(target, "vanilla", draft_vocab_size=size)
    origin = export(drafter, target, tmp_path / "origin", layout)
    if which.startswith("foreign"):
        foreign(origin)
    run = train("run", f"drafter.init_from={origin}", f"export.format={layout}")
    assert_began_with(run, drafter)
    checkpoint = read_checkpoint(list_checkpoints(run / "checkpoints")[0])
    saved = checkpoint.config["drafter"]
    assert {key: saved[key] for key in SHAPE} == {
        "num_layers": 2,
        "block_size": 4,
        "markov_rank": 6,
        "intermediate_size": 48,
        "confidence_head": True,
    }
    assert checkpoint.config["target"]["layer_ids"] == [1, 2, 3]
    assert checkpoint.shape["num_target_layers"] == 6
    again = open_export(run / "export")
    assert again.shape.block_size == 4
    if size is not None:
        assert saved["draft_vocab_size"] == 100
        assert 0 < again.shape.draft_vocab_coverage < 1
        assert again.load(target).vocabulary.equal(drafter.vocabulary)
        assert "% of those in the training answers" in (run / "export" / "README.md").read_text()


@pytest.mark.parametrize(("origin", "end"), [("speculators", "flat"), ("flat", "speculators")])
def test_an_eagle3_export_goes_on(
    target: Target, train: Train, tmp_path: Path, origin: str, end: str
) -> None:
    drafter = make_eagle3(target, 100, qk_norm=False)
    folder = export_eagle3(drafter, target, tmp_path / "origin", layout=origin)
    run = train("run", f"drafter.init_from={folder}", f"export.format={end}")
    assert_began_with(run, drafter)
    checkpoint = read_checkpoint(list_checkpoints(run / "checkpoints")[0])
    saved = checkpoint.config["drafter"]
    assert (saved["kind"], saved["block_size"], saved["intermediate_size"]) == ("eagle3", 4, 48)
    assert (saved["qk_norm"], saved["draft_vocab_size"]) == (False, 100)
    assert open_export(run / "export").load(target).vocabulary.equal(drafter.vocabulary)


def test_a_run_and_a_checkpoint_go_on(train: Train) -> None:
    first = train("first", "drafter.num_layers=1", "target.num_layer_ids=2")
    (place,) = list_checkpoints(first / "checkpoints")
    before = load_drafter(read_checkpoint(place))
    for name, origin in (("second", first), ("third", place)):
        run = train(name, f"drafter.init_from={origin}", "seed=5")
        after = load_drafter(read_checkpoint(list_checkpoints(run / "checkpoints")[0]))
        for key, tensor in before.state_dict().items():
            torch.testing.assert_close(after.state_dict()[key], tensor, rtol=0, atol=1e-9)


def test_a_run_goes_on_without_the_place_it_began_from(
    target: Target, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with the same vocabulary, though that was counted elsewhere."""
    drafter = make_drafter(target, "vanilla", draft_vocab_size=100)
    origin = export(drafter, target, tmp_path / "origin", "speculators")
    began = [f"drafter.init_from={origin}", "export.format=speculators"]
    run = train("run", *began)
    assert "beginning with the weights of" in capsys.readouterr().err
    shutil.rmtree(origin)
    (first,) = list_checkpoints(run / "checkpoints")
    train("run", *began, "training.max_steps=2", f"training.resume={first}")
    said = capsys.readouterr().err
    assert f"going on from {first}" in said
    assert "beginning with" not in said
    second = list_checkpoints(run / "checkpoints")[-1]
    assert second.name == "step-00000002"
    assert read_vocabulary(read_checkpoint(second)).equal(drafter.vocabulary)


def test_a_fine_tuned_target_is_said_and_taken(
    target: Target, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafter = make_drafter(target, "vanilla")
    origin = export(drafter, target, tmp_path / "origin", "flat")
    tuned = tmp_path / "tuned"
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    model.save_pretrained(tuned)
    make_tokenizer().save_pretrained(tuned)
    run = train("run", f"drafter.init_from={origin}", f"target.path={tuned}")
    assert "was made for a target of other weights: fine where this is a" in capsys.readouterr().err
    assert_began_with(run, drafter)


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drafter.num_layers=5", "drafter.num_layers=5, but drafter.init_from="),
        (
            "drafter.markov_head=gated",
            "drafter.markov_head=gated, but .* has vanilla; leave it out",
        ),
        ("drafter=dflash", "drafter.kind=dflash, but .* has dspark"),
        ("drafter.draft_vocab_size=50", "drafter.draft_vocab_size=50, but .* has None"),
        ("target.layer_ids=[0,2,4]", r"target.layer_ids=\[0, 2, 4\], but .* reads \[1, 2, 3\]"),
    ],
)
def test_settings_that_say_otherwise(
    target: Target,
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    message: str,
) -> None:
    origin = export(make_drafter(target, "vanilla"), target, tmp_path / "origin", "flat")
    error = refused(capsys, train, f"drafter.init_from={origin}", change)
    assert re.search(message, error), error
    assert not (tmp_path / "refused").exists()


def other_tokenizer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["deepspec"]["identity"]["tokenizer"] = "another"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_tokenizer, "made for another target than .*: the tokenizer differ"),
        (lambda f: edit(f, num_target_layers=9), r"num_target_layers \(9, not 6\)"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "config.json").unlink(), "neither an exported drafter nor a checkpoint"),
    ],
)
def test_what_does_not_fit_the_target(
    target: Target,
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], Any],
    message: str,
) -> None:
    origin = export(make_drafter(target, "vanilla"), target, tmp_path / "origin", "flat")
    change(origin)
    error = refused(capsys, train, f"drafter.init_from={origin}")
    assert re.search(message, error), error


def test_a_drafter_of_another_target(
    target: Target, llama: Target, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = export(make_drafter(llama, "vanilla"), llama, tmp_path / "origin", "flat")
    error = refused(capsys, train, f"drafter.init_from={origin}")
    assert "was made for another target than" in error
    assert "architecture" in error


# ------------------------------------------------------------------------------------------- hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address, folder): a hub on this machine with the folders in it as repositories of `me`."""
    served = tmp_path / "served"

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            content = self._found(self.path.partition("?")[0])
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def _found(self, path: str) -> bytes | None:
            asked = re.fullmatch(
                rf"(?:/api/models)?/me/(\w+)/(?:revision/(?:v2|{COMMIT})|(tree/{COMMIT})"
                rf"|resolve/{COMMIT}/(.+))",
                path,
            )
            if asked is None or not (served / asked[1]).is_dir():
                return None
            files, tree, name = served / asked[1], asked[2], asked[3]
            if name is not None:
                return (files / name).read_bytes()
            sizes = {file.name: file.stat().st_size for file in sorted(files.iterdir())}
            if tree is not None:
                entry = {"type": "file", "oid": COMMIT}
                entries = [entry | {"path": name, "size": size} for name, size in sizes.items()]
                return json.dumps(entries).encode()
            siblings = [{"rfilename": name} for name in sizes]
            return json.dumps({"id": "me/x", "sha": COMMIT, "siblings": siblings}).encode()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", served
    server.shutdown()
    server.server_close()


FETCH = """
import sys, torch
from deepspec.commands.beginnings import open_origin
from deepspec.errors import CheckpointError
origins = [open_origin(name) for name in ("me/drafter@v2", "me/v4@v2")]
torch.save([(o.drafter[1].to_dict(), o.load().state_dict()) for o in origins], sys.argv[1])
try:
    open_origin("me/nothing")
except CheckpointError as error:
    print(error)
"""


def published_v4(folder: Path, weights: Path) -> DSparkV4Drafter:
    """A drafter in the second of a target's two files, as they are published."""
    target = load_v4(save_v4(weights))
    drafter = make_native(target)
    config = LAYOUTS["deepseek_v4"].config(drafter.config, target, "serving", 32)
    files = {
        "model-00001-of-00002.safetensors": {"embed.weight": target.embedding.clone()},
        "model-00002-of-00002.safetensors": deepseek_v4_tensors(drafter),
    }
    folder.mkdir(parents=True)
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    names = {name: file for file, tensors in files.items() for name in tensors}
    del config["deepspec"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return drafter


def test_drafters_on_the_hub(target: Target, tmp_path: Path, hub: tuple[str, Path]) -> None:
    """In a process of its own: huggingface_hub reads its address when it is imported."""
    address, served = hub
    drafter = make_drafter(target, "vanilla")
    files = export(drafter, target, served / "drafter", "flat")
    native = published_v4(served / "v4", tmp_path / "target")
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", FETCH, str(tmp_path / "fetched.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "fetched.pt")
    for (shape, fetched), own in zip(found, (drafter, native), strict=True):
        assert shape == own.config.to_dict()
        for name, tensor in own.state_dict().items():
            assert torch.allclose(fetched[name], tensor, rtol=2**-8, atol=0)  # by its rounding
    first, second = sorted((tmp_path / "cache").rglob("snapshots/*/*.safetensors"))
    assert first.read_bytes() == (files / "model.safetensors").read_bytes()
    assert second.name == "model-00002-of-00002.safetensors", "the target is not fetched"
    assert "drafter.init_from=me/nothing could not be fetched from the hub" in done.stdout
    assert "check its name and revision, the network, and HF_TOKEN" in done.stdout


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "nowhere", "~/nowhere"])
def test_neither_a_folder_nor_a_hub_name(
    train: Train, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    error = refused(capsys, train, f"drafter.init_from={name}")
    assert f"drafter.init_from={name}: no such folder, and no owner/name[@revision]" in error
