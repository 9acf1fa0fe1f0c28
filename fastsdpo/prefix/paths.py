"""Layers that cannot go on from a state: they run along whole paths of a plan, and all else is shared.

Some mixers take no state in training (Mamba-1's scan, Griffin's, MiniMax's lightning attention), or read more of a
sequence than keys and values (DeepSeek V4 compresses them, Zaya convolves them). In a pass over a plan such a mixer
is called once for each run, with all tokens from the root to the run's last one, and the outputs of the run's own
tokens are kept. Experts, MLPs, norms, embeddings and other layers see each token once. Runs of similar length share
calls, padded on the right: what stands behind the end of a row changes nothing that is read.

The mixers get hooks, as those of `fastsdpo.prefix.recurrent`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastsdpo.prefix.attention import SharedPass
from fastsdpo.prefix.plan import Run
from fastsdpo.prefix.stretches import SHORTEST

# By model type, the classes of modules that run along whole paths. Of models that are more than mixers.
PATH_MIXERS = {
    "deepseek_v4": "DeepseekV4Attention",
    "minimax": "MiniMaxLightningAttention",
    "recurrent_gemma": "RecurrentGemmaRecurrentBlock",
    "zamba": "ZambaMambaMixer",
    "zaya": "ZayaAttention",
}


def path_mixers(decoder: nn.Module) -> dict[str, nn.Module]:
    """The mixers that run along whole paths, by name."""
    kind = PATH_MIXERS.get(decoder.config.get_text_config().model_type)
    return {name: module for name, module in decoder.named_modules() if type(module).__name__ == kind}


def let_paths_run(decoder: nn.Module) -> None:
    """Adds hooks to the mixers, once per model. Calls without a `SharedPass` run as before."""
    for module in path_mixers(decoder).values():
        if not any(hook is _run_paths for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(_run_paths, with_kwargs=True)
            module.register_forward_hook(_join_paths, prepend=True)


class PathCall(NamedTuple):
    """Runs that share a call, and the packed tokens ``[B, L]`` of their paths."""

    runs: list[Run]
    tokens: Tensor


def path_calls(runs: list[Run]) -> list[PathCall]:
    """Calls that compute ``runs``, which all are paths from the root to their last token."""
    calls: list[list[Run]] = []
    for run in sorted(runs, key=_length, reverse=True):
        if calls and _length(run) >= SHORTEST * _length(calls[-1][0]):
            calls[-1].append(run)
        else:
            calls.append([run])
    return [PathCall(some, torch.stack([_path(run, _length(some[0])) for run in some])) for some in calls]


def _length(run: Run) -> int:
    return run.position + run.stop - run.start


def _path(run: Run, length: int) -> Tensor:
    parts = [torch.arange(part.start, part.stop) for part in (*run.ancestors, run)]
    return F.pad(torch.cat(parts), (0, length - _length(run)))


class _Open(NamedTuple):
    """What the second hook needs of the first, of the call that the module makes itself."""

    shared: SharedPass
    call: PathCall
    done: dict[int, Tensor]


def _run_paths(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    vars(module).pop("fastsdpo_open", None)
    shared: SharedPass | None = kwargs.get("fastsdpo_pass")
    if shared is None:
        return None
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    given = {**dict(zip(names, args)), **kwargs}
    mask = given.pop("attention_mask", None)
    given = {name: value for name, value in given.items() if name not in ("fastsdpo_pass", "use_cache")}
    rows = _per_token(module, shared, given)
    calls = shared.cached("paths", lambda: path_calls(shared.runs))

    def inputs(call: PathCall) -> dict[str, Any]:
        made = rows(call.tokens)
        if "attention_mask" in names:
            made["attention_mask"] = _mask(module, shared, mask, call.tokens.shape[1], made[names[0]])
        if "use_cache" in names:
            made["use_cache"] = False
        return made

    done: dict[int, Tensor] = {}
    for call in calls[:-1]:
        done.update(_outputs(call, module(**inputs(call))))
    last = inputs(calls[-1])
    vars(module)["fastsdpo_open"] = _Open(shared, calls[-1], done)
    return (), last


def _per_token(module: nn.Module, shared: SharedPass, given: dict[str, Any]) -> Callable[[Tensor], dict[str, Any]]:
    """A function that gives the arguments of packed tokens ``[B, L]``; the pass before has kept those of its own."""
    tokens = shared.stop - shared.first
    leaves, tree = tree_flatten(given)
    cut = [n for n, x in enumerate(leaves) if isinstance(x, Tensor) and x.shape[:2] == (1, tokens)]
    now = [leaves[n] for n in cut]
    if shared.first > 0:
        now = [torch.cat(pair, dim=1) for pair in zip(shared.states_before[module], now)]
    if shared.states_kept is not None:
        if module in shared.states_kept:
            raise NotImplementedError(f"shared prefixes: {type(module).__name__} runs more than once in a pass")
        shared.states_kept[module] = [x.detach() for x in now]

    def rows(index: Tensor) -> dict[str, Any]:
        found = list(leaves)
        for n, x in zip(cut, now):
            found[n] = x[0][index.to(x.device)]
        return tree_unflatten(found, tree)

    return rows


def _mask(module: nn.Module, shared: SharedPass, given: Any, length: int, hidden: Tensor) -> Any:
    """None for recurrent mixers; for attention, which of ``length`` tokens see each other, to add to the scores."""
    if not getattr(module, "is_causal", False) or "Attention" not in type(module).__name__:
        return None
    window = getattr(module, "sliding_window", None)

    def make() -> Tensor:
        distance = torch.arange(length, device=hidden.device)[:, None] - torch.arange(length, device=hidden.device)
        hides = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        zeros = hidden.new_zeros(hidden.shape[0], 1, length, length)
        return zeros.masked_fill(hides, torch.finfo(hidden.dtype).min)

    mask = shared.cached(("mask of paths", hidden.shape[:2], window, hidden.dtype), make)
    return {"causal": mask} if isinstance(given, dict) else mask  # Zaya


def _outputs(call: PathCall, output: Any) -> dict[int, Tensor]:
    """The outputs ``[1, L, D]`` of each run by its first token."""
    hidden = output[0] if isinstance(output, tuple) else output
    return {run.start: hidden[n : n + 1, run.position : _length(run)] for n, run in enumerate(call.runs)}


def _join_paths(module: nn.Module, _args: Any, output: Any) -> Any:
    opened: _Open | None = vars(module).pop("fastsdpo_open", None)
    if opened is None:
        return None
    opened.shared.mixers.add(module)
    parts = {**opened.done, **_outputs(opened.call, output)}
    joined = torch.cat([parts[start] for start in sorted(parts)], dim=1)
    return (joined, *(None for _ in output[1:])) if isinstance(output, tuple) else joined
