"""Cuts a text to the longest start or end that fits into a number of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal


def cut(text: str, encode: Callable[[str], list[int]], limit: int | None, keep: Literal["start", "end"]) -> str:
    """Returns the longest start or end of `text`, in whole words if possible, that has at most `limit` token ids.

    Args:
        encode: text -> token ids.
        limit: the most tokens; None: the whole text.
        keep: which end of the text stays.
    """

    def piece(size: int) -> str:
        return text[:size] if keep == "start" else text[len(text) - size :]

    if limit is None:
        return text
    # Doubling first, so that no more than twice of what fits is encoded, whatever the size.
    fits, size = 0, min(len(text), limit)
    while len(encode(piece(size))) <= limit:
        fits = size
        if size == len(text):
            return text
        size = min(2 * size, len(text))
    while size - fits > 1:
        middle = (fits + size) // 2
        if len(encode(piece(middle))) <= limit:
            fits = middle
        else:
            size = middle
    # Where that is inside a word: the whole word if it fits after all (a part of a word can
    # take more tokens than the word), else without it.
    beside, kept = (text, text[:fits]) if keep == "start" else (text[::-1], text[::-1][:fits])
    rest = re.match(r"\S{1,32}(?!\S)", beside[fits:])
    part = re.search(r"\S{1,32}$", kept)
    if rest and part:
        for size in (fits + rest.end(), part.start()):
            if piece(size).strip() and len(encode(piece(size))) <= limit:
                return piece(size)
    return piece(fits)
