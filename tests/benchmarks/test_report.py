"""docs/performance.md says what the results files say."""

from __future__ import annotations

import pytest

from benchmarks import report


def test_the_page_is_what_the_files_say():
    assert report.PAGE.read_text("utf-8") == report.page(), "run: python -m benchmarks.report"


def test_every_theme_has_a_file_and_every_plot_is_there():
    text = report.PAGE.read_text("utf-8")
    for prefix, _, bars in report.THEMES:
        path = report.newest(prefix)
        assert path is not None, prefix
        assert path.name in text
        if bars is not None:
            assert (report.PLOTS / f"{prefix}.png").stat().st_size > 1000


def test_the_newest_file_of_a_theme_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name in ("a_b_2026-01-02", "a_b_2026-03-01", "a_b_c_2027-01-01", "a_b"):
        (tmp_path / f"{name}.md").write_text("# x\n")
    assert report.newest("a_b").name == "a_b_2026-03-01.md"
    assert report.newest("none") is None


def test_a_plot_of_ratios(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw([("kl", "TRL", 2.0), ("kl", "Liger", 1.5), ("jsd", "TRL", 3.0)], "x", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_bars_of_steps_and_stages():
    runs = [
        {
            "kind": "time",
            "template": "t",
            "conversation": 1,
            "seconds": {"official": [8.0], "a": [2.0]},
        },
        {"kind": "time", "template": "t", "conversation": 1, "seconds": {"a": [4.0]}},
        {"kind": "time", "template": "t", "conversation": 2, "seconds": {"a": [4.0]}},
        {"kind": "memory", "gib": {}},
    ]
    assert report._of_runs({"runs": runs}) == [("t, conversation 1", "a", 8 / 3)]
    rows = [{"stage": "load", "who": who, "seconds": s} for who, s in (("x", 1.0), ("fastsdpo", 2.0))]
    assert report._of_stages({"rows": rows}) == [("load", "x", 0.5)]


def test_a_theme_without_a_file_is_left_out(monkeypatch):
    monkeypatch.setattr(report, "THEMES", [("no_such_theme", "", None), ("traffic", "", None)])
    text = report.page()
    assert "no_such_theme" not in text
    assert "traffic_" in text
