"""TRL's other trainers that distil, patched against unpatched: losses, metrics and every gradient of five steps."""

import importlib
import json
import queue

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import set_seed

from fastsdpo.integrations.generalized_jsd import adapt
from fastsdpo.integrations.trl import patch_trl
from tests.integrations.conftest import RUN, make_tokenizer
from tests.servers import serving

PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10"]
ANSWERS = ["w20 w21 w22", "w23", "w24 w25", "w26 w27 w28 w29 w30"]
SETTINGS = {**RUN, "per_device_train_batch_size": 2, "max_steps": 5}


class Gradients(TrainerCallback):
    """Every parameter's gradient before each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})


def tokenizer_of(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")


def conversations():
    rows = zip(PROMPTS, ANSWERS)
    said = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in rows]
    return Dataset.from_dict({"messages": said})


def sdft(student, teacher, output, model=None, **options):
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    data = Dataset.from_dict({"prompt": PROMPTS, "privileged_context": ["w11 w12", "w13", "w14 w15", "w17"]})
    args = SDFTConfig(output_dir=output, max_completion_length=6, num_generations=2, **SETTINGS, **options)
    return SDFTTrainer(model=model or student, args=args, train_dataset=data, processing_class=tokenizer_of(student))


def byte_level_tokenizer(_folder):
    """GOLD wants one whose offsets are bytes: a token per character of the prompts."""
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<system>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *"w0123456789\u0120"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    names = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)
    tokenizer.chat_template = make_tokenizer().chat_template
    return tokenizer


def pair_maker(module, name, tokenizer_for=tokenizer_of, loads_names=False, **own):
    """make(student, teacher, output): a trainer that has a teacher, of ``trl.experimental``."""

    def make(student, teacher, output, model=None, **options):
        kinds = importlib.import_module(f"trl.experimental.{module}")
        args = getattr(kinds, f"{name}Config")(output_dir=output, max_length=64, **own, **SETTINGS, **options)
        given = {"train_dataset": conversations(), "processing_class": tokenizer_for(student), "args": args}
        model = model or (student if loads_names else AutoModelForCausalLM.from_pretrained(student))
        return getattr(kinds, f"{name}Trainer")(model=model, teacher_model=teacher, **given)

    return make


gkd = pair_maker("gkd", "GKD", max_new_tokens=6)
gold = pair_maker("gold", "GOLD", byte_level_tokenizer, max_completion_length=6)
iw_opd = pair_maker("iw_opd", "IWOPD", loads_names=True, max_completion_length=6)

TOPK = {"distillation_mode": "topk_logits", "distillation_topk": 7}
JSD = {"distillation_objective": "jsd", "lmbda": 0.5}
RUNS = {
    "sdft-topk": (sdft, {**TOPK, "temperature": 0.8, "num_loss_tokens_to_skip": 1}),
    "sdft-full-ema": (sdft, {"distillation_mode": "full_logits", "teacher_model_kind": "ema", "num_iterations": 2}),
    "gkd": (gkd, {"beta": 0.5, "lmbda": 0.5, "gradient_accumulation_steps": 2}),
    "gkd-forward": (gkd, {"beta": 0.0, "lmbda": 0.0}),
    "gold": (gold, {"beta": 0.3, "lmbda": 0.5, "temperature": 0.8}),
    "gold-reverse": (gold, {"beta": 1.0, "lmbda": 0.0}),
    "iw-opd": (iw_opd, {"temperature": 0.8, "gradient_accumulation_steps": 2}),
    "iw-opd-jsd": (iw_opd, {**JSD, "beta": 0.5, "loss_top_k": 0}),
    "iw-opd-top1": (iw_opd, {**JSD, "beta": 0.5, "loss_top_k": 1, "reverse_kl_top_1_mode": "argmax"}),
    "iw-opd-top4-union": (iw_opd, {**JSD, "beta": 0.5, "loss_top_k": 4}),
    "iw-opd-top4-forward": (iw_opd, {**JSD, "beta": 0.0, "loss_top_k": 4, "loss_add_tail": False}),
}


def run(trainer):
    recorded = Gradients()
    trainer.add_callback(recorded)
    set_seed(7)
    trainer.train()
    kept = ("loss", "grad_norm", "jsd", "entropy", "teacher_entropy")
    logs = [
        {k: v for k, v in entry.items() if k in kept or k.startswith(("iw_opd/", "self_dist", "teacher_jsd"))}
        for entry in trainer.state.log_history
    ]
    return logs, recorded.steps


def assert_same(found, wanted, rounding=0.0, steps=5):
    """``rounding``: of the gradients' dtype, where it is not float32."""
    (logs, found_steps), (want_logs, want_steps) = found, wanted
    assert len(found_steps) == len(want_steps) == steps
    assert any(entry.get("loss", 0) != 0 for entry in want_logs)
    for got, want in zip(logs, want_logs, strict=True):
        assert got == pytest.approx(want, rel=5e-5 + rounding, abs=5e-6, nan_ok=True)
    for got, want in zip(found_steps, want_steps):
        assert got.keys() == want.keys() and any(grad.any() for grad in want.values())
        for name, grad in want.items():
            limit = (5e-5 + rounding) * grad.abs().max().item() + 1e-7
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=limit, msg=name)


