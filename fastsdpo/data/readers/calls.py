"""Readers of logged model calls: what was sent and what came back, in the message formats of common APIs.

The record of a call has the history so far. Calls of one conversation are merged later, by their id or because
the messages of one begin the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastsdpo.data.answers import rating_fields, read_turns, with_rating
from fastsdpo.data.interactions import Conversation
from fastsdpo.data.messages import SYSTEM_KEYS, parse_message
from fastsdpo.data.readers.frames import read_frames
from fastsdpo.data.readers.shapes import is_message, read_input, read_output, standard_list
from fastsdpo.data.readers.values import (
    CONVERSATION_ID_KEYS,
    as_mapping,
    conversation,
    decoded,
    first_item,
    identifier,
    of_turns,
    with_system,
)


def call(
    sent: Any,
    answer: Any,
    *,
    names: tuple[str, str] = ("request", "response"),
    conversation_id: str | None = None,
    record_id: str | None = None,
    rating: Mapping[str, Any] | None = None,
) -> Conversation:
    """Makes a conversation of a call: the messages that were sent, and the answer.

    Args:
        sent, answer: in any form that `read_input` and `read_output` take.
        names: what errors call the two.
        conversation_id, record_id: the conversation's id; the record's, if there is no such id.
        rating: fields of the answer, such as its rating.

    Raises:
        TypeError, ValueError: the form is not known, there is no prompt, or the call failed.
    """
    messages, system = read_input(sent, names[0])
    answers, others = read_output(answer, names[1])
    if not messages:
        raise ValueError(f"{names[0]} must have messages, got none: an answer alone has no prompt")
    turns = read_turns([*_unsaid(messages, answers, names), *answers], f"{names[0]} and {names[1]}")
    last = len(turns.messages) - 1
    if answers and turns.messages[last]["role"] == "assistant":
        said = [parse_message(message) for message in others]
        texts = [message["content"] for message in said if message["role"] == "assistant"]
        if texts:
            turns.fields.setdefault(last, {})["alternatives"] = texts
        if rating:
            with_rating(turns, rating)
    turns = with_system(system, turns)
    return of_turns(turns, conversation_id=conversation_id, record_id=record_id)


def _unsaid(messages: list[Any], answers: list[Any], names: tuple[str, str]) -> list[Any]:
    """The messages that were sent and did not come back with the answer, as a graph's state has them all.

    Raises:
        ValueError: others of the user came back, so that what the model saw is not known.
    """
    back = [parse_message(message) for message in answers]
    if not any(message["role"] in ("user", "user file") for message in back):
        return messages
    sent = [(message, parse_message(message)) for message in messages]
    for left in ("", "system"):
        run = [said for _, said in sent if said["role"] != left]
        if any(run == back[start : start + len(run)] for start in range(len(back))):
            return [message for message, said in sent if said["role"] == left]
    raise ValueError(f"{names[1]} has messages of the user, and not those of {names[0]}")


def session(record: Any) -> str | None:
    """Returns the conversation's id from a logged record or its metadata, or None."""
    found = identifier(record, CONVERSATION_ID_KEYS)
    for key in ("metadata", "extra", "properties", "request_properties"):
        if found is None:
            found = identifier(as_mapping(as_mapping(record).get(key)), (*CONVERSATION_ID_KEYS, "Helicone-Session-Id"))
    return found


REQUESTS = ("request", "request_body", "requestBody", "RequestBody", "req", "full_request", "modelInput")
REQUESTS += ("BackendRequestBody",)  # Azure API Management's
RESPONSES = (
    "response",
    "response_body",
    "responseBody",
    "ResponseBody",
    "resp",
    "res",
    "full_response",
    "modelOutput",
    "BackendResponseBody",
)


def is_proxy(record: Mapping) -> bool:
    return any(record.get(key) for key in REQUESTS) and any(key in record for key in RESPONSES)


