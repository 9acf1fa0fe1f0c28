"""Answers in logs of model calls: streamed in pieces, cut off, or a graph's whole state."""

import json

import pytest

from tests.data.conftest import chat
from tests.data.layout_records import A1, SAID, U1
from tests.data.test_readers import EXPECTED, by_length, shown

FIRST, REST = A1[:3], A1[3:]


def chunks(*texts, end="stop", **delta):
    said = [{"index": 0, "delta": {"content": text, **delta}, "finish_reason": None} for text in texts]
    said.append({"index": 0, "delta": {}, "finish_reason": end})
    return [{"object": "chat.completion.chunk", "choices": [choice]} for choice in said]


def anthropic(*texts, end="end_turn"):
    said = [{"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}} for text in texts]
    said += [{"type": "message_delta", "delta": {"stop_reason": end}}] if end else []
    return [{"type": "message_start", "message": {"role": "assistant", "content": []}}, *said]


def gemini(*texts, end="STOP"):
    said = [{"content": {"role": "model", "parts": [{"text": text}]}} for text in texts]
    said[-1]["finishReason"] = end
    return [{"candidates": [candidate]} for candidate in said]


def ollama(*texts, **last):
    said = [{"message": {"role": "assistant", "content": text}, "done": False} for text in texts]
    return [*said, {"message": {"role": "assistant", "content": ""}, "done": True, **last}]


def converse(*texts, end="end_turn"):
    said = [{"contentBlockDelta": {"delta": {"text": text}, "contentBlockIndex": 0}} for text in texts]
    return [{"messageStart": {"role": "assistant"}}, *said, {"messageStop": {"stopReason": end}}, {"metadata": {}}]


def responses(*texts, end="completed"):
    said = [{"type": "response.output_text.delta", "delta": text} for text in texts]
    message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "".join(texts)}]}
    whole = {"object": "response", "status": end, "output": [message]}
    return [{"type": "response.created", "response": {"status": "in_progress"}}, *said] + (
        [{"type": f"response.{end}", "response": whole}] if end else []
    )


def cohere(*texts, end="COMPLETE"):
    said = [{"type": "content-delta", "delta": {"message": {"content": {"text": text}}}} for text in texts]
    return [{"type": "message-start", "delta": {}}, *said, {"type": "message-end", "delta": {"finish_reason": end}}]


