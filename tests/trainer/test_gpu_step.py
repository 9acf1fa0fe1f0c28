"""What a step asks of a GPU, counted without one: copies, waits, attention kernels, and which backend runs."""

import logging
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config

from fastsdpo.data import TokenizedInteraction
from fastsdpo.ops.linear import meta_stands_for
from fastsdpo.prefix.attention import flash_calls
from fastsdpo.trainer import SDPOConfig
from fastsdpo.trainer.learner import Learner
from fastsdpo.trainer.memory_walk import ModelShape
from fastsdpo.trainer.packs import ReadyPack
from fastsdpo.trainer.sharing import PrefixSharing

# Operators whose result, or its size, the host has to know.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}


class Device(TorchDispatchMode):
    """Counts copies from the CPU to ``meta``, which stands for a GPU, operators that wait for it, and kernels."""

    def __init__(self):
        super().__init__()
        self.copies, self.waits, self.kernels = [], [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        if name in WAITS or (name in ("index", "index_put", "index_put_") and masks):
            frames = [f.filename for f in traceback.extract_stack() if "fastsdpo" in f.filename]
            if not any("fastsdpo/ops" in frame for frame in frames):  # whose CPU paths check values
                self.waits.append((name, frames[-2:]))
        out = func(*args, **(kwargs or {}))
        # A single number from the CPU goes to a kernel as an argument.
        kinds = {x.device.type for x in (*given, *tree_leaves(out)) if isinstance(x, torch.Tensor) and x.dim()}
        if {"cpu", "meta"} <= kinds:
            self.copies.append(name)
        self.kernels[name] = self.kernels.get(name, 0) + 1
        return out


def nested(turns, seed=0):
    """One conversation; the templates of models that think render an answer in the history in another way."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(10, 200, (count,), generator=draw).tolist()

    history, items = [1], []
    for turn in range(turns):
        prompt, answer = [*history, *ids(9), 2, 3], ids(12)
        hindsight = ids(5) if turn else []  # the first one's teacher is the student
        items.append(TokenizedInteraction(prompt, [*prompt, *hindsight], [*answer, 4], str(turn), "one"))
        history = [*prompt[:-1], *answer, 4]
    return items


def on_meta(tmp_path, **settings):
    """A learner as on a GPU: bfloat16 weights, the flash backend."""
    head = dict(head_dim=16, num_attention_heads=4, num_key_value_heads=2)
    config = Qwen3Config(vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=3, **head)
    args = SDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], attention="flash", **settings)
    model = ModelShape(config, torch.bfloat16).make()
    sharing = PrefixSharing(model, args, None, (), one_pass=False)
    return model, Learner(model, args, sharing, unwrapped=lambda: model, sharded=None)


@pytest.mark.parametrize("settings", [{}, {"teacher": "ema"}, {"mode": "sampled_token"}, {"mode": "topk", "topk": 8}])
def test_a_step_copies_once_and_waits_for_nothing(tmp_path, settings):
    model, learner = on_meta(tmp_path, **settings)
    pack = learner.maker.pack(nested(6))
    with Device() as before:
        ready = pack.to("meta")
        plan = ready.content.passes.plan
    assert before.copies == ["_to_copy"] and plan.token_ids.is_meta
    with Device() as step, meta_stands_for("cuda", None):
        loss, _ = learner.run_pass(model, ready, torch.ones((), device="meta"))
        loss.backward()
    assert (step.copies, step.waits) == ([], [])
    assert all(p.grad is not None for p in model.parameters())

    # Attention: a few kernels for each layer and pass, and keys that lie where the model has put them.
    first, other = pack.content.passes.plan, pack.content.passes.teacher_plan
    runs = [run for run in first.runs if run.start < first.student_tokens]
    students = len(flash_calls(runs, 0))
    if other is None:
        teachers = len(flash_calls(first.runs[len(runs) :], first.student_tokens))
    else:
        teachers = len(flash_calls(other.runs, 0))
    assert students + teachers <= 12
    assert step.kernels["_varlen_attn"] == 3 * (students + teachers)
    assert step.kernels["_varlen_attn_backward"] == 3 * students


@pytest.mark.parametrize("settings", [{}, {"teacher": "ema", "max_tokens_per_pack": 150}])
def test_the_trainers_step_waits_for_nothing(tmp_path, lab, settings):
    """The whole training step, metrics included, after the batch is ready. (Losses: tests/ops.)"""
    made = lab.make_trainer(tmp_path, **settings)
    batch = next(iter(made.get_train_dataloader()))
    assert all(isinstance(pack, ReadyPack) for pack in batch["packs"])
    made.create_optimizer()
    items = torch.tensor(made.learner.count(batch["interactions"]))
    with Device() as step:
        made.training_step(made.model, batch, items)
    assert step.waits == []


def test_workers_make_the_same_packs(tmp_path, lab):
    found = []
    for workers in (0, 2):
        made = lab.make_trainer(tmp_path, max_steps=3, dataloader_num_workers=workers, max_tokens_per_pack=200)
        made.train()
        found.append(lab.losses_of(made))
    assert len(found[0]) == 3 and found[0] == found[1]


def like_a_gpu(monkeypatch, *backends):
    monkeypatch.setattr("fastsdpo.trainer.sharing.automatic_backends", lambda device: backends)
    monkeypatch.setattr("fastsdpo.prefix.attention.interface.automatic_backends", lambda device: backends)


@pytest.mark.parametrize("bf16", [False, True])
def test_flash_is_checked_as_the_model_trains(tmp_path, lab, monkeypatch, varlen_on_cpu, bf16):
    """The automatic choice of a GPU, under autocast too; its losses are those of the CPU's own backend."""
    wanted = lab.make_trainer(tmp_path, max_steps=3, bf16=bf16)
    like_a_gpu(monkeypatch, "flash", "flex", "segments")
    dtypes, forward = [], varlen_on_cpu.forward
    monkeypatch.setattr(varlen_on_cpu, "forward", lambda q, *rest: (dtypes.append(q.dtype), forward(q, *rest))[1])
    made = lab.make_trainer(tmp_path, max_steps=3, bf16=bf16)
    assert made.sharing == "conversation" and made.learner.maker.backend == "flash"
    assert set(dtypes) == {torch.bfloat16 if bf16 else torch.float32}
    losses = []
    for trainer in (made, wanted):
        if trainer is wanted:
            like_a_gpu(monkeypatch, "segments")
        trainer.train()
        losses.append(lab.losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=5e-2 if bf16 else 1e-5)


@pytest.mark.parametrize(
    "error", [RuntimeError("out of resource: shared memory\nand more"), AssertionError("a compiler")]
)
def test_any_failure_of_a_backend_is_the_next_one(tmp_path, lab, monkeypatch, varlen_on_cpu, caplog, error):
    like_a_gpu(monkeypatch, "flash", "flex", "segments")

    def fails(*_args):
        raise error

    monkeypatch.setattr(varlen_on_cpu, "forward", fails)
    with caplog.at_level(logging.WARNING, logger="fastsdpo.trainer"):
        made = lab.make_trainer(tmp_path, max_steps=1)
    first = str(error).splitlines()[0]
    assert [record.message for record in caplog.records] == [
        f"attention backend 'flash' does not work here, 'flex' is tried next: {type(error).__name__}: {first}"
    ]
    assert (
        made.sharing == "conversation" and made.learner.maker.backend == made.learner.sharing.attention == "segments"
    )
    made.train()
    with pytest.raises(type(error)):  # one that is asked for by name runs or raises
        lab.make_trainer(tmp_path, attention="flash")
