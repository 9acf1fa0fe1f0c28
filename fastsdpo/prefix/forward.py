"""Runs a Hugging Face causal LM on interactions and returns the states that predict responses.

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

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fastsdpo.prefix.attention import BackendError, SharedPass, check_backend, plan_attention
from fastsdpo.prefix.pack import (
    Plan,
    Sharing,
    TokenizedInteraction,
    build_plan,
    check_interactions,
    check_sharing_level,
)

Result = TypeVar("Result")

ATTENTION_NAME = "fastsdpo_plan"
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
AttentionInterface.register(ATTENTION_NAME, plan_attention)


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
    """The head as the losses from hidden states take it: with ``z = logit_scale * (hidden @
    weight.T + bias)`` the logits are z, or ``softcap * tanh(z / softcap)``."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


# ------------------------------------------------------------------------------------------ public


def shared_forward(
    model: nn.Module,
    interactions: Sequence[TokenizedInteraction],
    *,
    teacher_model: nn.Module | None = None,
    teacher_context: Callable[[], AbstractContextManager] | None = None,
    sharing: Sharing = "conversation",
    attention: str = "auto",
    loss_fn: Callable[[ResponseStates], Any] | None = None,
) -> Any:
    """Hidden states of student and teacher at the positions that predict response tokens.

    Log-probabilities and gradients equal those of independent passes, whatever the sharing.

    Args:
        model: a transformers causal LM, bare or wrapped (DDP, FSDP, PEFT, Accelerate).
        interactions: objects with ``prompt_ids``, ``teacher_prompt_ids`` and ``completion_ids``,
            lists of token ids; the student reads prompt + completion, the teacher teacher prompt +
            completion.
        teacher_model: the teacher (EMA, frozen, ...); None is the live self-teacher: ``model``,
            whose teacher pass reads the keys and values of the student's.
        teacher_context: a context manager under which ``model`` is another teacher, such as
            ``model.disable_adapter`` of PEFT. Like a teacher of its own it shares no keys and values.
        sharing: "conversation" computes once every prefix that any of the sequences share,
            "interaction" those of each interaction's own two sequences, "off" runs every sequence
            alone and unpadded, with any model.
        attention: "auto", or a backend of `fastsdpo.prefix.attention`, which then runs or raises.
        loss_fn: called with the states in place of the head's forward pass, where FSDP and ZeRO hold
            its parameters gathered; what it returns (a tensor or a tuple) is returned in place of the
            states.

    Returns:
        ResponseStates, or what ``loss_fn`` returned.

    Raises:
        ValueError: an empty prompt or completion, an unknown sharing or attention.
        NotImplementedError: an adapter works above the decoder (prompt learning, ...); or sharing is
            not "off" and the model does something that sharing would get wrong. The message says
            what. See `check_passes` and `check_sharing`.
    """
    name = "shared_forward"
    check_interactions(name, interactions)
    check_sharing_level(name, sharing)
    check_backend(attention)
    if teacher_model is not None and teacher_context is not None:
        raise ValueError(f"{name}: teacher_model and teacher_context must not both be given")
    for checked in (model, teacher_model):
        reason = None if checked is None else above_the_decoder(checked)
        if reason is not None:
            raise NotImplementedError(f"{name}: the model is not supported: {reason}")
    live = (teacher_model is None or teacher_model is model) and teacher_context is None
    teacher = model if teacher_model is None else teacher_model

    if sharing == "off":
        students = [_alone(i.prompt_ids, i.completion_ids) for i in interactions]
        teachers = [_alone(i.teacher_prompt_ids, i.completion_ids) for i in interactions]
        if live and all(list(i.teacher_prompt_ids) == list(i.prompt_ids) for i in interactions):
            teachers = []  # a pass over the history alone: both are the same
    elif live:
        plan = build_plan(interactions, sharing=sharing)
        keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        middle = plan.student_tokens
        students = [_packed(model, plan, 0, middle, plan.student_rows, attention, keys_values)]
        rows = plan.teacher_rows - middle
        teachers = [_packed(model, plan, middle, plan.tokens, rows, attention, keys_values)]
    else:
        plan = build_plan(interactions, sharing=sharing, teachers=False)
        students = [_packed(model, plan, 0, plan.tokens, plan.student_rows, attention)]
        other = build_plan(interactions, sharing=sharing, students=False)
        teachers = [_packed(teacher, other, 0, other.tokens, other.teacher_rows, attention)]

    teacher_hidden = None
    if not live:  # before the student's pass, whose activations stay in memory until the backward
        with no_grad_pass(), (teacher_context or nullcontext)():
            teacher_hidden = _run_inside(teacher, teachers[0], lambda run: _rows(teachers, run))

    def body(run: Callable[[_Call], Tensor]) -> Any:
        student_rows = _rows(students, run)
        with no_grad_pass():
            if not live:
                teacher_rows = teacher_hidden
            elif sharing == "off":
                teacher_rows = _rows(teachers, run) if teachers else student_rows.detach()
            else:
                teacher_rows = _live_teacher_rows(students[0], teachers[0], run)
                if students[0].shared is not None:  # checkpointing runs the layers again later
                    students[0].shared.capture = False
                keys_values.clear()
        labels = _labels(interactions, student_rows.device)
        states = ResponseStates(student_rows, teacher_rows, *labels)
        return states if loss_fn is None else loss_fn(states)

    return _run_inside(model, students[0], body)


