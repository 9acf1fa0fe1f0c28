"""Reads what a record says of an answer beside its text: ratings, weights, edits.

A rating becomes the row's fields `rating` (``"up"``, ``"down"``, a number, or the record's own word) and
`rating_comment` (what the user wrote with the rating). If the user edited an answer, the field `edited` keeps
the edited text, which is never taken for the model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastsdpo.data.messages import check_unicode, is_blank, parse_messages, read_content
from fastsdpo.data.times import oldest_first

if TYPE_CHECKING:
    from fastsdpo.data.interactions import Conversation

NOT_TRAINED = "to an answer that the record says not to train on (weight 0)"
REASONING_ALONE = "to an answer that is reasoning alone"
CUT = "to an answer that was cut off"
EDITED = "to an answer that the user edited, of which the model's own text is not kept"

# A key of a message that holds why no interaction is to be made of it; no key of JSON, since readers set it.
LEFT_OUT: Any = ("left_out",)

RATING_KEYS = ("rating", "annotation", "feedback", "thumbs", "stars", "vote", "reaction")
COMMENT_KEYS = ("rating_comment", "comment", "text", "content")
# Why an answer ended, as APIs and chat programs have it, and the words for an end that is not its own.
END_KEYS = ("finish_reason", "finishReason", "stop_reason", "stopReason", "done_reason")
_CUT = frozenset(("length", "maxtokens", "maxoutputtokens", "modellength", "modelcontextwindowexceeded"))
_CUT |= {"incomplete", "inprogress", "interrupted", "cancelled", "canceled", "usercancelled", "usercanceled"}
_CUT |= {"finishedpartialcompletion", "contentfilter", "contentfiltered", "guardrailintervened"}
_CUT |= {"safety", "recitation"}
_CUT_FLAGS = {"unfinished": True, "truncated": True, "interrupted": True, "done": False}
NOTE_KEYS = frozenset((*RATING_KEYS, *END_KEYS, *_CUT_FLAGS, LEFT_OUT, "rating_comment", "rank", "weight"))
NOTE_KEYS |= {"train", "loss", "edited", "originalContent"}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")

_UP = frozenset(("up", "thumbsup", "like", "liked", "upvote", "good", "positive", "helpful", "yes", "true", "👍"))
_DOWN = frozenset(
    ("down", "thumbsdown", "dislike", "disliked", "downvote", "bad", "negative", "unhelpful", "no", "false", "👎")
)


@dataclass
class Turns:
    """Messages as in `Conversation`, and the fields (rating, edit, ...) of the answers among them by index."""

    messages: list[dict]
    fields: dict[int, dict[str, Any]] = field(default_factory=dict)


def read_turns(messages: Any, name: str) -> Turns:
    """Parses messages as `parse_messages` does, and reads the fields (rating, edit, ...) of each answer.

    Messages that run from the newest to the oldest, as their times say, are turned around.

    Raises:
        TypeError, ValueError: a malformed message; the text says which of `name`.
    """
    messages = oldest_first(messages) if isinstance(messages, (list, tuple)) else messages
    parsed = parse_messages(messages, name)
    turns = Turns(parsed)
    for index, message in enumerate(messages):
        if len(message) == 2 and parsed[index]["content"]:
            continue  # nothing but a role and a text
        if parsed[index]["role"] == "assistant":
            if not NOTE_KEYS.isdisjoint(message):
                try:
                    add_notes(turns, index, message)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{name}[{index}]: {error}") from None
            if not parsed[index]["content"] and _is_reasoning(message):
                turns.fields.setdefault(index, {})["left_out"] = REASONING_ALONE
    return turns


def _is_reasoning(message: Mapping) -> bool:
    if any(message.get(key) for key in _REASONING_KEYS):
        return True
    return any(
        isinstance(message.get(key), (list, tuple)) and read_content(message[key])[1] == "reasoning"
        for key in ("content", "parts", "value")
    )


def add_notes(turns: Turns, index: int, message: Mapping) -> None:
    """Adds the rating, rank, edit and weight in a message to the fields of the answer with this index."""
    fields = rating_fields(message)
    if _is_number(message.get("rank")):
        fields["rank"] = message["rank"]
    if any(_is_zero(message.get(key)) for key in ("train", "loss", "weight")):
        fields["left_out"] = NOT_TRAINED
    if was_cut(message):
        fields["left_out"] = CUT
    original, edited = message.get("originalContent"), message.get("edited")
    if isinstance(original, str) and not is_blank(original):  # Open WebUI's; the content is the edited text
        fields["edited"] = turns.messages[index]["content"]
        fields["completion"] = clean(original)
    elif isinstance(edited, str) and not is_blank(edited):
        fields["edited"] = clean(edited)
    elif edited is True:
        fields["left_out"] = EDITED
    if message.get(LEFT_OUT):
        fields["left_out"] = message[LEFT_OUT]
    if fields:
        turns.fields.setdefault(index, {}).update(fields)


def was_cut(source: Mapping) -> bool:
    """Whether an answer says that it has no end of its own: it was stopped by a limit, the user or a filter."""
    if any(source.get(key) is value for key, value in _CUT_FLAGS.items()):
        return True
    return any(isinstance(source.get(key), str) and _word(source[key]) in _CUT for key in END_KEYS)


def _word(text: str) -> str:
    return "".join(c for c in text.lower() if c not in " _-")


def _is_zero(value: Any) -> bool:
    """Whether a value is 0 or false, also as a table of text has it."""
    if isinstance(value, str):
        return value.strip().lower() in ("0", "0.0", "false")
    return isinstance(value, (int, float)) and value == 0


def clean(text: str) -> str:
    """Returns the text if it is valid Unicode, as rows must be; else raises ValueError."""
    if not text.isascii():
        check_unicode(text, "a field of an answer")
    return text


def rating_fields(source: Mapping, keys: Sequence[str] = RATING_KEYS) -> dict[str, Any]:
    """Returns the fields `rating` and `rating_comment` of an answer, as far as `source` has them.

    Args:
        source: a message or a record. It has the rating under one of `keys`: a word, a number, or an object
            with ``rating``, ``score`` or ``value`` and the comment.
    """
    fields: dict[str, Any] = {}
    for key in keys:
        value = source.get(key)
        if value is None:
            continue
        comment = None
        if isinstance(value, Mapping):
            comment = next((value[k] for k in COMMENT_KEYS if isinstance(value.get(k), str)), None)
            value = next((value[k] for k in ("rating", "score", "value", "type") if value.get(k) is not None), None)
            if key == "annotation" and _is_number(value):  # Open WebUI's thumbs
                value = "up" if value == 1 else "down" if value == -1 else value
        rating = normal_rating(value)
        if key == "feedback" and isinstance(rating, str) and rating not in ("up", "down"):
            rating, comment = None, comment or rating
        if rating is not None:
            fields.setdefault("rating", rating)
        if comment is not None and not is_blank(comment):
            fields.setdefault("rating_comment", clean(comment))
    comment = source.get("rating_comment")
    if isinstance(comment, str) and not is_blank(comment):
        fields["rating_comment"] = clean(comment)
    return fields


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def normal_rating(value: Any) -> str | int | float | None:
    """Returns ``"up"`` or ``"down"`` for words, signs and booleans that mean it, else the number or word, or None."""
    if isinstance(value, bool):
        return "up" if value else "down"
    if isinstance(value, (int, float)):
        return value if _is_number(value) else None
    if not isinstance(value, str) or is_blank(value):
        return None
    word = _word(value)
    if word in _UP or word in _DOWN:
        return "up" if word in _UP else "down"
    try:
        number = float(value)
    except ValueError:
        return clean(value)
    if not math.isfinite(number):
        return clean(value)
    return int(number) if number.is_integer() else number


class RatingFollowups:
    """Turns ratings into follow-ups, for answers that the user rated but did not reply to.

    Args:
        options: texts ``RATING=TEXT``, such as ``"down=That was not what I wanted."``, ``"1..2=..."`` (numbers
            from 1 to 2) or ``"edited=I would have written: {edited}"``. ``{comment}`` stands for what the user
            wrote with the rating; a text with it is used only if there is a comment. If several fit a rating,
            the first is used.

    Raises:
        ValueError: an option is not ``RATING=TEXT``, or the text is empty.
    """

    def __init__(self, options: Iterable[str]):
        self.options = list(options)
        self._wordings: list[tuple[str, str]] = []
        for option in self.options:
            name, equals, text = option.partition("=")
            if not equals or not name.strip() or is_blank(text):
                raise ValueError(f'--rating-followup: must be RATING=TEXT, such as down="No.", got {option!r}')
            self._wordings.append((name.strip(), clean(text)))
        # Where the user gave a comment, the wording that has it goes first.
        self._wordings.sort(key=lambda item: "{comment}" not in item[1])

    def wording(self, fields: Mapping[str, Any]) -> str | None:
        """Returns the text to use as the follow-up to an answer with these fields, or None."""
        for name, text in self._wordings:
            values = {"{comment}": fields.get("rating_comment"), "{edited}": fields.get("edited")}
            if any(key in text and value is None for key, value in values.items()):
                continue
            if "edited" in fields if name == "edited" else _fits(name, fields.get("rating")):
                for key, value in values.items():
                    text = text.replace(key, str(value))
                return text
        return None

    def apply(self, conversation: Conversation) -> Conversation:
        """Returns the conversation; if it ends with an answer whose rating has a text, that text is added."""
        last = len(conversation.messages) - 1
        fields = conversation.answer_fields.get(last)
        if not fields or conversation.single or conversation.messages[last]["role"] != "assistant":
            return conversation
        text = self.wording(fields)
        if text is None or fields.get("left_out"):
            return conversation
        return replace(
            conversation,
            messages=[*conversation.messages, {"role": "user", "content": text}],
            answer_fields={**conversation.answer_fields, last: {**fields, "followup_from": "rating"}},
        )


def _fits(name: str, rating: Any) -> bool:
    if rating is None or isinstance(rating, str):
        return name == rating
    low, _, high = name.partition("..")
    try:
        return float(low) <= rating <= float(high or low)
    except ValueError:
        return False


def with_rating(turns: Turns, fields: Mapping[str, Any]) -> None:
    """Gives the fields of a record (its rating) to the last answer, for records that are about this answer."""
    last = len(turns.messages) - 1
    while last >= 0 and turns.messages[last]["role"] != "assistant":
        last -= 1
    if fields and last >= 0:
        turns.fields[last] = {**fields, **turns.fields.get(last, {})}


# What `prepare` writes of an answer, and takes over from a row that it wrote.
ROW_FIELDS = frozenset(("rating", "rating_comment", "rank", "edited", "alternatives", "followup_from"))


def row_fields(record: Mapping) -> dict[str, Any]:
    """Returns an answer's fields in a row that `prepare` wrote; values of a wrong type are passed over."""
    fields = rating_fields(record, ("rating",))
    for key in ("edited", "followup_from"):
        if isinstance(record.get(key), str):
            fields[key] = clean(record[key])
    if _is_number(record.get("rank")):
        fields["rank"] = record["rank"]
    others = record.get("alternatives")
    if isinstance(others, (list, tuple)) and others and all(isinstance(text, str) for text in others):
        fields["alternatives"] = [clean(text) for text in others]
    return fields
