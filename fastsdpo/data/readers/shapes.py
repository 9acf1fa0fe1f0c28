"""Reads the forms in which model APIs have messages: those that were sent, and those that came back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastsdpo.data.answers import END_KEYS, was_cut
from fastsdpo.data.messages import SYSTEM_KEYS, show
from fastsdpo.data.readers.frames import read_frames
from fastsdpo.data.readers.streams import find_events, join_events, whole_response
from fastsdpo.data.readers.values import as_list, as_mapping, decoded, first_item

_LANGCHAIN_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}
_TEXT_KEYS = (
    "output_text",
    "text",
    "content",
    "answer",
    "completion",
    "generated_text",
    "response",
    "result",
    "output",
)
# Where an answer has more about itself, such as why it ended: LangChain's, TGI's.
_ABOUT = ("response_metadata", "generation_info", "details")
_QUESTION_KEYS = ("question", "query", "user_input", "text", "content", "message")


def standard(message: Any) -> Any:
    """Converts a message of LangChain, OpenInference or the Responses API to a form that `parse_message` takes."""
    if isinstance(message, str):
        return {"role": "user", "content": message}
    if not isinstance(message, Mapping):
        return message
    if isinstance(message.get("message"), Mapping):  # OpenInference's; a choice, beside which stands why it ended
        message = {**{key: message[key] for key in END_KEYS if message.get(key)}, **message["message"]}
    if "message.role" in message:
        message = {key.removeprefix("message."): value for key, value in message.items() if isinstance(key, str)}
    if "role" in message or "from" in message:
        if message.get("type") == "message" and "status" in message:  # of the Responses API
            message = {**message, "finish_reason": message["status"]}
        return _openinference(message) if "contents" in message else message
    kind, data = message.get("type"), message
    if isinstance(message.get("kwargs"), Mapping):
        path = message.get("id")
        name = path[-1] if isinstance(path, (list, tuple)) and path else None
        data = message["kwargs"]
        kind = name.removesuffix("Chunk").removesuffix("Message").lower() if isinstance(name, str) else kind
    elif isinstance(message.get("data"), Mapping):
        data = message["data"]
    if isinstance(kind, str):
        kind = kind.removesuffix("MessageChunk").lower()
        if kind in _LANGCHAIN_ROLES or kind == "chat":
            return _langchain(_LANGCHAIN_ROLES.get(kind, data.get("role")), data)
        if kind == "reasoning":
            return None
        if "call" in kind:  # function_call, function_call_output, web_search_call, ...
            return {"role": "tool", "content": ""}
        if kind == "item_reference":
            raise ValueError("an item refers to one that is not in the record")
    return message


def _langchain(role: Any, data: Mapping) -> Mapping:
    more = as_mapping(data.get("additional_kwargs"))
    calls = data.get("tool_calls") or more.get("tool_calls") or more.get("function_call")
    result = {"role": role, "content": data.get("content")}
    if calls:
        result["tool_calls"] = calls
    if more.get("reasoning_content"):
        result["reasoning_content"] = more["reasoning_content"]
    about = {**data, **as_mapping(data.get("response_metadata"))}
    return {**result, **{key: about[key] for key in END_KEYS if key in about}}


def _openinference(message: Mapping) -> Mapping:
    parts = []
    for part in as_list(message["contents"], "contents"):
        part = as_mapping(part)
        part = part.get("message_content", part)
        if isinstance(part, Mapping):
            part = {k.removeprefix("message_content."): v for k, v in part.items() if isinstance(k, str)}
        parts.append(part)
    return {**message, "content": parts}


def is_message(value: Any) -> bool:
    """Whether a value is a message in a form that `standard` knows."""
    if not isinstance(value, Mapping):
        return False
    if "role" in value or "from" in value or "message.role" in value:
        return True
    if isinstance(value.get("message"), Mapping):
        return "role" in value["message"]
    kind, path = value.get("type"), value.get("id")
    if isinstance(kind, str) and kind.removesuffix("MessageChunk").lower() in _LANGCHAIN_ROLES:
        return "content" in value or isinstance(value.get("data"), Mapping)
    name = path[-1] if isinstance(path, (list, tuple)) and path else None
    return isinstance(value.get("kwargs"), Mapping) and isinstance(name, str) and "Message" in name


def standard_list(messages: Any, name: str) -> list[Any]:
    """Converts each message of a list by `standard`; a LangChain batch that holds one list counts as that list."""
    messages = as_list(messages, name)
    if messages and all(isinstance(item, (list, tuple)) for item in messages):
        if len(messages) > 1:
            raise ValueError(f"{name} must be one conversation, got a batch of {len(messages)}")
        messages = messages[0]
    return [item for item in map(standard, messages) if item is not None]


def _is_body(value: Mapping) -> bool:
    """Whether an object is a body as Cloudflare logs it: Workers AI's answer or result, a stream, or encrypted."""
    if isinstance(value.get("response"), str):
        return "usage" in value or "tool_calls" in value
    named = {"success", "errors"} & value.keys() and isinstance(value.get("result"), Mapping)
    return bool(named) or isinstance(value.get("streamed_data"), list) or value.get("type") == "encrypted"


