"""The tables of docs/distributed.md: what was tested under which strategy, and what a step is forecast to take.

    python -m benchmarks.distributed                   writes the page's tables from the results files
    python -m benchmarks.distributed --check           exit status 1 where the page is not what the files say
    python -m benchmarks.distributed --tests           runs the tests of every launch first (`make distributed`)
    python -m benchmarks.distributed --forecasts       forecasts the steps of `PLANS` first; --only 8B: of these

The page's text is written by hand; a table stands between ``<!-- matrix -->`` or ``<!-- forecasts -->`` and
``<!-- end -->``. Forecast memory is that of `fastsdpo train --dry-run` (`fastsdpo.trainer.memory_walk`). Seconds are
the cost model's (`benchmarks.costmodel`) for H100s, plus what goes over the links, of which nothing is assumed to be
hidden: arithmetic, not measurements.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, Qwen3Config

from benchmarks import costmodel, harness
from benchmarks.costmodel import Cost
from benchmarks.predictions import recorded_tokens
from fastsdpo.data import TokenizedInteraction
from fastsdpo.timing import markdown_table
from fastsdpo.trainer import SDPOConfig
from fastsdpo.trainer.memory import ROOM, lora_adapter
from fastsdpo.trainer.memory_walk import ModelShape, Processes, walk_step

PAGE = harness.ROOT / "docs" / "distributed.md"
MATRIX, FORECASTS = (harness.RESULTS / f"{name}.json" for name in ("distributed_cpu", "forecasts"))

# ------------------------------------------------------------------------------------------------- matrix

TESTS = ("test_launched", "test_deepspeed", "test_deepspeed_loop", "test_quantized", "test_launch_refusals")
# Columns of the matrix: a test whose last parameter, or whose only case, is the variant.
STRATEGIES = {
    "DDP, 2": r"test_launched::test_ddp\[(.*)\]",
    "FSDP2, 2": r"test_launched::test_fsdp2\[(.*)\]",
    "FSDP2, 4": r"test_launched::test_fsdp2_with_four_processes\[(.*)\]",
    "Ulysses: DDP, 2": r"test_launched::test_ulysses\[(.*)-2\]",
    "Ulysses: FSDP2, 4": r"test_launched::test_ulysses\[(.*)-4\]",
    "ZeRO-2, 1": r"test_deepspeed::test_one_process\[zero2-(.*)\]",
    "ZeRO-3, 1": r"test_deepspeed::test_one_process\[zero3-(.*)\]",
}


def run_tests(names: list[str], only: str) -> None:
    """Each file of tests in a process of its own; what came of its tests goes to the results file."""
    for name in names:
        path = harness.ROOT / "tests" / "trainer" / f"{name}.py"
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            command = ["-m", "pytest", "-q", "-m", "slow or not slow", "--timeout", "7200", "-k", only, str(path)]
            subprocess.run([sys.executable, *command, f"--junitxml={report}"], cwd=harness.ROOT)
            found = read_tests(report)
        harness.record(MATRIX, [{"case": {"test": test}, "result": result} for test, result in found.items()])
        failed = [test for test, result in found.items() if result == "failed"]
        if failed:
            raise SystemExit(f"benchmarks.distributed: failed: {', '.join(failed)}")


def read_tests(report: Path) -> dict[str, str]:
    """Of each test of a JUnit file, "passed", "skipped" or "failed"."""
    return {f"{module.rpartition('.')[2]}::{name}": state for module, name, state, _ in harness.junit(report)}


def matrix(rows: list[harness.Row]) -> str:
    """Strategies by variants, and a sentence with the sums."""
    results = {row["case"]["test"]: row["result"] for row in rows}
    cells: dict[str, dict[str, str]] = {}
    for strategy, pattern in STRATEGIES.items():
        for test, result in results.items():
            if match := re.fullmatch(pattern, test):
                cells.setdefault(match[1], {})[strategy] = "same" if result == "passed" else result
    lines = [[f"`{name}`", *(found.get(s, "") for s in STRATEGIES)] for name, found in sorted(cells.items())]
    counts = {kind: list(results.values()).count(kind) for kind in ("passed", "skipped", "failed")}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"{markdown_table(['variant', *STRATEGIES], lines)}\nAll tests of launches: {said}.\n"


# ---------------------------------------------------------------------------------------------- forecasts


def qwen3(layers: int, hidden: int, heads: int, intermediate: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        vocab_size=151936,
        tie_word_embeddings=tied,
    )


MODELS: dict[str, Any] = {
    "Qwen3-1.7B": qwen3(28, 2048, 16, 6144, True),
    "Qwen3-4B": qwen3(36, 2560, 32, 9728, True),
    "Qwen3-8B": qwen3(36, 4096, 32, 12288, False),
    "Qwen3-14B": qwen3(40, 5120, 40, 17408, False),
    "Qwen3-32B": qwen3(64, 5120, 64, 25600, False),
    "Llama-3.3-70B": LlamaConfig(
        num_hidden_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
}


class Plan(NamedTuple):
    """A run to forecast. ``options`` are those of `fastsdpo train` beside the defaults on a GPU."""

    model: str
    cards: int
    strategy: str
    options: str = ""

    @property
    def rank(self) -> int:
        return self._number("lora", 0)

    @property
    def ulysses(self) -> int:
        return self._number("ulysses", 1)

    def _number(self, flag: str, default: int) -> int:
        found = re.search(rf"--{flag} (\d+)", self.options)
        return int(found[1]) if found else default

    def settings(self) -> dict[str, Any]:
        return dict(text.split("=") for text in re.findall(r"--set (\S+)", self.options))


EIGHT_BIT = "--set optim=adamw_torch_8bit"
EACH_PASS = "--set sync_each_pass=true"
PLANS = (
    Plan("Qwen3-1.7B", 1, "one"),
    Plan("Qwen3-4B", 1, "one", EIGHT_BIT),
    Plan("Qwen3-8B", 1, "one", "--lora 16"),
    Plan("Qwen3-8B", 1, "one", EIGHT_BIT),
    Plan("Qwen3-8B", 8, "ddp", "--lora 16"),
    Plan("Qwen3-8B", 8, "fsdp"),
    Plan("Qwen3-14B", 1, "one", "--lora 16"),
    Plan("Qwen3-14B", 8, "fsdp"),
    Plan("Qwen3-32B", 8, "fsdp", "--lora 16"),
    Plan("Qwen3-32B", 16, "fsdp"),
    Plan("Qwen3-32B", 16, "fsdp", EACH_PASS),
    Plan("Llama-3.3-70B", 8, "fsdp", "--lora 16"),
    Plan("Llama-3.3-70B", 32, "fsdp"),
    Plan("Llama-3.3-70B", 32, "fsdp", EACH_PASS),
    Plan("Qwen3-8B", 8, "zero2"),
    Plan("Qwen3-8B", 8, "zero3"),
    Plan("Qwen3-8B", 8, "fsdp", "--ulysses 8"),
)
CARD = costmodel.GPUS[0]
NETWORK = 50e9  # bytes/s of a card to other nodes, an assumption: 400 Gbit/s
STEP = 32  # interactions of a step for each card, of the recorded lengths
PACK = 24  # interactions of the largest pack, each 350 tokens of the student and 260 of the teacher: 14,640 tokens
STRATEGY_NAMES = {"one": "one process", "ddp": "DDP", "fsdp": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


def largest_pack() -> list[TokenizedInteraction]:
    made = []
    for number in range(PACK):
        prompt = [3 + number] * 150
        made.append(TokenizedInteraction(prompt, prompt + [500 + number] * 60, [800 + number] * 200))
    return made


def forecast(plan: Plan) -> harness.Row:
    """Bytes at the peak by part, and seconds by part, of a step in one process."""
    adapter = lora_adapter(plan.rank) if plan.rank else None
    args = SDPOConfig(output_dir="unused", use_cpu=True, gradient_checkpointing=True, optim="adamw_torch")
    args.bf16 = True  # as on a GPU
    args.ulysses = plan.ulysses
    for name, value in plan.settings().items():
        setattr(args, name, value)
    processes = Processes(plan.cards, "ddp" if plan.strategy == "one" else plan.strategy)
    shape = ModelShape(MODELS[plan.model], torch.bfloat16, adapter)
    found = walk_step(shape, args, [largest_pack()] * 2, kind="cuda", processes=processes)
    costs = step_costs(plan)
    seconds = {name: costmodel.seconds(cost, CARD) for name, cost in costs.items()}
    seconds["communication"] = communication(plan)
    return {"case": plan._asdict(), "peak": found.peak, "parts": found.parts, "seconds": seconds}


def step_costs(plan: Plan) -> dict[str, Cost]:
    """Of a process's part of a step of `STEP` interactions for each card; docs/performance.md has the assumptions."""
    model = costmodel.Model.from_config(MODELS[plan.model], plan.model)
    work = recorded_tokens("smollm2", STEP)["conversation"]
    state = 2 if "8bit" in plan.options else 12
    costs, _ = costmodel.step(
        model, work, mode="reverse_kl", checkpointing=True, weight=2, state=state, micro_batches=2
    )
    trained = model.adapter(plan.rank) if plan.rank else model.parameters
    if plan.rank:  # no gradients of the frozen weights: as many products less as a forward pass has
        costs["backward"] += costs["student forward"].times(-1)
        costs.pop("loss: dWeight")
    share = plan.cards if plan.strategy in ("fsdp", "zero2", "zero3") else 1
    costs["optimizer"] = costmodel.adamw(trained / share, weight=4 if plan.rank else 2, state=state, grad=2)[0]
    return costs


