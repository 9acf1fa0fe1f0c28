"""What records say beside their messages: `--keep`, filters by mark, model and time, and `--eval-after`."""

import datetime

import pytest

from fastsdpo.commands.prepare import main
from fastsdpo.data import load_interactions
from fastsdpo.data.times import parse_time

UTC = datetime.timezone.utc
NOON = datetime.datetime(2023, 4, 9, 12, tzinfo=UTC)


def record(name, first=None, **more):
    texts = [first or f"{name}?", f"{name}!", f"{name}, thanks"]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts)]
    return {"messages": messages, "id": name, **more}


def names(rows):
    return sorted(row["conversation_id"] for row in rows)


@pytest.mark.parametrize(
    "value",
    [
        *("2023-04-09T12:00:00Z", "2023-04-09 12:00", "20230409T120000", "2023-04-09 14:00:00.000000+02:00"),
        *("2023-04-09T06:30:00-0530", " 2023-04-09 12:00:00 UTC", "1681041600", 1681041600, 1681041600.0),
        *(1681041600_000, 1681041600_000_000, 1681041600_000_000_000, NOON, NOON.replace(tzinfo=None)),
    ],
)
def test_times_of_one_moment(value):
    assert parse_time(value) == NOON.timestamp()


@pytest.mark.parametrize("value", ["yesterday", "2023-13-01", "2023", None, True, float("nan"), [1]])
def test_no_times(value):
    with pytest.raises(ValueError, match="must be an ISO date or seconds since 1970, got"):
        parse_time(value)


RECORDS = [
    record("gpt4", model="gpt-4-0314", timestamp="2023-04-09T12:00:00Z", toxic=False, redacted=False, country="Peru"),
    record("gpt3", model="GPT-3.5-turbo", timestamp=1681041601, toxic=True, redacted=False, country=None),
    record("later", model="gpt-4", created_at=1700000000000, toxic=False, redacted=True, country=["a", {"b": 1.5}]),
    record("bare"),
]
RECORDS[3]["messages"][1].update(toxic=False, timestamp="2023-05-01")


@pytest.mark.parametrize(
    ("options", "kept", "dropped"),
    [
        ("--drop-toxic", ["bare", "gpt4", "later"], {"marked toxic": 1}),
        ("--drop-redacted", ["gpt3", "gpt4"], {"marked redacted": 1, "no mark redacted given": 1}),
        ("--models gpt-4* gpt-3.5-TURBO", ["gpt3", "gpt4", "later"], {"no model given": 1}),
        ("--models gpt-4", ["later"], {"other model": 2, "no model given": 1}),
        ("--after 2023-04-09T12:00:01", ["bare", "gpt3", "later"], {"from before the wanted time": 1}),
        ("--before 1681041601 --drop-toxic", ["gpt4"], {"marked toxic": 1, "from after the wanted time": 2}),
        ("--after 2023-04-10 --before 2023-11-01", ["bare"], None),
    ],
)
def test_filters(prepared, options, kept, dropped):
    done = prepared(RECORDS, *options.split())
    assert names(done.rows) == kept
    assert dropped is None or done.report["dropped"] == dropped


def test_a_message_with_the_mark_and_a_record_without_a_time(prepared):
    marked = record("marked", toxic=False, timestamp="soon")
    marked["messages"][1]["toxic"] = True
    done = prepared([*RECORDS, marked], "--drop-toxic", "--after", "1970-01-01")
    assert done.report["dropped"] == {"marked toxic": 2}
    done = prepared([*RECORDS, marked], "--after", "2000-01-01", "--overwrite")
    assert done.report["dropped"] == {"no time given": 1}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_kept_keys_are_in_the_rows(prepared, suffix):
    records = [{**r, "when": "x"} for r in RECORDS[:2]]
    records[0]["timestamp"] = NOON if suffix == "parquet" else NOON.isoformat()
    records[1]["timestamp"] = None
    done = prepared(records, "--keep", "model, timestamp,toxic,nothing,country", suffix=suffix)
    fields = [{key: row[key] for key in list(row)[6:]} for row in done.rows]
    said = {"model": "gpt-4-0314", "timestamp": "2023-04-09T12:00:00+00:00", "toxic": False, "nothing": None}
    assert fields[0] == {**said, "country": "Peru"}
    assert fields[1] == {"model": "GPT-3.5-turbo", **dict.fromkeys(said, None), **fields[1]} and len(fields[1]) == 5
    assert len(list(load_interactions(done.output))) == 2