def _structured(value: Any, keys: tuple[str, ...]) -> Any:
    """A text that holds JSON of a call, decoded; one that was said, and may be JSON too, as it is."""
    found = decoded(value)
    if found is value or (isinstance(found, Mapping) and (any(key in found for key in keys) or _is_body(found))):
        return found
    first = first_item(found)
    first = first_item(first) if isinstance(first, (list, tuple)) else first
    return found if is_message(first) or (isinstance(first, Mapping) and "object" in first) else value


def read_input(value: Any, name: str = "input") -> tuple[list[Any], dict[str, Any]]:
    """Returns (the raw messages that were sent, an object with the system prompt beside them).

    Raises:
        TypeError, ValueError: the form is not known, or does not hold the history.
    """
    value = _structured(value, ("messages", "contents", "prompt", "input", "body", "kwargs", "request", "role"))
    if isinstance(value, str):
        return read_frames(value) or [{"role": "user", "content": value}], {}
    if isinstance(value, (list, tuple)):
        return standard_list(value, name), {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be messages or text, got {show(value)}")
    system = {key: value[key] for key in SYSTEM_KEYS if value.get(key)}
    if value.get("instructions"):
        system["system"] = value["instructions"]
    for key in ("system_instruction", "systemInstruction", "system"):
        if isinstance(value.get(key), Mapping):  # Gemini's
            system[key] = value[key].get("parts")
    if value.get("type") == "encrypted":
        raise ValueError(f"{name} is encrypted; decrypt the log before")
    if value.get("previous_response_id"):
        raise ValueError(
            f"{name} goes on from a response (previous_response_id) whose messages are not in the record; calls are "
            "joined where each is a record of a file that begins with one"
        )
    past = decoded(value.get("chat_history"))  # LangChain's, beside the question
    past = standard_list(past, f"{name}.chat_history") if isinstance(past, (list, tuple)) else []
    for key in ("messages", "contents", "prompt", "input"):
        if decoded(value.get(key)):
            messages, inner = (
                (_gemini(value[key]), {}) if key == "contents" else read_input(value[key], f"{name}.{key}")
            )
            return [*past, *messages], {**inner, **system}
    for key in ("body", "kwargs", "request", "inputBodyJson"):
        if isinstance(decoded(value.get(key)), Mapping):
            return read_input(value[key], f"{name}.{key}")
    if is_message(value):
        return [standard(value)], system
    for key in _QUESTION_KEYS:
        if isinstance(value.get(key), str):
            return [*past, {"role": "user", "content": value[key]}], system
    raise TypeError(f"{name} must have messages, contents, input or prompt, got the keys {show(list(value))}")


def _gemini(contents: Any) -> list[Any]:
    if isinstance(contents, (str, Mapping)):
        contents = [contents]
    messages = []
    for item in as_list(contents, "contents"):
        if isinstance(item, Mapping):
            item = {"role": item.get("role") or "user", "content": item.get("parts")}
        messages.append(standard(item))
    return messages


def read_output(value: Any, name: str = "output") -> tuple[list[Any], list[Any]]:
    """Returns (the raw messages that came back, further answers to the same prompt).

    An answer that was cut off, as what stands around it says, is marked so.

    Raises:
        TypeError, ValueError: the form is not known, or the call failed.
    """
    value = _structured(
        value, ("choices", "candidates", "generations", "messages", "output", "message", "body", "role")
    )
    if (events := find_events(value)) is not None:
        value = whole_response(events) or join_events(events)
    answers, others = _read_answers(value, name)
    if isinstance(value, Mapping) and answers and isinstance(answers[-1], Mapping):
        about = (value, {"finish_reason": value.get("status")}, *(as_mapping(value.get(key)) for key in _ABOUT))
        if any(map(was_cut, about)) or value.get("incomplete_details"):
            answers = [*answers[:-1], {**answers[-1], "interrupted": True}]
    return answers, others


def _read_answers(value: Any, name: str) -> tuple[list[Any], list[Any]]:
    """`read_output` of a value that is decoded."""
    if value is None or value == "":
        return [], []
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}], []
    if isinstance(value, (list, tuple)):
        return _list_of_answers(value, name)
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be an answer, got {show(value)}")
    status = value.get("status_code", value.get("status"))
    if isinstance(status, int) and status >= 400:
        raise ValueError(f"{name}: the call failed with status {status}")
    if value.get("error"):
        raise ValueError(f"{name}: the call failed: {show(value['error'])}")
    if value.get("choices"):
        return _choices(as_list(value["choices"], f"{name}.choices"), name)
    if value.get("candidates"):
        return _candidates(as_list(value["candidates"], f"{name}.candidates"))
    if value.get("generations"):
        return _generations(as_list(value["generations"], f"{name}.generations"), name)
    if value.get("type") == "encrypted":
        raise ValueError(f"{name} is encrypted; decrypt the log before")
    for key in ("messages", "output", "message", "body", "outputBodyJson", "result", "streamed_data"):
        found = decoded(value.get(key))
        found = find_events(found) or found
        if isinstance(found, (list, tuple, Mapping)) and found:
            return read_output(found, f"{name}.{key}")
    if is_message(value):
        message = standard(value)
        return ([] if message is None else [message]), []
    if isinstance(value.get("content"), (list, tuple)):  # Anthropic's, Gemini's without a role
        return [{"role": "assistant", "content": value["content"]}], []
    for key in _TEXT_KEYS:
        if isinstance(value.get(key), str):
            return [{"role": "assistant", "content": value[key]}], []
    raise TypeError(f"{name} must be an answer, got the keys {show(list(value))}")


