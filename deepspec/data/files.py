"""Rows of data files: JSONL, JSON arrays, Parquet and Arrow; JSON also compressed; and of the hub.

Parquet, Arrow and the hub give every row the same columns and fill what a row lacks with null, in
nested objects too. Such nulls are dropped, so that a chat template does not see keys that the row
never had.
"""

from __future__ import annotations

import difflib
import glob
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import pyarrow
import pyarrow.parquet

from deepspec.config.schema import DataConfig
from deepspec.errors import DataError, first_line
from deepspec.json_files import beyond, parse_json

Row = dict[str, Any]

COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
FORMATS = (".jsonl", ".json", ".parquet", ".arrow")
# A small compressed file can unpack to more than the memory: what is parsed at once has a limit.
MAX_LINE = 64 * 2**20  # bytes
MAX_ARRAY = 2 * 2**30
# Words for splits in names of files and folders, and the split: as `datasets` reads them.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")  # train_sft-00000-of-00003.parquet


def rows_of(path: str, config: DataConfig, skips: Counter[str]) -> Iterator[tuple[str, Row]]:
    """(where it is, row) of everything at `path`: a file, folder, glob or hub data set.

    Files of other splits than `config.split` are counted in `skips`. Raises DataError for what is
    not there or cannot be read.
    """
    files, others = _find_files(path, config.split)
    if others:
        skips[f"files of other splits than data.split={config.split}"] += others
    if files is None:
        yield from _hub_rows(path, config)
        return
    for file in files:
        for number, row in read_rows(file):
            yield f"{_bare_name(file)}-{number}", row


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line or row number, row) of a file of any known format. Raises DataError naming the file."""
    kind = _format(path)
    if kind == ".parquet":
        yield from _table_rows(path, _parquet_batches)
    elif kind == ".arrow":
        yield from _table_rows(path, _arrow_batches)
    elif kind == ".json" and _first_sign(path) == b"[":
        yield from _array_rows(path)
    else:
        yield from read_jsonl(path)


def read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, row) of each non-empty line. Raises DataError naming file and line."""
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE:
                    raise DataError(
                        f"{path}, line {number}: longer than {MAX_LINE} bytes; write one "
                        "conversation per line"
                    )
                if line.strip():
                    yield number, _row_of(line, path, number)
    except OSError as error:  # the disk's, or a damaged compressed file's
        raise DataError(f"{path}, after line {number}: {error}") from None


def _row_of(line: bytes, path: Path, number: int) -> Row:
    place, first = f"{path}, line {number}", number == 1
    try:
        # some editors put a byte order mark before the first line
        row = parse_json(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg}){_other_format(path)}") from None
    except ValueError as error:
        raise DataError(f"{place}: {beyond(error)}") from None
    if not isinstance(row, dict):
        array = "; one object per line, not one array" if isinstance(row, list) else ""
        raise DataError(f"{place}: expected a JSON object, found {row!r:.60}{array}")
    return row


def _array_rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with _open(path) as stream:
            raw = stream.read(MAX_ARRAY + 1)
        if len(raw) > MAX_ARRAY:
            raise ValueError(f"more than {MAX_ARRAY} bytes; write JSON lines")
        rows = parse_json(raw.decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a JSON array that can be read ({beyond(error)})") from None
    except MemoryError:
        raise DataError(f"{path}: larger than the memory; write JSON lines") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, element {number}: expected an object, found {row!r:.60}")
        yield number, row


def _other_format(path: Path) -> str:
    if _format(path) in FORMATS:
        return ""
    return f"; files are read as {', '.join(FORMATS)}, and others as JSON lines"


def _table_rows(path: Path, batches: Any) -> Iterator[tuple[int, Row]]:
    number = 0
    rows = (row for batch in batches(path) for row in batch.to_pylist())
    try:
        for number, row in enumerate(rows, start=1):
            yield number, without_nulls(row)
    except RecursionError:
        raise DataError(f"{path}, after row {number}: nested too deeply") from None
    # the last two: text that is not UTF-8, and dates beyond those of Python
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}, after row {number}: not a whole {_format(path)[1:]} file "
            f"({first_line(error)})"
        ) from None


