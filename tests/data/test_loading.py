"""Every format and layout gives the same conversations; damage costs what is damaged, no more."""

import gzip
import json
import logging
import re
import sys
import tracemalloc

import pytest

from fastsdpo.data import (
    LoadReport,
    extract_interactions,
    json_records,
    load_conversations,
    load_interactions,
    records,
)
from fastsdpo.data.loading import DamagedRecord

zstandard = pytest.importorskip("zstandard")
TEXTS = ["hi", 'a "quoted" {brace} [bracket] \\ back\\\\slash', "日本語 🤖 é", "line\r\nline\u2028x", "z" * 50]


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

    def test_folder_glob_and_list(self, tmp_path, caplog):
        (tmp_path / "b" / "deep").mkdir(parents=True)
        write(tmp_path, "2.JSONL", lines(RECORDS[2:4]))
        write(tmp_path, "1.json", json.dumps(RECORDS[:2]).encode())
        write(tmp_path / "b" / "deep", "3.jsonl.GZ", gzip.compress(lines(RECORDS[4:])))
        write(tmp_path, "notes.txt", b"not data")
        write(tmp_path, ".hidden.json", b"not data")
        ids = [r["id"] for r in RECORDS]
        assert read(tmp_path)[0] == ids
        (said,) = [record.getMessage() for record in caplog.records]
        assert re.fullmatch("folder .*: 1 files are not read, since they do not end in .*: notes.txt", said)
        assert read(str(tmp_path / "*.[jJ]*"))[0] == ids[:4]
        assert read(f"{tmp_path}/**/*.GZ")[0] == ids[4:]
        assert read([tmp_path / "2.JSONL", str(tmp_path / "1.json")])[0] == ids[2:4] + ids[:2]

    def test_reports_of_prepare_in_a_folder_are_no_records(self, tmp_path):
        write(tmp_path, "a.jsonl", lines(RECORDS[:2]))
        write(tmp_path, "a.report.json", b'{"conversations": 2}')
        write(tmp_path, "own.report.json", json.dumps(RECORDS[2:4]).encode())  # beside no own.jsonl
        ids, report = read(tmp_path)
        assert ids == [record["id"] for record in RECORDS[:4]] and not report.damaged

    def test_only_the_needed_columns_of_parquet(self, tmp_path):
        records = [{**r, "language": "English", "moderation": [1.0] * 9} for r in RECORDS]
        path = parquet(tmp_path / "a.parquet", records)
        assert [c.language for c in load_conversations(path)] == ["English"] * 7


MESSAGES = RECORDS[0]["messages"]
SPEAKERS = {"user": "human", "assistant": "gpt"}
SHARED = [{"from": SPEAKERS[m["role"]], "value": m["content"]} for m in MESSAGES]
ROW = {"prompt": MESSAGES[:1], "completion": SHARED[1], "user_response": MESSAGES[2]["content"]}


class TestLayouts:
    @pytest.mark.parametrize(
        ("layout", "name", "language"),
        [
            ({"messages": MESSAGES}, None, None),
            ({"conversation_hash": "h", "conversation": MESSAGES, "language": "English"}, "h", "English"),
            ({"conversation_id": "w", "history": MESSAGES, "sat": 1, "language": 3}, "w", None),
            ({"id": 5, "conversations": SHARED}, "5", None),
            ({"id": "", "items": MESSAGES, "messages": None}, None, None),
            (MESSAGES, None, None),
            ({"id": "row", "conversation_id": "c", **ROW}, "c", None),
        ],
    )
    def test_told_by_keys(self, tmp_path, layout, name, language):
        path = write(tmp_path, "a.jsonl", lines([layout]))
        (conversation,) = load_conversations(path)
        assert (conversation.id, conversation.language) == (name, language)
        (i,) = extract_interactions(conversation)
        expected = (["0 user hi"], "0 assistant hi", "0 user hi")
        assert ([m["content"] for m in i.prompt], i.completion, i.followup) == expected

    def test_interaction_row_stays_one_interaction(self, tmp_path):
        prompt = [*MESSAGES, {"role": "assistant", "content": "b"}, MESSAGES[0]]
        row = {"id": "r", "prompt": prompt, "completion": "y", "user_response": "o"}
        path = write(tmp_path, "a.jsonl", lines([row]))
        (conversation,) = load_conversations(path)
        (interaction,) = extract_interactions(conversation)
        assert (interaction.id, interaction.completion, len(interaction.prompt)) == ("r", "y", 5)
        (loaded,) = load_interactions(path)
        assert loaded.prompt == prompt and loaded.followup == "o"


LINES, ARRAY, PRETTY = lines(), json.dumps(RECORDS).encode(), json.dumps(RECORDS, indent=1).encode()


