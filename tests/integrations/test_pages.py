"""The Python blocks and commands of docs/integrations run as they stand there, in the page's order.

A tiny model stands in for the models that pages name, a server on this machine, which is that model, for SGLang and
vLLM. The pages of packages that need other versions than the suite's are run by `make peers`.
"""

import asyncio
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from fastsdpo.integrations import sdpo_fork
from tests.integrations import test_sdpo_fork, test_sglang, test_vllm
from tests.integrations.conftest import make_models
from tests.pages import ROOT, blocks, calls
from tests.servers import serving

FOLDER = ROOT / "docs/integrations"
# Where the page of a name is run, if not here.
ELSEWHERE = {
    "pytorch": "tests/test_docs.py",
    "axolotl": "tests/integrations/peers/test_axolotl.py",
    "swift": "tests/integrations/peers/test_swift.py",
    "torchrl": "tests/integrations/peers/test_torchrl.py",
}
# What is not run as it stands there, by how it starts.
NOT_RUN = {
    "pip install": "changes the environment",
    "VERL_USE_EXTERNAL_MODULES=register_fastsdpo": "Ray, rollouts and a teacher need a GPU and vLLM or SGLang: verl "
    "reads the whole configuration here (--cfg job), and test_verl_installed.py runs the loss that it names",
}
SEQUENCES, LENGTHS = [[7, 13, 14, 15, 16], [9, 8, 20, 21]], [3, 2]


def run(page, change=None, **names):
    """Runs the page's Python blocks one after the other; returns all names. ``change``: a text and its replacement."""
    for block in blocks(FOLDER / f"{page}.md", "python"):
        exec(compile(block.replace(*change) if change else block, f"{page}.md", "exec"), names)
    return names


def finite(names, *of):
    """Whether the loss of a page is a number, and its gradient reached the student."""
    names["out"].loss.backward()
    assert names["out"].loss.isfinite()
    for name in of:
        assert names[name].grad.isfinite().all() and names[name].grad.abs().sum() > 0


def draw(*shape):
    return torch.randn(shape).requires_grad_()


def test_every_page_is_run():
    here = {name[5:-5] for name in globals() if name.startswith("test_") and name.endswith("_page")}
    assert here | ELSEWHERE.keys() == {page.stem for page in FOLDER.glob("*.md")}
    for path in ELSEWHERE.values():
        assert re.search(r"integrations/pytorch|def test_the_page_runs", (ROOT / path).read_text("utf-8")), path
    texts = [shlex.join(call.words) for page in FOLDER.glob("*.md") for b in blocks(page, "bash") for call in calls(b)]
    assert all(any(text.startswith(start) for text in texts) for start in NOT_RUN)


def test_generalized_jsd_page():
    gkd = pytest.importorskip("trl.experimental.gkd")
    names = run("generalized_jsd")
    given = draw(2, 3, 11), draw(2, 3, 11), torch.tensor([[1, -100, 2], [3, 4, 5]]), 0.3, 0.8
    want = gkd.GKDTrainer.generalized_jsd_loss(*given)
    torch.testing.assert_close(names["MyTrainer"].generalized_jsd_loss(*given), want)


def test_sdpo_fork_page(monkeypatch, qwen2_folder):
    """The fork is on no package index: a module with its name stands in for it."""

    def reverse_kl(*arguments, **given):
        s, t = given["student_all_log_probs"], given["teacher_all_log_probs"]
        return (s.exp() * (s - t)).sum(-1).mean(), {}

    reverse_kl.__signature__ = inspect.signature(sdpo_fork.compute_self_distillation_loss)
    for name in ("verl.trainer.ppo.core_algos", "verl.workers.actor.dp_actor"):
        module = ModuleType(name)
        module.compute_self_distillation_loss = reverse_kl
        monkeypatch.setitem(sys.modules, name, module)
    for parent in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.workers", "verl.workers.actor"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    model = AutoModelForCausalLM.from_pretrained(qwen2_folder)
    v, d = model.lm_head.weight.shape
    student, teacher = draw(2, 3, d), torch.randn(2, 3, d)
    names = {"student_hidden": student, "teacher_hidden": teacher, "model": model, "temperature": 1.0}
    names |= {"student_logits": model.lm_head(student), "teacher_logits": model.lm_head(teacher)}
    names |= {"responses": torch.randint(v, (2, 3)), "response_mask": torch.ones(2, 3)}
    names["config"] = test_sdpo_fork.settings()
    losses = []
    for block in blocks(FOLDER / "sdpo_fork.md", "python"):
        exec(compile(block, "sdpo_fork.md", "exec"), names)
        losses += [names["loss"]] if "loss" in names else []
    torch.testing.assert_close(losses[0], losses[1])  # before, and from hidden states


