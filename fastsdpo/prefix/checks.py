"""Checks of a model before training: its head, passes of its decoder alone, and shared passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsdpo.prefix.attention import BackendError
from fastsdpo.prefix.forward import ResponseStates, shared_forward
from fastsdpo.prefix.model import (
    HeadParameters,
    causal_lm,
    decoder_of,
    forward_name,
    forward_replaced,
    head_parameters,
    model_device,
    text_inputs,
    training_mode,
    unwrap,
)
from fastsdpo.prefix.partitioned import gathered
from fastsdpo.prefix.refusals import above_the_decoder, unsupported


def check_head(model: nn.Module) -> tuple[bool, str]:
    """Whether `head_parameters` gives the model's own logits: (True, "") or (False, reason).

    Runs the model on a few tokens. Where it is sharded, all processes must call this.
    """
    states: list[Tensor] = []
    results: list[Tensor | NotImplementedError] = []
    dtypes: list[torch.dtype] = []
    causal = causal_lm(model)
    output_embeddings = causal.get_output_embeddings()
    own = getattr(unwrap(output_embeddings), forward_name(output_embeddings))

    def take_states(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    def logits_from_head(*args: Any, **kwargs: Any) -> Any:
        logits = own(*args, **kwargs)
        # Here, since FSDP holds the head gathered only inside the head's forward call.
        with gathered(*output_embeddings.parameters()):
            try:
                head = head_parameters(model)
            except NotImplementedError as error:
                results.append(error)
                return logits
            dtypes.append(_computing_dtype(states[0]))
            results.append(_logits(states[0], head))
        return logits

    ids = torch.tensor([probe_ids(model, 8)], device=model_device(model))
    hook = decoder_of(causal).register_forward_hook(take_states, prepend=True)
    try:
        with torch.no_grad(), forward_replaced(output_embeddings, logits_from_head):
            logits = model(**text_inputs(causal, ids)).logits
    finally:
        hook.remove()
    if not results:
        return False, f"{type(causal).__name__} does not call its head"
    if isinstance(results[0], NotImplementedError):
        return False, str(results[0])
    error = _relative_error(results[0], logits.double())
    if error <= _tolerance(dtypes[0]):
        return True, ""
    return False, f"the model's logits differ from those of its head's weights by {error:.1e}"


def check_passes(model: nn.Module) -> tuple[bool, str]:
    """Whether the passes of `shared_forward` give the model's own logits: (True, "") or (False, reason).

    All passes but the first call the decoder alone, and leave out what an adapter may do above it. This
    compares both passes of one interaction with calls of the whole model. Where the model is sharded, all
    processes must call it.
    """
    ids = probe_ids(model, 20)
    item = _Item(ids[:5], ids[5:12], ids[12:])

    def logits(states: ResponseStates) -> tuple[Tensor, Tensor, torch.dtype]:
        head = head_parameters(model)
        student, teacher = _logits(states.student_hidden, head), _logits(states.teacher_hidden, head)
        return student, teacher, _computing_dtype(states.student_hidden)

    try:
        with torch.no_grad(), training_mode(model, False):
            *both, dtype = shared_forward(model, [item], sharing="off", loss_fn=logits)
            for got, prompt in zip(both, (item.prompt_ids, item.teacher_prompt_ids)):
                call = torch.tensor([[*prompt, *item.completion_ids]], device=model_device(model))
                own = model(**text_inputs(causal_lm(model), call)).logits[0].double()
                error = _relative_error(got, own[-len(got) - 1 : -1])
                if not error <= _tolerance(dtype):
                    return False, (
                        "its decoder, called alone, gives other logits than the whole model (relative "
                        f"difference {error:.1e}): something above the decoder takes part, such as an adapter"
                    )
    except (NotImplementedError, ValueError, TypeError) as error:
        return False, str(error)
    return True, ""


def check_sharing(model: nn.Module, *, attention: str = "auto") -> tuple[bool, str]:
    """Whether shared passes give this model's values: (True, "") or (False, reason).

    Names what is known to be unsupported. Then it compares a small plan (nested histories, branches, a
    branch inside a branch) with independent passes. Once per model and process is enough. Where the model is
    sharded, all processes must call it.

    Raises:
        BackendError: an attention backend that does not exist or cannot run here; it is a ValueError.
    """
    if model_device(model).type == "meta":  # no values: what is known of it alone
        reason = above_the_decoder(model) or unsupported(model)
        return reason is None, reason or ""
    ids = probe_ids(model, 96)

    first, second = ids[:24], ids[:40]
    items = [
        _Item(first, first + ids[80:88], ids[24:36]),
        _Item(second, second[:-2] + ids[84:96], ids[60:72]),
        _Item(second, second + ids[90:96], ids[60:66] + ids[72:80]),
    ]

    def with_dtype(states: ResponseStates) -> tuple[ResponseStates, torch.dtype]:
        return states, _computing_dtype(states.student_hidden)

    options: dict[str, Any] = {"attention": attention, "loss_fn": with_dtype}
    try:
        with torch.no_grad():
            shared, dtype = shared_forward(model, items, sharing="conversation", **options)
            alone, _ = shared_forward(model, items, sharing="off", **options)
    except BackendError:
        raise
    except (NotImplementedError, ValueError, TypeError) as error:
        # ValueError and TypeError come from models that do not know the keyword, or that read the mask.
        return False, str(error)
    mixture = any(
        getattr(causal_lm(model).config.get_text_config(), key, None)
        for key in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    for what in ("student", "teacher"):
        got = getattr(shared, f"{what}_hidden").double()
        want = getattr(alone, f"{what}_hidden").double()
        errors = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)
        # Rounding may send single tokens to another expert. More than a quarter of them is an error.
        error = float(errors.quantile(0.75 if mixture else 1.0))
        if not error <= _tolerance(dtype):
            return False, f"shared and independent passes differ by {error:.1e} ({what}, relative)"
    return True, ""


class _Item(NamedTuple):
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    completion_ids: list[int]


def probe_ids(model: nn.Module, count: int) -> list[int]:
    """``count`` token ids to try a model on: the same every time, and all different in a large vocabulary."""
    vocabulary = causal_lm(model).config.get_text_config().vocab_size
    return [(7 + 37 * n) % vocabulary for n in range(count)]


def _logits(hidden: Tensor, head: HeadParameters) -> Tensor:
    """The logits ``[..., V]`` of ``head`` in float64, their products in the head's dtype."""
    z = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).double() * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def _computing_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of matrix products. Only inside the forward call is Accelerate's autocast active."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _tolerance(dtype: torch.dtype) -> float:
    """The relative difference that rounding explains; wrong attention is off by 0.1 and more."""
    return {torch.float64: 1e-5, torch.float32: 1e-3}.get(dtype, 5e-2)
