"""torchrl's `DistillationLoss` with the whole distribution of a teacher, and without logits.

torchrl estimates a KL divergence from the log-probs of the tokens that were written (k3). Here the divergence is over
the whole vocabulary or the student's most likely tokens, from hidden states of both models:

    loss = SDPODistillationLoss(actor, teacher_network=teacher, mode="full", alpha=0.5)  # another model teaches
    loss = SDPODistillationLoss(actor, mode="full")  # the actor itself, with hindsight
    loss = SDPODistillationLoss(actor, mode="k3")  # torchrl's own loss

With ``teacher_network=None`` the teacher is the actor, which reads ``("teacher_history", "full")``: the same
conversation with the user's follow-up in it, whose last answer is the same. "k3" and "sampled_token" need no teacher's
pass where the log-probs are in the data, as `RetrieveLogProb` writes them.

Nothing of torchrl is replaced: `SDPODistillationLoss` is a subclass with a `forward` of its own. Both models' hidden
states at the tokens that count are taken with hooks, and the actor's loss is formed inside its forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import DistillationLoss, DistillationLossOutput, k3_kl_token_estimate

from fastsdpo.integrations._head_logits import teacher_arguments
from fastsdpo.integrations.transformers import gathered_head, label_logps
from fastsdpo.ops.linear import linear_sdpo_loss
from fastsdpo.prefix import above_the_decoder, check_head, head_parameters, no_grad_pass, run_inside

MODES = ("full", "topk", "sampled_token", "k3")


class _Batch(NamedTuple):
    """Sequences padded on the right: ``ids``, ``attention`` and ``counts`` ``[B, L]``."""

    ids: Tensor
    attention: Tensor
    counts: Tensor


class SDPODistillationLoss(DistillationLoss):
    """A distillation loss of the actor's transformers model.

    Args:
        actor_network: a `TransformersWrapper`, whose ``model`` is trained and whose ``tokenizer`` is taken.
        teacher_network: a `TransformersWrapper` or a transformers model; None is the actor itself.
        mode: "full", "topk" with ``topk``, "sampled_token", or "k3".
        alpha, topk, add_tail, temperature: as `fastsdpo.sdpo_loss`; the last also divides the logits of log-probs.
        others: as torchrl's `DistillationLoss`. ``kl_direction`` is of "k3" only.

    The input has ``("history", "full")``. In modes "k3" and "sampled_token" the teacher's log-probs may be at
    ``("next", "teacher_log_probs", "full")``, as for torchrl's loss. Keys are changed with `set_keys`.

    Raises:
        ValueError: an unknown mode, ``topk`` missing; from the loss: a sequence without a token that counts, or with
            another number of them than its teacher's.
        NotImplementedError: ``reduction="none"``; from the loss, a head or adapter that hidden states will not do for.
    """

    @dataclass
    class _AcceptedKeys(DistillationLoss._AcceptedKeys):
        teacher_history: NestedKey = ("teacher_history", "full")

    default_keys = _AcceptedKeys

    def __init__(
        self,
        actor_network: Any,
        *,
        teacher_network: Any = None,
        mode: str = "full",
        alpha: float = 1.0,
        topk: int | None = None,
        add_tail: bool = True,
        temperature: float = 1.0,
        **others: Any,
    ):
        if mode not in MODES:
            raise ValueError(f"SDPODistillationLoss: mode must be one of {MODES}, got {mode!r}")
        if (mode == "topk") != (topk is not None):
            raise ValueError(
                f"SDPODistillationLoss: topk must be given with mode='topk' only, got mode={mode!r}, topk={topk}"
            )
        super().__init__(actor_network, **others)
        if self.reduction == "none":
            raise NotImplementedError("SDPODistillationLoss: reduction must be 'mean' or 'sum', got 'none'")
        # In a list: a teacher is no parameter of the loss.
        teacher = teacher_network.model if isinstance(teacher_network, TransformersWrapper) else teacher_network
        self._teacher = [] if teacher is None else [teacher]
        self.mode, self.temperature = mode, temperature
        self.options = {"alpha": alpha, "topk": topk, "add_tail": add_tail} if mode in ("full", "topk") else {}
        self._checked = False

    def forward(self, tensordict: TensorDictBase) -> DistillationLossOutput:
        model: Any = self.actor_network.model
        teacher = self._teacher[0] if self._teacher else model
        self._check(model, teacher)
        batch = self._batch(tensordict, self.tensor_keys.history)
        given = None
        if self.mode in ("k3", "sampled_token"):
            given = tensordict.get(self.tensor_keys.teacher_log_prob, default=None, as_list=True)
        states = teacher_logps = None
        if given is not None:
            rows = pad_sequence([row.detach() for row in given], batch_first=True).to(batch.ids.device)
            if rows.shape != batch.ids.shape:
                raise ValueError(
                    "SDPODistillationLoss: the teacher's log-probs must have the tokens' shape "
                    f"{list(batch.ids.shape)}, got {list(rows.shape)}"
                )
            teacher_logps = rows[:, 1:][batch.counts]
        else:
            key = self.tensor_keys.history if self._teacher else self.tensor_keys.teacher_history
            if self._teacher and self.tensor_keys.teacher_history in tensordict.keys(include_nested=True):
                key = self.tensor_keys.teacher_history
            taught = self._batch(tensordict, key)
            if (taught.counts.sum(-1) != batch.counts.sum(-1)).any():
                raise ValueError(
                    f"SDPODistillationLoss: {key} must have the tokens of the answers in {self.tensor_keys.history}"
                )
            with no_grad_pass():
                states = run_inside(teacher, lambda hidden: hidden[:, :-1][taught.counts], _inputs(taught))

        def body(hidden: Tensor) -> Tensor:
            with gathered_head(model, teacher):
                return self._per_token(hidden[:, :-1][batch.counts], states, teacher_logps, batch, model, teacher)

        return self._reduced(run_inside(model, body, _inputs(batch)), batch.counts)

    def _per_token(
        self,
        hidden: Tensor,
        states: Tensor | None,
        teacher_logps: Tensor | None,
        batch: _Batch,
        model: nn.Module,
        teacher: nn.Module,
    ) -> tuple[Tensor, Tensor]:
        """The loss, divided as `_reduced` says, and its values ``[N]`` of the tokens that count."""
        head, targets = head_parameters(model), batch.ids[:, 1:][batch.counts]
        if states is not None and self.mode in ("k3", "sampled_token"):
            with torch.no_grad():
                (teacher_logps,) = label_logps(states, head_parameters(teacher), targets, self.temperature)
        if self.mode == "k3":
            (logps,) = label_logps(hidden, head, targets, self.temperature)
            pair = (teacher_logps, logps) if self.kl_direction == "reverse" else (logps, teacher_logps)
            values = k3_kl_token_estimate(*pair)
            return (values * self._weights(batch.counts)).sum(), values.detach()
        other = head_parameters(teacher)
        if other.softcap != head.softcap:
            raise NotImplementedError("SDPODistillationLoss: student and teacher must have one softcap")
        options = {**self.options, "mode": self.mode, "temperature": self.temperature}
        if states is None or self.mode == "sampled_token":
            options["teacher_logps"], states = teacher_logps, None
        else:
            states, arguments = teacher_arguments(head, states, other)
            options |= arguments
        options["weights"] = self._weights(batch.counts)
        out = linear_sdpo_loss(hidden, states, target_ids=targets, **head._asdict(), **options)
        return out.loss, out.per_token_loss

    def _weights(self, counts: Tensor) -> Tensor:
        """``[N]``: the share of each token that counts in the loss."""
        lengths = counts.sum(-1, keepdim=True)
        weights = 1.0 / lengths if self.normalize_by_seq_length else torch.ones_like(lengths, dtype=torch.float32)
        if self.reduction == "mean":
            weights = weights / len(counts)
        return weights.expand(counts.shape)[counts]

    def _reduced(self, found: tuple[Tensor, Tensor], counts: Tensor) -> DistillationLossOutput:
        loss, values = found
        sums = torch.zeros(counts.shape, device=values.device).masked_scatter(counts, values).sum(-1)
        if self.normalize_by_seq_length:
            sums = sums / counts.sum(-1)
        return DistillationLossOutput(loss_distill=loss, kl_to_teacher=sums.mean())

    def _batch(self, tensordict: TensorDictBase, key: NestedKey) -> _Batch:
        """The tokens of the conversations at ``key``; ``counts [B, L - 1]`` are those that the row before predicts."""
        history = tensordict[key]
        name = getattr(self.actor_network, "chat_template_name", None)
        kwargs = {**({"chat_template_name": name} if name else {}), **self.tokenizer_kwargs, "return_dict": True}
        found = history.apply_chat_template(tokenizer=self.tokenizer, **kwargs)
        device = next(self.actor_network.parameters()).device
        names = ("input_ids", "attention_mask", "assistant_masks")
        ids, attention, counts = (
            pad_sequence([torch.as_tensor(row) for row in found.get(name, as_list=True)], batch_first=True).to(device)
            for name in names
        )
        counts = (attention * counts if self.assistant_only else attention).to(torch.bool)[:, 1:]
        if not counts.any(-1).all():
            raise ValueError(f"SDPODistillationLoss: every conversation at {key} must have a token that counts")
        return _Batch(ids, attention, counts)

    def _check(self, model: nn.Module, teacher: nn.Module) -> None:
        if self._checked:
            return
        for one in {model, teacher}:
            reason = above_the_decoder(one)
            right, why = (False, reason) if reason else check_head(one)
            if not right:
                raise NotImplementedError(f"SDPODistillationLoss: {why}; use torchrl's DistillationLoss")
        self._checked = True


def _inputs(batch: _Batch) -> dict[str, Any]:
    return {"input_ids": batch.ids, "attention_mask": batch.attention, "use_cache": False}