def sse(events):
    return "".join(f"event: {event.get('type')}\ndata: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n"


def lines(events):
    return "\n".join(map(json.dumps, events))


STREAMS = {
    "chunks": chunks(FIRST, REST),
    "chunks as events": sse([{"choices": [], "prompt_filter_results": []}, *chunks(FIRST, REST)]),
    "chunks with reasoning": [*chunks(reasoning_content="A bird.")[:1], *chunks(FIRST, REST)],
    "chunks of two answers": [
        *({**c, "choices": [{"index": 1, "delta": {"content": "x"}}]} for c in chunks("")),
        *chunks(A1),
    ],
    "anthropic": anthropic(FIRST, REST),
    "anthropic as events": {"status": 200, "body": sse(anthropic(FIRST, REST))},
    "gemini": gemini(FIRST, REST),
    "ollama": ollama(FIRST, REST),
    "ollama as lines": lines(ollama(FIRST, REST)),
    "converse": converse(FIRST, REST),
    "responses": sse(responses(FIRST, REST)),
    "cohere": cohere(FIRST, REST),
}


def workers_ai(*texts):
    return [*({"response": text, "p": "x"} for text in texts), {"response": "", "usage": {"completion_tokens": 2}}]


STREAMS |= {
    "workers ai": json.dumps({"response": A1, "tool_calls": [], "usage": {}}),
    "workers ai's result": json.dumps({"result": {"response": A1}, "success": True, "errors": [], "messages": []}),
    "workers ai as events": sse(workers_ai(FIRST, REST)),
    "workers ai as older events": sse(workers_ai(FIRST, REST)[:-1]),
}


def rated(response):
    return {"request": {"messages": chat(U1)}, "response": response, "rating": "down"}


@pytest.mark.parametrize("name", STREAMS)
def test_a_streamed_answer_is_one_text(prepared, name):
    done = prepared([rated(STREAMS[name])], "--rating-followup", "down=No.")
    assert shown(done.rows) == [([U1], A1, "No.")], done.error + done.table


TEXT = {"role": "assistant", "content": A1}
AI = {"type": "ai", "content": A1, "response_metadata": {"finish_reason": "length"}}
CUT = {
    "a stream without an end": sse(anthropic(A1, end=None)),
    "a stream of responses without an end": responses(A1, end=None),
    "chunks": chunks(A1, end="length"),
    "gemini": gemini(A1, end="MAX_TOKENS"),
    "ollama stream": ollama(A1, done_reason="length"),
    "responses stream": responses(A1, end="incomplete"),
    "converse stream": converse(A1, end="max_tokens"),
    "ollama": {"message": TEXT, "done": True, "done_reason": "length"},
    "ollama's text": {"response": A1, "done": False},
    "converse": {"output": {"message": {"role": "assistant", "content": [{"text": A1}]}}, "stopReason": "max_tokens"},
    "cohere": {"message": TEXT, "finish_reason": "MAX_TOKENS"},
    "tgi": {"generated_text": A1, "details": {"finish_reason": "length"}},
    "responses": {"incomplete_details": {"reason": "max_output_tokens"}, "output": responses(A1)[-1]["response"]},
    "responses' text": {"status": "incomplete", "output_text": A1},
    "a list of choices": [{"index": 0, "finish_reason": "length", "message": TEXT}],
    "langchain": AI,
    "langchain's result": {"generations": [[{"text": A1, "message": AI}]]},
    "langchain's text": {"generations": [[{"text": A1, "generation_info": {"finish_reason": "length"}}]]},
}


@pytest.mark.parametrize("name", CUT)
def test_an_answer_that_was_cut_is_left_out(prepared, name):
    done = prepared([rated(CUT[name]), {"messages": chat(*SAID)}], "--rating-followup", "down=No.")
    assert shown(done.rows) == EXPECTED[1:], "neither with the rating nor with the reply that another record has"
    assert done.report["left_out"] == {"to an answer that was cut off": 1}


def test_the_ends_of_spans(prepared):
    ends = {"gen_ai.response.finish_reasons": ["length"]}
    messages = {"gen_ai.input.messages": chat(U1), "gen_ai.output.messages": [TEXT]}
    score = [{"name": "user feedback", "result": {"label": "down"}}]
    ai_sdk = {"ai.prompt.messages": chat(U1), "ai.response.text": A1, "ai.response.finishReason": "length"}
    spans = [{"attributes": said, "annotations": score} for said in ({**messages, **ends}, ai_sdk)]
    done = prepared(spans, "--rating-followup", "down=No.")
    assert done.status == 1 and "damaged           2 no follow-up" in done.table


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ('data: {"error": {"message": "overloaded"}}\n\n', "a stream must have the events of a known API"),
        (anthropic() + [{"type": "content_block_start", "content_block": {"type": "tool_use"}}], "no follow-up"),
        (chunks("", tool_calls=[{"index": 0}]), "no follow-up"),
        ('{"type": "encrypted", "data": "x"}', "response is encrypted; decrypt the log before"),
        ({"messages": chat("Hello", "Hi")}, "response has messages of the user, and not those of request"),
    ],
)
def test_an_answer_that_is_none(prepared, response, said):
    done = prepared([rated(response)], "--rating-followup", "down=No.")
    assert done.status == 1 and said in done.table


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_a_graph_gives_its_whole_state(prepared, system):
    """What was sent is the user's new message alone, what came back is all that was said so far."""
    records = [
        {
            "run_type": "chain",
            "inputs": {"messages": [*system, {"role": "user", "content": SAID[n - 1]}]},
            "outputs": {"messages": chat(*SAID, "Bye.")[: n + 1]},
            "extra": {"metadata": {"thread_id": "T"}},
        }
        for n in (1, 3, 5)
    ]
    done = prepared(records)
    assert shown(by_length(done.rows)) == EXPECTED
    assert {row["prompt"][0]["role"] for row in done.rows} == {system[0]["role"] if system else "user"}


