"""Ways to read layouts that no reader knows: `--map` says where a record has what, `--reader` names a function."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsdpo.data.answers import NOTE_KEYS, rating_fields, read_turns, with_rating
from fastsdpo.data.interactions import Conversation
from fastsdpo.data.layouts import MESSAGE_KEYS
from fastsdpo.data.messages import FILE_ROLES, SYSTEM_KEYS, parse_message, show
from fastsdpo.data.readers.values import (
    CONVERSATION_ID_KEYS,
    RECORD_ID_KEYS,
    decoded,
    identifier,
    of_turns,
    walk,
    with_system,
)
from fastsdpo.data.records import GroupedRows

NAMES = (
    "messages",
    "role",
    "content",
    "question",
    "answer",
    "id",
    "conversation_id",
    "language",
    "system",
    "rating",
    "comment",
)
ROLE_NAMES = ("user", "assistant", "system", "tool")


class FieldMap:
    """Says where a record has what: ``role=author.role,content=text,messages=chat.items``.

    A path is keys and list indexes with dots between them. `role` and `content` are paths in a message, `question`
    and `answer` in what has both; the others in the record (`rating` and `comment` in either).
    ``role.user=customer|client`` says which speakers are users. With `conversation_id` but without `messages`, a
    record is one message.

    Raises:
        ValueError: a part is not ``name=path``, or has an unknown name.
    """

    def __init__(self, text: str):
        self.text = text
        self.paths: dict[str, str] = {}
        self.roles: dict[str, str] = {}
        for item in text.split(","):
            name, equals, path = (part.strip() for part in item.partition("="))
            role = name.removeprefix("role.")
            if not equals or not path or (name not in NAMES and (role == name or role not in ROLE_NAMES)):
                roles = ", ".join(f"role.{role}" for role in ROLE_NAMES)
                raise ValueError(
                    f"--map: must be NAME=PATH,... with names of {', '.join(NAMES)}, {roles}; got {item!r}"
                )
            if name in NAMES:
                self.paths[name] = path
            else:
                self.roles.update({speaker.strip().lower(): role for speaker in path.split("|")})
        if len({"question", "answer"} & self.paths.keys()) == 1:
            raise ValueError("--map: question and answer must be given together")

    def row_key(self, record: Any) -> Callable[[Any], str | None] | None:
        """Returns a function record -> conversation id if each record is one message; else None."""
        path = self.paths.get("conversation_id")
        if "messages" in self.paths or path is None or not isinstance(record, Mapping):
            return None
        if any(isinstance(decoded(record.get(key)), (list, tuple)) for key in MESSAGE_KEYS):
            return None
        return lambda row: identifier({"id": walk(row, path)}, ("id",))

    def parse(self, record: Any) -> Iterator[Conversation]:
        """Yields the conversation of a record.

        Raises:
            TypeError, ValueError: there is nothing at a path, or a message is malformed.
        """
        rows = isinstance(record, GroupedRows)
        about = record["rows"][0] if rows else record
        messages, name = (record["rows"], "rows") if rows else self._find_messages(record)
        turns = read_turns([m for n, item in enumerate(messages) for m in self._said(item, f"{name}[{n}]")], name)
        if not rows and isinstance(about, Mapping):
            with_rating(turns, self._rating(about))
        system = {key: about[key] for key in SYSTEM_KEYS if isinstance(about, Mapping) and about.get(key)}
        if "system" in self.paths:
            system = {"system": walk(about, self.paths["system"]) or None}
        turns = with_system(system, turns)
        yield of_turns(
            turns,
            conversation_id=record["name"]
            if rows
            else self._identifier(about, "conversation_id", CONVERSATION_ID_KEYS),
            record_id=self._identifier(about, "id", RECORD_ID_KEYS),
            language=walk(about, self.paths.get("language", "language")),
        )

    def _find_messages(self, record: Any) -> tuple[Any, str]:
        if "messages" in self.paths:
            path = self.paths["messages"]
            messages = decoded(walk(record, path))
            if not isinstance(messages, (list, tuple)):
                raise TypeError(f"--map messages={path}: there must be a list of messages, got {show(messages)}")
            return messages, path
        if isinstance(record, list):
            return record, "messages"
        for key in MESSAGE_KEYS:
            messages = decoded(walk(record, key))
            if isinstance(messages, (list, tuple)):
                return messages, key
        raise TypeError("--map: the record has no list of messages; say where it is with messages=PATH")

    def _said(self, item: Any, name: str) -> Iterator[Any]:
        """The messages of an item: itself, or the question and the answer in it."""
        if "question" not in self.paths:
            yield self._message(item, name)
            return
        if not isinstance(item, Mapping):
            raise TypeError(f"{name}: must have a question and an answer, got {show(item)}")
        yield {"role": "user", "content": walk(item, self.paths["question"])}
        notes = {key: item[key] for key in NOTE_KEYS if key in item}
        yield {**notes, **self._rating(item), "role": "assistant", "content": walk(item, self.paths["answer"])}

    def _message(self, message: Any, name: str) -> Any:
        if not isinstance(message, Mapping):
            raise TypeError(f"{name}: must be a message, got {show(message)}")
        result = {key: value for key, value in message.items() if key not in ("from", "value", "parts")}
        for key, other in (("role", "from"), ("content", "value")):
            path = self.paths.get(key, key if key in message else other)
            result[key] = walk(message, path)
        speaker = str(result["role"]).strip().lower() if isinstance(result["role"], (str, int)) else None
        if speaker in self.roles:
            result["role"] = self.roles[speaker]
        result.update(self._rating(message))
        return result

    def _rating(self, source: Mapping) -> dict[str, Any]:
        found = {
            "rating": walk(source, self.paths["rating"]) if "rating" in self.paths else None,
            "rating_comment": walk(source, self.paths["comment"]) if "comment" in self.paths else None,
        }
        return rating_fields({key: value for key, value in found.items() if value is not None})

    def _identifier(self, record: Any, name: str, keys: Iterable[str]) -> str | None:
        if name in self.paths:
            return identifier({"id": walk(record, self.paths[name])}, ("id",))
        return identifier(record, keys)


_ROW_KEYS = frozenset(("id", "conversation_id", "turn_id", "prompt", "user_response"))
_TEXT_FIELDS = ("completion", "left_out")


class Hook:
    """Reads records by the user's own function: record -> a `Conversation`, a list of messages, or several of them.

    If the function has an attribute `conversation_id`, a function record -> id, it is given the list of all records of
    a conversation instead.

    Args:
        name: ``"module:function"``, or ``"path/to/file.py:function"``. The module may lie in the current folder.

    Raises:
        ValueError: the name is not of this form, or there is no such function.
        ImportError: there is no such module.
    """

    def __init__(self, name: str):
        self.name = name
        module, _, function = name.rpartition(":")
        if not module or not function.isidentifier():
            raise ValueError(f"--reader: must be MODULE:FUNCTION or FILE.py:FUNCTION, got {name!r}")
        found = _load(module, name)
        hook = getattr(found, function, None)
        if not callable(hook):
            raise ValueError(f"--reader: {module} must have a function {function}, got none")
        self.function: Callable[[Any], Any] = hook
        self._name_of = getattr(hook, "conversation_id", None)
        file = getattr(found, "__file__", None)
        self.version = [name, os.stat(file).st_mtime_ns if file and os.path.exists(file) else None]

    def __reduce__(self) -> tuple:
        return Hook, (self.name,)

    def row_key(self, record: Any) -> Callable[[Any], str | None] | None:
        """Returns a function record -> conversation id if the user's function has one; else None."""
        name_of = self._name_of
        if name_of is None:
            return None

        def key(row: Any) -> str | None:
            with contextlib.suppress(Exception):  # of the user's code: a record without a name
                return identifier({"id": name_of(row)}, ("id",))
            return None

        return key

    def parse(self, record: Any) -> Iterator[Conversation]:
        """Yields the conversations that the function returns for a record; any error in it becomes a ValueError."""
        name = record["name"] if isinstance(record, GroupedRows) else None
        try:
            result = self.function(record if name is None else record["rows"])
            items = [result] if isinstance(result, Conversation) or _is_list_of_messages(result) else list(result)
        except Exception as error:
            raise ValueError(f"--reader {self.name}: {type(error).__name__}: {error}") from None
        for item in items:
            try:
                found = self._conversation(item)
                yield found if name is None or found.id is not None else replace(found, id=name, own_id=False)
            except (TypeError, ValueError) as error:
                raise type(error)(f"--reader {self.name}: {error}") from None

    def _conversation(self, item: Any) -> Conversation:
        if isinstance(item, (list, tuple)):
            return of_turns(read_turns(item, "messages"))
        if not isinstance(item, Conversation):
            raise TypeError(f"must give a Conversation, a list of messages, or several of them, got {show(item)}")
        for fields, own in ((item.fields, {"completion"}), *((f, set()) for f in item.answer_fields.values())):
            if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
                raise TypeError(f"fields must be names and values, got {show(fields)}")
            if taken := fields.keys() & (_ROW_KEYS | own):
                raise ValueError(f"fields must not have the name of a row's own key, got {min(taken)!r}")
            json.dumps(dict(fields), ensure_ascii=False).encode()  # else rows cannot have them
        if not all(isinstance(f.get(key, ""), str) for f in item.answer_fields.values() for key in _TEXT_FIELDS):
            raise TypeError(f"answer_fields must have text as {' and '.join(_TEXT_FIELDS)}")
        messages = [
            dict(message) if message.get("role") in FILE_ROLES else parse_message(message) for message in item.messages
        ]
        return replace(item, id=identifier({"id": item.id}, ("id",)), messages=messages)


def _is_list_of_messages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def _load(module: str, name: str) -> Any:
    path = Path(module)
    if module.endswith(".py") and not path.is_file():
        raise FileNotFoundError(f"--reader: no such file: {path}")
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` does
    try:
        if not module.endswith(".py"):
            return importlib.import_module(module)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found
    except Exception as error:  # of the user's code
        raise ImportError(f"--reader {name}: cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
