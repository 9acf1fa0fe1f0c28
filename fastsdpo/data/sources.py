"""Sources of records: files, folders, globs and datasets."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from fastsdpo.data.json_records import COMPRESSIONS, json_records
from fastsdpo.data.readers.registry import RecordParser
from fastsdpo.data.readers.tables import RowStore, group_rows
from fastsdpo.data.records import Entry, LoadReport, Problem
from fastsdpo.data.text_records import TABLE_SUFFIXES, is_vllm_log, table_records, vllm_log_records
from fastsdpo.lazy import needed

logger = logging.getLogger("fastsdpo.data")

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TRIED_RECORDS = 1000  # to find one that is not damaged
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, ".parquet")


def is_data(path: Path) -> bool:
    """Whether the path's ending is that of a file that `read_records` reads."""
    return _suffix(path) in SUFFIXES


def is_table(path: Path) -> bool:
    """Whether the path's ending is that of a table in text form (CSV, TSV)."""
    return _suffix(path) in TABLE_SUFFIXES


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def _is_report(path: Path) -> bool:
    """Whether it is what `prepare` wrote beside a file of interactions or prompts."""
    name = path.name.removesuffix(".report.json")
    return name != path.name and any(path.with_name(name + suffix).exists() for suffix in JSON_SUFFIXES)


def name_outputs(output: Path, eval_output: str | PathLike | None, holds_out: bool) -> list[Path]:
    """The files of JSON Lines to write: the output, and where rows are held out, theirs.

    Raises:
        ValueError: two have one name; one is a folder, pipe or device, or would, by its name, be read as
            something else.
    """
    held_out = Path(eval_output or output.with_name(f"{output.stem}.eval{output.suffix}"))
    outputs = [output, held_out] if holds_out else [output]
    if holds_out and output.absolute() == held_out.absolute():
        raise ValueError(f"prepare: eval_output must differ from output, got {output} for both")
    for path in outputs:
        if path.exists() and not path.is_file():
            raise ValueError(f"prepare: output must be a file, got {path}, which is a folder, pipe or device")
        if path.suffix.lower() in (*COMPRESSIONS, *TABLE_SUFFIXES, ".parquet"):
            raise ValueError(f"prepare: output must have the name of a JSON Lines file (.jsonl), got {path}")
    return outputs


def expand_source(source: str | PathLike | Iterable[str | PathLike]) -> list[Path | str]:
    """Lists the files (as Path, in a fixed order) and dataset names (as str) that a source stands for."""
    if not isinstance(source, (str, PathLike)):
        return [item for part in source for item in expand_source(part)]
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_info.json").exists() and (path / "state.json").exists():
            return [path]
        found = (file for file in path.rglob("*") if file.is_file() and is_data(file))
        files = sorted(file for file in found if not file.name.startswith(".") and not _is_report(file))
        if not files:
            raise FileNotFoundError(f"folder {path} holds no file that ends in {', '.join(SUFFIXES)}")
        others = sorted(f.name for f in path.rglob("*") if f.is_file() and not is_data(f) and f.name[0] != ".")
        if others:
            logger.warning(
                "folder %s: %d files are not read, since they do not end in %s: %s",
                *(path, len(others), ", ".join(SUFFIXES), ", ".join(others[:5]) + (", ..." if others[5:] else "")),
            )
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


def read_sources(
    items: Sequence[Path | str],
    report: LoadReport,
    config: str | None,
    split: str,
    max_record_bytes: int,
    columns: Collection[str] = (),
    parser: RecordParser | None = None,
) -> Iterator[Entry]:
    """Yields the entries of files and datasets, one after another. The report tells how far reading is.

    Args:
        items: the result of `expand_source`.
        config, split: the configuration and split of a Hugging Face dataset.
        max_record_bytes: a longer JSON record is a problem.
        columns: which columns to read from tables like Parquet, beside those of the known layouts.
        parser: the parser of the records. It knows which columns it needs, and whether a row is one message, so
            that the rows of a conversation become one record. None: each row is a record.
    """
    sizes = [item.stat().st_size if isinstance(item, Path) else 0 for item in items]
    if all(isinstance(item, Path) and item.is_file() for item in items):
        report.bytes_total = sum(sizes)
    parser_of_rows = RecordParser() if parser is None else parser
    with RowStore(parser_of_rows) as store:
        for number, item in enumerate(items):
            report.source = number
            before = sum(sizes[:number])

            def progress(done: int, before: int = before) -> None:
                report.bytes_done = before + done

            if isinstance(item, str) or item.is_dir():
                entries = dataset_records(item, config, split)
            else:
                entries = _file_records(item, progress, max_record_bytes, columns, parser_of_rows)
            yield from entries if parser is None else group_rows(entries, parser.row_key, store)
            report.bytes_done = before + sizes[number]
        yield from store.conversations()