SOONER = ("sdft-topk", "gkd", "gold")


FROM_LOGITS = ("sdft-topk", "gkd", "gold", "iw-opd-jsd", "iw-opd-top4-forward")
SLOW = pytest.mark.slow
CASES = [pytest.param(n, "hidden", marks=[] if n in SOONER else SLOW) for n in RUNS]
CASES += [pytest.param(n, "logits", marks=SLOW) for n in FROM_LOGITS]


@pytest.mark.parametrize(("name", "source"), CASES)
def test_five_steps(name, source, llama_folder, qwen2_folder, tmp_path):
    """From hidden states: the student's head never runs. The teacher is another model with a head of its own."""
    make, options = RUNS[name]
    wanted = run(make(llama_folder, qwen2_folder, str(tmp_path), **options))
    with patch_trl(source):
        assert_same(run(make(llama_folder, qwen2_folder, str(tmp_path), **options)), wanted)


def positions(batch):
    """Somebody's collator says where the tokens stand: backwards."""
    ids = batch["input_ids"]
    return {**batch, "position_ids": torch.arange(ids.shape[1]).flip(0).expand_as(ids).clone()}


def collated(trainer, change):
    collator = trainer.data_collator
    trainer.data_collator = lambda rows: change(collator(rows))
    return trainer


def with_parent(trainer):
    """Somebody's subclass: a method that TRL's loss calls asks its parent."""

    class Own(type(trainer)):
        def _get_model_forward_kwargs(self, inputs, exclude=()):
            return super()._get_model_forward_kwargs(positions(inputs), exclude)

    trainer.__class__ = Own
    return trainer


def with_own_loss(trainer):
    """A function on the trainer itself, in the place of the class's."""
    trainer.generalized_jsd_loss = lambda student_logits, teacher_logits, **_: (student_logits - teacher_logits).var()
    return trainer


def as_its_own_teacher(trainer):
    trainer.teacher_model = trainer.model
    trainer.model.model.embed_tokens.register_forward_hook(lambda m, _, out: out * (1.5 if m.training else 1.0))
    return trainer


