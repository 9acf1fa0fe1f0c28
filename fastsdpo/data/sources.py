"""Sources of records: files, folders, globs and datasets."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from fastsdpo.data.interactions import SYSTEM_KEYS
from fastsdpo.data.json_records import COMPRESSIONS, json_events
from fastsdpo.data.layouts import CONVERSATION_ID_KEYS, INTERACTION_KEYS, MESSAGE_KEYS, RECORD_ID_KEYS
from fastsdpo.data.records import Event, LoadReport, Problem

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")


def is_data(path: Path) -> bool:
    """Whether the ending is that of a file that `read_records` reads."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return name.suffix in SUFFIXES


def expand_source(source: str | PathLike | Iterable[str | PathLike]) -> list[Path | str]:
    """Files (as Path, in a fixed order) and dataset names (as str) that a source stands for."""
    if not isinstance(source, (str, PathLike)):
        return [item for part in source for item in expand_source(part)]
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_info.json").exists() and (path / "state.json").exists():
            return [path]
        found = (file for file in path.rglob("*") if file.is_file() and is_data(file))
        files = sorted(file for file in found if not file.name.startswith("."))
        if not files:
            raise FileNotFoundError(f"folder {path} holds no file that ends in {', '.join(SUFFIXES)}")
        return list(files)
    if path.exists():
        return [path]
    text = str(source)
    if any(character in text for character in "*?["):
        files = sorted(Path(name) for name in glob.glob(text, recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise FileNotFoundError(f"no file matches {text}")
        return list(files)
    is_name = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text)
    if is_name and path.suffix not in (*SUFFIXES, *COMPRESSIONS):
        return [text]
    raise FileNotFoundError(f"no such file: {text}")


def events(
    source: Any,
    report: LoadReport | None,
    config: str | None,
    split: str,
    max_record_bytes: int,
    position: dict | None,
) -> Iterator[Event]:
    """The events of all sources; each position also says which source it is in."""
    items = expand_source(source)
    sizes = [item.stat().st_size if isinstance(item, Path) else 0 for item in items]
    report = LoadReport() if report is None else report
    if all(isinstance(item, Path) and item.is_file() for item in items):
        report.bytes_total = sum(sizes)
    first = 0 if position is None else position["source"]

    def stream() -> Iterator[Event]:
        for number, item in enumerate(items[first:], first):
            start = None if position is None or number > first else position["inside"]
            before = sum(sizes[:number])

            def progress(done: int, before: int = before) -> None:
                report.bytes_done = before + done

            if isinstance(item, str) or item.is_dir():
                events = _dataset_events(item, config, split, start)
            elif item.suffix == ".parquet":
                events = _parquet_events(item, progress, start)
            else:
                events = json_events(item, progress, start, max_record_bytes)
            for where, record, problem, inside in events:
                yield where, record, problem, {"source": number, "inside": inside}
            report.bytes_done = before + sizes[number]

    return stream()


def _dataset_events(name: str | Path, config: str | None, split: str, start: dict | None) -> Iterator[Event]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{str(name)!r} is not a file, and to read it as a Hugging Face "
            "dataset needs the package datasets; install it with: pip install datasets"
        ) from error
    if isinstance(name, Path):
        rows = datasets.load_from_disk(str(name))
        rows = rows[split] if isinstance(rows, dict) else rows
    else:
        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
        except Exception as error:  # of many libraries: hub, HTTP, parsing
            raise FileNotFoundError(
                f"{name!r} is neither a file nor a dataset that can be loaded: {type(error).__name__}: {error}"
            ) from error
    first = 0 if start is None else start["row"]
    for row, record in enumerate(rows.skip(first), first):
        yield f"{name}[{split}] row {row}", record, None, {"row": row + 1}


def _parquet_events(path: Path, progress: Callable[[int], None], start: dict | None) -> Iterator[Event]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{path} needs the package pyarrow; install it with: pip install pyarrow") from error
    first = 0 if start is None else start["row"]
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        problem = Problem("damaged file", f"not a whole Parquet file: {error}", records=0)
        if first == 0:
            yield str(path), None, problem, {"row": 1}
        return
    with file:
        wanted = {
            *MESSAGE_KEYS,
            *INTERACTION_KEYS,
            *SYSTEM_KEYS,
            *CONVERSATION_ID_KEYS,
            *RECORD_ID_KEYS,
            "language",
        }
        columns = [name for name in file.schema_arrow.names if name in wanted]
        total, row = max(1, file.metadata.num_rows), 0
        size = path.stat().st_size
        for group in range(file.metadata.num_row_groups):
            end = row + file.metadata.row_group(group).num_rows
            if end <= first:
                row = end
                continue
            try:
                for batch in file.iter_batches(64, row_groups=[group], columns=columns):
                    for record in batch.to_pylist():
                        if row >= first:
                            yield f"{path} row {row}", record, None, {"row": row + 1}
                        row += 1
                    progress(size * row // total)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                text = f"rows {row} to {end - 1} cannot be read: {error}"
                problem = Problem("damaged file", text, records=end - row)
                yield f"{path} row {row}", None, problem, {"row": end}
                row = end
