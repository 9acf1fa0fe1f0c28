"""SDPO as a LightningModule; without Lightning the same module runs in a loop of five lines.

    python examples/lightning_module.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 10

`fused_logps` gives the log-probs of student and teacher without logits; the loss is the paper's
sampled-token loss, ``-stopgrad(teacher - student) * student``.
"""

from __future__ import annotations

import argparse
import importlib.util

import torch
from torch.nn.utils.rnn import pad_sequence

from fastsdpo.integrations.transformers import fused_logps
from fastsdpo.modeling import load_model_and_tokenizer

if importlib.util.find_spec("lightning"):
    from lightning.pytorch import LightningModule, Trainer
else:
    LightningModule, Trainer = torch.nn.Module, None

TALKS = [
    ("What is the capital of France?", "The capital is Lyon.", "No, it is Paris."),
    ("Name a prime above 10.", "Twelve.", "Twelve is even. Eleven would do."),
]


class SDPOModule(LightningModule):
    """A batch is ``{"student": inputs, "teacher": inputs}``, each with the response's labels."""

    def __init__(self, model: torch.nn.Module, lr: float):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            teacher = fused_logps(self.model, **batch["teacher"])
        student = fused_logps(self.model, **batch["student"])
        # The same response in both, at different positions.
        student = student[batch["student"]["labels"] != -100]
        teacher = teacher[batch["teacher"]["labels"] != -100]
        return ((student - teacher).detach() * student).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr, weight_decay=0.0)


def collate(tokenizer, talks):
    def tokenize(prompts):
        rows, labels = [], []
        for prompt, (_, answer, _) in zip(prompts, talks):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            context = tokenizer(text, add_special_tokens=False)["input_ids"]
            response = tokenizer(answer, add_special_tokens=False)["input_ids"]
            response = [*response, tokenizer.eos_token_id]
            rows.append(torch.tensor(context + response))
            labels.append(torch.tensor([-100] * len(context) + response))
        return {
            "input_ids": pad_sequence(rows, True, tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True, 0),
            "labels": pad_sequence(labels, True, -100),
        }

    hindsight = [f"{p}\n\nThe user will say: {o}" for p, _, o in talks]
    return {"student": tokenize([p for p, _, _ in talks]), "teacher": tokenize(hindsight)}


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-6)
    args = parser.parse_args(arguments)
    model, tokenizer = load_model_and_tokenizer(args.model)
    module = SDPOModule(model, args.lr)
    batches = [collate(tokenizer, TALKS)] * args.steps
    if Trainer is not None:
        trainer = Trainer(max_steps=args.steps, logger=False, enable_checkpointing=False)
        trainer.fit(module, batches)
        return [float(trainer.callback_metrics.get("loss", 0.0))]
    optimizer, losses = module.configure_optimizers(), []
    for step, batch in enumerate(batches):
        batch = {k: {n: t.to(model.device) for n, t in v.items()} for k, v in batch.items()}
        loss = module.training_step(batch, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:+.4f}")
    return losses


if __name__ == "__main__":
    main()
