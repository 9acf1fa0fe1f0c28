"""Readers of traced calls: Langfuse, LangSmith, and spans of OpenTelemetry and OpenInference (Phoenix)."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastsdpo.data.answers import rating_fields, was_cut
from fastsdpo.data.interactions import Conversation
from fastsdpo.data.messages import show
from fastsdpo.data.readers.calls import call, session
from fastsdpo.data.readers.shapes import is_message
from fastsdpo.data.readers.values import as_list, as_mapping, decoded, first_item, identifier, walk


class NotACall(ValueError):
    """Raised for an entry of a trace that is not a model call: a tool, a search, a step of a chain."""

    kind = "not a call of a model"


# Scores of a trace that a user gave; other scores are a judge's or a metric's.
_BY_USER = re.compile(r"feedback|thumb|rating|user|like|vote", re.IGNORECASE)


def _user_score(scores: Any) -> dict[str, Any]:
    """The fields of the first score that its name says a user gave."""
    for score in scores if isinstance(scores, (list, tuple)) else []:
        score = as_mapping(score)
        name = score.get("name", score.get("key"))
        if not isinstance(name, str) or not _BY_USER.search(name):
            continue
        result = as_mapping(score.get("result"))  # Phoenix
        value = next(
            (v for v in (score.get("stringValue"), result.get("label"), score.get("value")) if v is not None), None
        )
        value = score.get("score", result.get("score")) if value is None else value
        kind = score.get("dataType", score.get("data_type"))
        if kind == "BOOLEAN" and value in (0, 1):
            value = bool(value)
        comment = score.get("comment") or result.get("explanation")
        return rating_fields({"rating": value, "rating_comment": comment})
    return {}


_LANGFUSE = ("traceId", "trace_id", "sessionId", "session_id", "observations", "projectId", "project_id", "scores")


def is_langfuse(record: Mapping) -> bool:
    has_text = record.get("input") is not None or record.get("output") is not None
    if isinstance(record.get("observations"), list):
        return True
    return has_text and any(key in record for key in _LANGFUSE)


def read_langfuse(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a trace or observation of Langfuse: `input`, `output`, `sessionId`, the user's `scores`.

    A trace whose own input is no list of messages gives the calls among its observations.
    """
    kind = record.get("type")
    if isinstance(kind, str) and kind.upper() not in ("GENERATION", "AGENT", "CHAIN", "TRACE"):
        raise NotACall(f"an observation of the type {kind!r:.40}")
    name, trace = session(record), identifier(record, ("id", "trace_id"))
    rating = {**rating_fields(record), **_user_score(decoded(record.get("scores")))}
    own = decoded(record.get("input"))
    inner = [as_mapping(item) for item in as_list(record.get("observations") or [], "observations")]
    calls = [item for item in inner if str(item.get("type")).upper() == "GENERATION" and decoded(item.get("input"))]
    if not calls or is_message(first_item(decoded(as_mapping(own).get("messages", own)))):
        calls = [record]
    if calls == [record] and own in (None, "", [], {}):
        raise NotACall("a trace without an input, and without a generation that has one")
    for index, item in enumerate(calls):
        yield call(
            item.get("input"),
            item.get("output"),
            names=("input", "output"),
            conversation_id=name,
            record_id=identifier(item, ("id",)) or trace,
            rating=rating if index == len(calls) - 1 else None,
        )


def is_langsmith(record: Mapping) -> bool:
    return "inputs" in record and not {"outputs", "run_type", "op_name"}.isdisjoint(record)


