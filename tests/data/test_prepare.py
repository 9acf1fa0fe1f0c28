"""`fastsdpo prepare`: what it writes, that this is whole or absent and repeatable, what it refuses."""

import json
import os
from pathlib import Path

import pytest

from fastsdpo.commands import prepare as command
from fastsdpo.data import ConversationFilter, load_interactions, prepare
from fastsdpo.data.loading import DamagedRecord
from fastsdpo.data.spool import Spool


def conversation(number, turns=3, **more):
    texts = [f"{number}.{turn} é日 " * 4 for turn in range(2 * turns + 1)]
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    return {"conversation_hash": f"c{number}", "conversation": messages, "language": "English", **more}


RECORDS = [conversation(n, 1 + n % 4) for n in range(60)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS), "utf-8")
    return path


def rows(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestOutput:
    def test_rows_load_back(self, source, tmp_path):
        report = prepare.prepare([source], tmp_path / "out.jsonl")
        written = rows(tmp_path / "out.jsonl")
        assert len(written) == report.interactions == sum(1 + n % 4 for n in range(60))
        assert (report.conversations, report.records, report.damaged) == (60, 60, {})
        for row, interaction in zip(written, load_interactions(tmp_path / "out.jsonl")):
            number, turn = row["conversation_id"][1:], row["turn_id"]
            assert row["id"] == interaction.id == f"c{number}:{turn}"
            assert interaction.conversation_id == f"c{number}"
            assert row["completion"] == {"role": "assistant", "content": f"{number}.{2 * turn + 1} é日 " * 4}
            assert row["user_response"]["content"] == f"{number}.{2 * turn + 2} é日 " * 4
            assert len(interaction.prompt) == 2 * turn + 1
        saved = json.loads((tmp_path / "out.report.json").read_text("utf-8"))
        assert saved["interactions"] == report.interactions
        assert not (tmp_path / "out.jsonl.partial").exists()

    def test_order_is_by_seed(self, source, tmp_path):
        outputs = {}
        for name, seed in (("a", 42), ("b", 42), ("c", 43)):
            prepare.prepare([source], tmp_path / f"{name}.jsonl", seed=seed)
            outputs[name] = (tmp_path / f"{name}.jsonl").read_bytes()
        assert outputs["a"] == outputs["b"] != outputs["c"]
        assert sorted(outputs["a"].split(b"\n")) == sorted(outputs["c"].split(b"\n"))
        prepare.prepare([source], tmp_path / "d.jsonl", rules="wildfeedback")
        order = [row["conversation_id"] for row in rows(tmp_path / "d.jsonl")]
        assert list(dict.fromkeys(order)) == [f"c{n}" for n in range(60)]

    @pytest.mark.parametrize("shuffle", ["--shuffle", "--no-shuffle"])
    def test_limits(self, prepared, shuffle):
        assert prepared(RECORDS, "--max-conversations", 10, shuffle).report["conversations"] == 10
        done = prepared(RECORDS, "--max-interactions", 10, shuffle, "--overwrite")
        assert 6 < done.report["interactions"] <= 10
        report = prepared(RECORDS, "--limit", 7, shuffle, "--overwrite").report
        assert (report["records"], report["conversations"]) == (7, 7)

    def test_dropped_and_damaged_are_counted(self, prepared):
        records = [conversation(n, 2) for n in range(5)]
        records[1]["language"] = "German"
        records[2]["conversation"][1]["content"] = "x" * 5000
        records[3]["conversation"] = records[3]["conversation"][:2]
        records[4]["conversation"] = [*records[4]["conversation"][:2]] * 2  # ends with an answer
        records[4]["conversation"][2] = {"role": "user", "content": ""}
        assert prepared(records, "--quiet", preset="wildchat").table == ""
        source = prepared(records).source
        source.write_bytes(source.read_bytes() + b'{"conversation": \n')
        done = prepared(None, "--overwrite", preset="wildchat")
        report, problems = done.report, [text for found in done.report["problems"].values() for text in found]
        assert (report["records"], report["conversations"], report["interactions"]) == (6, 1, 2)
        reasons = ("other language", "assistant message over 4,096 characters", "fewer than 3 messages")
        assert report["dropped"] == dict.fromkeys(reasons, 1) and report["left_out"] == {"that are empty": 1}
        assert f"{source}:5: nothing but follow-ups that are empty" in problems
        assert report["damaged"]["not JSON"] == 1 and f"{source}:6: not JSON: Expecting value" in str(problems)
        for text in (*reasons, "follow-ups that are empty", "not JSON"):
            assert text in done.table

    def test_options_reach_the_rules(self):
        parse = command._parser().parse_args
        text = "s -o o --preset wildchat --max-history-messages 3 --max-user-chars none --no-shuffle --languages fr "
        text += "--min-messages 5 --max-conversations 14000 --max-interactions 50000"
        wanted = {"languages": ("fr",), "min_messages": 5, "max_history_messages": 3, "max_conversations": 14_000}
        wanted |= {"max_interactions": 50_000, "max_conversation_chars": 100_000, "max_assistant_chars": 4096}
        assert command._rules(parse(text.split())) == ConversationFilter(**wanted)
        assert command._rules(parse(["s", "-o", "o", "--languages"])).languages is None

    def test_conversations_without_ids_are_named_by_place(self, tmp_path):
        sources = [tmp_path / name / "source.jsonl" for name in ("a", "b")]
        for number, path in enumerate(sources):
            path.parent.mkdir()
            path.write_text(json.dumps({"messages": conversation(number)["conversation"]}) + "\n")
        prepare.prepare(sources, tmp_path / "out.jsonl", rules="none")
        names = {row["conversation_id"] for row in rows(tmp_path / "out.jsonl")}
        assert names == {"source.jsonl:1", "1/source.jsonl:1"}


def chat(*turns):
    """("user", "Hi"), ("assistant", None, {"tool_calls": ...}), ... -> messages."""
    return [{"role": role, "content": text, **dict(*more)} for role, text, *more in turns]


HI = chat(("user", "Hi"), ("assistant", "y"), ("user", "o"))
HI_SHARED = [{"from": speaker, "value": m["content"]} for speaker, m in zip(("human", "gpt", "human"), HI)]
HI_BOTH = [{"from": m["role"], "value": m["content"], "role": None, "content": None} for m in HI]
ROW = {"prompt": HI[:1], "completion": "y", "user_response": "o"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [], "conversations": HI_SHARED},
        {"messages": None, "conversation": HI},
        {"prompt": None, "completion": None, "user_response": None, "messages": HI},
        {"prompt": [], "completion": "", "user_response": "", "items": HI},
        {"messages": [], **ROW},
        {"messages": HI_BOTH},
    ],
)
def test_the_filled_column_is_read(prepared, record):
    """A table of several layouts has all columns in every row."""
    (row,) = prepared([record]).rows
    assert [*row["prompt"], row["completion"], row["user_response"]] == HI


