"""`fastsdpo prepare` on logs that repeat themselves: each interaction once, each conversation on one side."""

import json
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsdpo.data import extract_interactions, merging, prepare, spool
from tests.data.conftest import chat, read_rows


def conversation(number, turns=3):
    return chat(*(f"{number}.{n}" for n in range(2 * turns + 1)))


def call_log(messages):
    """A record per call, each with the history so far."""
    return [messages[: end + 1] for end in range(messages[0]["role"] == "system", len(messages), 2)]


def key(row):
    return json.dumps([row["prompt"], row["completion"]["content"], row["user_response"]["content"]])


def wanted(conversations, **options):
    return {
        json.dumps([i.prompt, i.completion, i.followup])
        for messages in conversations
        for i in extract_interactions(messages, **options)
    }


def check_sides(train, held_out):
    """No prompt begins one of the other side, whatever its system message; no conversation or id is on both."""
    for name in ("conversation_id", "id"):
        assert not {row[name] for row in train} & {row[name] for row in held_out}
    ids = [row["id"] for row in train + held_out]
    assert len(set(ids)) == len(ids)
    asked = [[[m for m in row["prompt"] if m["role"] != "system"] for row in part] for part in (train, held_out)]
    for one in asked[0]:
        for other in asked[1]:
            shorter = min(len(one), len(other))
            assert one[:shorter] != other[:shorter]


@pytest.mark.parametrize("id_key", [None, "conversation_id", "session_id"])
def test_call_logs(prepared, id_key):
    conversations = [conversation(n) for n in range(40)]
    records = [
        {"messages": call} | ({id_key: f"s{n}"} if id_key else {"id": f"call-{n}-{len(call)}"})
        for n, messages in enumerate(conversations)
        for call in call_log(messages)
    ]
    random.Random(0).shuffle(records)
    done = prepared(records, "--eval-fraction", 0.2, preset="default")
    assert {key(row) for row in done.rows + done.held_out} == wanted(conversations)
    assert len(done.rows) == 96 and len(done.held_out) == 24
    check_sides(done.rows, done.held_out)
    # Of 4 calls of each conversation, the first has too few messages, and 2 begin the last.
    assert (done.report["conversations"], done.report["eval_conversations"]) == (32, 8)
    assert (done.report["merged_records"], done.report["duplicate_interactions"]) == (80, 120)


@pytest.mark.parametrize("order", ["as written", "shuffled", "without ids"])
def test_a_file_that_prepare_wrote(prepared, order):
    first = prepared([{"id": f"c{n}", "messages": conversation(n, 1 + n % 4)} for n in range(30)]).rows
    again = [dict(row) for row in first]
    if order != "as written":
        random.Random(0).shuffle(again)
    for row in again if order == "without ids" else ():
        del row["id"], row["conversation_id"]
    done = prepared(again, "--eval-fraction", 0.2, "--overwrite", preset="default")
    assert (done.report["conversations"], done.report["eval_conversations"]) == (24, 6)
    assert done.report["merged_records"] == len(first) - 30
    check_sides(done.rows, done.held_out)
    same = key if order == "without ids" else str
    assert sorted(map(same, done.rows + done.held_out)) == sorted(map(same, first))
    for part in (done.rows, done.held_out):  # a conversation's rows follow each other, in its order
        places = [(row["conversation_id"], row["turn_id"]) for row in part]
        starts = list(dict.fromkeys(name for name, _ in places))
        assert places == sorted(places, key=lambda place: (starts.index(place[0]), place[1]))


def test_conversations_that_begin_alike_are_on_one_side(prepared):
    """Two answers to one prompt, and a prompt that differs in white space."""
    begins = [(f"{n}", k) for n in range(20) for k in "ab"] + [(f" {n}\n", "c") for n in range(20)]
    records = [{"messages": chat(text, f"answer {k}", f"follow-up {k}")} for text, k in begins]
    done = prepared(records, "--eval-fraction", 0.2)
    assert (done.report["conversations"], done.report["eval_conversations"]) == (48, 12)
    sides = [{row["prompt"][0]["content"].strip() for row in part} for part in (done.rows, done.held_out)]
    assert not sides[0] & sides[1]


def test_where_all_begin_alike_nothing_is_held_out_in_silence(prepared):
    records = [{"messages": chat("Start", f"answer {n}", f"reply {n}")} for n in range(20)]
    done = prepared(records, "--eval-fraction", 0.2)
    assert done.status == 1 and not done.output.exists()
    assert "20 of 20 conversations begin with the same prompt" in done.error