def said_by(role, content):
    return {"messages": [{"role": role, "content": content}]}


# A line (or its record) between two that are kept, and what is said of it.
BAD_LINES = {
    "not an object": (5, "a record must be a JSON object, got int"),
    "unknown keys": ({"text": "", "b": 1}, "a record must have one of messages, .* got the keys 'text', 'b'"),
    "messages of the wrong type": ({"messages": "hi"}, "messages must be a list of messages, got str 'hi'"),
    "content of the wrong type": (said_by("user", {"a": [1]}), r"messages\[0\]: content must be text, got dict"),
    "unknown role": (said_by("wizard", ""), r"messages\[0\]: role must be one of .* got str 'wizard'"),
    "surrogate": (said_by("user", "a\ud800"), r"messages\[0\]: content must be valid Unicode, got a lone surrogate"),
    "row without a follow-up": ({**ROW, "user_response": None}, "an interaction row must have 'user_response'"),
    "row that answers an answer": ({**ROW, "prompt": [SHARED[1]]}, "Interaction: prompt must end with a user's"),
    "row of swapped roles": ({**ROW, "completion": ROW["prompt"][0]}, "completion: role must be assistant, got user"),
    "invalid UTF-8": ('{"id": "é\xff'.encode("latin-1"), "invalid UTF-8 at byte 8"),
    "cut": (LINES[:60], "not JSON: Unterminated string"),
    "NUL": (b"\0\0\0", "not JSON"),
    "nested too deep": (b'{"messages":' + b"[" * 200_000, "not JSON: nested too deep"),
    "too long": ({"messages": "x" * 30_000}, "longer than 20,000 bytes"),
    "a number without end": (b'{"id": ' + b"9" * 10_000 + b"}", "not JSON: Exceeds the limit"),
}
ALL, LONG = "0123456", b'"' + b"x" * 30_000 + b'"'
# A change of an array's text, the elements that are kept, and what is said of the others.
BAD_ELEMENTS = {
    "invalid UTF-8": (b"2 assistant", b"2 \xff", "013456", r"2 .*: invalid UTF-8 at byte \d+$"),
    "UTF-8 between strings": (b'"c2", ', b'"c2"\xff, ', "013456", r"2 .*: invalid UTF-8 at byte 11 \(\d+ bytes lost"),
    "quote lost": (b'"c2"', b'"c2', "013456", r"2 .*: not JSON.*bytes lost\)"),
    "brace lost": (b'{"id": "c4"', b'"id": "c4"', "012356", "4 .*: not JSON: a record cannot start with b'\"'"),
    "comma lost": (b'"c3", ', b'"c3" ', "012456", "3 .*: not JSON: Expecting ',' delimiter"),
    "end lost": (b'}]}, {"id": "c3"', b'}], {"id": "c3"', "013456", "2 .*: not JSON: Expecting property name"),
    "numbers": (b'[{"id": "c0"', b'[1, null, {"id": "c0"', ALL, "0 .*: not JSON: a record cannot start with b'1'"),
    "the end in the middle": (b', {"id": "c3"', b'] oops {"id": "c3"', ALL, "3 .*: text after the end of the array"),
    "two arrays": (b', {"id": "c3"', b']{"id": "c3"', ALL, r"text after the end of the array \(0 bytes lost"),
    "nested too deep": (b"[", b'[{"":' + b"[" * 200_000 + b"]" * 200_000 + b"},", ALL, "0 .*: not JSON: nested too"),
    "too long": (b'"c1"', LONG, "023456", r"1 .*: longer than 20,000 bytes, or not closed \(30,\d+ bytes"),
}
# (file, its bytes, what is kept, what is said of it)
BAD_FILES = {
    "cut array": (
        "a.json",
        PRETTY[:-60],
        "012345",
        r"6 \(line 104\): cut off: the file ends inside it \(\d+ bytes lost;",
    ),
    "cut between elements": ("a.json", ARRAY[:-1], ALL, r"element 7 \(line 1\): the array is not closed, though"),
    "no list around it": (
        "a.json",
        json.dumps(MESSAGES).encode(),
        "",
        "element 0 .*is this a list of messages without",
    ),
    "UTF-16": ("a.json", json.dumps(RECORDS).encode("utf-16"), "", "UTF-16 text; save it as UTF-8"),
    "UTF-16 without a mark": ("a.json", json.dumps(RECORDS).encode("utf-16-le"), "", "UTF-16 text"),
    "UTF-16 table": ("a.csv", "chat,role,text\r\n".encode("utf-16"), "", "UTF-16 text; save it as UTF-8"),
    "ZIP": ("a.zip", b"PK\3\4\x14\0\0\0" + LINES, "", r"a\.zip: a ZIP file; unpack it"),
    "gzip by another name": ("a.jsonl", gzip.compress(LINES), "", r"give its name the ending \.gz"),
    "empty": ("a.json", b" \n", "", r"a\.json: the file is empty"),
    "not text": ("a.json", bytes(range(256)) * 50, "", "a record cannot start with b'\\\\x00'"),
    "cut gzip": ("a.gz", gzip.compress(LINES * 50)[:-400], None, r"a\.gz: the compressed data is cut off"),
    "damaged gzip": ("a.gz", gzip.compress(LINES, 0)[:900] + b"junk" * 30, None, r"a\.gz: .* is (damaged|cut off)"),
    "not gzip": ("a.json.gz", LINES, "", "the compressed data is damaged: .*incorrect header"),
    "cut zstd": ("a.zst", zstandard.compress(LINES * 50)[:-10], None, r"a\.zst: the compressed data is cut off"),
    "not zstd": ("a.jsonl.zst", LINES, "", "the compressed data is damaged"),
}