def head_parameters(model: nn.Module) -> HeadParameters:
    """Weight, bias, softcap and scale of the head that follows the hidden states.

    LoRA on the head is merged into the returned weight, differentiably. `check_head` compares the
    result with the model's own logits.

    Raises:
        NotImplementedError: a head that is more than a linear layer and what is known of scales.
    """
    name = "head_parameters"
    causal = causal_lm(model)
    head = causal.get_output_embeddings()
    config = causal.config.get_text_config()
    for attribute in (
        "lm_head_multiplier",
        "output_multiplier",
        "logits_soft_cap",
        "output_logit_soft_cap",
        "dim_model_base",
        "final_logits_bias",
    ):
        if getattr(config, attribute, None) not in (None, 1.0):
            raise NotImplementedError(f"{name}: the configuration's {attribute} is not supported")
    softcap = getattr(config, "final_logit_softcapping", None) or None
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None) not in (None, 1.0):
        # One name, two meanings.
        if config.model_type.startswith("granite"):
            scale = 1.0 / config.logits_scaling
        elif config.model_type.startswith("hyperclovax"):
            scale = float(config.logits_scaling)
        else:
            raise NotImplementedError(f"{name}: logits_scaling of model type {config.model_type!r} is not known")
    weight, bias = _linear_weight(head)
    for parameter in (weight, bias):
        if parameter is not None and hasattr(parameter, "full_tensor"):
            raise NotImplementedError(
                f"{name}: the head's parameters are sharded; call it in the loss_fn of "
                "shared_forward, inside the model's forward pass"
            )
    return HeadParameters(weight, bias, softcap, scale)


