"""`fastsdpo prepare`: what it writes, that it is atomic, resumable and repeatable, what it refuses."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fastsdpo
from fastsdpo.commands import prepare as command
from fastsdpo.commands.prepare import main
from fastsdpo.data import ConversationFilter, load_interactions, prepare
from fastsdpo.data.loading import DamagedRecord
from fastsdpo.data.spool import Spool

PACKAGE = Path(fastsdpo.__file__).parent


def conversation(number, turns=3, language="English"):
    messages = [
        {"role": "assistant" if turn % 2 else "user", "content": f"{number}.{turn} é日 " * 4}
        for turn in range(2 * turns + 1)
    ]
    return {"conversation_hash": f"c{number}", "conversation": messages, "language": language}


def write_source(path, count=60, records=None):
    records = [conversation(n, 1 + n % 4) for n in range(count)] if records is None else records
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source.jsonl")


def rows(path):
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestOutput:
    def test_a_followup_that_nobody_sees_is_none(self, tmp_path, capsys):
        said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        records = [{"messages": [*said, {"role": "user", "content": text}]} for text in ("\u200b", "Thanks")]
        source = write_source(tmp_path / "s.jsonl", records=records)
        assert main([str(source), "-o", str(tmp_path / "out.jsonl"), "--preset", "none"]) == 0
        assert [r["user_response"]["content"] for r in rows(tmp_path / "out.jsonl")] == ["Thanks"]

    def test_rows_load_back(self, source, tmp_path):
        report = prepare.prepare([source], tmp_path / "out.jsonl")
        written = rows(tmp_path / "out.jsonl")
        assert len(written) == report.interactions == sum(1 + n % 4 for n in range(60))
        assert (report.conversations, report.records, report.damaged) == (60, 60, {})
        for row, interaction in zip(written, load_interactions(tmp_path / "out.jsonl")):
            number, turn = row["conversation_id"][1:], row["turn_id"]
            assert row["id"] == interaction.id == f"c{number}:{turn}"
            assert interaction.conversation_id == f"c{number}"
            assert row["completion"] == {
                "role": "assistant",
                "content": f"{number}.{2 * turn + 1} é日 " * 4,
            }
            assert row["user_response"]["content"] == f"{number}.{2 * turn + 2} é日 " * 4
            assert len(interaction.prompt) == 2 * turn + 1
        saved = json.loads((tmp_path / "out.report.json").read_text("utf-8"))
        assert saved["interactions"] == report.interactions
        assert not (tmp_path / "out.jsonl.partial").exists()

    def test_preparing_the_output_again_changes_nothing(self, source, tmp_path):
        prepare.prepare([source], tmp_path / "a.jsonl")
        prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "b.jsonl", rules="none")
        first, second = rows(tmp_path / "a.jsonl"), rows(tmp_path / "b.jsonl")
        keys = ("id", "conversation_id", "prompt", "completion", "user_response")
        assert [[row[key] for key in keys] for row in first] == [[row[key] for key in keys] for row in second]

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

    def test_held_out_conversations(self, source, tmp_path):
        report = prepare.prepare([source], tmp_path / "out.jsonl", eval_fraction=0.1)
        assert (report.conversations, report.eval_conversations) == (54, 6)
        train, held = rows(tmp_path / "out.jsonl"), rows(tmp_path / "out.eval.jsonl")
        assert report.eval_interactions == len(held)
        ids = [{row["conversation_id"] for row in part} for part in (train, held)]
        assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 60

    @pytest.mark.parametrize("shuffle", [False, True])
    def test_limits(self, source, tmp_path, shuffle):
        for name, rules, expected in (
            ("a", ConversationFilter(max_conversations=10, shuffle=shuffle), 10),
            ("b", ConversationFilter(max_interactions=10, shuffle=shuffle), None),
        ):
            report = prepare.prepare([source], tmp_path / f"{name}.jsonl", rules=rules)
            if expected:
                assert report.conversations == expected
            else:
                assert 6 < report.interactions <= 10
        report = prepare.prepare([source], tmp_path / "c.jsonl", limit=7)
        assert (report.records, report.conversations) == (7, 7)

    def test_dropped_and_damaged_are_counted(self, tmp_path, capsys):
        records = [conversation(n, 2) for n in range(5)]
        records[1]["language"] = "German"
        records[2]["conversation"][1]["content"] = "x" * 5000
        records[3]["conversation"] = records[3]["conversation"][:2]
        records[4]["conversation"] = [*records[4]["conversation"][:2]] * 2  # ends with an answer
        records[4]["conversation"][2] = {"role": "user", "content": ""}
        source = write_source(tmp_path / "source.jsonl", records=records)
        with open(source, "ab") as file:
            file.write(b'{"conversation": \n')
        output = tmp_path / "out.jsonl"
        assert main([str(source), "-o", str(output), "--preset", "wildchat", "--quiet"]) == 0
        assert main([str(source), "-o", str(output), "--preset", "wildchat", "--overwrite"]) == 0
        table = capsys.readouterr().out
        for text in (
            "read              6 records",
            "kept              1 conversations, 2 interactions",
            "dropped           1 other language",
            "dropped           1 assistant message over 4,096 characters",
            "dropped           1 fewer than 3 messages",
            "damaged           1 no follow-up",
            f"{source}:5: no answer is followed by a user's message",
            "damaged           1 not JSON",
            f"{source}:6: not JSON: Expecting value",
        ):
            assert text in table
        saved = json.loads((tmp_path / "out.report.json").read_text("utf-8"))
        assert saved["dropped"]["other language"] == 1 and saved["damaged"]["not JSON"] == 1

    def test_options_reach_the_rules(self, tmp_path):
        parse = command._parser().parse_args
        rules = command._rules(
            parse(
                ["s", "-o", "o", "--preset", "wildchat", "--max-history-messages", "3"]
                + [
                    "--max-user-chars",
                    "none",
                    "--no-shuffle",
                    "--languages",
                    "fr",
                    "--min-messages",
                ]
                + ["5", "--max-conversations", "14000", "--max-interactions", "50000"]
            )
        )
        assert rules == ConversationFilter(
            languages=("fr",),
            min_messages=5,
            max_conversation_chars=100_000,
            max_assistant_chars=4096,
            max_history_messages=3,
            max_conversations=14_000,
            max_interactions=50_000,
        )
        assert command._rules(parse(["s", "-o", "o", "--languages"])).languages is None

    def test_conversations_without_ids_are_named_by_place(self, tmp_path):
        for number, name in enumerate(("a", "b")):
            records = [{"messages": conversation(number)["conversation"]}]
            (tmp_path / name).mkdir()
            write_source(tmp_path / name / "source.jsonl", records=records)
        sources = [tmp_path / name / "source.jsonl" for name in ("a", "b")]
        prepare.prepare(sources, tmp_path / "out.jsonl", rules="none")
        names = {row["conversation_id"] for row in rows(tmp_path / "out.jsonl")}
        assert names == {"source.jsonl:1", "1/source.jsonl:1"}


HI = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "y"), ("user", "o"))]


@pytest.mark.parametrize(
    "record",
    [
        {
            "messages": [],
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "y"},
                {"from": "human", "value": "o"},
            ],
        },
        {"messages": None, "conversation": HI},
        {"prompt": None, "completion": None, "user_response": None, "messages": HI},
        {"prompt": [], "completion": "", "user_response": "", "items": HI},
        {"messages": [], "prompt": HI[:1], "completion": "y", "user_response": "o"},
        {
            "messages": [
                {"from": ("user", "assistant")[n % 2], "value": text, "role": None, "content": None}
                for n, text in enumerate(("Hi", "y", "o"))
            ]
        },
    ],
)
def test_the_filled_column_is_read(tmp_path, record):
    """A table of several layouts has all columns in every row."""
    source = write_source(tmp_path / "in.jsonl", records=[record])
    assert main([str(source), "-o", str(tmp_path / "out.jsonl"), "--preset", "none"]) == 0
    (row,) = rows(tmp_path / "out.jsonl")
    assert [*row["prompt"], row["completion"], row["user_response"]] == HI


SYSTEM = {"role": "system", "content": "Answer in French."}


@pytest.mark.parametrize(
    "record",
    [
        {
            "system": "Answer in French.",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "y"},
                {"from": "human", "value": "o"},
            ],
        },
        {"system_prompt": "Answer in French.", "messages": HI},
        {"system": [{"type": "text", "text": "Answer in French."}], "messages": HI},
        {"systemInstruction": "Answer in French.", "conversation": HI},
        {"system": "Answer in French.", "prompt": HI[:1], "completion": "y", "user_response": "o"},
        {"system": " Answer in French.\n", "system_prompt": "", "messages": [SYSTEM, *HI]},
        {"system": "Answer in French.", "messages": [{"role": "system", "content": " "}, *HI]},
        {"system": None, "system_prompt": " ", "messages": [SYSTEM, *HI]},
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_system_prompt_beside_the_messages_is_the_first_message(tmp_path, record, suffix):
    source = write_source(tmp_path / "in.jsonl", records=[record])
    if suffix == "parquet":
        pa = pytest.importorskip("pyarrow")
        source = tmp_path / "in.parquet"
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist([record]), source)
    assert main([str(source), "-o", str(tmp_path / "out.jsonl"), "--preset", "none"]) == 0
    (row,) = rows(tmp_path / "out.jsonl")
    assert [*row["prompt"], row["completion"], row["user_response"]] == [SYSTEM, *HI]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"system": "Be brief.", "messages": [SYSTEM, *HI]}, "in the messages and system; keep"),
        (
            {"system": "A", "system_prompt": "B", "messages": HI},
            "in system and system_prompt; keep",
        ),
        ({"system": {"os": "linux"}, "messages": HI}, "system[0]: content must be text, got dict"),
    ],
)
def test_two_system_prompts_are_not_guessed_between(tmp_path, capsys, record, said):
    source = write_source(tmp_path / "in.jsonl", records=[record, {"messages": HI}])
    assert main([str(source), "-o", str(tmp_path / "out.jsonl"), "--preset", "none"]) == 0
    assert [row["prompt"] for row in rows(tmp_path / "out.jsonl")] == [HI[:1]]
    table = capsys.readouterr().out
    assert "damaged           1 wrong layout" in table and f"{source}:1: " in table and said in table


def chat(*turns):
    """("user", "Hi"), ("assistant", None, {"tool_calls": ...}), ... -> messages."""
    return [{"role": role, "content": text, **dict(*more)} for role, text, *more in turns]


FUNCTION = {"name": "weather", "arguments": "{}"}
CALLS = [
    {"tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]},
    {"function_call": FUNCTION, "tool_calls": None},
]
AFTER_TOOL = "follow-ups after a tool call or tool message"


class TestToolCalls:
    @pytest.mark.parametrize("text", [None, "", "Let me look."])
    @pytest.mark.parametrize("call", CALLS)
    def test_nothing_from_the_call_on(self, tmp_path, capsys, call, text):
        turns = chat(
            ("user", "Hi"),
            ("assistant", "Hello", {"tool_calls": [], "function_call": None}),
            ("user", "Weather?"),
            ("assistant", text, call),
            ("user", "It said: sunny"),
            ("assistant", "It is sunny."),
            ("user", "Thanks, shorter"),
        )
        shares = [{"from": m["role"], "value": m["content"], **call} for m in turns[3:4]]
        records = [{"messages": turns}, {"conversations": [*turns[:3], *shares, *turns[4:]]}, {"messages": turns[2:]}]
        source = write_source(tmp_path / "in.jsonl", records=records)
        output = tmp_path / "out.jsonl"
        assert main([str(source), "-o", str(output), "--preset", "none"]) == 0
        assert [row["completion"]["content"] for row in rows(output)] == ["Hello"]
        table = capsys.readouterr().out
        assert f"left out          6 {AFTER_TOOL}" in table
        assert f"damaged           1 nothing but {AFTER_TOOL}" in table
        assert f"{source}:3: nothing but {AFTER_TOOL}" in table
        assert "no answer is followed" not in table

    @pytest.mark.parametrize("role", ["tool", "system"])
    def test_the_reason_is_the_message_that_cuts_off(self, tmp_path, role):
        turns = chat(("user", "q"), ("assistant", "y"), (role, "x"), ("user", "o"))
        source = write_source(tmp_path / "in.jsonl", records=[{"messages": turns}])
        report = prepare.prepare([source], tmp_path / "out.jsonl", rules="none")
        reason = AFTER_TOOL if role == "tool" else "follow-ups after a later system message"
        assert report.left_out == {reason.removeprefix("follow-ups "): 1}
        assert report.problems == {f"nothing but {reason}": [f"{source}:1: nothing but {reason}"]}

    def test_a_row_that_lacks_its_call_is_refused(self, tmp_path):
        call = chat(("user", "q"), ("assistant", "", CALLS[0]), ("user", "It said: sunny"))
        whole = {"prompt": HI, "completion": "y", "user_response": "o"}
        for row, place in (
            ({**whole, "prompt": call}, r"prompt\[1\]"),
            ({**whole, "completion": call[1]}, "completion"),
        ):
            source = write_source(tmp_path / "in.jsonl", records=[row])
            with pytest.raises(DamagedRecord, match=f"{place}: must be text alone, got 'tool_calls'"):
                list(load_interactions(source))


@pytest.mark.parametrize("preset", ["none", "default", "wildchat", "wildfeedback"])
def test_regenerated_answers_are_counted_and_not_joined(tmp_path, capsys, preset):
    turns = chat(
        ("user", "A joke"),
        ("assistant", "First joke."),
        ("assistant", "Second joke."),
        ("user", "This one is better"),
        ("assistant", "Glad."),
        ("user", "Bye"),
    )
    records = [{"conversation": part, "language": "English"} for part in (turns, turns[:4])]
    source = write_source(tmp_path / "in.jsonl", records=records)
    assert main([str(source), "-o", str(tmp_path / "out.jsonl"), "--preset", preset]) == 0
    (row,) = rows(tmp_path / "out.jsonl")
    assert [m["content"] for m in row["prompt"]] == ["A joke", "Second joke.", "This one is better"]
    assert row["completion"]["content"] == "Glad."
    table = capsys.readouterr().out
    assert "left out          2 follow-ups to several answers in a row" in table
    assert f"{source}:2: nothing but follow-ups to several answers in a row" in table


class TestRefusals:
    def test_existing_output(self, source, tmp_path, capsys):
        output = tmp_path / "out.jsonl"
        output.write_text("precious")
        assert main([str(source), "-o", str(output)]) == 1
        assert f"{output} exists; pass --overwrite" in capsys.readouterr().err
        assert output.read_text() == "precious"
        assert main([str(source), "-o", str(output), "--overwrite"]) == 0
        assert output.read_text() != "precious"
        # The same command again finds its work done; another one does not touch it.
        before = files(tmp_path)
        assert main([str(source), "-o", str(output)]) == 0
        assert main([str(source), "-o", str(output), "--seed", "1"]) == 1
        assert main([str(source), "-o", str(output), "--no-resume"]) == 1
        assert files(tmp_path) == before
        output.write_bytes(before["out.jsonl"][:-100])
        assert main([str(source), "-o", str(output)]) == 1

    def test_strict_stops_at_the_first(self, tmp_path, capsys):
        source = write_source(tmp_path / "s.jsonl", records=[conversation(0), {"a": 1}, 3])
        output = tmp_path / "out.jsonl"
        assert main([str(source), "-o", str(output), "--strict"]) == 1
        assert f"{source}:2: a record must have one of messages" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["s.jsonl"]

    def test_strict_wants_a_followup(self, tmp_path):
        records = [{"messages": [{"role": "user", "content": "q"}]}]
        source = write_source(tmp_path / "s.jsonl", records=records)
        with pytest.raises(DamagedRecord, match=r"s\.jsonl:1: no answer is followed by a user's"):
            prepare.prepare([source], tmp_path / "out.jsonl", rules="none", strict=True)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"eval_fraction": 1.0}, r"eval_fraction must be in \[0, 1\), got 1.0"),
            ({"limit": 0}, "limit must be at least 1, got 0"),
            ({"eval_output": "x"}, "eval_output needs an eval_fraction above 0"),
            ({"rules": "wild"}, "name must be one of wildchat"),
        ],
    )
    def test_arguments(self, source, tmp_path, options, text):
        with pytest.raises(ValueError, match=text):
            prepare.prepare([source], tmp_path / "out.jsonl", **options)
        output = tmp_path / "out.jsonl"
        with pytest.raises(ValueError, match="eval_output must differ from output"):
            prepare.prepare([source], output, eval_fraction=0.1, eval_output=output)

    def test_missing_source_and_nothing_kept(self, tmp_path, capsys):
        output = tmp_path / "out.jsonl"
        assert main([str(tmp_path / "no.jsonl"), "-o", str(output)]) == 1
        assert "no such file" in capsys.readouterr().err
        source = write_source(tmp_path / "s.jsonl", records=[{"a": 1}])
        assert main([str(source), "-o", str(output)]) == 1
        assert "no interaction was kept" in capsys.readouterr().err

    def test_unwritable_folder_is_found_before_reading(self, source, tmp_path, capsys):
        blocked = tmp_path / "file"
        blocked.write_text("not a folder")
        assert main([str(source), "-o", str(blocked / "out.jsonl")]) == 1
        assert "file" in capsys.readouterr().err

    def test_second_run_on_the_same_output(self, source, tmp_path):
        pytest.importorskip("fcntl")
        with (
            Spool(tmp_path / "out.jsonl.partial", None),
            pytest.raises(FileExistsError, match="another run is writing to"),
        ):
            prepare.prepare([source], tmp_path / "out.jsonl")

    def test_full_disk(self, source, tmp_path):
        """A file size limit stands in for a full disk; afterwards the command goes on."""
        code = "from fastsdpo.commands.prepare import main; sys.exit(main(sys.argv[1:]))"
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        arguments = [str(source), "-o", str(tmp_path / "out.jsonl"), "--quiet"]
        result = run(limit + code, arguments)
        assert result.returncode == 1 and "File too large" in result.stderr
        assert not (tmp_path / "out.jsonl").exists()
        assert run(code, arguments).returncode == 0
        prepare.prepare([source], tmp_path / "fresh.jsonl")
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "fresh.jsonl").read_bytes()

    def test_interrupted_by_the_user(self, source, tmp_path, monkeypatch, capsys):
        def interrupt(*arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(prepare, "write_outputs", interrupt)
        assert main([str(source), "-o", str(tmp_path / "out.jsonl")]) == 130
        assert "the same command goes on from here" in capsys.readouterr().err


def run(code, arguments=(), **options):
    """Python with `fastsdpo.data` but without the time that importing torch takes."""
    start = f"""
        import sys, types
        package = types.ModuleType("fastsdpo")
        package.__path__ = [{str(PACKAGE)!r}]
        sys.modules["fastsdpo"] = package
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


