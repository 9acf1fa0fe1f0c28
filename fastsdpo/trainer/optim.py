"""AdamW for bfloat16 weights that does not lose small steps, in few kernels.

A bfloat16 number has 8 bits of precision: at a weight of 0.02 the next value is 0.4% away, while an
AdamW step at learning rate 2e-6 moves it by 0.01%. Rounded to nearest, most weights never move.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer

from fastsdpo.trainer.config import SDPOConfig

logger = logging.getLogger("fastsdpo.trainer")

ADAMW = ("adamw_torch", "adamw_torch_fused")
TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")  # AdamW with states of 8 or 4 bits
NAMES = {"initial_lr": "learning rate"}
PART = 2**24  # weights that take a step together


def choose_update(wanted: str, optim: str, dtypes: set[torch.dtype]) -> str:
    """How steps reach the weights: "plain", "float32_master" or "stochastic_rounding".

    ``wanted="auto"`` takes what loses no steps where the optimizer has it: for bfloat16 weights a
    float32 master with torch's AdamW, stochastic rounding with torchao's, and plain steps else.

    Args:
        wanted: `SDPOConfig.weight_update`.
        optim: the optimizer's name in transformers.
        dtypes: of the trained weights.

    Raises:
        ValueError: the optimizer or the weights cannot take the update asked for.
    """
    if wanted == "auto":
        if torch.bfloat16 not in dtypes or torch.float16 in dtypes:
            return "plain"
        if optim in ADAMW:
            return "float32_master"
        return "stochastic_rounding" if optim in TORCHAO else "plain"
    if wanted == "plain":
        return wanted
    able = {"float32_master": ADAMW, "stochastic_rounding": (*ADAMW, *TORCHAO)}[wanted]
    if optim not in able:
        raise ValueError(
            f"SDPOTrainer: optim must be one of {', '.join(able)} with weight_update={wanted!r}, got {optim!r}"
        )
    other = sorted(str(dtype) for dtype in dtypes - {torch.bfloat16, torch.float32})
    if other:
        raise ValueError(
            f"SDPOTrainer: weight_update={wanted!r} needs bfloat16 or float32 weights, got {', '.join(other)}"
        )
    return wanted


def optimizer_class(args: SDPOConfig, model: nn.Module, given: Any) -> tuple[type, dict[str, Any]] | None:
    """The class and settings of an optimizer that loses no steps; None where transformers chooses.

    Warns where steps will be lost.

    Args:
        given: an optimizer that the caller made, or None.

    Raises:
        ValueError: the optimizer cannot take the ``weight_update`` asked for.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optim, chosen = str(getattr(args.optim, "value", args.optim)), None
    if given is None:
        name = f"optim={optim!r}"
        update = choose_update(args.weight_update, optim, {p.dtype for p in trained})
        if optim in TORCHAO:
            cls, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
            settings["bf16_stochastic_round"] |= update == "stochastic_rounding"
            chosen = seeded(cls, args.seed), settings
        elif update != "plain":
            settings = {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
                "rounding": update,
                "seed": args.seed,
            }
            chosen = AdamWBF16, settings
    else:
        name = f"the optimizer {type(given).__name__}"
        keeps = isinstance(given, AdamWBF16) or getattr(given, "bf16_stochastic_round", False)
        update = args.weight_update if keeps else "plain"
        if args.weight_update not in ("auto", update):
            raise ValueError(
                f"SDPOTrainer: weight_update must be 'auto' or 'plain' with {name}, which was "
                f"given, got {args.weight_update!r}; pass optim instead of optimizers"
            )
    lossy = next((p.dtype for p in trained if p.dtype in (torch.bfloat16, torch.float16)), None)
    if args.weight_update == "auto" and update == "plain" and lossy is not None:
        logger.warning("%s", lost_steps(name, lossy, args.learning_rate))
    return chosen


def check_arguments(args: SDPOConfig, model: nn.Module) -> None:
    """Raises ValueError where ``optim`` does not read a name of ``optim_args``, or not such a value.

    Which names it reads, no list says: transformers is asked for the optimizer with each of them alone, and with a
    value that no argument has.
    """
    if not args.optim_args:
        return
    optim, given = str(getattr(args.optim, "value", args.optim)), args.optim_args
    asked: Any = copy.copy(args)

    def settings(optim_args: str | None) -> Any:
        asked.optim_args = optim_args
        return Trainer.get_optimizer_cls_and_kwargs(asked, model)  # type: ignore[arg-type]

    usual = settings(None)
    for name in (pair.split("=")[0].strip() for pair in given.split(",")):
        try:
            read = settings(f"{name}=?") != usual
        except (ValueError, AttributeError):  # no number, or no name of torch's
            read = True
        if not read:
            raise ValueError(f"SDPOTrainer: optim_args must have names that optim={optim!r} reads, got {name!r}")
    try:
        settings(given)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"SDPOTrainer: optim_args={given!r} cannot be read by optim={optim!r}: {error}") from error


