"""One fixture for each layout, written anew: the same short conversation as each product keeps it.

`CASES` has, by the name of the layout, records and what is asked beside the two interactions of `EXPECTED`.
"""

import itertools
import json

SAID = ["Name a bird.", "A robin.", "In French, please.", "Un rouge-gorge.", "And a fish?"]
U1, A1, U2, A2, U3 = SAID
A3 = "Une truite."
EXPECTED = [([U1], A1, U2), ([U1, A1, U2], A2, U3)]
SYSTEM = "Be brief."


def chat(texts=SAID, user="user", assistant="assistant", role="role", content="content"):
    return [{role: (user, assistant)[n % 2], content: text} for n, text in enumerate(texts)]


def calls(make, texts=(*SAID, A3)):
    """A record for each call: make(what was sent, the answer)."""
    return [make(chat(texts[:n]), texts[n]) for n in (1, 3, 5)]


def node(name, parent, role, parts, kind="text", metadata=None, **more):
    message = {"id": name, "author": {"role": role, "name": None}, "metadata": metadata or {}, **more}
    message["content"] = {"content_type": kind, "parts": parts}
    return {"id": name, "parent": parent, "children": [], "message": {"weight": 1.0, "recipient": "all", **message}}


def chatgpt():
    """A hidden system node, thoughts, and two branches: an answer anew (the active one), a question anew."""
    hidden = {"is_visually_hidden_from_conversation": True}
    nodes = [
        {"id": "root", "parent": None, "children": ["s"], "message": None},
        node("s", "root", "system", [""], metadata=hidden, weight=0.0),
        node("i", "s", "user", None, kind="user_editable_context"),
        node("u1", "i", "user", [U1]),
        node("a1x", "u1", "assistant", ["A wren."]),
        node("u2x", "a1x", "user", ["Another one"]),
        node("t", "u1", "assistant", [], kind="thoughts"),
        node("a1", "t", "assistant", [A1]),
        node("u2", "a1", "user", [U2]),
        node("a2", "u2", "assistant", [A2]),
        node("u3", "a2", "user", [U3], kind="multimodal_text"),
    ]
    nodes[2]["message"]["content"] = {"content_type": "user_editable_context", "user_instructions": SYSTEM}
    mapping = {n["id"]: n for n in nodes}
    return {"title": "t", "conversation_id": "C", "mapping": mapping, "current_node": "u3", "create_time": 1.5}


def claude():
    texts = zip(SAID, ["human", "assistant"] * 3)
    messages = [
        {"uuid": f"m{n}", "sender": sender, "text": text, "content": [{"type": "text", "text": text}], "files": []}
        for n, (text, sender) in enumerate(texts)
    ]
    messages[1]["content"].insert(0, {"type": "thinking", "thinking": "Which one?"})
    messages[3]["chat_feedback"] = {"type": "thumbs_down", "text": "Too short"}
    return {"uuid": "C", "name": "n", "account": {"uuid": "x"}, "chat_messages": messages}


def open_webui():
    """A1 has been edited, A2 is rated and has another answer beside it."""
    tree, parent = {}, None
    for n, message in enumerate(chat()):
        tree[f"m{n}"] = {"id": f"m{n}", "parentId": parent, "childrenIds": [], "timestamp": n, **message}
        parent = f"m{n}"
    tree["m1"] |= {"content": "A kiwi.", "originalContent": A1}
    text = '<details type="reasoning" done="true">\n<summary>Thought</summary>\n> hm\n</details>\n' + A2
    tree["m3"] |= {"content": text, "annotation": {"rating": -1, "comment": "Which one?", "tags": []}}
    tree["m3b"] = {"id": "m3b", "parentId": "m2", "childrenIds": [], "role": "assistant", "content": "Une mésange."}
    chat_ = {"models": ["m"], "messages": [], "history": {"messages": tree, "currentId": "m4"}}
    return {"id": "C", "user_id": "u", "title": "t", "chat": chat_}


