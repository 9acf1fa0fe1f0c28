"""TRL's trainers that distil, beside `SDPOTrainer`: ``compute_loss`` and the backward pass of one micro-batch.

`bench_trl --trainers` times them, patched and not. Teachers of GKD, GOLD, IW-OPD and Distillation are models, SDFT's
is the student behind another prompt; those of Server and Async are log-probs that are there already (no request is in
the time). ``Async`` is the loss from the student's hidden states, without its forward pass. Of GKD and GOLD each row
also has, under bfloat16 autocast, how far the loss is from the float64 loss of the same hidden states and heads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from benchmarks import harness
from benchmarks.conversations import random_llama
from fastsdpo.integrations.trl import patch_trl
from fastsdpo.prefix import run_inside
from fastsdpo.testing import classes_divergence

BETAS = {"forward": 0.0, "jsd": 0.5, "reverse": 1.0}
SOURCES: tuple[Literal["hidden", "logits"], ...] = ("hidden", "logits")
Batch = dict[str, Tensor]
Runs = dict[str, Callable[[], Tensor]]


class Step(NamedTuple):
    """A loss of a trainer: ``run`` is a forward and backward pass, ``model`` what has its gradients."""

    mode: str
    run: Callable[[], Tensor]
    model: nn.Module
    sources: tuple[Literal["hidden", "logits"], ...] = SOURCES
    exact: Callable[[], float] | None = None


def rivals(step: Callable[[], Tensor], sources: tuple[Literal["hidden", "logits"], ...] = SOURCES) -> Runs:
    """TRL as it is, and patched."""

    def patched(source: Literal["hidden", "logits"]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with patch_trl(source):
                return step()

        return run

    return {"TRL": step, **{source: patched(source) for source in sources}}


def bench(name: str, args: Any, folder: str, batch: Batch) -> list[harness.Row]:
    rows = []
    tokens = int(batch["completion_mask"].sum())
    size = {"tokens": tokens, "vocabulary": args.vocabulary, "hidden": args.hidden, "layers": args.layers}
    for step in STEPS[name](name, args, folder, batch):
        runs, extra = rivals(step.run, step.sources), {}
        if step.exact is not None:
            exact, errors = step.exact(), {}
            for rival, run in runs.items():
                with torch.autocast("cpu", torch.bfloat16):
                    errors[rival] = abs(run().item() / exact - 1)
            extra = {"bfloat16_exact_loss": exact, "bfloat16_relative_error": errors}
        case = {"trainer": name, "mode": step.mode, **size}
        rows.append(harness.compare(case, runs, args, prepare=step.model.zero_grad, **extra))
    return rows


def backward(trainer: Any, batch: Batch) -> Callable[[], Tensor]:
    def run() -> Tensor:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss.detach()

    return run


def make_tokenizer() -> PreTrainedTokenizerFast:
    symbols = {token: number for number, token in enumerate(["<pad>", "<end>", *"word"])}
    backend = Tokenizer(models.BPE(symbols, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def make(name: str, args: Any, folder: str, options: dict[str, Any], teacher: nn.Module | None = None) -> Any:
    """A trainer of ``trl.experimental`` (or `trl`) in evaluation mode: no dropout, and its loss is not scaled."""
    module = {"Distillation": "trl", "IWOPD": "trl.experimental.iw_opd"}.get(name, f"trl.experimental.{name.lower()}")
    module = "trl.experimental.server_distillation" if name == "ServerDistillation" else module
    found = importlib.import_module(module)
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "word"}, {"role": "assistant", "content": "word"}]
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    columns = {"messages": messages, "prompt": "word", "privileged_context": "word"}
    wanted = {"SDFT": ("prompt", "privileged_context"), "Distillation": ("prompt",), "ServerDistillation": ("prompt",)}
    model = random_llama(args.vocabulary, args.hidden, args.layers)
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for one in (model, teacher):
        if one is not None:
            one.config._name_or_path = folder  # IW-OPD looks tokenizers up by their names
    trainer = getattr(found, f"{name}Trainer")(
        model=model,
        **({} if teacher is None else {"teacher_model": teacher}),
        args=getattr(found, f"{name}Config")(output_dir=folder, **settings, **options),
        train_dataset=Dataset.from_dict({key: [columns[key]] * 4 for key in wanted.get(name, ("messages",))}),
        processing_class=tokenizer,
    )
    trainer.model.eval()
    return trainer


def make_teacher(args: Any) -> nn.Module:
    teacher = random_llama(args.vocabulary, args.hidden, args.layers)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.2 * weight.std() * torch.randn_like(weight))
    return teacher


def sequences_of(batch: Batch) -> Batch:
    """Prompts and completions as some of the trainers take them."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : batch["prompt_ids"].shape[1]] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def exact_loss(trainer: Any, batch: Batch) -> float:
    """float64, of the hidden states that the models give under bfloat16 autocast."""
    # GKD samples at its temperature, GOLD divides the logits by it too.
    temperature = trainer.temperature if type(trainer).__name__ == "GOLDTrainer" else 1.0
    states, counts = [], batch["labels"][:, 1:] != -100
    for model in (trainer.model, trainer.teacher_model):
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = run_inside(model, lambda hidden: hidden, given)[:, :-1][counts]
        weight = model.get_output_embeddings().weight.detach()
        states.append((hidden.double() @ weight.double().T / temperature).log_softmax(-1))
    return classes_divergence(states[0], states[1], trainer.beta).mean().item()


