"""Every format and layout gives the same conversations; damage costs what is damaged, no more."""

import gzip
import json
import logging
import sys
import tracemalloc

import pytest

from fastsdpo.data import (
    LoadReport,
    extract_interactions,
    json_records,
    load_conversations,
    load_interactions,
    loading,
    records,
)
from fastsdpo.data.loading import DamagedRecord

zstandard = pytest.importorskip("zstandard")
TEXTS = [
    "hi",
    'a "quoted" {brace} [bracket] \\ back\\\\slash',
    "日本語 🤖 é",
    "line\r\nline\u2028x",
    "z" * 50,
]


def record(number, key="messages"):
    turns = [
        {"role": role, "content": f"{number} {role} {TEXTS[number % 5]}"} for role in ("user", "assistant", "user")
    ]
    return {"id": f"c{number}", key: turns}


RECORDS = [record(number) for number in range(7)]


def lines(records=RECORDS, end="\n", ascii=False):
    return "".join(json.dumps(r, ensure_ascii=ascii) + end for r in records).encode()


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return path


def read(source, **options):
    report = LoadReport()
    ids = [c.id for c in load_conversations(source, report=report, **options)]
    return ids, report


def parquet(path, records=RECORDS, **options):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(records), path, **options)
    return path


FORMATS = {
    "a.jsonl": lines(),
    "crlf.jsonl": lines(end="\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(),
    "ascii.jsonl": lines(ascii=True),
    "blank.jsonl": b"\n  \n" + lines(end="\n\n\r\n"),
    "open.jsonl": lines().rstrip(),
    "compact.json": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "crlf.json": json.dumps(RECORDS, indent=1).replace("\n", "\r\n").encode(),
    "bom.json": b"\xef\xbb\xbf\r\n" + json.dumps(RECORDS, indent=2).encode(),
    "lines.json": lines(),
    "objects.json": "\n".join(json.dumps(r, indent=2) for r in RECORDS).encode(),
    "glued.json": b"".join(json.dumps(r).encode() for r in RECORDS),
    "pretty.jsonl": json.dumps(RECORDS, indent=2).encode(),
    "noname": json.dumps(RECORDS).encode(),
    "a.jsonl.gz": gzip.compress(lines()),
    "members.jsonl.gz": gzip.compress(lines()[:100]) + gzip.compress(lines()[100:]),
    "a.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
    "a.jsonl.zst": zstandard.compress(lines()),
    "frames.json.zst": zstandard.compress(b"[" + lines([RECORDS[0]]).strip())
    + zstandard.compress(b"," + json.dumps(RECORDS[1:]).encode()[1:]),
}


@pytest.fixture(params=[*FORMATS, "a.parquet"])
def any_file(request, tmp_path):
    if request.param == "a.parquet":
        return parquet(tmp_path / request.param, row_group_size=3)
    return write(tmp_path, request.param, FORMATS[request.param])


class TestFormats:
    @pytest.mark.parametrize("read_bytes", [1 << 20, 7, 1])
    def test_all_give_the_same(self, any_file, read_bytes, monkeypatch):
        monkeypatch.setattr(json_records, "READ_BYTES", read_bytes)
        report = LoadReport()
        conversations = list(load_conversations(any_file, report=report))
        assert [c.messages for c in conversations] == [r["messages"] for r in RECORDS]
        assert [c.id for c in conversations] == [r["id"] for r in RECORDS]
        assert report.records == 7 and not report.damaged and report.lost_bytes == 0
        assert report.bytes_done == report.bytes_total == any_file.stat().st_size

    def test_goes_on_from_any_position(self, any_file):
        report = LoadReport()
        positions = []
        for _ in load_conversations(any_file, report=report):
            positions.append(json.loads(json.dumps(report.position)))
        for number, position in enumerate(positions):
            again = LoadReport()
            rest = list(load_conversations(any_file, report=again, position=position))
            assert [c.id for c in rest] == [r["id"] for r in RECORDS[number + 1 :]]
            assert not again.damaged
            if rest:
                assert again.where == report.where

    def test_folder_glob_and_list(self, tmp_path):
        (tmp_path / "b" / "deep").mkdir(parents=True)
        write(tmp_path, "2.jsonl", lines(RECORDS[2:4]))
        write(tmp_path, "1.json", json.dumps(RECORDS[:2]).encode())
        write(tmp_path / "b" / "deep", "3.jsonl.gz", gzip.compress(lines(RECORDS[4:])))
        write(tmp_path, "notes.txt", b"not data")
        write(tmp_path, ".hidden.json", b"not data")
        ids = [r["id"] for r in RECORDS]
        assert read(tmp_path)[0] == ids
        assert read(str(tmp_path / "*.json*"))[0] == ids[:4]
        assert read(f"{tmp_path}/**/*.gz")[0] == ids[4:]
        assert read([tmp_path / "2.jsonl", str(tmp_path / "1.json")])[0] == ids[2:4] + ids[:2]

    def test_only_the_needed_columns_of_parquet(self, tmp_path):
        records = [{**r, "language": "English", "moderation": [1.0] * 9} for r in RECORDS]
        path = parquet(tmp_path / "a.parquet", records)
        assert [c.language for c in load_conversations(path)] == ["English"] * 7


class TestLayouts:
    messages = record(0)["messages"]
    expected = (["0 user hi"], "0 assistant hi", "0 user hi")

    @pytest.mark.parametrize(
        ("layout", "name", "language"),
        [
            ({"messages": messages}, None, None),
            (
                {"conversation_hash": "h", "conversation": messages, "language": "English"},
                "h",
                "English",
            ),
            ({"conversation_id": "w", "history": messages, "sat": 1, "language": 3}, "w", None),
            (
                {
                    "id": 5,
                    "conversations": [
                        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
                        for m in messages
                    ],
                },
                "5",
                None,
            ),
            ({"id": "", "items": messages, "messages": None}, None, None),
            (messages, None, None),
            (
                {
                    "id": "row",
                    "conversation_id": "c",
                    "prompt": messages[:1],
                    "completion": {"from": "gpt", "value": messages[1]["content"]},
                    "user_response": messages[2]["content"],
                },
                "c",
                None,
            ),
        ],
    )
    def test_told_by_keys(self, tmp_path, layout, name, language):
        path = write(tmp_path, "a.jsonl", lines([layout]))
        (conversation,) = load_conversations(path)
        assert (conversation.id, conversation.language) == (name, language)
        (i,) = extract_interactions(conversation)
        assert self.expected == ([m["content"] for m in i.prompt], i.completion, i.followup)

    def test_interaction_row_stays_one_interaction(self, tmp_path):
        prompt = [*self.messages, {"role": "assistant", "content": "b"}, self.messages[0]]
        row = {"id": "r", "prompt": prompt, "completion": "y", "user_response": "o"}
        path = write(tmp_path, "a.jsonl", lines([row]))
        (conversation,) = load_conversations(path)
        (interaction,) = extract_interactions(conversation)
        assert (interaction.id, interaction.completion, len(interaction.prompt)) == ("r", "y", 5)
        (loaded,) = load_interactions(path)
        assert loaded.prompt == prompt and loaded.followup == "o"

    def test_a_row_with_a_system_prompt_beside_it(self, tmp_path):
        row = {"prompt": self.messages[:1], "completion": "y", "user_response": "o", "system": "S"}
        (loaded,) = load_interactions(write(tmp_path, "a.jsonl", lines([row])))
        assert [m["role"] for m in loaded.prompt] == ["system", "user"]


BAD = b"\xff"
DAMAGE = {
    "cut line": (
        "a.jsonl",
        lines()[:-30],
        [0, 1, 2, 3, 4, 5],
        r"a\.jsonl:7: not JSON: Unterminated string",
    ),
    "cut array": (
        "a.json",
        json.dumps(RECORDS, indent=1).encode()[:-60],
        [0, 1, 2, 3, 4, 5],
        r"a\.json element 6 \(line \d+\): cut off: the file ends inside it \(\d+ bytes lost; nothing",
    ),
    "array cut between elements": (
        "a.json",
        json.dumps(RECORDS).encode()[:-1],
        [0, 1, 2, 3, 4, 5, 6],
        r"element 7 \(line 1\): the array is not closed, though its last element is whole",
    ),
    "text after array": (
        "a.json",
        json.dumps(RECORDS[:3]).encode() + b" oops " + json.dumps(RECORDS[3:]).encode(),
        [0, 1, 2, 3, 4, 5, 6],
        "text after the end of the array",
    ),
    "invalid UTF-8 in a line": (
        "a.jsonl",
        lines().replace(b"2 assistant", b"2 " + BAD, 1),
        [0, 1, 3, 4, 5, 6],
        r"a\.jsonl:3: invalid UTF-8 at byte \d+",
    ),
    "invalid UTF-8 in an element": (
        "a.json",
        json.dumps(RECORDS).encode().replace(b"2 assistant", b"2 " + BAD, 1),
        [0, 1, 3, 4, 5, 6],
        r"element 2 \(line 1\): invalid UTF-8 at byte \d+",
    ),
    "quote lost in an element": (
        "a.json",
        json.dumps(RECORDS).encode().replace(b'"c2"', b'"c2', 1),
        [0, 1, 3, 4, 5, 6],
        r"element 2 \(line 1\): (not JSON|cut off).*bytes lost\)",
    ),
    "brace lost in an element": (
        "a.json",
        json.dumps(RECORDS).encode().replace(b'{"id": "c4"', b'"id": "c4"', 1),
        [0, 1, 2, 3, 5, 6],
        r"element 4 \(line 1\): not JSON: a record cannot start with b'\"'",
    ),
    "comma lost in an element": (
        "a.json",
        json.dumps(RECORDS).encode().replace(b'"c3", ', b'"c3" ', 1),
        [0, 1, 2, 4, 5, 6],
        r"element 3 \(line 1\): not JSON: Expecting ',' delimiter",
    ),
    "numbers among the elements": (
        "a.json",
        b"[1, null, " + json.dumps(RECORDS).encode()[1:],
        [0, 1, 2, 3, 4, 5, 6],
        r"element 0 \(line 1\): not JSON: a record cannot start with b'1'",
    ),
    "not an object": (
        "a.jsonl",
        lines([RECORDS[0], 5, RECORDS[1]]),
        [0, 1],
        r"a\.jsonl:2: a record must be a JSON object, got int",
    ),
    "unknown keys": (
        "a.jsonl",
        lines([{"text": "hi", "b": 1}, RECORDS[1]]),
        [1],
        r"a\.jsonl:1: a record must have one of messages, .* got the keys 'text', 'b'",
    ),
    "a conversation without a list around it": (
        "a.json",
        json.dumps(RECORDS[0]["messages"]).encode(),
        [],
        "element 0 .*is this a list of messages without the list around it",
    ),
    "messages of the wrong type": (
        "a.jsonl",
        lines([{"messages": "hi"}, RECORDS[1]]),
        [1],
        r"a\.jsonl:1: messages must be a list of messages, got str 'hi'",
    ),
    "content of the wrong type": (
        "a.jsonl",
        lines([{"messages": [{"role": "user", "content": {"a": [1]}}]}, RECORDS[1]]),
        [1],
        r"a\.jsonl:1: messages\[0\]: content must be text, got dict",
    ),
    "unknown role": (
        "a.jsonl",
        lines([{"conversations": [{"from": "wizard", "value": ""}]}, RECORDS[1]]),
        [1],
        r"conversations\[0\]: role must be one of .* got str 'wizard'",
    ),
    "row without a follow-up": (
        "a.jsonl",
        lines([{"prompt": [], "completion": "y", "user_response": None}]),
        [],
        r"a\.jsonl:1: an interaction row must have 'user_response'",
    ),
    "row that answers an answer": (
        "a.jsonl",
        lines([{"prompt": [{"role": "assistant", "content": "a"}], "completion": "y", "user_response": "o"}]),
        [],
        "Interaction: prompt must end with a user's message, got role 'assistant'",
    ),
    "row with swapped roles": (
        "a.jsonl",
        lines(
            [
                {
                    "prompt": [{"role": "user", "content": "a"}],
                    "completion": {"role": "user", "content": "y"},
                    "user_response": "o",
                }
            ]
        ),
        [],
        "completion: role must be assistant, got user",
    ),
    "lone surrogate": (
        "a.jsonl",
        lines([RECORDS[0]]) + b'{"messages": [{"role": "user", "content": "a\\ud800"}]}\n',
        [0],
        r"a\.jsonl:2: messages\[0\]: content must be valid Unicode, got a lone surrogate at",
    ),
    "NUL": (
        "a.jsonl",
        lines([RECORDS[0]]) + b"\0\0\0\n" + lines([RECORDS[1]]),
        [0, 1],
        r"a\.jsonl:2: not JSON",
    ),
    "nested too deep": (
        "a.jsonl",
        lines([RECORDS[0]]) + b'{"messages":' + b"[" * 200_000 + b"\n",
        [0],
        r"a\.jsonl:2: not JSON: nested too deep",
    ),
    "nested too deep in an array": (
        "a.json",
        b'[{"messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}," + json.dumps(RECORDS)[1:].encode(),
        [0, 1, 2, 3, 4, 5, 6],
        r"element 0 \(line 1\): not JSON: nested too deep",
    ),
    "too long a line": (
        "a.jsonl",
        lines([RECORDS[0], {"messages": "x" * 30_000}, RECORDS[1]]),
        [0, 1],
        r"a\.jsonl:2: longer than 20,000 bytes",
    ),
    "too long an element": (
        "a.json",
        json.dumps([RECORDS[0], {"messages": "x" * 30_000}, RECORDS[1]]).encode(),
        [0, 1],
        r"element 1 \(line 1\): longer than 20,000 bytes, or not closed \(30,\d+ bytes lost\)",
    ),
    "a number without end": (
        "a.jsonl",
        lines([RECORDS[0]]) + b'{"id": ' + b"9" * 10_000 + b"}\n",
        [0],
        r"a\.jsonl:2: not JSON: Exceeds the limit",
    ),
    "UTF-16": ("a.json", json.dumps(RECORDS).encode("utf-16"), [], "UTF-16 text; save it as UTF-8"),
    "empty": ("a.json", b" \n", [], r"a\.json: the file is empty"),
    "not text": ("a.json", bytes(range(256)) * 50, [], "a record cannot start with b'\\\\x00'"),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(lines(RECORDS * 50))[:-400],
        None,
        r"a\.jsonl\.gz: the compressed data is cut off",
    ),
    "damaged gzip": (
        "a.jsonl.gz",
        gzip.compress(lines(), 0)[:900] + b"junk" * 30,
        None,
        r"a\.jsonl\.gz: the compressed data is (damaged|cut off)",
    ),
    "not gzip": ("a.json.gz", lines(), [], "the compressed data is damaged: .*incorrect header"),
    "cut zstd": (
        "a.jsonl.zst",
        zstandard.compress(lines(RECORDS * 50))[:-10],
        None,
        r"a\.jsonl\.zst: the compressed data is cut off",
    ),
    "not zstd": ("a.jsonl.zst", lines(), [], "the compressed data is damaged"),
}


