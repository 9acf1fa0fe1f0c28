"""Scaling with processes: `SDPOTrainer` under DDP (gloo), the same steps in one process and in two.

    python -m benchmarks.bench_processes

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
from typing import Any

import torch

from benchmarks import harness
from benchmarks.conversations import random_llama
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
    from transformers import TrainerCallback

    from fastsdpo.trainer import SDPOConfig, SDPOTrainer

    torch.set_num_threads(args.threads)
    world = int(os.environ.get("WORLD_SIZE", 1))
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    heads = args.hidden // 64
    model = random_llama(args.vocabulary, args.hidden, args.layers, (heads, heads))
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
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "benchmarks.bench_processes", "--worker", *arguments]
        options: dict[str, Any] = {"env": variables, "cwd": harness.ROOT, "text": True}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        children.append(subprocess.Popen([*command, "--threads", str(threads)], **options))
    try:
        outputs = [child.communicate(timeout=1200)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    if any(child.returncode for child in children):
        raise SystemExit("bench_processes: a process failed:\n" + "\n".join(o[-3000:] for o in outputs))
    lines = [line for line in outputs[0].splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT "))


def measure(args: argparse.Namespace) -> harness.Row:
    """A row of all settings, in turns; they must train alike."""
    names = ("batch", "steps", "vocabulary", "hidden", "layers", "shrink")
    arguments = [text for name in names for text in (f"--{name}", str(getattr(args, name)))]
    settings = [(p, t) for p, t in SETTINGS if t == 1 or not args.quick]
    seconds: dict[tuple[int, int], list[float]] = {setting: [] for setting in settings}
    result: harness.Row = {}
    losses: list[float] = []
    for _ in range(args.rounds):
        for processes, threads in settings:
            result = launch(arguments, processes, threads)
            seconds[processes, threads].append(statistics.mean(result["seconds"]))
            print(f"{processes} x {threads}: {[round(s, 2) for s in result['seconds']]} s", flush=True)
            losses = losses or result["losses"]
            if any(abs(a - b) > 1e-3 * abs(a) + 1e-6 for a, b in zip(losses, result["losses"])):
                raise SystemExit(f"bench_processes: other losses with {processes} processes: {result['losses']}")
    return {
        "case": {name: getattr(args, name) for name in names},
        "rivals": {
            f"{p} process{'es' if p > 1 else ''}, {t} thread{'s' if t > 1 else ''}": {
                "median": statistics.median(steps),
                "fastest": min(steps),
                "slowest": max(steps),
                "peak_bytes": None,
                "cores": p * t,
            }
            for (p, t), steps in seconds.items()
        },
        "parameters": result["parameters"],
        "tokens": result["tokens"],
        "cpus": os.cpu_count(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__, rounds=2)
    parser.size("batch", 16, 4, help="interactions of a step, all processes")
    parser.size("steps", 3, 1)
    parser.size("vocabulary", 16384, 512)
    parser.size("hidden", 256, 64)
    parser.size("layers", 4, 1)
    parser.size("shrink", 2, 16, help="divides all lengths")
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.batch % 2:
        parser.error(f"--batch must be even, got {args.batch}")
    if args.worker:
        worker(args)
        return
    row = measure(args)
    harness.tell(row, next(iter(row["rivals"])))
    harness.record(harness.results_file("processes", args), [row])


if __name__ == "__main__":
    main()
