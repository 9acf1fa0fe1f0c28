"""A sample of TRL's own tests, with us and without (all of them: `make trl-tests TRL=CHECKOUT`)."""

import re

import pytest

pytest.importorskip("trl")

from tests.integrations.trl_tests import FOLDER, UNPATCHED, compared, main


def test_what_differs_is_counted():
    passed, failed = {"outcome": "passed", "why": "", "ours": True}, {"outcome": "failed", "why": "no", "ours": False}
    found = {
        UNPATCHED: {"tests/a": passed, "tests/b": passed, "tests/c": failed},
        "auto": {"tests/a": passed, "tests/b": failed, "tests/c": failed, "tests/d": failed},
    }
    row = compared(found, "auto")
    assert row == {"passed": 1, "failed": 3, "with fastsdpo": 1, "differ": ["b", "d"], "reasons": {"failed: no": 3}}
    assert compared(found, UNPATCHED)["differ"] == []


def test_a_sample_of_trls_own_tests(monkeypatch, capsys):
    if not (FOLDER / "tests").exists():
        pytest.skip("needs a checkout of TRL, whose packages have no tests: make trl-tests TRL=CHECKOUT")
    monkeypatch.setattr("sys.argv", ["trl_tests", str(FOLDER), "--runs", "auto", "-k", "positional_config_argument"])
    assert main() == 0
    counts = re.findall(r"^(unpatched|auto): (\d+) passed, (\d) with fastsdpo, 0 other", capsys.readouterr().out, re.M)
    assert counts == [("unpatched", "1", "0"), ("auto", "1", "1")]
