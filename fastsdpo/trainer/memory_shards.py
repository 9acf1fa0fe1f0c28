"""Weights in shards (FSDP2, as accelerate sets it up), for a walk on tensors without memory.

Units: each decoder layer, the embedding, and the rest (final norm and head; with tied weights the embedding too).
A layer's weights are gathered when it is called and given up after it; the last unit stays gathered until its
backward pass, as accelerate asks for. Beside the gathered weights there is for a moment the buffer that the
processes write into, and in the backward pass that of the next layer. A unit's gradients are copied into one buffer
to be summed over the processes, which lives until the next unit's is full. In a pass whose gradients are not summed
yet (the first ones of a step) they stay whole, as FSDP2's `set_requires_gradient_sync(False)` has it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from fastsdpo.prefix import causal_lm, decoder_of
from fastsdpo.trainer.memory_meter import Meter

GATHERED = "gathered"


class Unit:
    """Weights that are gathered together.

    Attributes:
        size: bytes of them, whole.
        trained: those that get a gradient; `waiting`: how many of them have none yet in this pass.
    """

    def __init__(self, modules: list[nn.Module], parameters: list[nn.Parameter], *, stays: bool):
        self.modules, self.parameters, self.stays = modules, parameters, stays
        self.size = sum(p.nbytes for p in parameters)
        self.trained = [p for p in parameters if p.requires_grad]
        self.waiting = len(self.trained)
        self.gathered = self.fetched = False


class Shards:
    """Hooks on a model without memory that tell a meter what is gathered and reduced.

    Args:
        wide: trained weights and their gradients are float32 in the shards, whatever they are when gathered.
        sync: whether this pass's gradients are summed over the processes: the last of a step.
    """

    def __init__(self, meter: Meter, model: nn.Module, processes: int, *, wide: bool):
        self.meter, self.processes, self.wide = meter, processes, wide
        self.sync = True
        self._flat: Unit | None = None  # its buffer is not free yet
        self._reducing = 0
        self._has_gradients: set[Unit] = set()
        self.units = _units(model)
        for before, unit in zip([None, *self.units], self.units):
            for module in unit.modules:
                module.register_forward_pre_hook(partial(self._called, unit))
                module.register_forward_hook(partial(self._left, unit, before))
            for parameter in unit.trained:
                parameter.register_post_accumulate_grad_hook(partial(self._accumulated, unit))
        for parameter in model.parameters():
            meter.see(parameter, "weights", share=0)
        meter.add("weights", sum(self.shard(p) for p in model.parameters()))

    def shard(self, parameter: Tensor) -> int:
        """Bytes of this process's part of a weight."""
        size = 4 if self.wide and parameter.requires_grad else parameter.element_size()
        return size * -(-parameter.numel() // self.processes)

    def _called(self, unit: Unit, *_: Any) -> None:
        self._gather(unit)

    def _left(self, unit: Unit, before: Unit | None, _module: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(partial(self._backward, unit, before))
        if not unit.stays:
            self._give_up(unit)

    def _backward(self, unit: Unit, before: Unit | None, _grad: Tensor) -> None:
        self._gather(unit)
        self._free_buffer()
        if before is not None and not (before.gathered or before.fetched):
            before.fetched = True
            self.meter.add(GATHERED, before.size)

    def _gather(self, unit: Unit) -> None:
        if unit.gathered:
            return
        if not unit.fetched:
            self.meter.add(GATHERED, unit.size)
        self.meter.add(GATHERED, unit.size)
        self._free_buffer()
        self._flat, unit.gathered, unit.fetched = unit, True, False

    def _free_buffer(self) -> None:
        """In a forward pass when the next unit is there, in a backward pass at once."""
        if self._flat is not None:
            self.meter.remove(GATHERED, self._flat.size)
            self._flat = None

    def _give_up(self, unit: Unit) -> None:
        if unit.gathered:
            unit.gathered = False
            self.meter.remove(GATHERED, unit.size)

    def _accumulated(self, unit: Unit, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self.meter.see(parameter.grad, "gradients")
        unit.waiting -= 1
        if unit.waiting:
            return
        unit.waiting = len(unit.trained)
        self._give_up(unit)
        if not self.sync:
            return
        whole = sum(p.grad.nbytes for p in unit.trained if p.grad is not None)
        self.meter.add(GATHERED, whole)
        self.meter.remove(GATHERED, self._reducing)
        self._reducing = whole
        if unit not in self._has_gradients:
            self._has_gradients.add(unit)
            self.meter.add("gradients", sum(map(self.shard, unit.trained)))
        for p in unit.trained:
            p.grad = None

    def pass_ends(self) -> None:
        """After a backward pass: nothing is gathered or on its way."""
        for unit in self.units:
            self._give_up(unit)
            if unit.fetched:
                unit.fetched = False
                self.meter.remove(GATHERED, unit.size)
        self._free_buffer()
        self.meter.remove(GATHERED, self._reducing)
        self._reducing = 0

    def drop_gradients(self) -> None:
        """After the optimizer's step."""
        for unit in self._has_gradients:
            self.meter.remove("gradients", sum(map(self.shard, unit.trained)))
        self._has_gradients.clear()


def _units(model: nn.Module) -> list[Unit]:
    """In the order in which a forward pass calls them."""
    causal = causal_lm(model)
    decoder, head = decoder_of(causal), causal.get_output_embeddings()
    count = causal.config.get_text_config().num_hidden_layers
    layers = next(m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    embedding = causal.get_input_embeddings()
    tied = embedding.weight is head.weight
    units = [] if tied else [Unit([embedding], list(embedding.parameters()), stays=False)]
    units += [Unit([layer], list(layer.parameters()), stays=False) for layer in layers]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    inside |= set() if tied else {id(p) for p in embedding.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    units.append(Unit([embedding, head] if tied else [head], rest, stays=True))
    return units
