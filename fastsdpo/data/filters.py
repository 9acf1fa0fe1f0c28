"""Rules on which conversations are kept; those of https://arxiv.org/abs/2603.12273 are named presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from fastsdpo.data.interactions import Conversation

if TYPE_CHECKING:
    from fastsdpo.data.ordinary import Ordinary

NO_TIME = "no time given"


@dataclass(frozen=True)
class ConversationFilter:
    """Limits on conversations; None (or 0 for `min_messages`) is no limit.

    Attributes:
        languages: names as the records give them, compared without case. A record that names no
            language is dropped where this is set.
        min_messages: fewest messages, system messages not counted. 3 is the least that can hold an
            interaction.
        max_conversation_chars: most characters over all messages.
        max_assistant_chars, max_user_chars: most characters of any message of that role.
        max_history_messages: how many of the last messages each history keeps, starting with a user's.
        shuffle: puts conversations in random order (by seed), else they stay in the order of the sources.
        max_conversations, max_interactions: stop at this number (with whole conversations).
        enough_conversations, enough_interactions: stop after the conversation with which both numbers are
            reached.
        models: names or patterns (``gpt-4*``), compared without case. A record that names no model is
            dropped where this is set.
        after, before: seconds since 1970. Records from `after` on and earlier than `before` are kept. If one
            of them is set, a record without a time is dropped.
        drop_toxic, drop_redacted: drop records that have this mark (``"toxic": true``), on the record or on a
            message, and records that have no such mark at all, neither true nor false.
            These, `models` and the times are read from `Conversation.facts`, which `prepare` fills.
        published: the data set's name; selects as the code published with the paper does (published.py): white
            space is taken off, and nothing is merged. None: does not.
    """

    languages: tuple[str, ...] | None = None
    min_messages: int = 0
    max_conversation_chars: int | None = None
    max_assistant_chars: int | None = None
    max_user_chars: int | None = None
    max_history_messages: int | None = None
    shuffle: bool = False
    max_conversations: int | None = None
    max_interactions: int | None = None
    enough_conversations: int | None = None
    enough_interactions: int | None = None
    models: tuple[str, ...] | None = None
    after: float | None = None
    before: float | None = None
    drop_toxic: bool = False
    drop_redacted: bool = False
    published: Literal["wildchat", "wildfeedback"] | None = None

    @classmethod
    def preset(cls, name: str) -> ConversationFilter:
        """One of `PRESETS` by name; ValueError lists them."""
        if name not in PRESETS:
            raise ValueError(f"ConversationFilter: name must be one of {', '.join(PRESETS)}, got {name!r}")
        return PRESETS[name]

    @cached_property
    def facts(self) -> tuple[str, ...]:
        """The names of the facts that `reason_to_drop` looks up in `Conversation.facts`."""
        asked = {
            "time": self.after is not None or self.before is not None,
            "model": self.models is not None,
            "toxic": self.drop_toxic,
            "redacted": self.drop_redacted,
        }
        return tuple(name for name, wanted in asked.items() if wanted)

    def is_enough(self, conversations: int, interactions: int) -> bool:
        """Whether these numbers of conversations and interactions are enough, so that reading can stop."""
        if self.max_conversations is not None and conversations >= self.max_conversations:
            return True
        least = (self.enough_conversations, self.enough_interactions)
        return least != (None, None) and conversations >= (least[0] or 0) and interactions >= (least[1] or 0)

    def reason_to_drop(self, conversation: Conversation | Ordinary) -> str | None:
        """Returns the first rule that the conversation breaks, as a short text to count by, or None."""
        if self.facts and (reason := self._reason_in_facts(conversation)) is not None:
            return reason
        if self.languages is not None:
            if conversation.language is None:
                return "no language given"
            if conversation.language.strip().lower() not in {name.lower() for name in self.languages}:
                return "other language"
        messages = conversation.messages
        if self.min_messages and sum(message["role"] != "system" for message in messages) < self.min_messages:
            return f"fewer than {self.min_messages} messages"
        limit = self.max_conversation_chars
        if limit is not None and sum(len(message["content"]) for message in messages) > limit:
            return f"conversation over {limit:,} characters"
        for role, limit in (("assistant", self.max_assistant_chars), ("user", self.max_user_chars)):
            if limit is not None and any(
                message["role"] == role and len(message["content"]) > limit for message in messages
            ):
                return f"{role} message over {limit:,} characters"
        return None

    def _reason_in_facts(self, conversation: Conversation | Ordinary) -> str | None:
        facts = conversation.facts
        for name, wanted in (("toxic", self.drop_toxic), ("redacted", self.drop_redacted)):
            if wanted and facts.get(name) is not False:
                return f"marked {name}" if facts.get(name) else f"no mark {name} given"
        if self.models is not None:
            model = facts.get("model")
            if model is None:
                return "no model given"
            if not any(fnmatchcase(model.lower(), pattern.lower()) for pattern in self.models):
                return "other model"
        if self.after is not None or self.before is not None:
            time = facts.get("time")
            if time is None:
                return NO_TIME
            if self.after is not None and time < self.after:
                return "from before the wanted time"
            if self.before is not None and time >= self.before:
                return "from after the wanted time"
        return None


# The paper's limits, for both of its data sets.
_PAPER = ConversationFilter(
    min_messages=3, max_conversation_chars=100_000, max_assistant_chars=4096, max_history_messages=5
)
_WILDCHAT = replace(_PAPER, languages=("english", "en"), max_user_chars=4096, shuffle=True, max_conversations=15_000)

PRESETS = {
    "wildchat": _WILDCHAT,
    "wildfeedback": _PAPER,
    # For logs of any kind and language: what is too long to train on goes, nothing else does.
    # Whole histories are kept, so that the interactions of a conversation share their prefixes.
    "default": ConversationFilter(
        min_messages=3, max_conversation_chars=100_000, max_assistant_chars=16_384, max_user_chars=16_384, shuffle=True
    ),
    "none": ConversationFilter(),
    # Conversation by conversation what the code published with the paper selects; see docs/paper-data.md.
    "paper-wildchat": replace(
        _WILDCHAT, enough_conversations=14_000, enough_interactions=50_000, published="wildchat"
    ),
    "paper-wildfeedback": replace(_PAPER, published="wildfeedback"),
}
