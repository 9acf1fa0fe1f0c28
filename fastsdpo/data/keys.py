"""61-bit keys of messages and histories: what is equal, and which history begins another.

The key of a history is a polynomial in the hashes of its messages, so that one more message costs
a multiplication. Two histories are equal where their keys are, and one begins another where its key
is among those of the other's beginnings. White space around a message's text makes no difference:
most chat templates take it off. Keys are the same in every process. Some two of ten million
different texts have the same key with a probability of about 2 in 100,000.
"""

from __future__ import annotations

from hashlib import blake2b

PRIME = (1 << 61) - 1
FACTOR = 0x9E3779B97F4A7C15 % PRIME


class TextKeys(dict):
    """``keys[text]``: the key of a text; each is hashed once."""

    def __init__(self):
        super().__init__(ROLE_KEYS)

    def __missing__(self, text: str) -> int:
        data = text.strip().encode(errors="surrogatepass")
        key = int.from_bytes(blake2b(data, digest_size=8).digest(), "little") % PRIME
        self[text] = key
        return key


def extend(history: int, role: int, content: int) -> int:
    """The key of a history (0: an empty one) with one more message, from the keys of its texts."""
    return (history * FACTOR + 3 * role + content) % PRIME


ROLE_KEYS: dict[str, int] = {}
ROLE_KEYS.update({role: TextKeys()[role] for role in ("system", "user", "assistant", "tool")})
