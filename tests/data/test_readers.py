"""Each layout gives the interactions of its conversation, through `fastsdpo prepare`."""

import csv
import gzip
import io
import json
import shlex
import subprocess
import sys

import pytest

from fastsdpo.commands.prepare import main
from fastsdpo.data import LoadReport, load_conversations
from fastsdpo.data.readers.registry import BY_NAME, RecordParser
from tests.data import layout_records as layouts
from tests.data.conftest import read_rows
from tests.data.layout_records import A1, CASES, EXPECTED, SAID, SYSTEM, U1, U2, chat
from tests.pages import ROOT, blocks

FIELDS = ("rating", "rating_comment", "alternatives", "edited", "rank", "followup_from")


def shown(rows):
    """(prompt without the system message, answer, follow-up) of each row."""
    texts = [[m["content"] for m in row["prompt"] if m["role"] != "system"] for row in rows]
    return [(t, row["completion"]["content"], row["user_response"]["content"]) for t, row in zip(texts, rows)]


def fields(row):
    return {key: row[key] for key in FIELDS if key in row}


def by_length(rows):
    return sorted(rows, key=lambda row: len(row["prompt"]))


def read(parser, records):
    return [conversation for record in records for conversation in parser(record)]


@pytest.mark.parametrize("case", CASES)
def test_a_layout(prepared, case):
    name = case.split()[0]
    records, first, last, has_system = CASES[case]
    done = prepared(records)
    rows = by_length(done.rows)
    expected = EXPECTED
    if case == "open-webui":  # the model saw the text as it was edited
        expected = [EXPECTED[0], ([U1, "A kiwi.", U2], *EXPECTED[1][1:])]
    assert shown(rows) == expected, (done.table, done.error)
    assert {row["prompt"][0]["content"] for row in rows} == {SYSTEM if has_system else U1}
    assert (fields(rows[0]), fields(rows[-1])) == (first, last)
    assert set(done.report["formats"]) == {name} and name in BY_NAME
    assert f"records: {name}\n" in done.table
    if name != "table" and case != "oasst rows":  # their records are made of rows
        assert read(RecordParser(name), records) == read(RecordParser(), records)


def test_every_layout_has_a_fixture():
    assert {case.split()[0] for case in CASES} == set(BY_NAME)


FAILED = {"content_type": "system_error", "text": "x"}
CUT_OFF = "to an answer that was cut off"
NOT_TRAINED = "to an answer that the record says not to train on (weight 0)"
IMAGE = [{"type": "text", "text": "And this?"}, {"type": "image_url", "image_url": {"url": "x"}}]
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "s"}


@pytest.mark.parametrize(
    ("place", "change", "kept", "left_out"),
    [
        (4, {"content": IMAGE}, [A1], {"after an image or file": 1}),
        (2, {"content": IMAGE}, [], {"after an image or file": 2}),
        (3, {"content": [{"type": "text", "text": "x"}, {"type": "audio"}]}, [A1], {"after an image or file": 1}),
        (4, {"files": [{"name": "a.pdf"}]}, [A1], {"after an image or file": 1}),
        (3, {"content": [{"type": "tool_use", "name": "f"}]}, [A1], {"after a tool call or tool message": 1}),
        (1, {"content": [THOUGHT, {"type": "text", "text": A1}]}, [A1, SAID[3]], {}),
        (1, {"content": [THOUGHT]}, [SAID[3]], {"to an answer that is reasoning alone": 1}),
        (1, {"content": "", "reasoning_content": "Hm."}, [SAID[3]], {"to an answer that is reasoning alone": 1}),
        (1, {"reasoning_content": "Hm."}, [A1, SAID[3]], {}),
        (1, {"content": ""}, [SAID[3]], {"to an empty answer": 1}),
        (2, {"content": "\n"}, [], {"that are empty": 1, "to an answer to an empty message": 1}),
        (0, {"role": "assistant"}, [SAID[3]], {"to an answer before the user's first message": 1}),
        (1, {"weight": 0}, [SAID[3]], {NOT_TRAINED: 1}),
        (3, {"train": False}, [A1], {NOT_TRAINED: 1}),
        (1, {"weight": 1, "train": True, "loss": None}, [A1, SAID[3]], {}),
        (1, {"finish_reason": "length"}, [SAID[3]], {CUT_OFF: 1}),
        (1, {"stop_reason": "user_canceled"}, [SAID[3]], {CUT_OFF: 1}),
        (1, {"done": False}, [SAID[3]], {CUT_OFF: 1}),
        (1, {"finish_reason": "stop", "done": True, "truncated": False}, [A1, SAID[3]], {}),
    ],
)
def test_what_stands_beside_the_text(prepared, place, change, kept, left_out):
    messages = chat()
    messages[place] |= change
    done = prepared([{"messages": messages}, {"messages": chat(["Hi", "Hello", "Bye"])}])
    assert [row["completion"]["content"] for row in done.rows][: len(kept)] == kept
    assert len(done.rows) == len(kept) + 1
    assert done.report["left_out"] == left_out
    assert all(f"follow-ups {reason}" in done.table for reason in left_out)