# ------------------------------------------------------------------------------------ the steps of each


def generalized(name: str, args: Any, folder: str, batch: Batch) -> Iterator[Step]:
    """GKD, GOLD and Distillation: a divergence of two models by ``beta``."""
    trainer = make(name, args, folder, {}, make_teacher(args))
    given = batch if name == "Distillation" else sequences_of(batch)
    for mode, beta in BETAS.items():

        def run(beta: float = beta) -> Tensor:
            trainer.beta = beta
            return backward(trainer, given)()

        def exact(beta: float = beta) -> float:
            trainer.beta = beta
            return exact_loss(trainer, given)

        if name == "Distillation":  # always from hidden states
            yield Step(mode, run, trainer.model, ("hidden",))
        else:
            yield Step(mode, run, trainer.model, exact=exact)


def sdft(name: str, args: Any, folder: str, batch: Batch) -> Iterator[Step]:
    for mode, options in {
        "jsd": {"distillation_mode": "full_logits", "distillation_alpha": 0.5},
        "topk": {"distillation_mode": "topk_logits", "distillation_topk": min(100, args.vocabulary // 4)},
    }.items():
        trainer = make(name, args, folder, {**options, "teacher_model_kind": "live"})
        yield Step(mode, backward(trainer, batch), trainer.model)


def iw_opd(name: str, args: Any, folder: str, batch: Batch) -> Iterator[Step]:
    for mode, options in {
        "iw_opd": {},
        "jsd": {"distillation_objective": "jsd", "beta": 0.5, "loss_top_k": 0},
        "top-k jsd": {"distillation_objective": "jsd", "beta": 0.5, "loss_top_k": min(100, args.vocabulary // 4)},
    }.items():
        trainer = make("IWOPD", args, folder, options, make_teacher(args))
        yield Step(mode, backward(trainer, sequences_of(batch)), trainer.model)


class Answers:
    """TRL's client of a teacher's server: log-probs that are drawn once."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary
        self.found: dict[str, Any] = {}

    def get_sequence_logprobs(
        self, sequences: Any, prompt_lengths: Any, top_logprobs: int, **_: Any
    ) -> dict[str, Any]:
        if not self.found:
            lengths = [len(ids) - n for ids, n in zip(sequences, prompt_lengths)]
            logps = [(torch.randn(n, top_logprobs) - 9).sort(-1, descending=True).values for n in lengths]
            self.found = {
                "logprobs": [one.tolist() for one in logps],
                "actual_logprobs": [one[:, -1:].tolist() for one in logps],
                "logprob_token_ids": [
                    [torch.randperm(self.vocabulary)[:top_logprobs].tolist() for _ in range(n)] for n in lengths
                ],
            }
        return self.found


def server(name: str, args: Any, folder: str, batch: Batch) -> Iterator[Step]:
    for mode, options in {"top-20, forward": {"beta": 0.0, "loss_top_k": 20}, "top-1, jsd": {"beta": 0.5}}.items():
        options = {**options, "teacher_model_server_url": "http://127.0.0.1:1"}
        with (
            mock.patch("trl.generation.vllm_client.is_vllm_available", return_value=True),
            mock.patch("trl.generation.vllm_client.VLLMClient", return_value=Answers(args.vocabulary)),
        ):
            trainer = make("ServerDistillation", args, folder, options)
        yield Step(mode, backward(trainer, batch), trainer.model)


def asynchronous(name: str, args: Any, folder: str, batch: Batch) -> Iterator[Step]:
    """TRL's function, which its trainer calls with the student's hidden states."""
    module = importlib.import_module("trl.experimental.async_distillation.async_distillation_trainer")
    tokens = int(batch["completion_mask"].sum())
    head = nn.Linear(args.hidden, args.vocabulary, bias=False)
    hidden = torch.randn(tokens, args.hidden, requires_grad=True)
    shape = tokens, min(20, args.vocabulary // 4)
    given = {
        "lm_head_bias": None,
        "logit_scale": 1.0,
        "final_logit_softcapping": None,
        "target_ids": torch.stack([torch.randperm(args.vocabulary)[: shape[1]] for _ in range(tokens)]),
        "teacher_target_logps": torch.randn(shape) - 9,
        "valid_candidate_mask": torch.ones(shape, dtype=torch.bool),
        "temperature": 1.0,
        "add_tail_bucket": True,
        "teacher_id_idx": None,
        "num_teachers": 1,
        "chunk_size": module._CHUNKED_LM_HEAD_CHUNK_SIZE,
    }
    for mode, beta in BETAS.items():

        def run(beta: float = beta) -> Tensor:
            loss = module._chunked_jsd_loss(hidden_valid=hidden, lm_head_weight=head.weight, beta=beta, **given)[0]
            loss = loss / tokens
            loss.backward()
            return loss.detach()

        yield Step(f"top-{shape[1]} and tail, {mode}", run, SimpleNamespace(zero_grad=head.zero_grad), ("hidden",))


STEPS: dict[str, Callable[[str, Any, str, Batch], Iterator[Step]]] = {
    **dict.fromkeys(("GKD", "GOLD", "Distillation"), generalized),
    "SDFT": sdft,
    "IW-OPD": iw_opd,
    "Server": server,
    "Async": asynchronous,
}
