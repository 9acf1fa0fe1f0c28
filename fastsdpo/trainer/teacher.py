"""The teachers that are not the live model: the same module with other values in its weights.

A moving average or the initial model needs one copy of the *trained* weights and nothing else: the
module, its frozen weights and its buffers serve student and teacher. For the teacher's pass the
parameters point at the teacher's values, and back. With LoRA the copy is the adapter alone (a moving
average then starts as a copy of the adapter); where the adapter is new, the initial model is the model
with the adapter disabled, and there is nothing to copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsdpo.data import Interaction, InteractionTokenizer, TokenizedInteraction
from fastsdpo.prefix import HeadParameters, head_parameters, training_mode
from fastsdpo.prefix.forward import unwrap
from fastsdpo.trainer.noise import few_logits

TeacherContext = Callable[[], AbstractContextManager]


class TeacherWeights:
    """Another set of values for the trained parameters of ``model``, float32 where it moves.

    In bfloat16 a moving average would stand still: at rate 0.01 the steps are below its precision.

    Args:
        model: the model, unwrapped.
        moving: the values will follow the student's (`update`).
    """

    def __init__(self, model: nn.Module, *, moving: bool):
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.values = {
            name: _copy(parameter.detach(), torch.float32 if moving else None)
            for name, parameter in self.parameters.items()
        }

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the teacher's values. Only between a backward pass and the next forward."""
        students = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.values[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = students[name]

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """``values += rate * (student - values)``"""
        for name, parameter in self.parameters.items():
            value = self.values[name]
            value.lerp_(parameter.detach().to(value.dtype), rate)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the values; the file appears whole or not at all."""
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in self.values.items()}, f"{path}.part")
        os.replace(f"{path}.part", path)

    def load(self, path: str | os.PathLike) -> None:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file; not this model's weights.
        """
        from safetensors.torch import load_file

        if not os.path.exists(path):
            raise FileNotFoundError(
                f"SDPOTrainer: the checkpoint must hold the teacher's weights, {path} is missing; "
                "was it written with another teacher?"
            )
        saved = load_file(path)
        if saved.keys() != self.values.keys():
            odd = sorted(saved.keys() ^ self.values.keys())
            raise ValueError(
                f"SDPOTrainer: {path} must hold the values of the trained weights, but "
                f"{len(odd)} names differ: {', '.join(odd[:3])}"
            )
        for name, value in self.values.items():
            if saved[name].shape != value.shape:
                raise ValueError(
                    f"SDPOTrainer: {path}: {name} must have shape {list(value.shape)}, got {list(saved[name].shape)}"
                )
            value.copy_(saved[name])


def _copy(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype=dtype or value.dtype, copy=True)


def is_peft(model: nn.Module) -> bool:
    """Whether it is a `peft.PeftModel`; not a model whose layers alone are PEFT's."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def check_adapter(model: nn.Module, peft_config: Any) -> None:
    """Raises ValueError where an adapter would be lost or hidden.

    Args:
        peft_config: of the adapter to add; None: the model is trained as it is.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "SDPOTrainer: model must be a whole model or a peft.PeftModel, got a transformers model with "
            "an adapter in its layers (what from_pretrained makes of an adapter's folder); pass that "
            "folder's name, or PeftModel.from_pretrained(base_model, folder, is_trainable=True)"
        )
    if is_peft(model) and peft_config is not None:
        raise ValueError(
            "SDPOTrainer: peft_config must be None, the model has an adapter, which training goes on "
            "with; for a new one, merge it into its base model first (merge_and_unload)"
        )


def adapter_is_silent(model: Any) -> bool:
    """Whether a `peft.PeftModel` gives its base model's logits, as with a new adapter."""
    inner: Any = unwrap(model)
    for config in inner.peft_config.values():
        if getattr(config, "trainable_token_indices", None) or hasattr(config, "token_indices"):
            return False  # what it does depends on the tokens, of which only a few are tried
    with training_mode(model, False):
        with_adapter = few_logits(model)
        with inner.disable_adapter():
            return torch.equal(few_logits(model), with_adapter)


def other_head(model: nn.Module, context: TeacherContext) -> HeadParameters | None:
    """The head that ``model`` has under ``context``, detached; None where it is the student's."""
    student = head_parameters(model)
    with torch.no_grad(), context():
        teacher = head_parameters(model)
        # Taken while the weights are the teacher's: a detached tensor keeps pointing at them.
        weight = teacher.weight.detach()
        bias = None if teacher.bias is None else teacher.bias.detach()
    same = weight.data_ptr() == student.weight.data_ptr() and (
        bias is None or (student.bias is not None and bias.data_ptr() == student.bias.data_ptr())
    )
    return None if same else teacher._replace(weight=weight, bias=bias)


