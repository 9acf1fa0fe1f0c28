"""Joins the pieces in which an answer was streamed: the events of the APIs of OpenAI, Anthropic, Google, Cohere,
Bedrock and Ollama, in a list, as lines of JSON, or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastsdpo.data.answers import END_KEYS
from fastsdpo.data.messages import CALL_KEYS, read_content, show
from fastsdpo.data.readers.values import as_mapping, first_item, walk

_CONVERSE = {"messageStart", "contentBlockStart", "contentBlockDelta", "contentBlockStop", "messageStop"}
_WORKERS_AI = {"response", "p", "tool_calls", "usage"}  # Cloudflare's; the last event has the usage
_TYPES = ("message_", "content_block_", "message-", "content-", "response.", "ping")
# Where an event has its piece of the answer.
_PIECES = ("choices.0.delta", "contentBlockDelta.delta", "delta.message", "delta", "candidates.0.content", "message")
_CALLS = (*CALL_KEYS, "toolUse", "partial_json")


def _is_event(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    if isinstance(value.get("type"), str):
        return value["type"].startswith(_TYPES)
    if isinstance(value.get("response"), str) and value.keys() <= _WORKERS_AI:
        return True
    kind = str(value.get("object"))
    if "chunk" in kind or kind == "text_completion" or not _CONVERSE.isdisjoint(value):
        return True
    return isinstance(value.get("done"), bool) or isinstance(first_item(value.get("candidates")), Mapping)


def find_events(value: Any) -> list[Mapping] | None:
    """Returns the events of a streamed answer; None if the value is none.

    Raises:
        ValueError: it is a stream, of an API that is not known or of a call that failed.
    """
    sent = isinstance(value, str) and value.lstrip().startswith(("data:", "event:", ":"))
    done = sent and "[DONE]" in value
    if isinstance(value, str):
        lines = value.splitlines() if sent or value.lstrip().startswith("{") else []
        lines = [line[5:] for line in lines if line.startswith("data:")] if sent else lines
        try:
            value = [json.loads(line) for line in lines if line.strip() not in ("", "[DONE]")]
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], Mapping):
        return None
    if done and all(isinstance(event, Mapping) and event.keys() <= _WORKERS_AI for event in value):
        value = [*value, {"response": "", "usage": True}]  # which older streams lack
    if not any(map(_is_event, value[:2])):  # Azure's first may be of its filter
        if sent:
            raise ValueError(f"a stream must have the events of a known API, got {show(value[0])}")
        return None
    return [event for event in value if isinstance(event, Mapping)]


def whole_response(events: Sequence[Mapping]) -> Mapping | None:
    """Returns the response in the last event of a stream of the Responses API, which has it whole."""
    last = as_mapping(events[-1].get("response"))
    return last if str(events[-1].get("type")).startswith("response.") and last else None


def join_events(events: Sequence[Mapping]) -> dict[str, Any]:
    """Makes a message of the events. If none of them says why the answer ended, it was interrupted."""
    texts, end, calls = [], None, False
    for event in events:
        choice = as_mapping(first_item(event.get("choices")))
        if choice.get("index"):  # of another answer
            continue
        text, beside = _piece(event, choice)
        texts.append(text)
        calls = calls or beside == "tool"
        said = (choice, first_item(event.get("candidates")), event.get("delta"), event.get("messageStop"), event)
        found = [place[key] for place in map(as_mapping, said) for key in END_KEYS if place.get(key)]
        whole = event.get("done") is True or (event.get("usage") and event.keys() <= _WORKERS_AI)
        end = (found or [end or ("stop" if whole else None)])[0]
    message = {"role": "assistant", "content": "".join(texts), "finish_reason": end}
    return {**message, **({"tool_calls": True} if calls else {}), **({} if end else {"interrupted": True})}


def _piece(event: Mapping, choice: Mapping) -> tuple[str, str | None]:
    """(text, "tool" where a tool is called) of an event."""
    piece = next((found for path in _PIECES if (found := walk(event, path)) is not None), {})
    if isinstance(piece, str):  # the Responses API's, which has reasoning and arguments of calls so too
        return (piece if event.get("type") == "response.output_text.delta" else ""), None
    begun = walk(event, "content_block") or walk(event, "contentBlockStart.start") or {}
    if any(place.get(key) for place in map(as_mapping, (piece, begun)) for key in _CALLS):
        return "", "tool"
    if "tool" in str(as_mapping(begun).get("type")):
        return "", "tool"
    piece = as_mapping(piece)
    content = piece.get("content", piece.get("parts", piece.get("text", choice.get("text", event.get("response")))))
    if isinstance(content, Mapping):  # Cohere's
        content = content.get("text")
    return read_content(content if isinstance(content, (str, list)) else None)