def test_equal_ids_of_other_files_and_branches_of_a_session(tmp_path):
    """`id` names a record of its own file; rows of one session with equal turns get ids of their own."""
    own = {name: [{"id": n, "messages": chat(f"{name}{n}", "y", "o")} for n in range(3)] for name in "ab"}
    branches = [{"session_id": "s", "messages": chat("q", "y", "o", f"y{n}", f"o{n}")} for n in range(2)]
    sources = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for path, records in zip(sources, (own["a"], own["b"], branches)):
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    report = prepare.prepare(sources, tmp_path / "out.jsonl", rules="none")
    written = read_rows(tmp_path / "out.jsonl")
    assert (report.conversations, report.interactions) == (7, 9)
    assert [row["id"] for row in written[:6]] == ["0:0", "1:0", "2:0", "1/0:0", "1/1:0", "1/2:0"]
    assert {row["conversation_id"] for row in written[6:]} == {"s"}
    assert len({row["id"] for row in written}) == 9


@pytest.mark.parametrize("limit", [("--max-conversations", 10), ("--max-interactions", 30)])
def test_the_first_conversations_are_found_among_duplicates(prepared, limit):
    """Without shuffling reading ends early, but not before the wanted number is there."""
    records = [{"messages": c} for n in range(200) for c in call_log(conversation(n)) for _ in (1, 2)]
    report = prepared(records, *limit).report
    assert (report["conversations"], report["interactions"]) == (10, 30)
    assert report["records"] < 400  # of 1,600


# Few texts, so that conversations begin alike, repeat and contain each other by chance as well.
TEXTS = ["a", "b", "c", "d", "é\u2028日", "yes"]


@st.composite
def conversations(draw):
    """Some conversations, of which each may begin as one before does, and then go on in its own way."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        length = 2 * draw(st.integers(1, 4)) + 1
        texts = draw(st.lists(st.sampled_from(TEXTS), min_size=length, max_size=length))
        if found and draw(st.booleans()):
            begun = draw(st.sampled_from(found))[:length]
            begun = begun[: draw(st.integers(0, len(begun)))]
            texts[: len(begun)] = begun
        found.append(texts)
    return found


EXAMPLES = 3000 if os.environ.get("FASTSDPO_LONG") == "1" else 80
UNHEALTHY = [HealthCheck.function_scoped_fixture]
HISTORY, FRACTION = st.sampled_from([None, 1, 3]), st.sampled_from([0.0, 0.3, 0.5])


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=UNHEALTHY)
@given(conversations=conversations(), seed=st.integers(0, 10**6), history=HISTORY, fraction=FRACTION)
def test_any_log_of_conversations(prepared, conversations, seed, history, fraction):
    """Logged per call, as rows and whole, some twice, in any order: what they were, each once."""
    draw = random.Random(seed)
    systems = [[], [], [{"role": "system", "content": "It is ten."}], [{"role": "system", "content": "It is two."}]]
    originals = [draw.choice(systems) + chat(*texts) for texts in conversations]
    records = []
    for number, messages in enumerate(originals):
        calls = [{"messages": call} for call in call_log(messages)]
        more = [{"messages": messages}, *calls]
        for item in extract_interactions(messages):
            more.append({"prompt": item.prompt, "completion": item.completion, "user_response": item.followup})
        # The whole conversation, or each of its calls; and some of it again.
        kept = [*draw.choice([more[:1], calls]), *draw.choices(more, k=draw.randint(0, 6))]
        named = draw.choice(["", "conversation_id", "id"])
        for record in kept:
            records.append({**record, **({named: f"c{number}"} if named else {})})
    draw.shuffle(records)
    argv = ["--overwrite", "--no-resume", "--shuffle", "--seed", seed, "--max-history-messages", history or "none"]
    done = prepared(records, *argv, "--eval-fraction", fraction)
    if "begin with the same prompt" in done.error or "must hold out a conversation" in done.error:
        done = prepared(records, *argv)
    assert done.status == 0
    held_out = done.held_out if done.report["eval_output"] else []
    found = [key(row) for row in done.rows + held_out]
    assert len(set(found)) == len(found)
    assert set(found) == wanted(originals, max_history_messages=history)
    check_sides(done.rows, held_out)
    report = done.report
    told = report["conversations"] + report["eval_conversations"] + report["merged_records"]
    assert told + sum(report["damaged"].values()) == report["records"] == len(records)
    names = {row["conversation_id"] for row in done.rows + held_out}
    assert len(names) == report["conversations"] + report["eval_conversations"]


def test_parts_of_the_keys_give_the_same(prepared, monkeypatch):
    """Keys that are compared a few at a time: the same bytes."""
    records = [{"messages": call} for n in range(300) for call in call_log(conversation(n % 250))]
    random.Random(0).shuffle(records)
    found = []
    for size in (1 << 15, 50):
        monkeypatch.setattr(merging, "PART_KEYS", size)
        monkeypatch.setattr(spool, "BLOCK_KEYS", size)
        done = prepared(records, "--eval-fraction", 0.1, "--overwrite", preset="default")
        found.append((done.rows, done.held_out))
    assert found[0] == found[1]