def check_given(optimizer: Any, model: nn.Module) -> None:
    """Looks at an optimizer that the caller made, or None; warns where it leaves weights as they are.

    Raises:
        ValueError: it holds none of the weights that are trained, as one made before the adapter.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    left = sum(p not in held for p in trained)
    if left == len(trained):
        raise ValueError(
            f"SDPOTrainer: optimizers must hold weights that the model trains, got {type(optimizer).__name__} of "
            f"{len(held)} others; make it of the model that is given, or pass optim (SDPOConfig) and no optimizer"
        )
    if left:
        logger.warning("optimizers: %d of %d trained weights are not in it, and stay as they are", left, len(trained))


class OptimizerSettings:
    """The settings of an optimizer, which what a checkpoint holds of it would replace by those of its own run.

    Args:
        groups: those of each group of weights, its learning rate before any schedule among them.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        self.groups = groups

    @classmethod
    def of(cls, scheduler: Any) -> OptimizerSettings:
        """Those behind a schedule; none where it has no rates of its own (DeepSpeed's, one that watches the loss)."""
        if not hasattr(scheduler, "base_lrs"):
            return cls([])
        names = ("weight_decay", "betas", "eps")
        kept = [{name: group[name] for name in names if name in group} for group in scheduler.optimizer.param_groups]
        return cls([{**group, "initial_lr": rate} for group, rate in zip(kept, scheduler.base_lrs)])

    def restore(self, scheduler: Any) -> None:
        """Sets them again, and says which are others than the checkpoint's."""
        changed = {}
        for number, mine in enumerate(self.groups):
            group, before = scheduler.optimizer.param_groups[number], scheduler.base_lrs[number]
            changed |= {name: (group.get(name), value) for name, value in mine.items() if group.get(name) != value}
            if before:
                group["lr"] *= mine["initial_lr"] / before
            group.update(mine)
            scheduler.base_lrs[number], scheduler._last_lr[number] = mine["initial_lr"], group["lr"]
        for name, (before, now) in changed.items():
            logger.info("the checkpoint's %s was %s, training goes on with %s", NAMES.get(name, name), before, now)


def lost_steps(name: str, dtype: torch.dtype, learning_rate: float) -> str:
    """The warning for half-precision weights whose steps are rounded to nearest."""
    share = torch.finfo(dtype).eps / 4  # a smaller step of a weight is less than half its spacing
    still = learning_rate / share
    example = f" At learning rate {learning_rate:g} AdamW moves next to no weight above {still:.2g}."
    return (
        f"{name} trains {str(dtype).removeprefix('torch.')} weights without a float32 copy: a step "
        f"below 1/{1 / share:.0f} of a weight is rounded away.{example if still < 1 else ''} Use "
        "optim='adamw_torch' (float32 master, 16 bytes per weight), with "
        "weight_update='stochastic_rounding' (12 bytes), or optim='adamw_torch_8bit' (stochastic "
        "rounding, 6 bytes, needs the package torchao); weight_update='plain' keeps it as it is"
    )


def seeded(optimizer: type, seed: int) -> type:
    """The optimizer class with random numbers in `step` that depend on the seed and the step alone.

    Processes that hold the same weights then round them alike, and a resumed run as an unbroken one.
    """

    class Seeded(optimizer):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            state = next(iter(self.state.values()), {})
            number = hash((seed, int(state.get("step", 0)))) % 2**63
            device = self.param_groups[0]["params"][0].device
            places = {} if device.type == "cpu" else {"device_type": device.type}
            with torch.random.fork_rng(devices=[device] if places else [], **places):
                torch.default_generator.manual_seed(number)
                if places:
                    torch.get_device_module(device).manual_seed(number)
                return super().step(closure)

    Seeded.__name__ = Seeded.__qualname__ = optimizer.__name__
    return Seeded