def librechat(recursive):
    messages, parent = [], "00000000-0000-0000-0000-000000000000"
    for n, message in enumerate(chat()):
        by_user = message["role"] == "user"
        own = {"messageId": f"m{n}", "parentMessageId": parent, "text": message["content"], "children": []}
        messages.append({**own, "isCreatedByUser": by_user, "sender": "User" if by_user else "GPT-4", "error": False})
        parent = f"m{n}"
    messages[1]["feedback"] = {"rating": "thumbsUp", "tag": "accurate"}
    about = {"conversationId": "C", "endpoint": "openAI", "recursive": recursive, "options": {"promptPrefix": SYSTEM}}
    if not recursive:
        return {**about, "messages": [{k: v for k, v in m.items() if k != "children"} for m in messages]}
    for before, after in itertools.pairwise(messages):
        before["children"] = [after]
    return {**about, "messagesTree": messages[:1]}


def oasst():
    def message(n, role, text, *replies, **more):
        return {"message_id": n, "role": role, "text": text, "lang": "en", "replies": list(replies), **more}

    end = message("m4", "prompter", U3)
    turn = message("m2", "prompter", U2, message("m3", "assistant", A2, end, rank=0))
    answers = message("m1", "assistant", A1, turn, rank=0), message("m1b", "assistant", "No.", rank=1)
    return {"message_tree_id": "C", "tree_state": "ready", "prompt": message("m0", "prompter", U1, *answers)}


def oasst_rows():
    rows, todo = [], [(oasst()["prompt"], None)]
    while todo:
        message, parent = todo.pop()
        rows.append({**message, "parent_id": parent, "message_tree_id": "C", "deleted": False, "replies": None})
        todo += [(reply, message["message_id"]) for reply in message["replies"]]
    return [{key: value for key, value in row.items() if key != "replies"} for row in rows]


def otlp(sent, answer):
    """A batch of two spans as OTLP has them, of which one is a tool's."""

    def part(message):
        return {"role": message["role"], "parts": [{"type": "text", "content": message["content"]}]}

    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.conversation.id": "C",
        "gen_ai.system_instructions": json.dumps([{"type": "text", "content": SYSTEM}]),
        "gen_ai.input.messages": json.dumps([part(m) for m in sent]),
        "gen_ai.output.messages": json.dumps([{**part(chat(["", answer])[1]), "finish_reason": "stop"}]),
    }
    span = {"spanId": "s", "attributes": [{"key": k, "value": {"stringValue": v}} for k, v in attributes.items()]}
    tool = {"spanId": "t", "attributes": [{"key": "gen_ai.tool.name", "value": {"stringValue": "search"}}]}
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"spans": [tool, span]}]}]}


def numbered(sent, answer, before, after, message=""):
    pairs = [(f"{before}.{n}", m) for n, m in enumerate(sent)] + [(f"{after}.0", chat(["", answer])[1])]
    return {f"{name}{message}.{key}": value for name, m in pairs for key, value in m.items()}


def columns(sent, answer):
    def named(messages):
        return [{"message.role": m["role"], "message.content": m["content"]} for m in messages]

    sides = {"input": sent, "output": chat(["", answer])[1:]}
    return {f"attributes.llm.{side}_messages": named(messages) for side, messages in sides.items()}


def phoenix(sent, answer):
    sent, answer = [{"message": m} for m in sent], [{"message": chat(["", answer])[1]}]
    about = {"openinference": {"span": {"kind": "LLM"}}, "session": {"id": "C"}}
    return {"span_id": "s", "attributes": {**about, "llm": {"input_messages": sent, "output_messages": answer}}}


def langchain(text, n):
    kind = ("human", "ai")[n % 2]
    return [
        {"type": kind, "content": text, "additional_kwargs": {}, "tool_calls": []},
        {"type": kind, "data": {"content": text, "type": kind}},
        {"lc": 1, "type": "constructor", "id": ["l", ("Human", "AI")[n % 2] + "Message"], "kwargs": {"content": text}},
    ]


def langsmith(sent, answer):
    message = langchain(answer, 1)[2]
    run = {"id": answer, "run_type": "llm", "session_id": "the project", "extra": {"metadata": {"thread_id": "C"}}}
    inputs = {"messages": [[langchain(m["content"], n)[2] for n, m in enumerate(sent)]]}
    return {**run, "inputs": inputs, "outputs": {"generations": [[{"text": answer, "message": message}]]}}


def gemini(sent, answer):
    contents = [{"role": m["role"].replace("assistant", "model"), "parts": [{"text": m["content"]}]} for m in sent]
    parts = [{"text": "hm", "thought": True}, {"text": answer}]
    about = {"systemInstruction": {"parts": [{"text": SYSTEM}]}}
    return {**about, "contents": contents, "candidates": [{"content": {"role": "model", "parts": parts}}]}


