"""Turns a message of any form into ``{"role", "content"}`` with plain text.

A tool call, an image or a file beside the text changes the role. The code that extracts interactions then knows
that the text is not all that was said. Reasoning is left out.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

# Speaker names of the layouts that are read, and what they are called here.
ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
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
# ... and images and files: Ollama's, claude.ai's, OpenAI's, the AI SDK's.
FILE_KEYS = ("images", "image", "audio", "attachments", "files", "file_ids", "experimental_attachments")
PART_KEYS = ("parts", "blocks")  # lists of parts in the place of the content: the AI SDK's, LlamaIndex's
_BESIDE = frozenset((*CALL_KEYS, *FILE_KEYS, *PART_KEYS))
_OFTEN_TEXT = ("text", "message", "body", "msg")
_NO_TEXT = frozenset(("role", "from", "reasoning", "reasoning_content", "thinking", "refusal", "metadata"))

# Types of the parts of a message; those of tools are known by a word in them.
_TEXT_TYPES = frozenset(("text", "input_text", "output_text", "refusal"))
_REASONING_TYPES = frozenset(
    ("thinking", "redacted_thinking", "reasoning", "reasoning_content", "summary_text", "think", "thoughts")
)
_TOOL_WORDS = ("tool", "function", "mcp", "code_interpreter", "computer_call", "search_call", "shell_call")
# The AI SDK's marks between steps, its sources and its own data; claude.ai's budget. The model said none of it.
_NOT_SAID = ("step-start", "source", "data-", "token_budget")
_TOOL_PARTS = ("functionCall", "functionResponse", "executableCode", "codeExecutionResult", "function_call")
_TOOL_PARTS += ("toolUse", "toolResult")  # Bedrock's
_FILE_WORDS = ("image", "audio", "video", "file", "document", "media", "blob", "uri", "asset")
_FILE_PARTS = ("inlineData", "fileData", "inline_data", "file_data", "image_url", "image", "file", "audio")
_FILE_PARTS += ("document", "video")

FILE_ROLES = ("user file", "assistant file", "system file")

# White space, control characters, what Unicode calls Default_Ignorable_Code_Point (zero-width and
# direction marks, joiners, fillers, variation selectors, tags), and the empty Braille pattern.
_UNSEEN = re.compile(
    r"[\s\0-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing to a reader, so that a message with it says nothing."""
    return _UNSEEN.fullmatch(text) is not None


def message_text(content: Any) -> str:
    """Returns the text of a message's content: a string, None (empty), or a list of parts. Reasoning is left out.

    Raises:
        TypeError: the content is anything else (a number), has a part that is neither text nor names its type, or
            holds an image or a tool call, so that the text is not all that was said.
    """
    text, beside = read_content(content)
    if beside in ("tool", "file"):
        part = next(part for part in content if not isinstance(part, str) and _read_part(part)[0] == beside)
        raise TypeError(f"content must be text, got a part {show(part)}")
    return text


def read_content(content: Any) -> tuple[str, str | None]:
    """Returns (text, kind), where kind is what else the content holds: "tool", "file", "reasoning" or None."""
    if isinstance(content, str):
        return content, None
    if content is None:
        return "", None
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"content must be text, got {show(content)}")
    texts, kinds = [], set()
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise TypeError(f"content must be text, got a part {show(part)}")
        kind, text = _read_part(part)
        texts.append(text)
        kinds.add(kind)
    return "".join(texts), next((kind for kind in ("tool", "file", "reasoning") if kind in kinds), None)


def _read_part(part: Mapping) -> tuple[str, str]:
    """(kind, text) of a part of a message; the text is empty unless the kind is "text"."""
    kind = part.get("type")
    if not isinstance(kind, str):
        if any(part.get(key) is not None for key in _TOOL_PARTS):
            return "tool", ""
        if part.get("thought") is True or part.get("reasoningContent"):
            return "reasoning", ""
        if part.get("cachePoint"):
            return "nothing", ""
        if not isinstance(part.get("text"), str) and any(part.get(key) for key in _FILE_PARTS):
            return "file", ""
        kind = "text"
    if kind in _TEXT_TYPES:
        text = part.get("refusal") if kind == "refusal" else part.get("text", part.get("content"))
        if isinstance(text, Mapping):  # of the Assistants API
            text = text.get("value")
        if not isinstance(text, str):
            raise TypeError(f"content must be text, got a part {show(part)}")
        return "text", text
    kind = kind.lower()
    if kind in _REASONING_TYPES:
        return "reasoning", ""
    if any(word in kind for word in _TOOL_WORDS):
        return "tool", ""
    if kind.startswith(_NOT_SAID):
        return "nothing", ""
    text = part.get("text")
    if not isinstance(text, str) or any(word in kind for word in _FILE_WORDS):
        return "file", ""
    return "text", text