# ------------------------------------------------------------------------------- the teacher check


class CheckedInteraction(NamedTuple):
    """Mean log-ratio (nats per token) of an answer under two follow-ups."""

    id: str | None
    tokens: int
    real: float
    unrelated: float


class TeacherCheck(NamedTuple):
    """What hindsight does to a sample, before training.

    Attributes:
        rows: one per interaction.
        real_abs, unrelated_abs: mean absolute log-ratio per token, in nats.
        warning: what is wrong, or None.
    """

    rows: list[CheckedInteraction]
    real_abs: float
    unrelated_abs: float
    warning: str | None

    def __str__(self) -> str:
        lines = [
            "teacher check: log-probability of the answer's tokens with the follow-up in context, "
            "minus without (nats per token)",
            f"  {'interaction':<28} {'tokens':>6} {'real':>8} {'unrelated':>10}",
        ]
        for row in self.rows:
            name = (row.id or "-")[:28]
            lines.append(f"  {name:<28} {row.tokens:>6} {row.real:>+8.3f} {row.unrelated:>+10.3f}")
        lines.append(f"  {'mean absolute value':<28} {'':>6} {self.real_abs:>8.3f} {self.unrelated_abs:>10.3f}")
        if self.warning:
            lines.append(f"  WARNING: {self.warning}")
        return "\n".join(lines)


# Below this mean absolute log-ratio the follow-up changes no more than rounding does in bfloat16.
NO_SIGNAL = 0.01


def teacher_check(
    sample: Sequence[Interaction],
    tokenize: InteractionTokenizer,
    log_ratios: Callable[[list[TokenizedInteraction]], list[Tensor]],
) -> TeacherCheck:
    """Compares the signal of real follow-ups with that of unrelated ones.

    Args:
        sample: two interactions or more; the unrelated follow-up of each is another one's, from
            another conversation where there is one.
        log_ratios: per interaction ``[tokens]`` teacher's minus student's log-probabilities.
    """
    pairs: list[tuple[Interaction, TokenizedInteraction, TokenizedInteraction]] = []
    for index, item in enumerate(sample):
        others = [*sample[index + 1 :], *sample[:index]]
        foreign = [o for o in others if o.conversation_id != item.conversation_id or o.conversation_id is None]
        other = next((o for o in foreign or others if o.followup.strip() != item.followup.strip()), None)
        if other is None:
            continue
        swapped = Interaction(item.prompt, item.completion, other.followup, item.id)
        try:
            pairs.append((item, tokenize(item), tokenize(swapped)))
        except ValueError:
            continue  # reported when the data set was tokenized
    if not pairs:
        return TeacherCheck([], 0.0, 0.0, "no two interactions with different follow-ups to compare")
    real = log_ratios([tokens for _, tokens, _ in pairs])
    unrelated = log_ratios([tokens for _, _, tokens in pairs])
    rows = [
        CheckedInteraction(item.id, len(a), float(a.mean()), float(b.mean()))
        for (item, _, _), a, b in zip(pairs, real, unrelated)
    ]
    real_abs = float(torch.cat(real).abs().mean())
    unrelated_abs = float(torch.cat(unrelated).abs().mean())
    difference = float(torch.cat([a - b for a, b in zip(real, unrelated)]).abs().mean())
    warning = None
    if real_abs < NO_SIGNAL:
        warning = (
            f"the follow-ups change the answer's log-probabilities by {real_abs:.4f} nats per token: "
            "the teacher has nothing to teach. Check the template, and that its text survives the "
            "length limits"
        )
    elif difference < NO_SIGNAL:
        warning = (
            "real and unrelated follow-ups change the answer's log-probabilities alike: the model "
            "reacts to the template, not to what the user said. Another template (such as 'note'), or "
            "a larger model, may help"
        )
    elif real_abs < unrelated_abs:
        warning = (
            f"unrelated follow-ups move the answer's log-probabilities more ({unrelated_abs:.3f} nats "
            f"per token) than the real ones ({real_abs:.3f}), on {len(rows)} interactions: the signal "
            "may be the template's more than the users'. A larger teacher_check tells more"
        )
    return TeacherCheck(rows, real_abs, unrelated_abs, warning)
