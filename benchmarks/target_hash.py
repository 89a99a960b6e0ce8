"""Measures what the identity of a target costs: all its bytes are hashed once, then remembered.

    python benchmarks/target_hash.py --gib 8

Prints seconds of the first start, with an empty cache, and of the second. The files are sparse and
have just been read: bytes come from the page cache, as right after a model was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from deepspec.config.schema import TargetConfig
from deepspec.targets.files import INDEX, WeightFiles
from deepspec.targets.hashes import CACHE, RECENT

GIB, FILE, TENSOR = 2**30, 2**30, 2**28


def write_checkpoint(folder: Path, gib: float) -> None:
    """A sparse checkpoint of bfloat16 zeros, in files of 1 GiB."""
    weight_map: dict[str, str] = {}
    for number in range(max(1, round(gib * GIB / FILE))):
        file, header = folder / f"model-{number:05d}.safetensors", {}
        for place in range(FILE // TENSOR):
            name = f"layers.{number}.{place}.weight"
            offsets = [place * TENSOR, (place + 1) * TENSOR]
            header[name] = {"dtype": "BF16", "shape": [TENSOR // 2], "data_offsets": offsets}
            weight_map[name] = file.name
        text = json.dumps(header).encode()
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + FILE)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=8.0, help="size of the checkpoint")
    gib = parser.parse_args().gib
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = str(Path(folder, "cache"))
        write_checkpoint(Path(folder), gib)
        (Path(folder) / "config.json").write_text("{}")
        files = list(Path(folder).glob("*.safetensors"))
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while stream.read(2**24):
                    pass
        time.sleep(RECENT)  # what has just been written is not remembered
        size = sum(file.stat().st_size for file in files)
        for start in ("first", "second"):
            begun, cores = time.perf_counter(), time.process_time()
            WeightFiles(TargetConfig(path=folder)).hash_of_all()
            took, cores = time.perf_counter() - begun, time.process_time() - cores
            print(
                f"{start} start: {took:.2f} s, {cores:.2f} s of a core for {size / 1e9:.1f} GB "
                f"({size / 1e9 / cores:.2f} GB/s of a core)"
            )


if __name__ == "__main__":
    main()
