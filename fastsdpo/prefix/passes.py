"""Runs a Hugging Face causal LM on interactions, inside one forward call of the model.

Everything happens inside one forward call of the model as the caller wrapped it, so the hooks of
DDP, FSDP, PEFT, Accelerate and autocast all run. The teacher's pass and the loss take the place of
the head's own forward: whatever unit of FSDP or ZeRO the head belongs to is gathered there, and its
gradient is reduced as always. No logit is formed; a hook on the wrapped model returns the result in
place of the logits.

The attention of a shared pass comes in through the model's keyword arguments, and the attention
modules use it in the calls that carry them: hooks on these modules switch the implementation for
the length of one call, also when gradient checkpointing runs a layer again in the backward pass.
Nothing else of the model changes; evaluation and generation run as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastsdpo.prefix.attention import SharedPass, let_attention_switch, windows
from fastsdpo.prefix.model import causal_lm, forward_replaced, model_device, text_inputs, unwrap
from fastsdpo.prefix.plan import InteractionIds, Plan
from fastsdpo.prefix.refusals import rotary_limit, unsupported

Result = TypeVar("Result")


class Call(NamedTuple):
    """One call of the decoder on T tokens, and the rows of its hidden states to keep."""

    token_ids: Tensor
    position_ids: Tensor
    shared: SharedPass | None
    rows: Tensor


def run_inside(
    model: nn.Module,
    body: Callable[[Tensor], Result],
    inputs: dict[str, Any],
) -> Result:
    """``body(hidden)`` in place of the head, inside one forward call ``model(**inputs)``.

    What wraps the model (DDP, FSDP, DeepSpeed, autocast) has gathered and cast the weights there, the
    head's too, and sees the result as the head's output. There are no logits.

    Args:
        model: a causal LM of transformers, wrapped or not.
        body: gets the decoder's last hidden states ``[B, L, D]``, and may run the decoder again. DDP and
            FSDP look for the tensors to differentiate in its result: a tensor or a tuple.
        inputs: the model's keyword arguments, ``input_ids [B, L]`` among them.

    Raises:
        NotImplementedError: the model does not call its head, or not on all its positions.
    """
    top, causal = unwrap(model), causal_lm(model)
    vocabulary = causal.config.get_text_config().vocab_size
    shape = tuple(inputs["input_ids"].shape)
    result: list[Result] = []

    def in_place_of_head(hidden: Tensor) -> Result:
        if tuple(hidden.shape[:-1]) != shape:
            raise NotImplementedError(
                f"run_inside: {type(causal).__name__} must call its head on all positions "
                f"{list(shape)}, got {list(hidden.shape[:-1])}"
            )
        return body(hidden)

    def no_logits(_module: nn.Module, args: Any, output: Any) -> Tensor:
        # The last hook of the head: those of FSDP and ZeRO have seen the result.
        result.append(output)
        return args[0].new_empty(*shape[:-1], 0, vocabulary)

    def return_result(_module: nn.Module, _args: Any, _output: Any) -> Any:
        if not result:
            raise NotImplementedError(f"run_inside: {type(causal).__name__} does not call its head")
        return result[0]

    head = causal.get_output_embeddings()
    hooks = [
        head.register_forward_hook(no_logits),
        # Ahead of the hooks of FSDP2, which look for the tensors to differentiate in what is returned.
        top.register_forward_hook(return_result, prepend=True),
    ]
    try:
        with forward_replaced(head, in_place_of_head):
            return model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()


def run_calls_inside(model: nn.Module, first: Call, body: Callable[[Callable[[Call], Tensor]], Result]) -> Result:
    """``body(run)`` inside one forward call of ``model``; ``run(call)`` gives hidden states [T, D].

    The call ``first`` is the one that the wrapped model itself makes.
    """
    causal, device = causal_lm(model), model_device(model)
    decoder = causal.get_decoder()

    limit = rotary_limit(model)
    dynamic = limit is not None and limit.kind == "dynamic"
    rotary = [m for m in decoder.modules() if dynamic and hasattr(m, "max_seq_len_cached")]

    def inputs(called: nn.Module, call: Call) -> dict[str, Any]:
        for module in rotary:  # else a pass takes the frequencies of a longer one before it
            for name in [n for n in vars(module) if n.endswith("max_seq_len_cached")]:
                setattr(module, name, 0)
        given = text_inputs(called, call.token_ids[None].to(device))
        if call.shared is not None:
            given["position_ids"] = call.position_ids[None].to(device)
            # A mask with four axes is passed on as it is: none is made, and positions that jump
            # back at a branch are not taken for packed sequences. The attention ignores it.
            given["attention_mask"] = torch.zeros(1, 1, 1, 1, device=device)
            given["fastsdpo_pass"] = call.shared
        return given

    def with_first(first_hidden: Tensor) -> Result:
        def run(call: Call) -> Tensor:
            if call is first:
                hidden = first_hidden[0]
            else:
                hidden = decoder(**inputs(decoder, call)).last_hidden_state[0]
            if call.shared is not None:
                _check_layers(model, call.shared)
            return hidden

        return body(run)

    return run_inside(model, with_first, inputs(causal, first))


def alone(prompt: Sequence[int], completion: Sequence[int]) -> Call:
    """One unpadded sequence; the rows that predict its completion."""
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    ids = torch.tensor([*prompt, *completion])
    return Call(ids, torch.arange(len(ids)), None, rows)


def packed(
    model: nn.Module,
    plan: Plan,
    first: int,
    stop: int,
    rows: Tensor,
    attention: str,
    keys_values: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Call:
    """Tokens ``[first, stop)`` of a plan; a pass that begins at 0 fills ``keys_values``, if given."""
    reason, changing = unsupported(model), rotary_limit(model)
    if changing is not None and int(plan.position_ids.max()) >= changing.positions:
        reason = reason or str(changing)
    if reason is not None:
        raise NotImplementedError(f"shared_forward: sharing must be 'off' here: {reason}")
    causal = causal_lm(model)
    let_attention_switch(causal.get_decoder())
    shared = SharedPass(
        plan,
        first=first,
        stop=stop,
        backend=attention,
        windows=windows(causal.config.get_text_config()),
        keys_values={} if keys_values is None else keys_values,
        capture=first == 0 and keys_values is not None,
    )
    tokens = slice(first, stop)
    return Call(plan.token_ids[tokens], plan.position_ids[tokens], shared, rows)


def rows_of(calls: list[Call], run: Callable[[Call], Tensor]) -> Tensor:
    kept = []
    for call in calls:
        hidden = run(call)
        kept.append(hidden[call.rows.to(hidden.device)])
    return kept[0] if len(kept) == 1 else torch.cat(kept)


def live_teacher_rows(student: Call, teacher: Call, run: Callable[[Call], Tensor]) -> Tensor:
    """The teachers' rows; those with an empty hindsight block stand among the student's tokens."""
    device = run(student).device
    rows = teacher.rows.to(device)  # counted from the first token of the teachers
    on_student = rows < 0
    if len(teacher.token_ids) == 0:
        return run(student).detach()[rows]
    hidden = run(teacher)
    if not bool(teacher.rows.min() < 0):
        return hidden[rows]
    states = hidden.new_empty(len(rows), hidden.shape[-1])
    states[~on_student] = hidden[rows[~on_student]]
    states[on_student] = run(student).detach()[rows[on_student]]  # negative: from the end
    return states


def labels_of(interactions: Sequence[InteractionIds], device: torch.device) -> list[Tensor]:
    """Target ids, sequence ids and positions in the response, ``[N]`` each."""
    labels = [
        (token, index, position)
        for index, item in enumerate(interactions)
        for position, token in enumerate(item.completion_ids)
    ]
    return list(torch.tensor(labels, device=device).T.contiguous())


def _check_layers(model: nn.Module, shared: SharedPass) -> None:
    config = causal_lm(model).config.get_text_config()
    missing = sorted(set(range(config.num_hidden_layers)) - shared.layers)
    if missing:
        raise NotImplementedError(
            f"shared_forward: sharing must be 'off' here: layers {missing} of "
            f"{type(causal_lm(model)).__name__} do not call the attention interface"
        )