def test_ids_of_blocks_are_no_text(prepared):
    done = prepared([{"messages": [{"role": m["role"], "blocks": [f"id-{n}"]} for n, m in enumerate(chat(*SAID))]}])
    assert done.status == 1 and "must have 'content', got the ids of its blocks alone" in done.table


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
@pytest.mark.parametrize("order", [1, -1])
def test_what_a_call_says_of_its_answer_counts_for_the_later_ones(prepared, system, order):
    """The first answer was cut off, which only its own call says; another conversation has the same one whole."""
    calls = [
        {
            "request": {"messages": [*system, *chat(*SAID[:n])]},
            "response": {"choices": [{"message": {"role": "assistant", "content": SAID[n]}, "finish_reason": end}]},
        }
        for n, end in ((1, "length"), (3, "stop"))
    ]
    calls += [{"messages": [*system, *chat(*SAID)]}, {"messages": chat("Another?", *SAID[1:3])}]
    done = prepared(calls[::order], preset="default")
    assert sorted(shown(done.rows)) == [(["Another?"], *SAID[1:3]), EXPECTED[1]]
    assert done.report["left_out"] == {"to an answer that was cut off": 1}
    assert done.report["merged_records"] == 1 and done.report["duplicate_interactions"] == 1


@pytest.mark.parametrize("order", [1, -1])
def test_a_cut_answer_in_calls_that_hold_the_last_messages(prepared, order):
    """The second answer was cut off; the third call begins with the question to it."""
    said, ends = [*SAID, "Une truite.", "Thanks"], {1: "stop", 3: "length", 5: "stop"}
    calls = [
        {
            "request": {"messages": chat(*said[max(0, n - 3) : n])},
            "response": {"choices": [{"message": {"role": "assistant", "content": said[n]}, "finish_reason": end}]},
        }
        for n, end in ends.items()
    ]
    done = prepared([*calls, {"messages": chat(*said[4:])}][::order])
    assert sorted(shown(done.rows)) == sorted([EXPECTED[0], (said[4:5], *said[5:])])
    assert done.report["left_out"] == {"to an answer that was cut off": 1}


def test_a_conversation_of_a_cut_answer_alone_is_not_merged(prepared):
    cut = {"request": {"messages": chat(U1)}, "response": {"message": TEXT, "finish_reason": "length"}}
    done = prepared([cut, {"messages": chat(*SAID[:3])}, {"messages": chat("Another?", *SAID[1:3])}])
    assert shown(done.rows) == [(["Another?"], *SAID[1:3])] and done.report["merged_records"] == 0


def test_the_session_and_the_rating_of_helicone(prepared):
    about = {"request_properties": {"Helicone-Session-Id": "S"}, "feedback_rating": False, "scores": {"judge": 1}}
    response = {"choices": [{"message": TEXT}]}
    done = prepared(
        [{"request_id": "r", "request_body": {"messages": chat(U1)}, "response_body": response, **about}],
        "--rating-followup",
        "down=No.",
    )
    assert [(row["conversation_id"], row["rating"]) for row in done.rows] == [("S", "down")]


def listed(*said, **more):
    data = [{"thread_id": "T", **m, **{key: value(n) for key, value in more.items()}} for n, m in enumerate(said)]
    return {"object": "list", "data": data[::-1], "has_more": False}


@pytest.mark.parametrize(
    ("records", "kept", "said"),
    [
        ([listed(*chat(*SAID), created_at=lambda n: 1767225600 + n)], EXPECTED, "openai"),
        ([listed(*chat(*SAID))], [], "data are messages without times, which an API may list from the newest on"),
        ([{"custom_id": "a", "params": {"messages": chat(*SAID)}, "result": {"message": TEXT}}], EXPECTED, "batch"),
        ([{"custom_id": "a", "result": {"message": TEXT}}], [], "put the params of the input line with the same"),
        ([{"recordId": "a", "modelInput": {"messages": chat(*SAID)}, "modelOutput": TEXT}], EXPECTED, "proxy"),
        (
            [{"BackendRequestBody": json.dumps({"messages": chat(*SAID)}), "BackendResponseBody": ""}],
            EXPECTED,
            "proxy",
        ),
        ([{"RequestBody": json.dumps({"messages": chat(*SAID)}), "ResponseBody": ""}], EXPECTED, "proxy"),
    ],
)
def test_lists_and_batches(prepared, records, kept, said):
    done = prepared(records)
    assert shown(by_length(done.rows)) == kept and said in done.table