UNUSUAL = {
    "collator": (gold, {}, lambda trainer: collated(trainer, positions), ""),
    "parent": (gold, {}, with_parent, ""),
    "own loss": (gkd, {}, with_own_loss, "has its own generalized_jsd_loss"),
    "teacher is the student": (gkd, {}, as_its_own_teacher, "the teacher is the model that is trained"),
    "top-k beyond the vocabulary": (iw_opd, {"distillation_objective": "jsd", "loss_top_k": 99}, lambda t: t, ""),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_one_step_of_what_users_add(name, llama_folder, qwen2_folder, tmp_path, caplog):
    make, options, change, reason = UNUSUAL[name]

    def step():
        trainer = change(make(llama_folder, qwen2_folder, str(tmp_path), lmbda=0.0, beta=0.5, **options))
        trainer.args.max_steps = 1
        return run(trainer)

    wanted = step()
    with patch_trl():
        assert_same(step(), wanted, steps=1)
    assert reason in caplog.text and ("from logits" in caplog.text) == bool(reason)


@pytest.fixture
def served(qwen2_folder):
    """The teacher as an HTTP server with the replies of `vllm serve` to ``prompt_logprobs``; its URL."""
    model = AutoModelForCausalLM.from_pretrained(qwen2_folder).eval()

    def score(ids, k):
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entries = [None]
        for position, token in enumerate(ids[1:]):
            best = logps[position].topk(k)
            row = {int(i): {"logprob": float(p), "rank": n + 1} for n, (p, i) in enumerate(zip(*best))}
            rank = int((logps[position] > logps[position, token]).sum()) + 1
            row.setdefault(token, {"logprob": float(logps[position, token]), "rank": rank})
            entries.append(row)
        return entries

    def answer(path, body):
        if not body:
            return 200, {"data": [{"id": "teacher", "max_model_len": 256}]}
        asked = json.loads(body)
        assert asked["temperature"] == 1.0
        return 200, {"choices": [{"prompt_logprobs": score(s, asked["prompt_logprobs"])} for s in asked["prompt"]]}

    with serving(answer) as url:
        yield url, score


@pytest.mark.parametrize(
    "options", [{"beta": 0.5}, *(pytest.param(o, marks=SLOW) for o in ({"beta": 0.0, "loss_top_k": 5}, {"beta": 1.0}))]
)
def test_server_distillation(options, served, llama_folder, tmp_path, monkeypatch):
    """TRL's client only looks whether vLLM is installed; it talks HTTP."""
    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer

    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda *args, **kwargs: True)

    def make():
        given = {**SETTINGS, **options, "max_completion_length": 6, "teacher_model_server_url": served[0]}
        return ServerDistillationTrainer(
            model=llama_folder,
            args=ServerDistillationConfig(output_dir=str(tmp_path), **given),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer_of(llama_folder),
        )

    wanted = run(make())
    with patch_trl("hidden"):
        assert_same(run(make()), wanted)


class Rollouts:
    """TRL's `RolloutWorkerProtocol`: answers that exist, scored by the served teacher."""

    def __init__(self, score, width):
        from trl.experimental.async_distillation.async_rollout_worker import RolloutSample

        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        draw, samples = np.random.default_rng(0), []
        for number in range(4):
            ids = draw.integers(6, 60, 9 + number % 4)
            top, logps = np.full((len(ids), width + 1), -1), np.full((len(ids), width + 1), -np.inf, np.float32)
            for position, entry in enumerate(score(ids.tolist(), width)):
                for place, (token, found) in enumerate((entry or {}).items()):
                    top[position, place], logps[position, place] = token, found["logprob"]
            top[5] = -1  # nothing came back for this token
            mask = (np.arange(len(ids)) >= 4).astype(np.int64)
            fields = {"input_ids": ids, "completion_mask": mask, "teacher_topk_ids": top, "metrics": {}}
            fields |= {"teacher_topk_logprobs": logps, "model_version": 0, "prompt_id": number, "prompt": []}
            teacher = f"teacher{number % 2}"
            samples.append(RolloutSample(**fields, completion=[], teacher_id=teacher))
        for sample in samples * 30:  # more than five steps take: batches are fetched ahead
            self.rollout_buffer.put(sample)

    def nothing(self, *args):
        pass

    start = stop = update_model_version = nothing

    def check_health(self, stale_after_s):
        assert not self.rollout_buffer.empty()


