"""Tables with a message in each row: several files, and files that begin with the newest."""

import pytest

from fastsdpo.commands.prepare import main
from fastsdpo.data.times import oldest_first
from tests.data.conftest import read_rows
from tests.data.layout_records import SAID
from tests.data.test_readers import EXPECTED, by_length, shown, table

LONG = "6f1c2e9a-7b3d-4e5f-8a90-b1c2d3e4f506"
ARGV = ("--overwrite", "--workers", "1")
DAYS = [f"2026-03-0{n + 1} 09:00:00" for n in range(5)]


def rows(first=0, last=5, name=LONG, times=DAYS, said=SAID, role=("user", "assistant")):
    found = [
        {"session_id": name, "role": role[n % 2], "content": said[n], "Created At": times[n]}
        for n in range(first, last)
    ]
    return [{key: value for key, value in row.items() if value} for row in found]


def prepared_files(tmp_path, files, *argv):
    for number, data in enumerate(files):
        (tmp_path / f"{number}.csv").write_bytes(data if isinstance(data, bytes) else table(data))
    output = tmp_path / "out.jsonl"
    status = main([str(tmp_path / "*.csv"), "-o", str(output), "--preset", "none", "--workers", "2", *argv])
    return status, shown(by_length(read_rows(output)))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([rows(0, 2), rows(2, 5)], ""),
        ([rows(0, 1), rows(1, 4), rows(4, 5)], ""),
        ([rows(2, 5), rows(0, 2)], ""),  # by their times, not by the files' names
        ([rows(0, 3), rows(0, 5)], "1 interactions that are there already"),
        ([rows(), rows()], "2 interactions that are there already"),
        ([b'{"messages": [\n', rows()], ""),  # damage in another file, or behind its last row
        ([table(rows(name="8")) + b"8,user\n", rows()], ""),
        ([rows(0, 3, "7"), [{**row, "Created At": "2026-04-01"} for row in rows(0, 5, "7")]], "1 interactions that"),
    ],
)
def test_rows_of_several_files_are_one_conversation(tmp_path, capsys, files, said):
    assert prepared_files(tmp_path, files) == (0, EXPECTED)
    out = capsys.readouterr().out
    assert said in out and "a row may be" not in out and "several files" not in out


@pytest.mark.parametrize(
    ("files", "kept", "said"),
    [
        ([rows(0, 3, "chat-7"), rows(3, 5, "chat-7")], EXPECTED[:1], "1 rows in several files"),
        ([rows(0, 3, times=[""] * 5), rows(3, 5, times=[""] * 5)], EXPECTED[:1], "1 rows in several files"),
        ([rows(0, 3), rows(2, 5)], EXPECTED[:1], "1 rows in several files"),  # which overlap
        (
            [rows(0, 3), b"session_id,role,content,Created At\nx,\xff,a,b\n" + table(rows(3, 5))[39:]],
            [],
            "a row may be",
        ),
    ],
)
def test_rows_that_may_be_of_others_are_left_out(tmp_path, capsys, files, kept, said):
    assert prepared_files(tmp_path, files)[1] == kept
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "written",
    [
        ["1/{0}/2026 10:00:00 AM", "1/{0}/2026, 9:05 pm"],
        ["0{0}.01.2026 10:00"],
        ["Mon, 0{0} Mar 2026 21:05:00 GMT", "March {0}, 2026 9:05pm"],
        ["2026-01-0{0}T10:00:00+01:00"],
    ],
)
@pytest.mark.parametrize("column", ["Time", "created_at", "CreatedAt"])
def test_the_newest_first(tmp_path, written, column):
    """A table of which the last message comes first, in the forms in which programs write their dates."""
    for form in written:
        table_rows = [{column: form.format(n + 1), **row} for n, row in enumerate(rows(times=[""] * 5))]
        assert prepared_files(tmp_path, [table_rows[::-1]], *ARGV) == (0, EXPECTED)
        assert prepared_files(tmp_path, [table_rows], *ARGV) == (0, EXPECTED)


@pytest.mark.parametrize(
    "times", [["7/1/2026", "6/1/2026", "5/2/2026"], ["late", "later", "last"], ["", "", ""], ["1/2/2026"] * 3]
)
def test_an_order_that_is_not_known_stays(times):
    messages = [{"date": time, "content": str(n)} for n, time in enumerate(times)]
    assert oldest_first(messages) == messages


TURNS = [
    {"t": LONG, "when": day, "in": {"text": q}, "out": [a]} for day, q, a in zip(DAYS, SAID[::2], [*SAID[1::2], ""])
]
HOOK = """
def read(records):
    return [{"role": role, "content": text} for r in records for role, text in r["said"].items()]

read.conversation_id = lambda record: record["t"]
"""


@pytest.mark.parametrize(
    ("records", "argv"),
    [
        (TURNS, ["--map", "question=in.text,answer=out.0,conversation_id=t"]),
        ([{"c": TURNS}], ["--map", "messages=c,question=in.text,answer=out.0"]),
        ([{"t": LONG, "said": {m["role"]: m["content"]}} for m in rows()], ["--reader", "own_rows:read"]),
    ],
)
def test_rows_by_the_users_own_account(prepared, tmp_path, monkeypatch, records, argv):
    (tmp_path / "own_rows.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    done = prepared(records, *argv)
    assert shown(done.rows) == EXPECTED, done.error + done.table


def test_a_question_needs_an_answer(prepared):
    done = prepared(TURNS, "--map", "question=in.text")
    assert done.status == 1 and "--map: question and answer must be given together" in done.error


def test_topics_of_a_session_are_conversations(prepared):
    """As LobeChat keeps them; a session's first conversation has no topic."""
    rows = [
        {"sessionId": "inbox", "topicId": topic, "role": ("user", "assistant")[n % 2], "content": f"{topic} {n}"}
        for topic in (None, "a", "b")
        for n in range(3)
    ]
    found = sorted((row["conversation_id"], row["prompt"][0]["content"]) for row in prepared(rows).rows)
    assert found == [("inbox", "None 0"), ("inbox:a", "a 0"), ("inbox:b", "b 0")]
