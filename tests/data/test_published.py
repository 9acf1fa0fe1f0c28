"""`prepare --preset paper-wildchat / paper-wildfeedback` against the published rules, written down here once more."""

import json
import random

import pytest

from fastsdpo.commands.prepare import main

from .test_fuzz import mutate, retype, write

numpy = pytest.importorskip("numpy")


def spoken(turns, speaker, text):
    """("u", "Hi"), ("a", None), ("tool", "x") -> messages with these two keys."""
    names = {"u": "user", "a": "assistant"} if speaker == "role" else {"u": "human", "a": "gpt"}
    return [{speaker: names.get(role, role), text: content} for role, content in turns]


def wildchat(*turns, **more):
    return {"conversation": spoken(turns, "role", "content"), "language": "English", **more}


def wildfeedback(*turns):
    return {"conversations": spoken(turns, "from", "value")}


def texts(rows):
    return [
        ([m["content"] for m in r["prompt"]], r["completion"]["content"], r["user_response"]["content"]) for r in rows
    ]


Q, A, O = ("u", "q"), ("a", "y"), ("u", "o")
LONG = "x" * 4096
FIRST = (["q"], "y", "o")
NONE = "to an answer without a question"
CHAT = [  # turns; what WildChat gives; what WildFeedback gives: interactions, or why there are none
    ("plain", [Q, A, O], [FIRST], [FIRST]),
    ("two questions in a row", [("u", "q0"), Q, A, O], [(["q0"], "y", "o")], [(["q0"], "y", "o")]),
    ("two answers in a row", [Q, ("a", "y0"), A, O], NONE, "with a history that ends with an answer"),
    ("an empty answer", [Q, ("a", ""), ("u", "q2"), A, O], [(["q"], "y", "o")], [(["q"], "y", "o")]),
    ("no answer at all", [Q, ("a", None), O], "fewer than 3 messages", "to an answer without text"),
    ("a blank answer", [Q, ("a", " "), O], "fewer than 3 messages", [(["q"], " ", "o")]),
    ("a blank question first", [("u", " "), ("a", "y0"), Q, A, O], [(["q"], "y", "o")], [(["q"], "y", "o")]),
    ("a blank follow-up", [Q, A, ("u", " "), ("a", "z"), O], NONE, [(["q"], "y", " ")]),
    ("a system message", [("system", "s"), Q, A, O], [FIRST], [FIRST]),
    ("a later one, and a tool", [Q, ("system", "s"), A, ("tool", "t"), O], [FIRST], []),
    ("other speakers between", [Q, ("critic", "c"), A, O, (None, "?")], [FIRST], [FIRST]),
    ("an answer first", [A, O, ("a", "y2"), ("u", "o2")], [(["o"], "y2", "o2")], [(["o"], "y2", "o2")]),
    ("white space", [("u", " q "), ("a", "\n\ny"), ("u", "o\n")], [FIRST], [([" q "], "\n\ny", "o\n")]),
    ("the limit", [Q, ("a", LONG), O], [(["q"], LONG, "o")], [(["q"], LONG, "o")]),
    ("space over it", [Q, ("a", LONG + " "), O], [(["q"], LONG, "o")], "assistant message over 4,096 characters"),
    ("over it", [Q, A, ("u", LONG + "x")], "user message over 4,096 characters", [(["q"], "y", LONG + "x")]),
    (
        "a long history",
        [(("u", "a")[n % 2], str(n)) for n in range(9)],
        [(list("0"), "1", "2"), (list("012"), "3", "4"), (list("01234"), "5", "6"), (list("23456"), "7", "8")],
        [(list("0"), "1", "2"), (list("012"), "3", "4"), (list("01234"), "5", "6"), (list("23456"), "7", "8")],
    ),
]


@pytest.mark.parametrize(("turns", "chat", "feedback"), [case[1:] for case in CHAT], ids=[case[0] for case in CHAT])
@pytest.mark.parametrize("make", [wildchat, wildfeedback])
def test_kinds_of_conversations(prepared, make, turns, chat, feedback):
    wanted = chat if make is wildchat else feedback
    done = prepared([make(*turns), make(("u", "-"), ("a", "-"), ("u", "-"))], preset=f"paper-{make.__name__}")
    found = [item for item in texts(done.rows) if item[1] != "-"]
    assert found == ([] if isinstance(wanted, str) else wanted)
    if isinstance(wanted, str):
        assert wanted in {**done.report["left_out"], **done.report["dropped"]}


