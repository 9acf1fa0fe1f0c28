"""The forecast of a run's memory in words: what a step takes, whether it fits a card, and what would make it fit."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastsdpo.trainer.config import SDPOConfig
from fastsdpo.trainer.memory_walk import Forecast, ModelShape, Processes, layers_run_again, walk_step
from fastsdpo.trainer.pack_table import PackTable

ROOM = 0.94  # of a card: the CUDA context, libraries and gaps between tensors take the rest
USEFUL = 0.95  # a change must lower the peak to this share of it to be kept
MOST_PROCESSES = 64
PACKS = ("--max-tokens-per-pack 8192", "--max-tokens-per-pack 4096")
UNITS = {"": 1e9, "GB": 1e9, "GIB": 2**30, "MB": 1e6, "MIB": 2**20}


def parse_size(text: str) -> int:
    """Bytes of "80GB", "80" (GB), "79.1GiB" or "81559MiB".

    Raises:
        ValueError: something else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS or float(found[1]) == 0:
        raise ValueError(f"--card must be a size like 80GB or 79.1GiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e9:.2f} GB"


@dataclass(frozen=True)
class Setting:
    """What a forecast depends on.

    Attributes:
        kind: the type of the device, "cuda" or "cpu".
    """

    shape: ModelShape
    args: SDPOConfig
    processes: Processes
    kind: str

    def walk(self, table: PackTable) -> Forecast:
        packs, accumulated = table.largest(self.args.max_tokens_per_pack)
        return walk_step(
            self.shape, self.args, packs, kind=self.kind, processes=self.processes, accumulated=accumulated
        )

    def changed(self, **settings: Any) -> Setting:
        """With other values in the configuration."""
        args = copy.copy(self.args)
        for name, value in settings.items():
            setattr(args, name, value)
        return replace(self, args=args)


def smaller_settings(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Changes that need less memory, by their flags, those that cost the user least first.

    Each is one change of ``setting``.
    """
    args, shape = setting.args, setting.shape
    if not layers_run_again(args):
        changed = setting.changed(activation_checkpointing=True, gradient_checkpointing=True)
        yield "--gradient-checkpointing", changed
    zero = setting.processes.zero  # takes micro-batches whole
    if not zero and (args.max_tokens_per_pack is None or args.max_tokens_per_pack > 4096):
        for flag in PACKS:
            limit = int(flag.split()[1])
            if args.max_tokens_per_pack is None or args.max_tokens_per_pack > limit:
                yield flag, setting.changed(max_tokens_per_pack=limit)
    if shape.adapter is None and "bit" not in str(getattr(args.optim, "value", args.optim)):
        yield "--set optim=adamw_torch_8bit", setting.changed(optim="adamw_torch_8bit", weight_update="auto")
    if shape.adapter is None:
        yield "--lora 16", replace(setting, shape=replace(shape, adapter=lora_adapter(16)))


def lora_adapter(rank: int, alpha: int | None = None) -> Any:
    """`peft.LoraConfig` as ``--lora`` makes it.

    Raises:
        ImportError: peft is not installed.
    """
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def describe_forecast(setting: Setting, forecast: Forecast) -> str:
    """One line: the peak and its parts."""
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in forecast.parts.items() if size >= 1e-3 * 1e9)
    parts = parts or ", ".join(f"{name} {gigabytes(size)}" for name, size in forecast.parts.items() if size)
    count, strategy, parts_of = setting.processes.count, setting.processes.strategy, setting.args.ulysses
    named = strategy if parts_of == 1 else f"{strategy}, --ulysses {parts_of}"
    where = f"each of {count} processes ({named})" if count > 1 or setting.processes.zero else "the process"
    where += " on a CPU" if setting.kind == "cpu" else ""
    held = f", its share of the weights among {count}" if count > 1 and strategy in ("fsdp", "zero3") else ""
    held += f", its share of a pack's tokens among {parts_of}" if parts_of > 1 else ""
    return f"memory of {where}: {gigabytes(forecast.peak)} at the peak of a step ({parts}{held})"


def memory_lines(setting: Setting, table: PackTable, card: int | None) -> Iterator[str]:
    """The forecast in words, a line at a time: the walks behind it take seconds.

    Args:
        card: bytes of the card's memory; None: it is compared with none.
    """
    try:
        forecast = setting.walk(table)
    except (NotImplementedError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        yield f"memory: no forecast, a step without values cannot be taken here: {reason}"
        return
    yield describe_forecast(setting, forecast)
    if card is None:
        if setting.kind == "cpu":
            yield "for a GPU: --card with its memory, such as --card 80GB"
        return
    room = ROOM * card
    if forecast.peak <= room:
        yield f"it fits a card of {gigabytes(card)}, of which {gigabytes(room)} are counted as usable"
        return
    yield f"WARNING: it does not fit a card of {gigabytes(card)}, of which {gigabytes(room)} are counted as usable"
    yield from _search(setting, table, forecast, room)


def _search(setting: Setting, table: PackTable, forecast: Forecast, room: float) -> Iterator[str]:
    """Takes up one change after the other that helps, until the step fits; each is walked."""
    flags: list[str] = []
    tried: set[str] = set()
    while change := next(((flag, new) for flag, new in smaller_settings(setting) if flag not in tried), None):
        flag, other = change
        tried.add(flag)
        found = other.walk(table)
        said = " ".join([*flags, flag])
        if found.peak <= room:
            yield f"  {said}: {gigabytes(found.peak)}, fits"
            return
        helps = found.peak < USEFUL * forecast.peak
        if flag == PACKS[0] and not helps:
            tried.add(PACKS[1])
        yield f"  {said}: {gigabytes(found.peak)}" + ("" if helps else ", next to nothing less: left out")
        if helps:
            flags.append(flag)
            if flag == PACKS[1]:
                flags = [f for f in flags if f != PACKS[0]]
            setting, forecast = other, found
    count = setting.processes.count
    strategy = setting.processes.strategy if setting.processes.zero == 3 else "fsdp"
    if setting.processes.strategy == strategy:
        count = max(2, 2 * count)
    least = (forecast.parts["weights"] + forecast.parts["optimizer"]) * setting.processes.count / room
    while count < max(2, least):
        count *= 2
    while count <= MOST_PROCESSES:
        other = replace(setting, processes=setting.processes._replace(count=count, strategy=strategy))
        found = other.walk(table)
        said = " ".join([*flags, f"--processes {count} --strategy {strategy}"])
        fits = found.peak <= room
        yield f"  {said}: {gigabytes(found.peak)}" + (", fits" if fits else "")
        if fits:
            return
        count *= 2
    yield f"  nothing that was tried fits, up to {MOST_PROCESSES} processes"


def card_of(device: torch.device) -> int | None:
    """Bytes of memory of a GPU of this machine; None for another device."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
