"""The helpers for verl and for loops on transformers: time and peak memory beside plain PyTorch.

    python -m benchmarks.bench_integrations

``verl``: the loss of the SDPO fork of verl, forward and backward, from the logits of student and teacher, and from
their hidden states, where the products with the head are in the time; plain is the fork's formula written anew
(https://arxiv.org/abs/2601.20802, aggregation "token-mean"), ours is `self_distillation_loss`.

``transformers``: the log-probabilities of labels under a model and their gradient, its forward and backward pass
included; plain is ``model(...).logits``, log_softmax and gather, ours is `fused_logps`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.conversations import random_llama
from fastsdpo.integrations.sdpo_fork import self_distillation_loss
from fastsdpo.integrations.transformers import fused_logps
from fastsdpo.prefix import HeadParameters

CONFIGS: dict[str, dict[str, Any]] = {
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
Runs = dict[str, Callable[[], Tensor]]


def plain_loss(student: Tensor, teacher: Tensor, ids: Tensor, mask: Tensor, config: dict[str, Any]) -> Tensor:
    """The fork's loss from logits ``[B, T, V]``."""
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


def verl_runs(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Runs]:
    """Plain and ours, from logits and from hidden states."""
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

    def step(loss_of: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = loss_of(*(leaf.detach().requires_grad_() for leaf in leaves))
            loss.backward()
            return loss.detach()

        return run

    def plain_hidden(h: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = teacher_hidden @ w.T
        return plain_loss(h @ w.T, teacher, ids, mask, config)

    def ours_hidden(h: Tensor, w: Tensor) -> Tensor:
        head = HeadParameters(w, None, None, 1.0)
        return self_distillation_loss(h, teacher_hidden, ids, mask, settings, head=head)[0]

    return {
        "logits": {
            "plain": step(lambda s: plain_loss(s, teacher_logits, ids, mask, config), student_logits),
            "ours": step(lambda s: self_distillation_loss(s, teacher_logits, ids, mask, settings)[0], student_logits),
        },
        "hidden": {"plain": step(plain_hidden, hidden, weight), "ours": step(ours_hidden, hidden, weight)},
    }


def transformers_runs(args: argparse.Namespace) -> tuple[nn.Module, Runs]:
    model = random_llama(args.vocabulary, args.hidden, args.layers)
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


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__, rounds=5)
    parser.model_sizes()
    args = parser.parse_args(argv)
    size = harness.size_of(args)
    rows = []
    for name, config in CONFIGS.items():
        for source, runs in verl_runs(args, config).items():
            case = {"helper": "verl", "from": source, "mode": name, **size}
            rows.append(harness.compare(case, runs, args))
    model, runs = transformers_runs(args)
    case = {"helper": "transformers", "from": "model", "mode": "log-probs", **size, "layers": args.layers}
    rows.append(harness.compare(case, runs, args, prepare=model.zero_grad))
    harness.record(harness.results_file("integrations", args), rows)


if __name__ == "__main__":
    main()
