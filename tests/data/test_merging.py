"""`fastsdpo prepare` on logs that repeat themselves: each interaction once, each conversation on one side."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsdpo.commands.prepare import main
from fastsdpo.data import ConversationFilter, extract_interactions, merging, prepare, spool

ROLES = ("user", "assistant")


def chat(*texts):
    return [{"role": ROLES[n % 2], "content": text} for n, text in enumerate(texts)]


def conversation(number, turns=3):
    return chat(*(f"{number}.{n}" for n in range(2 * turns + 1)))


def call_log(messages):
    """A record per call, each with the history so far."""
    return [messages[: end + 1] for end in range(0, len(messages), 2)]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return path


def rows(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def prepared(source, output, *options):
    """The command's (training rows, held-out rows, report)."""
    assert main([str(source), "-o", str(output), *options]) == 0
    held_out = output.with_name(f"{output.stem}.eval.jsonl")
    report = json.loads(output.with_name(f"{output.stem}.report.json").read_text("utf-8"))
    return rows(output), rows(held_out) if held_out.exists() else [], report


def key(row):
    return json.dumps([row["prompt"], row["completion"]["content"], row["user_response"]["content"]])


def wanted(conversations, **options):
    return {
        json.dumps([i.prompt, i.completion, i.followup])
        for messages in conversations
        for i in extract_interactions(messages, **options)
    }


def check_sides(train, held_out):
    """No prompt begins one of the other side, no conversation or id is on both."""
    for name in ("conversation_id", "id"):
        assert not {row[name] for row in train} & {row[name] for row in held_out}
    ids = [row["id"] for row in train + held_out]
    assert len(set(ids)) == len(ids)
    for row in train:
        for other in held_out:
            shorter = min(len(row["prompt"]), len(other["prompt"]))
            assert row["prompt"][:shorter] != other["prompt"][:shorter]


@pytest.mark.parametrize("id_key", [None, "conversation_id", "session_id"])
def test_call_logs(tmp_path, capsys, id_key):
    conversations = [conversation(n) for n in range(40)]
    records = [
        {"messages": call} | ({id_key: f"s{n}"} if id_key else {"id": f"call-{n}-{len(call)}"})
        for n, messages in enumerate(conversations)
        for call in call_log(messages)
    ]
    random.Random(0).shuffle(records)
    source = write(tmp_path / "log.jsonl", records)
    train, held_out, report = prepared(source, tmp_path / "out.jsonl", "--eval-fraction", "0.2")
    assert {key(row) for row in train + held_out} == wanted(conversations)
    assert len(train) == 96 and len(held_out) == 24
    check_sides(train, held_out)
    # Of 4 calls of each conversation, the first has too few messages, and 2 begin the last.
    assert (report["conversations"], report["eval_conversations"]) == (32, 8)
    assert (report["merged_records"], report["duplicate_interactions"]) == (80, 120)
    table = capsys.readouterr().out
    for text in (
        "kept             32 conversations, 96 interactions",
        "held out          8 conversations, 24 interactions",
        "merged           80 records into their conversations",
        "dropped         120 interactions that are there already",
    ):
        assert text in table


@pytest.mark.parametrize("order", ["as written", "shuffled", "without ids"])
def test_a_file_that_prepare_wrote(tmp_path, order):
    source = write(tmp_path / "in.jsonl", [{"id": f"c{n}", "messages": conversation(n, 1 + n % 4)} for n in range(30)])
    first, _, _ = prepared(source, tmp_path / "whole.jsonl")
    again = [dict(row) for row in first]
    if order != "as written":
        random.Random(0).shuffle(again)
    for row in again if order == "without ids" else ():
        del row["id"], row["conversation_id"]
    source = write(tmp_path / "again.jsonl", again)
    train, held_out, report = prepared(source, tmp_path / "split.jsonl", "--eval-fraction", "0.2")
    assert (report["conversations"], report["eval_conversations"]) == (24, 6)
    assert report["merged_records"] == len(first) - 30
    check_sides(train, held_out)
    if order == "without ids":
        assert sorted(map(key, train + held_out)) == sorted(map(key, first))
    else:
        assert sorted(map(str, train + held_out)) == sorted(map(str, first))
    for part in (train, held_out):  # a conversation's rows follow each other, in its order
        places = [(row["conversation_id"], row["turn_id"]) for row in part]
        starts = list(dict.fromkeys(name for name, _ in places))
        assert places == sorted(places, key=lambda place: (starts.index(place[0]), place[1]))


def test_duplicates_with_the_same_hash(tmp_path):
    records = [
        {"conversation_hash": f"h{n}", "language": "English", "conversation": conversation(n, 1)}
        for n in range(20)
        for _ in range(2)
    ]
    source = write(tmp_path / "in.jsonl", records)
    train, held_out, report = prepared(
        source, tmp_path / "out.jsonl", "--preset", "wildchat", "--eval-fraction", "0.5"
    )
    assert len(train) == len(held_out) == 10
    check_sides(train, held_out)
    assert (report["merged_records"], report["duplicate_interactions"]) == (20, 20)


def test_conversations_that_begin_alike_are_on_one_side(tmp_path):
    """Two answers to one prompt, and a prompt that differs in white space."""
    records = [{"messages": chat(f"{n}", f"answer {k}", f"follow-up {k}")} for n in range(20) for k in "ab"] + [
        {"messages": chat(f" {n}\n", "answer c", "follow-up c")} for n in range(20)
    ]
    source = write(tmp_path / "in.jsonl", records)
    train, held_out, report = prepared(source, tmp_path / "out.jsonl", "--eval-fraction", "0.2")
    assert (report["conversations"], report["eval_conversations"]) == (48, 12)
    sides = [{row["prompt"][0]["content"].strip() for row in part} for part in (train, held_out)]
    assert not sides[0] & sides[1]


