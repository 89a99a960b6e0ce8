"""What `deepspec simulate` replays: recordings, tables and policies put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deepspec.commands.simulate import SYNTHETIC
from deepspec.config.resources import resource
from deepspec.config.schema import DecodingConfig
from deepspec.errors import ConfigError
from deepspec.progress import Progress
from deepspec.scheduling.calibration import Scaling
from deepspec.scheduling.schedulers import open_pays, open_policy
from deepspec.scheduling.throughput import Throughput, read_throughput
from deepspec.serving.policies import PLAIN, WHOLE, decoding_by, needs_confidence
from deepspec.serving.record import LoadRecord, read_records
from deepspec.serving.recording import Recording, read_recordings
from deepspec.serving.simulator import SimulatedLoop
from deepspec.serving.tables import key_of
from deepspec.serving.traffic import Level


@dataclass(frozen=True)
class Recorded:
    """`recordings` and throughput `tables` by drafter, the first of which is the one that policies
    are for; `sources`: where a table comes from. `measured`: the real loop's records, with their
    `policies` and `levels`; empty for traces alone. `decoding` as it was there."""

    traces: Path
    recordings: Mapping[str, Recording]
    tables: Mapping[str, Throughput]
    sources: Mapping[str, str]
    measured: Sequence[LoadRecord] = ()
    policies: tuple[str, ...] = ()
    levels: tuple[Level, ...] = ()
    decoding: DecodingConfig = field(default_factory=DecodingConfig)


def open_recorded(load: str | None, traces: str | None, throughput: str | None) -> Recorded:
    """Of the folder `load`, or the file `traces`; `throughput` stands for the measured tables.

    Raises ConfigError where a table is missing, DataError for files that cannot be replayed.
    """
    if load is None:
        if throughput is None:
            raise ConfigError("traces=FILE needs throughput=FILE; deepspec profile makes one")
        path = Path(str(traces)).expanduser()
        recordings = read_recordings(path, None)
        return Recorded(path, recordings, *_tables(recordings, None, throughput))
    folder = Path(load).expanduser()
    measured, about = read_records(folder / "load.json")
    scaling = about.get("scaling") and Scaling(**about["scaling"])
    recordings = read_recordings(folder / "traces.jsonl", scaling)
    main = str(about["drafter"])
    ordered = {main: recordings[main], **recordings} if main in recordings else recordings
    policies = [record.policy for record in measured if record.drafter in ("", main)]
    return Recorded(
        folder / "traces.jsonl",
        ordered,
        *_tables(ordered, folder, throughput),
        measured=measured,
        policies=tuple(dict.fromkeys(policies)),
        decoding=DecodingConfig(threshold=float(about["threshold"])),
        levels=tuple(dict.fromkeys(Level(each.concurrency, each.rate) for each in measured)),
    )


def simulate_all(
    recorded: Recorded, policies: Sequence[str], levels: Sequence[Level], seconds: float, seed: int
) -> list[LoadRecord]:
    """Every policy with the first drafter, and the other drafters with whole blocks, under every
    level for so many simulated seconds."""
    main, *others = recorded.recordings
    contenders = [(policy, "" if policy == PLAIN else main) for policy in policies]
    contenders += [(WHOLE, other) for other in others]
    if blind := [policy for policy in policies if needs_confidence(policy)]:
        scheduler = decoding_by(blind[0], DecodingConfig()).scheduler
        if scheduler != "fixed" and recorded.recordings[main].survival is None:
            raise ConfigError(
                f"policies: {blind[0]} needs confidences, which {recorded.traces} has none of; "
                "record with a drafter that has a confidence head"
            )
    records = []
    with Progress("simulate", len(levels) * len(contenders), "policies") as progress:
        for level in levels:
            for policy, drafter in contenders:
                loop = _loop(recorded, policy, drafter or main, level, seed)
                while loop.meter.seconds < seconds:
                    loop.step()
                record = loop.meter.record(policy, drafter, level.concurrency, level.rate)
                records.append(record)
                progress.advance(1, f"{policy}, {level.concurrency} at once")
    return records


def deviations(records: Sequence[LoadRecord], real: Sequence[LoadRecord]) -> list[float]:
    """Of the simulated throughput from the measured one, relative, where both are known."""
    measured = {key_of(record): record.throughput for record in real}
    return [
        record.throughput / measured[key_of(record)] - 1
        for record in records
        if key_of(record) in measured
    ]


def _loop(recorded: Recorded, policy: str, drafter: str, level: Level, seed: int) -> SimulatedLoop:
    recording, table = recorded.recordings[drafter], recorded.tables[drafter]
    traffic = level.traffic(seed)
    if policy == PLAIN:
        return SimulatedLoop(recording, table, traffic, plain=True)
    chosen = open_policy(decoding_by(policy, recorded.decoding), table)
    return SimulatedLoop(recording, table, traffic, chosen, open_pays(chosen))


def _tables(
    recordings: Mapping[str, Recording], folder: Path | None, throughput: str | None
) -> tuple[dict[str, Throughput], dict[str, str]]:
    """The table of each drafter and its file."""
    from deepspec.commands.loads import table_name

    tables, sources = {}, {}
    for drafter in recordings:
        file = throughput
        if throughput == SYNTHETIC:
            file = str(resource("data/throughput/synthetic_gpu.csv"))
        elif folder is not None and throughput is None:
            file = str(folder / table_name(drafter))
            if not Path(file).is_file():
                raise ConfigError(
                    f"{folder} has no {table_name(drafter)}; set throughput=FILE, or let deepspec "
                    "load measure it (policies=[...,algorithm1])"
                )
        tables[drafter], sources[drafter] = read_throughput(str(file)), str(file)
    return tables, sources