# Runs the command and kills itself, as SIGKILL does, at the n-th step that touches the disk.
KILLED = """
    import os, shutil, signal
    from fastsdpo.commands.prepare import main
    from fastsdpo.data import prepare
    from fastsdpo.data.spool import Spool
    prepare.CHECKPOINT_RECORDS = 7
    steps = 0

    def killing(function):
        def step(*arguments, **options):
            global steps
            for after in (False, True):
                steps += 1
                if steps == int(sys.argv[1]):
                    os.kill(os.getpid(), signal.SIGKILL)
                if not after:
                    result = function(*arguments, **options)
            return result
        return step

    os.fsync, os.replace, os.unlink = killing(os.fsync), killing(os.replace), killing(os.unlink)
    shutil.rmtree = killing(shutil.rmtree)
    Spool.add = killing(Spool.add)
    Spool.read = killing(Spool.read)
    status = main(sys.argv[2:])
    print(steps)
    sys.exit(status)
"""


class TestKilled:
    def arguments(self, folder, sources):
        return [
            *map(str, sources),
            *("-o", str(folder / "out.jsonl"), "--quiet", "--eval-fraction", "0.2"),
        ]

    def sources(self, tmp_path):
        """A file of each kind of position: lines, compressed lines, an array."""
        pretty = json.dumps([conversation(n) for n in range(30, 40)], indent=1)
        (tmp_path / "b.json").write_text(pretty[:-40], "utf-8")
        lines = write_source(tmp_path / "a.jsonl", 15).read_bytes() + b"damaged\n"
        (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines))
        return [tmp_path / name for name in ("a.jsonl", "b.json", "c.jsonl.gz")]

    def check(self, tmp_path, points, old):
        sources = self.sources(tmp_path)
        (tmp_path / "whole").mkdir()
        arguments = self.arguments(tmp_path / "whole", sources)
        whole = run(KILLED, ["0", *arguments])
        assert whole.returncode == 0, whole.stderr
        steps = int(whole.stdout)
        expected = files(tmp_path / "whole")
        assert sorted(expected) == ["out.eval.jsonl", "out.jsonl", "out.report.json"]
        for point in points(steps):
            folder = tmp_path / f"killed{point}"
            folder.mkdir()
            arguments = self.arguments(folder, sources)
            if old:
                (folder / "out.jsonl").write_text("old\n")
                arguments.append("--overwrite")
            killed = run(KILLED, [str(point), *arguments])
            assert killed.returncode == -signal.SIGKILL
            left = files(folder)
            if "out.jsonl" in left:
                assert left["out.jsonl"] in (b"old\n" * old, expected["out.jsonl"])
            if "out.eval.jsonl" in left:
                assert left["out.eval.jsonl"] == expected["out.eval.jsonl"]
            # Killed again on the way, then left to end: the same files as without any of it.
            again = run(KILLED, [str(max(1, point // 2)), *arguments])
            assert again.returncode in (-signal.SIGKILL, 0), again.stderr
            if again.returncode != 0:
                finished = run(KILLED, ["0", *arguments])
                assert finished.returncode == 0, finished.stderr
            result = files(folder)
            report = result.pop("out.report.json").replace(folder.name.encode(), b"whole")
            assert json.loads(report) == json.loads(expected["out.report.json"])
            assert result == {k: v for k, v in expected.items() if k != "out.report.json"}

    @pytest.mark.parametrize("old", [False, True])
    def test_at_some_points(self, tmp_path, old):
        self.check(tmp_path, lambda steps: [*range(3, steps, steps // 4), steps], old)

    @pytest.mark.slow
    def test_at_every_point(self, tmp_path):
        self.check(tmp_path, lambda steps: range(1, steps + 1), True)

    @pytest.mark.slow
    def test_at_random_times(self, tmp_path):
        source = write_source(tmp_path / "a.jsonl", 20_000)
        prepare.prepare([source], tmp_path / "whole.jsonl")
        expected = (tmp_path / "whole.jsonl").read_bytes()
        code = "from fastsdpo.commands.prepare import main; sys.exit(main(sys.argv[1:]))"
        draw = random.Random(0)
        output, kills, finished = tmp_path / "out.jsonl", 0, 0
        while kills < 50:
            try:
                run(code, [str(source), "-o", str(output), "--quiet"], timeout=draw.uniform(0.1, 4))
            except subprocess.TimeoutExpired:  # subprocess.run has killed it
                kills += 1
            if output.exists():
                assert output.read_bytes() == expected
                if not (tmp_path / "out.jsonl.partial").exists():
                    finished += 1
                    output.unlink()
        assert finished > 0

    def test_resumes_instead_of_reading_again(self, tmp_path):
        source = write_source(tmp_path / "a.jsonl", 100)
        folder = tmp_path / "out"
        folder.mkdir()
        killed = run(KILLED, ["150", str(source), "-o", str(folder / "out.jsonl"), "--quiet"])
        assert killed.returncode == -signal.SIGKILL
        state = json.loads((folder / "out.jsonl.partial" / "state.json").read_text())
        offset = state["report"]["position"]["inside"]["offset"]
        assert state["report"]["records"] >= 28 and offset > 1000
        # What is before the saved position is not looked at again.
        size, stamp = source.stat().st_size, source.stat().st_mtime_ns
        with open(source, "r+b") as file:
            file.write(b"x" * 1000)
        os.utime(source, ns=(stamp, stamp))
        assert source.stat().st_size == size
        report = prepare.prepare([source], folder / "out.jsonl")
        assert (report.records, report.damaged) == (100, {})

    def test_other_settings_or_sources_start_anew(self, tmp_path):
        source = write_source(tmp_path / "a.jsonl", 100)
        output = tmp_path / "out.jsonl"
        killed = run(KILLED, ["150", str(source), "-o", str(output), "--quiet"])
        assert killed.returncode == -signal.SIGKILL
        write_source(source, 50)
        assert prepare.prepare([source], output).records == 50


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    """125,000 interactions take no more memory than 31,250, but for some 40 bytes a record."""
    code = """
        from fastsdpo.commands.prepare import main
        status = main(sys.argv[1:])
        # ru_maxrss would be that of the process which started this one, if larger.
        print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        sys.exit(status)
    """
    peaks = []
    for count in (12_500, 50_000):
        source = write_source(tmp_path / "a.jsonl", count)
        result = run(code, [str(source), "-o", str(tmp_path / f"{count}.jsonl"), "--quiet"])
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout) / 1024)
    lines = (tmp_path / "50000.jsonl").read_bytes().count(b"\n")
    assert lines == 125_000
    assert peaks[1] - peaks[0] < 5, peaks  # MiB; the outputs differ by about 80
