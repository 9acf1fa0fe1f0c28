"""Calls of the Responses API that hold only what is new are joined to conversations."""

import pytest

from tests.data.layout_records import A1, A2, A3, EXPECTED, SAID, U1, U2, U3
from tests.data.test_readers import by_length, shown


def call(number, before, asked, answer, instructions=None, **more):
    item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": answer}]}
    about = {"id": f"resp_{number}", "object": "response", "created_at": 1760000000 + number, "status": "completed"}
    links = {"instructions": instructions, "previous_response_id": before and f"resp_{before}"}
    return {**about, **links, "input": asked, "output": [{"type": "reasoning", "summary": []}, item], **more}


def proxied(record):
    sent = {key: record[key] for key in ("input", "previous_response_id", "instructions")}
    back = {key: value for key, value in record.items() if key not in ("input", "previous_response_id")}
    return {"request": {"model": "m", **sent}, "response": {"status": 200, "body": back}, "rating": "up"}


CHAIN = [call(1, None, U1, A1), call(2, 1, [{"role": "user", "content": U2}], A2), call(3, 2, U3, A3)]
NAMED = [
    call(n, None, asked, answer, conversation={"id": "conv"})
    for n, (asked, answer) in enumerate(zip(*[iter(SAID + [A3])] * 2))
]
WHOLE = [
    *CHAIN[:1],
    call(2, 1, [{"role": r, "content": t} for r, t in (("user", U1), ("assistant", A1), ("user", U2))], A2),
    CHAIN[2],
]
FAILED = [*CHAIN[:2], {**CHAIN[2], "output": [], "status": "failed", "error": {"code": "x"}}]
# Of each: the records, and how many are read.
JOINED = {
    "in order": CHAIN,
    "in another order": CHAIN[::-1],
    "as request and response": [proxied(record) for record in CHAIN],
    "one of them twice": [*CHAIN, CHAIN[1]],
    "with the whole history": WHOLE,
    "with a last one that failed": FAILED,
    "by conversation": NAMED[::-1],
}


@pytest.mark.parametrize("name", JOINED)
def test_calls_are_joined(prepared, name):
    done = prepared(JOINED[name], "--keep", "created_at")
    assert shown(by_length(done.rows)) == EXPECTED, done.table
    assert {row["conversation_id"] for row in done.rows} == {"conv" if name == "by conversation" else "resp_1"}
    assert done.report["records"] == 1 and done.report["formats"] == {"openai-responses": 1}
    assert {row.get("rating") for row in done.rows} == ({"up"} if name == "as request and response" else {None})
    assert name == "as request and response" or all(row["created_at"] for row in done.rows)


def test_branches_are_conversations_with_what_they_share_once(prepared):
    done = prepared([*CHAIN, call(4, 1, "Another?", "A wren."), call(5, 4, "Thanks", "!")])
    others = [([U1], A1, "Another?"), ([U1, A1, "Another?"], "A wren.", "Thanks")]
    assert sorted(shown(done.rows)) == sorted([*EXPECTED, *others])
    assert len({row["id"] for row in done.rows}) == 4 and {row["conversation_id"] for row in done.rows} == {"resp_1"}


def test_instructions_hold_for_their_call(prepared):
    tool = {"output": [{"type": "function_call", "name": "f", "arguments": "{}"}]}
    records = [{**record, "instructions": f"Rule {n}"} for n, record in enumerate(CHAIN)]
    records += [
        {**call(4, 3, "And?", ""), **tool},
        call(5, 4, [{"type": "function_call_output"}], "!"),
        call(6, 5, "Thanks", "!"),
    ]
    done = prepared(records)
    rows = by_length(done.rows)
    assert shown(rows)[:2] == EXPECTED and len(rows) == 3
    assert [row["prompt"][0]["content"] for row in rows] == ["Rule 0", "Rule 1", "Rule 2"]
    assert done.report["left_out"] == {"after a tool call or tool message": 1}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (CHAIN[1:], "1 a call before it is missing"),
        ([call(1, 2, U1, A1), call(2, 1, U2, A2)], "got a circle of them"),
        ([{**record, "created_at": None} for record in NAMED], "must have times (created_at)"),
        ([*CHAIN, call(2, 1, "Another?", "x")], "the ids of the calls of a conversation must differ"),
        ([{"messages": []}, *CHAIN], "calls are joined where each is a record of a file that begins with one"),
    ],
)
def test_calls_that_cannot_be_joined(prepared, records, said):
    done = prepared([*records])
    assert done.status == 1 and said in done.table