def read_proxy(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a pair of request and response, as proxies log them, of any of the APIs."""
    sent = next((key for key in REQUESTS if record.get(key)), "request")
    back = next((key for key in RESPONSES if record.get(key)), "response")
    name = session(record) or session(as_mapping(record.get(sent)))
    yield call(
        record.get(sent),
        record.get(back),
        names=(sent, back),
        conversation_id=name,
        record_id=identifier(record, ("id", "request_id", "uuid")),
        rating=rating_fields(record) or rating_fields({"rating": record.get("feedback_rating")}),  # Helicone's
    )


def is_gateway(record: Mapping) -> bool:
    if decoded(record.get("messages")) or decoded(record.get("proxy_server_request")):
        return bool(record.get("response"))
    sent = decoded(record.get("input"))
    return (is_message(first_item(sent)) or "inputBodyJson" in as_mapping(sent)) and bool(record.get("output"))


def read_gateway(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads `messages` and `response` (or `input`, `output`) side by side: LiteLLM's logs, and other gateways."""
    own = decoded(record.get("messages")) or decoded(record.get("input"))
    answer = record.get("response", record.get("output"))
    yield call(
        record if own else record.get("proxy_server_request"),
        answer,
        names=("messages", "response"),
        conversation_id=session(record),
        record_id=identifier(record, ("id", "request_id", "uuid")),
        rating=rating_fields(record),
    )


def is_stored(record: Mapping) -> bool:
    return isinstance(record.get("choices"), list)


def read_stored(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a stored completion of OpenAI: `choices`, with the `messages` (or `input`) that were sent."""
    sent = next((key for key in ("messages", "input_messages", "input") if decoded(record.get(key))), None)
    if sent is None:
        raise ValueError(
            "choices are answers alone, without their prompt; add the messages of each completion as 'messages' "
            "(GET /v1/chat/completions/ID/messages)"
        )
    yield call(
        {**{key: record[key] for key in SYSTEM_KEYS if record.get(key)}, "messages": record[sent]},
        {"choices": record.get("choices")},
        names=(sent, "choices"),
        conversation_id=session(record),
        record_id=identifier(record, ("id",)),
        rating=rating_fields(record),
    )


def is_batch(record: Mapping) -> bool:
    return "custom_id" in record and not {"body", "response", "params", "result"}.isdisjoint(record)


def read_batch(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a line of a batch's input, with the output's if both are there: `body` and `response` of OpenAI, `params`
    and `result` of Anthropic."""
    sent, back = ("params", "result") if {"params", "result"} & record.keys() else ("body", "response")
    if not as_mapping(record.get(sent)):
        raise ValueError(
            f"a line of a batch's output has no prompt; put the {sent} of the input line with the same custom_id "
            f"beside it as {sent!r}"
        )
    yield call(
        record.get(sent),
        record.get(back),
        names=(sent, back),
        conversation_id=session(record) or session(as_mapping(record.get(sent))),
        record_id=identifier(record, ("custom_id",)),
    )


def is_responses(record: Mapping) -> bool:
    output = first_item(decoded(record.get("output")))
    return record.get("object") == "response" or (
        isinstance(output, Mapping) and isinstance(output.get("type"), str) and "input" in record
    )


def read_responses(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a call of the Responses API: `input` (text or items), `output` items, `instructions`."""
    if not decoded(record.get("input")):
        raise ValueError("a response has no prompt; put what was sent beside 'output' as 'input'")
    answer = {key: record[key] for key in ("output", "status", "incomplete_details", "error") if key in record}
    named = record.get("conversation")
    name = identifier(named, ("id",)) if isinstance(named, Mapping) else identifier(record, ("conversation",))
    yield call(
        {key: value for key, value in record.items() if key in ("input", "instructions", "previous_response_id")},
        answer if record.get("output") else None,
        names=("input", "output"),
        conversation_id=name or session(record),
        record_id=identifier(record, ("id",)),
    )


def is_gemini(record: Mapping) -> bool:
    return isinstance(record.get("contents"), list)


def read_gemini(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a call of Gemini: `contents` with `parts`, and the answer's `candidates` if they are there."""
    answer = {"candidates": record["candidates"]} if record.get("candidates") else record.get("response")
    yield call(
        {k: record[k] for k in ("contents", "systemInstruction", "system_instruction") if record.get(k)},
        answer,
        names=("contents", "candidates"),
        conversation_id=session(record),
        record_id=identifier(record, ("id",)),
    )


def is_langchain(record: Any) -> bool:
    messages = record if isinstance(record, list) else as_mapping(record).get("messages")
    first = first_item(decoded(messages))
    return is_message(first) and "role" not in first and "from" not in first


def read_langchain(record: Any, all_branches: bool) -> Iterator[Conversation]:
    """Reads messages of LangChain: ``type: human/ai``, the same with `data`, or serialised with `kwargs`."""
    messages = record if isinstance(record, list) else as_mapping(record).get("messages")
    about = {} if isinstance(record, list) else record
    yield conversation(
        standard_list(messages, "messages"),
        "messages",
        conversation_id=session(about),
        record_id=identifier(about, ("id", "uuid")),
        system=about,
    )


def is_vllm(record: Mapping) -> bool:
    prompt = record.get("prompt")
    return isinstance(prompt, str) and ("outputs" in record or bool(read_frames(prompt)))


def read_vllm(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a request of vLLM's log: the rendered `prompt`, split at its control tokens, and the `output`."""
    messages = read_frames(record.get("prompt"))
    if not messages:
        raise ValueError(
            "prompt must be text that a chat template has rendered (ChatML, Llama 3, Gemma), got none of their "
            "control tokens"
        )
    output = record.get("output") or first_item(record.get("outputs"))
    name = identifier(record, ("request_id", "id"))
    yield call(messages, output, names=("prompt", "output"), conversation_id=session(record), record_id=name)
