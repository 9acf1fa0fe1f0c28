"""Conversations and the interactions they hold.

A conversation ``o_0, y_1, o_1, y_2, o_2, ...`` (user, model, user, ...) gives one interaction
``(x_t, y_t, o_t)`` for every answer that a user's message follows: x_t is everything up to and
including the user's message that y_t answers, o_t is the message after y_t. This is the data of
"Aligning Language Models from User Interactions" (https://arxiv.org/abs/2603.12273), section 2.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Speaker names of the layouts that are read, and what they are called here.
ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "function_call": "tool",
    "observation": "tool",
}

# Where a record keeps a system prompt beside its messages: Anthropic and LLaMA-Factory `system`, ...
SYSTEM_KEYS = (
    "system",
    "system_prompt",
    "system_message",
    "system_instruction",
    "systemPrompt",
    "systemMessage",
    "systemInstruction",
)

# Where a message keeps calls of tools beside its text: OpenAI's, its first form, the AI SDK's, ...
CALL_KEYS = ("tool_calls", "function_call", "tool_call", "function_calls", "toolCalls", "toolInvocations")

# Why follow-ups are left out, as counts say it: "3 follow-ups after a tool call or tool message".
AFTER_TOOL = "after a tool call or tool message"
AFTER_SYSTEM = "after a later system message"
AFTER_SEVERAL = "to several answers in a row"


@dataclass(frozen=True)
class Interaction:
    """One answer and the user's reaction to it.

    Attributes:
        prompt: x, the history as ``{"role", "content"}`` messages of text; ends with a user's.
        completion: y, the model's answer.
        followup: o, what the user said next.
        id: names the interaction in reports; unique within its file where the source had ids.
        conversation_id: interactions of one conversation share it (and share prefixes).
        fields: what else is known of it (a rating, the model's name, ...); JSON's types, by name. Training
            reads none of it.

    Raises:
        TypeError, ValueError: a field has the wrong type, or the prompt does not end with a
            user's message.
    """

    prompt: list[dict]
    completion: str
    followup: str
    id: str | None = None
    conversation_id: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.prompt, list) or not self.prompt:
            raise TypeError(f"Interaction: prompt must be a list of messages, got {_show(self.prompt)}")
        for index, message in enumerate(self.prompt):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise TypeError(
                    f"Interaction: prompt[{index}] must be a dict with 'role' and 'content', got {_show(message)}"
                )
            if not isinstance(message["content"], str):
                raise TypeError(
                    f"Interaction: prompt[{index}] must have text as its content, got {_show(message['content'])}"
                )
        if self.prompt[-1]["role"] != "user":
            raise ValueError(
                f"Interaction: prompt must end with a user's message, got role {self.prompt[-1]['role']!r}"
            )
        for name in ("completion", "followup"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Interaction: {name} must be text, got {_show(getattr(self, name))}")


@dataclass(frozen=True)
class Conversation:
    """A conversation in one form, whatever layout it came in.

    Attributes:
        messages: ``{"role", "content"}`` dicts; roles are user, assistant, system or tool (an
            answer that calls a tool is of the role tool).
        id: names the conversation, or None.
        language: as the record names it (``"English"``, ``"en"``), or None.
        single: True for a record that already is one interaction; only its last answer counts.
        interaction_id: the id of that interaction.
        own_id: True where `id` names the record, within its source, and not its conversation.
        fields: what else is known of it, by name; each of its interactions gets them.
        answer_fields: of single answers, by the index of the message; their interactions get them too.
        facts: what rules ask of its record (`record_fields.FACTS`): ``time``, ``model``, ``toxic``, ``redacted``.
    """

    messages: list[dict]
    id: str | None = None
    language: str | None = None
    single: bool = False
    interaction_id: str | None = None
    own_id: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)
    answer_fields: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


# White space, control characters, what Unicode calls Default_Ignorable_Code_Point (zero-width and
# direction marks, joiners, fillers, variation selectors, tags), and the empty Braille pattern.
_UNSEEN = re.compile(
    r"[\s\0-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)


def is_blank(text: str) -> bool:
    """Whether nobody would see anything in a text: a message of this kind says nothing."""
    return _UNSEEN.fullmatch(text) is not None


def message_text(content: Any) -> str:
    """The text of a message's content: a string, None (empty), or a list of text parts.

    Raises:
        TypeError: anything else (an image, a number), or a part that is not text.
    """
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, (list, tuple)):
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, Mapping) else part
            if not isinstance(text, str):
                raise TypeError(f"content must be text, got a part {_show(part)}")
            texts.append(text)
        return "".join(texts)
    raise TypeError(f"content must be text, got {_show(content)}")


def parse_message(message: Any) -> dict:
    """``{"role", "content"}`` or ``{"from", "value"}`` -> ``{"role", "content"}`` of plain text.

    An answer that calls a tool (`CALL_KEYS`) gets the role tool: its text is not all that was said.

    Raises:
        TypeError: not a message, or its content is not text.
        ValueError: an unknown role, or text that is not valid Unicode (a lone surrogate).
    """
    if not isinstance(message, Mapping):
        raise TypeError(f"must be a message, got {_show(message)}")
    # A table of both forms has all four columns in every message.
    if "role" in message and (message["role"] is not None or message.get("from") is None):
        speaker, content = message["role"], message.get("content")
    elif "from" in message:
        speaker, content = message["from"], message.get("value")
    else:
        raise TypeError(f"must have 'role' or 'from', got the keys {_show(list(message))}")
    if not isinstance(speaker, str):
        raise TypeError(f"role must be text, got {_show(speaker)}")
    role = ROLES.get(speaker.strip().lower())
    if role is None:
        raise ValueError(f"role must be one of {', '.join(sorted(ROLES))}, got {_show(speaker)}")
    text = message_text(content)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"content must be valid Unicode, got a lone surrogate at character {error.start}"
            ) from None
    if role == "assistant" and called_key(message) is not None:
        role = "tool"
    return {"role": role, "content": text}


def are_plain(messages: Sequence[Any]) -> bool:
    """Whether all are as `parse_message` would give them. Most are, and a look at them costs a fifth of it."""
    for message in messages:
        if type(message) is not dict or tuple(message) != ("role", "content"):
            return False
        role, text = message["role"], message["content"]
        if type(text) is not str or role not in ("user", "assistant", "system", "tool"):
            return False
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                return False
    return True


def called_key(message: Any) -> str | None:
    """Where a message calls a tool beside its text, or None."""
    if not isinstance(message, Mapping):
        return None
    return next((key for key in CALL_KEYS if message.get(key)), None)


def parse_history(messages: Any, name: str) -> list[dict]:
    """`parse_messages` of a prompt, which is taken as it is; a ValueError where it calls a tool."""
    parsed = parse_messages(messages, name)
    for index, message in enumerate(messages):
        if (key := called_key(message)) is not None:
            raise ValueError(f"{name}[{index}]: must be text alone, got {key!r}, which would be missing in it")
    return parsed


def parse_messages(messages: Any, name: str) -> list[dict]:
    """A list of messages in either form; errors say which message of `name` is wrong."""
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"{name} must be a list of messages, got {_show(messages)}")
    if are_plain(messages):
        return list(messages)
    parsed = []
    for index, message in enumerate(messages):
        try:
            parsed.append(parse_message(message))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}[{index}]: {error}") from None
    return parsed


def add_system(record: Mapping, messages: list[dict]) -> list[dict]:
    """Messages of a record, with the system prompt that stands beside them (`SYSTEM_KEYS`) as the first.

    Raises:
        TypeError: it is not text.
        ValueError: the record has two that differ, so that what the model saw is not known.
    """
    if all(record.get(key) is None for key in SYSTEM_KEYS):
        return messages
    own = next((n for n, m in enumerate(messages) if m["role"] != "system"), len(messages))
    texts = {"the messages": "\n\n".join(m["content"] for m in messages[:own])}
    for key in SYSTEM_KEYS:
        if record.get(key) is not None:
            (message,) = parse_messages([{"role": "system", "content": record[key]}], key)
            texts[key] = message["content"]
    said = {name: text for name, text in texts.items() if not is_blank(text)}
    if len({text.strip() for text in said.values()}) > 1:
        raise ValueError(
            f"a record must have one system prompt, got different ones in {' and '.join(said)}; "
            "keep the one that the model saw"
        )
    if not said or "the messages" in said:
        return messages
    return [{"role": "system", "content": next(iter(said.values()))}, *messages[own:]]


def extract_interactions(
    conversation: Conversation | Sequence[Mapping],
    *,
    max_history_messages: int | None = None,
    left_out: Counter | None = None,
) -> list[Interaction]:
    """The interactions of a conversation, in order.

    - User's messages in a row are one message, joined by an empty line; so are system messages at the start.
    - Different answers in a row (regenerated ones) are not joined, as no model gave that text. The last one
      stands in the histories. A follow-up to them may be about any of them, and gives no interaction.
    - System messages at the start begin every history. From the first tool message, answer that calls a
      tool, or later system message on nothing is taken: histories there would lack what the model saw.
    - A history begins with a user's message (after the system message); answers before that are left out.
    - An empty message (`is_blank`) stays in the histories, but is in no interaction otherwise.

    Args:
        conversation: a `Conversation`, or a list of messages in ``role/content`` or ``from/value`` form.
        max_history_messages: of each history, the last so many messages, from a user's on; without the system's.
        left_out: the follow-ups that are left out are added to it, by reason.

    Raises:
        TypeError, ValueError: a message is malformed; the text says which and how.
    """
    if max_history_messages is not None and max_history_messages < 1:
        raise ValueError(f"extract_interactions: max_history_messages must be at least 1, got {max_history_messages}")
    if not isinstance(conversation, Conversation):
        conversation = Conversation(parse_messages(conversation, "messages"))
    system, turns, several, numbers, rest = _turns(conversation.messages)
    if rest and left_out is not None:
        lost = _count_followups(conversation.messages) - _count_followups(turns)
        if lost:
            reason = AFTER_SYSTEM if rest[0]["role"] == "system" else AFTER_TOOL
            left_out[reason] += 1 if conversation.single else lost
    interactions: list[Interaction] = []
    for t in range(1, len(turns) - 1):
        if turns[t]["role"] != "assistant" or (conversation.single and t != len(turns) - 2):
            continue
        if any(is_blank(turn["content"]) for turn in turns[t - 1 : t + 2]):
            continue
        if several[t]:
            if left_out is not None:
                left_out[AFTER_SEVERAL] += 1
            continue
        start = 0 if max_history_messages is None else max(0, t - max_history_messages)
        while turns[start]["role"] != "user":
            start += 1
        name = conversation.interaction_id
        if not conversation.single and conversation.id is not None:
            name = f"{conversation.id}:{len(interactions)}"
        interactions.append(
            Interaction(
                prompt=[dict(message) for message in system + turns[start:t]],
                completion=turns[t]["content"],
                followup=turns[t + 1]["content"],
                id=name,
                conversation_id=conversation.id,
                fields={**conversation.fields, **conversation.answer_fields.get(numbers[t], {})},
            )
        )
    return interactions


def _turns(
    messages: Sequence[Mapping],
) -> tuple[list[dict], list[dict], list[bool], list[int], Sequence[Mapping]]:
    """([the system message] or [], alternating user / assistant messages starting with a user's, of
    each whether it is the last of different answers, of each the index of its last message, the
    messages from which on nothing is taken)"""
    system: list[dict] = []
    turns: list[dict] = []
    several: list[bool] = []
    numbers: list[int] = []
    end = len(messages)
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "tool" or (role == "system" and turns):
            end = number
            break
        place = system if role == "system" else turns
        if not place or place[-1]["role"] != role:
            place.append({"role": role, "content": content})
            if place is turns:
                several.append(False)
                numbers.append(number)
            continue
        if place is turns:
            numbers[-1] = number
        texts = [text for text in (place[-1]["content"], content) if not is_blank(text)]
        if role == "assistant" and len(texts) == 2:
            several[-1] = several[-1] or texts[0].strip() != texts[1].strip()
            texts = texts[1:]
        place[-1]["content"] = "\n\n".join(texts)
    first = int(bool(turns) and turns[0]["role"] == "assistant")
    return system, turns[first:], several[first:], numbers[first:], messages[end:]


def _count_followups(messages: Sequence[Mapping]) -> int:
    """How often a user's message follows an answer to a user; calls and tools' results are answers."""
    signs = {"user": "u", "system": ""}
    return len(re.findall("au", "".join(signs.get(m["role"], "a") for m in messages).lstrip("a")))


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


def _show(value: Any) -> str:
    """A value in an error message: its type and a repr that stays short for values of any size."""
    return f"{type(value).__name__} {_repr.repr(value)}"
