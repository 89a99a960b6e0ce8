"""A store of samples and their features: safetensors shards, each of them whole or not there.

    store.json           format, identity of the target, layer ids, dtype, which samples; a checksum
    shard-*.safetensors  samples end to end: input_ids [T] int32, loss_mask [T] bool, context
                         [T, L*D], final [F, D] and, in float8, their scales
    shard-*.json         its index, written after it: sample ids, lengths, final states of each (F
                         in all), digests, the tensors' sha256; a checksum
    hybrid-*             the same two of `features=hybrid`

The checksum of an index covers its rows, its name and the header, so that a shard of another store
is refused. Stores of format 1 have no checksums; they are read, and what is not protected is said.

A killed process leaves finished shards and nothing else that is looked at. Variable lengths, no
padding. Several processes may write shards of their own names into one folder, where other files
(the answers that `deepspec extract` makes) may lie too. No name is used again for other samples:
who has read the one file must not find the other.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepspec.atomic import atomic_file, free_bytes, sha256, write_text
from deepspec.errors import DataError
from deepspec.features.encoding import decode, shapes
from deepspec.features.store_index import (
    FORMAT,
    HEADER,
    BadShardError,
    Index,
    Place,
    Row,
    StoreHeader,
    digest,
    digest_of,
    places_in,
    read_header,
    read_index,
)
from deepspec.progress import say, say_once
from deepspec.records import Sample, TargetFeatures
from deepspec.targets.identity import differing

SHARDS = ("shard-*.json", "hybrid-*.json")  # other files may lie beside them
OPEN_SHARDS = 64


class Store:
    """The folder at `path`. `verify`: check a shard's hash before its features are first read by
    this process; tokens are always held against their own digests. `repair`: delete shards with
    a damaged index."""

    def __init__(
        self, path: Path, header: StoreHeader, verify: bool = True, repair: bool = False
    ) -> None:
        self.path, self.header = path, header
        self._verify = verify
        self._places: dict[str, Place] = {}
        self._known: dict[str, Index] = {}  # shards as they were when their places were read
        self._checked: set[str] = set()
        self._opened = lru_cache(maxsize=OPEN_SHARDS)(self._open)
        self._lock = threading.Lock()  # readers run ahead of the training in threads
        if header.conversations is None:
            say_once(
                f"{path} was made by an earlier version: no checksum protects its {HEADER} (dtype, "
                "layers, target) and the conversation ids of its samples; extract again for one"
            )
        self.refresh(repair)

    # ---------------------------------------------------------------------------- the folder

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> Store:
        """An existing store. Raises DataError when there is none or it is not readable."""
        return cls(path, read_header(path), verify)

    @classmethod
    def create(
        cls, path: Path, header: StoreHeader, verify: bool = True, repair: bool = False
    ) -> Store:
        """A new store, or the one there, to be continued; where that keeps all final states, so
        it does of what is added.

        Raises DataError when that is of other data, another target, or in another dtype.
        """
        if not (path / HEADER).is_file():
            path.mkdir(parents=True, exist_ok=True)
            content = {"format": FORMAT, **asdict(header), "checksum": header.checksum}
            write_text(path / HEADER, json.dumps(content, indent=2) + "\n")
        found = read_header(path)
        header = replace(header, all_finals=header.all_finals or found.all_finals)
        unequal = {"target", "identity"} | ({"conversations"} if not found.conversations else set())
        names = [field.name for field in fields(header) if field.name not in unequal]
        different = [name for name in names if getattr(found, name) != getattr(header, name)]
        if differing(found.identity, header.identity):
            different.append("identity")
        if different:
            raise DataError(
                f"{path} is a store of something else: its {', '.join(different)} differ(s); "
                "give another folder, or delete it"
            )
        return cls(path, found, verify, repair)

    def refresh(self, repair: bool = False) -> None:
        """Look for shards that were finished since. Raises BadShardError for a damaged index, or
        deletes the shard to `repair` the store."""
        for file in sorted(file for names in SHARDS for file in self.path.glob(names)):
            if file.stem not in self._known:
                with suppress(FileNotFoundError):  # another process has just discarded it
                    try:
                        self._add(file.stem, read_index(file, self.header))
                    except BadShardError as error:
                        if not repair:
                            raise
                        say(f"{error.what}; it is made again")
                        self.discard(error.shard)

    def _add(self, shard: str, index: Index) -> None:
        places = dict(places_in(shard, index))
        for name, place in places.items():
            if (other := self._places.get(name)) and other.digest != place.digest:
                what = f"{self.path / shard}.json has other tokens under {name} than {other.shard}"
                raise BadShardError(what, shard)
        self._known[shard] = index
        self._places |= places

    def finished(self) -> list[str]:
        """Names of the shards that are whole."""
        return sorted(self._known)

    def __len__(self) -> int:
        return len(self._places)

    def holds(self, sample: Sample) -> bool:
        """Whether its features are here. Raises DataError where other tokens have its id."""
        place = self._places.get(sample.sample_id)
        if place is not None and place.digest != digest(sample):
            raise DataError(
                f"{self.path} has other tokens under the id {sample.sample_id}: the data changed "
                "since it was made; give another folder, or delete it"
            )
        return place is not None

    # ------------------------------------------------------------------------------- reading

    def read(self, samples: Sequence[Sample]) -> TargetFeatures:
        """Features of `samples`, packed, on the CPU. Raises BadShardError, or DataError for a shard
        that could not be opened although it is what was written."""
        parts = [self._slice(self._places[sample.sample_id]) for sample in samples]
        return decode({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def samples(self) -> Iterator[Sample]:
        """All samples, shard by shard. Raises DataError for tokens that are not as written."""
        for shard in self.finished():
            yield from self._samples(shard)

    def _samples(self, shard: str) -> Iterator[Sample]:
        opened = self._file(shard)  # of which this reads the tokens, a thousandth
        ids, mask = opened.get_tensor("input_ids").long(), opened.get_tensor("loss_mask")
        for name, place in places_in(shard, self._known[shard]):
            if self._places.get(name, place).shard == shard:  # else another shard has it too
                sample = Sample(ids[place.tokens], mask[place.tokens], name, place.conversation_id)
                finals = place.finals.stop - place.finals.start
                if digest(sample) != place.digest or finals != self.header.finals(sample):
                    self.check(shard)
                    raise self._unfit(shard, f"{name} has other tokens or final states")
                yield sample

    def require_complete(self) -> None:
        """Raises DataError where samples are missing, or are not those that the store is of."""
        if len(self) < self.header.samples:
            raise DataError(
                f"{self.path} has {len(self)} of {self.header.samples} samples; finish it by the "
                "same deepspec extract command"
            )
        places = self._places.items()
        data = digest_of((name, place.digest) for name, place in places)
        conversations = digest_of((name, place.conversation_id) for name, place in places)
        if data != self.header.data or self.header.conversations not in (None, conversations):
            raise DataError(
                f"{self.path}: the samples in its shard-*.json are not those that {HEADER} was "
                "written for; delete it and extract again"
            )

    def check(self, shard: str) -> None:
        """Reread one shard whole. Raises BadShardError when it is not what was written, or not what
        lay under its name when this process first saw it: places in it would be of other rows."""
        file = self.path / f"{shard}.safetensors"
        found = sha256(file) if file.is_file() else None
        if found != self._known[shard].sha256:
            what = "corrupt: its sha256 is not the recorded one" if found else "missing"
            raise BadShardError(f"{file} is {what}", shard)

    def verify(self, shard: str) -> set[str]:
        """Check all that is known of one shard: its hash, its layout, and each sample's tokens; the
        hash only where the store verifies. Return the ids in it. Raises BadShardError."""
        if self._verify:
            self.check(shard)
        return {sample.sample_id for sample in self._samples(shard)}

    def discard(self, shard: str) -> None:
        """Forget a bad shard and delete it; its index last, by which another process finds it."""
        for suffix in (".safetensors", ".json"):
            (self.path / f"{shard}{suffix}").unlink(missing_ok=True)
        self._known.pop(shard, None)
        self._checked.discard(shard)
        self._opened.cache_clear()  # one that is made again gets its name
        self._places = {i: place for i, place in self._places.items() if place.shard != shard}

    def _slice(self, place: Place) -> dict[str, Tensor]:
        opened, wanted = self._shard(place.shard), {}
        for name in opened.keys():  # noqa: SIM118
            if name not in ("input_ids", "loss_mask"):
                own = place.finals if name.startswith("final") else place.tokens
                wanted[name] = opened.get_slice(name)[own]
        return wanted

    def _shard(self, shard: str) -> Any:
        with self._lock:
            return self._opened(shard)

    def _open(self, shard: str) -> Any:
        if self._verify and shard not in self._checked:
            self.check(shard)
            self._checked.add(shard)
        return self._file(shard)

    def _file(self, shard: str) -> Any:
        """The tensors of `shard`, which are as many and as long as its index has it."""
        rows, layers = self._known[shard].samples, len(self.header.layer_ids)
        tokens, finals = sum(row.length for row in rows), sum(row.kept for row in rows)
        wanted = {"input_ids": ("I32", [tokens]), "loss_mask": ("BOOL", [tokens])}
        wanted |= shapes(self.header.dtype, layers, self.header.hidden_size, tokens, finals)
        try:
            opened: Any = safe_open(self.path / f"{shard}.safetensors", "pt")
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: (own.get_dtype(), own.get_shape()) for name, own in slices.items()}
        except (SafetensorError, OSError) as error:
            self.check(shard)  # says more
            raise DataError(f"{self.path / shard}.safetensors is unreadable: {error}") from None
        if found != wanted:
            self.check(shard)
            raise self._unfit(shard, "number types or sizes of the tensors are others")
        return opened

    def _unfit(self, shard: str, why: str) -> BadShardError:
        file = self.path / f"{shard}.json"
        return BadShardError(f"{file} does not fit its .safetensors ({why})", shard)

    # ------------------------------------------------------------------------------- writing

    def write(self, shard: str, samples: Sequence[Sample], encoded: dict[str, Tensor]) -> None:
        """Write a shard whole: `encoded` features of `samples`, end to end.

        Raises DataError for a full disk; finished shards stay as they are.
        """
        tensors = {
            "input_ids": torch.cat([sample.input_ids for sample in samples]).int(),
            "loss_mask": torch.cat([sample.loss_mask for sample in samples]),
            **{name: tensor.cpu().contiguous() for name, tensor in encoded.items()},
        }
        rows = [
            Row(
                sample.sample_id,
                len(sample),
                digest(sample),
                self.header.finals(sample),
                sample.conversation_id,
            )
            for sample in samples
        ]
        assert len(encoded["final"]) == sum(self.header.finals(sample) for sample in samples)
        try:
            with atomic_file(self.path / f"{shard}.safetensors") as partial:
                save_file(tensors, partial)
                hashed = sha256(partial)
            index = Index(hashed, rows)
            index = replace(index, checksum=self.header.checksum_of(shard, index))
            text = json.dumps(asdict(index))
            write_text(self.path / f"{shard}.json", text + "\n")
        except (OSError, SafetensorError) as error:
            need = sum(tensor.nbytes for tensor in tensors.values())
            raise DataError(
                f"could not write {self.path / shard}.safetensors ({error}): a shard takes "
                f"{need / 2**20:.1f} MiB, {free_bytes(self.path) / 2**20:.1f} MiB are free. "
                "Finished shards are kept: free disk space and start the same command again"
            ) from error
        self.refresh()