def responses(sent, answer):
    item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": answer}]}
    output = [{"type": "reasoning", "summary": []}, item]
    return {"id": answer, "object": "response", "instructions": SYSTEM, "input": sent, "output": output}


def completion(answer, *more):
    choices = [{"index": n, "message": chat(["", text])[1]} for n, text in enumerate((answer, *more))]
    return {"id": "chatcmpl-" + answer, "object": "chat.completion", "choices": choices, "usage": {}}


def chatml(messages):
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def parts(message):
    kept = [{"type": "step-start"}, {"type": "text", "text": message["content"], "state": "done"}]
    return {"id": "m", "role": message["role"], "parts": kept}


def proxied(sent, answer):
    return {"request": {"system": SYSTEM, "messages": sent}, "response": completion(answer)}


def anthropic(sent, answer):
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    asked = {"messages": sent, "max_tokens": 9}
    return {"request_body": json.dumps(asked), "response_body": json.dumps(said), "status": 200}


def batched(sent, answer):
    response = {"status_code": 200, "body": completion(answer)}
    return {"custom_id": answer, "body": {"model": "m", "messages": sent}, "response": response, "error": None}


def mlflow(sent, answer):
    """A trace of two spans, whose root has no messages; a person's assessment."""
    attributes = {"mlflow.spanInputs": {"messages": sent}, "mlflow.spanOutputs": completion(answer)}
    attributes |= {"mlflow.spanType": "CHAT_MODEL"}
    root = {"attributes": {"mlflow.spanInputs": '{"question": "x"}', "mlflow.spanOutputs": '"x"'}}
    inner = {"parent_span_id": "r", "attributes": {key: json.dumps(value) for key, value in attributes.items()}}
    judged = {"source": {"source_type": "LLM_JUDGE"}, "feedback": {"value": True}}
    said = {"source": {"source_type": "HUMAN"}, "feedback": {"value": False}, "rationale": "No!"}
    info = {"trace_id": answer, "trace_metadata": {"mlflow.trace.session": "C"}, "assessments": [judged, said]}
    return {"info": info, "data": {"spans": [root, inner]}}


def mlflow_row(sent, answer):
    trace = mlflow(sent, answer)
    return {**trace["info"], "request": "x", "response": "x", "spans": json.dumps(trace["data"]["spans"])}


def datadog(sent, answer):
    sides = {"input": {"value": "x", "messages": sent}, "output": {"messages": chat(["", answer])[1:]}}
    tool = {"type": "span", "attributes": {"span_kind": "tool", **sides}}
    span = {"type": "span", "attributes": {"span_kind": "llm", "session_id": "C", "span_id": answer, **sides}}
    return {"data": [tool, span], "meta": {"status": "done"}}


def datadog_sent(sent, answer):
    sides = {"input": {"messages": sent}, "output": {"messages": chat(["", answer])[1:]}}
    spans = [
        {"meta": {"kind": "workflow", "input": {"value": "x"}}},
        {"span_id": answer, "meta": {"kind": "llm", **sides}},
    ]
    return {"data": {"type": "span", "attributes": {"ml_app": "a", "session_id": "C", "spans": spans}}}


def chatbox():
    """A session whose earlier thread is a conversation of its own."""
    info = {"type": "info", "text": "x"}
    parts = [[info, {"type": "text", "text": m["content"]}] for m in chat()]
    said = [{"id": f"m{n}", "role": m["role"], "contentParts": p} for n, (m, p) in enumerate(zip(chat(), parts))]
    thread = {"id": "T", "name": "t", "messages": said[:2]}
    session = {"id": "C", "type": "chat", "messages": said, "threads": [thread]}
    return {"__exported_items": ["conversations"], "chat-sessions-list": [{"id": "C"}], "session:C": session}


# Rows of another conversation stand between those of one.
ROWS = [
    {"conversation_id": c, "role": m["role"], "content": m["content"]} for m in chat() for c in ("C", m["content"])
]
RATED = {"id": "s", "name": "user-feedback", "dataType": "BOOLEAN", "value": 0, "comment": "No!"}


def case(records, first=(), last=(), system=False):
    """Records, the fields of their first row and of their last, and whether there is a system prompt."""
    return records, dict(first), dict(last), system