@pytest.mark.parametrize("more", [{"images": ["a.png"]}, {"image": "a.png"}])
@pytest.mark.parametrize(("text", "kept"), [("<image>\nWhat?", [A1]), ("What?", [])])
def test_images_beside_the_messages(prepared, more, text, kept):
    done = prepared([{"messages": chat([*SAID[:4], text]), **more}, {"messages": chat(["Hi", "Hello", "Bye"])}])
    assert [row["completion"]["content"] for row in done.rows] == [*kept, "Hello"]


def parts(*texts):
    return [{"text": text} for text in texts]


BIRD = chat(SAID[:3])
ANSWERED = [chat(["", SAID[3]])[1]]
STREAM = [{"event.name": f"gen_ai.{m['role']}.message", "content": m["content"]} for m in BIRD]
CALLING = [
    {"name": "gen_ai.assistant.message", "content": SAID[3], "tool_calls": '[{"id": 1}]'},
    {"name": "gen_ai.user.message", "content": SAID[4]},
]
TOLD = f"{SAID[3]}\n```\nThis block is not supported on your current device yet.\n```"
HIDDEN = [*zip(["human", "assistant"] * 2, [*SAID[:3], TOLD]), ("human", SAID[4])]
THINKING = layouts.librechat(False)
THINKING["messages"][1]["text"] = ":::thinking\nhm\n:::\n" + A1
SENT = {f"gen_ai.{k}.messages": json.dumps(v) for k, v in (("input", BIRD), ("output", ANSWERED))}
LATEST_FIRST = [{**row, "created_at": 9 - n} for n, row in enumerate(reversed(layouts.ROWS))]
FORK = [{**m, "conversationId": "C"} for m in layouts.librechat(False)["messages"]]
EARLIER = {**FORK[0], "messageId": "old", "text": "Name a fish."}
FORK[2:2] = [EARLIER, {**FORK[1], "messageId": "older", "parentMessageId": "old"}]


