"""Where the features of a training are from: the target in the process, a store, or servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deepspec.commands.stages import TrainingData
from deepspec.config.schema import RunConfig
from deepspec.drafters.registry import drafter_kind
from deepspec.errors import ConfigError, DataError
from deepspec.features.extract import check_room, discard_bad, extract, header_of, missing_shards
from deepspec.features.remote import RemoteTarget
from deepspec.features.sources import Ahead, FeatureSource, Hybrid, Online, Overlapped
from deepspec.features.store import HEADER, Store
from deepspec.outputs import hold
from deepspec.processes import rank, world_size
from deepspec.progress import say
from deepspec.targets import Target, TargetEnds
from deepspec.training.engine import Engine
from deepspec.training.run_folder import RunFolder


def extract_features(
    config: RunConfig, target: Target, data: TrainingData, out: Path, wait: Callable[[], None]
) -> Store:
    """A store of all samples in the folder `out`, made by the processes of this job together.

    Raises DataError where a sample is missing in the end.
    """
    samples = [*data.samples, *data.validation]
    if not samples:
        raise DataError("no sample to extract; see the rows left out above and data.path")
    kind = drafter_kind(config.drafter.kind)
    header = header_of(target, samples, config.extract.dtype, kind.all_finals)
    verify = config.features.verify
    if rank() == 0:
        with hold(out / HEADER, patiently=True):  # a training may fill the same store
            Store.create(out, header, repair=True)
    wait()
    store = Store.create(out, header, verify)
    wait()  # all share out the same shards before any is deleted
    discard_bad(store, store.finished()[rank() :: world_size()], samples)
    wait()
    store = Store.create(out, header, verify)  # without what other processes deleted
    missing = missing_shards(samples, store, config.extract)
    tokens = sum(shard.tokens for shard in missing)
    need = store.header.bytes_of(sample for shard in missing for sample in shard.samples)
    say(
        f"store: {tokens} tokens at {need / max(1, tokens):.0f} bytes ({header.dtype}) make "
        f"{need / 2**30:.2f} GiB in {len(missing)} shards; "
        f"{len(store.finished())} are there from before"
    )
    check_room(out, header, need, config.extract)
    wait()  # all share out the same shards: nobody writes before the others have looked
    extract(target, missing[rank() :: world_size()], store, config.extract)
    wait()
    store.refresh()
    store.require_complete()
    return store


def open_store(config: RunConfig, target: TargetEnds) -> Store:
    """The store at `features.path`, whose target `target` is from now on the ends of.

    Raises DataError where samples are missing, ConfigError for other layers than the drafter reads,
    or where it reads final states that are not there.
    """
    store = Store.open(Path(str(config.features.path)).expanduser(), config.features.verify)
    store.require_complete()
    kind = config.drafter.kind
    if drafter_kind(kind).all_finals and not store.header.all_finals:
        raise ConfigError(
            f"{store.path} holds final states only where a supervised token follows, but "
            f"drafter.kind={kind} reads those of all tokens; make a store for it: deepspec extract "
            f"recipe={config.recipe} drafter.kind={kind} out=DIR"
        )
    _require_layers(target, store.header.layer_ids, f"{store.path} holds", "extract again")
    target.adopt(store.header.identity, str(store.path))
    return store


def open_remote(config: RunConfig, target: TargetEnds) -> RemoteTarget:
    """The servers of `features.servers`, whose target `target` is from now on the ends of.

    Raises ServerError, or ConfigError where they capture other layers than the drafter reads.
    """
    remote = RemoteTarget(config.features, drafter_kind(config.drafter.kind).all_finals)
    layers = remote.description.layer_ids
    _require_layers(target, layers, "the servers capture", "start them with the latter")
    target.adopt(remote.identity, "the target that is served")
    return remote


def _require_layers(target: TargetEnds, found: list[int], who: str, instead: str) -> None:
    wanted = list(target.layer_ids)
    if found != wanted:
        raise ConfigError(
            f"{who} the layers {found}, but the drafter is to read {wanted}; set "
            f"target.layer_ids={found}, or {instead}"
        )


def feature_source(
    config: RunConfig,
    target: TargetEnds,
    data: TrainingData,
    folder: RunFolder,
    engine: Engine,
    store: Store | None,
) -> FeatureSource:
    """Where training gets features from, by `features.source`."""
    wanted = config.features
    if store is not None:
        return Ahead(store.read, workers=min(4, wanted.prefetch))
    if wanted.source == "remote":
        remote = open_remote(config, target)
        return Ahead(remote.features, max(1, wanted.prefetch), remote.close)
    assert isinstance(target, Target)
    all_finals = drafter_kind(config.drafter.kind).all_finals
    if wanted.source == "hybrid":
        path = Path(wanted.path).expanduser() if wanted.path else folder.features
        samples = [*data.samples, *data.validation]
        header = header_of(target, samples, config.extract.dtype, all_finals)
        if engine.is_main:
            with hold(path / HEADER, patiently=True):  # several trainings may share a store
                Store.create(path, header, repair=True)
        engine.wait()
        store = Store.create(path, header, wanted.verify)
        return Hybrid(target, store, f"hybrid-{engine.rank}", int(config.extract.shard_mib * 2**20))
    return Overlapped(target, all_finals) if wanted.overlap else Online(target, all_finals)
