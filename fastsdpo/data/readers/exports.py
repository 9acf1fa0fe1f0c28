"""Readers of chat programs' exports (ChatGPT, claude.ai, Open WebUI, LibreChat) and of public data sets' layouts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastsdpo.data.answers import LEFT_OUT, rating_fields
from fastsdpo.data.interactions import Conversation
from fastsdpo.data.messages import SYSTEM_KEYS, is_blank, show
from fastsdpo.data.readers.trees import Tree, read_tree
from fastsdpo.data.readers.values import as_list, as_mapping, conversation, first_item, identifier

ERROR_MESSAGE = "to an error message in place of an answer"
_NOT_SHOWN = "This block is not supported on your current device yet."  # what claude.ai's text has for a tool's block


def is_chatgpt(record: Mapping) -> bool:
    return isinstance(record.get("mapping"), Mapping)


def read_chatgpt(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads an element of ChatGPT's ``conversations.json``: nodes in `mapping`, the active one in `current_node`."""
    nodes = record.get("mapping")
    if not isinstance(nodes, Mapping):
        raise TypeError(f"mapping must be an object of nodes, got {show(nodes)}")
    tree = Tree()
    for name, node in nodes.items():
        if not isinstance(node, Mapping):
            raise TypeError(f"mapping[{name!r:.60}] must be a node, got {show(node)}")
        tree.add(name, node.get("parent"), _chatgpt_message(node.get("message")))
    name = identifier(record, ("conversation_id", "id"))
    return read_tree(tree, record.get("current_node"), all_branches, conversation_id=name)


def _chatgpt_message(message: Any) -> Mapping | None:
    """A message of ChatGPT as `read_turns` takes it; None where it says nothing to the model or the user."""
    if message is None:
        return None
    author, content = as_mapping(as_mapping(message).get("author")), as_mapping(as_mapping(message).get("content"))
    role, kind = author.get("role"), content.get("content_type")
    if not isinstance(message, Mapping) or not isinstance(role, str):
        raise TypeError(f"a node's message must have an author with a role, got {show(message)}")
    notes = as_mapping(message.get("metadata"))
    if kind in ("thoughts", "reasoning_recap"):
        return None
    if kind in ("user_editable_context", "model_editable_context"):  # custom instructions, memory
        parts = [content.get(key) for key in ("user_profile", "user_instructions", "model_set_context")]
        text = "\n\n".join(part for part in parts if isinstance(part, str) and not is_blank(part))
        return {"role": "system", "content": text} if text else None
    parts = content.get("parts")
    parts = [content.get("text", content.get("result"))] if parts is None else as_list(parts, "content.parts")
    said: list[Any] = []
    for part in parts:
        if isinstance(part, Mapping):
            said.append({"type": part.get("content_type") or "file"})
        elif isinstance(part, str) and not is_blank(part):
            said.append(part)
    if not said and (role != "assistant" or message.get("recipient", "all") == "all"):
        return None
    if role == "assistant" and message.get("recipient") not in (None, "all", "assistant"):
        role = "tool"  # a call: the recipient is the tool
    end = as_mapping(notes.get("finish_details")).get("type")
    end = message.get("status") if end in (None, "stop") else end
    result: dict[str, Any] = {"role": role, "content": said, "finish_reason": end, "weight": message.get("weight")}
    if kind == "system_error":
        result[LEFT_OUT] = ERROR_MESSAGE
    if notes.get("attachments"):
        result["attachments"] = notes["attachments"]
    return result


def is_claude(record: Mapping) -> bool:
    return isinstance(record.get("chat_messages"), list)


def read_claude(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a conversation of claude.ai's export: `chat_messages` with `sender`, `text` and, if newer, `content`."""
    name = identifier(record, ("uuid", "id"))
    messages = as_list(record.get("chat_messages"), "chat_messages")
    tree, last = Tree(), None
    linked = any(isinstance(m, Mapping) and m.get("parent_message_uuid") for m in messages)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"chat_messages[{index}] must be a message, got {show(message)}")
        content = message.get("content") or message.get("text")
        plain = {"role": message.get("sender"), "content": content, **rating_fields(message, ("chat_feedback",))}
        plain |= {key: message[key] for key in ("stop_reason", "truncated") if key in message}
        if isinstance(content, str) and _NOT_SHOWN in content:
            plain["tool_calls"] = True
        for key in ("attachments", "files", "files_v2"):
            if message.get(key):
                plain["files"] = message[key]
        own = message.get("uuid") if linked else index
        tree.add(own, message.get("parent_message_uuid") if linked else last, plain)
        last = own
    leaf = record.get("current_leaf_message_uuid") or last
    return read_tree(tree, leaf, all_branches, conversation_id=name)


_DETAILS_TYPE = re.compile(r'\btype="([\w-]{1,40})"')


def is_open_webui(record: Mapping) -> bool:
    chat = record.get("chat", record)
    if not isinstance(chat, Mapping):
        return False
    return isinstance(chat.get("history"), Mapping) or ("chat" in record and "messages" in chat)


