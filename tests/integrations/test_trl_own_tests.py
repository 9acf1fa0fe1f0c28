"""A sample of TRL's own tests, with us and without (all of them: `make trl-tests TRL=CHECKOUT`)."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("trl")

from tests.integrations.trl_tests import FOLDER, UNPATCHED, compared


def test_what_differs_is_counted():
    passed, failed = {"outcome": "passed", "why": "", "ours": True}, {"outcome": "failed", "why": "no", "ours": False}
    found = {
        UNPATCHED: {"tests/a": passed, "tests/b": passed, "tests/c": failed},
        "auto": {"tests/a": passed, "tests/b": failed, "tests/c": failed, "tests/d": failed},
    }
    row = compared(found, "auto")
    assert row == {"passed": 1, "failed": 3, "with fastsdpo": 1, "differ": ["b", "d"], "reasons": {"failed: no": 3}}
    assert compared(found, UNPATCHED)["differ"] == []


def test_a_sample_of_trls_own_tests():
    if not (FOLDER / "tests").exists():
        pytest.skip("needs a checkout of TRL, whose packages have no tests: make trl-tests TRL=CHECKOUT")
    command = ["-m", "tests.integrations.trl_tests", str(FOLDER), "--runs", "auto", "-k", "positional_config_argument"]
    done = subprocess.run([sys.executable, *command], cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = re.findall(r"^(unpatched|auto): (\d+) passed, .*(\d) with fastsdpo, 0 other", done.stdout, re.MULTILINE)
    assert counts == [("unpatched", "1", "0"), ("auto", "1", "1")]
