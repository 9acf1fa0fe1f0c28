"""Noise in training mode: dropout of every kind is turned off, and what is left of it is found.

The teacher is the same module as the student, in the same mode: what one of them draws at random, the
loss takes for a difference between them. Dropout is a layer (`nn.Dropout`) or a number that a module
keeps or reads from its configuration (``attention_dropout``, ``layerdrop``, ``router_jitter_noise``).
PhiMoE's routers use theirs in evaluation too, so they keep it and run as in evaluation. Two passes
over the same tokens then tell whether that was all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsdpo.data import TokenizedInteraction
from fastsdpo.prefix import (
    ResponseStates,
    causal_lm,
    head_parameters,
    no_grad_pass,
    probe_ids,
    shared_forward,
    training_mode,
)

logger = logging.getLogger("fastsdpo.trainer")


class Rate(NamedTuple):
    """A rate of dropout or jitter: ``holder[key]``, and where it was found."""

    holder: dict[str, Any]
    key: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}={self.holder[self.key]}"


def _rates(attributes: dict[str, Any], place: str, *, layer: bool = False) -> Iterator[Rate]:
    """Those above 0 among the attributes of an object; of a dropout ``layer`` also its p."""
    for name, value in attributes.items():
        words = name.lower()
        if not ("drop" in words or "jitter" in words or (layer and name == "p")):
            continue
        # PEFT's layers keep one number per adapter.
        holder, keys = (value, list(value)) if isinstance(value, dict) else (attributes, [name])
        for key in keys:
            number = holder[key]
            if isinstance(number, (int, float)) and not isinstance(number, bool) and number > 0:
                yield Rate(holder, key, f"{place}{name}")


def without_dropout(model: nn.Module) -> None:
    """Turns off the dropout and jitter whose rates modules keep; what the model computes in evaluation stays."""
    for module in filter(_evaluates_with_jitter, model.modules()):
        module.register_forward_pre_hook(_evaluate)
    turn_off(dropout_rates(model))


def _evaluates_with_jitter(module: nn.Module) -> bool:
    """Whether it is PhiMoE's router: its jitter also says how close to the best an expert's score must be to count."""
    return "phimoe" in type(module).__name__.lower() and hasattr(module, "router_jitter_noise")


def _evaluate(module: nn.Module, _args: Any) -> None:
    module.training = False


def dropout_rates(model: nn.Module) -> list[Rate]:
    """The rates above 0 that modules keep and that act in training alone, layers of dropout included."""
    return [
        rate
        for name, module in model.named_modules()
        if not _evaluates_with_jitter(module)
        for rate in _rates(vars(module), f"{name}." if name else "", layer="Dropout" in type(module).__name__)
    ]


def config_rates(model: nn.Module) -> list[Rate]:
    """The rates above 0 in the configuration of the text model."""
    return list(_rates(vars(causal_lm(model).config.get_text_config()), ""))


def turn_off(rates: list[Rate]) -> None:
    for rate in rates:
        rate.holder[rate.key] = 0.0


def check_noise(model: nn.Module, *, disable_dropout: bool) -> str | None:
    """Makes sure that training mode adds no noise, or says which module does.

    Runs the model on a few tokens; where it is sharded, on all processes.

    Args:
        disable_dropout: the modules' own rates are 0 already. Those of the configuration are set to
            0 where the model reads them in its forward pass, and any other noise is an error.

    Returns:
        None, or with ``disable_dropout=False`` the module where noise begins, after a warning.

    Raises:
        NotImplementedError: a noise that cannot be turned off; the text names the module.
    """
    noisy = noisy_module(model)
    if noisy is None:
        return None
    if not disable_dropout:
        logger.warning(
            "disable_dropout=False: student and teacher are noisy in training, and the loss contains "
            "the noise of both; it begins in %s",
            noisy,
        )
        return noisy
    rates = config_rates(model)
    if rates:
        logger.warning(
            "set to 0 in the model's configuration, which the saved model takes over: %s", ", ".join(map(str, rates))
        )
        turn_off(rates)
        noisy = noisy_module(model)
    if noisy is not None:
        raise NotImplementedError(
            f"SDPOTrainer: disable_dropout cannot turn off the noise of {noisy} in training mode; turn "
            "it off in the model, or set disable_dropout=False to train with a noisy teacher"
        )
    return None


def noisy_module(model: nn.Module) -> str | None:
    """The module whose outputs random numbers change in training mode, and its class; or None.

    Where a pass draws any, passes over the same tokens are compared. The generators of random
    numbers are left as they were.
    """
    device = causal_lm(model).get_input_embeddings().weight.device
    devices = [device] if device.type == "cuda" else []
    with training_mode(model, True), torch.random.fork_rng(devices):
        before = _generators(devices)
        first = few_logits(model)
        seen = device.type in ("cpu", "cuda")  # other devices have generators of their own
        if seen and all(map(torch.equal, before, _generators(devices))):
            return None
        if all(_alike(few_logits(model), first) for _ in range(3)):
            return None
        names, norms = [], []
        for _ in range(4):
            names, found = _norms(model)
            norms.append(found)
    # Modules end from the inside out: the first that differs is the innermost.
    for name, values in zip(names, zip(*norms)):
        if max(values) - min(values) > 1e-3 * max(values):
            return name
    return type(model).__name__


def few_logits(model: nn.Module) -> Tensor:
    """``[48, V]`` logits of tokens that are the same every time, computed as the loss has them."""
    ids = probe_ids(model, 64)
    alone = TokenizedInteraction(ids[:16], ids[:16], ids[16:])  # one pass, for both contexts

    def logits(states: ResponseStates) -> Tensor:
        head = head_parameters(model)
        hidden = states.student_hidden.to(head.weight.dtype)
        return nn.functional.linear(hidden, head.weight, head.bias)

    with no_grad_pass():
        return shared_forward(model, [alone], sharing="off", loss_fn=logits).double()


def _generators(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Equal but for the order of sums on a GPU, which may send a token to another expert."""
    errors = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-30)
    return not float(errors.median()) > 1e-3


def _norms(model: nn.Module) -> tuple[list[str], list[float]]:
    """The modules of one pass in the order in which they end, and the norms of what they return."""
    names, norms = [], []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else [output]
            parts = [t.detach().double().norm() for t in tensors if isinstance(t, Tensor)]
            if parts:
                names.append(f"{name} ({type(module).__name__})")
                norms.append(float(torch.stack(parts).norm()))

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_hook(watch(name)))
        few_logits(model)
    return names, norms
