"""`benchmarks.ptx`: its results are kept per cell, and its counts are of the library's launches."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("compiles: not in the interpreter", allow_module_level=True)

from benchmarks import ptx


def test_a_part_is_kept_and_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ptx, "RESULTS", tmp_path / "ptx.json")
    monkeypatch.setattr(ptx, "ProcessPoolExecutor", InThisProcess)
    arguments = ["ptx", "--quick", "--names", "log-ratio / bf16 / sm_90 / packed"]
    monkeypatch.setattr("sys.argv", arguments)
    assert ptx.main() == 0
    assert "1 cells, 1 of them to run" in capsys.readouterr().out
    text = (tmp_path / "ptx.md").read_text()
    assert "| sm_90 | bf16 | 4 |" in text
    assert ptx.main() == 0
    assert "1 cells, 0 of them to run" in capsys.readouterr().out
    monkeypatch.setattr(ptx, "sources", lambda: "other kernels")
    assert ptx.main() == 0
    assert "1 cells, 1 of them to run" in capsys.readouterr().out


def test_bytes_are_those_of_the_algorithm():
    found = ptx.count("sampled", "bf16", 90, 32000)
    assert [*found] == ["statistics", "finish", "gradient"]
    for launch, read, written in (("statistics", 4, 0), ("finish", 0, 0), ("gradient", 2, 2)):
        assert found[launch]["read"] == pytest.approx(read, abs=0.02)
        assert found[launch]["written"] == pytest.approx(written, abs=0.02)
        assert found[launch]["spills"] == 0
    wide = found["gradient"]["accesses"]["st 16"]
    assert 16 * wide > 0.9 * 2 * 2 * 32000  # of bytes stored: the rest is a row's edge


class InThisProcess:
    def __init__(self, jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    map = staticmethod(map)