class TestDamage:
    @pytest.mark.parametrize("case", DAMAGE)
    @pytest.mark.parametrize("read_bytes", [1 << 20, 31])
    def test_skipped_counted_and_reported(self, tmp_path, case, read_bytes, monkeypatch):
        monkeypatch.setattr(json_records, "READ_BYTES", read_bytes)
        name, data, kept, message = DAMAGE[case]
        path = write(tmp_path, name, data)
        limit = 20_000 if "too long" in case else loading.MAX_RECORD_BYTES
        ids, report = read(path, max_record_bytes=limit)
        if kept is not None:
            assert ids == [f"c{number}" for number in kept]
        problems = [text for texts in report.problems.values() for text in texts]
        with pytest.raises(AssertionError if not problems else ValueError, match=message):
            raise ValueError("\n".join(problems))
        assert sum(report.damaged.values()) == len(problems)
        with pytest.raises(DamagedRecord) as caught:
            list(load_conversations(path, strict=True, max_record_bytes=limit))
        assert str(caught.value) in problems

    def test_what_precedes_a_cut_in_compressed_data_is_kept(self, tmp_path):
        for suffix, data in (
            ("gz", gzip.compress(lines(RECORDS * 300), 6)),
            ("zst", zstandard.compress(lines(RECORDS * 3000))),
        ):
            path = write(tmp_path, f"a.jsonl.{suffix}", data[: len(data) * 3 // 4])
            ids, report = read(path)
            assert len(ids) > 500
            assert ids == [f"c{number % 7}" for number in range(len(ids))]
            assert report.damaged["damaged file"] == 1

    def test_damaged_parquet(self, tmp_path):
        path = parquet(tmp_path / "a.parquet", RECORDS * 10, row_group_size=20, compression="NONE")
        data = path.read_bytes()
        place = data.index(b"3 assistant", len(data) // 3) - 40
        write(tmp_path, "cut.parquet", data[:-20])
        ids, report = read(tmp_path / "cut.parquet")
        assert ids == [] and "not a whole Parquet file" in report.problems["damaged file"][0]
        # Zeros over the page headers of one row group: the other groups are still read.
        path.write_bytes(data[: place - 200] + bytes(400) + data[place + 200 :])
        ids, report = read(path)
        assert report.records == 70 or report.damaged
        with pytest.raises(DamagedRecord, match=r"cut\.parquet: not a whole Parquet file"):
            list(load_conversations(tmp_path / "cut.parquet", strict=True))

    def test_logs_where_nobody_asks_for_a_report(self, tmp_path, caplog):
        path = write(tmp_path, "a.jsonl", lines([RECORDS[0]]) + b"oops\n" * 50)
        with caplog.at_level(logging.WARNING, "fastsdpo.data"):
            assert len(list(load_conversations(path))) == 1
        assert len(caplog.messages) == records.MAX_PROBLEMS
        assert "a.jsonl:2: not JSON" in caplog.messages[0]

    def test_interactions_are_strict(self, tmp_path):
        good = {"prompt": [{"role": "user", "content": "q"}], "completion": "y"}
        rows = [{**good, "user_response": "o"}, good]
        path = write(tmp_path, "a.jsonl", lines(rows))
        with pytest.raises(DamagedRecord, match=r"a\.jsonl:2: an interaction row must have 'user_"):
            list(load_interactions(path))
        assert len(list(load_interactions(path, strict=False, report=LoadReport()))) == 1


class TestSources:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("nowhere/at/all.json", "no such file: nowhere/at/all.json"),
            ("missing.jsonl", "no such file: missing.jsonl"),
            ("missing.json.gz", "no such file: missing.json.gz"),
            ("none*.json", r"no file matches none\*\.json"),
        ],
    )
    def test_not_there(self, source, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=message):
            list(load_conversations(source))

    def test_empty_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no file that ends in \.json"):
            list(load_conversations(tmp_path))

    @pytest.mark.parametrize("package", ["zstandard", "pyarrow", "datasets"])
    def test_missing_package_is_named(self, tmp_path, package, monkeypatch):
        sources = {
            "zstandard": write(tmp_path, "a.json.zst", zstandard.compress(lines())),
            "pyarrow": parquet(tmp_path / "a.parquet"),
            "datasets": "org/name",
        }
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"pip install {package}"):
            list(load_conversations(sources[package]))

    def test_dataset_name(self, monkeypatch, tmp_path):
        datasets = pytest.importorskip("datasets")
        calls = []

        def load_dataset(name, config, **options):
            calls.append((name, config, options))
            if name == "org/gone":
                raise ConnectionError("offline")
            return datasets.Dataset.from_list(RECORDS).to_iterable_dataset()

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        ids, report = read("org/name", config="small", split="test")
        assert ids == [r["id"] for r in RECORDS]
        assert calls == [("org/name", "small", {"split": "test", "streaming": True})]
        assert report.where == "org/name[test] row 6" and report.bytes_total is None
        rest, _ = read("org/name", position={"source": 0, "inside": {"row": 5}})
        assert rest == ["c5", "c6"]
        with pytest.raises(FileNotFoundError, match="'org/gone' is neither a file nor a dataset"):
            list(load_conversations("org/gone"))

    def test_dataset_on_disk(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "d")
        assert read(tmp_path / "d")[0] == [r["id"] for r in RECORDS]


