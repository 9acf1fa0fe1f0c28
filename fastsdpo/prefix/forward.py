"""Runs a Hugging Face causal LM on interactions and returns the states that predict responses.

Everything happens inside one call of the model as the caller wrapped it, so the hooks of DDP, FSDP,
PEFT, Accelerate and autocast all run: a hook on the decoder (the model below the head) takes its
hidden states, runs the passes that follow, and hands an empty tensor on to the head, which thus
never forms a logit; a hook on the wrapped model returns the states in place of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastsdpo.prefix.pack import TokenizedInteraction, check_interactions

Result = TypeVar("Result")
Sharing = Literal["conversation", "interaction", "off"]


class ResponseStates(NamedTuple):
    """One row per response token; the response tokens of an interaction follow each other.

    Attributes:
        student_hidden: ``[N, D]`` after the final norm, carries the gradient.
        teacher_hidden: ``[N, D]`` after the final norm, no gradient.
        target_ids: ``[N]`` int64, the response tokens that the rows predict.
        sequence_ids: ``[N]`` int64, index of the interaction.
        position_in_response: ``[N]`` int64, 0 for an interaction's first response token.
    """

    student_hidden: Tensor
    teacher_hidden: Tensor
    target_ids: Tensor
    sequence_ids: Tensor
    position_in_response: Tensor


class HeadParameters(NamedTuple):
    """The head as the losses from hidden states take it: logits are
    ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


def unwrap(model: nn.Module) -> nn.Module:
    """The model below DDP, FSDP1, DeepSpeed and torch.compile; FSDP2 and PEFT stay in place."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif type(model).__name__ in (
            "DistributedDataParallel",
            "FullyShardedDataParallel",
            "DeepSpeedEngine",
        ):
            model = model.module
        else:
            return model


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model below every wrapper and below PEFT's."""
    model = unwrap(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise TypeError(
            f"model must be a transformers causal language model, got {type(model).__name__}"
        )
    return model


def _run_inside(
    model: nn.Module, first: dict[str, Any], body: Callable[[Tensor, Callable], Result]
) -> Result:
    """``body(hidden, run)`` inside one forward call of ``model`` with the inputs ``first``.

    ``hidden`` are the hidden states ``[T, D]`` of that call, ``run(**inputs)`` gives those of another.
    """
    top, decoder = unwrap(model), causal_lm(model).get_decoder()
    nested = False
    result: list[Result] = []

    def run(**inputs: Any) -> Tensor:
        return decoder(**inputs).last_hidden_state[0]

    def take_states(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal nested
        if nested:
            return None
        nested = True
        hidden = output.last_hidden_state
        result.append(body(hidden[0], run))
        output.last_hidden_state = hidden[:, :0]
        return output

    def return_result(_module: nn.Module, _args: Any, _output: Any) -> Any:
        return result[0]

    # Before the hooks of FSDP2, which look for the tensors to differentiate in the returned value.
    hooks = [
        decoder.register_forward_hook(take_states, prepend=True),
        top.register_forward_hook(return_result, prepend=True),
    ]
    try:
        return model(**first)
    finally:
        for hook in hooks:
            hook.remove()


def _inputs(ids: Sequence[int], device: torch.device) -> dict[str, Any]:
    return {"input_ids": torch.tensor([list(ids)], device=device), "use_cache": False}


def shared_forward(
    model: nn.Module,
    interactions: Sequence[TokenizedInteraction],
    *,
    teacher_model: nn.Module | None = None,
    sharing: Sharing = "conversation",
    attention: str = "auto",
    loss_fn: Callable[[ResponseStates], Any] | None = None,
) -> Any:
    """Hidden states of student and teacher at the positions that predict response tokens.

    Args:
        model: a transformers causal LM, bare or wrapped (DDP, FSDP, PEFT, Accelerate).
        interactions: objects with ``prompt_ids``, ``teacher_prompt_ids`` and ``completion_ids``;
            the student reads prompt + completion, the teacher teacher prompt + completion.
        teacher_model: the teacher; None is the live self-teacher, ``model`` itself.
        sharing: "conversation" computes every prefix common to any sequences once, "interaction"
            those of each interaction's own two sequences, "off" runs every sequence alone.
        attention: the attention backend of the shared passes, or "auto".
        loss_fn: called with the states inside the model's forward pass, while FSDP holds the
            parameters of the head gathered; what it returns is returned in place of the states.

    Returns:
        ResponseStates, or what ``loss_fn`` returned.

    Raises:
        ValueError: an empty prompt or completion, an unknown sharing or attention.
    """
    check_interactions("shared_forward", interactions)
    if sharing not in ("conversation", "interaction", "off"):
        raise ValueError(
            "shared_forward: sharing must be 'conversation', 'interaction' or 'off', "
            f"got {sharing!r}"
        )
    if sharing != "off":
        raise NotImplementedError("shared_forward: only sharing='off' so far")
    device = next(causal_lm(model).parameters()).device
    targets, sequence, position = [], [], []
    for index, interaction in enumerate(interactions):
        targets += interaction.completion_ids
        sequence += [index] * len(interaction.completion_ids)
        position += range(len(interaction.completion_ids))

    def students() -> list[tuple[dict, slice]]:
        return [_alone(i.prompt_ids, i.completion_ids, device) for i in interactions]

    def teachers() -> list[tuple[dict, slice]]:
        return [_alone(i.teacher_prompt_ids, i.completion_ids, device) for i in interactions]

    def finish(student: Tensor, teacher: Tensor) -> Any:
        index = torch.tensor([targets, sequence, position], device=device)
        states = ResponseStates(student, teacher.detach(), index[0], index[1], index[2])
        return states if loss_fn is None else loss_fn(states)

    teacher_hidden: list[Tensor] = []
    if teacher_model is not None and teacher_model is not model:
        passes = teachers()

        def teacher_body(hidden: Tensor, run: Callable) -> Tensor:
            rows = [hidden[passes[0][1]]]
            return torch.cat(rows + [run(**inputs)[where] for inputs, where in passes[1:]])

        with torch.no_grad():
            teacher_hidden.append(_run_inside(teacher_model, passes[0][0], teacher_body))

    student_passes = students()

    def student_body(hidden: Tensor, run: Callable) -> Any:
        rows = [hidden[student_passes[0][1]]]
        rows += [run(**inputs)[where] for inputs, where in student_passes[1:]]
        if not teacher_hidden:
            with torch.no_grad():
                live = [run(**inputs)[where] for inputs, where in teachers()]
            teacher_hidden.append(torch.cat(live))
        return finish(torch.cat(rows), teacher_hidden[0])

    return _run_inside(model, student_passes[0][0], student_body)


def _alone(
    prompt: Sequence[int], completion: Sequence[int], device: torch.device
) -> tuple[dict[str, Any], slice]:
    """The inputs of one unpadded sequence, and the rows that predict its completion."""
    rows = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return _inputs([*prompt, *completion], device), rows


def head_parameters(model: nn.Module) -> HeadParameters:
    """Weight, bias, softcap and scale of the head that follows the hidden states.

    Raises:
        NotImplementedError: a head that is not a plain linear layer, or its parameters are sharded.
    """
    causal = causal_lm(model)
    head = causal.get_output_embeddings()
    config = causal.config.get_text_config()
    if not isinstance(head, nn.Linear):
        raise NotImplementedError(
            f"head_parameters: the head must be a torch.nn.Linear, got {type(head).__name__}"
        )
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale *= config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:
        scale /= config.logits_scaling
    return HeadParameters(head.weight, head.bias, softcap, scale)