def check_head(model: nn.Module) -> tuple[bool, str]:
    """Whether `head_parameters` gives the model's own logits: (True, "") or (False, reason).

    Runs the model on a few tokens; where it is sharded, on all processes.
    """
    states: list[Tensor] = []
    found: list[Any] = []
    dtypes: list[torch.dtype] = []
    causal = causal_lm(model)
    output_embeddings = causal.get_output_embeddings()
    own = getattr(unwrap(output_embeddings), _forward_name(output_embeddings))

    def take_states(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    def logits_from_head(*args: Any, **kwargs: Any) -> Any:
        logits = own(*args, **kwargs)
        try:  # inside the head's forward pass, where FSDP holds it gathered
            head = head_parameters(model)
        except NotImplementedError as error:
            found.append(error)
            return logits
        dtypes.append(_computing_dtype(states[0]))
        hidden = states[0].to(head.weight.dtype)
        z = nn.functional.linear(hidden, head.weight, head.bias).double() * head.logit_scale
        found.append(z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap))
        return logits

    ids = torch.tensor([_check_ids(model, 8)], device=_device(model))
    hook = causal.get_decoder().register_forward_hook(take_states, prepend=True)
    try:
        with torch.no_grad(), _forward_replaced(output_embeddings, logits_from_head):
            logits = model(**text_inputs(causal, ids)).logits
    finally:
        hook.remove()
    if not found:
        return False, f"{type(causal).__name__} does not call its head"
    if isinstance(found[0], NotImplementedError):
        return False, str(found[0])
    error = float((logits.double() - found[0]).norm() / logits.double().norm().clamp(min=1e-30))
    if error <= _tolerance(dtypes[0]):
        return True, ""
    return False, f"the model's logits differ from those of its head's weights by {error:.1e}"


def check_passes(model: nn.Module) -> tuple[bool, str]:
    """Whether the passes of `shared_forward` give the model's own logits: (True, "") or (False, reason).

    All but one of them call the decoder alone, below what an adapter may do above it. Compares both
    passes of an interaction with calls of the model; where it is sharded, on all processes.
    """
    ids = _check_ids(model, 20)
    item = _Item(ids[:5], ids[5:12], ids[12:])

    def logits(states: ResponseStates) -> tuple[Tensor, Tensor, torch.dtype]:
        head = head_parameters(model)
        found = []
        for hidden in (states.student_hidden, states.teacher_hidden):
            z = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).double()
            z = z * head.logit_scale
            found.append(z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap))
        return found[0], found[1], _computing_dtype(states.student_hidden)

    try:
        with torch.no_grad(), training_mode(model, False):
            *found, dtype = shared_forward(model, [item], sharing="off", loss_fn=logits)
            for got, prompt in zip(found, (item.prompt_ids, item.teacher_prompt_ids)):
                call = torch.tensor([[*prompt, *item.completion_ids]], device=_device(model))
                own = model(**text_inputs(causal_lm(model), call)).logits[0].double()
                want = own[-len(got) - 1 : -1]
                error = float((got - want).norm() / want.norm().clamp(min=1e-30))
                if not error <= _tolerance(dtype):
                    return False, (
                        "its decoder, called alone, gives other logits than the whole model (relative "
                        f"difference {error:.1e}): something above the decoder takes part, such as an "
                        "adapter"
                    )
    except (NotImplementedError, ValueError, TypeError) as error:
        return False, str(error)
    return True, ""


def check_sharing(model: nn.Module, *, attention: str = "auto") -> tuple[bool, str]:
    """Whether shared passes give this model's values: (True, "") or (False, reason).

    Names what is known to be unsupported, then compares a small plan (nested histories, branches,
    a branch inside a branch) with independent passes. Once per model and process is enough. Where the
    model is sharded, it has to run on all processes.

    Raises:
        BackendError: a ValueError; an attention backend that does not exist or cannot run here.
    """
    ids = _check_ids(model, 96)

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
        # The last two: a model that does not know the keyword or does something with the mask.
        return False, str(error)
    mixture = any(
        getattr(causal_lm(model).config.get_text_config(), key, None)
        for key in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    for what in ("student", "teacher"):
        got = getattr(shared, f"{what}_hidden").double()
        want = getattr(alone, f"{what}_hidden").double()
        errors = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)
        # Rounding may send a token to another expert; it must not be many tokens.
        error = float(errors.quantile(0.75 if mixture else 1.0))
        if not error <= _tolerance(dtype):
            return False, f"shared and independent passes differ by {error:.1e} ({what}, relative)"
    return True, ""


