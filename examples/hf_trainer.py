"""`transformers.Trainer` with fastsdpo's loss: the teacher's scores are computed once, ahead of training.

    python examples/hf_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 10 -o runs/hf

The teacher is the initial model with the user's follow-up in its context (a frozen self-teacher); its
log-probs of the response come from `fused_logps`. They could as well come from an inference server, see
`examples/vllm_teacher.py`. To train on logged conversations with the live teacher use `fastsdpo train`.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from fastsdpo.integrations.transformers import SDPOLabels, fused_logps, sdpo_loss_func
from fastsdpo.modeling import load_model_and_tokenizer

TALKS = [
    ("What is the capital of France?", "The capital is Lyon.", "No, it is Paris."),
    ("Name a prime above 10.", "Twelve.", "Twelve is even. Eleven would do."),
    ("Say hello.", "Hello! I am so very glad that you are here today.", "Shorter, please."),
    ("Count to three.", "One, three, two.", "In order!"),
]


@torch.no_grad()
def score(model, tokenizer, prompt, answer, followup) -> dict:
    """One training example: the student's tokens, its labels, the teacher's log-probs of them."""

    def context(text):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    response = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    student, teacher = context(prompt), context(f"{prompt}\n\nThe user will say: {followup}")
    ids = torch.tensor([teacher + response], device=model.device)
    labels = ids.clone()
    labels[:, : len(teacher)] = -100
    logps = fused_logps(model, ids, None, labels)[0, len(teacher) :].cpu()
    return {
        "input_ids": torch.tensor(student + response),
        "labels": torch.tensor([-100] * len(student) + response),
        "teacher_logps": torch.cat([torch.zeros(len(student)), logps]),
    }


def collate(examples: list[dict]) -> dict:
    def padded(key, value):
        return pad_sequence([example[key] for example in examples], True, value)

    labels = SDPOLabels(labels=padded("labels", -100), teacher_logps=padded("teacher_logps", 0.0))
    mask = pad_sequence([torch.ones_like(e["input_ids"]) for e in examples], True, 0)
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": labels}


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-6)
    parser.add_argument("-o", "--output", default="runs/hf_trainer")
    args = parser.parse_args(arguments)
    model, tokenizer = load_model_and_tokenizer(args.model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            learning_rate=args.lr,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        ),
        train_dataset=[score(model, tokenizer, *talk) for talk in TALKS],
        data_collator=collate,
        compute_loss_func=sdpo_loss_func(mode="sampled_token"),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
