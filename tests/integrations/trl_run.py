"""TRL's tests in this process, one run of them; `trl_tests` starts it by its path, in a process of its own.

    python tests/integrations/trl_run.py FOLDER (unpatched | auto | hidden | logits) [pytest's arguments]

FOLDER has TRL's folder ``tests``. This repository has one too, so nothing of it may be imported as ``tests``.
"""

import functools
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

FILES = (
    "test_distillation_trainer.py",
    "experimental/test_async_distillation_trainer.py",
    "experimental/test_distillation_trainer.py",
    "experimental/test_gkd_trainer.py",
    "experimental/test_gold_trainer.py",
    "experimental/test_iw_opd_trainer.py",
    "experimental/test_sdft_trainer.py",
    "experimental/test_sdpo_trainer.py",
    "experimental/test_self_distillation_trainer_behavior.py",
    "experimental/test_server_distillation_trainer.py",
)
UNPATCHED = "unpatched"


class Outcomes:
    """A plugin of pytest: of every test its outcome, the reason where it did not pass, and whether it called us."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, object]] = {}
        self.calls = 0
        from fastsdpo.ops import rows

        implementation = rows.implementation

        def counting(backend: str):
            self.calls += 1
            return implementation(backend)

        rows.implementation = counting  # every loss and log-prob passes here

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        before = self.calls
        result = yield
        self.found[item.nodeid]["ours"] = self.calls > before
        return result

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            why = str(report.longrepr).strip().splitlines()[-1].removeprefix("E").strip()
            self.found[report.nodeid] = {"outcome": report.outcome, "why": why[:300], "ours": False}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        why = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]
        elif report.skipped:
            why = getattr(report, "wasxfail", "") or report.longrepr[2]
        self.found[report.nodeid] = {"outcome": report.outcome, "why": why[:300]}


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.removeprefix("is_").removesuffix("_available")) is not None


def main(folder: str, name: str, *rest: str) -> int:
    """Leaves FOLDER/NAME.json behind: `Outcomes.found`."""
    import datasets
    import trl_hub

    # What the tests of TRL 1.10 import and 1.16 has elsewhere or no more: a class, and `is_..._available` of packages.
    moved = importlib.import_module("trl.experimental.iw_opd.iw_opd_trainer")
    sys.modules.setdefault("trl.experimental.distillation.distillation_trainer", moved)
    importlib.import_module("trl.import_utils").__getattr__ = lambda name: functools.partial(is_installed, name)
    datasets.load_dataset = trl_hub.load_dataset
    if name != UNPATCHED:
        from fastsdpo.integrations.trl import patch_trl

        patch_trl(name)
    outcomes = Outcomes()
    os.chdir(folder)
    files = [f"tests/{file}" for file in FILES if Path("tests", file).exists()]
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", folder, "-c", os.devnull]
    status = pytest.main([*options, "--continue-on-collection-errors", *files, *rest], [outcomes])
    Path(f"{name}.json").write_text(json.dumps(outcomes.found, indent=1), "utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
