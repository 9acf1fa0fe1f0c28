"""Templates by which the user's follow-up o enters the context: as text at the end of the last user message.

It stands at the end so that the contexts of student and teacher, x and (x, o), agree on everything before
it. What they share can then be computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastsdpo.data.interactions import is_blank, message_text

# Wire formats. offline-v1 and online-v1: the code published with https://arxiv.org/abs/2603.12273;
# paper-table1: that paper's Table 1 (its white space is not given). note is the wording that
# SmolLM2-135M-Instruct follows best: a small model repeats a longer frame, or overlooks what is in it.
PRESETS = {
    "offline-v1": (
        "\n\n[HINDSIGHT CONTEXT]\n"
        "The following is a user response to your previous, insufficient attempt. "
        "Improve your response to the user prompt.\n"
        "Future User Message: {o}"
    ),
    "online-v1": (
        "\n\n=== HINDSIGHT CONTEXT ===\n"
        "[The following is a future user message. "
        "Use this to guide your answer to the user prompt.]\n{o}"
    ),
    "paper-table1": (
        "\n\n<hindsight context> The following is a future user message. "
        "Use this to guide your answer to the user prompt: {o}"
    ),
    "note": "\n\nNote: {o}",
}

AUTO = "auto"  # the default of every command: by the size of the model
SMALL_MODEL = 10**9  # weights


def choose_template(template: str, weights: int) -> str:
    """Resolves the template "auto": "note" for a model of fewer than a billion weights, else "online-v1".

    Any other template is returned as it is. Training, online training, chat and `signal` follow this one rule, so
    that what is shown is what is trained on.

    Of the published wordings online-v1 is the one that also fits a content user: offline-v1 calls every
    answer insufficient.
    """
    if template != AUTO:
        return template
    return "note" if weights < SMALL_MODEL else "online-v1"


@dataclass(frozen=True)
class HindsightTemplate:
    """The text that is appended to the last user message, with ``{o}`` where the follow-up goes.

    ``HindsightTemplate("\\n\\nThe user will say: {o}")`` is a template of your own,
    ``HindsightTemplate.preset("offline-v1")`` a named one. The follow-up is stripped of white
    space around it and put in as it is: braces in it (or elsewhere in the text) mean nothing.

    Raises:
        TypeError: text is not a string.
        ValueError: text does not contain ``{o}`` exactly once.
    """

    text: str

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise TypeError(f"HindsightTemplate: text must be a string, got {type(self.text).__name__}")
        if self.text.count("{o}") != 1:
            raise ValueError(f"HindsightTemplate: text must contain {{o}} exactly once, got {self.text!r}")

    @classmethod
    def preset(cls, name: str) -> HindsightTemplate:
        """One of `PRESETS` by name; ValueError lists them."""
        if name not in PRESETS:
            raise ValueError(f"HindsightTemplate: name must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(PRESETS[name])

    @classmethod
    def parse(cls, name_or_text: str) -> HindsightTemplate:
        """Makes a template from a text with ``{o}``, or else from a preset's name; for command lines and configs."""
        if "{o}" not in name_or_text and name_or_text not in PRESETS:
            raise ValueError(
                f"HindsightTemplate: name must be one of {', '.join(PRESETS)}, or a text with {{o}}, "
                f"got {name_or_text!r}"
            )
        return cls(name_or_text) if "{o}" in name_or_text else cls.preset(name_or_text)

    def render(self, followup: str) -> str:
        """Returns the text to append to the last user message for this follow-up."""
        if not isinstance(followup, str) or is_blank(followup):
            raise ValueError(f"HindsightTemplate: followup must be text that is not blank, got {followup!r}")
        before, after = self.text.split("{o}")
        return before + followup.strip() + after

    def apply(self, prompt: Sequence[Mapping], followup: str) -> list[dict]:
        """Returns (x, o): a copy of the messages, in which the last, the user's, ends with the rendered text.

        A content that is a list of text parts becomes one text.

        Raises:
            TypeError: the last message's content has a part that is not text.
            ValueError: the last message is not a user's, or the follow-up is blank.
        """
        if not prompt or prompt[-1].get("role") != "user":
            raise ValueError("HindsightTemplate: prompt must end with a user's message")
        messages = [dict(message) for message in prompt]
        messages[-1]["content"] = message_text(messages[-1]["content"]) + self.render(followup)
        return messages