# Adapters that are more than layers of the decoder, by the type that PEFT gives them.
ABOVE_THE_DECODER = {
    "POLY": "needs task_ids, which interactions do not have",
    "SHADOW": "begins its own pass above the decoder",
    "XLORA": "weighs its experts by a pass of its own, above the decoder",
}


def above_the_decoder(model: nn.Module) -> str | None:
    """What an adapter of PEFT does above the decoder, which calls of the decoder alone lack; or None."""
    config = getattr(unwrap(model), "active_peft_config", None)
    if config is None:
        return None
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        return f"the {kind} adapter puts virtual tokens into the sequence, above the decoder"
    if kind in ABOVE_THE_DECODER:
        return f"the {kind} adapter {ABOVE_THE_DECODER[kind]}"
    if getattr(config, "alora_invocation_tokens", None):
        return f"the {kind} adapter looks for its alora_invocation_tokens above the decoder"
    return None


def unsupported(model: nn.Module) -> str | None:
    """What of this model sharing is known to get wrong, or None."""
    causal = causal_lm(model)
    config = causal.config.get_text_config()
    kind = type(causal).__name__
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} has an encoder"
    if getattr(causal, "_is_stateful", False):
        return f"{kind} has recurrent layers: their state belongs to one sequence"
    others = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if others:
        return f"{kind} has layers of type {', '.join(sorted(others))}"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{kind} softcaps its attention scores"
    if getattr(config, "output_router_logits", False):
        return f"{kind} adds an auxiliary loss over all routed tokens (output_router_logits=True)"
    for name, module in causal.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            return f"dropout is active ({name} has p={module.p}): branches would share its mask"
    return None


class RotaryLimit(NamedTuple):
    """Rotary embeddings of ``kind``, which are others in a pass over more than ``positions``."""

    kind: str
    positions: int

    def __str__(self) -> str:
        return f"its {self.kind} rotary embeddings change beyond {self.positions} positions"


