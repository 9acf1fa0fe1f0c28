"""Scaling with processes: `SDPOTrainer` under DDP (gloo), the same steps in one process and in two.

    python -m benchmarks.bench_processes --record processes_cpu

Question: of twice the processes, how much arrives? The global batch is the same everywhere; each process
has its own number of threads, so that two processes have twice the cores of one:

    1 process, 1 thread        the base
    2 processes, 1 thread      efficiency = base / (2 x time)
    1 process, 2 threads       what threads make of the same two cores

A small model of the Llama family with random weights; conversations of random tokens whose numbers of
interactions and lengths of answers are drawn from `benchmarks/lengths.json` (divided by --shrink). A batch
is split between processes interaction by interaction, so a conversation can lie in both and its prefix is
then computed twice, and processes with unequal lengths wait for each other: both are in the efficiency.
The first step warms up and is not counted. The losses of the steps must agree before anything is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import add_output, environment, record, table
from benchmarks.lengths import LENGTHS
from fastsdpo.data.tokenization import TokenizedInteraction

# (processes, threads of each)
SETTINGS = [(1, 1), (2, 1), (1, 2)]


def draw(histogram: dict[str, int], width: int, generator: random.Random) -> int:
    (edge,) = generator.choices([int(edge) for edge in histogram], list(histogram.values()))
    return edge + generator.randrange(width)


def make_interactions(count: int, vocabulary: int, shrink: int) -> list[TokenizedInteraction]:
    """Conversations of random tokens; a user's message has 16 to 144 tokens before shrinking."""
    recorded = json.loads(LENGTHS.read_text())
    histograms = recorded["templates"]["smollm2"]["histograms"]
    generator = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [generator.randrange(3, vocabulary) for _ in range(max(2, length // shrink))]

    found: list[TokenizedInteraction] = []
    while len(found) < count:
        history: list[int] = []
        name = f"c{len(found)}"
        message = tokens(generator.randint(16, 144))
        for _ in range(draw(histograms["interactions_per_conversation"], 1, generator)):
            history = [*history, *message]
            answer = tokens(draw(histograms["completion"], recorded["bin"], generator))
            followup = tokens(generator.randint(16, 144))
            found.append(TokenizedInteraction(history, [*history, *followup], answer, f"i{len(found)}", name))
            history, message = [*history, *answer], followup
    return found[:count]


def worker(args: argparse.Namespace) -> None:
    """Trains; the first process prints its seconds and losses as JSON."""
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from fastsdpo.trainer import SDPOConfig, SDPOTrainer

    torch.set_num_threads(args.threads)
    world = int(os.environ.get("WORLD_SIZE", 1))
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocabulary,
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            intermediate_size=args.hidden * 8 // 3,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=args.hidden // 64,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    items = make_interactions(args.batch * (args.steps + 1), args.vocabulary, args.shrink)
    with tempfile.TemporaryDirectory() as folder:
        config = SDPOConfig(
            output_dir=folder,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            max_steps=args.steps + 1,
            teacher_check=0,
            dataloader_pin_memory=False,
            per_device_train_batch_size=args.batch // world,
            warmup_steps=0,
            lr_scheduler_type="constant",
            ddp_backend="gloo" if world > 1 else None,
            seed=1,
        )
        trainer = SDPOTrainer(model, config, items, callbacks=[Clock()])
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if int(os.environ.get("RANK", 0)) == 0:
        tokens = sum(2 * len(i.completion_ids) + len(i.prompt_ids) + len(i.teacher_prompt_ids) for i in items)
        result = {
            "seconds": seconds[1:],
            "losses": losses,
            "tokens": tokens / len(items) * args.batch,
            "parameters": model.num_parameters(),
        }
        print("RESULT " + json.dumps(result), flush=True)
    if world > 1:
        torch.distributed.barrier()  # a process that ends while another still talks to it aborts it
        torch.distributed.destroy_process_group()


def launch(arguments: list[str], processes: int, threads: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if processes > 1:
            variables |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        children.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.bench_processes",
                    "--worker",
                    *arguments,
                    "--threads",
                    str(threads),
                ],
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=Path(__file__).parent.parent,
            )
        )
    try:
        outputs = [child.communicate(timeout=1200)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    if any(child.returncode for child in children):
        raise SystemExit("bench_processes: a process failed:\n" + "\n".join(o[-3000:] for o in outputs))
    lines = [line for line in outputs[0].splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT "))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    names = ("batch", "steps", "vocabulary", "hidden", "layers", "shrink")
    arguments = [text for name in names for text in (f"--{name}", str(getattr(args, name)))]
    settings = [(p, t) for p, t in SETTINGS if t == 1 or not args.processes_only]
    runs: dict[tuple[int, int], list[dict[str, Any]]] = {setting: [] for setting in settings}
    for _ in range(args.rounds):
        for processes, threads in settings:
            result = launch(arguments, processes, threads)
            runs[processes, threads].append(result)
            print(f"{processes} x {threads}: {[round(s, 2) for s in result['seconds']]} s", flush=True)
            first = runs[SETTINGS[0]][0]["losses"]
            if any(abs(a - b) > 1e-3 * abs(a) + 1e-6 for a, b in zip(first, result["losses"])):
                raise SystemExit(
                    f"bench_processes: {processes} processes train otherwise than one: "
                    f"{result['losses']} instead of {first}"
                )
    rows = []
    for (processes, threads), results in runs.items():
        steps = [statistics.mean(result["seconds"]) for result in results]
        rows.append(
            {
                "processes": processes,
                "threads": threads,
                "batch": args.batch,
                "steps": args.steps,
                "shape": f"{args.vocabulary} x {args.hidden}, {args.layers} layers, lengths / {args.shrink}",
                "parameters": results[0]["parameters"],
                "tokens": results[0]["tokens"],
                "seconds": statistics.median(steps),
                "fastest": min(steps),
                "slowest": max(steps),
                "cpus": os.cpu_count(),
                "environment": environment(),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    where = rows[0]["environment"]
    base = {row["shape"]: row for row in rows if (row["processes"], row["threads"]) == (1, 1)}
    lines = []
    for row in rows:
        alone, seconds = base[row["shape"]]["seconds"], row["seconds"]
        cores = row["processes"] * row["threads"]
        lines.append(
            [
                row["shape"],
                f"{row['parameters'] / 1e6:.1f}",
                str(row["batch"]),
                str(row["processes"]),
                str(row["threads"]),
                f"{seconds:.2f}",
                f"{row['fastest']:.2f}",
                f"{row['slowest']:.2f}",
                f"{row['tokens'] / seconds:.0f}",
                f"{alone / seconds:.2f}",
                f"{alone / seconds / cores:.2f}",
            ]
        )
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    commands = sorted({f"{r['environment']['command']} ({r['environment']['commit']})" for r in rows})
    return (
        "# Scaling with processes on a CPU\n\n"
        f"{where['device']}; {where['native']}; Python {where['python']}; {versions}. float32, gloo. "
        "No GPU was used.\n\nWhat is run: `benchmarks/bench_processes.py`; steps of `SDPOTrainer` over "
        "the same interactions, lengths drawn from those of real conversations. Seconds are the mean "
        "step of a run, the median of the runs. Tokens: of student and teacher, sharing aside. "
        f"Efficiency: speed-up over the cores used. The machine has {rows[0]['cpus']} processors, so two "
        "processes of one thread take all of it, the gradients' exchange and the system included; what "
        "more processes or a network would do is not measured here.\n\n"
        + table(
            [
                "vocabulary x width",
                "million parameters",
                "interactions a step",
                "processes",
                "threads each",
                "s a step",
                "fastest",
                "slowest",
                "tokens/s",
                "speed-up",
                "efficiency",
            ],
            lines,
        )
        + "\n## Commands\n\n"
        + "".join(f"- `{command}`\n" for command in commands)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="interactions of a step, all processes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shrink", type=int, default=2, help="divides all lengths")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes-only", action="store_true", help="without one process of two threads")
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--record", default="", help="name of the results file; none is written without")
    add_output(parser)
    args = parser.parse_args()
    if args.batch % 2:
        parser.error(f"--batch must be even, got {args.batch}")
    if args.worker:
        worker(args)
        return
    rows = measure(args)
    if args.record:
        record(args.record, rows, ("shape", "batch", "processes", "threads"), markdown, args.output)


if __name__ == "__main__":
    main()