MODULE = "trl.experimental.async_distillation.async_distillation_trainer"


class NoTransfer:
    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(
    ("beta", "tail"), [(0.0, True), *(pytest.param(*v, marks=SLOW) for v in ((0.5, False), (1.0, True)))]
)
def test_asynchronous_distillation(beta, tail, served, llama_folder, tmp_path, monkeypatch):
    """Of TRL only the name of the GPU, for its share of peak FLOP/s, is not there on a CPU."""
    from trl.experimental.async_distillation import AsyncDistillationConfig, AsyncDistillationTrainer

    monkeypatch.setattr(f"{MODULE}.get_peak_flops_per_device", lambda *args: 1e12)

    def make():
        urls = {"teacher0": served[0], "teacher1": served[0]}
        given = {**SETTINGS, "beta": beta, "add_tail_bucket": tail, "teacher_top_k": 5, "teacher_server_urls": urls}
        given |= {"model_init_kwargs": {"attn_implementation": "sdpa", "dtype": "float32"}, "max_staleness": 100}
        given |= {"vllm_server_base_url": served[0], "token_budget": 26}
        args = AsyncDistillationConfig(output_dir=str(tmp_path), **given)
        names = {"processing_class": tokenizer_of(llama_folder), "rollout_worker": Rollouts(served[1], 5)}
        data = Dataset.from_dict({"prompt": PROMPTS})
        names |= {"train_dataset": data, "weight_transfer": NoTransfer()}
        return AsyncDistillationTrainer(model=llama_folder, args=args, **names)

    wanted = run(make())
    with patch_trl():
        assert_same(run(make()), wanted)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_asynchronous_distillation_with_a_banned_candidate(beta, tail):
    """A bias of -inf, where TRL's gradients are NaN: what a bias gives that is low enough for a probability of 0."""
    module = importlib.import_module(MODULE)
    hidden, weight, bias = torch.randn(4, 8), torch.randn(33, 8), torch.zeros(33)
    ids, teacher = torch.arange(12).view(4, 3), torch.full((4, 3), -2.0)
    rest = (ids, teacher, torch.ones(4, 3, dtype=torch.bool), beta, 0.7, tail, None, 1, 256)

    def gradients(banned):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, _, entropy, *_ = module._chunked_jsd_loss(
            *leaves, bias.index_fill(0, ids[1, :1], banned), 1.0, None, *rest
        )
        loss.backward()
        return loss.detach(), entropy, *(leaf.grad for leaf in leaves)

    wanted = gradients(-1e6)
    assert gradients(-torch.inf)[2].isnan().any()
    with patch_trl():
        for got, want in zip(gradients(-torch.inf), wanted):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["gkd.gkd_trainer:GKDTrainer", "gold.gold_trainer:GOLDTrainer"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"reduction": "mean"}, {"reduction": "none"}, {"num_items_in_batch": 7}]
)
def test_the_adapter_in_every_reduction(which, labelled, options):
    module, name = which.split(":")
    theirs = getattr(importlib.import_module(f"trl.experimental.{module}"), name).generalized_jsd_loss
    student, teacher = torch.randn(2, 5, 33), torch.randn(2, 5, 33)
    labels = torch.tensor([[-100, 1, 2, 3, -100], [-100, -100, 1, 1, 1]]) if labelled else None
    for beta in (0.0, 0.3, 1.0):
        found = []
        for function in (theirs, adapt(theirs)):
            leaf = student.clone().requires_grad_()
            loss = function(leaf, teacher, labels, beta, 1.7, **options)
            loss.sum().backward()
            found.append((loss.detach(), leaf.grad))
        for want, got in zip(*found):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
    with pytest.raises(TypeError, match="adapt: the function must have the arguments"):
        adapt(lambda student, teacher: None)