def test_where_all_begin_alike_nothing_is_held_out_in_silence(tmp_path, capsys):
    records = [{"messages": chat("Start", f"answer {n}", f"reply {n}")} for n in range(20)]
    source = write(tmp_path / "in.jsonl", records)
    argv = [str(source), "-o", str(tmp_path / "out.jsonl"), "--eval-fraction", "0.2"]
    assert main(argv) == 1
    assert "20 of 20 conversations begin with the same prompt" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_equal_ids_of_other_files_and_branches_of_a_session(tmp_path):
    """`id` names a record of its own file; rows of one session with equal turns get ids of their own."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "s.jsonl", [{"id": n, "messages": chat(f"{name}{n}", "y", "o")} for n in range(3)])
    branches = [chat("q", "y", "o", f"y{n}", f"o{n}") for n in range(2)]
    write(tmp_path / "c.jsonl", [{"session_id": "s", "messages": branch} for branch in branches])
    sources = [tmp_path / name for name in ("a/s.jsonl", "b/s.jsonl", "c.jsonl")]
    report = prepare.prepare(sources, tmp_path / "out.jsonl", rules="none")
    written = rows(tmp_path / "out.jsonl")
    assert (report.conversations, report.interactions) == (7, 9)
    assert [row["id"] for row in written[:6]] == ["0:0", "1:0", "2:0", "1/0:0", "1/1:0", "1/2:0"]
    assert {row["conversation_id"] for row in written[6:]} == {"s"}
    assert len({row["id"] for row in written}) == 9


def test_the_first_conversations_are_found_among_duplicates(tmp_path):
    """Without shuffling reading ends early, but not before the wanted number is there."""
    records = [{"messages": call} for n in range(200) for call in call_log(conversation(n)) for _ in (1, 2)]
    source = write(tmp_path / "in.jsonl", records)
    for number, rules in enumerate(
        (ConversationFilter(max_conversations=10), ConversationFilter(max_interactions=30))
    ):
        report = prepare.prepare([source], tmp_path / f"{number}.jsonl", rules=rules)
        assert (report.conversations, report.interactions) == (10, 30)
        assert report.records < 400  # of 1,600


# Few texts, so that conversations begin alike, repeat and contain each other by chance as well.
texts = st.sampled_from(["a", "b", "c", "d", "é\u2028日", "yes"])
conversations = st.lists(st.integers(1, 4), min_size=1, max_size=8).flatmap(
    lambda turns: st.tuples(*(st.lists(texts, min_size=2 * t + 1, max_size=2 * t + 1) for t in turns))
)


@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    conversations=conversations,
    seed=st.integers(0, 10**6),
    history=st.sampled_from([None, 1, 3]),
    fraction=st.sampled_from([0.0, 0.3, 0.5]),
)
def test_any_log_of_conversations(tmp_path, conversations, seed, history, fraction):
    """Logged per call, as rows and whole, some twice, in any order: what they were, each once."""
    draw = random.Random(seed)
    originals = [chat(*texts) for texts in conversations]
    records = []
    for number, messages in enumerate(originals):
        kinds = [{"messages": messages}]
        kinds += [{"messages": call} for call in call_log(messages)]
        for item in extract_interactions(messages):
            kinds.append({"prompt": item.prompt, "completion": item.completion, "user_response": item.followup})
        kept = [kinds[0], *draw.choices(kinds, k=draw.randint(0, 6))]
        named = draw.choice(["", "conversation_id", "id"])
        for record in kept:
            records.append({**record, **({named: f"c{number}"} if named else {})})
    draw.shuffle(records)
    source = write(tmp_path / "in.jsonl", records)
    output = tmp_path / "out.jsonl"
    rules = ConversationFilter(max_history_messages=history, shuffle=True)
    options = {"rules": rules, "overwrite": True, "resume": False, "seed": seed}
    try:
        report = prepare.prepare([source], output, eval_fraction=fraction, **options)
    except ValueError as error:
        if "begin with the same prompt" not in str(error):
            raise
        report = prepare.prepare([source], output, **options)
    train = rows(output)
    held_out = rows(report.eval_output) if report.eval_output else []
    found = [key(row) for row in train + held_out]
    assert len(set(found)) == len(found)
    assert set(found) == wanted(originals, max_history_messages=history)
    check_sides(train, held_out)
    told = report.conversations + report.eval_conversations + report.merged_records
    assert told + sum(report.damaged.values()) == report.records == len(records)
    assert len({row["conversation_id"] for row in train + held_out}) == (
        report.conversations + report.eval_conversations
    )


def test_parts_of_the_keys_give_the_same(tmp_path, monkeypatch):
    """Keys that are compared a few at a time: the same bytes."""
    draw = random.Random(0)
    records = [{"messages": call} for n in range(300) for call in call_log(conversation(n % 250))]
    draw.shuffle(records)
    source = write(tmp_path / "in.jsonl", records)
    for number, size in enumerate((1 << 15, 50)):
        monkeypatch.setattr(merging, "PART_KEYS", size)
        monkeypatch.setattr(spool, "BLOCK_KEYS", size)
        prepare.prepare([source], tmp_path / f"{number}.jsonl", eval_fraction=0.1)
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    assert (tmp_path / "0.eval.jsonl").read_bytes() == (tmp_path / "1.eval.jsonl").read_bytes()