def parse_message(message: Any) -> dict:
    """Turns ``{"role", "content"}`` or ``{"from", "value"}`` into ``{"role", "content"}`` with plain text.

    If the text is not all that was said, the role tells: it is tool for a tool call or its result, and one of
    `FILE_ROLES` for a message with an image or a file.

    Raises:
        TypeError: it is not a message, or its content is not text.
        ValueError: the role is unknown, or the text is not valid Unicode (a lone surrogate).
    """
    if not isinstance(message, Mapping):
        raise TypeError(f"must be a message, got {show(message)}")
    # A table of both forms has all four columns in every message.
    if "role" in message and (message["role"] is not None or message.get("from") is None):
        speaker, (own, other) = message["role"], ("content", "value")
    elif "from" in message:
        speaker, (own, other) = message["from"], ("value", "content")
    else:
        raise TypeError(
            f"must have 'role' or 'from', got the keys {show(list(message))} (--map role=PATH reads another)"
        )
    content = message.get(own)
    content = message.get(other) if content is None else content
    if content is None and isinstance(message.get("refusal"), str):  # OpenAI's, in the place of the content
        content = message["refusal"]
    if not isinstance(speaker, str):
        raise TypeError(f"role must be text, got {show(speaker)} (--map role=PATH,role.user=NAME reads others)")
    role = ROLES.get(speaker) or ROLES.get(speaker.strip().lower())
    if role is None:
        raise ValueError(
            f"role must be one of {', '.join(sorted(ROLES))} (for others: --map role.user=NAME), got {show(speaker)}"
        )
    text, beside = (content, None) if type(content) is str else read_content(content)
    if (len(message) > 2 or content is None) and not _BESIDE.isdisjoint(message):
        text, beside = _read_beside(message, role, text, beside)
    elif content is None:
        _check_text_is_here(message)
    if not text.isascii():
        check_unicode(text, "content")
    if beside == "tool" and role in ("user", "assistant"):
        role = "tool"
    elif beside == "file" and role != "tool":
        role = f"{role} file"
    return {"role": role, "content": text}


def _check_text_is_here(message: Mapping) -> None:
    """A TypeError where a message without a content has what may be its text elsewhere."""
    empty = "content" in message or "value" in message  # then only what is a text for sure
    for key, value in message.items():
        if empty and not (key in _OFTEN_TEXT and isinstance(value, str)):
            continue
        may_be = isinstance(value, (list, Mapping)) or key in _OFTEN_TEXT or " " in str(value).strip()
        if value and may_be and key not in _NO_TEXT:
            keys = ", ".join(map(repr, message))
            raise TypeError(f"must have 'content', got the keys {keys} (--map content={key} reads {key!r})")


def _read_beside(message: Mapping, role: str, text: str, beside: str | None) -> tuple[str, str | None]:
    """The text of a message and what stands beside it, with the other keys of the message."""
    for key in PART_KEYS:
        if isinstance(message.get(key), (list, tuple)):  # the AI SDK may repeat the text as the content
            if key == "blocks" and any(isinstance(part, str) for part in message[key]):
                raise TypeError(f"must have 'content', got the ids of its blocks alone: {show(message[key])}")
            said, found = read_content(message[key])
            text, beside = (said if is_blank(text) else text), beside or found
    if role == "assistant" and called_key(message) is not None:
        return text, "tool"
    if beside != "tool" and any(message.get(key) for key in FILE_KEYS):
        return text, "file"
    return text, beside


def are_plain(messages: list | tuple) -> bool:
    """Whether `parse_message` would leave all messages as they are. This check costs a fifth of parsing them."""
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


def check_unicode(text: str, name: str) -> None:
    """Raises ValueError if a text has a lone surrogate, which no file can hold; `name` is the text's in the error."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode, got a lone surrogate at character {error.start}") from None


def called_key(message: Any) -> str | None:
    """Returns the key under which a message calls a tool beside its text, or None."""
    if not isinstance(message, Mapping):
        return None
    return next((key for key in CALL_KEYS if message.get(key)), None)


def parse_history(messages: Any, name: str) -> list[dict]:
    """Parses the messages of a prompt as `parse_messages` does; raises ValueError if one is not text alone."""
    parsed = parse_messages(messages, name)
    for index, message in enumerate(messages):
        if (what := not_text(message, parsed[index]["role"])) is not None:
            raise ValueError(f"{name}[{index}]: must be text alone, got {what}, which would be missing in it")
    return parsed


def not_text(message: Any, role: str) -> str | None:
    """Says what a message holds beside its text, or None; `role` is the one that `parse_message` returns."""
    if (key := called_key(message)) is not None:
        return repr(key)
    if role in FILE_ROLES:
        return "an image or file"
    said = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
    if role == "tool" and isinstance(said, str) and ROLES.get(said.strip().lower()) != "tool":
        return "a call of a tool"
    return None


def parse_messages(messages: Any, name: str) -> list[dict]:
    """Parses a list of messages, each as `parse_message` does.

    Raises:
        TypeError, ValueError: a message is malformed; the text says which message of `name`.
    """
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"{name} must be a list of messages, got {show(messages)}")
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
    """Returns a record's messages; the system prompt beside them (`SYSTEM_KEYS`), if any, becomes the first.

    Raises:
        TypeError: the system prompt is not text.
        ValueError: the record has two that differ, so that what the model saw is not known.
    """
    if all(record.get(key) is None for key in SYSTEM_KEYS):
        return messages
    own = next((n for n, m in enumerate(messages) if m["role"] != "system"), len(messages))
    texts = {"the messages": "\n\n".join(m["content"] for m in messages[:own])}
    for key in SYSTEM_KEYS:
        if record.get(key) is not None:
            (message,) = parse_messages([{"role": "system", "content": record[key]}], key)
            if message["role"] != "system":
                raise TypeError(f"{key}: content must be text, got {show(record[key])}")
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


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


def show(value: Any) -> str:
    """Describes a value for an error message: its type, and a repr that stays short for values of any size."""
    return f"{type(value).__name__} {_repr.repr(value)}"