def communication(plan: Plan) -> float:
    """Seconds on the slowest link.

    DDP and ZeRO-2 sum the gradients once a step, FSDP2 and ZeRO-3 gather the weights twice in each of two passes and
    sum the gradients of the last, or of both. Ulysses sends each layer's queries, keys, values and outputs, in the
    passes of student and teacher, and again in the layers that run again and in the backward pass.
    """
    if plan.cards == 1:
        return 0.0
    model = costmodel.Model.from_config(MODELS[plan.model], plan.model)
    trained = model.adapter(plan.rank) if plan.rank else model.parameters
    whole = plan.strategy in ("ddp", "zero2")
    summed = 2 if EACH_PASS in plan.options else 1
    sent = 2 * 2 * trained if whole else 2 * (2 * 2 * model.parameters) + summed * 2 * trained
    seconds = sent * (plan.cards - 1) / plan.cards / (CARD.link if plan.cards <= 8 else NETWORK)
    size = plan.ulysses
    work = recorded_tokens("smollm2", STEP)["conversation"]
    heads = 2 * model.heads + 2 * max(model.kv_heads, size)
    tokens = 3 * work.student + work.teacher
    return seconds + 2 * tokens * model.layers * heads * model.head_dim * (size - 1) / size / CARD.link


def forecasts(rows: list[harness.Row]) -> str:
    lines = []
    for row in rows:
        plan, seconds = Plan(**row["case"]), row["seconds"]
        fits = row["peak"] <= ROOM * CARD.memory
        lines.append(
            [
                plan.model,
                f"{plan.cards}",
                STRATEGY_NAMES[plan.strategy],
                f"`{plan.options}`" if plan.options else "",
                f"{row['peak'] / 1e9:.1f}" + ("" if fits else " (does not fit)"),
                f"{sum(seconds.values()):.1f}",
                f"{seconds['communication']:.1f}",
            ]
        )
    header = ["model", "cards", "strategy", "options", "GB at the peak", "s a step", "of them on links"]
    return markdown_table(header, lines)


# --------------------------------------------------------------------------------------------------- page


def page(text: str) -> str:
    """The page with its tables made anew."""
    made = {"matrix": (matrix, MATRIX), "forecasts": (forecasts, FORECASTS)}

    def table(name: str) -> str:
        make, path = made[name]
        return make(harness.read(path)) if path.exists() else "Not recorded yet.\n"

    return harness.with_tables(text, "matrix|forecasts", table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--tests", nargs="*", metavar="FILE", help="run these tests of tests/trainer first; none: all")
    parser.add_argument("--forecasts", action="store_true", help="forecast the steps first")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="tests that pytest -k selects; plans whose text holds it"
    )
    args = parser.parse_args(argv)
    if args.tests is not None:
        run_tests(args.tests or list(TESTS), args.only)
    if args.forecasts:
        for plan in PLANS:
            if args.only in " ".join(map(str, plan)):
                harness.record(FORECASTS, [row := forecast(plan)])
                print(plan, f"{row['peak'] / 1e9:.1f} GB", flush=True)
    return harness.keep_page(PAGE, page(PAGE.read_text("utf-8")), args.check)


if __name__ == "__main__":
    sys.exit(main())
