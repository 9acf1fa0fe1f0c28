"""61-bit keys of messages and histories, by which equal ones are found, and histories that begin others.

The key of a history is a polynomial in the hashes of its messages, so that one more message costs
a multiplication. Two histories are equal where their keys are, and one begins another where its key
is among those of the other's beginnings. White space around a message's text makes no difference:
most chat templates take it off. Among ten million different texts, the probability that any two have the
same key is about 2 in 100,000.

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
    """A cache of text keys: ``keys[text]`` is the 61-bit key of a text, and each text is hashed once."""

    def __missing__(self, text: str) -> int:
        key = self[text] = _stable_hash(text.strip()) % PRIME
        return key


class RunKeys(dict):
    """Faster `TextKeys` for one run of `prepare`; other runs have other keys."""

    def __missing__(self, text: str) -> int:
        key = self[text] = run_hash(text.strip()) % PRIME
        return key


def extend(history: int, role: int, content: int) -> int:
    """Returns the key of a history with one more message.

    Args:
        history: the key of the history; 0 for an empty one.
        role, content: the keys of the message's two texts.
    """
    return (history * FACTOR + 3 * role + content) % PRIME


ROLE_KEYS = TextKeys()  # by the name of a role
