"""The helpers for verl and for loops on transformers: time and peak memory on the CPU.

    python benchmarks/bench_integrations.py

``verl``: the loss of the SDPO fork of verl, forward and backward, from the logits of student and teacher
(from their hidden states in the rows that say so, where the products with the head are in every row):

    plain       log-softmaxes of both, then the fork's formula, re-implemented in plain PyTorch
    ours        `self_distillation_loss`: from logits, or from hidden states

``transformers``: the log-probabilities of labels under a model and their gradient, its forward and
backward pass included:

    plain       model(...).logits, log_softmax, gather
    ours        `fused_logps`

float32, one process, interleaved; losses and log-probabilities must agree to 1e-4 before anything is
timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._harness import Rival, add_output, environment, interleave, record, table
from fastsdpo.integrations.transformers import fused_logps
from fastsdpo.integrations.verl import self_distillation_loss
from fastsdpo.prefix import HeadParameters

CONFIGS = {
    "sampled": {"full_logit_distillation": False},
    "full-reverse": {"full_logit_distillation": True, "alpha": 1.0},
    "full-jsd": {"full_logit_distillation": True, "alpha": 0.5},
    "topk-tail": {
        "full_logit_distillation": True,
        "alpha": 1.0,
        "distillation_topk": 100,
        "distillation_add_tail": True,
    },
}


def plain_loss(student: Tensor, teacher: Tensor, ids: Tensor, mask: Tensor, config: dict[str, Any]) -> Tensor:
    """Equation and aggregation ("token-mean") of https://arxiv.org/abs/2601.20802, from logits."""
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    if not config["full_logit_distillation"]:
        s, t = (x.gather(-1, ids[..., None])[..., 0] for x in (s, t))
        return (((s - t).detach() * s) * mask).sum() / mask.sum()
    if "distillation_topk" in config:
        support = s.detach().topk(config["distillation_topk"]).indices
        s, t = (x.gather(-1, support) for x in (s, t))
        s, t = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).clamp(min=1e-7).log()], -1) for x in (s, t))
    a = config["alpha"]
    if a == 1:
        loss = (s.exp() * (s - t)).sum(-1)
    else:
        m = ((1 - a) * s.exp() + a * t.exp()).log()
        loss = ((1 - a) * s.exp() * (s - m) + a * t.exp() * (t - m)).sum(-1)
    return (loss * mask).sum() / mask.sum()


