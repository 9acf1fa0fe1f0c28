"""TRL's SDPO trainer with fastsdpo's losses: one line more than without.

    python examples/trl_sdpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 10 -o runs/trl

The model is asked to answer briefly; a short answer succeeds, and the others of its group learn from
it: the teacher is the model with the successful answer in its prompt.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from fastsdpo.integrations.trl import patch_trl


def briefness(completions, **_):
    """1 for an answer of fewer than 40 characters."""
    return [float(len(c[-1]["content"]) < 40) for c in completions]


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=48, help="longest completion")
    parser.add_argument("-o", "--output", default="runs/trl_sdpo")
    args = parser.parse_args(arguments)
    prompts = ["Why is the sky blue?", "What is a prime number?", "Who wrote Faust?", "Say hello."]
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in prompts]})

    with patch_trl():  # the added line; patch_trl() alone lasts for the process
        trainer = SDPOTrainer(
            model=args.model,
            reward_funcs=briefness,
            args=SDPOConfig(
                output_dir=args.output,
                max_steps=args.steps,
                max_completion_length=args.tokens,
                per_device_train_batch_size=4,
                num_generations=4,
                logging_steps=1,
                distillation_mode="topk_logits",
                distillation_topk=20,
                distillation_alpha=0.5,
                distillation_add_tail=True,
                success_reward_threshold=1.0,
                save_strategy="no",
                report_to="none",
                bf16=torch.cuda.is_available(),
            ),
            train_dataset=data,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
