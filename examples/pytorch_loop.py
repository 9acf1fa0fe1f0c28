"""SDPO in a plain PyTorch loop: three interactions, the live self-teacher, no logits.

    python examples/pytorch_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 10

The student reads the conversation, the teacher the conversation and the user's follow-up; both run in
one pass that computes their common prefix once. Runs under DDP and FSDP2 as it is: the loss is formed
inside the model's forward pass.
"""

from __future__ import annotations

import argparse

import torch

import fastsdpo
from fastsdpo.modeling import load_model_and_tokenizer
from fastsdpo.prefix import head_parameters

TALKS = [
    ("What is the capital of France?", "The capital is Lyon.", "No, it is Paris."),
    ("Name a prime above 10.", "Twelve.", "Twelve is even. Eleven would do."),
    ("Say hello.", "Hello! I am so very glad that you are here today.", "Shorter, please."),
]


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-6)
    args = parser.parse_args(arguments)

    model, tokenizer = load_model_and_tokenizer(args.model)
    interactions = [
        fastsdpo.Interaction([{"role": "user", "content": prompt}], answer, followup)
        for prompt, answer, followup in TALKS
    ]
    template = fastsdpo.HindsightTemplate.preset("offline-v1")
    batch = list(
        fastsdpo.tokenize_interactions(
            tokenizer, interactions, template, max_prompt_length=512, max_completion_length=256
        )
    )

    def loss_fn(states):
        head = head_parameters(model)
        # The mean over each answer's tokens, then over answers.
        tokens = torch.bincount(states.sequence_ids, minlength=len(batch))
        weights = 1.0 / tokens[states.sequence_ids] / len(batch)
        return fastsdpo.linear_sdpo_loss(
            states.student_hidden,
            states.teacher_hidden,
            head.weight,
            states.target_ids,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            mode="full",
            alpha=1.0,
            weights=weights,
        )

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    losses = []
    for step in range(args.steps):
        out = fastsdpo.shared_forward(model, batch, loss_fn=loss_fn)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}, log-ratio {out.log_ratio.mean():+.4f}")
    return losses


if __name__ == "__main__":
    main()
