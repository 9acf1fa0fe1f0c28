"""A training step of TRL's SDPO trainer, patched and not: time and peak memory.

    python -m benchmarks.bench_trl --modes full-reverse topk

Timed is ``compute_loss`` with the backward pass of one micro-batch that is already generated; generation, rewards
and the optimizer are TRL's either way. The model has SmolLM2-135M's width and vocabulary, random weights and few
layers, so the head has a larger share of the step than in the full model: with more layers the ratio of times moves
towards 1, the difference does not change.

    TRL       TRL as it is
    hidden    patch_trl("hidden"): from hidden states, no logits
    logits    patch_trl("logits"): from logits, for models whose head is not a plain linear layer

``--trainers GKD SDFT ...`` does the same for the others (`benchmarks.trl_trainers`); their rows are in a file of their
own.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch import nn
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from benchmarks import harness, trl_trainers
from benchmarks.conversations import random_llama

DEFAULTS = {
    "distillation_mode": "sampled_token",
    "distillation_alpha": 1.0,
    "distillation_add_tail": False,
    "distillation_weight": 1.0,
}
MODES: dict[str, dict[str, Any]] = {
    "sampled": {},
    "full-reverse": {"distillation_mode": "full_logits"},
    "full-jsd": {"distillation_mode": "full_logits", "distillation_alpha": 0.5},
    "topk": {"distillation_mode": "topk_logits", "distillation_topk": 100},
    "topk-tail": {"distillation_mode": "topk_logits", "distillation_topk": 100, "distillation_add_tail": True},
    "full-reverse and policy": {"distillation_mode": "full_logits", "distillation_weight": 0.5},
    "policy": {"distillation_weight": 0.0},
}


def make_trainer(folder: str, model: nn.Module) -> SDPOTrainer:
    args = SDPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        num_generations=2,
        per_device_train_batch_size=4,
        teacher_model_kind="live",
        gradient_checkpointing=False,
    )
    return SDPOTrainer(
        model=model,
        reward_funcs=lambda prompts, **_: [0.0] * len(prompts),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["word"] * 4}),
        processing_class=trl_trainers.make_tokenizer(),
    )


def make_batch(sequences: int, prompt: int, completion: int, vocabulary: int) -> dict[str, Any]:
    """Completions of which the last quarter of every second one is padding."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, (sequences, length), generator=generator)

    ids, mask = draw(completion), torch.ones(sequences, completion, dtype=torch.long)
    mask[1::2, completion * 3 // 4 :] = 0
    prompt_ids, teacher_ids = draw(prompt), draw(prompt * 2)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": ids,
        "completion_mask": mask,
        "teacher_input_ids": torch.cat([teacher_ids, ids], 1),
        "teacher_attention_mask": torch.cat([torch.ones_like(teacher_ids), mask], 1),
        "self_distillation_mask": torch.ones(sequences),
        "advantages": torch.randn(sequences, generator=generator),
    }


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__)
    parser.size("modes", list(MODES), ["sampled"], str, nargs="+", choices=list(MODES))
    parser.add_argument("--trainers", nargs="*", default=[], choices=list(trl_trainers.STEPS))
    parser.model_sizes()
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    size = harness.size_of(args)
    for name in args.trainers:
        with tempfile.TemporaryDirectory() as folder:
            batch = make_batch(args.sequences, args.prompt, args.completion, args.vocabulary)
            rows = trl_trainers.bench(name, args, folder, batch)
            harness.record(harness.results_file("distillation_trainers", args), rows)
    if args.trainers:
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, random_llama(args.vocabulary, args.hidden, args.layers))
        batch = make_batch(args.sequences, args.prompt, args.completion, args.vocabulary)
        model = trainer.model.eval()  # no dropout in it; the trainer then does not scale the loss

        def step() -> torch.Tensor:
            loss = trainer.compute_loss(model, batch)
            loss.backward()
            return loss.detach()

        runs = trl_trainers.rivals(step)
        for mode in args.modes:
            for key, value in {**DEFAULTS, **MODES[mode]}.items():
                setattr(trainer.args, key, value)
            case = {"mode": mode, **size, "layers": args.layers}
            row = harness.compare(case, runs, args, prepare=model.zero_grad)
            harness.record(harness.results_file("trl", args), [row])


if __name__ == "__main__":
    main()