DETAILS = {"name": "gen_ai.client.inference.operation.details", **SENT}
AI_SDK = {"ai.prompt.messages": json.dumps(BIRD), "ai.response.text": SAID[3], "ai.response.finishReason": "stop"}
BEDROCK = [
    {"role": "user", "content": [*parts(U1), {"cachePoint": {"type": "default"}}]},
    {"role": "assistant", "content": [{"reasoningContent": {"text": "hm"}}, *parts(A1)]},
    {"role": "user", "content": parts(U2)},
    {"role": "assistant", "content": [*parts(SAID[3]), {"toolUse": {"name": "f"}}]},
    {"role": "user", "content": parts(SAID[4])},
]
BACK = {"output": {"message": {"role": "assistant", "content": parts("x")}}, "stopReason": "end_turn"}
CALL = {"input": {"inputBodyJson": {"system": parts(SYSTEM), "messages": BEDROCK}}, "output": {"outputBodyJson": BACK}}
# As other versions of the programs have it: the records, and how many interactions are in them.
REFUSED = {"role": "assistant", "content": None, "refusal": A1}
VARIANTS = {
    "from and content": ([{"conversations": [{"from": m["role"], "content": m["content"]} for m in chat()]}], 2),
    "role and value": ([{"messages": [{"role": m["role"], "value": m["content"]} for m in chat()]}], 2),
    "rows from the latest on": (LATEST_FIRST, 2),
    "rows of equal times": ([{**row, "time": 1.7e9 + n // 2} for n, row in enumerate(layouts.ROWS)], 2),
    "rows in no order": (sorted(LATEST_FIRST, key=lambda row: row["role"]), 2),
    "rows of parts": ([{**row, "content": [{"type": "text", "text": row["content"]}]} for row in layouts.ROWS], 2),
    "rows of a tree": (FORK, 2),
    "events in an attribute": ([{"attributes": {"llm.x": 1, "events": json.dumps([*STREAM, STREAM[1]])}}], 1),
    "messages in an event": ([{"attributes": {"llm.x": 1}, "events": [DETAILS]}], 1),
    "calls in events": ([{"attributes": {"llm.x": 1}, "events": [*STREAM, *CALLING]}], 1),
    "a system prompt inside": ([{"traceId": "t", "input": {"input": {"system": SYSTEM, "messages": BIRD}}}], 1),
    "a trace of calls": ([{"input": U2, "observations": [{"type": "generation", "input": BIRD, "output": "x"}]}], 1),
    "a history beside": ([{"inputs": {"input": U2, "chat_history": BIRD[:2]}, "outputs": {"output": "x"}}], 1),
    "weave": ([{"op_name": "chat", "inputs": {"messages": BIRD}, "output": layouts.completion("x")}], 1),
    "vertex": ([{"full_request": {"messages": BIRD}, "full_response": layouts.completion("x")}], 1),
    "no output": ([{"object": "response", "input": BIRD, "output": []}], 1),
    "the ai sdk's spans": ([{"attributes": AI_SDK}], 1),
    "the ai sdk's calls": ([{"attributes": {**AI_SDK, "ai.response.toolCalls": '[{"toolName": "f"}]'}}], 1),
    "bedrock": ([CALL], 1),
    "claude.ai's tools": ([{"chat_messages": [{"sender": s, "text": t} for s, t in HIDDEN]}], 1),
    "librechat's reasoning": ([THINKING], 2),
    "newest first": ([{"messages": [{**m, "ts": f"{1704100000 - n}.1"} for n, m in enumerate(chat(SAID[::-1]))]}], 2),
    "openai's refusal": ([{"messages": [*chat(SAID[:1]), REFUSED, *chat(SAID[2:])]}], 2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_layouts(prepared, name):
    records, count = VARIANTS[name]
    done = prepared(records)
    assert shown(by_length(done.rows)) == EXPECTED[:count], done.table
    systems = {m["content"] for row in done.rows for m in row["prompt"] if m["role"] == "system"}
    assert systems == ({SYSTEM} if SYSTEM in str(records) else set())


def test_all_branches(prepared):
    other = ([U1], "A wren.", "Another one")
    done = prepared([layouts.chatgpt(), layouts.open_webui()], "--branches", "all", "--format", "chatgpt")
    assert sorted(shown(done.rows)) == sorted([*EXPECTED, other])
    assert {row["conversation_id"] for row in done.rows} == {"C"} and len({row["id"] for row in done.rows}) == 3
    assert done.report["damaged"] == {"wrong layout": 1}
    assert "mapping must be an object of nodes" in done.table


@pytest.mark.parametrize(
    ("name", "change", "left_out"),
    [
        ("a2", {"recipient": "browser"}, {"after a tool call or tool message": 1}),
        ("a2", {"author": {"role": "tool"}}, {"after a tool call or tool message": 1}),
        ("u3", {"metadata": {"attachments": [{"id": "f"}]}}, {"after an image or file": 1}),
        ("u3", {"content": {"parts": [{"content_type": "image_asset_pointer"}, "?"]}}, {"after an image or file": 1}),
        ("a2", {"weight": 0.0}, {NOT_TRAINED: 1}),
        ("a2", {"status": "in_progress"}, {CUT_OFF: 1}),
        ("a2", {"metadata": {"finish_details": {"type": "interrupted"}}}, {CUT_OFF: 1}),
        ("a2", {"content": FAILED}, {"to an error message in place of an answer": 1}),
    ],
)
def test_tools_and_images_of_chatgpt(prepared, name, change, left_out):
    record = layouts.chatgpt()
    record["mapping"][name]["message"] |= change
    done = prepared([record])
    assert (shown(done.rows), done.report["left_out"]) == (EXPECTED[:1], left_out)


MARKED = {"rating": -1, "comment": "No!"}


def rated(texts=SAID[:2], **more):
    messages = chat(texts)
    messages[-1] |= more
    return {"messages": messages}


@pytest.mark.parametrize(
    ("record", "options", "followup", "kept"),
    [
        (rated(rating="thumbs_down"), ["down=Not that."], "Not that.", {"rating": "down"}),
        (rated(feedback={"rating": "thumbsUp"}), ["down=No.", "up=Good."], "Good.", {"rating": "up"}),
        (rated(rating=2), ["1..2=Bad.", "4..5=Good."], "Bad.", {"rating": 2}),
        (rated(rating="4.5"), ["1..2=Bad.", "4..5=Good."], "Good.", {"rating": 4.5}),
        (
            rated(annotation=MARKED),
            ["down=No.", "down={comment}!"],
            "No!!",
            {"rating": "down", "rating_comment": "No!"},
        ),
        (rated(rating="down"), ["down={comment}", "down=No."], "No.", {"rating": "down"}),
        (rated(originalContent="Robin"), ["edited=Better: {edited}"], f"Better: {A1}", {"edited": A1}),
        (rated(rating="up"), ["down=No."], None, {}),
        (rated(rating="down", weight=0), ["down=No."], None, {}),
        (rated(SAID, rating="down"), ["down=No."], U2, {}),
    ],
)
def test_a_rating_as_the_follow_up(prepared, record, options, followup, kept):
    argv = [part for option in options for part in ("--rating-followup", option)]
    done = prepared([record, {"messages": chat(["Hi", "Hello", "Bye"])}], *argv)
    rows = [row for row in done.rows if row["completion"]["content"] != "Hello"]
    assert [row["user_response"]["content"] for row in rows][:1] == ([] if followup is None else [followup])
    made = followup not in (None, U2)
    assert done.report["rating_followups"] == made
    assert ("interactions with a rating's wording as the follow-up" in done.table) == made
    if made:
        assert fields(rows[0]) == {**kept, "followup_from": "rating"}
        assert rows[0]["completion"]["content"] == ("Robin" if "edited" in kept else A1)


def test_a_rating_gives_way_to_the_user(prepared):
    """Of calls with the history so far, the one that the user replied to in the next has a follow-up."""
    records = [rated(SAID[:2], rating="down"), rated(SAID[:4], rating="down"), {"messages": chat(SAID)}]
    assert shown(prepared(records, "--rating-followup", "down=No.").rows) == EXPECTED
    done = prepared(records[:2], "--rating-followup", "down=No.", "--overwrite", preset="default")
    assert [row["user_response"]["content"] for row in done.rows] == [U2, "No."]


NESTED = {
    "meta": {"thread": 7, "lang": "English"},
    "chat": {"items": [{"author": {"role": "Agent" if n % 2 else "customer"}, "text": t} for n, t in enumerate(SAID)]},
}
FLAT = [{"thread": "C", "by": m["role"], "said": m["content"], "stars": n} for n, m in enumerate(chat())]
MAP = "role=author.role,content=text,messages=chat.items,conversation_id=meta.thread,language=meta.lang"
HOOK = """
from fastsdpo.data import Conversation
def one(record):
    return [{"role": role, "content": text} for role, text in record["turns"]]
def several(record):
    return (Conversation(one(record), id=name, fields={"n": 1}) for name in "ab")
def dup(record):
    return Conversation([], fields={"prompt": 1})
def wrong(record):
    return 5
"""
TURNS = [{"turns": [[m["role"], m["content"]] for m in chat()]}]


@pytest.mark.parametrize(
    ("records", "argv", "names", "format_"),
    [
        ([{"id": "d", "dialogue": chat(), "topic": "birds"}], ["--branches", "all"], ["d"], "openai"),
        ([NESTED], ["--map", MAP + ",role.user=customer|client,role.assistant=agent"], ["7"], "map"),
        (FLAT, ["--map", "role=by,content=said,conversation_id=thread,rating=stars"], ["C"], "map"),
        (TURNS, ["--reader", "own_reader:one"], ["in.jsonl:1"], "reader own_reader:one"),
        (TURNS, ["--reader", "own_reader.py:several"], ["a"], "reader own_reader.py:several"),
    ],
)
def test_other_layouts(prepared, tmp_path, monkeypatch, records, argv, names, format_):
    (tmp_path / "own_reader.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    done = prepared(records, *argv)
    assert shown(done.rows) == EXPECTED, done.error
    assert [row["conversation_id"] for row in done.rows] == names * 2
    assert f"records: {format_}\n" in done.table
    assert [row.get("rating") for row in done.rows] == ([1, 3] if "stars" in argv[1] else [None, None])
    assert [row.get("n") for row in done.rows] == ([1, 1] if "several" in argv[1] else [None, None])


@pytest.mark.parametrize(
    ("record", "argv", "said"),
    [
        ({"text": "", "thread": 1}, [], "got the keys 'text', 'thread'; name a layout with --format, say where"),
        ({"chosen": chat(), "rejected": chat()}, [], "got the keys 'chosen', 'rejected'; name a layout"),
        ({"chat_mesages": []}, [], "the nearest layout is claude (claude.ai's export), which has 'chat_messages'"),
        ({}, ["--format", "nosuch"], "--format: must be one of ai-sdk, alpaca, arena, chatbox, chatgpt"),
        ({}, ["--format", "claude", "--map", "role=a"], "--format, --map and --reader exclude each other"),
        ({}, ["--branches", "some"], "--branches: must be one of active, all; got 'some'"),
        ({}, ["--map", "role=a,nosuch=b"], "--map: must be NAME=PATH,... with names of messages, role"),
        ({}, ["--map", "messages=a.b"], "--map messages=a.b: there must be a list of messages, got NoneType"),
        ({}, ["--reader", "nothing"], "--reader: must be MODULE:FUNCTION or FILE.py:FUNCTION, got 'nothing'"),
        ({}, ["--reader", "no_such_module:f"], "--reader no_such_module:f: cannot be imported: ModuleNotFound"),
        ({}, ["--reader", "json:f"], "--reader: json must have a function f, got none"),
        ({}, ["--reader", "own_reader:one"], "--reader own_reader:one: KeyError: 'turns'"),
        ({}, ["--reader", "own_reader:dup"], "--reader own_reader:dup: fields must not have the name of a row's own"),
        ({}, ["--reader", "own_reader:wrong"], "--reader own_reader:wrong: TypeError: 'int' object is not iterable"),
        ({}, ["--format", "openai", "--preset", "paper-wildchat"], "leave out --format, --map, --reader, --branches"),
        ({}, ["--rating-followup", "down"], "--rating-followup: must be RATING=TEXT"),
        (layouts.completion(A1), [], "choices are answers alone, without their prompt; add the messages"),
        ({"custom_id": "a", "response": {}}, [], "a line of a batch's output has no prompt; put the body"),
        ({"object": "response", "input": "x", "previous_response_id": "r"}, [], "goes on from 'r'"),
        ({"request": {"messages": chat()}, "response": {"error": {"code": 9}}}, [], "response: the call failed: dict"),
        ({"attributes": {"gen_ai.tool.name": "f"}}, [], "damaged           1 not a call of a model"),
        ({"mapping": {"a": {"parent": "b"}, "b": {"parent": "a"}}, "current_node": "a"}, [], "a circle of parents"),
        ({"messages": [{**chat()[0], "children": ["a", "b"]}]}, [], "messages must be one branch of a conversation"),
        ({"messages": [{"role": "user", "content": None, "text": "x"}]}, [], "must have 'content', got the keys"),
    ],
)
def test_what_cannot_be_read_is_said(prepared, tmp_path, monkeypatch, record, argv, said):
    (tmp_path / "own_reader.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    done = prepared([record], *argv)
    assert done.status == 1 and said in done.table + done.error


def table(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def test_files_of_tables_and_logs(tmp_path):
    """Rows of one conversation need not stand together; a column may hold one as JSON, or as pandas wrote it."""
    said = [repr(layouts.chatml(chat(SAID[:n])) + "<|im_start|>assistant\n") for n in (3, 5)]
    log = "".join(
        f"INFO 01-01 [logger.py:4] Received request cmpl-{n}: prompt: {s}, params: S()\n" for n, s in enumerate(said)
    )
    files = {
        "a.csv": table(layouts.ROWS),
        "a.tsv": table(layouts.ROWS, "\t"),
        "b.csv": table([{"id": 1, "messages": json.dumps(chat())}], ";"),
        "c.csv": b"\xef\xbb\xbf" + table([{"id": 1, "conversation": chat()}]),
        "a.csv.gz": gzip.compress(table(layouts.ROWS)),
        "vllm.log": f"INFO: started\n{log}INFO: Finished\n".encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(layouts.ROWS), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(layouts.CASES["otel columns"][0]), tmp_path / "b.parquet")
    for name in [*files, "a.parquet", "b.parquet"]:
        output = tmp_path / f"{name}.out"
        assert main([str(tmp_path / name), "-o", str(output), "--preset", "none", "--quiet"]) == 0, name
        assert shown(by_length(read_rows(output))) == EXPECTED, name


@pytest.mark.parametrize(
    ("files", "prompts", "said"),
    [
        ([table(layouts.ROWS).replace(A1.encode(), b"\xff", 1)], [], "2 a row may be missing"),
        ([table(layouts.ROWS[:5]), table(layouts.ROWS[5:])], [SAID[:1]], "1 rows in several files"),
        (
            [table(layouts.ROWS[:5]), table(layouts.ROWS)],
            [SAID[:1], SAID[:3]],
            "1 interactions that are there already",
        ),
    ],
)
def test_rows_are_trained_on_where_the_history_is_whole(tmp_path, capsys, files, prompts, said):
    for number, data in enumerate(files):
        (tmp_path / f"{number}.csv").write_bytes(data)
    output = tmp_path / "out.jsonl"
    argv = [str(tmp_path / "*.csv"), "-o", str(output), "--preset", "none", "--workers", "2"]
    assert main(argv) == int(not prompts)
    assert [texts for texts, *_ in shown(by_length(read_rows(output)))] == prompts
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "damaged"),
    [
        (table(layouts.ROWS) + b"C,user\n", "not CSV"),
        (table(layouts.ROWS) + b",user,hi\n", "wrong layout"),
        (table(layouts.ROWS) + b"C,user,\xff\n", "invalid UTF-8"),
        (gzip.compress(table(layouts.ROWS))[:-9], "damaged file"),
    ],
)
def test_a_damaged_row_costs_itself(tmp_path, data, damaged):
    path = tmp_path / ("a.csv.gz" if damaged == "damaged file" else "a.csv")
    path.write_bytes(data)
    report = LoadReport()
    conversations = list(load_conversations(path, report=report))
    assert report.damaged == {damaged: 1}
    assert damaged == "damaged file" or [m["content"] for m in conversations[0].messages] == SAID


def test_the_example_of_the_page(smollm2, tmp_path, monkeypatch, capsys):
    """docs/data.md: an export of ChatGPT, and what the command prints of it."""
    said = [("user", "Name a fruit"), ("assistant", "Pear"), ("user", "No, in French"), ("assistant", "Poire")]
    nodes = [{"id": "0", "parent": None, "children": [], "message": None}]
    nodes += [layouts.node(str(n), str(n - 1), role, [text]) for n, (role, text) in enumerate(said, 1)]
    nodes += [layouts.node("5", "4", "user", ["Thanks"]), layouts.node("other", "1", "assistant", ["Apple"])]
    export = {"conversation_id": "abc", "mapping": {node["id"]: node for node in nodes}, "current_node": "5"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conversations.json").write_text(json.dumps([export]))
    smollm2.save_pretrained("MODEL")
    command, printed = blocks(ROOT / "docs/data.md", "text")[0].split("\n", 1)
    assert main(shlex.split(command)[3:]) == 0
    assert capsys.readouterr().out.strip() == printed.strip()
    assert read_rows(tmp_path / "interactions.jsonl")[0]["alternatives"] == ["Apple"]


CHAT = """\u200e[31/12/24, 21:15:01] Bot: \u200eMessages and calls are end-to-end encrypted.
[31/12/24, 21:15:02] Ann: Name a bird.
[31/12/24, 21:15:03] Bot: A robin.
12/31/24, 9:16\u202fPM - You created this group
12/31/24, 9:16\u202fPM - Ann: In French, please.
12/31/24, 9:17 PM - Bot: Un
rouge-gorge: a bird
31.12.24, 21:18 - Ann: <Media omitted>
31.12.24, 21:18 - Ann: And a fish?
"""


def test_the_script_of_the_page_for_whatsapp(prepared, tmp_path):
    script = next(text for text in blocks(ROOT / "docs/data.md", "python") if "whatsapp.py" in text)
    (tmp_path / "whatsapp.py").write_text(script, "utf-8")
    (tmp_path / "chat.txt").write_text(CHAT, "utf-8")
    argv = [sys.executable, "whatsapp.py", "chat.txt", "Bot"]
    printed = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=True, encoding="utf-8").stdout
    rows = prepared([json.loads(line) for line in printed.splitlines()]).rows
    answer = "Un\nrouge-gorge: a bird"
    assert shown(by_length(rows)) == [EXPECTED[0], (SAID[:3], answer, SAID[4])]
