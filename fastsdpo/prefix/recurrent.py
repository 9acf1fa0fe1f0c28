"""Recurrent layers over a plan: linear attention, state-space layers, short convolutions.

A recurrent mixer of transformers reads and writes its states through a cache. In a pass over a plan it is called
once for each stretch (`fastsdpo.prefix.stretches`), with a cache of ours that hands out the states of the stretch
above, gradients included, and keeps the stretch's own. Stretches from whose states none goes on share calls.
What stands between the mixers (norms, MLPs, experts, attention) sees the whole pack at once.

The mixers get hooks. Gradient checkpointing runs these again in the backward pass, and a copy of the model keeps
them. The first hook makes every call but the last by calling the module itself; the module's own call is the last
one, and the second hook puts the outputs together.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastsdpo.prefix.attention import SharedPass
from fastsdpo.prefix.paths import path_mixers
from fastsdpo.prefix.stretches import Stretch, group_calls, handed_on


class StretchStates:
    """The states that a mixer reads and writes in one call: the part of transformers' `Cache` that mixers use.

    Nothing is written in place, so autograd follows the states from stretch to stretch.

    Args:
        before: the states of the stretch above, None at the start of a sequence.

    Attributes:
        conv: by index of the state, the last inputs of a convolution, ``[B, C, K - 1]`` for a kernel of K.
        recurrent: by index of the state, in the shape and dtype that the mixer gives.
    """

    def __init__(self, before: StretchStates | None):
        self._before = before
        self.conv: dict[int, Tensor] = {}
        self.recurrent: dict[int, Tensor] = {}
        self.last: _LastCall | None = None  # of the call that the module makes itself

    @staticmethod
    def stack(parts: list[StretchStates | None]) -> StretchStates | None:
        """The states of several stretches as a batch; they have all states, or none has."""
        given = [part for part in parts if part is not None]
        if not given or len(parts) == 1:
            return parts[0]
        whole = StretchStates(None)
        for name in ("conv", "recurrent"):
            for index in getattr(given[0], name):
                getattr(whole, name)[index] = torch.cat([getattr(part, name)[index] for part in given])
        return whole

    def detach(self) -> StretchStates:
        found = StretchStates(None)
        # A view of all inputs of the convolution: keep the few columns alone.
        found.conv = {index: state.detach().clone() for index, state in self.conv.items()}
        found.recurrent = {index: state.detach() for index, state in self.recurrent.items()}
        return found

    # ------------------------------------------------------------ what mixers call, as on transformers' `Cache`

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self._before is not None

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self._before is None else self._before.conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self._before is None else self._before.recurrent.get(state_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int
    ) -> Tensor:
        """The inputs ``[B, C, L]`` behind those that the convolution still needs of the stretch above."""
        width = conv_kernel_size - 1
        above = self.get_conv_state(layer_idx, state_idx)
        if above is None:  # what a convolution sees before the first token
            above = conv_states.new_zeros(*conv_states.shape[:-1], width)
        whole = torch.cat([above, conv_states], dim=-1)
        self.conv[state_idx] = whole[..., whole.shape[-1] - width :]
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        self.recurrent[state_idx] = recurrent_states
        return recurrent_states


class MixerStates:
    """What the student's pass leaves of one mixer for the teacher's: by packed token, without gradients.

    Attributes:
        states: after the tokens from which the teacher's stretches start.
        inputs: ``[D]``, of the tokens that the teacher's stretches run once more.
    """

    def __init__(self) -> None:
        self.states: dict[int, StretchStates] = {}
        self.inputs: dict[int, Tensor] = {}


class _LastCall:
    """What the second hook needs of the first: the pass, the call's stretches, the outputs of the calls before."""

    def __init__(self, shared: SharedPass, stretches: list[Stretch], done: dict[int, Tensor]):
        self.shared, self.stretches, self.done = shared, stretches, done


# ------------------------------------------------------------------------------------------------ the mixers


@cache
def _cache_argument(kind: type[nn.Module]) -> str | None:
    if issubclass(kind, GradientCheckpointingLayer):
        return None
    names = inspect.signature(kind.forward).parameters
    if "cache_params" in names:
        return "cache_params"
    return "past_key_values" if "past_key_values" in names else None


def cache_argument(module: nn.Module) -> str | None:
    """The argument through which a recurrent mixer gets its states; None for every other module."""
    if not hasattr(module, "layer_idx"):
        return None
    name = _cache_argument(type(module))
    # Attention takes past_key_values too, and an indexer. LFM2's convolutions are no attention, by name and attribute.
    attends = hasattr(module, "is_causal") or "Attention" in type(module).__name__ or hasattr(module, "index_topk")
    return None if name == "past_key_values" and attends else name


def recurrent_mixers(decoder: nn.Module) -> dict[str, nn.Module]:
    """The mixers that take their states from a cache, by name."""
    whole = {part for module in path_mixers(decoder).values() for part in module.modules()}
    found = decoder.named_modules()
    return {name: module for name, module in found if cache_argument(module) is not None and module not in whole}


