"""Passes through a model's decoder, the first of them inside a forward call of the whole model.

`run_inside` puts a function in place of the head, inside the model's own forward call. `PassRunner` sends
tokens through the decoder there: one sequence alone, or a part of a plan.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastsdpo.prefix.attention import (
    SharedPass,
    attending_alone,
    attends_alone,
    attention_modules,
    attention_windows,
    let_attention_switch,
    plan_masks,
)
from fastsdpo.prefix.model import (
    before_head,
    causal_lm,
    decoder_of,
    forward_replaced,
    model_device,
    text_inputs,
    unwrap,
)
from fastsdpo.prefix.partitioned import gathered
from fastsdpo.prefix.paths import let_paths_run, path_mixers
from fastsdpo.prefix.plan import Plan, positions_without
from fastsdpo.prefix.recurrent import let_mixers_share, recurrent_mixers
from fastsdpo.prefix.refusals import WITHOUT_MIXING, sharing_limit, unsupported
from fastsdpo.prefix.ulysses import Ulysses

Result = TypeVar("Result")


def run_inside(model: nn.Module, body: Callable[[Tensor], Result], inputs: dict[str, Any]) -> Result:
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
    causal = causal_lm(model)
    head = causal.get_output_embeddings()
    instead = _InPlaceOfHead(causal, body, tuple(inputs["input_ids"].shape))
    hooks = [
        head.register_forward_hook(instead.take_result),
        # Ahead of the hooks of FSDP2, which look for the tensors to differentiate in what is returned.
        unwrap(model).register_forward_hook(instead.give_result, prepend=True),
    ]
    try:
        with forward_replaced(head, instead.forward):
            return model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()


class _InPlaceOfHead(Generic[Result]):
    """The forward function that replaces a head's, and two hooks that carry its result past the model.

    The model may do something to its logits. So it gets empty ones, and the result of ``body`` goes from the
    head's last hook to the model's.
    """

    def __init__(self, causal: nn.Module, body: Callable[[Tensor], Result], shape: tuple[int, ...]):
        self.name = type(causal).__name__
        self.vocabulary = causal.config.get_text_config().vocab_size
        self.head = causal.get_output_embeddings()
        self.body = body
        self.shape = shape
        self.result: list[Result] = []
        self.in_body = False

    def forward(self, hidden: Tensor) -> Result:
        if tuple(hidden.shape[:-1]) != self.shape:
            raise NotImplementedError(
                f"run_inside: {self.name} must call its head on all positions "
                f"{list(self.shape)}, got {list(hidden.shape[:-1])}"
            )
        self.in_body = True
        try:
            with gathered(*self.head.parameters()):  # an adapter's layer gathers what is its own, and not its base's
                return self.body(hidden)
        finally:
            self.in_body = False

    def take_result(self, _head: nn.Module, args: Any, output: Result) -> Tensor:
        """The head's last hook: those of FSDP and ZeRO have seen the result before it."""
        if self.in_body:  # of `before_head`
            return output
        self.result.append(output)
        return args[0].new_empty(*self.shape[:-1], 0, self.vocabulary)

    def give_result(self, _model: nn.Module, _args: Any, _output: Any) -> Result:
        if not self.result:
            raise NotImplementedError(f"run_inside: {self.name} does not call its head")
        return self.result[-1]


class DecoderPass(NamedTuple):
    """T tokens that go through the decoder together.

    Attributes:
        token_ids, position_ids: ``[T]`` int64.
        rows: ``[n]`` int64, the tokens whose hidden states predict response tokens.
        shared: what the attention needs to know; None: one sequence, with the model's own attention.
    """

    token_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    shared: SharedPass | None


def sequence_pass(prompt: Sequence[int], completion: Sequence[int]) -> DecoderPass:
    """One sequence alone, unpadded; its rows predict the completion."""
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    ids = torch.tensor([*prompt, *completion])
    return DecoderPass(ids, torch.arange(len(ids)), rows, None)


