"""Which conversations are kept: the rules of https://arxiv.org/abs/2603.12273 as named presets."""

from __future__ import annotations

from dataclasses import dataclass

from fastsdpo.data.interactions import Conversation


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
        max_history_messages: of each history, the last so many messages, starting with a user's.
        shuffle: conversations in random order (by seed), else in the order of the sources.
        max_conversations, max_interactions: stop there (with whole conversations).
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

    @classmethod
    def preset(cls, name: str) -> ConversationFilter:
        """One of `PRESETS` by name; ValueError lists them."""
        if name not in PRESETS:
            raise ValueError(f"ConversationFilter: name must be one of {', '.join(PRESETS)}, got {name!r}")
        return PRESETS[name]

    def reason_to_drop(self, conversation: Conversation) -> str | None:
        """The first rule that the conversation breaks, in words that can be counted by, or None."""
        if self.languages is not None:
            if conversation.language is None:
                return "no language given"
            if conversation.language.lower() not in {name.lower() for name in self.languages}:
                return "other language"
        messages = conversation.messages
        if sum(message["role"] != "system" for message in messages) < self.min_messages:
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


PRESETS = {
    # WildChat: the paper's rules; its other size is 14,000 conversations and 50,000 interactions.
    "wildchat": ConversationFilter(
        languages=("english", "en"),
        min_messages=3,
        max_conversation_chars=100_000,
        max_assistant_chars=4096,
        max_user_chars=4096,
        max_history_messages=5,
        shuffle=True,
        max_conversations=15_000,
    ),
    "wildfeedback": ConversationFilter(
        min_messages=3, max_conversation_chars=100_000, max_assistant_chars=4096, max_history_messages=5
    ),
    # For logs of any kind and language: what is too long to train on goes, nothing else does.
    # Whole histories are kept, so that the interactions of a conversation share their prefixes.
    "default": ConversationFilter(
        min_messages=3, max_conversation_chars=100_000, max_assistant_chars=16_384, max_user_chars=16_384, shuffle=True
    ),
    "none": ConversationFilter(),
}
