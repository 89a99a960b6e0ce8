"""Records for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from deepspec.serving.record import LoadRecord
from deepspec.streams import visible

Key = tuple[str, str, int, float | None]


def key_of(record: LoadRecord) -> Key:
    """What a record is of: policy, drafter, concurrency and rate."""
    return record.policy, record.drafter, record.concurrency, record.rate


def records_table(
    records: Sequence[LoadRecord], real: Mapping[Key, LoadRecord] | None = None
) -> Table:
    """A line a record; beside simulated ones what was `real`."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = ["at once", "policy", "tokens/s", "a user", "budget", "accepted", "wait p90"]
    for name in names + (["real tokens/s", "off by"] if real else []):
        drawn.add_column(name, justify="left" if name == "policy" else "right")
    for place, record in enumerate(records):
        if place and key_of(records[place - 1])[2:] != key_of(record)[2:]:
            drawn.add_section()
        rate = "" if record.rate is None else f", {record.rate:g}/s"
        beside = (real or {}).get(key_of(record))
        measured = None if beside is None else beside.throughput
        off = None if measured is None else record.throughput / measured - 1
        drawn.add_row(
            f"{record.concurrency}{rate}",
            visible(f"{record.policy} {record.drafter}"),
            _shown(record.throughput, ",.0f"),
            _shown(record.user_p50, ".1f"),
            _shown(record.budget, ".2f"),
            _shown(record.accepted_length, ".2f"),
            _shown(record.wait_p90, ".2f"),
            *([_shown(measured, ",.0f"), _shown(off, "+.0%")] if real else []),
        )
    return drawn


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
