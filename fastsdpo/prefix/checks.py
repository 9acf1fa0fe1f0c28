"""Checks of a model before training: its head, passes of its decoder alone, and shared passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsdpo.prefix.attention import BackendError
from fastsdpo.prefix.forward import ResponseStates, shared_forward
from fastsdpo.prefix.model import (
    HeadParameters,
    causal_lm,
    forward_name,
    forward_replaced,
    head_parameters,
    model_device,
    text_inputs,
    training_mode,
    unwrap,
)
from fastsdpo.prefix.partitioned import gathered, is_partitioned
from fastsdpo.prefix.probe import ProbeItem, probe_ids, sharing_probe
from fastsdpo.prefix.refusals import above_the_decoder, unsupported


def check_head(model: nn.Module) -> tuple[bool, str]:
    """Whether `head_parameters` gives the model's own logits: (True, "") or (False, reason).

    Runs the model on a few tokens. Where it is sharded, all processes must call this.
    """
    results: list[Tensor | NotImplementedError] = []
    dtypes: list[torch.dtype] = []
    causal = causal_lm(model)
    output_embeddings = causal.get_output_embeddings()
    own = getattr(unwrap(output_embeddings), forward_name(output_embeddings))

    def logits_from_head(*args: Any, **kwargs: Any) -> Any:
        logits = own(*args, **kwargs)
        # Here, since FSDP holds the head gathered only inside the head's forward call.
        with gathered(*output_embeddings.parameters()):
            try:
                head = head_parameters(model)
            except NotImplementedError as error:
                results.append(error)
                return logits
            dtypes.append(_computing_dtype(args[0]))
            results.append(_logits(args[0], head))
        return logits

    ids = torch.tensor([probe_ids(model, 8)], device=model_device(model))
    with torch.no_grad(), forward_replaced(output_embeddings, logits_from_head):
        logits = model(**text_inputs(causal, ids)).logits
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
    item = ProbeItem(ids[:5], ids[5:12], ids[12:])

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


def check_sharing(model: nn.Module, *, attention: str = "auto", longest: int = 4096) -> tuple[bool, str]:
    """Whether shared passes give this model's values: (True, "") or (False, reason).

    Names what is known to be unsupported. Then it compares a plan with independent passes: hidden states of both
    sides, and the gradient of the token embeddings. Once per model and process is enough. Where the model is
    sharded, all processes must call it.

    Args:
        attention: as `shared_forward`.
        longest: tokens of the longest sequence that will be trained. The plan has sequences beyond each window,
            chunk or count of keys of the model that this many tokens exceed.

    Raises:
        BackendError: an attention backend that does not exist or cannot run here; it is a ValueError.
    """
    if model_device(model).type == "meta":  # no values: what is known of it alone
        reason = above_the_decoder(model) or unsupported(model)
        return reason is None, reason or ""
    items = sharing_probe(model, longest)
    try:
        shared = _probe(model, items, "conversation", attention)
        alone = _probe(model, items, "off", attention)
    except BackendError:
        raise
    except (NotImplementedError, ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        # Models that do not know the keyword or read the mask; backends that cannot compile; modules that return
        # something else. Named refusals speak for themselves.
        named = isinstance(error, NotImplementedError)
        if isinstance(error, RuntimeError) and not named and attention != "auto":
            raise  # a backend that is asked for by name runs or raises
        first = (str(error).splitlines() or [""])[0]
        return False, str(error) if named else f"{type(error).__name__}: {first}"
    mixture = any(
        getattr(causal_lm(model).config.get_text_config(), key, None)
        for key in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    for what in ("student", "teacher", "gradient"):
        got, want = getattr(shared, what), getattr(alone, what)
        norms = want.norm(dim=-1)
        errors = (got - want).norm(dim=-1) / norms.clamp(min=max(1e-3 * float(norms.max()), 1e-30))
        # Rounding may send single tokens to another expert. More than a quarter of them is an error, and so is
        # what changes the whole gradient.
        error = float(errors.quantile(0.75 if mixture else 1.0))
        tolerance = _tolerance(shared.dtype) if what != "gradient" else _gradient_tolerance(shared.dtype)
        whole = _relative_error(got, want) if mixture and what == "gradient" else 0.0
        if not (error <= tolerance and whole <= 0.15):
            return False, f"shared and independent passes differ by {max(error, whole):.1e} ({what}, relative)"
    return True, ""


class _Probe(NamedTuple):
    """What passes over the probe give, in float64: rows ``[N, D]`` of both sides, ``[ids, D]`` of the gradient."""

    student: Tensor
    teacher: Tensor
    gradient: Tensor
    dtype: torch.dtype


def _probe(model: nn.Module, items: list[ProbeItem], sharing: Any, attention: str) -> _Probe:
    """Passes over ``items``, and the gradient of the token embeddings.

    The gradient is taken at the output of the embeddings, which all mixing of tokens stands behind. So no
    parameter gets a gradient, and nothing is averaged over processes.
    """
    embedded: list[tuple[Tensor, Tensor]] = []

    def cut(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        leaf = output.detach().requires_grad_()
        embedded.append((args[0].flatten(), leaf))
        return leaf * 1  # CTRL scales it in place

    def rows(states: ResponseStates) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
        hidden = states.student_hidden
        weights = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float32, device=hidden.device)
        loss = (hidden.float() * weights.cos().mul(37).sin().view(hidden.shape)).sum()
        return loss, hidden.detach(), states.teacher_hidden, _computing_dtype(hidden)

    hook = causal_lm(model).get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad(), _without_reentrant_checkpointing(model), _without_averaging(model):
            loss, student, teacher, dtype = shared_forward(
                model, items, sharing=sharing, attention=attention, loss_fn=rows
            )
            gradients = torch.autograd.grad(loss, [leaf for _, leaf in embedded])
    finally:
        hook.remove()
    # By token id: what a shared token gets from its branches, separate passes give it in parts.
    count = 1 + max(int(ids.max()) for ids, _ in embedded)
    table = torch.zeros(count, gradients[0].shape[-1], dtype=torch.float64, device=student.device)
    for (ids, _), gradient in zip(embedded, gradients):
        table.index_add_(0, ids, gradient.double().reshape(len(ids), -1))
    return _Probe(student.double(), teacher.double(), table[table.abs().sum(-1) > 0], dtype)


@contextmanager
def _without_reentrant_checkpointing(model: nn.Module) -> Iterator[None]:
    """It takes no gradients of chosen tensors. The other kind stays, as a long probe needs the memory; but not where
    `gathered_layers` holds weights between a layer's forward and backward pass."""
    active = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    if not is_partitioned(model):
        active = [m for m in active if _is_reentrant(getattr(m, "_gradient_checkpointing_func", None))]
    for module in active:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in active:
            module.gradient_checkpointing = True


def _is_reentrant(checkpoint: Any) -> bool:
    return getattr(checkpoint, "keywords", {}).get("use_reentrant", True) is not False


def _without_averaging(model: nn.Module) -> AbstractContextManager:
    """DDP and FSDP1 would wait for the gradients of all parameters."""
    no_sync = getattr(model, "no_sync", None)
    return nullcontext() if no_sync is None else no_sync()


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
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 5e-2
    return {torch.float64: 1e-5, torch.float32: 1e-3}.get(dtype, 5e-2)


def _gradient_tolerance(dtype: torch.dtype) -> float:
    """The same for a row of the gradient. States without a gradient may cost a row as little as 1e-3."""
    rounding = _tolerance(dtype)
    return 3 * rounding if rounding > 1e-2 else 0.3 * rounding