def test_the_columns_of_a_table_of_messages(prepared):
    """Of a conversation's rows, the last that says something counts; one that is marked is enough."""
    rows = [
        {
            "conversation_id": r["id"],
            **message,
            "timestamp": f"2026-01-0{n + 1}",
            "model": r["model"] if n == 1 else None,
        }
        for r in (record("old", model="a"), record("new", model="b"))
        for n, message in enumerate(r["messages"])
    ]
    rows[0]["toxic"], rows[3]["toxic"], rows[-1]["timestamp"] = True, False, "2026-02-01"
    done = prepared(rows, "--keep", "model")
    assert [row["model"] for row in done.rows] == ["a", "b"]
    for options, kept in (("--after 2026-01-20", "new"), ("--models a", "old"), ("--drop-toxic", "new")):
        assert names(prepared(rows, *options.split(), "--overwrite").rows) == [kept], options


@pytest.mark.parametrize("name", ["prompt", "system", "id", "messages", ""])
def test_keys_that_cannot_be_kept(prepared, name):
    done = prepared(RECORDS, "--keep", f"model,{name}")
    assert done.status == 1 and f"keep must name keys that rows do not have anyway, got {name!r}" in done.error


class TestEvalAfter:
    def test_whole_conversations_from_then_on(self, prepared):
        """A conversation is from the time of its latest record, and no prompt is on both sides."""
        records = [record(f"early{n}", timestamp=f"2023-01-0{n + 1}") for n in range(5)]
        records += [record(f"late{n}", timestamp=f"2023-02-0{n + 1}") for n in range(3)]
        records += [record("same", first="early1?", timestamp="2023-02-05"), record("timeless")]
        first = {**record("call"), "session_id": "s", "timestamp": "2023-01-01"}
        more = [{"role": "assistant", "content": "Bye."}, {"role": "user", "content": "Bye!"}]
        second = {**first, "messages": [*first["messages"], *more], "timestamp": "2023-02-09"}
        done = prepared([*records, first, second], "--eval-after", "2023-02-01")
        assert names(done.rows) == [f"early{n}" for n in range(5)]
        assert names(done.held_out) == ["late0", "late1", "late2", "s", "s"]
        dropped = {"no time given": 1, "from the held-out time, with a prompt from before it": 1}
        assert done.report["dropped"] == dropped and "held out          4 conversations" in done.table
        split = prepared(records, "--eval-after", "2023-02-01", "--overwrite", preset="default")
        assert names(split.held_out) == ["late0", "late1", "late2"]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ("--eval-after 2030-01-01", "--eval-after must leave conversations on both sides, got 0 of 4 from"),
            ("--eval-after 2000-01-01", "on both sides, got 4 of 4"),
            ("--eval-after soon", "--eval-after: a time must be an ISO date or seconds since 1970, got 'soon'"),
            ("--eval-after 2023-01-01 --eval-fraction 0.1", "by eval_fraction or by eval_after, got both"),
        ],
    )
    def test_refusals(self, prepared, tmp_path, options, said):
        done = prepared(RECORDS, *options.split())
        assert done.status == 1 and said in done.error and not list(tmp_path.glob("out*"))

    def test_records_without_a_time(self, prepared, tmp_path):
        done = prepared([record(f"timeless{n}") for n in range(3)], "--eval-after", "2023-01-01")
        assert done.status == 1 and "no interaction was kept" in done.error
        assert "dropped           3 no time given" in done.table and not list(tmp_path.glob("out*"))

    def test_a_filter_names_its_option(self, capsys):
        with pytest.raises(SystemExit):
            main(["in.jsonl", "-o", "out.jsonl", "--after", "soon"])
        assert "--after: a time must be an ISO date" in capsys.readouterr().err


def test_the_layout_of_trl(prepared):
    """The answer is a list of one message; the rows are read again, as interactions and as conversations."""
    own = prepared(RECORDS)
    done = prepared(RECORDS, "--layout", "trl", "--keep", "model", "--overwrite")
    assert [row["completion"] for row in done.rows] == [[row["completion"]] for row in own.rows]
    assert [row["prompt"] for row in done.rows] == [row["prompt"] for row in own.rows]
    assert prepared(done.rows, "--overwrite").rows == own.rows
    refused = prepared(RECORDS, "--layout", "trl", "--keep", "images")
    assert "what TRL reads in the rows' place, got 'images'" in refused.error
    two = [{**done.rows[0], "completion": done.rows[0]["completion"] * 2}]
    assert "completion" in prepared(two, "--overwrite").table
