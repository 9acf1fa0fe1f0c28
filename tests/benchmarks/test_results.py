"""Results files, the ratios in them, and the pages that are made from them."""

import json
import re

import pytest

from benchmarks import compare, compatibility, coverage, distributed, gained, harness, reliability, report

DRAWS = True
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


def test_a_table_of_what_is_gained(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    marked = "before\n<!-- gained: peers peer=swift -->\n{}<!-- end -->\nafter\n"
    assert "Not measured yet: `PYTHONPATH=build/peers/swift python" in gained.page(marked.format(""))
    case = {"peer": "swift", "loss": "jsd", "tokens": 256, "vocabulary": 512, "hidden": 36}
    rivals = {"ms-swift": {"median": 2.0, "peak_bytes": 4}, "ours": {"median": 0.5, "peak_bytes": 3}}
    other = {"case": {**case, "peer": "axolotl"}, "rivals": rivals}
    harness.record(tmp_path / "peers_x.json", [{"case": case, "rivals": rivals}, other], RUN)
    found = gained.page(marked.format("old\n"))
    assert found.count("| jsd | 0.25 | 0.75 |") == 1 and "old" not in found
    assert gained.page(found) == found and found.startswith("before") and found.endswith("after\n")


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


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    harness.record(tmp_path / "logits_x.json", [losses()], RUN)
    assert report.main(["--plot", str(tmp_path / "logits_x.json")]) == 0
    assert (tmp_path / "logits_x.png").read_bytes().startswith(b"\x89PNG")


def test_the_matrix_of_launches(tmp_path):
    """Of what pytest says of its tests, a cell for each variant and strategy."""
    report = tmp_path / "report.xml"
    cases = {
        'classname="tests.trainer.test_launched" name="test_fsdp2[lora]"': "",
        'classname="tests.trainer.test_launched" name="test_ddp[lora]"': "<skipped/>",
        'classname="tests.trainer.test_deepspeed" name="test_one_process[zero3-tied]"': "<failure/>",
        'classname="tests.trainer.test_launch_refusals" name="test_settings[0]"': "",
    }
    body = "".join(f"<testcase {about}>{result}</testcase>" for about, result in cases.items())
    report.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    rows = [{"case": {"test": test}, "result": result} for test, result in distributed.read_tests(report).items()]
    table = distributed.matrix(rows)
    assert "| `lora` | skipped | same |  |  |  |  |  |" in table and "| `tied` |  |  |  |  |  |  | failed |" in table
    assert "2 passed, 1 skipped, 1 failed" in table


def test_the_page_of_model_types():
    rows = harness.read(harness.RESULTS / "coverage_cpu.json")
    assert coverage.PAGE.read_text("utf-8") == coverage.page(rows)
    verdicts = {row["case"]["type"]: row["verdict"] for row in rows}
    assert "WRONG" not in verdicts.values()
    for family, names in coverage.FAMILIES.items():
        assert {verdicts[name] for name in names.split()} == {"shared"}, family
    built = [verdict for verdict in verdicts.values() if verdict != "not built"]
    assert built.count("shared") >= 0.9 * len(built)
