"""61-bit keys of messages and histories: what is equal, and which history begins another.

The key of a history is a polynomial in the hashes of its messages, so that one more message costs
a multiplication. Two histories are equal where their keys are, and one begins another where its key
is among those of the other's beginnings. White space around a message's text makes no difference:
most chat templates take it off. Some two of ten million different texts have the same key with a
probability of about 2 in 100,000.

`TextKeys` are the same in every process. `RunKeys` are made several times as fast by Python's own hash
(SipHash with a key of the process), and are the same in processes with the same PYTHONHASHSEED only.
"""

from __future__ import annotations

import sys
from hashlib import blake2b

PRIME = (1 << 61) - 1
FACTOR = 0x9E3779B97F4A7C15 % PRIME


def _stable_hash(text: str) -> int:
    data = text.encode(errors="surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


_is_strong = sys.hash_info.width == 64 and sys.hash_info.algorithm.startswith("siphash")
run_hash = hash if _is_strong else _stable_hash


class TextKeys(dict):
    """``keys[text]``: the key of a text; each is hashed once."""

    def __missing__(self, text: str) -> int:
        key = self[text] = _stable_hash(text.strip()) % PRIME
        return key


class RunKeys(dict):
    """`TextKeys` for a run of `prepare`."""

    def __missing__(self, text: str) -> int:
        key = self[text] = run_hash(text.strip()) % PRIME
        return key


def extend(history: int, role: int, content: int) -> int:
    """The key of a history (0: an empty one) with one more message, from the keys of its texts."""
    return (history * FACTOR + 3 * role + content) % PRIME


ROLE_KEYS = TextKeys()  # by the name of a role