SYSTEM, FRENCH = {"role": "system", "content": "Answer in French."}, "Answer in French."


@pytest.mark.parametrize(
    "record",
    [
        {"system": FRENCH, "conversations": HI_SHARED},
        {"system_prompt": FRENCH, "messages": HI},
        {"system": [{"type": "text", "text": FRENCH}], "messages": HI},
        {"systemInstruction": FRENCH, "conversation": HI},
        {"system": FRENCH, **ROW},
        {"system": f" {FRENCH}\n", "system_prompt": "", "messages": [SYSTEM, *HI]},
        {"system": FRENCH, "messages": [{"role": "system", "content": " "}, *HI]},
        {"system": None, "system_prompt": " ", "messages": [SYSTEM, *HI]},
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_system_prompt_beside_the_messages_is_the_first_message(prepared, record, suffix):
    (row,) = prepared([record], suffix=suffix).rows
    assert [*row["prompt"], row["completion"], row["user_response"]] == [SYSTEM, *HI]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"system": "Be brief.", "messages": [SYSTEM, *HI]}, "in the messages and system; keep"),
        ({"system": "A", "system_prompt": "B", "messages": HI}, "in system and system_prompt; keep"),
        ({"system": {"os": "linux"}, "messages": HI}, "system[0]: content must be text, got dict"),
    ],
)
def test_two_system_prompts_are_not_guessed_between(prepared, record, said):
    done = prepared([record, {"messages": HI}])
    assert [row["prompt"] for row in done.rows] == [HI[:1]]
    assert "damaged           1 wrong layout" in done.table and f"{done.source}:1: " in done.table
    assert said in done.table


