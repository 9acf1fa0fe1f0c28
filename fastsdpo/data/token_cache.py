"""A cache of the tokens of data files, in a folder that other processes and other runs share.

A part of the cache is named by what decides the tokens: the files (path, size and time of change), the
tokenizer with its chat template, the template for the follow-up and the limits. The first process that wants a
part makes it, others that want it wait, and all map the same files into memory.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fastsdpo.data.chat_template import reads_clock
from fastsdpo.data.columns import ColumnFiles, MappedColumns
from fastsdpo.data.locks import locked

logger = logging.getLogger("fastsdpo.data")

FORMAT = 2  # of the files, and of what the tokenizer makes of a text
LARGE = 32 << 20  # bytes of data files from which on their tokens are kept, unless told
ABOUT = "about.json"


def default_folder() -> Path:
    """Returns ``$FASTSDPO_CACHE/tokens``, or else ``fastsdpo/tokens`` in the user's cache folder."""
    own = os.environ.get("FASTSDPO_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsdpo") / "tokens"


def cache_folder(setting: str | None, files: list[Path]) -> Path | None:
    """Returns the folder for the tokens of the files, or None if they are not to be kept.

    Args:
        setting: a folder; ``"auto"`` is `default_folder` for files of `LARGE` bytes or more; None keeps nothing.
    """
    if setting == "auto":
        return default_folder() if size_of(files) >= LARGE else None
    return None if setting is None else Path(setting)


def size_of(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def token_key(files: list[Path], tokenizer: Any, template: str, options: Mapping[str, Any]) -> str | None:
    """Names the tokens of these files with this tokenizer; None if no name can tell them apart for certain.

    That is the case for a tokenizer written in Python, for options that JSON cannot hold, and for a chat template
    that reads the clock.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    if options.get("chat_template_date") is None and reads_clock(tokenizer, options.get("chat_template_kwargs")):
        return None
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):  # of the last call
        backend.pop(name, None)
    status = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    parts = [FORMAT, status, backend, str(tokenizer.chat_template), special, template, dict(options)]
    try:
        text = json.dumps(parts, sort_keys=True)
    except TypeError:
        return None
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def cached_columns(
    folder: Path, key: str, make: Callable[[ColumnFiles], dict[str, Any]]
) -> tuple[MappedColumns, dict[str, Any]]:
    """Returns the part of the cache with this name, and the dict kept beside it. If it is missing, it is made.

    Args:
        folder: the cache's folder.
        key: the part's name, from `token_key`.
        make: writes the columns, and returns the dict to keep beside them, in types of JSON.

    Raises:
        OSError: the part cannot be written; the text names the folder.
    """
    place = folder / key
    if (found := _read(place)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{key}.lock", wait=True):
            if (found := _read(place)) is not None:  # another process made it
                return found
            partial = folder / f"{key}.partial"
            for old in (partial, place):
                shutil.rmtree(old, ignore_errors=True)
            partial.mkdir()
            try:
                with ColumnFiles(partial) as files:
                    about = make(files)
                sizes = {path.name: path.stat().st_size for path in partial.glob("*.bin")}
                text = json.dumps({"sizes": sizes, "about": about}, ensure_ascii=True)
                (partial / ABOUT).write_text(text, "utf-8")
                os.replace(partial, place)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise OSError(
            f"the tokens cannot be kept in {folder}: {error}; another folder: token_cache (--token-cache FOLDER), "
            "none: token_cache=None (--token-cache none)"
        ) from error
    found = _read(place)
    assert found is not None
    return found


def _read(place: Path) -> tuple[MappedColumns, dict[str, Any]] | None:
    """A part of the cache, or None where it is not there whole."""
    try:
        kept = json.loads((place / ABOUT).read_text("utf-8"))
        sizes = {path.name: path.stat().st_size for path in place.glob("*.bin")}
        if sizes != kept["sizes"]:
            raise ValueError("a file has another size than was written")
        return MappedColumns(place), kept["about"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the tokens in %s are damaged and are made again: %s", place, error)
        return None