def _candidates(candidates: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Gemini's."""
    messages = []
    for item in map(as_mapping, candidates):
        said = {"role": "assistant", "content": as_mapping(item.get("content")).get("parts")}
        messages.append({**said, "finish_reason": item.get("finishReason", item.get("finish_reason"))})
    return messages[:1], messages[1:]


def _generations(answers: Sequence[Any], name: str) -> tuple[list[Any], list[Any]]:
    """LangChain's: of one prompt, or of a batch, whose first prompt counts."""
    of_first = first_item(answers)
    answers = of_first if isinstance(of_first, (list, tuple)) else answers
    said = [{**item, "output": item.get("message") or item} for item in map(as_mapping, answers)]
    first, *others = [read_output(item, name)[0] for item in said] or [[]]
    return first, [message for messages in others for message in messages]


def _list_of_answers(value: Sequence[Any], name: str) -> tuple[list[Any], list[Any]]:
    messages = standard_list(value, name)
    texts = (isinstance(item, Mapping) and "role" not in item and "from" not in item for item in messages)
    if messages and all(texts):  # content parts
        return [{"role": "assistant", "content": messages}], []
    return messages, []


def _choices(choices: Sequence[Any], name: str) -> tuple[list[Any], list[Any]]:
    answers = []
    for choice in choices:
        choice = as_mapping(choice)
        message = choice.get("message")
        end = {"role": "assistant", "finish_reason": choice.get("finish_reason")}
        if isinstance(message, Mapping):
            answers.append({**end, **message})
        elif isinstance(choice.get("text"), str):
            answers.append({**end, "content": choice["text"]})
        else:
            raise TypeError(f"{name}.choices must have a message or text each, got {show(choice)}")
    return answers[:1], answers[1:]
