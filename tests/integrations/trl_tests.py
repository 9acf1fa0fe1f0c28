"""TRL's own tests of its distilling trainers, without fastsdpo and with `patch_trl`: the outcomes must be the same.

    python -m tests.integrations.trl_tests CHECKOUT [--record] [pytest's arguments]      # make trl-tests TRL=CHECKOUT

CHECKOUT is https://github.com/huggingface/trl; TRL's wheel and source distribution have no tests. They run against the
TRL that is installed, so take the checkout of its version: tests of another one fail where the trainers' arguments
differ, with us and without us alike. Models and data sets of the hub are made by `trl_hub`, so nothing is downloaded.

Of each run it is counted how many tests computed with fastsdpo: what never calls us proves nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import harness
from tests.integrations import trl_hub, trl_run
from tests.integrations.trl_run import FILES, UNPATCHED

RUNS = (UNPATCHED, "auto", "logits")  # of the others: `patch_trl`'s source
# Tests whose outcome may be another one, by the last digits of float32.
KNOWN = {
    "::test_symmetry": "two sums are compared bit by bit",
    "test_iw_opd_trainer.py::TestIWOPDTrainer::test_distillation_trainer_train_runs_with_local_teacher": "the loss of "
    "equal models, 0 up to rounding of either sign, must not be below 0",
}
FOLDER = harness.ROOT / "build/trl"
RESULTS = harness.RESULTS / "tests_of_trl_cpu.json"


def all_runs(checkout: Path, runs: list[str], rest: list[str]) -> dict[str, Any]:
    """The outcomes of each run, two at a time. Only the tests are copied: the checkout's own package does not run."""
    if checkout.resolve() != FOLDER:
        shutil.rmtree(FOLDER / "tests", ignore_errors=True)
        shutil.copytree(checkout / "tests", FOLDER / "tests")
        shutil.copy(checkout / "VERSION", FOLDER)
    home = FOLDER / "home"
    trl_hub.make(home)
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
    paths = os.pathsep.join(filter(None, (str(harness.ROOT), os.environ.get("PYTHONPATH"))))

    def run(name: str) -> Any:
        found = FOLDER / f"{name}.json"
        found.unlink(missing_ok=True)
        with (FOLDER / f"{name}.log").open("w") as log:
            command = [sys.executable, trl_run.__file__, str(FOLDER), name, *rest]
            environment = {**os.environ, **offline, **threads, "PYTHONPATH": paths}
            subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if not found.exists():
            raise SystemExit(f"{name}: TRL's tests did not come to an end, see {log.name}")
        return json.loads(found.read_text("utf-8"))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(runs, pool.map(run, runs)))


def compared(found: dict[str, Any], name: str) -> dict[str, Any]:
    """What is recorded of a run: counts by outcome and reason, and the tests that have another outcome without us."""
    plain, run = found[UNPATCHED], found[name]
    kinds = Counter(row["outcome"] for row in run.values())
    whys = Counter(f"{row['outcome']}: {row['why'][:100]}" for row in run.values() if row["outcome"] != "passed")
    other = sorted(
        test.removeprefix("tests/")
        for test in {*plain, *run}
        if test not in plain or test not in run or plain[test]["outcome"] != run[test]["outcome"]
    )
    return {**kinds, "with fastsdpo": sum(row["ours"] for row in run.values()), "differ": other, "reasons": whys}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of TRL, with its folder tests")
    parser.add_argument("--runs", nargs="+", choices=RUNS[1:], default=list(RUNS[1:]), help="patch_trl's source")
    parser.add_argument("--record", action="store_true", help=f"write to {RESULTS.relative_to(harness.ROOT)}")
    args, rest = parser.parse_known_args()
    if not (args.checkout / "tests" / FILES[-1]).exists():
        parser.error(f"{args.checkout} must be a checkout of TRL: it has no tests/{FILES[-1]}")
    found = all_runs(args.checkout, [UNPATCHED, *args.runs], rest)
    tests = f"TRL {(FOLDER / 'VERSION').read_text('utf-8').strip()}"
    unknown, rows = [], []
    for name in found:
        row = compared(found, name)
        counts = ", ".join(f"{count} {what}" for what, count in row.items() if isinstance(count, int))
        print(f"{name}: {counts}, {len(row['differ'])} other than unpatched")
        for test in row["differ"]:
            why = next((why for known, why in KNOWN.items() if known in test), None)
            unknown += [test] if why is None else []
            print(f"  {test}: {why or found[name].get(test)}")
        rows.append({"case": {"tests": tests, "installed": f"TRL {version('trl')}", "run": name}, **row})
    if args.record:
        harness.record(RESULTS, rows)
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
