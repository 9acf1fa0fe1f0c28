"""`fastsdpo prepare --workers`, with and without orjson: the same bytes, the same errors, nothing left behind."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastsdpo
from fastsdpo.commands.prepare import main
from fastsdpo.data import reading, workers
from fastsdpo.data.spool import Spool
from tests.data.conftest import chat

# What the two parsers of JSON could see differently, and what the two writers could write differently.
TEXTS = [
    *('"', "\\", "/", "\b\f\n\r\t", "\0\x01\x1f\x7f\x80\x9f", "\u2028\u2029", "é日🤖", "e\u0301", "\ufeff", "<\x7f>"),
    *(" \t ", "\u200b", "x" * 3000),
]
RAW = [
    *(b'{"id": 123456789012345678901234567890, ', b'{"id": 18446744073709551615, ', b'{"id": -0, "x": -0.0, '),
    *(b'{"id": 1e2, "x": NaN, ', b'{"id": "\\ud800", "x": Infinity, ', b'{"id": 1, "id": 2, "x": 1e400, '),
    *(b'{"x": ' + b"[" * 900 + b"]" * 900 + b", ", b'\xef\xbb\xbf{"id": 3, ', b'{"id": 01, ', b'{"id": "\xff", '),
]


SHARES = ("--eval-fraction", 0.2, "--shuffle", "--layout", "trl", "--keep", "session_id,x")


def line(number, turns=2, **more):
    record = {"messages": chat(*(f"{number}.{n} é" * 3 for n in range(2 * turns + 1))), **more}
    return json.dumps(record, ensure_ascii=False).encode()


@pytest.fixture
def sources(tmp_path):
    """Files whose lines are cut into pieces, beside some that are read whole; two conversations are in both."""
    special = [json.dumps({"messages": chat(f"{n}{text}", text, "o")}).encode() for n, text in enumerate(TEXTS)]
    messages = json.dumps({"messages": chat("q", "y", "o")}).encode()[1:]
    files = {  # three lines of blanks and a mark, texts, a system prompt, a line of many pieces, no end of line
        "a.jsonl": b"\xef\xbb\xbf\n \n" + b"\n".join([line(0), b"", *special, line(1, system="s"), line(1, 30)]),
        "b.jsonl": b"\r\n".join([line(2), b"{broken", line(3, id="x"), b"\xff", *(raw + messages for raw in RAW)]),
        "c.json": json.dumps([json.loads(line(n, id="x")) for n in (2, 4)]).encode(),
        "d.jsonl.gz": gzip.compress(b"\n".join([line(n) for n in range(40, 45)])),
        "e.jsonl": b"",
        "f.ndjson": b"\n".join([line(n, 1 + n % 3, session_id=f"s{n % 7}") for n in range(5, 40)]) + b"\n\n",
    }
    rows = [{"session": f"g{n % 2}", **message} for message in chat(*"quyoya") for n in range(2)]
    files["g.jsonl"] = b"\n".join(json.dumps(row).encode() for row in rows)  # a message a line: not to be cut
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def outcome(tmp_path, sources, monkeypatch, capsys):
    """outcome(*argv): status and text of the command, and the bytes of its files without their settings."""
    monkeypatch.setattr(workers, "PIECE_BYTES", 700)  # shorter than some lines

    def run(*argv):
        capsys.readouterr()
        argv = [str(sources), "-o", str(tmp_path / "out.jsonl"), "--preset", "none", "--overwrite", *map(str, argv)]
        status = main(argv)
        said = capsys.readouterr()
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("out")}
        for path in tmp_path.glob("out*"):
            path.unlink()
        return status, said.out, said.err, files

    return run


def test_any_number_of_workers_gives_the_same(outcome, monkeypatch):
    """Rows, counts, and the places in messages."""
    alone = outcome("--workers", 1, *SHARES)
    assert alone[0] == 0 and len(alone[3]) == 3
    report = json.loads(alone[3]["out.report.json"])
    # The wrong layout is a value that is nested too deep to be kept.
    empty = "nothing but follow-ups to an empty answer"
    damaged = {empty: 6, "not JSON": 3, "invalid UTF-8": 2, "wrong layout": 1, "damaged file": 1}
    assert report["damaged"] == damaged
    assert report["problems"]["invalid UTF-8"][0].endswith("b.jsonl:4: invalid UTF-8 at byte 0")
    assert report["merged_records"] == 36 and report["interactions"] + report["eval_interactions"] > 113
    for count in (2, 3):
        assert outcome("--workers", count, *SHARES) == alone
    # Most conversations take a short way to their rows and keys; the long one gives the same.
    with monkeypatch.context() as patch:
        patch.setattr(reading, "ordinary", lambda *arguments: None)
        patch.setattr(reading, "whole_turns", lambda *arguments: None)
        assert outcome("--workers", 1, *SHARES) == alone
    few = [("--limit", 9), ("--max-conversations", 4), ("--strict",)]
    assert [outcome("--workers", 2, *argv) for argv in few] == [outcome("--workers", 1, *argv) for argv in few]


def test_orjson_changes_nothing(outcome, tmp_path, sources):
    """The command in a process that has no orjson."""
    pytest.importorskip("orjson")
    with_it = outcome("--workers", 1, "--eval-fraction", 0.2)
    code = f"""
