"""A step of verl's actor (its FSDP2 engine, one process) that is its own teacher: ours, plain PyTorch, and without.

    python -m benchmarks.bench_verl

One step is the engine's forward and backward passes over two micro-batches; rollouts and the optimizer are not in it.

    ours              `use_self_teacher`: the teacher's pass, the student's, the loss of `fastsdpo.sdpo_loss`
    plain             the same passes; the loss by log-softmaxes of the kept logits in plain PyTorch
    no distillation   verl's policy loss alone: one pass fewer, another loss

``server``: no second pass, but the teacher's top-k and log-probs in the batch: ours is the divergence with a class for
the rest, verl's is its forward KL without that class. Those of a row that are not the same loss are not compared.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import harness, verl_on_cpu
from benchmarks.conversations import random_llama
from benchmarks.trl_trainers import make_tokenizer
from fastsdpo.integrations import verl as integration
from fastsdpo.integrations import verl_self_teacher
from fastsdpo.testing import classes_divergence

LOSSES: dict[str, dict[str, Any]] = {
    "sampled token": {"mode": "sampled_token"},
    "reverse KL": {"mode": "full", "alpha": 1.0},
    "JSD": {"mode": "full", "alpha": 0.5},
    "top 100 and tail": {"mode": "topk", "alpha": 1.0, "topk": 100},
}
Runs = dict[str, Callable[[], Any]]


def plain_divergences(
    divergence: integration.Divergence, student_logits: Tensor, data: Any, rows: Tensor, teacher: dict[str, Any]
) -> dict[str, Tensor]:
    """In the place of `fastsdpo.integrations.verl.divergences`."""
    _, total = integration.row_targets(student_logits, data, rows)
    s, t = (logits.float().log_softmax(-1) for logits in (student_logits[0, rows], teacher["teacher_logits"]))
    if divergence.topk is not None:
        support = s.detach().topk(divergence.topk).indices
        s, t = (x.gather(-1, support) for x in (s, t))
        s, t = (torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))], -1) for x in (s, t))
    values = classes_divergence(s, t, divergence.alpha)
    found = {"distillation_losses": values, "distillation_counts": torch.ones_like(values)}
    return {key: value.new_zeros(total).index_put((rows,), value)[None] for key, value in found.items()}


def plain_sampled(student_logits: Tensor, teacher_logits: Tensor, data: Any, rows: Tensor) -> dict[str, Tensor]:
    """In the place of `verl_self_teacher._sampled_tokens`."""
    ids, total = integration.row_targets(student_logits, data, rows)
    student, teacher = (
        logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        for logits in (student_logits[0, rows], teacher_logits)
    )
    found = {"student": student, "teacher": teacher, "counts": torch.ones_like(student)}
    return {
        f"distillation_{key}": value.new_zeros(total).index_put((rows,), value)[None] for key, value in found.items()
    }


def make_batch(args: argparse.Namespace) -> Any:
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    g = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[Tensor]:
        return [torch.randint(3, args.vocabulary, (length,), generator=g) for _ in range(args.sequences)]

    prompts, answers = draw(args.prompt), draw(args.completion)
    whole = [torch.cat(both) for both in zip(prompts, answers)]
    ones, shape = [torch.ones_like(row) for row in answers], (args.completion,)
    served = [(torch.randn(len(row), args.vocabulary, generator=g)).log_softmax(-1).topk(args.topk) for row in whole]
    columns = {
        "prompts": prompts,
        "responses": answers,
        "input_ids": whole,
        "position_ids": [torch.arange(len(row)) for row in whole],
        "response_mask": ones,
        "loss_mask": ones,
        "old_log_probs": [-torch.rand(shape, generator=g) - 9 for _ in answers],
        "advantages": [torch.randn(shape, generator=g) for _ in answers],
        "teacher_ids": [best.indices.int() for best in served],
        "teacher_logprobs": [best.values for best in served],
    }
    tensors = {name: verl_on_cpu.nested(rows) for name, rows in columns.items()}
    data = TensorDict(tensors, batch_size=args.sequences)
    teachers = [row.tolist() for row in draw(2 * args.prompt)]
    tensordict_utils.assign_non_tensor_stack(data, "teacher_prompt_ids", teachers)
    settings = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": max(1, args.sequences // 2)}
    settings |= {"temperature": 1.0, "use_remove_padding": True, "global_batch_size": args.sequences}
    tensordict_utils.assign_non_tensor(data, **settings)
    return data


def head_gradient(engine: Any, data: Any, loss: Any) -> Tensor:
    return verl_on_cpu.run(engine, data.clone(), loss)[1]["lm_head.weight"]


def self_teacher_runs(engine: Any, data: Any, options: dict[str, Any]) -> Runs:
    def ours() -> Tensor:
        with verl_self_teacher.use_self_teacher(**options):
            return head_gradient(engine, data, verl_on_cpu.actor_loss())

    def plain() -> Tensor:
        with (
            mock.patch.object(verl_self_teacher, "divergences", plain_divergences),
            mock.patch.object(verl_self_teacher, "_sampled_tokens", plain_sampled),
        ):
            return ours()

    def without() -> None:
        head_gradient(engine, data, verl_on_cpu.actor_loss())

    return {"plain": plain, "ours": ours, "no distillation": without}


def server_runs(engine: Any, data: Any, topk: int) -> Runs:
    from verl.trainer.distillation import losses
    from verl.utils import tensordict_utils
    from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig

    actor = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    integration.register_distillation_loss("served", mode="topk", alpha=0.0)
    data = data.clone()
    tensordict_utils.assign_non_tensor(data, distillation_use_topk=True, distillation_only=True)

    def run(loss_mode: str) -> None:
        settings = {"loss_mode": loss_mode, "topk": topk, "use_task_rewards": False, "use_policy_gradient": False}
        config = DistillationConfig(distillation_loss=DistillationLossConfig(**settings))
        head_gradient(engine, data, functools.partial(losses.distillation_ppo_loss, actor, config))

    return {"verl": functools.partial(run, "forward_kl_topk"), "ours": functools.partial(run, "served")}


def same(got: Tensor | None, want: Tensor | None) -> bool:
    if got is None or want is None:  # another loss
        return True
    return bool((got - want).norm() <= 1e-4 * want.norm())


def main(argv: list[str] | None = None) -> None:
    parser = harness.Arguments(__doc__, rounds=3)
    parser.model_sizes()
    parser.size("topk", 20, 4)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    verl_on_cpu.use_cpu()
    size = harness.size_of(args)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_llama(args.vocabulary, args.hidden, args.layers)
        model.config.tie_word_embeddings = False
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        engine, data = verl_on_cpu.make_engine(folder), make_batch(args)
        for name, options in LOSSES.items():
            case = {"peer": "verl", "teacher": "self", "loss": name, **size, "layers": args.layers}
            rows.append(harness.compare(case, self_teacher_runs(engine, data, options), args, same=same))
        case = {"peer": "verl", "teacher": "server", "loss": f"top {args.topk}", **size, "layers": args.layers}
        rows.append(harness.compare(case, server_runs(engine, data, args.topk), args, same=same))
    torch.distributed.destroy_process_group()
    harness.record(harness.results_file("verl", args), rows)


if __name__ == "__main__":
    main()