class PassRunner:
    """Sends tokens through the decoder of one model, wrapped or not.

    Args:
        ulysses: the processes among which the tokens of each pass over a plan are divided; None: they are not.
    """

    def __init__(self, model: nn.Module, attention: str = "auto", ulysses: Ulysses | None = None):
        self.model, self.ulysses = model, ulysses
        self.causal = causal_lm(model)
        self.decoder = decoder_of(self.causal)
        self.device = model_device(model)
        self.attention = attention
        limit = sharing_limit(model)
        dynamic = limit is not None and limit.kind == "dynamic"
        counting = [m for m in self.decoder.modules() if hasattr(m, "create_position_ids_from_input_ids")]
        self._padding: int | None = counting[0].padding_idx if counting else None  # RoBERTa
        self._before_head = before_head(model)
        self._current: DecoderPass | None = None
        self._alone = attends_alone(self.decoder)
        self._dynamic = [m for m in self.decoder.modules() if dynamic and hasattr(m, "max_seq_len_cached")]

    def prepare_to_share(self, plan: Plan) -> None:
        """Lets the attention modules use a plan.

        Raises:
            NotImplementedError: the model does something that shared passes over ``plan`` would get wrong.
        """
        reason, limit = unsupported(self.model), sharing_limit(self.model)
        if limit is not None and plan.longest > limit.positions:
            reason = reason or str(limit)
        if reason is not None:
            raise NotImplementedError(f"shared_forward: sharing must be 'off' here: {reason}")
        if not self._alone:
            let_attention_switch(self.decoder, path_mixers(self.decoder).values())
        let_mixers_share(self.decoder)
        let_paths_run(self.decoder)

    def plan_pass(self, plan: Plan, first: int, stop: int, rows: Tensor, **given: Any) -> DecoderPass:
        """The packed tokens ``[first, stop)`` of ``plan``, or this process's; ``rows`` count from ``first``.

        ``given``: ``tables``, ``keep`` and ``before`` of `SharedPass`.
        """
        windows = attention_windows(self.causal.config.get_text_config())
        own = {"backend": self.attention, "windows": windows, "ulysses": self.ulysses}
        shared = SharedPass(plan, first=first, stop=stop, **own, **given)
        positions = plan.position_ids if self._padding is None else positions_without(plan, self._padding)
        tokens, positions = plan.token_ids[first:stop], positions[first:stop]
        if self.ulysses is not None:
            tokens, positions = self.ulysses.stretch(tokens), self.ulysses.stretch(positions)
        return DecoderPass(tokens, positions, rows, shared)

    def run_first(self, one: DecoderPass, body: Callable[[Tensor], Result]) -> Result:
        """``body(hidden [T, D])`` in place of the head, inside the call of the whole model that makes ``one``."""
        kinds = [m for m in self.decoder.modules() if "PositionalEmbedding" in type(m).__name__]
        kinds = [m for m in kinds if "position_ids" in inspect.signature(type(m).forward).parameters]
        hooks = [module.register_forward_pre_hook(self._give_positions, with_kwargs=True) for module in kinds]
        hooks.append(self.decoder.register_forward_pre_hook(self._give_pass, with_kwargs=True))
        alone = attending_alone(self.decoder, self._current_pass) if self._alone else nullcontext()
        try:
            with alone:
                return run_inside(self.model, partial(self._check_first, one, body), self._inputs(self.causal, one))
        finally:
            for hook in hooks:
                hook.remove()

    def _current_pass(self) -> SharedPass | None:
        return None if self._current is None else self._current.shared

    def _give_pass(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Some models hand their decoder no keyword arguments on (Mamba-2)."""
        shared = self._current_pass()
        return None if shared is None else (args, {**kwargs, "fastsdpo_pass": shared})

    def _give_positions(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Learned position embeddings that count the tokens themselves (BART) get the positions of the pass."""
        one = self._current
        if one is None or one.shared is None:
            return None
        call = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        given, positions = call.arguments.get("position_ids"), one.position_ids.to(self.device)
        call.arguments["position_ids"] = positions if given is None or given.ndim == 1 else positions[None]
        return call.args[1:], call.kwargs

    def _check_first(self, one: DecoderPass, body: Callable[[Tensor], Result], hidden: Tensor) -> Result:
        self._check_layers(one)
        return body(hidden[0])

    def run(self, one: DecoderPass) -> Tensor:
        """The hidden states ``[T, D]`` of another pass; called inside the ``body`` of `run_first`."""
        hidden = self.decoder(**self._inputs(self.decoder, one)).last_hidden_state
        self._current = None  # it holds the keys, values and states of the pass before
        self._check_layers(one)
        return self._before_head(hidden)[0]

    def rows(self, passes: list[DecoderPass], first_hidden: Tensor | None = None) -> Tensor:
        """The rows ``[N, D]`` of ``passes``; ``first_hidden [T, D]`` are the states of the first, if it has run."""
        kept = []
        for number, one in enumerate(passes):
            hidden = first_hidden if number == 0 and first_hidden is not None else self.run(one)
            kept.append(self.take(hidden, one.rows))
        return kept[0] if len(kept) == 1 else torch.cat(kept)

    def take(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Rows ``[n, D]`` of a pass's states ``hidden [T, D]``, which may be divided."""
        return hidden[rows.to(hidden.device)] if self.ulysses is None else self.ulysses.rows(hidden, rows)

    def _inputs(self, module: nn.Module, one: DecoderPass) -> dict[str, Any]:
        """The keyword arguments with which ``module``, the whole model or its decoder, makes a pass."""
        self._current = one
        for rotary in self._dynamic:  # or the pass would use the frequencies of a longer one before it
            for name in [n for n in vars(rotary) if n.endswith("max_seq_len_cached")]:
                setattr(rotary, name, 0)
        inputs = text_inputs(module, one.token_ids[None].to(self.device))
        if one.shared is not None:
            inputs["position_ids"] = one.position_ids[None].to(self.device)
            # transformers leaves a mask with four axes as it is. Without one it would take positions that
            # jump back at a branch for packed sequences, and make a mask. The plan's attention reads none.
            inputs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=self.device)
            inputs["fastsdpo_pass"] = one.shared
            if self._alone:
                config, dtype = self.causal.config.get_text_config(), self.causal.get_input_embeddings().weight.dtype
                inputs["attention_mask"] = plan_masks(one.shared, config, dtype, self.device)
        return inputs

    def _check_layers(self, one: DecoderPass) -> None:
        """Raises NotImplementedError where a layer that mixes tokens did not do so by the plan."""
        if one.shared is None:
            return
        paths = path_mixers(self.decoder)
        mixers = {**recurrent_mixers(self.decoder), **paths}
        without = {next(int(part) for part in name.split(".") if part.isdigit()) for name in mixers}
        without -= {module.layer_idx for module in attention_modules(self.decoder) if module not in paths.values()}
        config = self.causal.config.get_text_config()
        types = getattr(config, "layer_types", None) or ()
        without |= {layer for layer, kind in enumerate(types) if kind in WITHOUT_MIXING}
        without |= set(getattr(config, "cross_attention_layers", None) or ())  # of images: they do not run on text
        missing = sorted(set(range(config.num_hidden_layers)) - without - one.shared.calls.keys())
        silent = [name for name, module in mixers.items() if module not in one.shared.mixers]
        what = "do not call the attention interface" if missing else "do not get the pass"
        if missing or silent:
            raise NotImplementedError(
                f"shared_forward: sharing must be 'off' here: layers {missing or silent} of "
                f"{type(self.causal).__name__} {what}"
            )
