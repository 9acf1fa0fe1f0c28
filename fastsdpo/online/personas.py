"""Named users: the five profiles that https://arxiv.org/abs/2603.12273 describes in full.

The wishes are the paper's, the wording is this package's. ``@FILE`` takes another wording from a file.
"""

from __future__ import annotations

from pathlib import Path

PERSONAS = {
    "no-emojis": "You want answers without emojis and icons. Everything else about an answer is fine with you.",
    "no-filler-praise": (
        "You want answers that begin with what was asked for and end there. Praise at the start ('Great question!') "
        "and closing phrases at the end ('I hope this helps!') bother you."
    ),
    "direct": (
        "You want short answers in plain text that come to the point at once. Long lists, headings and bold "
        "text bother you."
    ),
    "concise-casual-beginner": (
        "You are new to the topic. You want brief answers in a relaxed tone and in simple words. Long, formal or "
        "technical answers bother you."
    ),
    "detailed-professional-expert": (
        "You are an expert. You want detailed, well structured and analytical answers in a professional, impersonal "
        "tone and with precise terms. Brief or casual answers bother you."
    ),
}


def read_persona(given: str) -> str:
    """Returns a persona's text: of a name in `PERSONAS`, of the file in ``@FILE``, or the given text itself."""
    if given.startswith("@"):
        return Path(given[1:]).read_text("utf-8-sig").strip()
    return PERSONAS.get(given, given)
