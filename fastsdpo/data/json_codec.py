"""Reads and writes JSON, by orjson if it is installed; values and bytes are the same without it.

Numbers have 64 bits in both libraries: a longer integer is read as a float. Either library writes texts; only
Python's writes all else, since the two spell floats differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

try:
    import orjson
except ImportError:
    orjson = None


def _integer(digits: str) -> int | float:
    value = int(digits)
    return value if -(1 << 63) <= value < 1 << 64 else float(digits)


DECODER = json.JSONDecoder(parse_int=_integer)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _encode_message(message: dict[str, str]) -> bytes:
    return _encode(message).encode()


# A message, that is a dict of valid texts. orjson writes no other types here, so that both write the same.
encode_message: Callable[[Any], bytes] = _encode_message if orjson is None else orjson.dumps


def encode(value: Any) -> bytes:
    """Returns a value as UTF-8 JSON without spaces; text that is not valid Unicode becomes question marks."""
    if type(value) is str and value.isascii():
        return encode_message(value)
    return _encode(value).encode(errors="replace")


def _decode(data: bytes) -> Any:
    try:
        return DECODER.decode(data.decode())
    except RecursionError as error:
        raise ValueError("nested too deep") from error


# The value of a text in UTF-8. A ValueError where there is none, or it is not one for a fast parser; whoever catches
# it asks `DECODER`, which takes more (lone surrogates, numbers without end) and says why.
decode: Callable[[bytes], Any] = _decode if orjson is None else orjson.loads