@pytest.mark.parametrize("read_bytes", [1 << 20, 31])
class TestDamage:
    def check(self, path, kept, said):
        ids, report = read(path, max_record_bytes=20_000 if "longer than" in said else 16 << 20)
        assert kept is None or ids == [f"c{number}" for number in kept]
        problems = [text for texts in report.problems.values() for text in texts]
        assert sum(report.damaged.values()) == len(problems)
        assert re.search(said, "\n".join(problems), re.MULTILINE), problems
        with pytest.raises(DamagedRecord) as caught:
            list(load_conversations(path, strict=True, max_record_bytes=20_000 if "longer than" in said else 16 << 20))
        assert str(caught.value) in problems

    @pytest.fixture(autouse=True)
    def _reads(self, monkeypatch, read_bytes):
        monkeypatch.setattr(json_records, "READ_BYTES", read_bytes)

    @pytest.mark.parametrize("case", BAD_LINES)
    def test_of_a_line(self, tmp_path, case):
        line, said = BAD_LINES[case]
        line = line if isinstance(line, bytes) else json.dumps(line).encode()
        data = lines(RECORDS[:1]) + line + b"\n" + lines(RECORDS[1:2])
        self.check(write(tmp_path, "a.jsonl", data), "01", rf"a\.jsonl:2: {said}")

    @pytest.mark.parametrize("case", BAD_ELEMENTS)
    def test_of_an_element(self, tmp_path, case):
        old, new, kept, said = BAD_ELEMENTS[case]
        assert old in ARRAY
        self.check(write(tmp_path, "a.json", ARRAY.replace(old, new, 1)), kept, said)

    @pytest.mark.parametrize("case", BAD_FILES)
    def test_of_a_file(self, tmp_path, case):
        name, data, kept, said = BAD_FILES[case]
        self.check(write(tmp_path, name, data), kept, said)

    def test_of_a_list_among_lists_of_messages(self, tmp_path):
        data = json.dumps([r["messages"] for r in RECORDS]).encode().replace(b'"2 user', b"2 user", 1)
        found = list(load_conversations(write(tmp_path, "a.json", data), report=LoadReport()))
        assert [c.messages for c in found] == [r["messages"] for r in RECORDS if r is not RECORDS[2]]

    def test_of_the_first_line_does_not_hide_the_others(self, tmp_path, read_bytes):
        """Without the suffix .jsonl the layout is told by the text, as far as it is read."""
        first = LINES[:40] + b'{"a":' * 500 + LINES[40:]
        ids, report = read(write(tmp_path, "chats.json", first[: first.index(b"\n") + 1] + lines(RECORDS[1:3])))
        assert ids == ["c1", "c2"] and sum(report.damaged.values()) == 1


class TestReports:
    def test_what_precedes_a_cut_in_compressed_data_is_kept(self, tmp_path):
        packed = {"gz": gzip.compress(lines(RECORDS * 300), 6), "zst": zstandard.compress(lines(RECORDS * 3000))}
        for suffix, data in packed.items():
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
            (".", r"holds no file that ends in \.json"),
        ],
    )
    def test_not_there(self, source, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=message):
            list(load_conversations(source))

    @pytest.mark.parametrize("package", ["zstandard", "pyarrow", "datasets"])
    def test_missing_package_is_named(self, tmp_path, package, monkeypatch):
        packed = write(tmp_path, "a.json.zst", zstandard.compress(lines()))
        sources = {"zstandard": packed, "pyarrow": parquet(tmp_path / "a.parquet"), "datasets": "org/name"}
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