def verl_rivals(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    g = torch.Generator().manual_seed(0)
    shape = args.sequences, args.completion
    hidden = torch.randn(*shape, args.hidden, generator=g)
    teacher_hidden = hidden + 0.1 * torch.randn(*shape, args.hidden, generator=g)
    weight = torch.randn(args.vocabulary, args.hidden, generator=g) * 2.5 / args.hidden**0.5
    ids = torch.randint(args.vocabulary, shape, generator=g)
    mask = torch.ones(shape)
    mask[1::2, args.completion * 3 // 4 :] = 0
    student_logits, teacher_logits = hidden @ weight.T, teacher_hidden @ weight.T
    settings = SimpleNamespace(**config)

    def from_logits(loss_of: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = loss_of(student_logits.detach().requires_grad_())
            loss.backward()
            return loss.detach()

        return run

    def from_hidden(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = loss_of(hidden.detach().requires_grad_(), weight.detach().requires_grad_())
            loss.backward()
            return loss.detach()

        return run

    def ours_hidden(h: Tensor, w: Tensor) -> Tensor:
        return self_distillation_loss(h, teacher_hidden, ids, mask, settings, head=HeadParameters(w, None, None, 1.0))[
            0
        ]

    def plain_hidden(h: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = teacher_hidden @ w.T
        return plain_loss(h @ w.T, teacher, ids, mask, config)

    return {
        "plain": from_logits(lambda s: plain_loss(s, teacher_logits, ids, mask, config)),
        "ours": from_logits(lambda s: self_distillation_loss(s, teacher_logits, ids, mask, settings)[0]),
        "plain, hidden states": from_hidden(plain_hidden),
        "ours, hidden states": from_hidden(ours_hidden),
    }


def transformers_rivals(args: argparse.Namespace) -> tuple[Any, dict[str, Callable[[], Tensor]]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocabulary,
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            intermediate_size=args.hidden * 8 // 3,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            initializer_range=0.05,
        )
    )
    ids = torch.randint(3, args.vocabulary, (args.sequences, args.prompt + args.completion))
    labels = ids.clone()
    labels[:, : args.prompt] = -100
    mask = torch.ones_like(ids)
    counts = labels[:, 1:] != -100

    def plain() -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][counts]
        logps.mean().backward()
        return logps.detach()

    def ours() -> Tensor:
        logps = fused_logps(model, ids, mask, labels)[:, 1:][counts]
        logps.mean().backward()
        return logps.detach()

    return model, {"plain": plain, "ours": ours}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    shape = f"{args.sequences * args.completion} x {args.vocabulary} x {args.hidden}"

    def time(
        theme: str, case: str, shape: str, runs: dict[str, Callable[[], Tensor]], reset: Callable[[], Any]
    ) -> None:
        first = None
        for who, run in runs.items():
            value = run()
            reset()
            first = value if first is None else first
            torch.testing.assert_close(value, first, rtol=1e-4, atol=1e-5, msg=f"{case}: {who}")
        rivals = [Rival(who, run, reset) for who, run in runs.items()]
        for who, timing in interleave(rivals, args.rounds).items():
            rows.append(
                {
                    "theme": theme,
                    "case": case,
                    "shape": shape,
                    "who": who,
                    "seconds": timing.median,
                    "fastest": timing.fastest,
                    "slowest": timing.slowest,
                    "peak_bytes": timing.peak_bytes,
                    "environment": environment(),
                }
            )
            print(f"{theme} {case:14} {who:22} {timing.median:.3f} s {(timing.peak_bytes or 0) >> 20} MiB", flush=True)

    for case, config in CONFIGS.items():
        time("verl", case, shape, verl_rivals(args, config), lambda: None)
    model, runs = transformers_rivals(args)
    time("transformers", "log-probs", f"{shape}, {args.layers} layers", runs, model.zero_grad)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    where = rows[0]["environment"]
    found = {(r["theme"], r["case"], r["who"]): r for r in rows}
    lines = []
    for row in rows:
        base = found[row["theme"], row["case"], row["who"].replace("ours", "plain")]
        lines.append(
            [
                row["theme"],
                row["case"],
                row["shape"],
                row["who"],
                f"{row['seconds']:.2f}",
                f"{row['fastest']:.2f}",
                f"{row['slowest']:.2f}",
                f"{row['seconds'] / base['seconds']:.2f}",
                f"{(row['peak_bytes'] or 0) >> 20}",
                f"{(row['peak_bytes'] or 0) / (base['peak_bytes'] or 1):.2f}",
            ]
        )
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    commands = sorted({f"{r['environment']['command']} ({r['environment']['commit']})" for r in rows})
    return (
        "# The helpers for verl and transformers, on a CPU\n\n"
        f"{where['device']}; {where['native']}; Python {where['python']}; {versions}. float32. "
        "No GPU was used.\n\nWhat is timed: `benchmarks/bench_integrations.py`. Shapes are tokens x "
        "vocabulary x width. Seconds are medians; memory is the rise of the resident set over its "
        "start, gradients included.\n\n"
        + table(
            ["for", "loss", "shape", "who", "s", "fastest", "slowest", "time / plain", "peak MiB", "peak / plain"],
            lines,
        )
        + "\n## Commands\n\n"
        + "".join(f"- `{command}`\n" for command in commands)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", default="", help="name of the results file; none is written without")
    add_output(parser)
    args = parser.parse_args()
    rows = measure(args)
    if args.record:
        record(args.record, rows, ("theme", "case", "shape", "who"), markdown, args.output)


if __name__ == "__main__":
    main()
