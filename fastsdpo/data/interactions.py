"""Conversations and the interactions they hold.

A conversation ``o_0, y_1, o_1, y_2, o_2, ...`` (user, model, user, ...) gives one interaction
``(x_t, y_t, o_t)`` for every answer that a user's message follows: x_t is everything up to and
including the user's message that y_t answers, o_t is the message after y_t. This is the data of
"Aligning Language Models from User Interactions" (https://arxiv.org/abs/2603.12273), section 2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastsdpo.data.answers import read_turns
from fastsdpo.data.messages import FILE_ROLES, show
from fastsdpo.data.messages import add_system as add_system
from fastsdpo.data.messages import is_blank as is_blank
from fastsdpo.data.messages import message_text as message_text
from fastsdpo.data.messages import parse_history as parse_history
from fastsdpo.data.messages import parse_message as parse_message
from fastsdpo.data.messages import parse_messages as parse_messages

# Why follow-ups are left out, as counts say it: "3 follow-ups after a tool call or tool message".
AFTER_TOOL = "after a tool call or tool message"
AFTER_FILE = "after an image or file"
AFTER_SYSTEM = "after a later system message"
AFTER_SEVERAL = "to several answers in a row"
AFTER_GREETING = "to an answer before the user's first message"
# ... where the message before the answer, the answer or the follow-up shows nothing to a reader.
EMPTY = ("to an answer to an empty message", "to an empty answer", "that are empty")


@dataclass(frozen=True)
class Interaction:
    """One answer and the user's reaction to it.

    Attributes:
        prompt: x, the history as ``{"role", "content"}`` messages of text; ends with a user's.
        completion: y, the model's answer.
        followup: o, what the user said next.
        id: names the interaction in reports; unique within its file if the source had ids.
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
            raise TypeError(f"Interaction: prompt must be a list of at least one message, got {show(self.prompt)}")
        for index, message in enumerate(self.prompt):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise TypeError(
                    f"Interaction: prompt[{index}] must be a dict with 'role' and 'content', got {show(message)}"
                )
            if not isinstance(message["content"], str):
                raise TypeError(
                    f"Interaction: prompt[{index}] must have text as its content, got {show(message['content'])}"
                )
        if self.prompt[-1]["role"] != "user":
            raise ValueError(
                f"Interaction: prompt must end with a user's message, got role {self.prompt[-1]['role']!r}"
            )
        for name in ("completion", "followup"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Interaction: {name} must be text, got {show(getattr(self, name))}")


@dataclass(frozen=True)
class Conversation:
    """A conversation in the same form for all layouts.

    Attributes:
        messages: ``{"role", "content"}`` dicts; roles are user, assistant, system, tool (an answer that
            calls a tool is of the role tool), or one of `FILE_ROLES` (a message with an image or a file).
        id: names the conversation, or None.
        language: as the record names it (``"English"``, ``"en"``), or None.
        single: True for a record that already is one interaction; only its last answer counts.
        interaction_id: the id of that interaction.
        own_id: True if `id` names the record (within its source), not its conversation.
        fields: what else is known of it, by name; each of its interactions gets them.
        answer_fields: of single answers, by the index of the message; their interactions get them too. The
            field `left_out` says why no interaction is made of the answer, `completion` is what the model wrote
            where the history holds another text (edited by the user).
        facts: what filters ask of its record (`record_fields.FACTS`): ``time``, ``model``, ``toxic``, ``redacted``.
        format: the name of the record's layout.
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
    format: str = ""


def extract_interactions(
    conversation: Conversation | Sequence[Mapping],
    *,
    max_history_messages: int | None = None,
    left_out: Counter | None = None,
) -> list[Interaction]:
    """The interactions of a conversation, in order.

    - A user's messages in a row become one message, joined by an empty line; so do system messages at the start.
    - Different answers in a row (regenerated ones) are not joined, as no model gave that text. The last one
      stands in the histories. A follow-up to them may be about any of them, and gives no interaction.
    - System messages at the start begin every history. Nothing is taken from the first tool
      message, tool call, image, file or later system message on: histories there would lack what the model saw.
    - A history begins with a user's message (after the system message); answers before that are left out.
    - An empty message (`is_blank`) stays in the histories, but is in no interaction otherwise.

    Args:
        conversation: a `Conversation`, or a list of messages in ``role/content`` or ``from/value`` form.
        max_history_messages: how many of the last messages each history keeps, starting with a user's; system
            messages do not count. None: all.
        left_out: a counter that gets the number of follow-ups that are left out, by reason.

    Raises:
        TypeError, ValueError: a message is malformed; the text says which and how.
    """
    if max_history_messages is not None and max_history_messages < 1:
        raise ValueError(f"extract_interactions: max_history_messages must be at least 1, got {max_history_messages}")
    if not isinstance(conversation, Conversation):
        read = read_turns(conversation, "messages")
        conversation = Conversation(read.messages, answer_fields=read.fields)
    left_out = Counter() if left_out is None else left_out
    system, turns, several, numbers, rest = _turns(conversation.messages)
    if rest:
        lost = _count_followups(conversation.messages) - _count_followups(turns)
        if lost:
            role = rest[0]["role"]
            reason = AFTER_SYSTEM if role == "system" else AFTER_FILE if role in FILE_ROLES else AFTER_TOOL
            left_out[reason] += 1 if conversation.single else lost
    interactions: list[Interaction] = []
    if re.match("a+u", _signs(conversation.messages)) and not conversation.single:
        left_out[AFTER_GREETING] += 1
    for t in range(1, len(turns) - 1):
        if turns[t]["role"] != "assistant" or (conversation.single and t != len(turns) - 2):
            continue
        own = conversation.answer_fields.get(numbers[t], {})
        if own.get("left_out"):
            left_out[own["left_out"]] += 1
            continue
        completion = own.get("completion", turns[t]["content"])
        texts = (turns[t - 1]["content"], completion, turns[t + 1]["content"])
        empty = next((why for why, text in zip(EMPTY, texts) if is_blank(text)), None)
        if empty or several[t]:
            left_out[empty or AFTER_SEVERAL] += 1
            continue
        start = 0 if max_history_messages is None else max(0, t - max_history_messages)
        while turns[start]["role"] != "user":
            start += 1
        fields = {**conversation.fields, **own}
        fields.pop("completion", None)
        name = conversation.interaction_id
        if not conversation.single and conversation.id is not None:
            name = f"{conversation.id}:{len(interactions)}"
        interactions.append(
            Interaction(
                prompt=[dict(message) for message in system + turns[start:t]],
                completion=completion,
                followup=turns[t + 1]["content"],
                id=name,
                conversation_id=conversation.id,
                fields=fields,
            )
        )
    return interactions


def _turns(messages: Sequence[Mapping]) -> tuple[list[dict], list[dict], list[bool], list[int], Sequence[Mapping]]:
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
        if role not in ("user", "assistant", "system") or (role == "system" and turns):
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
    """How often a user's message follows an answer to a user."""
    return len(re.findall("au", _signs(messages).lstrip("a")))


def _signs(messages: Sequence[Mapping]) -> str:
    """A letter for each message but systems': u of a user, a of an answer; calls and tools' results are answers."""
    signs = {"user": "u", "user file": "u", "system": "", "system file": ""}
    return "".join(signs.get(m["role"], "a") for m in messages)
