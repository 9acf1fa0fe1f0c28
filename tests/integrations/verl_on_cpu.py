"""A batch for verl's own FSDP engine on a CPU, and the gradients that it must find.

As a program it is one of several processes: verl_on_cpu.py MODEL   (RANK, WORLD_SIZE, MASTER_* are set)
"""

import contextlib
import functools
import importlib
import sys
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.verl_on_cpu import actor_loss as actor_loss
from benchmarks.verl_on_cpu import make_engine as make_engine
from benchmarks.verl_on_cpu import nested as nested
from benchmarks.verl_on_cpu import run as run
from benchmarks.verl_on_cpu import use_cpu as use_cpu
from fastsdpo.testing import oracle_sdpo_loss

TEMPERATURE = 0.8
# Prompts, answers, which tokens of an answer count (a tool wrote the others), the teacher's prompts.
PROMPTS = [[7, 8], [9, 10, 11, 12], [6], [40, 41, 42]]
ANSWERS = [[13, 14, 15, 16], [17], [20, 21, 22], [30, 31]]
MASKS = [[1, 0, 1, 1], [1], [1, 1, 1], [1, 1]]
TEACHERS = [[7, 8, 50, 51, 52], [9, 33], None, [44, 45, 46, 47, 48, 49]]
SEQUENCES = range(len(PROMPTS))
TOPK = 5


@contextlib.contextmanager
def one_process():
    """Until the end of the block, a process group of this process alone; verl's engine can be made."""
    with pytest.MonkeyPatch.context() as patch:
        from transformers.integrations import flash_attention

        # verl replaces it for the process
        patch.setattr(flash_attention, "_flash_attention_forward", flash_attention._flash_attention_forward)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # engines for which packages are missing
            importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def pad(which):
    """Prompts padded on the left, answers on the right."""
    prompts, answers = ([x[i] for i in which] for x in (PROMPTS, ANSWERS))
    before, after = max(map(len, prompts)), max(map(len, answers))
    rows = [[0] * (before - len(x)) + x + y + [0] * (after - len(y)) for x, y in zip(prompts, answers)]
    used = [[0] * (before - len(x)) + [1] * len(x + y) + [0] * (after - len(y)) for x, y in zip(prompts, answers)]
    ids, attention = torch.tensor(rows), torch.tensor(used)
    masks = torch.tensor([MASKS[i] + [0] * (after - len(MASKS[i])) for i in which])
    found = {"input_ids": ids, "attention_mask": attention, "position_ids": (attention.cumsum(1) - 1).clamp(min=0)}
    return {**found, "prompts": ids[:, :before], "responses": ids[:, before:], "response_mask": masks}


def make_batch(which=SEQUENCES, *, packed=True, padded=False, teacher="column", **columns):
    """A batch as verl's trainer hands it to a worker; ``columns`` of tensors.

    ``packed``: without padding inside the model; ``padded``: as verl's older trainer makes it, and in micro-batches by
    tokens in place of two sequences.
    """
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.utils.padding import left_right_2_no_padding

    masks = nested([MASKS[i] for i in which])
    rows = [PROMPTS[i] + ANSWERS[i] for i in which]
    tensors = {"prompts": nested([PROMPTS[i] for i in which]), "responses": nested([ANSWERS[i] for i in which])}
    tensors |= {"input_ids": nested(rows), "position_ids": nested([torch.arange(len(row)) for row in rows])}
    tensors |= {"response_mask": masks, "loss_mask": masks}
    tensors |= {name: nested([values[i] for i in which]) for name, values in columns.items()}
    data = TensorDict(tensors, batch_size=len(which))
    if padded:
        data = left_right_2_no_padding(TensorDict(pad(which), batch_size=len(which)))
    prompts = [TEACHERS[i] for i in which]
    if teacher == "column":
        tensordict_utils.assign_non_tensor_stack(data, "teacher_prompt_ids", prompts)
    if teacher == "agent loop":
        extras = [{"teacher_prompt_ids": prompt, "turn_scores": []} for prompt in prompts]
        tensordict_utils.assign_non_tensor_stack(data, "extra_fields", extras)
    settings = {"use_dynamic_bsz": padded, "micro_batch_size_per_gpu": 2, "max_token_len_per_gpu": 12}
    settings |= {"temperature": TEMPERATURE, "use_remove_padding": packed, "global_batch_size": len(SEQUENCES)}
    tensordict_utils.assign_non_tensor(data, **settings)
    return data


