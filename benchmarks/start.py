"""Start: `deepspec --help`, time and memory until the first training step has been made.

    deepspec regenerate recipe=tiny data.limit=200 out=answers.jsonl
    python benchmarks/start.py answers.jsonl
    python benchmarks/start.py answers.jsonl --against ../other-checkout

Every start is a process of its own, with one thread, that ends behind its first step: wall time,
processor time, and the most memory it held. Starts take turns; figures are medians with the least
and the most. *stored* reads features of a store, so of the target only embedding and head; *online*
loads the target. Both start with the embedded target, and with a random one of `--layers` layers,
whose head is a small part of it (`--layers 0` leaves that out). `--against` runs the same starts
with the deepspec of another folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data/tiny_target"
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 4096}
FIRST_STEP, RANDOM_TARGET = "first-step", "random-target"  # what this script does in a process


def main() -> None:
    """Measure all starts in turns and print the table."""
    if sys.argv[1:2] == [FIRST_STEP]:
        first_step(sys.argv[2:])
    elif sys.argv[1:2] == [RANDOM_TARGET]:
        random_target(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        compare()


def compare() -> None:
    """All starts, in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("answers", type=Path, help="a file of deepspec regenerate recipe=tiny")
    parser.add_argument("--against", type=Path, help="the root of another checkout")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32, help="of the larger target")
    options = parser.parse_args()
    checkouts = {"": ROOT} | ({"other: ": options.against.resolve()} if options.against else {})
    found: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        starts = prepare(options.answers.resolve(), Path(folder), options.layers)
        for _ in range(options.repeats):
            for name, words in starts.items():
                for prefix, root in checkouts.items():
                    found[prefix + name].append(start(words, root))

    from rich.console import Console  # a child's peak is not below what its parent holds
    from rich.table import Table

    table = Table("start", "wall s", "processor s", "peak MiB")
    for name in sorted(found, key=lambda name: name.removeprefix("other: ")):
        walls, seconds, peaks = zip(*found[name], strict=True)
        table.add_row(name, spread(walls), spread(seconds), f"{median(peaks) / 2**20:.0f}")
    Console(width=100).print(table)


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def prepare(answers: Path, folder: Path, layers: int) -> dict[str, list[str]]:
    """Stores and the larger target; the words behind python of each start."""
    starts = {"deepspec --help": ["-m", "deepspec", "--help"]}
    targets = {"tiny": TINY}
    if layers:
        targets["large"] = folder / "large"
        run(__file__, RANDOM_TARGET, str(targets["large"]), str(layers))
    for name, path in targets.items():
        data = [f"target.path={path}", f"data.path=[{answers}]", "regenerate.enabled=false"]
        data += ["recipe=tiny", "data.limit=20"]
        run("-m", "deepspec", "extract", *data, f"out={folder / name}-store")
        step = [str(Path(__file__).resolve()), FIRST_STEP, *data]
        step += ["training.validation_samples=0"]
        size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 2**20
        kind = f"{name} target of {size:.0f} MiB"
        stored = ["features=stored", f"features.path={folder / name}-store"]
        starts |= {f"{kind}, stored": [*step, *stored], f"{kind}, online": step}
    return starts


def run(*words: str) -> None:
    """Python with `words`, to its end."""
    subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=ROOT)


def start(words: Sequence[str], root: Path) -> tuple[float, float, int]:
    """(wall seconds, processor seconds, peak bytes) of one process with the deepspec of `root`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *words, *([f"out={out}"] if FIRST_STEP in words else [])]
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
    assert status == 0, " ".join(command)
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss * MAXRSS_UNIT


def first_step(words: Sequence[str]) -> None:
    """`deepspec train`, until its first step is done."""
    from deepspec.cli import main as deepspec
    from deepspec.training.trainer import Trainer

    step = Trainer.train_step

    def only(trainer: Trainer) -> dict[str, float]:
        step(trainer)
        os._exit(0)

    Trainer.train_step = only  # type: ignore[method-assign]
    deepspec(["train", *words])
    sys.exit("no step was made")


def random_target(folder: Path, layers: int) -> None:
    """Save a random checkpoint with the embedded target's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(**LARGE, num_hidden_layers=layers, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main()
