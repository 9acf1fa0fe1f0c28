"""Ratios of two runs, on made-up results."""

from __future__ import annotations

import json

import pytest

from benchmarks import _harness, compare


def losses(scale=1.0, **medians):
    names = {"native fused": 1.0, "TRL": 8.0, "torch.compile": 4.0, **medians}
    rivals = {
        name: {"median": scale * seconds, "peak_bytes": 2**30 if name == "TRL" else 2**28}
        for name, seconds in names.items()
    }
    row = {"dtype": "float32", "tokens": 512, "vocabulary": 49152, "mode": "jsd", "rivals": rivals}
    return {"rows": [row]}


def test_a_machine_twice_as_fast_has_the_same_ratios():
    count, outside = compare.compare(losses(0.5), losses())
    assert (count, outside) == (4, [])


def test_a_ratio_outside_is_named():
    count, outside = compare.compare(losses(TRL=10.0), losses())
    assert count == 4
    ((name, before, after),) = outside
    assert name.endswith("mode=jsd: time: TRL / native fused")
    assert "tokens=512 vocabulary=49152" in name
    assert (before, after) == (8.0, 10.0)
    assert compare.compare(losses(TRL=10.0), losses(), within=0.3)[1] == []


def test_cases_and_rivals_of_one_file_only_do_not_count():
    new = losses(Liger=3.0)
    new["rows"].append({**new["rows"][0], "tokens": 64})
    assert compare.compare(new, losses())[0] == 4
    other = losses()
    other["rows"][0]["mode"] = "sampled"
    assert compare.compare(other, losses()) == (0, [])


def test_the_base_is_the_recorded_one():
    """Where the new run lacks it, there is nothing to compare."""
    new = losses()
    del new["rows"][0]["rivals"]["native fused"]
    assert compare.compare(new, losses()) == (0, [])


def test_rows_with_one_rival_each_and_small_peaks():
    def rows(ours, peak=2**20):
        base = {"case": "topk", "shape": "512", "peak_bytes": peak}
        return {"rows": [{**base, "who": "TRL", "seconds": 2.0}, {**base, "who": "hidden", "seconds": ours}]}

    assert compare.ratios(rows(1.0)) == {"case=topk shape=512: time: hidden / TRL": 0.5}
    assert len(compare.ratios(rows(1.0, 2**28))) == 2
    assert compare.compare(rows(1.2), rows(1.0))[1]


def test_runs_of_a_conversation_are_pooled():
    def runs(*ours):
        run = {"kind": "time", "template": "smollm2", "conversation": 3, "threads": 2}
        memory = {**run, "kind": "memory", "gib": {"official": [1, 8.0], "conversation": [1, 2.0]}}
        return {"runs": [{**run, "seconds": {"official": [4.0], "conversation": [s]}} for s in ours] + [memory]}

    found = compare.ratios(runs(1.0, 2.0, 9.0))
    assert sorted(found.values()) == [0.25, 0.5]
    assert compare.compare(runs(2.0), runs(1.0, 2.0, 9.0)) == (2, [])


def test_processes():
    rows = [
        {"shape": "s", "batch": 16, "processes": p, "threads": t, "seconds": s}
        for p, t, s in ((1, 1, 4.0), (2, 1, 2.5), (1, 2, 3.0))
    ]
    found = compare.ratios({"rows": rows})
    assert found == {
        "shape=s batch=16: time: 2 processes of 1 / 1 processes of 1": 0.625,
        "shape=s batch=16: time: 1 processes of 2 / 1 processes of 1": 0.75,
    }


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    for date, data in (("2026-01-01", losses(TRL=99.0)), ("2026-02-01", losses())):
        (tmp_path / f"logits_cpu_{date}.json").write_text(json.dumps(data))
    new = tmp_path / "new" / "logits_cpu.json"
    new.parent.mkdir()
    new.write_text(json.dumps(losses(TRL=8.5)))
    assert compare.main([str(new)]) == 0
    assert "4 ratios in common, 0 differ by more than 15%" in capsys.readouterr().out
    new.write_text(json.dumps(losses(TRL=4.0)))
    assert compare.main([str(new)]) == 1
    assert "TRL / native fused | 8.00 | 4.00 | -50% |" in capsys.readouterr().out
    assert compare.recorded_file(tmp_path / "linear_cpu.json") is None


@pytest.mark.parametrize("path", sorted(_harness.RESULTS.glob("*_cpu*.json")), ids=lambda p: p.stem)
def test_recorded_files_are_read(path):
    """Every results file of times has ratios, the same as itself."""
    data = json.loads(path.read_text())
    if not path.stem.startswith(
        ("logits", "linear", "memory", "sharing", "trl", "integrations", "data", "processes", "models")
    ):
        pytest.skip("no times")
    assert compare.ratios(data)
    assert compare.compare(data, data)[1] == []