def rotary_limit(model: nn.Module) -> RotaryLimit | None:
    """The longest sequence that can be shared where the rotary embeddings follow the longest at hand.

    Beyond it one long sequence would change those that share a pass with it. None: no limit.
    """
    config = causal_lm(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # by layer
        limit = part.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        if part.get("rope_type") in ("dynamic", "longrope") and limit:
            limits.append(RotaryLimit(part["rope_type"], limit))
    return min(limits, key=lambda limit: limit.positions, default=None)


# ------------------------------------------------------------------------------------ the wrapping


def unwrap(model: nn.Module) -> nn.Module:
    """The model below DDP, FSDP1, DeepSpeed and torch.compile; FSDP2 and PEFT stay in place."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif type(model).__name__ in WRAPPERS:
            model = model.module
        else:
            return model


def is_wrapped(model: nn.Module) -> bool:
    """Whether something averages the gradients of several processes: DDP, FSDP or DeepSpeed."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod
    names = {kind.__name__ for kind in type(model).__mro__}
    return bool(names & {*WRAPPERS, "FSDPModule"})


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model below every wrapper and below PEFT's.

    Raises:
        TypeError: there is none with a head.
    """
    inner = unwrap(model)
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(inner, "get_output_embeddings") or inner.get_output_embeddings() is None:
        raise TypeError(f"model must be a transformers causal language model, got {type(model).__name__}")
    return inner


@contextmanager
def no_grad_pass() -> Iterator[None]:
    """`torch.no_grad`, without the warnings of gradient checkpointing that is of no use in it."""
    with torch.no_grad(), warnings.catch_warnings():
        # Reentrant checkpointing says so of every layer, here as it should be.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
        yield


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training mode, or not, and afterwards every module as it was."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def text_inputs(module: nn.Module, input_ids: Tensor) -> dict[str, Any]:
    """The keyword arguments for a call of ``module`` on text, ``input_ids [B, L]`` among them.

    The forward pass of some multimodal models takes the kinds of its tokens, and may demand them in
    training: 0 is text.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    config = module.config
    # Elsewhere 0 is something else: a segment, which has an embedding (GPT-2, BERT), or the part of
    # the sequence in which tokens see those behind them (PaliGemma).
    if config.get_text_config() is not config and config.model_type != "paligemma":
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inspect.signature(type(module).forward).parameters:
                inputs[name] = torch.zeros_like(input_ids)
    return inputs


def _device(model: nn.Module) -> torch.device:
    return causal_lm(model).get_input_embeddings().weight.device


class _Call(NamedTuple):
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
        with _forward_replaced(head, in_place_of_head):
            return model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _forward_name(module: nn.Module) -> str:
    """A module that Accelerate placed on a device keeps its own forward under another name."""
    return "_old_forward" if "_old_forward" in vars(unwrap(module)) else "forward"


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` runs ``forward`` in place of its own; its hooks run as always."""
    module, name = unwrap(module), _forward_name(module)
    own = vars(module).get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        delattr(module, name) if own is None else setattr(module, name, own)


def _run_inside(model: nn.Module, first: _Call, body: Callable[[Callable[[_Call], Tensor]], Result]) -> Result:
    """``body(run)`` inside one forward call of ``model``; ``run(call)`` gives hidden states [T, D].

    The call ``first`` is the one that the wrapped model itself makes.
    """
    causal, device = causal_lm(model), _device(model)
    decoder = causal.get_decoder()

    limit = rotary_limit(model)
    dynamic = limit is not None and limit.kind == "dynamic"
    rotary = [m for m in decoder.modules() if dynamic and hasattr(m, "max_seq_len_cached")]

    def inputs(called: nn.Module, call: _Call) -> dict[str, Any]:
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
        def run(call: _Call) -> Tensor:
            if call is first:
                hidden = first_hidden[0]
            else:
                hidden = decoder(**inputs(decoder, call)).last_hidden_state[0]
            if call.shared is not None:
                _check_layers(model, call.shared)
            return hidden

        return body(run)

    return run_inside(model, with_first, inputs(causal, first))


# -------------------------------------------------------------------------------------- the calls


def _alone(prompt: Sequence[int], completion: Sequence[int]) -> _Call:
    """One unpadded sequence; the rows that predict its completion."""
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    ids = torch.tensor([*prompt, *completion])
    return _Call(ids, torch.arange(len(ids)), None, rows)


def _packed(
    model: nn.Module,
    plan: Plan,
    first: int,
    stop: int,
    rows: Tensor,
    attention: str,
    keys_values: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> _Call:
    """Tokens ``[first, stop)`` of a plan; a pass that begins at 0 fills ``keys_values``, if given."""
    reason, changing = unsupported(model), rotary_limit(model)
    if changing is not None and int(plan.position_ids.max()) >= changing.positions:
        reason = reason or str(changing)
    if reason is not None:
        raise NotImplementedError(f"shared_forward: sharing must be 'off' here: {reason}")
    causal = causal_lm(model)
    _let_attention_switch(causal.get_decoder())
    shared = SharedPass(
        plan,
        first=first,
        stop=stop,
        backend=attention,
        windows=_windows(causal.config.get_text_config()),
        keys_values={} if keys_values is None else keys_values,
        capture=first == 0 and keys_values is not None,
    )
    tokens = slice(first, stop)
    return _Call(plan.token_ids[tokens], plan.position_ids[tokens], shared, rows)


def _rows(calls: list[_Call], run: Callable[[_Call], Tensor]) -> Tensor:
    kept = []
    for call in calls:
        hidden = run(call)
        kept.append(hidden[call.rows.to(hidden.device)])
    return kept[0] if len(kept) == 1 else torch.cat(kept)


def _live_teacher_rows(student: _Call, teacher: _Call, run: Callable[[_Call], Tensor]) -> Tensor:
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


def _labels(interactions: Sequence[TokenizedInteraction], device: torch.device) -> list[Tensor]:
    """Target ids, sequence ids and positions in the response, ``[N]`` each."""
    labels = [
        (token, index, position)
        for index, item in enumerate(interactions)
        for position, token in enumerate(item.completion_ids)
    ]
    return list(torch.tensor(labels, device=device).T.contiguous())


# ---------------------------------------------------------------------- the attention of the model


def _windows(config: Any) -> dict[int, int | None]:
    """The sliding window of each layer, by the configuration."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        types = ["full_attention" if window is None else "sliding_attention"]
        types = types * config.num_hidden_layers
    return {layer: window if kind == "sliding_attention" else None for layer, kind in enumerate(types)}


def _let_attention_switch(decoder: nn.Module) -> None:
    """Once per model: its attention modules use the plan in the calls that carry one.

    On the modules inside the layers, because gradient checkpointing runs these again, hooks
    included, in the backward pass, long after this call has returned.
    """
    for module in decoder.modules():
        if not hasattr(module, "layer_idx") or "Attention" not in type(module).__name__:
            continue
        if not any(hook is _use_plan for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(_use_plan, with_kwargs=True)
            module.register_forward_hook(_use_own, with_kwargs=True, always_call=True)


def _use_plan(module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    shared = kwargs.get("fastsdpo_pass")
    if shared is not None:
        shared.own_implementation = module.config._attn_implementation
        module.config._attn_implementation = ATTENTION_NAME


def _use_own(module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
    shared = kwargs.get("fastsdpo_pass")
    if shared is not None and module.config._attn_implementation == ATTENTION_NAME:
        module.config._attn_implementation = shared.own_implementation


def _check_layers(model: nn.Module, shared: SharedPass) -> None:
    config = causal_lm(model).config.get_text_config()
    missing = sorted(set(range(config.num_hidden_layers)) - shared.layers)
    if missing:
        raise NotImplementedError(
            f"shared_forward: sharing must be 'off' here: layers {missing} of "
            f"{type(causal_lm(model)).__name__} do not call the attention interface"
        )


# ------------------------------------------------------------------------------------ the head


def _linear_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, its LoRA adapters merged in."""
    head = unwrap(head)
    if hasattr(head, "modules_to_save") and hasattr(head, "active_adapters"):  # PEFT's trained copy
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        if active and not getattr(head, "disable_adapters", False):
            return _linear_weight(head.modules_to_save[active[0]])
        return _linear_weight(head.original_module)
    if hasattr(head, "lora_A"):
        weight, bias = _linear_weight(head.base_layer)
        if head.disable_adapters or head.merged:
            return weight, bias
        for adapter in head.active_adapters:
            if adapter not in head.lora_A:
                continue
            if head.use_dora.get(adapter) or getattr(head.lora_dropout[adapter], "p", 0) > 0:
                raise NotImplementedError("head_parameters: DoRA or LoRA dropout on the head")
            weight = weight + head.get_delta_weight(adapter).to(weight.dtype)
        return weight, bias
    # FSDP2 makes a subclass of its own; one that computes otherwise (quantized, ...) is no linear layer.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise NotImplementedError(f"head_parameters: the head must be a torch.nn.Linear, got {type(head).__name__}")
    return head.weight, head.bias


# ---------------------------------------------------------------------------------- for the checks


class _Item(NamedTuple):
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    completion_ids: list[int]


def _check_ids(model: nn.Module, count: int) -> list[int]:
    """Token ids for a check: distinct as far as the vocabulary goes, the same every time."""
    vocabulary = causal_lm(model).config.get_text_config().vocab_size
    return [(7 + 37 * n) % vocabulary for n in range(count)]


def _computing_dtype(hidden: Tensor) -> torch.dtype:
    """What matrix products round to, asked inside the forward pass, where Accelerate's autocast is."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _tolerance(dtype: torch.dtype) -> float:
    """Relative difference that rounding explains; wrong attention is off by 0.1 and more."""
    return {torch.float64: 1e-5, torch.float32: 1e-3}.get(dtype, 5e-2)