def let_mixers_share(decoder: nn.Module) -> None:
    """Adds hooks to the mixers, once per model. Calls without a `SharedPass` run as before."""
    for module in recurrent_mixers(decoder).values():
        if not any(hook is _run_stretches for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(_run_stretches, with_kwargs=True)
            module.register_forward_hook(_join_stretches, with_kwargs=True, prepend=True)


def _run_stretches(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    shared: SharedPass | None = kwargs.get("fastsdpo_pass")
    if shared is None:
        return None
    others = {name: value for name, value in kwargs.items() if name not in ("fastsdpo_pass", "use_cache")}
    hidden = args[0] if args else others.pop("hidden_states")
    _check_call(module, hidden, others, shared)
    cache_name = cache_argument(module)
    assert cache_name is not None
    calls = shared.cached("calls", lambda: group_calls(shared.plan, shared.first, shared.stop))
    known = shared.states_before.get(module) or MixerStates()
    states = dict(known.states)

    def prepare(stretches: list[Stretch]) -> tuple[Tensor, StretchStates, dict[str, Any]]:
        own = StretchStates(StretchStates.stack([None if s.before is None else states[s.before] for s in stretches]))
        rows = [_inputs(s, hidden, shared.first, known.inputs) for s in stretches]
        longest = max(row.shape[1] for row in rows)
        rows = [F.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows]
        return torch.cat(rows), own, {**others, cache_name: own, "attention_mask": None}

    done: dict[int, Tensor] = {}
    for stretches in calls[:-1]:
        rows, own, call = prepare(stretches)
        done.update(_outputs(module, stretches, module(rows, **call)))
        if stretches[0].kept:
            states[stretches[0].stop - 1] = own
    rows, own, call = prepare(calls[-1])
    own.last = _LastCall(shared, calls[-1], done)
    if shared.states_kept is not None:
        shared.states_kept[module] = _hand_on(shared, states, hidden)
    return (rows,), call


def _check_call(module: nn.Module, hidden: Tensor, others: dict[str, Any], shared: SharedPass) -> None:
    """Raises NotImplementedError for calls that cannot be cut into stretches."""
    what = f"shared prefixes: {type(module).__name__} of layer {module.layer_idx}"
    tokens = shared.stop - shared.first
    if hidden.shape[:2] != (1, tokens):
        raise NotImplementedError(f"{what} changed the packed layout to {tuple(hidden.shape)}")
    if shared.states_kept is not None and module in shared.states_kept:
        raise NotImplementedError(f"{what} runs more than once in a pass: several layers share it")
    names = inspect.signature(type(module).forward).parameters
    for name, value in others.items():
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        given = [t for t in tensors if isinstance(t, Tensor) and tokens > 1 and tokens in t.shape]
        if name in names and name != "attention_mask" and given:
            raise NotImplementedError(f"{what} reads {name} of each token, which is not cut into stretches")


def _inputs(stretch: Stretch, hidden: Tensor, first: int, known: dict[int, Tensor]) -> Tensor:
    """The inputs ``[1, L, D]`` of a stretch; ``known``: of tokens before ``first``."""
    rows = [known[t][None, None] if t < first else hidden[:, t - first, None] for t in stretch.again]
    rows.append(hidden[:, stretch.start - first : stretch.stop - first])
    if stretch.before is not None and stretch.length == 1:
        rows *= 2  # or it would be the decoding path; nothing is read of the second
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _outputs(module: nn.Module, stretches: list[Stretch], output: Any) -> dict[int, Tensor]:
    """The outputs ``[1, L, D]`` of each stretch by its first token, without padding and tokens that ran again."""
    if not isinstance(output, Tensor):
        raise NotImplementedError(f"shared prefixes: {type(module).__name__} returns {type(output).__name__}")
    return {s.start: output[n : n + 1, len(s.again) : s.length] for n, s in enumerate(stretches)}


def _hand_on(shared: SharedPass, states: dict[int, StretchStates], hidden: Tensor) -> MixerStates:
    tokens, again = shared.cached("handed on", lambda: handed_on(shared.plan, shared.stop))
    found = MixerStates()
    found.states = {token: states[token].detach() for token in tokens if token in states}
    found.inputs = {token: hidden[0, token - shared.first].detach().clone() for token in again}
    return found


def _join_stretches(module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    name = cache_argument(module)
    own = kwargs.get(name) if name is not None else None
    if not isinstance(own, StretchStates) or own.last is None:
        return None
    last, own.last = own.last, None
    last.shared.mixers.add(module)
    end = last.stretches[0]
    if last.shared.states_kept is not None and end.kept:
        last.shared.states_kept[module].states[end.stop - 1] = own.detach()
    parts = {**last.done, **_outputs(module, last.stretches, output)}
    return torch.cat([parts[start] for start in sorted(parts)], dim=1)