@pytest.fixture
def scores(qwen2_folder):
    """Log-probs of a model at every token of `SEQUENCES`, and the names that the pages of servers take for granted."""
    model = AutoModelForCausalLM.from_pretrained(qwen2_folder)
    with torch.no_grad():
        found = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in SEQUENCES]
    names = {"sequences": SEQUENCES, "completion_lengths": LENGTHS, "device": "cpu"}
    return found, {**names, "student_logits": draw(len(LENGTHS), max(LENGTHS), found[0].shape[-1])}


@pytest.fixture
def server(scores, monkeypatch):
    """SGLang's ``/generate`` and vLLM's ``/v1/completions``, at the addresses of the pages."""

    def answer(path, body):
        asked = json.loads(body)
        if path == "/generate":
            assert asked["return_logprob"] and asked["sampling_params"] == {"max_new_tokens": 1}
            ids, start = asked["input_ids"], asked["logprob_start_len"]
            monkeypatch.setattr(test_sglang, "K", asked["top_logprobs_num"])
            return 200, test_sglang.reply_of(scores[0][SEQUENCES.index(ids)], ids, start)
        assert (path, asked["max_tokens"]) == ("/v1/completions", 1)
        entries = [test_vllm.serve(p, ids, asked["prompt_logprobs"]) for p, ids in zip(*known(asked["prompt"]))]
        return 200, {"choices": [{"text": "a", "prompt_logprobs": test_vllm.as_json(e)} for e in entries]}

    def known(prompts):
        return [scores[0][SEQUENCES.index(ids)] for ids in prompts], prompts

    made = urllib.request.Request

    def local(address, *given, **more):
        return made(re.sub(r"http://localhost:\d+", url, address), *given, **more)

    with serving(answer) as url:
        monkeypatch.setattr(urllib.request, "Request", local)
        yield


@pytest.mark.usefixtures("server")
def test_sglang_page(scores):
    names = run("sglang", **scores[1])
    assert len(names["ids"]) == len(names["logps"]) == LENGTHS[0]
    torch.testing.assert_close(names["teacher"].teacher_logps[0], torch.tensor(names["logps"]))
    finite(names, "student_logits")


@pytest.mark.usefixtures("server")
def test_vllm_page(scores, monkeypatch):
    """`LLM`, which needs a GPU, is stood in for; its HTTP server is this machine's."""

    class LLM:
        def __init__(self, model, *, max_logprobs):
            assert max_logprobs == 20

        def generate(self, prompts, params):
            assert params == {"prompt_logprobs": 20, "max_tokens": 1}
            assert [prompt["prompt_token_ids"] for prompt in prompts] == SEQUENCES
            entries = [test_vllm.serve(p, ids, 20) for p, ids in zip(scores[0], SEQUENCES)]
            return [SimpleNamespace(prompt_token_ids=i, prompt_logprobs=e) for i, e in zip(SEQUENCES, entries)]

    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, dict
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    names = run("vllm", **scores[1])
    torch.testing.assert_close(names["teacher"].teacher_logps[1, :2], torch.tensor(names["rows"][1]))
    finite(names, "student_logits")


# The two processes of the page: what each has already, before its block.
BEFORE = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from fastsdpo.prefix import head_parameters

