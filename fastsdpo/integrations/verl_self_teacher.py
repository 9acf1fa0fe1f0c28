"""verl's actor as its own teacher (https://github.com/verl-project/verl): it reads each answer a second time, behind a
prompt that holds the user's follow-up.

`use_self_teacher` replaces one function of verl, the FSDP engine's ``forward_step``. For a micro-batch of the actor

    1. the engine's own ``forward_step`` runs the teacher's sequences, without gradient; a logits processor keeps the
       logits of the answers' tokens;
    2. it runs the student's sequences; a logits processor compares their logits with those that were kept;
    3. verl's ``distillation_ppo_loss`` weighs the values, as for a teacher behind a server.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fastsdpo.integrations.verl import (
    Divergence,
    answer_rows,
    check_supervised,
    check_version,
    divergence_for_verl,
    divergences,
    import_verl,
    padded,
    row_targets,
    sampled_token_for_verl,
)
from fastsdpo.ops.checks import check_alpha
from fastsdpo.ops.divergence import LOSS_MODES
from fastsdpo.ops.token_logps import token_logps
from fastsdpo.prefix import training_mode

NAME = "fastsdpo_self_teacher"
TEACHER_PROMPT = "teacher_prompt_ids"


class SelfTeacherPatch:
    """`use_self_teacher` that is on. `unpatch` takes it off, and so does leaving it as a context manager."""

    def __init__(self, divergence: Divergence, settings: dict[str, Any]):
        needs = "use_self_teacher needs verl"
        check_version("use_self_teacher")
        self.losses = import_verl("verl.trainer.distillation.losses", needs)
        config = import_verl("verl.workers.config", needs)
        self.ppo_loss = import_verl("verl.workers.utils.losses", needs).ppo_loss
        self._engine = import_verl("verl.workers.engine.fsdp.transformer_impl", needs).FSDPEngineWithLMHead
        final = sampled_token_for_verl if divergence.mode == "sampled_token" else divergence_for_verl
        names = self.losses.DistillationLossSettings(names=[NAME], use_topk=True)
        self.losses.register_distillation_loss(names)(final)
        try:
            self.settings = config.DistillationLossConfig(loss_mode=NAME, **settings)
            if divergence.mode != "sampled_token":
                check_supervised(self.settings)
            self.config = config.DistillationConfig(distillation_loss=self.settings)
        except BaseException:
            self._unregister()
            raise
        self.divergence = divergence
        self._before = self._engine.forward_step
        self._engine.forward_step = _with_self_teacher(self._before, self)

    def _unregister(self) -> None:
        for table in (self.losses.DISTILLATION_LOSS_REGISTRY, self.losses.DISTILLATION_SETTINGS_REGISTRY):
            table.pop(NAME, None)

    def unpatch(self) -> None:
        self._engine.forward_step = self._before
        self._unregister()

    def __enter__(self) -> SelfTeacherPatch:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.unpatch()


def use_self_teacher(
    mode: Literal["sampled_token", "full", "topk"] = "full",
    *,
    alpha: float = 1.0,
    topk: int | None = None,
    add_tail: bool = True,
    use_task_rewards: bool = False,
    loss_max_clamp: float | None = None,
    use_policy_gradient: bool = False,
    **settings: Any,
) -> SelfTeacherPatch:
    """Trains verl's FSDP actor towards itself, reading the same answers behind another prompt.

    The other prompt comes with the batch: ``teacher_prompt_ids``, the token ids that stand before the answer, as a
    column of the data set or in the ``extra_fields`` of an agent loop's output. Where it is None or empty, that
    sequence costs and gives nothing. verl's ``distillation.enabled`` stays false: it is for teachers on servers.

    The teacher is the actor as it is now, without dropout and without gradient, in one more forward pass per
    micro-batch. Its logits are kept for the answers' tokens only. Both have verl's temperature.

    Call this in every process (``VERL_USE_EXTERNAL_MODULES``), or use it as a context manager.

    Args:
        mode, alpha, topk, add_tail: as of `fastsdpo.sdpo_loss`; with ``"topk"`` the support is the student's.
        use_task_rewards: adds verl's policy loss of the rewards.
        loss_max_clamp, use_policy_gradient: as of `register_distillation_loss`; a policy gradient is possible with
            ``"sampled_token"`` only.
        settings: other fields of verl's ``DistillationLossConfig``.

    Raises:
        ImportError: verl is not installed, or a version that is not `verl.TESTED`.
        ValueError: a divergence with ``use_policy_gradient``; it is on already (verl's own error); in a step, a batch
            without ``teacher_prompt_ids``.
        NotImplementedError: in the first step, with sequence parallelism, fused kernels or several position axes.
    """
    if mode not in LOSS_MODES:
        raise ValueError(f"use_self_teacher: mode must be one of {LOSS_MODES}, got {mode!r}")
    if mode == "topk" and topk is None:
        raise ValueError("use_self_teacher: topk must be given for mode='topk', got None")
    check_alpha("use_self_teacher", alpha)
    settings |= {"use_task_rewards": use_task_rewards, "use_policy_gradient": use_policy_gradient}
    settings = {"log_prob_min_clamp": None, "loss_max_clamp": loss_max_clamp, **settings}
    return SelfTeacherPatch(Divergence(mode, alpha, topk if mode == "topk" else None, add_tail), settings)


def _with_self_teacher(theirs: Callable[..., Any], patch: SelfTeacherPatch) -> Callable[..., Any]:
    """``forward_step`` of the engine, which calls it for the teacher's sequences before those of the student."""
    utils = importlib.import_module("verl.utils.tensordict_utils")

    @functools.wraps(theirs)
    def forward_step(engine: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        if getattr(loss_function, "func", None) is not patch.ppo_loss:
            return theirs(engine, micro_batch, loss_function, forward_only)
        _check_engine(engine, micro_batch, utils)
        second, has_teacher = _second_context(micro_batch, utils)
        teacher: list[Tensor] = []

        def keep(student_logits: Tensor | None = None, data: Any = None, **rest: Any) -> Any:
            if student_logits is None:
                return torch.zeros(()), {}
            rows, _ = answer_rows(data)
            teacher.append(student_logits[0, rows[counts]])
            return {}

        counts = padded(micro_batch["response_mask"]).bool() & has_teacher[:, None]
        with torch.no_grad(), training_mode(engine.module, False):
            theirs(engine, second, keep, True)

        def loss(student_logits: Tensor | None = None, data: Any = None, **rest: Any) -> Any:
            if student_logits is None:
                actor = loss_function.keywords["config"]
                return patch.losses.distillation_ppo_loss(actor, patch.config, data=data, **rest)
            rows = answer_rows(data)[0][counts]
            if patch.divergence.mode == "sampled_token":
                return _sampled_tokens(student_logits, teacher[0], data, rows)
            return divergences(patch.divergence, student_logits, data, rows, {"teacher_logits": teacher[0]})

        alone = not patch.settings.use_task_rewards and not patch.settings.use_policy_gradient
        utils.assign_non_tensor(micro_batch, distillation_use_topk=True, distillation_only=alone)
        return theirs(engine, micro_batch, loss, forward_only)

    return forward_step


def _second_context(data: Any, utils: Any) -> tuple[Any, Tensor]:
    """The micro-batch with the teacher's prompts, and ``[B]``: which sequences have one. The others keep their own.

    Every process runs one more forward pass, also where none of its sequences has a teacher's prompt: the passes of
    an engine are collective.
    """
    ids = data["input_ids"].unbind()
    if data["responses"].is_nested:
        lengths = data["responses"].offsets().diff().tolist()
    else:
        lengths = data["attention_mask"][:, data["prompts"].shape[1] :].sum(1).tolist()
    given: Any = utils.get(data, TEACHER_PROMPT)
    if given is None:
        extras = [extra or {} for extra in utils.get(data, "extra_fields", [])]
        if not any(TEACHER_PROMPT in extra for extra in extras):
            raise ValueError(
                f"use_self_teacher: {TEACHER_PROMPT} must be a column of the batch or in the extra_fields of an agent "
                "loop, got neither"
            )
        given = [extra.get(TEACHER_PROMPT) for extra in extras]
    if isinstance(given, Tensor):
        given = given.unbind()
    prompts, answers, has_teacher = [], [], []
    for row, length, prompt in zip(ids, lengths, given, strict=True):
        has_teacher.append(prompt is not None and len(prompt) > 0)
        own = row[: len(row) - length]
        prompts.append(torch.as_tensor(prompt, dtype=row.dtype, device=row.device) if has_teacher[-1] else own)
        answers.append(row[len(row) - length :])
    whole = [torch.cat(both) for both in zip(prompts, answers)]
    columns = {"prompts": prompts, "responses": answers, "input_ids": whole}
    columns["position_ids"] = [torch.arange(len(row), device=row.device) for row in whole]
    tensors = {key: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for key, rows in columns.items()}
    second = type(data)(tensors, batch_size=len(ids))
    for key in ("temperature", "use_remove_padding", "pad_mode", "pad_token_id", "max_response_len"):
        if key in data:
            value = utils.get(data, key)
            if isinstance(value, Tensor):
                second[key] = value
            else:
                utils.assign_non_tensor(second, **{key: value})
    utils.assign_non_tensor(second, distillation_use_topk=True, distillation_only=True)
    return second, torch.tensor(has_teacher, device=ids[0].device)


def _check_engine(engine: Any, data: Any, utils: Any) -> None:
    wanted = {
        "ulysses_sequence_parallel_size must be 1": engine.ulysses_sequence_parallel_size == 1,
        "use_fused_kernels must be False (they form no logits)": not utils.get(data, "use_fused_kernels", False),
        "position_ids must have one axis per sequence (no images)": data["position_ids"].dim() == 2,
    }
    for rule, holds in wanted.items():
        if not holds:
            raise NotImplementedError(f"use_self_teacher: {rule}")


def _sampled_tokens(student_logits: Tensor, teacher_logits: Tensor, data: Any, rows: Tensor) -> dict[str, Tensor]:
    """Log-probs ``[1, N]`` of the answers' tokens, the student's with a gradient; 0 in other rows."""
    ids, total = row_targets(student_logits, data, rows)
    student = token_logps(student_logits[0, rows], ids)
    found = {"student": student, "teacher": token_logps(teacher_logits, ids), "counts": torch.ones_like(student)}
    return {
        f"distillation_{key}": value.new_zeros(total).index_put((rows,), value)[None] for key, value in found.items()
    }
