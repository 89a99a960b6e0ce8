"""Reread a store of features whole, against its checksums.

Exits with 2 and names the shards when one is bad or samples are missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from deepspec.streams import show

SETTINGS = "path=DIR, the store"
EXAMPLES = """\
  deepspec verify-store path=features
"""
HAS_CONFIG = False


def run(settings: Sequence[str], options: argparse.Namespace) -> None:
    """Check every shard, and that all samples are there."""
    from pathlib import Path

    from deepspec.commands.settings import take
    from deepspec.errors import ConfigError, DataError
    from deepspec.features.store import Store
    from deepspec.progress import track

    values, others = take(settings, "path")
    if others or "path" not in values:
        raise ConfigError("deepspec verify-store takes path=DIR, the store, and nothing else")
    store = Store.open(Path(values["path"]).expanduser())
    bad = []
    for shard in track(store.finished(), "verify", len(store.finished()), "shards"):
        try:
            store.verify(shard)
        except DataError as error:
            bad.append(str(error))
    if bad:
        raise DataError("; ".join(bad))
    store.require_complete()
    header = store.header
    finals = "of all tokens" if header.all_finals else "where a supervised token follows"
    whole = header.conversations is not None
    written = (
        "all as they were written" if whole else "all that has a checksum is as it was written"
    )
    show(
        f"{store.path}: {len(store)} samples of {header.target} in {len(store.finished())} shards, "
        f"{header.dtype}, at most {header.bytes_a_token} bytes a token, final states {finals}; "
        f"{written}"
    )