def _parquet_batches(path: Path) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches()


def _arrow_batches(path: Path) -> Iterator[Any]:
    """The batches of an Arrow file, or of an Arrow stream, which is what `datasets` writes."""
    with pyarrow.OSFile(str(path)) as source:
        try:
            file = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
            return
        yield from (file.get_batch(index) for index in range(file.num_record_batches))


def without_nulls(value: Any) -> Any:
    """`value` without the keys that are null, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _open(path: Path) -> IO[bytes]:
    compression = COMPRESSION.get(path.suffix)
    if compression is None:
        return path.open("rb")
    stream = pyarrow.input_stream(str(path), compression=compression)
    return cast(IO[bytes], io.BufferedReader(stream))


def _first_sign(path: Path) -> bytes:
    """The first byte after spaces and a byte order mark."""
    try:
        with _open(path) as stream:
            return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except OSError as error:
        raise DataError(f"{path}: {error}") from None


def _format(path: Path) -> str:
    """The suffix of `path` without that of a compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSION else path.suffix


def _bare_name(path: Path) -> str:
    return Path(path.stem).stem if path.suffix in COMPRESSION else path.stem


def is_local(path: str, config: DataConfig) -> bool:
    """Whether `path` is a file, folder or glob; else it can only be a hub name.

    Raises DataError when it looks like a path and there is nothing.
    """
    return _find_files(path, config.split)[0] is not None


def _find_files(path: str, split: str) -> tuple[list[Path] | None, int]:
    """The local files at `path`, and how many of a folder's files belong to other splits."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place], 0
    if place.is_dir():
        return _folder_files(place, path, split)
    if any(mark in path for mark in "*?["):
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True))
        if not files:
            raise DataError(f"data.path={path} matches no file")
        return files, 0
    if place.suffix or path.startswith((".", "/", "~")) or path.count("/") != 1:
        siblings = [str(p) for p in place.parent.glob("*")] if place.parent.is_dir() else []
        near = difflib.get_close_matches(str(place), siblings, n=1)
        instead = (
            f"did you mean {near[0]}?"
            if near
            else "give a file, a folder, a glob, or a hub data set as owner/name"
        )
        raise DataError(f"data.path={path} does not exist; {instead}")
    return None, 0


def _folder_files(folder: Path, name: str, split: str) -> tuple[list[Path], int]:
    found = sorted(path for path in folder.glob("**/*") if path.is_file())
    files = [path for path in found if _format(path) in FORMATS and _format(path) != ".json"]
    # beside others, .json files describe the data; alone, they are the data
    files = files or [path for path in found if _format(path) == ".json"]
    if not files:
        raise DataError(
            f"data.path={name} is a folder without any .jsonl, .json, .parquet or .arrow file"
        )
    splits = {path: split_of(path.relative_to(folder)) for path in files}
    named = sorted({found for found in splits.values() if found is not None})
    wanted = [path for path, found in splits.items() if found in (None, SPLITS.get(split, split))]
    if not wanted:
        raise DataError(
            f"data.path={name} has no file of data.split={split}; its files are of the splits "
            f"{', '.join(named)}"
        )
    return wanted, len(files) - len(wanted)


def split_of(path: Path) -> str | None:
    """The split that is named in a file's name, or else in its folder's; None for neither."""
    shard = SHARD.match(path.name)
    if shard and shard["split"] not in ("data", "part"):
        return SPLITS.get(shard["split"], shard["split"])
    words = chain.from_iterable(re.split(r"[._\-]", part.lower()) for part in path.parts[::-1])
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _hub_rows(name: str, config: DataConfig) -> Iterator[tuple[str, Row]]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()  # progress is shown once, by us
    try:
        rows = load_dataset(name, config.subset, split=config.split, streaming=config.streaming)
    except Exception as error:  # the hub client raises many unrelated kinds
        raise DataError(
            f"data.path={name}: neither a local file nor a data set that the hub gave "
            f"({type(error).__name__}: {first_line(error)}); check "
            "the name, data.split, data.subset and the network, or give a local .jsonl file"
        ) from None
    for index, row in enumerate(rows):
        yield f"{name}-{index}", without_nulls(dict(row))
