"""The losses of ms-swift, axolotl and torchrl as installed, beside ours in their place: time and peak memory.

    PYTHONPATH=build/peers/swift python -m benchmarks.bench_peers --peer swift
    PYTHONPATH=build/peers/axolotl python -m benchmarks.bench_peers --peer axolotl
    PYTHONPATH=build/peers/torchrl python -m benchmarks.bench_peers --peer torchrl

`make peers` makes these folders. Forward and backward from hidden states, the products with the head in it. ``swift``:
its `gkd_loss` over the logits of both models at the tokens that count. ``axolotl``: its chunked top-k loss (its code,
not compiled) over all tokens, of which those that count are half; with the head trained, and frozen as under LoRA.
``torchrl``: its `DistillationLoss` (k3, the teacher's log-probs in the data) of a model, ours in mode "k3", and ours
over the whole vocabulary with the teacher's pass in it, which is another loss; half the tokens count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks import harness
from benchmarks.conversations import random_llama
from fastsdpo.integrations.axolotl import KDSettings, kd_loss
from fastsdpo.integrations.swift import GKDSettings, HeadLogits, divergence
from fastsdpo.prefix import HeadParameters

Runs = dict[str, Callable[[], Tensor]]


def step(loss_of: Callable[..., Tensor], *leaves: tuple[Tensor, bool]) -> Callable[[], Tensor]:
    """One forward and backward pass; returns the gradient of the first leaf."""

    def run() -> Tensor:
        given = [leaf.detach().requires_grad_(trained) for leaf, trained in leaves]
        loss_of(*given).backward()
        grad = given[0].grad
        assert grad is not None
        return grad

    return run


def swift_runs(args: argparse.Namespace, beta: float, topk: int | None) -> Runs:
    from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

    hidden = torch.randn(1, args.tokens, args.hidden)
    states = hidden + 0.3 * torch.randn_like(hidden)
    weight = torch.randn(args.vocabulary, args.hidden) * 2.5 / args.hidden**0.5
    labels = torch.zeros(1, args.tokens, dtype=torch.long)

    def theirs(h: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = TeacherOutput(full_logits=states @ w.T, labels=labels)
        teacher = teacher if topk is None else teacher.to_topk(topk)
        total, number = gkd_loss(h @ w.T, teacher, labels, beta, 1.0)
        return total / number

    def ours(h: Tensor, w: Tensor) -> Tensor:
        teacher = HeadLogits(states[0], HeadParameters(w.detach(), None, None, 1.0))
        support = None if topk is None else teacher.topk_logits(topk)
        student = HeadLogits(h[0], HeadParameters(w, None, None, 1.0))
        return divergence(student, teacher, support, GKDSettings(beta, 1.0))[0]

    leaves = (hidden, True), (weight, True)
    return {"ms-swift": step(theirs, *leaves), "ours": step(ours, *leaves)}


def axolotl_runs(args: argparse.Namespace, frozen: bool, normalize: bool) -> Runs:
    from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss

    half = args.tokens // 2
    hidden = torch.randn(1, args.tokens, args.hidden)
    weight = torch.randn(args.vocabulary, args.hidden) * 2.5 / args.hidden**0.5
    labels = torch.randint(args.vocabulary, (1, args.tokens))
    labels[:, :half] = -100
    ids = torch.stack([torch.randperm(args.vocabulary)[: args.topk] for _ in range(args.tokens)])[None]
    logprobs = torch.randn(1, args.tokens, args.topk).log_softmax(-1)
    mask = (labels != -100)[..., None].expand(ids.shape).int()
    settings = KDSettings(0.9, 0.1, 1.0, 0.0, normalize)
    loss = LigerFusedLinearKLTopKLogprobLoss(0.1, 0.9, 1.0, 0.0, compiled=False, normalize_topk=normalize)

    def theirs(h: Tensor, w: Tensor) -> Tensor:
        return loss(w, h, ids, logprobs, mask, true_labels=labels) / half

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return kd_loss(h, HeadParameters(w, None, None, 1.0), labels, ids, logprobs, mask, settings) / half

    leaves = (hidden, True), (weight, not frozen)
    return {"axolotl": step(theirs, *leaves), "ours": step(ours, *leaves)}


def torchrl_runs(args: argparse.Namespace) -> Runs:
    from tensordict import TensorDict, lazy_stack
    from torchrl.data.llm.history import History
    from torchrl.modules.llm import TransformersWrapper
    from torchrl.modules.llm.policies.common import ChatHistory
    from torchrl.objectives.llm import DistillationLoss

    from fastsdpo.integrations.torchrl import SDPODistillationLoss

    # A token for each letter; the padding of a word is a space, which is none.
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<end>", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="a")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <end> "
        "{% endgeneration %}{% else %}{{ m['content'] }} <end> {% endif %}{% endfor %}"
    )
    words = " ".join("abcdefgh"[i % 8] for i in range(args.tokens // 4 - 1))
    chats = [[{"role": "user", "content": words}, {"role": "assistant", "content": words}] for _ in range(2)]
    history = History.from_chats(chats)
    data = lazy_stack(list(TensorDict(history=ChatHistory(full=history), batch_size=(2,)).unbind(0)))
    length = 2 * (args.tokens // 4)
    data["next", "teacher_log_probs", "full"] = lazy_stack([-torch.rand(length) - 9 for _ in range(2)])
    model, teacher = (random_llama(args.vocabulary, args.hidden, 1) for _ in range(2))
    actor = TransformersWrapper(model, tokenizer=tokenizer, generate=False, input_mode="history", pad_output=False)

    def run(loss_of: Any, *without: Any) -> Callable[[], Tensor]:
        def once() -> Tensor:
            model.zero_grad()
            loss_of(data.exclude(*without)).loss_distill.backward()
            return model.get_output_embeddings().weight.grad.clone()

        return once

    whole = SDPODistillationLoss(actor, teacher_network=teacher, mode="full", alpha=0.5)
    return {
        "torchrl": run(DistillationLoss(actor)),
        "ours": run(SDPODistillationLoss(actor, mode="k3")),
        "ours, whole vocabulary": run(whole),
    }


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__, rounds=3)
    parser.add_argument("--peer", choices=("swift", "axolotl", "torchrl"), required=True)
    parser.size("tokens", 256, 16)
    parser.size("vocabulary", 49152, 512)
    parser.size("hidden", 576, 36)
    parser.size("topk", 20, 4)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    size: dict[str, Any] = {"tokens": args.tokens, "vocabulary": args.vocabulary, "hidden": args.hidden}
    cases: dict[str, Runs]
    if args.peer == "swift":
        losses = {"forward": (0.0, None), "jsd": (0.5, None), "reverse": (1.0, None)}
        losses["top-k, forward"] = (0.0, args.topk)
        cases = {name: swift_runs(args, *loss) for name, loss in losses.items()}
    elif args.peer == "torchrl":
        cases = {"k3": torchrl_runs(args)}
    else:
        names = {True: "normalized", False: "as it is"}, {False: "trained", True: "frozen"}
        cases = {
            f"{names[0][normalize]}, head {names[1][frozen]}": axolotl_runs(args, frozen, normalize)
            for frozen in (False, True)
            for normalize in (True, False)
        }
    rows = []
    for name, runs in cases.items():
        other = runs.pop("ours, whole vocabulary", None)  # another loss: timed, not compared
        case = {"peer": args.peer, "loss": name, **size}
        row = harness.compare(case, runs, args)
        if other is not None:
            alone = harness.compare({**case, "loss": "JSD"}, {"ours, whole vocabulary": other}, args)
            row["rivals"] |= alone["rivals"]
        rows.append(row)
    harness.record(harness.results_file("peers", args), rows)


if __name__ == "__main__":
    main()