rank, store, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(folder)
ids, prompt_length, source, destination = torch.tensor([7, 8, 13, 14, 15]), 2, 1, 0
target_ids, teacher_head = ids[prompt_length:], head_parameters(model)
student_hidden = torch.randn(3, teacher_head.weight.shape[1], requires_grad=True)
student_head = torch.nn.Linear(*reversed(teacher_head.weight.shape), bias=False)
"""
AFTER = """
out.loss.backward()
wanted = model(ids[None]).logits[0, prompt_length - 1 : -1].log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]
torch.testing.assert_close(out.teacher_logps, wanted)
assert student_hidden.grad.abs().sum() > 0
"""


@pytest.mark.slow
def test_hidden_states_page(qwen2_folder, tmp_path):
    before, teacher, trainer = blocks(FOLDER / "hidden_states.md", "python")
    names = {"student_logits": draw(3, 11), "teacher_logits": torch.randn(3, 11), "target_ids": torch.arange(3)}
    exec(compile(before, "hidden_states.md", "exec"), names)
    finite(names, "student_logits")
    processes = []
    for rank, script in enumerate((BEFORE + trainer + AFTER, BEFORE + teacher)):
        command = [sys.executable, "-c", script, str(rank), str(tmp_path / "store"), qwen2_folder]
        processes.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}))
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def test_transformers_page(qwen2_folder, tmp_path):
    ids = torch.tensor(SEQUENCES[0] * 2)
    labels = ids.clone()
    labels[:3] = -100
    rows = [{"input_ids": ids.tolist(), "labels": labels.tolist(), "teacher_logps": [-1.0] * len(ids)}] * 4
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    model = AutoModelForCausalLM.from_pretrained(qwen2_folder)
    options = {"output_dir": str(tmp_path), "max_steps": 2, "use_cpu": True, "report_to": []}
    args = TrainingArguments(**options, remove_unused_columns=False, dataloader_pin_memory=False, logging_steps=1)
    names = run("transformers", model=model, args=args, data=rows, attention_mask=None, **batch)
    assert all(entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry)
    model.eval()
    wanted = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1).gather(-1, ids[None, 1:, None].expand(4, -1, 1))
    counts = batch["labels"][:, 1:] != -100
    names = {**names, "labels": batch["labels"]}
    exec(compile(blocks(FOLDER / "transformers.md", "python")[-1], "transformers.md", "exec"), names)
    torch.testing.assert_close(names["logps"][counts], wanted[..., 0][counts])
    # The plain loss before is the one that `Trainer` takes after.
    plain = names["Distiller"](model=model, args=args, train_dataset=rows)
    given = {**batch, "teacher_logps": torch.full(batch["labels"].shape, -1.0)}
    loss = plain.compute_loss(model, given, num_items_in_batch=counts.sum())
    names["trainer"].model_accepts_loss_kwargs = True
    fused = names["trainer"].compute_loss(model, names["collate"](rows), num_items_in_batch=counts.sum())
    grads = []
    for each in (loss, fused):
        model.zero_grad()
        each.backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's and transformers'
def test_trl_page(tmp_path, monkeypatch):
    pytest.importorskip("trl.experimental.sdpo")
    from fastsdpo.integrations.trl import patch_trl

    monkeypatch.chdir(tmp_path)
    make_models("Qwen/Qwen3-0.6B")
    try:
        names = run("trl", ("max_steps=10", "max_steps=2, use_cpu=True, bf16=False"))
    finally:
        patch_trl().__exit__(None, None, None)
    assert names["trainer"].state.global_step == 2 and names["trainer"].state.log_history[-1]["train_loss"]


@pytest.mark.slow
def test_verl_page(tmp_path, monkeypatch):
    """verl reads the page's configuration, with the loss of the page's module in its registry."""
    pytest.importorskip("verl")
    monkeypatch.chdir(tmp_path)
    Path("register_fastsdpo.py").write_text(blocks(FOLDER / "verl.md", "python")[0], "utf-8")
    (words,) = [call.words for block in blocks(FOLDER / "verl.md", "bash")[1:] for call in calls(block)]
    variables = dict(word.split("=", 1) for word in words[: words.index("python")])
    environment = {**os.environ, **variables, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, *words[words.index("python") + 1 :]]
    done = subprocess.run([*command, "--cfg", "job"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "loss_mode: fastsdpo_sampled_token" in done.stdout and "model_path: Qwen/Qwen3-8B" in done.stdout
    asked = "from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY as known; print(*known)"
    done = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, timeout=300)
    assert "fastsdpo_sampled_token" in done.stdout.split(), done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # verl's and Ray's
def test_verl_self_teacher_page(tmp_path, monkeypatch, tiny):
    """Its module, in a process of its own, and its agent loop on an answer of verl's."""
    pytest.importorskip("verl")
    module, loop = blocks(FOLDER / "verl_self_teacher.md", "python")
    script = "from tests.integrations.verl_on_cpu import use_cpu\nuse_cpu()\nimport self_teacher\n"
    (tmp_path / "self_teacher.py").write_text(module, "utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=300)

    reason = "verl's agent loops need packages for servers: see verl in the Makefile"
    verl_loop = pytest.importorskip("verl.experimental.agent_loop.single_turn_agent_loop", reason=reason)

    async def answer(self, sampling_params, **kwargs):
        return SimpleNamespace(response_ids=self.tokenizer("word " * 30)["input_ids"], extra_fields={})

    monkeypatch.setattr(verl_loop.SingleTurnAgentLoop, "run", answer)
    names = {}
    exec(compile(loop, "verl_self_teacher.md", "exec"), names)
    agent = object.__new__(names["WithFollowup"])
    agent.tokenizer = AutoTokenizer.from_pretrained(tiny)
    output = asyncio.run(agent.run({}, raw_prompt=[{"role": "user", "content": "Hi"}]))
    assert "Shorter, please." in agent.tokenizer.decode(output.extra_fields["teacher_prompt_ids"])
