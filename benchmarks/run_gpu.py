"""All that needs a GPU, best first, within a total time, and one results file of it (`make gpu`).

    python -m benchmarks.run_gpu                  # every part, 8 minutes at most
    python -m benchmarks.run_gpu --minutes 3 --only kernels bandwidth
    python -m benchmarks.run_gpu --rehearsal      # the same code in small sizes on a CPU

    kernels     compiled kernels against float64, on difficult rows
    bandwidth   losses from logits: bytes per second as a share of a copy's
    linear      losses from hidden states beside their four bare matrix products; peak memory
    attention   each attention backend of shared prefixes beside separate passes: time, deviation
    step        an optimizer step of a model of Qwen3-0.6B's shape, prefixes shared and not
    host        the host's time of a loss on few tokens
    tests       pytest -m gpu
    peers       TRL, Liger and plain PyTorch beside the losses, where they can be imported

It runs from a checkout with torch, Triton, transformers, accelerate and pytest alone: nothing is
downloaded, compiled beforehand or installed. Each part is a process of its own with a time limit. What it
measured is in benchmarks/results/gpu_<device>.json after every row, so a run that is killed leaves what was done;
the end prints it as a page. A part that fails is recorded with its error, and the run goes on; the exit status
is 1 unless every part was done. A rehearsal shows that the parts run, measures no GPU and writes no
results unless --output is given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from fastsdpo.timing import markdown_table

# Parts, best first, and the seconds that each may take; the total has less than their sum.
LIMITS = {
    "kernels": 110,
    "bandwidth": 60,
    "linear": 40,
    "attention": 100,
    "step": 90,
    "host": 25,
    "tests": 90,
    "peers": 60,
}
LEAST_SECONDS = 5.0  # a part with less time left is not started
LAST_LINES = 12  # of a failed part's output


def run_part(
    name: str, rows: Path, seconds: float, changed: Callable[[list[dict]], None], rehearsal: bool
) -> dict[str, Any]:
    """Runs a part; ``changed`` is called with its rows whenever there are more of them.

    The part's standard input is a pipe that nothing is written to: it ends when this process does, and
    the part with it.
    """
    begun, found = time.monotonic(), []
    log = rows.with_suffix(".log")
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, "--rows", str(rows)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if rehearsal:
        command.append("--rehearsal")
        if name in ("kernels", "tests"):  # Triton's kernels without a GPU
            environment["TRITON_INTERPRET"] = "1"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=harness.ROOT,
            env=environment,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        while process.poll() is None and time.monotonic() - begun < seconds:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            if len(read_rows(rows)) > len(found):
                found = read_rows(rows)
                changed(found)
    finally:
        status = process.poll()
        with contextlib.suppress(ProcessLookupError):  # also what it started
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    found = read_rows(rows)
    part: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 1), "rows": found}
    if status == 0:
        wrong = any("problem" in row for row in found)
        return {"state": "failed" if wrong else "done", **part}
    last = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-LAST_LINES:])
    if status is None:
        return {"state": "out of time", **part, "problem": f"stopped after {seconds:.0f} s\n{last}"}
    return {"state": "failed", **part, "problem": f"exit status {status}\n{last}"}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; a line that is still being written is left for later."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def write(path: Path, results: dict[str, Any]) -> None:
    """The results as JSON; a reader finds a whole file at any time."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    os.replace(temporary, path)


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    title = "Rehearsal on a CPU: no GPU was measured" if results["rehearsal"] else "On a GPU"
    lines = [f"# {title}: {results['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in results["environment"].items()]
    summary = [[name, part["state"], str(part.get("seconds", ""))] for name, part in results["parts"].items()]
    lines += ["", markdown_table(["part", "state", "seconds"], summary)]
    for name, part in results["parts"].items():
        lines += [f"## {name}: {part['state']}", ""]
        rows = part.get("rows", [])
        told = ("problem", "left_out")
        numbers = [row for row in rows if not any(key in row for key in told)]
        columns = list(dict.fromkeys(key for row in numbers for key in row))
        if numbers:
            cells = [[shown(row.get(column, "")) for column in columns] for row in numbers]
            lines += [markdown_table(columns, cells)]
        for row in rows:
            for key in told:
                if key in row:
                    about = ", ".join(f"{k} {shown(v)}" for k, v in row.items() if k not in told)
                    lines += [f"- {about}: {key.replace('_', ' ')}:", "", *quoted(row[key]), ""]
        if "problem" in part:
            lines += [*quoted(part["problem"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def quoted(text: str) -> list[str]:
    return ["    " + line for line in text.splitlines()]


def environment(rehearsal: bool) -> dict[str, Any]:
    """Device, driver, versions, commit and command of this run."""
    from fastsdpo import doctor

    driver = "none"
    if not rehearsal:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            driver = "unknown: there is no nvidia-smi"
    versions = ", ".join(f"{name} {version}" for name, version in doctor.versions().items())
    return {
        "driver": driver,
        "platform": platform.platform(),
        **harness.environment("cpu" if rehearsal else "cuda"),
        "versions": versions,
    }


def main(argv: list[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts (default: 8)")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--rehearsal", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of the results (default: benchmarks/results)")
    options = parser.parse_args(argv)
    end = time.monotonic() + 60 * options.minutes
    if not options.rehearsal and not torch.cuda.is_available():
        print("run_gpu: this PyTorch sees no GPU; nothing was run", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running part too
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rehearsed = folder / "results"
        output = options.output or (rehearsed if options.rehearsal else harness.RESULTS)
        output.mkdir(parents=True, exist_ok=True)  # before any work is done
        device = "CPU" if options.rehearsal else torch.cuda.get_device_name()
        results: dict[str, Any] = {
            "rehearsal": options.rehearsal,
            "device": device,
            "minutes": options.minutes,
            "environment": environment(options.rehearsal),
            "parts": {},
        }
        name = "rehearsal" if options.rehearsal else re.sub(r"[^a-z0-9]+", "-", device.lower())
        path = output / f"gpu_{name.strip('-')}.json"
        parts = results["parts"]
        for name in options.only:
            seconds = min(LIMITS[name], end - time.monotonic())
            if seconds < LEAST_SECONDS:
                parts[name] = {"state": "not run", "problem": "no time was left"}
            else:

                def changed(found: list[dict], name: str = name) -> None:
                    parts[name] = {"state": "running", "rows": found}
                    write(path, results)

                changed([])
                rows = folder / f"{name}.jsonl"
                parts[name] = run_part(name, rows, seconds, changed, options.rehearsal)
            write(path, results)
            print(
                f"{name}: {parts[name]['state']}, {len(parts[name].get('rows', []))} rows, "
                f"{parts[name].get('seconds', 0)} s",
                flush=True,
            )
        print(markdown(results))
        if output != rehearsed:
            print(f"wrote {path}")
    return 0 if all(part["state"] == "done" for part in parts.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
