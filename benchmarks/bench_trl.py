"""A training step of TRL's SDPO trainer, patched and not: time and peak memory.

    python -m benchmarks.bench_trl --modes full-reverse topk

Timed is ``compute_loss`` with the backward pass of one micro-batch that is already generated; generation, rewards
and the optimizer are TRL's either way. The model has SmolLM2-135M's width and vocabulary, random weights and few
layers, so the head has a larger share of the step than in the full model: with more layers the ratio of times moves
towards 1, the difference does not change.

    TRL       TRL as it is
    hidden    patch_trl("hidden"): from hidden states, no logits
    logits    patch_trl("logits"): from logits, for models whose head is not a plain linear layer

``--trainers GKD GOLD`` does the same for the trainers with a teacher model of its own, whose loss is TRL's
``generalized_jsd_loss``; their rows are in a file of their own. Each also has, under bfloat16 autocast, how far the
loss is from the float64 loss of the same hidden states and heads.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, Literal

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from benchmarks import harness
from benchmarks.conversations import random_llama
from fastsdpo.integrations.trl import patch_trl
from fastsdpo.prefix import run_inside
from fastsdpo.testing import classes_divergence

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
    "topk-tail": {
        "distillation_mode": "topk_logits",
        "distillation_topk": 100,
        "distillation_add_tail": True,
    },
    "full-reverse and policy": {"distillation_mode": "full_logits", "distillation_weight": 0.5},
    "policy": {"distillation_weight": 0.0},
}


def make_trainer(folder: str, model: nn.Module) -> SDPOTrainer:
    words = {"<pad>": 0, "<end>": 1, "word": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="word"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="word"
    )
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
        processing_class=tokenizer,
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


BETAS = {"forward": 0.0, "jsd": 0.5, "reverse": 1.0}


def make_generalized(name: str, folder: str, model: nn.Module, teacher: nn.Module) -> Any:
    """TRL's GKDTrainer or GOLDTrainer."""
    from trl.experimental import gkd, gold

    config, kind = {
        "GKD": (gkd.GKDConfig, gkd.GKDTrainer),
        "GOLD": (gold.GOLDConfig, gold.GOLDTrainer),
    }[name]
    symbols = {token: number for number, token in enumerate(["<pad>", "<end>", *"word"])}
    backend = Tokenizer(models.BPE(symbols, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "word"}, {"role": "assistant", "content": "word"}]
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    return kind(
        model=model,
        teacher_model=teacher,
        args=config(output_dir=folder, **settings),
        train_dataset=Dataset.from_dict({"messages": [messages] * 4}),
        processing_class=tokenizer,
    )


def sequences_of(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Prompts and completions as these trainers take them."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : batch["prompt_ids"].shape[1]] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def exact_loss(trainer: Any, batch: dict[str, torch.Tensor]) -> float:
    """float64, of the hidden states that the models give under bfloat16 autocast."""
    # GKD samples at its temperature, GOLD divides the logits by it too.
    temperature = trainer.temperature if type(trainer).__name__ == "GOLDTrainer" else 1.0
    states, counts = [], batch["labels"][:, 1:] != -100
    for model in (trainer.model, trainer.teacher_model):
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = run_inside(model, lambda hidden: hidden, given)[:, :-1][counts]
        weight = model.get_output_embeddings().weight.detach()
        states.append((hidden.double() @ weight.double().T / temperature).log_softmax(-1))
    return classes_divergence(states[0], states[1], trainer.beta).mean().item()


def bench_generalized(name: str, args: Any, folder: str, batch: dict[str, Any]) -> list[harness.Row]:
    model = random_llama(args.vocabulary, args.hidden, args.layers)
    teacher = random_llama(args.vocabulary, args.hidden, args.layers)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.2 * weight.std() * torch.randn_like(weight))
    trainer, given, rows = make_generalized(name, folder, model, teacher), sequences_of(batch), []
    trainer.model.eval()
    counted = int((given["labels"] != -100).sum())
    size = {"tokens": counted, "vocabulary": args.vocabulary, "hidden": args.hidden, "layers": args.layers}

    def step() -> torch.Tensor:
        loss = trainer.compute_loss(trainer.model, dict(given))
        loss.backward()
        return loss.detach()

    def patched(source: Literal["hidden", "logits"]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with patch_trl(source):
                return step()

        return run

    runs = {"TRL": step, "hidden": patched("hidden"), "logits": patched("logits")}
    for mode, beta in BETAS.items():
        trainer.beta = beta
        exact, errors = exact_loss(trainer, given), {}
        for rival, run in runs.items():
            with torch.autocast("cpu", torch.bfloat16):
                errors[rival] = abs(run().item() / exact - 1)
        case = {"trainer": name, "mode": mode, **size}
        extra = {"bfloat16_exact_loss": exact, "bfloat16_relative_error": errors}
        rows.append(harness.compare(case, runs, args, prepare=trainer.model.zero_grad, **extra))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__)
    parser.size("modes", list(MODES), ["sampled"], str, nargs="+", choices=list(MODES))
    parser.add_argument("--trainers", nargs="*", default=[], choices=["GKD", "GOLD"])
    parser.size("sequences", 4, 2)
    parser.size("prompt", 32, 4)
    parser.size("completion", 128, 8)
    parser.size("vocabulary", 49152, 2048)
    parser.size("hidden", 576, 72)
    parser.size("layers", 2, 1)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    size = {"tokens": args.sequences * args.completion, "vocabulary": args.vocabulary, "hidden": args.hidden}
    for name in args.trainers:
        with tempfile.TemporaryDirectory() as folder:
            batch = make_batch(args.sequences, args.prompt, args.completion, args.vocabulary)
            rows = bench_generalized(name, args, folder, batch)
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

        def patched(source: Literal["hidden", "logits"]) -> Callable[[], torch.Tensor]:
            def run() -> torch.Tensor:
                with patch_trl(source):
                    return step()

            return run

        runs = {"TRL": step, "hidden": patched("hidden"), "logits": patched("logits")}
        for mode in args.modes:
            for key, value in {**DEFAULTS, **MODES[mode]}.items():
                setattr(trainer.args, key, value)
            case = {"mode": mode, **size, "layers": args.layers}
            row = harness.compare(case, runs, args, prepare=model.zero_grad)
            harness.record(harness.results_file("trl", args), [row])


if __name__ == "__main__":
    main()
