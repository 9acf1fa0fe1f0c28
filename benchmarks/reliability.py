"""Writes docs/reliability.md from the results files of `make fuzz`, `make soak` and `make compatibility`.

python -m benchmarks.reliability           writes
python -m benchmarks.reliability --check   exit status 1 where the page is not what the files say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import compatibility

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reliability.md"

INTRODUCTION = """# Reliability

What is promised, how it is tested, and what was tried. Made by `python -m benchmarks.reliability` from
{files}; a test holds this page to them. `make test` takes a bounded part of every kind of case, `make fuzz`
and `make soak` the counts below, which they write to `benchmarks/results/` and to this page.

Tried: cases. Faults: kills, signals, damaged files, mutations. Survived: cases that came to the right
result, or to the error that is promised. Lost: all others.

{sums}
"""


class Section(NamedTuple):
    title: str
    rows: str  # a pattern of names in the results file
    text: str


SECTIONS = [
    Section(
        "Killed, and run again",
        "^SIGKILL|^worker that dies",
        """
`fastsdpo prepare`, `train` and `online` can be killed at any point. The same command, given again (`train`
and `online` with `--resume`), ends with the files that an undisturbed run leaves, byte for byte; clocks in
reports and `training_args.bin` aside. A process that dies in a run of several ends the others, with its
error, and no process stays behind.

Tested by `tests/reliability/test_faults.py`: SIGKILL when a random file is opened, renamed or removed, or
at a random time, some runs more than once; then the same command, and a comparison of everything it wrote.
Models, teacher, optimizer, order of data and random numbers are in it; the models are tiny.
""",
    ),
    Section(
        "Preemption",
        "^SIGTERM",
        """
SIGTERM and Ctrl-C end the step, save a checkpoint and exit with status 143 or 130. Before and after the
steps (while data is read, or the model saved) there is no more to save than is on the disk already, and the
system ends the process. `fastsdpo train --help` documents every exit status.

Tested by `tests/reliability/test_faults.py`, with the same comparison.
""",
    ),
    Section(
        "Disks and checkpoints",
        "^disk|^damaged newest",
        """
An output that is read-only or has no room is reported before the model works. A disk that fills up later is
a sentence and status 1, and leaves the checkpoints before it whole: a checkpoint gets its name when
everything in it is on the disk. It has checksums; one that was damaged afterwards is named, and the one
before it is used. Where none is whole, nothing is begun anew in its place.

Tested by `tests/reliability/test_faults.py`, on file systems of one to four megabytes in a mount namespace:
each file of a checkpoint changed by a bit, truncated and removed.
""",
    ),
    Section(
        "Losses and gradients that are not finite",
        "not finite",
        """
The run stops before the optimizer's step, names the interactions, saves the state before it and exits with
status 3; with `non_finite="skip"` the step is left out and counted (`sdpo/skipped_steps`). A gradient is
looked at apart from the loss: where only it is not finite, one pass for each interaction shows whose it is.

Tested by `tests/reliability/test_faults.py`, `tests/trainer/test_train_command.py`,
`tests/trainer/test_settings.py`.
""",
    ),
    Section(
        "Bad data",
        "^mutated|spell control",
        """
A conversation file may hold anything. What cannot be read is counted and reported with its place, and every
record that was not touched is kept; control tokens in messages are encoded as text (`allow_special_tokens`
changes that).

Tested by `tests/reliability/test_data.py` (through `prepare`, the dataset and the tokenizer: records cut,
doubled, of wrong types, nested, with huge strings, control characters and spelled control tokens) and
`tests/data/test_fuzz.py` (the loader itself).
""",
    ),
    Section(
        "Security",
        "^security",
        """
- Nothing is unpickled that comes from a path: checkpoints are read with `weights_only`, weights as
  safetensors; a pickle in place of weights, of a checkpoint's file or of data is an error. The source is
  searched for `eval`, `exec`, `pickle`, `shell=True` and their like.
- `trust_remote_code` is off unless asked for; a model's own code is not run, a chat template stays in its
  sandbox.
- Commands on local files connect to nothing; an endpoint is asked only where one is given.
- Keys come from the environment. No option takes one, and none is logged or written.
- In the page of `fastsdpo signal --html` markup from messages, roles, follow-ups, tokens, notes, template
  and model name stays text, and the page loads nothing: `tests/signal/test_page.py`, in headless Chromium
  (skipped where there is none).

The others are tested by `tests/reliability/test_security.py`.
""",
    ),
    Section(
        "Numerics",
        "^numerical",
        """
For every loss, dtype and backend, on drawn shapes and values: adding a constant to a row changes nothing;
permuting the vocabulary permutes the gradient; gradient rows sum to zero; pieces add up to the whole;
swapping student and teacher maps alpha to 1 - alpha; values stay within their bounds. Values and gradients
against float64, infinities, NaN in ignored rows and huge logits are in `tests/ops/`.

Tested by `tests/reliability/test_numerics.py`; the Triton kernels in the interpreter.