@functools.cache
def logits_of(folder, adapter=None):
    """``(model, student, teacher)`` in float64: per sequence the logits ``[T, V]`` before its answer's tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True).double()

    def rows(prompt, answer):
        ids = torch.tensor([prompt + answer])
        return model(ids).logits[0, -len(answer) - 1 : -1]

    student = [rows(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS)]
    with torch.no_grad():
        teacher = [rows(prompt or own, answer) for prompt, own, answer in zip(TEACHERS, PROMPTS, ANSWERS)]
    return model, student, teacher


def defined(folder, mode, teacher=None, support=None, bound=None, factors=None, adapter=None, **options):
    """``(loss, gradients)``: the sum over tokens that count, divided by the number of all tokens that count.

    Args:
        teacher: logits per sequence, in place of those of the model behind `TEACHERS`.
        support: ids per sequence.
        bound: tokens of a larger loss have this one, without a gradient.
        factors: per sequence, of the tokens' losses.
        adapter: a folder of PEFT.
    """
    model, student, behind_prompts = logits_of(folder, adapter)
    model.zero_grad()
    total, divisor = 0.0, sum(map(sum, MASKS))
    for i in SEQUENCES:
        if teacher is None and TEACHERS[i] is None:
            continue
        ids = torch.tensor(ANSWERS[i]).masked_fill(torch.tensor(MASKS[i]) == 0, -100)
        given = {"temperature": TEMPERATURE, "mode": mode, **options}
        given |= {} if support is None else {"topk_ids": support[i]}
        loss_of = functools.partial(oracle_sdpo_loss, student[i], (teacher or behind_prompts)[i], ids, **given)
        weights = torch.ones(ids.shape, dtype=torch.float64) if factors is None else torch.as_tensor(factors[i])
        out = loss_of(weights=weights / divisor)
        # verl reports the log-ratio, of which the sampled-token loss has the gradient.
        values = out.student_logps - out.teacher_logps if mode == "sampled_token" else out.per_token_loss * weights
        if bound is not None:
            out = loss_of(weights=weights * (values <= bound) / divisor)
            values = values.clamp(max=bound)
        total += values.sum().item() / divisor
        student[i].backward(out.grad, retain_graph=True)
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, want):
    assert abs(found[0] - want[0]) <= 1e-5 * abs(want[0])
    for name, grad in want[1].items():
        gap = (found[1][name].double() - grad).norm()
        assert gap <= 2e-5 * grad.norm() + 1e-9, f"{name}: {gap} of {grad.norm()}"


OBJECTIVES = {
    "sampled": {"mode": "sampled_token"},
    "reverse": {"mode": "full"},
    "jsd": {"mode": "full", "alpha": 0.3},
    "topk-tail": {"mode": "topk", "alpha": 0.0, "topk": TOPK},
}


def main(folder):
    """Each process has its own sequences; the gradients are those of the whole batch."""
    from fastsdpo.integrations.verl_self_teacher import use_self_teacher

    use_cpu()
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    part = list(SEQUENCES)[rank::world]
    engine = make_engine(folder)
    for objective in OBJECTIVES.values():
        with use_self_teacher(**objective):
            found = run(engine, make_batch(part), actor_loss())
        loss = torch.tensor(found[0])
        torch.distributed.all_reduce(loss)
        assert_same((loss.item() / world, found[1]), defined(folder, **objective))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
