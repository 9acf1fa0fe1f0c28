"""Splits a prompt that a chat template has rendered into its messages, by the template's control tokens."""

from __future__ import annotations

import re
from typing import Any

# Of each frame: the start of a message with its role, and what ends one.
_FRAMES = (
    (re.compile(r"<\|im_start\|>(\w{1,20})\n"), ("<|im_end|>",)),  # ChatML: Qwen, SmolLM, ...
    (re.compile(r"<\|start_header_id\|>(\w{1,20})<\|end_header_id\|>\n\n"), ("<|eot_id|>", "<|eom_id|>")),  # Llama 3
    (re.compile(r"<start_of_turn>(\w{1,20})\n"), ("<end_of_turn>",)),  # Gemma
)


def read_frames(text: Any) -> list[dict[str, Any]]:
    """Returns the messages of a rendered prompt, without the open header at its end; [] if its template is unknown."""
    if not isinstance(text, str):
        return []
    for start, ends in _FRAMES:
        found = list(start.finditer(text))
        if not found:
            continue
        messages = []
        for match, after in zip(found, [m.start() for m in found[1:]] + [len(text)]):
            said = text[match.end() : after]
            end = min((place for place in map(said.find, ends) if place >= 0), default=None)
            if end is not None:
                messages.append({"role": match[1], "content": said[:end]})
        return messages
    return []