def _file_records(
    path: Path, progress: Callable[[int], None], max_record_bytes: int, columns: Collection[str], parser: RecordParser
) -> Iterator[Entry]:
    if _suffix(path) == ".parquet":
        return _parquet_records(path, progress, parser, columns)
    if is_table(path):
        return table_records(path, progress, max_record_bytes)
    if is_vllm_log(path):
        return vllm_log_records(path, progress)
    return json_records(path, progress, max_record_bytes)


def may_have_rows(item: Path | str, parser: RecordParser, max_record_bytes: int) -> bool:
    """Whether the first record of a file is one message of a conversation, or lies behind too many damaged ones."""
    if not isinstance(item, Path) or not item.is_file():
        return False
    entries = _file_records(item, lambda done: None, max_record_bytes, (), parser)
    for tried, entry in enumerate(entries):
        if entry.problem is None or tried == TRIED_RECORDS:
            return entry.problem is not None or parser.row_key(entry.record) is not None
    return False


def dataset_records(name: str | Path, config: str | None, split: str, shard: int | None = None) -> Iterator[Entry]:
    """Yields the records of a Hugging Face dataset, or of one of its shards (the files in which it is stored)."""
    rows = _open_dataset(name, config, split)
    count = _count_shards(rows)
    for number in range(count) if shard is None else (shard,):
        part = rows.shard(num_shards=count, index=number) if count > 1 else rows
        place = f"{name}[{split}]" + (f" shard {number}" if count > 1 else "")
        for row, record in enumerate(part):
            yield Entry(f"{place} row {row}", record)


def separate_shards(name: str | Path, config: str | None, split: str, parser: RecordParser) -> int:
    """Returns how many shards of a dataset can be read separately; 1 if a row is one message of a conversation."""
    rows = _open_dataset(name, config, split)
    count = _count_shards(rows)
    first = next(iter(rows), None) if count > 1 else None
    return 1 if first is None or parser.row_key(first) is not None else count


def _count_shards(rows: Any) -> int:
    return getattr(rows, "num_shards", 1)  # those of a stream


def _open_dataset(name: str | Path, config: str | None, split: str) -> Any:
    with needed("datasets", f"{str(name)!r} is not a file, and to read it as a Hugging Face dataset"):
        import datasets
    if isinstance(name, Path):
        rows = datasets.load_from_disk(str(name))
        return rows[split] if isinstance(rows, dict) else rows
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # of many libraries: hub, HTTP, parsing
        raise FileNotFoundError(
            f"{name!r} is neither a file nor a dataset that can be loaded: {type(error).__name__}: {error}"
        ) from error


def _parquet_records(
    path: Path, progress: Callable[[int], None], parser: RecordParser, more: Collection[str]
) -> Iterator[Entry]:
    with needed("pyarrow", path):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        yield Entry(str(path), None, Problem("damaged file", f"not a whole Parquet file: {error}", records=0))
        return
    with file:
        columns = parser.columns(file.schema_arrow.names, more)
        total, row = max(1, file.metadata.num_rows), 0
        size = path.stat().st_size
        for group in range(file.metadata.num_row_groups):
            end = row + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(64, row_groups=[group], columns=columns):
                    for record in batch.to_pylist(maps_as_pydicts="lossy"):
                        yield Entry(f"{path} row {row}", record)
                        row += 1
                    progress(size * row // total)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                text = f"rows {row} to {end - 1} cannot be read: {error}"
                yield Entry(f"{path} row {row}", None, Problem("damaged file", text, records=end - row))
                row = end
