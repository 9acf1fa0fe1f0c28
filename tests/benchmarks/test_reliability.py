"""docs/reliability.md says what the results files say, and the files say that nothing was lost."""

from __future__ import annotations

import re

import pytest

from benchmarks import compatibility, reliability


def test_the_page_is_what_the_files_say():
    assert reliability.PAGE.read_text("utf-8") == reliability.page(), "run: python -m benchmarks.reliability"


def test_every_row_is_in_one_section_and_nothing_was_lost():
    rows, _ = reliability.collect("reliability")
    for name, row in rows.items():
        sections = [part.title for part in reliability.SECTIONS if re.search(part.rows, name)]
        assert len(sections) == 1, name
        assert row["lost"] == 0, name
        assert row["survived"] == row["tried"], name


def test_the_long_counts_are_recorded():
    rows, _ = reliability.collect("reliability")
    kills = [row["faults"] for name, row in rows.items() if name.startswith("SIGKILL")]
    assert len(kills) == 3
    assert sum(kills) >= 50
    files = rows["mutated conversation files through `prepare` and the tokenizer"]
    assert files["tried"] >= 1000


def test_every_version_that_was_tried_works():
    rows, _ = reliability.collect("compatibility")
    assert {"oldest of all", "newest of all"} <= rows.keys()
    assert {f"Triton {version or 'newest'}" for version in compatibility.TRITONS} <= rows.keys()
    for name, row in rows.items():
        assert row["installed"], name
        assert not compatibility.bad(row), name


def test_the_oldest_versions_are_those_of_the_package():
    text = (reliability.ROOT / "pyproject.toml").read_text("utf-8")
    for name, version in compatibility.OLDEST.items():
        found = re.search(rf'"{name}>=([\d.]+)', text)
        assert found, name
        assert found[1] == version


@pytest.mark.parametrize("problem", ["tests", "doctor", "compiled"])
def test_a_failure_shows(problem):
    row = {
        "installed": True,
        "tests": {"failed": {}},
        "doctor": {"wrong": 0},
        "compiled": {"failed": {}},
    }
    assert not compatibility.bad(row)
    row[problem] = {"wrong": 1} if problem == "doctor" else {"failed": {"a": "b"}}
    assert compatibility.bad(row)
    assert not compatibility.bad({"installed": False})