def transcribed(records, seed, most, enough):
    """WildChat's rules once more: (id, texts) of the rows, from records with an id each."""
    rows, kept = [], 0
    for number in numpy.random.default_rng(seed).permutation(len(records)):
        record = records[number]
        if (record["language"] or "").strip().lower() not in ("english", "en"):
            continue
        turns = [((m["role"] or "").strip().lower(), (m["content"] or "").strip()) for m in record["conversation"]]
        turns = [turn for turn in turns if turn[0] in ("user", "assistant") and turn[1]]
        if len(turns) < 3 or any(len(text) > 4096 for _, text in turns) or sum(len(t) for _, t in turns) > 100_000:
            continue
        kept += 1
        for i in range(1, len(turns) - 1):
            history = turns[max(0, i - 5) : i]
            while history and history[0][0] == "assistant":
                del history[0]
            history = [turn for n, turn in enumerate(history) if not n or turn[0] != history[n - 1][0]]
            if history and [history[-1][0], turns[i][0], turns[i + 1][0]] == ["user", "assistant", "user"]:
                prompt = [text for _, text in history]
                rows.append((f"{record['conversation_id']}_{i}", (prompt, turns[i][1], turns[i + 1][1])))
        if kept >= most or (kept >= enough[0] and len(rows) >= enough[1]):
            return rows
    return rows


@pytest.mark.parametrize(
    ("seed", "most", "enough"), [(42, 15_000, (14_000, 50_000)), (42, 60, (50, 10)), (7, 50, (9, 9))]
)
def test_order_and_end(prepared, seed, most, enough):
    """Conversations without an interaction count among the wanted number; nothing is merged."""
    draw = random.Random(1)
    records = []
    for number in range(300):
        turns = [
            (draw.choice(("ua"[n % 2], "uaaau"[n % 5])), draw.choice(["x", " y ", "", f"{number}.{n}"]))
            for n in range(9)
        ]
        language = draw.choice(["English", " EN ", "French", None])
        records.append(wildchat(*turns[: draw.randrange(10)], language=language, conversation_id=f"c{number}"))
    records[5]["conversation"] = records[6]["conversation"] = wildchat(Q, A, O)["conversation"]
    stop = ("--max-conversations", most, "--enough-conversations", enough[0], "--enough-interactions", enough[1])
    options = () if most == 15_000 else stop
    done = prepared(records, "--seed", seed, *options, preset="paper-wildchat")
    wanted = transcribed(records, seed, most, enough)
    assert [(row["id"], text) for row, text in zip(done.rows, texts(done.rows))] == wanted
    assert len(done.rows) == len(wanted) > 5
    split = prepared(records, "--eval-fraction", 0.3, "--overwrite", preset="paper-wildchat")
    sides = [{row["prompt"][0]["content"] for row in side} for side in (split.rows, split.held_out)]
    assert sides[1] and not sides[0] & sides[1]


def test_what_is_no_such_record_is_damaged(prepared):
    good = wildchat(Q, A, O, conversation_id="c")
    parts = wildchat(Q, ("a", [{"type": "text", "text": "y"}]), O)
    records = [good, wildfeedback(Q, A, O), {"conversation": wildfeedback(Q, A, O)["conversations"]}, parts, [1], good]
    done = prepared(records, preset="paper-wildchat")
    assert {row["id"].split("~")[0] for row in done.rows} == {"c_1"} and len({row["id"] for row in done.rows}) == 2
    said = "\n".join(done.report["problems"]["wrong layout"])
    of_two, of_three = "a record must have conversation", "conversation must have messages with 'role'"
    for text in (f":2: {of_two}", f":3: {of_three}", ":5: a record"):
        assert text in said
    assert ":4: message 1: content must be text, got list" in said and "the preset wildchat does" in said


def test_mutated_records(tmp_path, capsys):
    """Values of any type in any place, and damaged text: counted, whatever is asked of the records."""
    good = wildchat(
        Q, A, O, ("a", "z"), ("u", "Bye"), conversation_id="c", timestamp="2023-04-09", model="m", toxic=False
    )
    good["conversation"][1]["toxic"] = False
    cases = [
        (good, "--preset paper-wildchat --keep model,timestamp --eval-after 2023-01-01"),
        (wildfeedback(Q, A, O), "--preset paper-wildfeedback --eval-fraction 0.3"),
        (good, "--preset wildchat --keep model,timestamp,toxic --after 2000-01-01 --drop-toxic --models m"),
        ({"info": {"post": "p", "article": None}}, "--prompts tldr"),
        ({"prompt": "p", "response": "r"}, "--prompts helpsteer2"),
    ]
    for seed in range(60):
        draw = random.Random(seed)
        record, options = cases[seed % len(cases)]
        records = [retype(draw, record) for _ in range(6)]
        data = mutate(draw, write(records, "lines")[0])[0] if seed % 2 else write(records, "lines")[0]
        (tmp_path / "in.jsonl").write_bytes(data + json.dumps({**record, "timestamp": 10**4000 // 7}).encode() + b"\n")
        argv = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--overwrite", *options.split()]
        assert main(argv) in (0, 1), seed
        said = capsys.readouterr()
        assert said.out or said.err.startswith("fastsdpo prepare: "), seed
