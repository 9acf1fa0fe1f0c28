"""Every question of the benchmarks, one after another, with one page that leads to the results.

    python -m benchmarks.run_all                 # `make bench`: under half an hour on two cores
    python -m benchmarks.run_all --quick         # tiny sizes, under three minutes: does it all work?
    python -m benchmarks.run_all --only logits data
    python -m benchmarks.run_all --record        # the same sizes, as dated files in benchmarks/results,
                                                 # which go on from the newest of their theme

Results go to bench_output/ (quick ones to bench_output/quick), each theme's ratios are set beside the
recorded ones of the same cases (`benchmarks/compare.py`). A theme that fails is said on the page and the
others run; the exit status is then 1. Ratios that differ do not fail: another machine has other ratios.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import compare
from benchmarks._harness import RESULTS, table

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Theme:
    """``full`` and ``quick``: arguments of ``python -m``, in order.

    Of these words, {name} stands for the results file's name, {folder} for its folder.
    """

    name: str
    question: str
    full: list[str]
    quick: list[str] = field(default_factory=list)
    record: bool = True  # whether --record runs it


NEW = "--record {name} --output {folder}"
OLD = "--results {name} --output {folder}"
STEP = "--results {folder}/{name}.json"
LOGITS_RIVALS = "--rivals native#fused native TRL Liger"  # '#': a space inside a word
THEMES = [
    Theme(
        "logits_cpu_float32",
        "losses from logits",
        [f"benchmarks.bench_logits {OLD} {LOGITS_RIVALS} torch.compile"],
        [
            f"benchmarks.bench_logits {OLD} --tokens 32 --vocabulary 8192 --rounds 2 --seconds 0 "
            f"--modes reverse_kl {LOGITS_RIVALS}"
        ],
    ),
    Theme(
        "logits_cpu_bfloat16",
        "the same in bfloat16",
        [f"benchmarks.bench_logits {OLD} --dtype bfloat16 --modes reverse_kl {LOGITS_RIVALS} torch.compile"],
    ),
    Theme(
        "linear_cpu",
        "losses from hidden states",
        [f"benchmarks.bench_linear {OLD} --modes sampled reverse_kl --rounds 2"],
        [
            f"benchmarks.bench_linear {OLD} --tokens 64 --vocabulary 8192 --hidden 128 --rounds 2 "
            "--modes reverse_kl --rivals fastsdpo bare#GEMMs TRL Liger eager"
        ],
    ),
    Theme(
        "memory_cpu",
        "memory against tokens, vocabulary and width",
        [f"benchmarks.bench_memory {NEW} --points 3"],
        [f"benchmarks.bench_memory {NEW} --points 1"],
    ),
    Theme(
        "models_cpu",
        "shapes of real models, with softcap",
        [
            f"benchmarks.bench_models {NEW} --rounds 2 --logits SmolLM2-135M Qwen3-8B Gemma-2-2B "
            "--hidden-modes reverse_kl"
        ],
        [
            f"benchmarks.bench_models {NEW} --tokens 4 --rounds 1 --seconds 0 --logits Gemma-2-2B --hidden "
            "--without torch.compile"
        ],
    ),
    Theme(
        "sharing_cpu",
        "a whole optimizer step, and what each part of ours gives",
        [
            "benchmarks.bench_sharing check",
            f"benchmarks.bench_sharing time {STEP} --conversation 15 --variants "
            "official,trl-sdpo,response-logits,fused-loss,interaction,conversation",
            f"benchmarks.bench_sharing memory {STEP} --conversation 15 --variants official,conversation",
            f"benchmarks.bench_sharing report {STEP}",
        ],
        [
            f"benchmarks.bench_sharing time {STEP} --conversation shortest --max-prompt-length 64 "
            "--variants official,conversation",
            f"benchmarks.bench_sharing report {STEP}",
        ],
    ),
    Theme(
        "trl_cpu",
        "a micro-batch of TRL's trainer, patched and not",
        [f"benchmarks.bench_trl {NEW} --cases sampled full-reverse --rounds 2"],
        [f"benchmarks.bench_trl {NEW} --cases sampled --vocabulary 2048 --hidden 72 --completion 16 --rounds 1"],
    ),
    Theme(
        "data_cpu",
        "data preparation",
        [f"benchmarks.bench_data {NEW}"],
        [f"benchmarks.bench_data {NEW} --conversations 40 --tokenized 20 --rounds 1 --seconds 0"],
    ),
    Theme(
        "processes_cpu",
        "scaling with processes",
        [f"benchmarks.bench_processes {NEW} --rounds 1"],
        [
            f"benchmarks.bench_processes {NEW} --batch 4 --steps 1 --vocabulary 512 --hidden 64 "
            "--layers 1 --shrink 16 --rounds 1 --processes-only"
        ],
    ),
    Theme(
        "costmodel_predictions",
        "predictions for GPUs (no measurement)",
        [f"benchmarks.costmodel {OLD}"],
        [f"benchmarks.costmodel {OLD}"],
    ),
    Theme(
        "losses",
        "the same losses as pytest-benchmark entries",
        [
            "pytest -q --import-mode=importlib benchmarks/test_losses.py "
            "-k reverse_kl#and#not#compile "
            "--benchmark-json {folder}/{name}.json"
        ],
        record=False,
    ),
]


def words(command: str, name: str, folder: Path) -> list[str]:
    # Relative where it can be: the command is written into the results.
    place = str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)
    return [word.replace("#", " ").replace("{name}", name).replace("{folder}", place) for word in command.split()]


def run_theme(theme: Theme, commands: list[str], name: str, folder: Path) -> tuple[bool, float]:
    """Runs the commands until one fails; their output goes to the terminal and a log."""
    start = time.perf_counter()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        for command in commands:
            arguments = words(command, name, folder)
            print(f"\n# {theme.question}: python -m {' '.join(arguments)}", flush=True)
            with subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                errors="replace",
            ) as child:
                for line in child.stdout or ():
                    if "\r" not in line and "it/s]" not in line:  # progress bars
                        print(line, end="", flush=True)
                    log.write(line)
            if child.returncode:
                return False, time.perf_counter() - start
    return True, time.perf_counter() - start


def go_on_from_newest(theme: str, path: Path) -> None:
    """Rows that are not measured again stay, with the date and commit of their own."""
    newest = compare.recorded_file(path.with_name(f"{theme}.json"))
    if newest is not None and not path.exists():
        shutil.copy(newest, path)


def page(done: list[tuple[Theme, str, bool, float]], folder: Path, quick: bool) -> str:
    lines, comparisons = [], []
    for theme, name, good, seconds in done:
        found = [
            f"[{suffix}]({name}{suffix})"
            for suffix in (".md", ".json", ".png", ".log")
            if (folder / f"{name}{suffix}").exists()
        ]
        lines.append([theme.question, " ".join(found), f"{seconds:.0f}", "done" if good else "**failed**"])
        new = folder / f"{name}.json"
        if good and theme.record and new.exists():
            comparisons.append(compare.report(new, compare.recorded_file(new))[0])
    total = sum(seconds for *_, seconds in done)
    text = (
        f"# Benchmarks\n\n{datetime.date.today()}, {total / 60:.1f} minutes"
        + (", tiny sizes: whether it works, not how fast it is" if quick else "")
        + ". Each page has its machine, versions and commands.\n\n"
        + table(["question", "results", "s", ""], lines)
    )
    if comparisons:
        text += (
            "\n## Beside the recorded ratios\n\nOf the cases that both have; recorded files are in "
            "`benchmarks/results`.\n\n" + "\n".join(comparisons)
        )
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, under three minutes")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="THEME",
        help="themes whose name begins so: " + ", ".join(t.name for t in THEMES),
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: bench_output, with --quick bench_output/quick"
    )
    parser.add_argument("--record", action="store_true", help="as dated files in benchmarks/results")
    args = parser.parse_args(argv)
    if args.quick and args.record:
        parser.error("--record needs the full sizes")
    output = args.output or Path("bench_output", "quick" if args.quick else "")
    folder = (RESULTS if args.record else output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        theme
        for theme in THEMES
        if (not args.only or theme.name.startswith(tuple(args.only)))
        and (theme.quick if args.quick else theme.full)
        and (theme.record or not args.record)
    ]
    if not wanted:
        parser.error(f"--only: no theme begins with {', '.join(args.only)}")
    done = []
    for theme in wanted:
        name = f"{theme.name}_{datetime.date.today()}" if args.record else theme.name
        if args.record:
            go_on_from_newest(theme.name, folder / f"{name}.json")
        else:  # a run's files are its own, not merged with those of the one before
            for suffix in (".json", ".md"):
                (folder / f"{name}{suffix}").unlink(missing_ok=True)
        good, seconds = run_theme(theme, theme.quick if args.quick else theme.full, name, folder)
        done.append((theme, name, good, seconds))
        if args.record:
            (folder / f"{name}.log").unlink()
        else:
            (folder / "index.md").write_text(page(done, folder, args.quick), encoding="utf-8")
    failed = [theme.name for theme, _, good, _ in done if not good]
    minutes = sum(seconds for *_, seconds in done) / 60
    said = f"{len(done)} themes in {minutes:.1f} minutes"
    said += f", failed: {', '.join(failed)}" if failed else ""
    print(f"\n{said}; results in {folder}" + ("" if args.record else "/index.md"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
