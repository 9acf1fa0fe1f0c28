"""Optimizer steps over the same interactions, as published code takes them and as fastsdpo does.

A rival is a function of (model, interactions) that accumulates the gradients and returns the loss: the
sampled-token loss with a live teacher, the mean over a response's tokens without its first two, then over
responses.

    official         batches of 4: contexts padded on the left, responses on the right; teacher and student in one
                     pass each, logits at every position (the code of https://arxiv.org/abs/2603.12273, written anew
                     from its description)
    trl-sdpo         the same batches through `compute_loss` of TRL's SDPOTrainer: padded, logits at the response's
                     positions only; the first two tokens count in its loss, since no option leaves them out
    trl-sdft         ... of its SDFTTrainer, which can (num_loss_tokens_to_skip)
    unpadded         one sequence at a time, logits at every position
    response-logits  ... logits at the positions that predict response tokens only
    fused-loss       ... the loss from hidden states (`linear_sdpo_loss`): sharing="off"
    interaction      ... the prefix that student and teacher share once: sharing="interaction"
    conversation     ... every prefix in a conversation once: sharing="conversation"
    checkpointed     ... with the model's gradient checkpointing: less memory, one more forward pass
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.conversations import load_tokenizer
from fastsdpo import linear_sdpo_loss, sequence_mean_weights
from fastsdpo.data.tokenization import TokenizedInteraction
from fastsdpo.prefix import count_tokens, head_parameters, shared_forward

BATCH = 4
IGNORED = 2  # first response tokens that the loss leaves out
Items = Sequence[TokenizedInteraction]
Backward = Callable[[nn.Module, Items], float]
STEPS: dict[str, Backward] = {}


def step(name: str) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Adds a rival."""

    def add(backward: Callable[..., float]) -> Callable[..., float]:
        STEPS[name] = backward
        return backward

    return add


def batches_of(items: Items) -> list[list[TokenizedInteraction]]:
    """Four interactions each, shuffled as by a data loader."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    return [[items[i] for i in order[n : n + BATCH]] for n in range(0, len(order), BATCH)]


def padded(batch: Items) -> dict[str, Tensor]:
    """Ids and masks: prompts padded on the left, responses on the right. Named as in TRL."""

    def pad(sequences: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            at = slice(longest - len(sequence), None) if left else slice(len(sequence))
            ids[row, at] = torch.tensor(sequence)
            mask[row, at] = 1
        return ids, mask

    y, y_mask = pad([i.completion_ids for i in batch], left=False)
    x, x_mask = pad([i.prompt_ids for i in batch], left=True)
    t, t_mask = pad([i.teacher_prompt_ids for i in batch], left=True)
    return {
        "prompt_ids": x,
        "prompt_mask": x_mask,
        "completion_ids": y,
        "completion_mask": y_mask,
        "teacher_input_ids": torch.cat([t, y], 1),
        "teacher_attention_mask": torch.cat([t_mask, y_mask], 1),
    }


@step("official")
def official(model: nn.Module, items: Items, ignored: int = IGNORED) -> float:
    total = 0.0
    for batch in batches_of(items):
        inputs = padded(batch)
        y, y_mask = inputs["completion_ids"], inputs["completion_mask"]

        def logps(ids: Tensor, mask: Tensor, y: Tensor = y) -> Tensor:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -y.shape[1] - 1 : -1]
            return logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]

        with torch.no_grad():
            teacher = logps(inputs["teacher_input_ids"], inputs["teacher_attention_mask"])
        ids = torch.cat([inputs["prompt_ids"], y], 1)
        student = logps(ids, torch.cat([inputs["prompt_mask"], y_mask], 1))
        mask = y_mask.float()
        mask[:, :ignored] = 0
        per_token = -(teacher - student).detach() * student * mask
        loss = (per_token.sum(1) / mask.sum(1).clamp(min=1)).sum() / len(items)
        loss.backward()
        total += float(loss.detach())
    return total


_TRAINERS: dict[str, Any] = {}


def trl_trainer(kind: str, model: nn.Module) -> Any:
    """TRL's trainer around the model, made once; of it only the loss is run."""
    if kind not in _TRAINERS:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from datasets import Dataset
        from trl.experimental import sdft, sdpo

        options: dict[str, Any] = {
            "output_dir": tempfile.gettempdir(),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "num_generations": 2,
            "per_device_train_batch_size": BATCH,
            "max_completion_length": 16,
            "teacher_model_kind": "live",
            "gradient_checkpointing": False,
            "distillation_mode": "sampled_token",
            "distillation_alpha": 1.0,
        }
        data = Dataset.from_dict({"prompt": ["a"] * BATCH, "privileged_context": ["b"] * BATCH})
        shared = {"model": model, "train_dataset": data, "processing_class": load_tokenizer()}
        if kind == "trl-sdft":
            config = sdft.SDFTConfig(**options, num_loss_tokens_to_skip=IGNORED)
            _TRAINERS[kind] = sdft.SDFTTrainer(args=config, **shared)
        else:
            config = sdpo.SDPOConfig(**options, distillation_weight=1.0)
            rewards = lambda prompts, **_: [0.0] * len(prompts)  # noqa: E731
            _TRAINERS[kind] = sdpo.SDPOTrainer(args=config, reward_funcs=rewards, **shared)
        _TRAINERS[kind].current_gradient_accumulation_steps = 1
    trainer = _TRAINERS[kind]
    if trainer.model is not model:
        raise ValueError("steps: one model per process for TRL's trainers")
    return trainer


