"""The hook of `prepare --redact`: the user's function text -> text, which is applied to all text that is read."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastsdpo.data.interactions import Conversation

_NO_TEXT = ("left_out", "rating")  # of an answer's fields, those that are words of ours


def load_hook(name: str) -> Callable[[str], object]:
    """Imports the function that ``module:function`` names. The module may lie in the current folder.

    Raises:
        ValueError: there is no such function; the text says why.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"--redact must be module:function, got {name!r}")
    if module == "__main__":
        raise ValueError(f"--redact must name a module that other processes can import, got {name!r}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        hook = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module raises
        raise ValueError(f"--redact {name} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(hook):
        raise ValueError(f"--redact must name a function, got {name!r}, a {type(hook).__name__}")
    return hook


def redaction_settings(name: str) -> list:
    """Returns what shows whether a hook has changed: its name, and size and time of its file."""
    file = getattr(sys.modules.get(load_hook(name).__module__), "__file__", None)
    if file is None:
        return [name]
    status = os.stat(file)
    return [name, status.st_size, status.st_mtime_ns]


class Redaction:
    """Applies a hook, given by its name, to conversations.

    Raises:
        ValueError: from `load_hook`.
    """

    def __init__(self, name: str):
        self._name, self._hook = name, load_hook(name)

    def redact(self, conversation: Conversation, where: str) -> Conversation:
        """Returns the conversation with the hook applied to the text of each message and to all text in its fields.

        Raises:
            ValueError: the hook failed, or returned something other than text; the text names the record, `where`.
        """
        try:
            return replace(
                conversation,
                messages=[{**message, "content": self._text(message["content"])} for message in conversation.messages],
                fields=self._value(conversation.fields),
                answer_fields={
                    number: {key: value if key in _NO_TEXT else self._value(value) for key, value in fields.items()}
                    for number, fields in conversation.answer_fields.items()
                },
            )
        except Exception as error:  # whatever the hook raises: nothing unredacted may be written
            raise ValueError(f"--redact {self._name} failed at {where}: {type(error).__name__}: {error}") from error

    def _text(self, text: str) -> str:
        changed = self._hook(text)
        if not isinstance(changed, str):
            raise TypeError(f"it must return text, got {type(changed).__name__}")
        changed.encode()
        return changed

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            return {key: self._value(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._value(part) for part in value]
        return value