def read_open_webui(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a chat of Open WebUI's export: the tree in `chat.history`, or the list `chat.messages`."""
    chat = record.get("chat", record)
    if not isinstance(chat, Mapping):
        raise TypeError(f"chat must be an object, got {show(chat)}")
    history = as_mapping(chat.get("history"))
    nodes = history.get("messages")
    name = identifier(record, ("id",)) or identifier(chat, ("id",))
    system = {"system": as_mapping(chat.get("params")).get("system") or chat.get("system") or None}
    tree, last = Tree(), None
    if isinstance(nodes, Mapping) and nodes:
        for key, message in nodes.items():
            tree.add(key, as_mapping(message).get("parentId"), _open_webui_message(message))
        last = history.get("currentId")
    else:
        for index, message in enumerate(as_list(chat.get("messages"), "chat.messages")):
            tree.add(index, last, _open_webui_message(message))
            last = index
    return read_tree(tree, last, all_branches, conversation_id=name, system=system)


def _open_webui_message(message: Any) -> Mapping:
    if not isinstance(message, Mapping):
        raise TypeError(f"a message of a chat must be an object, got {show(message)}")
    result = {key: value for key, value in message.items() if key != "parts"}
    for key in ("content", "originalContent"):
        text = message.get(key)
        if isinstance(text, str) and "<details" in text:
            result[key], kinds = _without_details(text)
            if kinds - {"reasoning"}:  # tool_calls, code_interpreter
                result["tool_calls"] = sorted(kinds)
            elif kinds:
                result["reasoning"] = True
    if message.get("sources"):  # what was found in documents stood in the prompt
        result["files"] = message["sources"]
    if message.get("error"):
        result[LEFT_OUT] = ERROR_MESSAGE
    return result


def _without_details(text: str) -> tuple[str, set[str]]:
    """A text without the blocks in which Open WebUI keeps reasoning and calls, and their types."""
    said, kinds, place = [], set(), 0
    while (start := text.find("<details", place)) >= 0:
        opened = text.find(">", start)
        close = text.find("</details>", opened) if opened >= 0 else -1
        if close < 0:
            break
        kind = _DETAILS_TYPE.search(text, start, opened)
        end = close + len("</details>")
        said.append(text[place : start if kind else end])
        if kind:
            kinds.add(kind[1])
            said[-1] = said[-1].rstrip()
        place = end
    return "".join([*said, text[place:]]).strip() if kinds else text, kinds


# Reasoning in a text, as LibreChat wrote it before it had parts for it.
_THINKING = re.compile(r"\A:::thinking\n.*?\n:::\s*", re.DOTALL)


def is_librechat(record: Mapping) -> bool:
    if isinstance(record.get("messagesTree"), list):
        return True
    first = first_item(record.get("messages"))
    return isinstance(first, Mapping) and "isCreatedByUser" in first


def read_librechat(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads LibreChat's JSON export: `messages` with `parentMessageId`, or `messagesTree` with `children`."""
    tree, last = Tree(), None
    root = "messagesTree" if record.get("messagesTree") is not None else "messages"
    todo = list(reversed(as_list(record.get(root), root)))
    while todo:
        message = todo.pop()
        if not isinstance(message, Mapping):
            raise TypeError(f"a message of {root} must be an object, got {show(message)}")
        name = message.get("messageId")
        tree.add(name, message.get("parentMessageId"), _librechat_message(message))
        last = name
        children = message.get("children")
        if children:
            todo += reversed(as_list(children, "children"))
    system = {"system": as_mapping(record.get("options")).get("promptPrefix") or None}
    name = identifier(record, ("conversationId",))
    return read_tree(tree, last, all_branches, conversation_id=name, system=system)


def _librechat_message(message: Mapping) -> Mapping:
    by_user = message.get("isCreatedByUser")
    if not isinstance(by_user, bool):
        raise TypeError(f"a message of LibreChat must have isCreatedByUser, got {show(by_user)}")
    content, text = message.get("content"), message.get("text")
    result: dict[str, Any] = {
        "role": "user" if by_user else "assistant",
        "content": _THINKING.sub("", text) if isinstance(text, str) else text,
        **rating_fields(message, ("feedback",)),
        **{key: message[key] for key in ("finish_reason", "unfinished") if key in message},
    }
    if isinstance(content, list) and content:
        result["content"] = [part for part in content if as_mapping(part).get("type") != "error"]
        if len(result["content"]) < len(content):
            result[LEFT_OUT] = ERROR_MESSAGE
    for key in ("files", "attachments"):
        if message.get(key):
            result[key] = message[key]
    if message.get("error"):
        result[LEFT_OUT] = ERROR_MESSAGE
    return result


def is_chatbox(record: Mapping) -> bool:
    return "__exported_items" in record or isinstance(first_item(record.get("chat-sessions")), Mapping)


def read_chatbox(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads Chatbox's export: sessions under ``session:ID``, or in `chat-sessions`, each with its earlier `threads`.

    Where a session was summed up, the model saw the summary in place of what was said: nothing is taken from there on.
    """
    sessions = [value for key, value in record.items() if key.startswith("session:")]
    for session in map(as_mapping, [*sessions, *as_list(record.get("chat-sessions") or [], "chat-sessions")]):
        if session.get("type") == "picture":
            continue
        for thread in map(as_mapping, [session, *as_list(session.get("threads") or [], "threads")]):
            points = [as_mapping(point) for point in thread.get("compactionPoints") or []]
            ends = {point.get("boundaryMessageId") for point in points}
            messages: list[Any] = []
            for message in as_list(thread.get("messages") or [], "messages"):
                messages.append(_chatbox_message(message))
                if message.get("id") in ends:
                    messages.append({"role": "system", "content": "(a summary)"})
            if messages:
                yield conversation(messages, "messages", conversation_id=identifier(thread, ("id",)))


def _chatbox_message(message: Any) -> Mapping:
    if not isinstance(message, Mapping):
        raise TypeError(f"a message of Chatbox must be an object, got {show(message)}")
    parts = message.get("contentParts")
    result = {key: value for key, value in message.items() if key not in ("contentParts", "links")}
    if isinstance(parts, (list, tuple)):
        result["content"] = [part for part in parts if as_mapping(part).get("type") != "info"]
    if message.get("links"):
        result["files"] = message["links"]
    if message.get("isSummary"):
        result["role"] = "system"
    if message.get("generating"):
        result["interrupted"] = True
    if message.get("error"):
        result[LEFT_OUT] = ERROR_MESSAGE
    return result


def is_oasst(record: Mapping) -> bool:
    prompt = record.get("prompt")
    return isinstance(prompt, Mapping) and "replies" in prompt


def read_oasst(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a tree of OpenAssistant (`prompt` with `replies`), or its rows: each path, with its answers' ranks."""
    tree, language = Tree(), None
    name = identifier(record, ("message_tree_id",))
    nested = record.get("tree_rows") is None
    todo = [(record.get("prompt"), None)] if nested else [(row, None) for row in reversed(record["tree_rows"])]
    while todo:
        message, parent = todo.pop()
        if not isinstance(message, Mapping):
            raise TypeError(f"a message of a tree must be an object, got {show(message)}")
        own = message.get("message_id", message.get("id"))
        own = f"node {len(tree.nodes)}" if own is None else own
        language = language or message.get("lang")
        plain = {"role": message.get("role"), "content": message.get("text")}
        rank = message.get("rank")
        if isinstance(rank, (int, float)) and not isinstance(rank, bool):
            plain["rank"] = rank
        tree.add(own, parent if nested else message.get("parent_id"), None if message.get("deleted") else plain)
        replies = message.get("replies")
        if nested and replies:
            todo += [(reply, own) for reply in reversed(as_list(replies, "replies"))]
    return read_tree(tree, None, True, conversation_id=name, language=language)


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages in ``role/content`` or ``from/value`` form."""
    first = first_item(value)
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def is_arena(record: Mapping) -> bool:
    return is_messages(record.get("conversation_a")) and is_messages(record.get("conversation_b"))


def read_arena(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a battle of Chatbot Arena: `conversation_a`, `conversation_b`, and the vote in `winner` as ratings."""
    winner = record.get("winner")
    name = identifier(record, ("question_id", "id"))
    for side in "ab":
        messages = as_list(record.get(f"conversation_{side}"), f"conversation_{side}")
        rating = {}
        if winner in ("model_a", "model_b"):
            rating = {"rating": "up" if winner == f"model_{side}" else "down"}
        elif winner in ("tie (bothbad)", "both_bad"):
            rating = {"rating": "down"}
        if messages and isinstance(messages[-1], Mapping):
            messages = [*messages[:-1], {**messages[-1], **rating}]
        record_id = None if name is None else f"{name}:{side}"
        yield conversation(
            messages, f"conversation_{side}", record_id=record_id, language=record.get("language"), system=record
        )


def is_turns(record: Mapping) -> bool:
    return isinstance(first_item(record.get("data")), str)


def read_turns_of_texts(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a record of UltraChat: texts in `data`, by user and assistant in turns, the user's first."""
    texts = as_list(record.get("data"), "data")
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    yield conversation(messages, "data", record_id=identifier(record, ("id",)), system=record)


def is_alpaca(record: Mapping) -> bool:
    return isinstance(record.get("instruction"), str) and ("output" in record or "history" in record)


def read_alpaca(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a record of Alpaca with a `history` of pairs, which precede `instruction` (with `input`) and `output`."""
    messages = []
    for index, pair in enumerate(as_list(record.get("history") or [], "history")):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise TypeError(f"history[{index}] must be a pair of texts, got {show(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = [record.get(key) for key in ("instruction", "input") if record.get(key) not in (None, "")]
    texts = [text for text in question if isinstance(text, str)]
    if len(texts) != len(question):
        raise TypeError(f"instruction and input must be text, got {show(question)}")
    messages.append({"role": "user", "content": "\n".join(texts)})
    if record.get("output") not in (None, ""):
        messages.append({"role": "assistant", "content": record["output"]})
    system = {key: record[key] for key in SYSTEM_KEYS if record.get(key)}
    yield conversation(messages, "history", record_id=identifier(record, ("id",)), system=system)
