"""The parts of `benchmarks.run_gpu` that need a model: shared attention, and an optimizer step.

Models are of random weights, built from configurations here: nothing is downloaded.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import costmodel
from benchmarks.counted import conversation, count_step
from benchmarks.gpu_machine import LeftOut, Machine, Row, cell, peaks
from benchmarks.lengths import attention_pairs
from fastsdpo import TokenizedInteraction, shared_forward
from fastsdpo.prefix import count_tokens, pack_conversations
from fastsdpo.prefix.attention import BACKENDS, BackendError
from fastsdpo.timing import peak_memory

# Qwen3-0.6B's shape; a rehearsal's.
QWEN3: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
SMALL = {
    **QWEN3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def make_model(machine: Machine, **changes: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {**(SMALL if machine.rehearsal else QWEN3), **changes}
    with torch.device(machine.device):
        return Qwen3ForCausalLM(Qwen3Config(**shape)).to(machine.dtype)


def drawn(machine: Machine, vocabulary: int) -> list[TokenizedInteraction]:
    """A conversation of a size for this machine."""
    return conversation(*((3, 12, 20, 6) if machine.rehearsal else (12, 128, 256, 64)), vocabulary)


# ------------------------------------------------------------------------------------- attention


def attention(machine: Machine) -> Iterator[Row]:
    """Hidden states of student and teacher, forward and backward, by attention backend.

    Deviations are from separate passes in a wider dtype, relative to their norm: of the hidden states of
    both, and of all gradients of the weights together. A backend fails where one is more than three times
    that of separate passes in the same dtype.
    """
    model = make_model(machine, num_hidden_layers=2 if machine.rehearsal else 4, vocab_size=512)
    items = drawn(machine, 512)
    rows = sum(len(item.completion_ids) for item in items)
    # The sum of a normed vector's squares is constant: any other function has a gradient.
    direction = torch.randn(rows, model.config.hidden_size, device=machine.device)

    def forward(sharing: Any, backend: str) -> Any:
        return shared_forward(model, items, sharing=sharing, attention=backend)

    def both(sharing: Any, backend: str) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        states = forward(sharing, backend)
        (states.student_hidden.to(direction.dtype) * direction).sum().backward()
        return states.student_hidden.detach(), states.teacher_hidden

    def values(sharing: str, backend: str = "auto") -> list[Tensor]:
        hidden = both(sharing, backend)
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return [tensor.double() for tensor in (*hidden, torch.cat(gradients))]

    wide = torch.float32 if machine.gpu else torch.float64
    model.to(wide)
    direction = direction.to(wide)
    exact = values("off")
    model.to(machine.dtype)

    def measure(sharing: Any, backend: str, limits: dict[str, float]) -> Row:
        try:
            got = values(sharing, backend)
        except BackendError as error:
            raise LeftOut(str(error)) from error
        deviations = {
            f"{name}_deviation": float((a - b).norm() / b.norm())
            for name, a, b in zip(("student", "teacher", "gradient"), got, exact)
        }
        for name, limit in limits.items():
            if not deviations[name] <= limit:
                raise AssertionError(f"{name} is {deviations[name]:.2g}, allowed is {limit:.2g}")
        with torch.no_grad():
            first = machine.time(lambda: forward(sharing, backend), repeats=3, queued=False)
        whole = machine.time(lambda: both(sharing, backend), repeats=3, queued=False)
        return {
            "tokens": sum(count_tokens(items, sharing=sharing)[:2]),
            "forward_ms": first["ms"],
            **whole,
            **deviations,
        }

    separate = cell({"attention": "separate passes"}, measure, "off", "auto", {})
    yield separate
    rounding = 4 * torch.finfo(machine.dtype).eps
    limits = {key: 3 * value + rounding for key, value in separate.items() if key.endswith("_deviation")}
    for backend in sorted(BACKENDS, key=lambda name: name == "flex"):  # it compiles for a minute
        yield cell({"attention": backend}, measure, "conversation", backend, limits)


# ------------------------------------------------------------------------------------------ step


def step(machine: Machine) -> Iterator[Row]:
    """`SDPOTrainer`: loss, gradients and update of one conversation, prefixes shared and not.

    Peaks are above weights and optimizer states, whose size is known. The cost model's times are from this
    device's measured rates.
    """
    ceilings = machine.ceilings()
    choices = [("conversation", "auto"), ("off", "auto")]
    if machine.gpu:
        choices.append(("conversation", "segments"))
    for sharing, backend in choices:
        row = {"sharing": sharing, "attention": backend}
        yield cell(row, one_step, machine, ceilings, sharing, backend)


def one_step(machine: Machine, ceilings: costmodel.GPU, sharing: Any, backend: str) -> Row:
    from fastsdpo import SDPOConfig, SDPOTrainer

    model = make_model(machine)
    items = drawn(machine, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        args = SDPOConfig(
            output_dir=folder,
            use_cpu=not machine.gpu,
            report_to=[],
            save_strategy="no",
            teacher_check=0,
            disable_tqdm=True,
            optim="adamw_torch",
            sharing=sharing,
            attention=backend,
            per_device_train_batch_size=len(items),
        )
        trainer = SDPOTrainer(model, args, items)
        trainer.create_optimizer()
        model.train()

        batch: dict[str, Any] = {"interactions": items}
        trainer.learner.ready(batch, args.device)
        items_of_the_step = torch.tensor(len(items), device=args.device)

        def run() -> None:
            trainer.training_step(trainer.model, batch, items_of_the_step)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        found = machine.time(run, repeats=3, queued=False)
        measured = peak_memory(run, machine.device)
        found |= waits(machine, run)
    costs, memory = predicted(machine, model, items, args)
    return {
        "tokens": sum(count_tokens(items, sharing=sharing)[:2]),
        **found,
        "model_ms": 1e3 * costmodel.step_seconds(costs, ceilings),
        **(counts_of_a_gpu(model, items, ceilings) if (sharing, backend) == ("conversation", "auto") else {}),
        **peaks(measured, memory),
    }


def waits(machine: Machine, run: Callable[[], None]) -> Row:
    """How often the host waits for the GPU in a run; the optimizer step's own included."""
    if not machine.gpu:
        return {}
    run()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"waits": sum("synchroniz" in str(one.message) for one in told)}