def trl(kind: str, model: nn.Module, items: Items) -> float:
    trainer = trl_trainer(kind, model)
    total = 0.0
    for batch in batches_of(items):
        loss = trainer.compute_loss(model, padded(batch)) * (len(batch) / len(items))
        loss.backward()
        total += float(loss.detach())
    return total


for _kind in ("trl-sdpo", "trl-sdft"):
    STEPS[_kind] = functools.partial(trl, _kind)


def unpadded(model: nn.Module, items: Items, response_only: bool) -> float:
    total = 0.0
    for item in items:
        y = torch.tensor(item.completion_ids)

        def logps(prompt: list[int], item: TokenizedInteraction = item, y: Tensor = y) -> Tensor:
            ids = torch.tensor([[*prompt, *item.completion_ids]])
            keep = len(y) + 1 if response_only else 0
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, -len(y) - 1 : -1]
            return logits.log_softmax(-1).gather(-1, y[:, None])[:, 0]

        with torch.no_grad():
            teacher = logps(item.teacher_prompt_ids)
        student = logps(item.prompt_ids)
        per_token = (-(teacher - student).detach() * student)[IGNORED:]
        loss = per_token.sum() / max(1, len(per_token)) / len(items)
        loss.backward()
        total += float(loss.detach())
    return total


STEPS["unpadded"] = functools.partial(unpadded, response_only=False)
STEPS["response-logits"] = functools.partial(unpadded, response_only=True)


def shared(model: nn.Module, items: Items, sharing: Any) -> float:
    """This package's step: the conversation is one pack, the loss comes from hidden states."""
    # Where interactions share nothing, a pack of one holds the least memory.
    packs = [items] if sharing == "conversation" else [[item] for item in items]
    total = 0.0
    for pack in packs:
        states = shared_forward(model, pack, sharing=sharing)
        longest = max(len(i.completion_ids) for i in pack)
        mask = torch.zeros(len(pack), longest, dtype=torch.bool)
        at = (states.sequence_ids, states.position_in_response)
        mask[at] = states.position_in_response >= IGNORED
        out = linear_sdpo_loss(
            states.student_hidden,
            states.teacher_hidden,
            target_ids=states.target_ids,
            weights=sequence_mean_weights(mask, num_sequences=len(items))[at],
            mode="sampled_token",
            **head_parameters(model)._asdict(),
        )
        out.loss.backward()
        total += float(out.loss.detach())
    return total


STEPS["fused-loss"] = functools.partial(shared, sharing="off")
STEPS["interaction"] = functools.partial(shared, sharing="interaction")
STEPS["conversation"] = functools.partial(shared, sharing="conversation")


@step("checkpointed")
def checkpointed(model: Any, items: Items) -> float:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        return shared(model, items, "conversation")
    finally:
        model.gradient_checkpointing_disable()


# ----------------------------------------------------------------------------- sizes of a step's work


def describe(items: Items) -> dict[str, Any]:
    """Tokens of a step; ``sizes`` is what `benchmarks/costmodel.py` predicts its memory from."""
    counts = count_tokens(items)
    # of each padded batch: sequences, positions of prompt, teacher's prompt and response
    batches = [
        [
            len(batch),
            max(len(i.prompt_ids) for i in batch),
            max(len(i.teacher_prompt_ids) for i in batch),
            max(len(i.completion_ids) for i in batch),
        ]
        for batch in batches_of(items)
    ]
    response = sum(len(i.completion_ids) for i in items)
    return {
        "interactions": len(items),
        "response_tokens": response,
        "shared_tokens": counts.student + counts.teacher,
        "unshared_tokens": counts.unshared_student + counts.unshared_teacher,
        "padded_tokens": sum(count * (x + t + 2 * y) for count, x, t, y in batches),
        "sizes": {
            "student": counts.student,
            "teacher": counts.teacher,
            "response": response,
            "batches": batches,
            "longest": [
                max(len(i.prompt_ids) + len(i.completion_ids) for i in items),
                max(len(i.teacher_prompt_ids) + len(i.completion_ids) for i in items),
                max(len(i.completion_ids) for i in items),
            ],
        },
    }