class TestBoundedMemory:
    def peak(self, path, **options):
        tracemalloc.start()
        try:
            ids, report = read(path, **options)
            return len(ids), report, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz"])
    def test_large_file(self, tmp_path, name):
        records = [{**r, "pad": "é" * 3000} for r in RECORDS] * 400
        data = lines(records)
        if ".jsonl" not in name:
            data = b"[" + data.rstrip().replace(b"\n", b",\n") + b"]"
        assert len(data) > 16 << 20
        path = write(tmp_path, name, gzip.compress(data, 1) if name.endswith("gz") else data)
        count, report, peak = self.peak(path)
        assert count == 2800 and not report.damaged
        assert peak < 6 << 20

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
    def test_gigantic_string(self, tmp_path, name):
        with open(tmp_path / name, "wb") as file:
            file.write(b"[" if name == "a.json" else b"")
            file.write(b'{"messages": "')
            for _ in range(4):
                file.write(b'{\\"x' * (1 << 18))
            file.write(b'"}' + (b",\n" if name == "a.json" else b"\n"))
            file.write(json.dumps(RECORDS[0]).encode() + (b"]" if name == "a.json" else b""))
        count, report, peak = self.peak(tmp_path / name, max_record_bytes=1 << 20)
        assert count == 1 and report.damaged == {"too long": 1}
        assert 4 << 20 < report.lost_bytes < 5 << 20
        assert peak < 5 << 20  # the record limit, its buffer and the decoder's copy

    def test_objects_that_never_close(self, tmp_path):
        """Each start could be scanned to the end of the file again; the work stays bounded."""
        path = write(tmp_path, "a.json", b'[{"": ' * 200_000)
        ids, report = read(path)
        assert ids == [] and sum(report.damaged.values()) == 1


def test_a_damaged_first_line_does_not_hide_the_others(tmp_path):
    """Without the suffix .jsonl the layout is told by the text."""
    lines = [json.dumps(row, ensure_ascii=False) for row in RECORDS[:3]]
    path = tmp_path / "chats.json"
    path.write_text("\n".join([lines[0][:40] + '{"a":' * 500 + lines[0][40:], *lines[1:]]) + "\n")
    report = LoadReport()
    assert len(list(load_conversations(path, report=report))) == 2
    assert sum(report.damaged.values()) == 1