def counts_of_a_gpu(model: nn.Module, items: list[TokenizedInteraction], ceilings: costmodel.GPU) -> Row:
    """The step counted operator by operator (`benchmarks.counted`), in bfloat16 with the backend flash."""
    counted = count_step(model.config, items)
    return {
        "counted_ms": 1e3 * counted.step_seconds(ceilings),
        "counted_kernels": sum(len(kernels) for kernels in counted.parts.values()),
        "counted_copies": counted.copies,
        "counted_peak_mb": counted.memory / 1e6,
    }


def predicted(
    machine: Machine, model: nn.Module, items: list[TokenizedInteraction], args: Any
) -> tuple[dict[str, costmodel.Cost], float]:
    """The cost model's work of a step, and its peak above weights and optimizer states in bytes."""
    shape = costmodel.Model.from_config(model.config)
    counts = count_tokens(items, sharing=args.sharing)
    pairs = attention_pairs([items], args.sharing)
    responses = sum(len(item.completion_ids) for item in items)
    packs = pack_conversations(items, [range(len(items))], max_tokens=args.max_tokens_per_pack, sharing=args.sharing)
    element = machine.element
    # bfloat16 weights have a float32 master and float32 states.
    costs, memory = costmodel.step(
        shape,
        costmodel.Tokens(counts.student, counts.teacher, *pairs, responses),
        mode="reverse_kl",
        element=element,
        checkpointing=False,
        weight=element,
        state=12 if element == 2 else 8,
        micro_batches=len(packs),
    )
    gradients = float(shape.parameters * element)
    return costs, gradients + memory["activations"] + memory["loss"]
