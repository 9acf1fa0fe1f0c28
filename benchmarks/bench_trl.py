"""A training step of TRL's SDPO trainer, patched and not: time and peak memory on the CPU.

    python benchmarks/bench_trl.py --cases full-reverse topk

What is timed is ``compute_loss`` and the backward pass of one micro-batch that is already generated:
student forward, teacher forward, loss, gradients; generation, rewards and the optimizer are TRL's either
way. The model has SmolLM2-135M's width and vocabulary, random weights and few layers, so the head has a
larger share of the step than in the full model: with more layers the ratio of times moves towards 1, the
difference does not change.

    TRL       TRL as it is
    hidden    patch_trl("hidden"): from hidden states, no logits
    logits    patch_trl("logits"): from logits, for models whose head is not a plain linear layer

All in one process, one trainer, interleaved; the losses must agree to 1e-4 before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from benchmarks._harness import Rival, add_output, environment, interleave, record, table
from fastsdpo.integrations.trl import patch_trl

CASES: dict[str, dict[str, Any]] = {
    "sampled": {"distillation_mode": "sampled_token"},
    "full-reverse": {"distillation_mode": "full_logits", "distillation_alpha": 1.0},
    "full-jsd": {"distillation_mode": "full_logits", "distillation_alpha": 0.5},
    "topk": {"distillation_mode": "topk_logits", "distillation_topk": 100},
    "topk-tail": {
        "distillation_mode": "topk_logits",
        "distillation_topk": 100,
        "distillation_add_tail": True,
    },
    "full-reverse and policy": {
        "distillation_mode": "full_logits",
        "distillation_alpha": 1.0,
        "distillation_weight": 0.5,
    },
    "policy": {"distillation_weight": 0.0},
}
SOURCES = ("TRL", "hidden", "logits")


def make_trainer(folder: str, layers: int, vocabulary: int, hidden: int) -> SDPOTrainer:
    torch.manual_seed(0)
    words = {"<pad>": 0, "<end>": 1, "word": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="word"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="word"
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.05,
        )
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


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, args.layers, args.vocabulary, args.hidden)
        batch = make_batch(args.sequences, args.prompt, args.completion, args.vocabulary)
        tokens = int(batch["completion_mask"].sum())
        defaults = {"distillation_add_tail": False, "distillation_weight": 1.0}
        defaults |= {"distillation_alpha": 1.0, "distillation_mode": "sampled_token"}
        model = trainer.model.eval()  # no dropout in it; the trainer then does not scale the loss

        def step() -> torch.Tensor:
            loss = trainer.compute_loss(model, batch)
            loss.backward()
            return loss.detach()

        def patched(source: str) -> Any:
            def run() -> torch.Tensor:
                with patch_trl(source):  # type: ignore[arg-type]
                    return step()

            return run

        for case in args.cases:
            for key, value in {**defaults, **CASES[case]}.items():
                setattr(trainer.args, key, value)
            runs = {source: step if source == "TRL" else patched(source) for source in SOURCES}
            losses = {}
            for source, run in runs.items():
                losses[source] = run()
                model.zero_grad()
            for source, loss in losses.items():
                torch.testing.assert_close(loss, losses["TRL"], rtol=1e-4, atol=1e-5, msg=source)
            rivals = [Rival(source, run, model.zero_grad) for source, run in runs.items()]
            for source, timing in interleave(rivals, args.rounds).items():
                rows.append(
                    {
                        "case": case,
                        "tokens": tokens,
                        "shape": f"{args.sequences * args.completion} x {args.vocabulary} x "
                        f"{args.hidden}, {args.layers} layers",
                        "who": source,
                        "seconds": timing.median,
                        "fastest": timing.fastest,
                        "slowest": timing.slowest,
                        "peak_bytes": timing.peak_bytes,
                        "environment": environment(),
                    }
                )
                print(f"{case:24} {source:8} {timing.median:.2f} s  {(timing.peak_bytes or 0) >> 20} MiB")
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    where = rows[0]["environment"]
    base = {(r["case"], r["shape"]): r for r in rows if r["who"] == "TRL"}
    lines = []
    for row in rows:
        against = base[row["case"], row["shape"]]
        lines.append(
            [
                row["case"],
                row["shape"],
                row["who"],
                f"{row['seconds']:.2f}",
                f"{row['fastest']:.2f}",
                f"{row['slowest']:.2f}",
                f"{row['seconds'] / against['seconds']:.2f}",
                f"{(row['peak_bytes'] or 0) >> 20}",
                f"{(row['peak_bytes'] or 0) / (against['peak_bytes'] or 1):.2f}",
            ]
        )
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    commands = sorted({f"{r['environment']['command']} ({r['environment']['commit']})" for r in rows})
    return (
        "# TRL's SDPO trainer, patched and not, on a CPU\n\n"
        f"{where['device']}; {where['native']}; Python {where['python']}; {versions}. float32. "
        "No GPU was used.\n\n"
        "One micro-batch: student and teacher forward, loss, backward; what is timed, and why few "
        "layers: `benchmarks/bench_trl.py`. Shapes are completion tokens (padding included, 1/8 of "
        "them) x vocabulary x width. Seconds are medians; memory is the rise of the resident set "
        "over its start, gradients included.\n\n"
        + table(
            [
                "loss",
                "shape",
                "who",
                "s",
                "fastest",
                "slowest",
                "time / TRL",
                "peak MiB",
                "peak / TRL",
            ],
            lines,
        )
        + "\n## Commands\n\n"
        + "".join(f"- `{command}`\n" for command in commands)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", default="", help="name of the results file; none is written without")
    add_output(parser)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = measure(args)
    if args.record:
        record(args.record, rows, ("case", "shape", "who"), markdown, args.output)


if __name__ == "__main__":
    main()
