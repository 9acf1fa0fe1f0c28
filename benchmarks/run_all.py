"""Every question of the benchmarks, one after another, with one page that leads to the results.

    python -m benchmarks.run_all                 # `make bench`: under half an hour on two cores
    python -m benchmarks.run_all --quick         # tiny sizes, some minutes: does it all work?
    python -m benchmarks.run_all --only logits data
    python -m benchmarks.run_all --record --machine avx2    # the same sizes, into benchmarks/results

Results go to bench_output/ (quick ones to bench_output/quick); the ratios of each theme are set beside the recorded
ones of the same cases (`benchmarks/compare.py`). A theme that fails is named on the page and the others run; the exit
status is then 1. Ratios that differ do not fail: another machine has other ratios.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import compare, harness
from fastsdpo.timing import markdown_table

# Theme: the question, and the arguments of each full run of benchmarks.bench_<theme>.
THEMES: dict[str, tuple[str, list[str]]] = {
    "logits": ("losses from logits", ["", "--dtype bfloat16 --modes reverse_kl"]),
    "linear": ("losses from hidden states", ["--modes sampled reverse_kl --rounds 2"]),
    "memory": ("memory against tokens, vocabulary and width", ["--points 3"]),
    "models": ("shapes of real models, with softcap", ["--rounds 2 --logits SmolLM2-135M Qwen3-8B Gemma-2-2B"]),
    "sharing": (
        "a whole optimizer step, and what each part of ours gives",
        [
            "--rivals official trl-sdpo response-logits fused-loss interaction conversation",
            "--what memory --rivals official conversation",
        ],
    ),
    "trl": ("a micro-batch of TRL's trainer, patched and not", ["--modes sampled full-reverse --rounds 2"]),
    "integrations": ("the helpers for verl and transformers", ["--rounds 2"]),
    "data": ("data preparation", [""]),
    "processes": ("scaling with processes", ["--rounds 1"]),
}


def run_theme(theme: str, runs: list[str], common: list[str], log: Path) -> bool:
    """Runs a theme's script until a run fails; what it says goes to the terminal and a log."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with open(log, "w", encoding="utf-8") as file:
        for arguments in runs:
            command = ["-m", f"benchmarks.bench_{theme}", *arguments.split(), *common]
            print(f"\n# {THEMES[theme][0]}: python {' '.join(command)}", flush=True)
            with subprocess.Popen(
                [sys.executable, *command],
                cwd=harness.ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                errors="replace",
            ) as child:
                for line in child.stdout or ():
                    if "\r" not in line and "it/s]" not in line:  # progress bars
                        print(line, end="", flush=True)
                    file.write(line)
            if child.returncode:
                return False
    return True


def page(done: list[tuple[str, bool, float]], folder: Path, machine: str, quick: bool) -> str:
    lines, comparisons = [], []
    for theme, good, seconds in done:
        path = folder / f"{theme}_{machine}.json"
        links = f"[{path.name}]({path.name}) " if path.exists() else ""
        links += f"[log]({theme}.log)"
        lines.append([THEMES[theme][0], links, f"{seconds:.0f}", "done" if good else "**failed**"])
        if good and path.exists() and not quick:
            comparisons += [compare.report(path, recorded)[0] for recorded in compare.recorded_files(path)]
    minutes = sum(seconds for *_, seconds in done) / 60
    text = f"# Benchmarks\n\n{datetime.date.today()}, {minutes:.1f} minutes"
    text += (", tiny sizes: whether it works, not how fast it is" if quick else "") + ".\n\n"
    text += markdown_table(["question", "results", "s", ""], lines)
    if comparisons:
        text += "\n## Beside the recorded ratios\n\n" + "\n".join(comparisons)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, some minutes")
    parser.add_argument("--only", nargs="+", default=list(THEMES), choices=list(THEMES), metavar="THEME")
    parser.add_argument("--machine", default="cpu", help="names the results files")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: bench_output, or bench_output/quick")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results")
    args = parser.parse_args(argv)
    if args.quick and args.record:
        parser.error("--record needs the full sizes")
    folder = (args.output or Path("bench_output", "quick" if args.quick else "")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = harness.RESULTS if args.record else folder
    # Relative where it can be: the command is written into the results.
    place = results.relative_to(harness.ROOT) if results.is_relative_to(harness.ROOT) else results
    common = ["--machine", args.machine, "--output", str(place), *(["--quick"] if args.quick else [])]
    done = []
    for theme in args.only:
        if not args.record:  # a run's files are its own, not merged with those of the one before
            (folder / f"{theme}_{args.machine}.json").unlink(missing_ok=True)
        start = time.perf_counter()
        good = run_theme(theme, [""] if args.quick else THEMES[theme][1], common, folder / f"{theme}.log")
        done.append((theme, good, time.perf_counter() - start))
        (folder / "index.md").write_text(page(done, results, args.machine, args.quick), encoding="utf-8")
    failed = [theme for theme, good, _ in done if not good]
    print(f"\n{len(done)} themes" + (f", failed: {', '.join(failed)}" if failed else "") + f"; {folder}/index.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
