"""A training step counted operator by operator on tensors without memory, and its time on a GPU from the counts.

    python -m benchmarks.counted

Model, passes and optimizer are those of a run, in bfloat16, on the device ``meta``: every operator that is not a
view is a kernel, which reads its arguments and writes its results once, and products have their FLOPs. Attention is
torch's varlen kernel, as often as the plan calls it, over the pairs that the plan lets see each other. The loss is
the cost model's (`benchmarks.costmodel.LinearLoss`), memory is `fastsdpo.trainer.memory_walk`'s.

What this says about a GPU is a **prediction**. It assumes the data sheet's peaks and the shares of them in
`costmodel.GPU` (products 0.70, attention 0.50, bandwidth 0.85), 4 us for a kernel at least, and that the host needs
`HOST` for an operator: where it needs longer than the device, the device waits. `benchmarks.run_gpu` measures the
same step where there is a GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.costmodel import GPU, GPUS, Cost, LinearLoss, Tokens, seconds
from fastsdpo import TokenizedInteraction
from fastsdpo.prefix import ForwardSession, ready_passes
from fastsdpo.prefix.attention.flex import visible_pairs
from fastsdpo.timing import markdown_table
from fastsdpo.trainer import SDPOConfig
from fastsdpo.trainer.memory_walk import ModelShape, walk_step
from fastsdpo.trainer.optim import AdamWBF16

HOST = 6e-6  # seconds of Python and dispatch for an operator in eager PyTorch; an assumption
VARLEN = {"_varlen_attn": 1.0, "_varlen_attn_backward": 2.5}  # products of attention, over those of its forward
GATHERS = {"embedding", "index", "index_select", "gather"}  # read as much as they write
WRITES = {"_foreach_copy_", "copy_", "fill_", "zero_"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class Counter(TorchDispatchMode):
    """Kernels of a step by its part, each with its FLOPs and bytes.

    Attributes:
        part: to which the next kernels belong.
        kernels: ``(part, operator's name, cost)`` in order.
        copies: operators with tensors on both sides, the CPU and the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.kernels: list[tuple[str, str, Cost]] = []
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if {"cpu", "meta"} <= {x.device.type for x in (*given, *made) if x.dim()}:
            self.copies += 1
        storages = {x.untyped_storage()._cdata for x in given}
        written = [x for x in made if x.untyped_storage()._cdata not in storages]
        changed = [
            x
            for argument, value in zip(func._schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tree_leaves(value)
            if isinstance(x, torch.Tensor)
        ]
        if not (written or changed) or name.startswith(("empty", "new_empty", "_record_function", "detach")):
            return out  # a view, or memory alone
        moved = sum(map(_bytes, (*given, *written, *changed)))
        if name in WRITES:  # what is there is not read
            moved -= sum(map(_bytes, changed))
        if name in GATHERS:
            moved = 2 * sum(map(_bytes, written))
        flops = 0.0
        if name in PRODUCTS:
            flops = float(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out))
        self.kernels.append((self.part, name, Cost(flops, moved, 1)))
        return out


def _bytes(tensor: torch.Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


@dataclass(frozen=True)
class Counted:
    """One optimizer step over a pack.

    Attributes:
        parts: kernels of each part, with the products of attention in them.
        attention: how many varlen kernels a layer runs: student's forward, teacher's, backward.
        copies: to the device, of the whole pack.
        waits_between: copies and operators between the passes that the host would wait for.
        memory: bytes at the peak.
        tokens_and_pairs: what goes through the decoder.
    """

    parts: dict[str, list[tuple[str, Cost]]]
    attention: tuple[int, int, int]
    copies: int
    waits_between: int
    memory: float
    tokens_and_pairs: Tokens

    def seconds(self, gpu: GPU) -> dict[str, tuple[float, float]]:
        """Of each part on the device, and of the host that feeds it."""
        return {
            part: (
                sum(seconds(cost, gpu, gpu.attention if name in VARLEN else None) for name, cost in kernels),
                HOST * sum(cost.launches for _, cost in kernels),
            )
            for part, kernels in self.parts.items()
        }

    def step_seconds(self, gpu: GPU) -> float:
        return sum(max(both) for both in self.seconds(gpu).values())


def count_step(config: Any, pack: Sequence[TokenizedInteraction], *, checkpointing: bool = False) -> Counted:
    """Counts the step of a run on a GPU: live teacher, shared prefixes, bfloat16 weights with a float32 master."""
    shape = ModelShape(config, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        args = SDPOConfig(output_dir=folder, use_cpu=True, report_to=[], max_tokens_per_pack=None)
    model: Any = shape.make()
    if checkpointing:
        new = hasattr(args, "activation_checkpointing")
        setattr(args, "activation_checkpointing" if new else "gradient_checkpointing", True)
        enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    ready = ready_passes(pack, sharing="conversation", live=True, backend="flash", windows=(None,))
    counter = Counter()
    with counter:
        counter.part = "copy of the pack"
        ready = ready.to(torch.device("meta"))
    copies, counter.copies = counter.copies, 0
    _passes(model, pack, ready, counter)
    between = counter.copies
    optimizer = AdamWBF16([p for p in model.parameters() if p.requires_grad])
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    counter.part = "optimizer"
    with counter:
        optimizer.step()
    plan = ready.plan
    assert plan is not None
    layers, width = config.num_hidden_layers, 4.0 * config.num_attention_heads * config.head_dim
    sides = (("student forward", 0, plan.student_tokens), ("teacher forward", plan.student_tokens, plan.tokens))
    calls, parts, pairs = {}, {}, {}
    for part, first, stop in sides:
        runs = [run for run in plan.runs if first <= run.start < stop]
        pairs[part] = float(visible_pairs(runs, first, stop - first, stop, None).sum())
    pairs["backward"] = pairs["student forward"]
    for part in dict.fromkeys(part for part, *_ in counter.kernels):
        kernels = [(name, cost) for where, name, cost in counter.kernels if where == part]
        parts[part] = _with_attention(kernels, pairs.get(part, 0.0) * width * layers)
        name = "_varlen_attn_backward" if part == "backward" else "_varlen_attn"
        calls[part] = sum(other == name for other, _ in kernels) // layers
    rows = sum(len(item.completion_ids) for item in pack)
    loss = LinearLoss(rows, config.vocab_size, config.hidden_size).parts("reverse_kl")
    parts["loss"] = [(name, cost) for name, cost in loss.items()]
    memory = walk_step(shape, args, [pack], accumulated=False).peak
    attention = calls["student forward"], calls["teacher forward"], calls["backward"]
    sizes = plan.student_tokens, plan.teacher_tokens, pairs["student forward"], pairs["teacher forward"], rows
    return Counted(parts, attention, copies, between, memory, Tokens(*sizes))


def _passes(model: nn.Module, pack: Any, ready: Any, counter: Counter) -> None:
    """Student, teacher and backward, with a sum in place of the loss."""

    def body(session: ForwardSession) -> torch.Tensor:
        student = session.student()
        counter.part = "teacher forward"
        session.teacher()
        return student.sum()

    with counter:
        counter.part = "student forward"
        session = ForwardSession(model, pack, ready=ready, attention="flash")
        hidden = session.run(body)
        counter.part = "backward"
        hidden.backward()


def _with_attention(kernels: list[tuple[str, Cost]], forward: float) -> list[tuple[str, Cost]]:
    """The attention's FLOPs, ``forward`` of a forward pass, spread over the kernels that share them."""
    found = []
    for name, cost in kernels:
        if name in VARLEN:
            share = forward * VARLEN[name] / sum(other == name for other, _ in kernels)
            cost = Cost(share, cost.bytes, cost.launches)
        found.append((name, cost))
    return found


QWEN3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}


def conversation(turns: int, message: int, answer: int, followup: int, vocabulary: int) -> list[TokenizedInteraction]:
    """A conversation: every interaction's history is the one before with its answer and a message."""
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=draw).tolist()

    history, found = [], []
    for _ in range(turns):
        prompt, completion = history + ids(message), ids(answer)
        found.append(TokenizedInteraction(prompt, prompt + ids(followup), completion, conversation_id="c"))
        history = prompt + completion
    return found


def table(counted: Counted, gpu: GPU) -> str:
    """Kernels, arithmetic, bytes and predicted milliseconds of a step by part."""
    lines = []
    for part, (device, host) in counted.seconds(gpu).items():
        whole = [sum(values) for values in zip(*(cost for _, cost in counted.parts[part]))]
        figures = f"{whole[2]:,.0f}", f"{whole[0] / 1e12:.1f}", f"{whole[1] / 1e9:.1f}"
        lines.append([part, *figures, f"{1e3 * device:.1f}", f"{1e3 * host:.1f}"])
    header = ["part", "kernels", "TFLOP", "GB moved", "device ms", "host ms"]
    return markdown_table(header, lines)


def main() -> None:
    from transformers import Qwen3Config

    pack = conversation(24, 96, 192, 48, 151936)
    print(f"{(__doc__ or '').strip()}\n")
    counted = count_step(Qwen3Config(**QWEN3_8B), pack, checkpointing=True)
    room = "" if counted.memory <= GPUS[0].memory else ", which it does not have: FSDP has to shard them"
    students, teachers, backward = counted.attention
    tokens = counted.tokens_and_pairs.student + counted.tokens_and_pairs.teacher
    print(
        f"Qwen3-8B, a conversation of 24 interactions, {tokens:,} tokens, gradient checkpointing, on one "
        f"{GPUS[0].name}: {1e3 * counted.step_seconds(GPUS[0]):.0f} ms a step, "
        f"peak {counted.memory / 1e9:.0f} GB{room}.\n"
        f"Attention kernels of a layer: student {students}, teacher {teachers}, backward {backward}. Copies to the "
        f"device: {counted.copies} before the step, {counted.waits_between} in it.\n"
    )
    print(table(counted, GPUS[0]))


if __name__ == "__main__":
    main()
