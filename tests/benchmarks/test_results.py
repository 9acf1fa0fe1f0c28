"""Results files, the ratios in them, and the pages that are made from them."""

import json
import re

import pytest

from benchmarks import compare, compatibility, coverage, distributed, gained, harness, reliability, report

RUN = {"device": "d", "commit": "c", "date": "2026-01-01"}


def losses(mode="jsd", scale=1.0, **medians):
    names = {"native fused": 1.0, "TRL": 8.0, "torch.compile": 4.0, **medians}
    rivals = {
        name: {"median": scale * seconds, "peak_bytes": 2**30 if name == "TRL" else 2**28}
        for name, seconds in names.items()
    }
    return {"case": {"mode": mode, "tokens": 512}, "rivals": rivals}


def test_ratios_of_two_runs():
    assert compare.compare([losses(scale=0.5)], [losses()]) == (4, [])  # of a machine twice as fast
    count, ((name, before, after),) = compare.compare([losses(TRL=10.0)], [losses()])
    assert (count, before, after) == (4, 8.0, 10.0)
    assert '"mode": "jsd"' in name and name.endswith("time: TRL / native fused")
    assert compare.compare([losses(TRL=10.0)], [losses()], within=0.3)[1] == []
    assert compare.compare([losses(mode="sampled")], [losses()]) == (0, [])
    without = losses()
    del without["rivals"]["native fused"]  # the recorded base: nothing to compare with
    assert compare.compare([without], [losses()]) == (0, [])


def test_a_results_file_is_merged_by_case_and_compared(tmp_path, monkeypatch, capsys):
    path = tmp_path / "logits_x.json"
    harness.record(path, [losses(), losses("sampled")], RUN)
    harness.record(path, [losses(TRL=9.0)], {**RUN, "commit": "later"})
    rows = {row["case"]["mode"]: row for row in harness.read(path)}
    assert rows["jsd"]["rivals"]["TRL"]["median"] == 9.0 and rows["jsd"]["run"]["commit"] == "later"
    assert rows["sampled"]["run"] == RUN
    assert len(path.read_text().splitlines()) == 3 + 2 + 1 + 2  # one line for each run and row
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    new = tmp_path / "new" / "logits_cpu.json"
    harness.record(new, [losses(TRL=4.0)], RUN)
    assert compare.main([str(new)]) == 1
    assert "TRL / native fused | 9.00 | 4.00 | -56% |" in capsys.readouterr().out
    assert compare.main([str(new), str(new)]) == 0


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_files(path):
    assert path.stat().st_size < 400_000
    data = json.loads(path.read_text())
    if "runs" in data and any("rivals" in row for row in data["rows"]):
        assert compare.ratios(harness.read(path))
        assert compare.compare(harness.read(path), harness.read(path))[1] == []


def test_the_pages_are_what_the_files_say():
    assert report.PAGE.read_text("utf-8") == report.page(), "run: python -m benchmarks.report"
    assert len(report.page().splitlines()) <= 150
    text = distributed.PAGE.read_text("utf-8")
    assert text == distributed.page(text), "run: python -m benchmarks.distributed"
    text = reliability.PAGE.read_text("utf-8")
    assert text == reliability.page(text), "run: python -m benchmarks.reliability"
    for name, row in reliability.read().items():
        shown = [found for found in re.findall(r"<!-- rows: (.*?) -->", text) if re.search(found, name)]
        assert len(shown) == 1, name
        assert row["lost"] == 0 and row["survived"] == row["tried"], name


@pytest.mark.parametrize("path", gained.PAGES, ids=lambda path: path.stem)
def test_what_is_gained_is_what_the_files_say(path):
    text = path.read_text("utf-8")
    assert text == gained.page(text), "run: python -m benchmarks.gained"


def test_versions_that_were_tried():
    pyproject = (harness.ROOT / "pyproject.toml").read_text("utf-8")
    for name, version in compatibility.OLDEST.items():
        assert f'"{name}>={version}' in pyproject
    assert all((harness.ROOT / test).exists() for test in [*compatibility.TESTS, compatibility.INTERPRETED[0]])
    rows = json.loads((harness.RESULTS / "compatibility_cpu.json").read_text())["rows"]
    assert {*compatibility.COMBINATIONS} <= {row["name"] for row in rows} | {"as in constraints.txt"}
    assert not any(map(compatibility.bad, rows))
    good = {"installed": True, "tests": {"failed": {}}, "doctor": {"wrong": 0}, "compiled": {"failed": {}}}
    for problem in ({"tests": {"failed": {"a": "b"}}}, {"doctor": {"wrong": 1}}, {"compiled": {"failed": {"a": "b"}}}):
        assert compatibility.bad({**good, **problem}) and not compatibility.bad(good)


def test_the_page_of_model_types():
    rows = harness.read(harness.RESULTS / "coverage_cpu.json")
    assert coverage.PAGE.read_text("utf-8") == coverage.page(rows)
    verdicts = {row["case"]["type"]: row["verdict"] for row in rows}
    assert "WRONG" not in verdicts.values()
    for family, names in coverage.FAMILIES.items():
        assert {verdicts[name] for name in names.split()} == {"shared"}, family
    built = [verdict for verdict in verdicts.values() if verdict != "not built"]
    assert built.count("shared") >= 0.9 * len(built)