import sys, types
package = types.ModuleType("fastsdpo")
package.__path__ = [{str(Path(fastsdpo.__file__).parent)!r}]
sys.modules.update(fastsdpo=package, orjson=None)
from fastsdpo.commands.prepare import main
sys.exit(main(sys.argv[1:]))
"""
    argv = [sources, "-o", tmp_path / "out.jsonl", "--preset", "none", "--overwrite", "--eval-fraction", "0.2"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == with_it[:3]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == with_it[3]


HOOKS = """
import os, signal

def hide(text):
    print("this is no answer")
    return text.replace("5", "#")

def die(text):
    if text.startswith("20."):
        os.kill(os.getpid(), signal.SIGKILL)
    return text

def fail(text):
    return {}[text] if text.startswith("30.") else text

def nothing(text):
    return None

VERSION = "1"
"""


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    """The module `redacting` in the current folder, which only this test imports."""
    (tmp_path / "redacting.py").write_text(HOOKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "redacting", raising=False)


def test_redacted_texts(outcome, hooks, tmp_path):
    plain = outcome("--workers", 1)[3]["out.jsonl"]
    one, two = (outcome("--workers", count, "--redact", "redacting:hide") for count in (1, 2))
    assert one[0] == 0 and one[1].replace("this is no answer\n", "") == two[1] and one[3] == two[3]
    texts = [[m["content"] for m in json.loads(row)["prompt"]] for row in one[3]["out.jsonl"].splitlines()]
    assert b"5." in plain and not any("5" in text for row in texts for text in row)
    settings = json.loads(one[3]["out.report.json"])["settings"]
    assert settings["redact"][0] == "redacting:hide" and settings["redact"][1] == len(HOOKS)


def test_published_selections_are_redacted(hooks, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"conversation": chat("5", "y 5", "o 5"), "language": "English"}))
    argv = ["in.jsonl", "-o", "out.jsonl", "--preset", "paper-wildchat", "--redact", "redacting:hide"]
    assert main(argv) == 0 and '"content":"y #"' in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("redacting:fail", "--redact redacting:fail failed at {folder}/f.ndjson:26: KeyError: '30.0"),
        ("redacting:nothing", "failed at {folder}/a.jsonl:3: TypeError: it must return text, got NoneType"),
        ("redacting:absent", "--redact redacting:absent cannot be loaded: AttributeError"),
        ("absent:hook", "--redact absent:hook cannot be loaded: ModuleNotFoundError"),
        ("redacting:VERSION", "--redact must name a function, got 'redacting:VERSION', a str"),
        ("redacting", "--redact must be module:function, got 'redacting'"),
        ("__main__:hide", "--redact must name a module that other processes can import"),
    ],
)
def test_a_hook_that_fails_stops_the_run(outcome, hooks, sources, hook, said, count):
    status, _, error, files = outcome("--workers", count, "--redact", hook)
    assert status == 1 and said.format(folder=sources) in error and not files


def test_a_worker_that_is_killed(outcome, hooks):
    status, _, error, files = outcome("--workers", 2, "--redact", "redacting:die")
    assert status == 1 and "a worker was killed by signal 9" in error and not files


def test_ctrl_c_ends_the_workers(outcome, monkeypatch):
    started = []
    end = workers.Workers._end
    monkeypatch.setattr(workers.Workers, "_end", lambda pool: started.extend(pool._processes) or end(pool))

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Spool, "add", interrupted)
    status, _, error, files = outcome("--workers", 2)
    assert status == 130 and "interrupted" in error and not files
    assert len(started) == 2
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


# Stands for the download alone: a dataset's name is a folder here, and all else is the package's.
HUB = """
import sys
here = sys.path.index({here!r})
sys.path.pop(here)
del sys.modules["datasets"]
import datasets
sys.path.insert(here, {here!r})
from_hub = datasets.load_dataset
datasets.load_dataset = lambda name, *given, **more: from_hub({{"org/name": {folder!r}}}[name], *given, **more)
"""


@pytest.mark.parametrize("apart", [True, False])
def test_shards_of_a_dataset(tmp_path, monkeypatch, apart):
    """The files of a streamed dataset go round to the workers; rows of one message each do not."""
    datasets = pytest.importorskip("datasets")
    folder, hub = tmp_path / "data", tmp_path / "hub"
    for path in (folder, hub):
        path.mkdir()
    for number in range(3):
        rows = [json.loads(line(10 * number + n)) for n in range(4)]
        if not apart:
            rows = [{"session": f"s{number}{n}", **m} for n, row in enumerate(rows) for m in row["messages"]]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"train-0000{number}-of-00003.parquet")
    (hub / "datasets.py").write_text(HUB.format(here=str(hub), folder=str(folder)))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    from_hub = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda _, *given, **more: from_hub(str(folder), *given, **more))
    monkeypatch.syspath_prepend(str(hub))  # for the workers
    monkeypatch.chdir(tmp_path)
    read = []
    whole = workers.cut
    monkeypatch.setattr("fastsdpo.data.prepare.cut", lambda *given: (read.append(p) or p for p in whole(*given)))
    found = []
    for count in ("1", "2"):
        assert main(["org/name", "-o", f"out{count}.jsonl", "--workers", count, "--quiet"]) == 0
        found.append((tmp_path / f"out{count}.jsonl").read_bytes())
    assert found[0] == found[1] and found[0].count(b"\n") == 24
    assert [piece.shard for piece in read] == ([0, 1, 2] if apart else [None])
    assert (b"name[train] shard 1 row 3" in found[0]) == apart