# By the name of the layout.
CASES = {
    "openai": case([{"messages": chat()}]),
    "list": case([chat()]),
    "wildchat": case([{"conversation_hash": "C", "conversation": chat()}]),
    "wildfeedback": case([{"conversation_id": "C", "history": chat(), "system_prompt": SYSTEM}], system=True),
    "sharegpt": case([{"id": "C", "conversations": chat(SAID, "human", "gpt", "from", "value")}]),
    "interactions": case(
        [{"prompt": chat(SAID[:n]), "completion": SAID[n], "user_response": SAID[n + 1], "rating": n} for n in (1, 3)],
        first={"rating": 1},
        last={"rating": 3},
    ),
    "chatgpt": case([chatgpt()], first={"alternatives": ["A wren."]}, system=True),
    "claude": case([claude()], last={"rating": "down", "rating_comment": "Too short"}),
    "open-webui": case(
        [open_webui()],
        first={"edited": "A kiwi."},
        last={"rating": "down", "rating_comment": "Which one?", "alternatives": ["Une mésange."]},
    ),
    "librechat": case([librechat(True)], first={"rating": "up"}, system=True),
    "librechat flat": case([librechat(False)], first={"rating": "up"}, system=True),
    "openai-stored": case(
        calls(lambda sent, answer: {**completion(answer, "Else."), "messages": sent, "metadata": {}})
    ),
    "proxy": case(calls(proxied), system=True),
    "proxy anthropic": case(calls(anthropic)),
    "openai-batch": case(calls(batched)),
    "openai-responses": case(calls(responses), system=True),
    "gateway": case(
        calls(lambda sent, answer: {"session_id": "C", "messages": json.dumps(sent), "response": completion(answer)})
    ),
    "vllm": case([{"request_id": "r", "prompt": chatml(chat()) + "<|im_start|>assistant\n", "outputs": [A3]}]),
    "langfuse": case(
        calls(
            lambda s, a: {"id": a, "type": "GENERATION", "sessionId": "C", "input": s, "output": a, "scores": [RATED]}
        )
    ),
    "langsmith": case(calls(langsmith)),
    "langchain": case([{"messages": [langchain(text, n)[n % 3] for n, text in enumerate(SAID)], "session_id": "C"}]),
    "otel": case(calls(otlp), system=True),
    "otel numbered": case(calls(lambda s, a: {"attributes": numbered(s, a, "gen_ai.prompt", "gen_ai.completion")})),
    "otel phoenix": case(calls(phoenix)),
    "otel columns": case(calls(columns)),
    "otel flat": case(
        calls(lambda s, a: {"attributes": numbered(s, a, "llm.input_messages", "llm.output_messages", ".message")})
    ),
    "mlflow": case(calls(mlflow)),
    "mlflow table": case(calls(mlflow_row)),
    "datadog": case(calls(datadog)),
    "datadog sent": case(calls(datadog_sent)),
    "chatbox": case([chatbox()]),
    "oasst": case([oasst()], first={"alternatives": ["No."], "rank": 0}, last={"rank": 0}),
    "oasst rows": case(oasst_rows(), first={"alternatives": ["No."], "rank": 0}, last={"rank": 0}),
    "gemini": case(calls(gemini), system=True),
    "ai-sdk": case([{"id": "C", "messages": [parts(m) for m in chat()]}]),
    "table": case(ROWS),
    "table of pairs": case(
        [
            {"session_id": "C", "user": "bob", "query": U3, "reply": A3, "created_at": "2026-03-03"},
            {"session_id": "D", "user": "ann", "query": "Hi", "reply": None, "created_at": "2026-03-02"},
            {"session_id": "C", "user": "bob", "query": U1, "reply": A1, "created_at": "2026-03-01"},
            {"session_id": "C", "user": "bob", "query": U2, "reply": A2, "created_at": "2026-03-02"},
        ]
    ),
    "ultrachat": case([{"id": "C", "data": SAID}]),
    "alpaca": case([{"instruction": U3, "input": "", "output": A3, "history": [[U1, A1], [U2, A2]]}]),
    "arena": case(
        [{"question_id": "C", "winner": "model_b", "conversation_a": chat(SAID), "conversation_b": chat(["Hi", "x"])}]
    ),
}