def read_langsmith(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a run of LangSmith: `inputs`, `outputs`, the thread in its metadata, feedback of users.

    `session_id` names the project, not a conversation. Calls of W&B Weave have `output`, and `thread_id`.
    """
    kind = record.get("run_type")
    if isinstance(kind, str) and kind not in ("llm", "chat", "chain", "agent"):
        raise NotACall(f"a run of the type {kind!r:.40}")
    if record.get("error"):
        raise ValueError(f"outputs: the call failed: {show(record['error'])}")
    metadata = as_mapping(as_mapping(record.get("extra")).get("metadata")) or as_mapping(record.get("metadata"))
    stats = as_mapping(record.get("feedback_stats"))
    scores = [{"name": key, "score": as_mapping(value).get("avg")} for key, value in stats.items()]
    feedback = decoded(record.get("feedback"))
    yield call(
        record.get("inputs"),
        record.get("outputs", record.get("output")),
        names=("inputs", "outputs"),
        conversation_id=identifier(metadata, ("session_id", "thread_id", "conversation_id"))
        or identifier(record, ("thread_id",)),
        record_id=identifier(record, ("id",)),
        rating=_user_score(feedback) or _user_score(scores),
    )


_CONTENT = ("gen_ai.", "llm.", "input.value", "openinference.", "traceloop.", "ai.prompt")
# A span's own columns in a table of spans, and all that a record can be known by.
SPAN_KEYS = (
    "attributes",
    "resourceSpans",
    "resource_spans",
    "attributes.llm.input_messages",
    "attributes.input.value",
    "attributes.gen_ai.input.messages",
    "attributes.gen_ai.prompt.0.content",
)


def is_span(record: Mapping) -> bool:
    if isinstance(record.get("resourceSpans", record.get("resource_spans")), list):
        return True
    attributes = _attributes(record)
    if any(isinstance(key, str) and key.startswith(_CONTENT) for key in attributes):
        return True
    return isinstance(attributes.get("gen_ai"), Mapping) or isinstance(attributes.get("llm"), Mapping)


def read_span(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads one span or many, with `gen_ai.*` or OpenInference's `llm.*` attributes, flat, nested or as in OTLP."""
    batches = record.get("resourceSpans", record.get("resource_spans"))
    if batches is None:
        yield _span_call(record)
        return
    found = False
    for batch in as_list(batches, "resourceSpans"):
        batch = as_mapping(batch)
        for scope in as_list(batch.get("scopeSpans", batch.get("scope_spans")) or [], "scopeSpans"):
            for span in as_list(as_mapping(scope).get("spans") or [], "spans"):
                if not isinstance(span, Mapping) or not is_span(span):
                    continue
                try:
                    yield _span_call(span)
                    found = True
                except NotACall:
                    continue
    if not found:
        raise NotACall("spans, none of which has the messages of a call")


def _attributes(span: Mapping) -> Mapping:
    """The attributes of a span by name."""
    found = decoded(span.get("attributes"))
    if isinstance(found, Mapping):
        return found
    if isinstance(found, (list, tuple)):  # OTLP
        pairs = [(as_mapping(item).get("key"), _otlp(as_mapping(item).get("value"))) for item in found]
        return {key: value for key, value in pairs if isinstance(key, str)}
    columns = [key for key in span if isinstance(key, str) and key.startswith("attributes.")]
    return {key.removeprefix("attributes."): span[key] for key in columns}


def _otlp(value: Any) -> Any:
    """OTLP's ``{"stringValue": ...}`` -> the value."""
    value = as_mapping(value)
    for kind in ("stringValue", "intValue", "doubleValue", "boolValue", "string_value", "int_value"):
        if value.get(kind) is not None:
            return value[kind]
    items = as_mapping(value.get("arrayValue")).get("values")
    if isinstance(items, (list, tuple)):
        return [_otlp(item) for item in items]
    items = as_mapping(value.get("kvlistValue")).get("values")
    if isinstance(items, (list, tuple)):
        return {as_mapping(item).get("key"): _otlp(as_mapping(item).get("value")) for item in items}
    return None


def _numbered(attributes: Mapping, prefix: str) -> list[Any]:
    """``{"p.0.role": "user", "p.0.content": "Hi"}`` -> ``[{"role": "user", "content": "Hi"}]``."""
    root: dict[str, Any] = {}
    for key, value in attributes.items():
        if not isinstance(key, str) or not key.startswith(prefix + "."):
            continue
        *steps, last = key[len(prefix) + 1 :].split(".")
        place = root
        for step in steps:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                break
        else:
            place.setdefault(last, value)
    return [value for _, value in sorted(root.items(), key=lambda item: (len(item[0]), item[0])) if value]


def _listed(message: Any) -> Any:
    """A numbered message with its contents as a list."""
    inner = message.get("message") if isinstance(message, Mapping) else None
    contents = inner.get("contents") if isinstance(inner, Mapping) else None
    if not isinstance(contents, Mapping) or not isinstance(inner, Mapping):
        return message
    ordered = sorted(contents.items(), key=lambda item: (len(str(item[0])), str(item[0])))
    return {"message": {**inner, "contents": [value for _, value in ordered]}}


def _messages(attributes: Mapping, *names: str) -> Any:
    """The messages under the first of the names that has some: a list, JSON, or numbered attributes."""
    for name in names:
        found = decoded(walk(attributes, name))
        if isinstance(found, (list, tuple)) and found:
            return found
        numbered = [_listed(message) for message in _numbered(attributes, name)]
        if numbered:
            return numbered
    return None


def _event_messages(span: Mapping) -> tuple[list[Any], list[Any]]:
    """The messages in the events of a span, as the convention had them first: (sent, the answer)."""
    sent: list[Any] = []
    answers: list[Any] = []
    for name, fields in _events(span):
        message = (as_mapping(fields.get("message")) or fields) if name == "gen_ai.choice" else fields
        said = {"content": message.get("content"), "tool_calls": decoded(message.get("tool_calls"))}
        if name == "gen_ai.choice":
            answers.append({"role": "assistant", "finish_reason": fields.get("finish_reason"), **said})
        elif name.endswith(".message"):
            sent.append({"role": name.split(".")[1], **said})
    return sent, answers


def _events(span: Mapping) -> Iterator[tuple[str, Mapping]]:
    """(name, fields) of the events of the convention in a span; Logfire has them in an attribute."""
    events = decoded(span.get("events")) or decoded(_attributes(span).get("events"))
    for event in map(as_mapping, events if isinstance(events, (list, tuple)) else []):
        name = event.get("name", event.get("event_name", event.get("event.name")))
        if isinstance(name, str) and name.startswith("gen_ai."):
            yield name, _attributes(event) or as_mapping(event.get("body")) or event


def _span_call(span: Mapping) -> Conversation:
    attributes = _attributes(span)
    for name, fields in _events(span):
        if name == "gen_ai.client.inference.operation.details":
            attributes = {**fields, **attributes}
    sent = _messages(attributes, "gen_ai.input.messages", "llm.input_messages", "gen_ai.prompt")
    answer = _messages(attributes, "gen_ai.output.messages", "llm.output_messages", "gen_ai.completion")
    if sent is None and (sent := _messages(attributes, "ai.prompt.messages")) is not None:  # the AI SDK's
        said = {"role": "assistant", "content": walk(attributes, "ai.response.text")}
        answer = [{**said, "tool_calls": decoded(walk(attributes, "ai.response.toolCalls"))}]
    if sent is None:
        sent, answers = _event_messages(span)
        answer = answers or answer
    sent = sent or decoded(walk(attributes, "input.value"))
    answer = answer or decoded(walk(attributes, "output.value"))
    end = first_item(decoded(walk(attributes, "gen_ai.response.finish_reasons")))
    ends = {"finish_reason": end or walk(attributes, "ai.response.finishReason")}
    if answer and was_cut(ends):
        answer = {"output": answer, **ends}
    kind = walk(attributes, "openinference.span.kind") or span.get("span_kind")
    if not sent or (isinstance(kind, str) and kind.upper() in ("TOOL", "RETRIEVER", "EMBEDDING", "RERANKER")):
        raise NotACall("a span without the messages of a call")
    instructions = decoded(walk(attributes, "gen_ai.system_instructions"))
    if instructions:
        sent = {"messages": sent, "instructions": instructions}
    names = ("gen_ai.conversation.id", "session.id", "langfuse.session.id", "conversation.id")
    name = next((found for found in (identifier({"id": walk(attributes, n)}, ("id",)) for n in names) if found), None)
    return call(
        sent,
        answer,
        names=("the input's messages", "the output's messages"),
        conversation_id=name,
        record_id=identifier(span, ("span_id", "spanId", "context.span_id", "id"))
        or identifier(span.get("context"), ("span_id",)),
        rating=_user_score(decoded(span.get("annotations", span.get("span_annotations")))),
    )


def is_mlflow(record: Mapping) -> bool:
    spans = as_mapping(record.get("data")).get("spans", record.get("spans"))
    first = as_mapping(first_item(decoded(spans)))
    return any(str(key).startswith("mlflow.") for key in as_mapping(first.get("attributes")))


def read_mlflow(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads a trace of MLflow: `info` and `data.spans`, or a row of `search_traces`.

    The root span counts where its inputs have messages; else the spans of chat models do. The session is in the
    trace's metadata; assessments by people are ratings.
    """
    info = as_mapping(record.get("info")) or record
    spans = [
        as_mapping(item) for item in as_list(as_mapping(record.get("data")).get("spans", record.get("spans")), "spans")
    ]
    metadata = as_mapping(info.get("trace_metadata")) or as_mapping(info.get("request_metadata"))
    scores = decoded(info.get("assessments"))
    rating: dict[str, Any] = {}
    for item in map(as_mapping, scores if isinstance(scores, (list, tuple)) else ()):
        value = as_mapping(item.get("feedback")).get("value")
        if not rating and value is not None and as_mapping(item.get("source")).get("source_type") == "HUMAN":
            rating = rating_fields({"rating": value, "rating_comment": item.get("rationale")})
    roots = [span for span in spans if not (span.get("parent_span_id") or span.get("parent_id"))]
    calls = [span for span in roots if _mlflow_messages(span)]
    if not calls:
        kinds = ("CHAT_MODEL", "LLM")
        calls = [s for s in spans if str(_mlflow(s, "spanType")).upper() in kinds and _mlflow(s, "spanInputs")]
    if not calls:
        raise NotACall("a trace without the messages of a call")
    for index, span in enumerate(calls):
        yield call(
            _mlflow(span, "spanInputs"),
            _mlflow(span, "spanOutputs"),
            names=("mlflow.spanInputs", "mlflow.spanOutputs"),
            conversation_id=identifier(metadata, ("mlflow.trace.session",)),
            record_id=identifier(info, ("trace_id", "request_id")),
            rating=rating if index == len(calls) - 1 else None,
        )


def _mlflow(span: Mapping, name: str) -> Any:
    """An attribute of a span, which MLflow keeps as JSON."""
    value = as_mapping(span.get("attributes")).get(f"mlflow.{name}")
    if isinstance(value, str) and value.startswith('"'):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return decoded(value)


def _mlflow_messages(span: Mapping) -> bool:
    found = _mlflow(span, "spanInputs")
    if isinstance(found, Mapping):
        found = decoded(found.get("messages") or found.get("input"))
    return is_message(first_item(found))


def _datadog_spans(record: Mapping) -> list[Mapping]:
    """Spans of Datadog's LLM Observability: one, or a page, as its API exports them, or those that are sent to it."""
    data = decoded(record.get("data"))
    spans: list[Mapping] = []
    for item in map(as_mapping, data if isinstance(data, (list, tuple)) else [data or record]):
        about = as_mapping(item.get("attributes"))
        if "ml_app" in about and isinstance(about.get("spans"), (list, tuple)):
            session_id = about.get("session_id")
            for span in map(as_mapping, about["spans"]):
                spans.append({"session_id": session_id, **span, **as_mapping(span.get("meta"))})
        elif "span_kind" in about and not {"input", "output"}.isdisjoint(about):
            spans.append(about)
    return spans


def is_datadog(record: Mapping) -> bool:
    return bool(_datadog_spans(record))


def read_datadog(record: Mapping, all_branches: bool) -> Iterator[Conversation]:
    """Reads spans of Datadog's LLM Observability: those of the kind `llm` with `messages` in `input` and `output`."""
    found = False
    for span in _datadog_spans(record):
        kind = span.get("span_kind", as_mapping(span.get("span")).get("kind", span.get("kind")))
        sent, back = as_mapping(span.get("input")), as_mapping(span.get("output"))
        if kind != "llm" or not decoded(sent.get("messages")):
            continue
        found = True
        yield call(
            {"messages": sent["messages"]},
            back.get("messages") or back.get("value"),
            names=("input", "output"),
            conversation_id=identifier(span, ("session_id",)),
            record_id=identifier(span, ("span_id",)),
        )
    if not found:
        raise NotACall("spans, none of which has the messages of a call")
