"""Turns tokens into text that can be displayed.

Two things stand between token ids and a display. A character may take several tokens (byte-level
BPE cuts emoji and many scripts inside a character), so tokens are grouped until they make whole
characters. And text from data may hold characters that are invisible, move the cursor or reorder
the line, so `visible` replaces those.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenGroup:
    """Tokens ``start`` to ``end - 1`` of the completion, which make up `text`.

    `special` marks a control token, such as the one that ends the turn.
    """

    text: str
    start: int
    end: int
    special: bool = False

    def value(self, per_token: Sequence[float]) -> float:
        """Sums a per-token log-ratio over the group; by the chain rule that is the group's own log-ratio, in nats."""
        return sum(per_token[self.start : self.end])


def group_tokens(tokenizer: Any, token_ids: Sequence[int]) -> list[TokenGroup]:
    """Splits the ids into the smallest runs of tokens that decode to whole characters.

    The texts of the groups, put together, are the decoded completion. Marks that belong to the
    character before them (accents, emoji modifiers, what a zero-width joiner joins) stay with it.
    """
    special = set(tokenizer.all_special_ids)
    groups: list[TokenGroup] = []
    start = 0
    for end in range(1, len(token_ids) + 1):
        # Special tokens end a run on both sides: they decode apart from their neighbours.
        if end < len(token_ids) and (token_ids[end] in special) == (token_ids[start] in special):
            continue
        run = token_ids[start:end]
        if token_ids[start] in special:
            for index, token_id in enumerate(run, start):
                text = str(tokenizer.convert_ids_to_tokens(token_id))
                groups.append(TokenGroup(text, index, index + 1, special=True))
        else:
            groups += _group_run(tokenizer, run, start)
        start = end
    return groups


def _group_run(tokenizer: Any, ids: Sequence[int], offset: int) -> list[TokenGroup]:
    """`group_tokens` for ordinary tokens; `offset` is the index of the first one.

    A run of tokens is whole when its text is how the rest of the full text goes on: tokens that end
    inside a character decode to a replacement character there instead. Each piece is decoded
    together with the group before it, since decoders drop a space at the very start.
    """

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False)

    full = decode(0, len(ids))
    groups: list[TokenGroup] = []
    position = before = start = 0  # characters done; start of the group before; of this group
    for end in range(1, len(ids) + 1):
        text = decode(before, end)[len(decode(before, start)) :]
        if end == len(ids):
            text = full[position:]
        elif not full.startswith(text, position) or not (text or groups):
            continue  # inside a character, or a space that the decoder drops at the start
        previous = groups[-1] if groups else None
        if previous is not None and _belongs(previous.text, text):
            groups[-1] = TokenGroup(previous.text + text, previous.start, offset + end)
        else:
            groups.append(TokenGroup(text, offset + start, offset + end))
            before = start
        position += len(text)
        start = end
    return groups


def _belongs(previous: str, text: str) -> bool:
    """Whether `text` goes on with the character that `previous` ends with."""
    if not text:
        return True
    first = text[0]
    if unicodedata.category(first) in ("Mn", "Me", "Mc") or first == "\u200d":
        return True
    if previous.endswith("\u200d") or "\U0001f3fb" <= first <= "\U0001f3ff":
        return True
    if _is_regional(first):  # flags are pairs of regional indicators
        flags = len(previous) - len(previous.rstrip("".join(map(chr, _REGIONAL))))
        return flags % 2 == 1
    return False


_REGIONAL = range(0x1F1E6, 0x1F200)


def _is_regional(character: str) -> bool:
    return ord(character) in _REGIONAL


# Explicit direction controls: they would reorder what follows them on the line.
_DIRECTION = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def visible(text: str, marks: bool = True) -> str:
    """Replaces characters that are invisible, move the cursor or reorder the line.

    Control characters become their pictures (``␛``). Direction overrides, and text that would not
    show at all, become their code points. With `marks`, a newline becomes ``↵`` and the newline, a
    tab becomes ``→`` and the tab, and a text of spaces alone becomes dots.
    """
    if marks and text and not text.strip(" "):
        return "·" * len(text)
    shown = []
    for character in text:
        code = ord(character)
        if character == "\n":
            shown.append("↵\n" if marks else "\n")
        elif character == "\t":
            shown.append("→\t" if marks else "\t")
        elif code < 0x20:
            shown.append(chr(0x2400 + code))
        elif code == 0x7F:
            shown.append("␡")
        elif 0x80 <= code < 0xA0 or code in _DIRECTION or 0xD800 <= code < 0xE000:
            shown.append(f"⟨U+{code:04X}⟩")
        elif character in "\u2028\u2029":
            shown.append(f"⟨U+{code:04X}⟩\n")
        else:
            shown.append(character)
    if shown and all(len(s) == 1 and unicodedata.category(s) in ("Cf", "Zs") for s in shown):
        return "".join(s if s == " " else f"⟨U+{ord(s):04X}⟩" for s in shown)
    return "".join(shown)