A loss of the Triton kernels is held to 1e-5 of float64, and a gradient, as a whole, to twice that of plain
PyTorch in the same dtype and one rounding (2^-23 of the largest entry and of a probability; for the
sampled token, of a log-prob): `tests/ops/test_triton_values.py`, with 500 drawn cases a loss in `make
fuzz`. One row of a KL by itself can need a few roundings where its target is far less likely than the best
token. The interpreter's exponential is exact to a float32; for NVIDIA's `ex2.approx` 2^-22 is
[documented](https://docs.nvidia.com/cuda/parallel-thread-execution/). With errors of that size put into the
interpreter, a loss is held to the same bound, and a gradient to five roundings. Nothing of this was measured
on a GPU.

The compiled kernels are executed as well, on the CPU. `tests/ptx/` runs the PTX that Triton's compiler
writes for sm_90, from the library's own launches, and compares it with float64. Every memory access is
checked: alignment, bounds, memory that nothing wrote, races between the warps of a program and between
programs. Warps are also run one after another from barrier to barrier, which a GPU may do: the results are
the same bits. `make test` runs every kernel, mode and dtype, `make ptx` each in every layout, for sm_80 and
sm_100 too: `benchmarks/results/ptx.md` has the errors and what was counted. **No GPU has run these kernels.**
The last step to machine code (ptxas), the hardware's own exponential and logarithm, caches and time are not
in it, and neither is AMD's code.
""",
    ),
    Section(
        "Long runs",
        "^soak",
        """
Memory does not grow with the steps: resident memory, traced Python memory, objects, tensors, graph nodes,
open files, and the entries of every cache of fastsdpo, `torch.library` and dynamo, from the second third of
a run to its last. The limits are in `tests/reliability/test_soak.py`, and a planted leak of one small
tensor a step is seen. The lines of the log, which transformers keeps, are taken off.

The runs train a tiny model with checkpoints and evaluations on the way, for no fewer optimizer steps than
SmolLM2-135M takes in two hours on the machine of `sharing_cpu_2026-11-24.md`. That is what a
two-hour-equivalent is here: it shows what leaks by the step, and says nothing of what comes with hours or
with size.
""",
    ),
    Section(
        "Many interactions",
        "^interactions",
        """
`fastsdpo prepare` streams: of each record some 40 bytes stay in memory. The dataset of `train` keeps the
tokens, four bytes each, ids, and 16 bytes for each user's message in a prompt; the planner works on a batch
at a time. Measured is what each adds at its peak.

Tested by `tests/reliability/test_soak.py`, with a bound on the bytes for each further interaction.
""",
    ),
    Section(
        "Several processes",
        "^training in one",
        """
Several processes compute what one does, with held-out data too: DDP and FSDP2, started by `torchrun`, in
`tests/trainer/test_launched.py` (losses, gradient norms and the saved model; tied and untied heads, LoRA,
gradient checkpointing, bfloat16, a resumed run; two and four processes). FSDP2 is accelerate's own, let
run on CPU processes; it has not run on a GPU. DDP from Python in `tests/trainer/test_two_processes.py` and
`tests/online/test_two_processes.py` (weights, losses, statistics, files); both in
`tests/prefix/test_distributed.py` (gradients, in float64). The rates below are
of a small model on the cores that the machine had to spare, and are no measure of scaling.
""",
    ),
]


def collect(kind: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The newest row of each name in the results files of a kind, and the names of the files in use."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob(f"{kind}_2*.json")):
        found = json.loads(path.read_text("utf-8"))["rows"]
        if isinstance(found, list):
            found = {row["name"]: row for row in found}
        rows |= {name: {**row, "file": path.name} for name, row in found.items()}
    return rows, sorted({row["file"] for row in rows.values()})


def counts(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| case | tried | faults | survived | lost |", "| --- | --- | --- | --- | --- |"]
    for name, row in sorted(rows.items()):
        numbers = " | ".join(f"{row[key]:,}" for key in ("tried", "faults", "survived", "lost"))
        lines.append(f"| {name} | {numbers} |")
    figures = [(name, row["figures"]) for name, row in sorted(rows.items()) if row["figures"]]
    for name, values in figures:
        listed = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())
        lines += ["", f"{name}: {listed}."]
    return "\n".join(lines) + "\n"


def page() -> str:
    rows, files = collect("reliability")
    tried, compatible = collect("compatibility")
    sums = {key: sum(row[key] for row in rows.values()) for key in ("tried", "faults", "survived", "lost")}
    listed = ", ".join(f"`{name}`" for name in (*files, *compatible)) or "no file yet"
    text = INTRODUCTION.format(files=listed, sums=", ".join(f"{value:,} {key}" for key, value in sums.items()) + ".")
    for section in SECTIONS:
        mine = {name: row for name, row in rows.items() if re.search(section.rows, name)}
        text += f"\n## {section.title}\n{section.text}\n" + (counts(mine) if mine else "")
    text += """
## Versions

Each combination in an environment of its own, by `make compatibility`: every kernel against float64, and the
tests that touch the other packages. A version of Triton is put beside the torch of the tests.

"""
    text += compatibility.table(compatibility.in_order(list(tried.values())))
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    if parser.parse_args(argv).check:
        return int(PAGE.read_text("utf-8") != page())
    PAGE.write_text(page(), "utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
