"""Everything that needs a GPU in one go, and one results file of it (`make gpu`).

    python -m benchmarks.run_gpu            # all parts
    python -m benchmarks.run_gpu --quick    # the benchmark at small shapes

    tests       pytest -m gpu
    doctor      versions, devices, every kernel against float64, achieved bandwidth
    benchmark   the losses beside the peers'

Written to benchmarks/results/gpu_<device>_<date>.json and .md, also where a part fails; the exit
status is 1 then. Without a GPU nothing is run or written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks import _harness

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )


def run_tests(folder: Path, *arguments: str) -> dict[str, Any]:
    """Counts, and the message of each failure."""
    report = folder / "tests.xml"
    done = run("pytest", "-q", "-m", "gpu", f"--junitxml={report}", *arguments, "tests")
    if not report.exists():
        return {"ok": False, "problem": (done.stdout + done.stderr)[-2000:]}
    return {"ok": done.returncode == 0, **read_junit(report)}


def read_junit(path: Path) -> dict[str, Any]:
    """``{"passed", "skipped", "failed": {test: message}}`` of a JUnit XML file."""
    passed, skipped, failed = 0, 0, {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        if problem is not None:
            failed[f"{case.get('classname')}::{case.get('name')}"] = problem.get("message", "")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed}


def run_doctor() -> dict[str, Any]:
    done = run("fastsdpo", "doctor", "--json")
    try:
        return {"ok": done.returncode == 0, "report": json.loads(done.stdout)}
    except ValueError:
        return {"ok": False, "problem": (done.stdout + done.stderr)[-2000:]}


def run_benchmark(folder: Path, quick: bool) -> dict[str, Any]:
    arguments = ["--device", "cuda", "--output", str(folder)] + (["--quick"] if quick else [])
    done = run("fastsdpo", "bench", *arguments)
    result = folder / "bench.json"
    if done.returncode or not result.exists():
        return {"ok": False, "problem": (done.stdout + done.stderr)[-2000:]}
    table = (folder / "bench.md").read_text("utf-8")
    return {"ok": True, "result": json.loads(result.read_text("utf-8")), "table": table}


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [f"# On a GPU: {results['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in results["environment"].items()]
    tests = results["tests"]
    lines += ["", "## Tests", ""]
    if "problem" in tests:
        lines += ["```", tests["problem"], "```"]
    else:
        lines += [
            f"{tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failed'])} failed."
        ]
        lines += ["", *(f"- `{name}`: {text}" for name, text in tests["failed"].items())]
    for part in ("doctor", "benchmark"):
        found = results[part]
        lines += ["", f"## {part.capitalize()}: {'passed' if found['ok'] else 'FAILED'}", ""]
        if "problem" in found:
            lines += ["```", found["problem"], "```"]
        elif part == "doctor":
            lines += ["```json", json.dumps(found["report"], indent=1), "```"]
        else:
            lines += [re.sub(r"^#", "###", found["table"], flags=re.MULTILINE)]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the benchmark at small shapes")
    parser.add_argument("--results", type=Path, default=_harness.RESULTS, metavar="FOLDER")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("run_gpu: this PyTorch sees no GPU; nothing was run", file=sys.stderr)
        return 1
    device = torch.cuda.get_device_name()
    options.results.mkdir(parents=True, exist_ok=True)  # before any work is done
    results: dict[str, Any] = {"device": device, "environment": _harness.environment()}
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    path = options.results / f"gpu_{name}_{datetime.date.today()}.json"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results["tests"] = run_tests(folder)
        results["doctor"] = run_doctor()
        results["benchmark"] = run_benchmark(folder, options.quick)
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(markdown(results), "utf-8")
    parts = {part: results[part]["ok"] for part in ("tests", "doctor", "benchmark")}
    said = ", ".join(f"{part} {'ok' if ok else 'FAILED'}" for part, ok in parts.items())
    print(f"{said}; wrote {path}")
    return 0 if all(parts.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