FUNCTION = {"name": "weather", "arguments": "{}"}
OLD_CALL = {"function_call": FUNCTION, "tool_calls": None}
CALLS = [{"tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]}, OLD_CALL]
AFTER_TOOL = "follow-ups after a tool call or tool message"


class TestToolCalls:
    @pytest.mark.parametrize("text", [None, "", "Let me look."])
    @pytest.mark.parametrize("call", CALLS)
    def test_nothing_from_the_call_on(self, prepared, call, text):
        hello = [("user", "Hi"), ("assistant", "Hello", {"tool_calls": [], "function_call": None})]
        asked = [("user", "Weather?"), ("assistant", text, call), ("user", "It said: sunny")]
        turns = chat(*hello, *asked, ("assistant", "It is sunny."), ("user", "Thanks, shorter"))
        shares = [{"from": m["role"], "value": m["content"], **call} for m in turns[3:4]]
        mixed = {"conversations": [*turns[:3], *shares, *turns[4:]]}
        done = prepared([{"messages": turns}, mixed, {"messages": turns[2:]}])
        assert [row["completion"]["content"] for row in done.rows] == ["Hello"]
        assert f"left out          6 {AFTER_TOOL}" in done.table
        assert f"damaged           1 nothing but {AFTER_TOOL}" in done.table
        assert f"{done.source}:3: nothing but {AFTER_TOOL}" in done.table
        assert "no answer is followed" not in done.table

    @pytest.mark.parametrize(
        ("role", "reason"), [("tool", AFTER_TOOL), ("system", "follow-ups after a later system message")]
    )
    def test_the_reason_is_the_message_that_cuts_off(self, prepared, role, reason):
        done = prepared([{"messages": chat(("user", "q"), ("assistant", "y"), (role, "x"), ("user", "o"))}])
        assert f"{done.source}:1: nothing but {reason}" in done.table and f"1 {reason}" in done.table
        assert done.status == 1 and "no interaction was kept" in done.error
        assert os.listdir(done.source.parent) == [done.source.name]  # nothing is left behind

    def test_a_row_that_lacks_its_call_is_refused(self, tmp_path):
        call = chat(("user", "q"), ("assistant", "", CALLS[0]), ("user", "It said: sunny"))
        for row, place in (({**ROW, "prompt": call}, r"prompt\[1\]"), ({**ROW, "completion": call[1]}, "completion")):
            (tmp_path / "in.jsonl").write_text(json.dumps(row))
            with pytest.raises(DamagedRecord, match=f"{place}: must be text alone, got 'tool_calls'"):
                list(load_interactions(tmp_path / "in.jsonl"))


class TestRefusals:
    def test_existing_output(self, prepared, tmp_path):
        output = tmp_path / "out.jsonl"
        output.write_text("precious")
        assert f"{output} exists; pass --overwrite" in prepared(RECORDS).error
        assert output.read_text() == "precious"
        assert prepared(None, "--overwrite").status == 0
        assert output.read_text() != "precious"
        # The same command again finds its work done; another one does not touch it.
        before = files(tmp_path)
        assert [prepared(None, *argv).status for argv in ([], ["--seed", 1], ["--no-resume"])] == [0, 1, 1]
        assert files(tmp_path) == before
        output.write_bytes(before["out.jsonl"][:-100])
        assert prepared(None).status == 1

    def test_a_source_is_not_replaced_and_an_output_not_read(self, prepared, tmp_path):
        done = prepared(RECORDS, "-o", tmp_path / "in.jsonl", "--overwrite")
        assert done.status == 1 and "--output must be another file than what is read" in done.error
        argv = [str(tmp_path), "-o", str(tmp_path / "out.jsonl"), "--eval-fraction", "0.2", "--overwrite"]
        outputs = [(command.main(argv), files(tmp_path))[1] for _ in range(2)]
        assert outputs[0] == outputs[1] and len(outputs[0]) == 4

    def test_strict_stops_at_the_first(self, prepared, tmp_path):
        wrong, lone = [conversation(0), {"a": 1}, 3], [{"messages": HI[:1]}]
        for records, said in ((wrong, "2: a record must have one of messages"), (lone, "1: no answer is followed")):
            done = prepared(records, "--strict")
            assert done.status == 1 and f"in.jsonl:{said}" in done.error
            assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"eval_fraction": 1.0}, r"eval_fraction must be in \[0, 1\), got 1.0"),
            ({"limit": 0}, "limit must be at least 1, got 0"),
            ({"eval_output": "x"}, "eval_output needs an eval_fraction above 0"),
            ({"rules": "wild"}, "name must be one of wildchat"),
            ({"eval_fraction": 0.1, "eval_output": "out.jsonl"}, "eval_output must differ from output"),
            ({"eval_fraction": 0.1, "eval_output": "held.csv"}, "output must have the name of a JSON Lines file"),
            ({"eval_fraction": 0.001}, "eval_fraction must hold out a conversation, got 0.001 of 60"),
        ],
    )
    def test_arguments(self, source, tmp_path, monkeypatch, options, text):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=text):
            prepare.prepare([source], "out.jsonl", **options)

    @pytest.mark.parametrize("ending", [".jsonl.gz", ".zst", ".csv", ".parquet"])
    def test_an_output_is_named_as_it_is_read(self, prepared, tmp_path, ending):
        done = prepared(RECORDS, "-o", tmp_path / f"out{ending}")
        assert done.status == 1 and "--output must have the name of a JSON Lines file (.jsonl), got" in done.error
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]

    def test_a_pipe_is_no_output(self, prepared, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        done = prepared(RECORDS, "-o", tmp_path / "pipe", "--overwrite")
        assert done.status == 1 and "--output must be a file, got" in done.error and (tmp_path / "pipe").is_fifo()

    def test_missing_source_nothing_kept_and_no_folder(self, prepared, tmp_path):
        assert "no such file" in prepared(None).error
        done = prepared([{"a": 1}])
        assert done.status == 1 and "no interaction was kept" in done.error
        (tmp_path / "file").write_text("not a folder")
        done = prepared(RECORDS, "-o", tmp_path / "file" / "out.jsonl")
        assert done.status == 1 and "file" in done.error

    def test_second_run_on_the_same_output(self, prepared, tmp_path):
        pytest.importorskip("fcntl")
        with Spool(tmp_path / "out.jsonl.partial", {}):
            assert "another run is writing to" in prepared(RECORDS).error
        assert prepared(RECORDS).status == 0

    def test_full_disk_and_ctrl_c_leave_what_was_there(self, prepared, tmp_path, monkeypatch):
        (tmp_path / "out.jsonl").write_text("old")
        faults = (OSError(28, "No space left"), 1, "--output: no space left"), (KeyboardInterrupt(), 130, "again")
        for error, status, said in faults:

            def fails(*arguments, error=error):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr("fastsdpo.data.output.os.fsync", fails)
                done = prepared(RECORDS, "--overwrite")
            assert done.status == status and said in done.error
            assert sorted(files(tmp_path)) == ["in.jsonl", "out.jsonl"]
            assert (tmp_path / "out.jsonl").read_text() == "old"


def test_shows_rows_as_tokens(prepared, byte_tokenizer, tmp_path):
    chat = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    tokens = ["<user>", "<assistant>", "<end>"]
    chat += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = byte_tokenizer(chat, tokens, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    record = {"id": "c", "messages": [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 2, "abcd")]}
    record["messages"].pop()
    done = prepared([record], "--show", 3, "--tokenizer", tmp_path / "tokenizer", "--template", " note {o}")
    assert "<user>a{+ note c+}<end><assistant>[b|<end>]" in done.table
    done = prepared([record], "--overwrite", "--show", 3, "--tokenizer", tmp_path / "tokenizer")
    assert done.table.endswith(
        "\n\ntemplate: online-v1. Models below a billion weights are trained with --template note.\n"
    )
    done = prepared([record], "--overwrite", "--show", 3)
    assert done.status == 1 and "--show needs --tokenizer" in done.error
    done.output.unlink()
    done = prepared([record], "--show", 3, "--tokenizer", tmp_path / "nowhere")
    assert done.status == 1 and "--tokenizer" in done.error and "nowhere" in done.error and not done.output.exists()