class _Part(NamedTuple):
    """A piece of a weight and what its step needs, ``[n]`` each, on this process; all but the weight are float32."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None  # takes the step in place of a weight of half precision


class AdamWBF16(torch.optim.Optimizer):
    """`torch.optim.AdamW` with float32 arithmetic and state for weights of any dtype.

    Torch's fused kernel takes the steps, on parts of `PART` weights: the float32 copies that it needs of gradients
    (and, with stochastic rounding, of weights) are of one part at a time, and a part is a few kernels, however
    many weights of the model lie in it.

    Args:
        rounding: "float32_master" keeps a float32 copy of each half-precision weight, which takes
            the steps; "stochastic_rounding" keeps none and rounds each step up or down with the
            probability that makes it right on average. Float32 weights take their steps as usual.
        seed: of the rounding; the same on all processes, so that their weights stay equal. Under FSDP
            each process rounds its own shard, with numbers of its own.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rounding: str = "float32_master",
        seed: int = 0,
    ):
        if rounding not in ("float32_master", "stochastic_rounding"):
            raise ValueError(
                f"AdamWBF16: rounding must be 'float32_master' or 'stochastic_rounding', got {rounding!r}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.rounding, self.seed = rounding, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            # Weights that one call of the kernel can take: those of a dtype, device and number of steps.
            alike: dict[Any, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kind = parameter.dtype, parameter.grad.dtype, parameter.device, self._count(parameter)
                    alike.setdefault(kind, []).append(parameter)
            for among, ((*_, t), parameters) in enumerate(alike.items()):
                shard = _shard(parameters[0])
                for place, parts in enumerate(_in_parts(self._parts_of(p) for p in parameters)):
                    # A hash of integers: the same everywhere.
                    self._update(group, t, parts, hash((self.seed, number, among, place, t, *shard)) % 2**63)
        return loss

    def _count(self, parameter: Tensor) -> int:
        """Which step of a weight it is, from 1; makes its states at the first."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _contiguous(torch.zeros_like(parameter, dtype=torch.float32))
            if self.rounding == "float32_master" and parameter.dtype != torch.float32:
                state["master"] = _contiguous(parameter.float())
        state["step"] += 1
        return state["step"]

    def _parts_of(self, parameter: Tensor) -> list[_Part]:
        state = self.state[parameter]
        names = "exp_avg", "exp_avg_sq", *(("master",) if "master" in state else ())
        tensors = [_local(t) for t in (parameter.detach(), parameter.grad, *(state[name] for name in names))]
        if all(t.is_contiguous() for t in tensors):
            pieces = zip(*(t.view(-1).split(PART) for t in tensors))
        else:
            pieces = [tensors]  # whole: copies of weight and gradient have their shape, and not their strides
        return [_Part(*piece, *([None] * (5 - len(piece)))) for piece in pieces]

    def _update(self, group: dict[str, Any], t: int, parts: list[_Part], seed: int) -> None:
        """The step ``t`` of parts that are alike."""
        weights = [part.weight for part in parts]
        grads = [part.grad for part in parts]
        copies = None
        stepped = [part.weight if part.master is None else part.master for part in parts]
        if not all(x.dtype == torch.float32 and x.is_contiguous() for x in stepped):
            copies, stepped = _float32_copies(weights)
        if not all(x.dtype == torch.float32 and x.is_contiguous() for x in grads):
            _, grads = _float32_copies(grads)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            stepped,
            grads,
            [part.exp_avg for part in parts],
            [part.exp_avg_sq for part in parts],
            [],
            [torch.full((), float(t), device=grads[0].device)] * len(parts),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        grads = []  # their copies are not needed any more
        if copies is not None and self.rounding == "stochastic_rounding" and weights[0].dtype != torch.float32:
            rounded = stochastic_round(copies, weights[0].dtype, seed)
            stepped = _views(rounded, weights)
        if stepped[0] is not weights[0]:
            torch._foreach_copy_(weights, stepped)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the state stays float32 where the weight is bfloat16."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, parameter in zip(indices, parameters):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    value = value.to(parameter.device, torch.float32, copy=True)
                self.state[parameter][name] = value


def _in_parts(weights: Iterable[list[_Part]]) -> Iterator[list[_Part]]:
    """The parts of all weights, together at most `PART` numbers at a time where none is larger."""
    taken, size = [], 0
    for part in itertools.chain.from_iterable(weights):
        count = part.weight.numel()
        if taken and size + count > PART:
            yield taken
            taken, size = [], 0
        if count:
            taken.append(part)
            size += count
    if taken:
        yield taken


def _float32_copies(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copies of ``tensors``, and the one ``[n]`` in which they all lie."""
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=torch.float32, device=tensors[0].device)
    views = _views(flat, tensors)
    torch._foreach_copy_(views, tensors)
    return flat, views


def _views(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Parts of ``flat``, one after the other, with the shapes of ``tensors``."""
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


def _contiguous(state: Tensor) -> Tensor:
    return state if hasattr(state, "to_local") else state.contiguous()


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; another tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _shard(tensor: Tensor) -> tuple[int, ...]:
    """Where on the mesh of processes this part of a sharded tensor lies; empty for another tensor."""
    mesh = getattr(tensor, "device_mesh", None)
    return () if mesh is None else tuple(mesh.get_coordinate() or ())


def stochastic_round(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """float32 -> bfloat16, up or down with probabilities that make it right on average.

    Adding 16 random bits below the 16 that stay carries into these as often as it should
    (https://arxiv.org/abs/2010.06192).

    Raises:
        TypeError: another dtype: bfloat16 alone is float32 cut short.
    """
    if dtype != torch.bfloat16:
        raise TypeError(f"stochastic_round: dtype must be torch.bfloat16, got {dtype}")
    generator = None if values.is_meta else torch.Generator(values.device).manual_seed(seed)
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=values.device, generator=generator)
    rounded = noise.add_(bits).bitwise_and_(-65536).view(torch.float32)
    # An infinity has no bits below; those of a NaN may carry into its sign.
    return torch.where(values.isnan(), values, rounded).to(dtype)
