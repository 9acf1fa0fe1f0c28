"""`fastsdpo online` under FSDP2 (torchrun) and ZeRO-2 (accelerate launch): what one plain process gives.

The answers, the weights and the files.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.launching import FSDP2, accelerate, torchrun, worker

lacking = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
pytestmark = [pytest.mark.slow, lacking]

VARIANTS = {
    "full": [],
    # The log-probabilities of sampling time take passes of their own, unequally many in the processes.
    "scored": ["--preset", "paper", "--updates-per-batch", "2", "--set", "num_generations=2"],
    "lora": ["--lora", "2", "--teacher", "ema"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from tests.online.conftest import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("launched")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(8)]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    (folder / "held_out.txt").write_text("\n".join(prompts[:3]))  # one process has one more than the other
    return folder


def arguments(place, output, processes, variant, *, cpu=True):
    fixed = {"model": place / "model", "output": output, "eval-prompts": place / "held_out.txt"}
    fixed |= {"template": " note {o}", "rule": "max_words=6", "wish": "w3 w4", "max-new-tokens": 12, "max-steps": 3}
    fixed |= {"batch-size": 4 // processes, "global-batch-size": 4, "learning-rate": 0.5}
    fixed |= {"sampling-temperature": 1e-4}  # so cold that every process draws the likeliest token, whatever its seed
    settings = ("optim=sgd", "save_strategy=no", "dataloader_pin_memory=false", "max_grad_norm=0")
    given = [str(place / "prompts.txt"), *(["--cpu"] if cpu else []), *variant]
    given += [text for name, value in fixed.items() for text in (f"--{name}", str(value))]
    return ["online", *given, *(text for setting in settings for text in ("--set", setting))]


def launch(place, kind, processes, variants, **environment):
    runs = [arguments(place, place / f"{kind}-{name}", processes, variant) for name, variant in variants.items()]
    return torchrun(processes, *worker(kind), json.dumps(runs), **environment)


@pytest.fixture(scope="module")
def one(place):
    launch(place, "plain", 1, VARIANTS)


@pytest.fixture(scope="module")
def both(place, one):
    launch(place, "fsdp2", 2, VARIANTS, **FSDP2)


def rows(folder, file, *keys):
    lines = (folder / file).read_text().splitlines()
    return sorted(str([row[key] for key in keys]) for row in map(json.loads, lines))


@pytest.fixture(scope="module")
def zero2(place, one):
    """accelerate starts one process of DeepSpeed on a CPU."""
    pytest.importorskip("deepspeed")
    runs = [arguments(place, place / f"zero2-{name}", 1, VARIANTS[name], cpu=False) for name in VARIANTS]
    accelerate("deepspeed_zero2", 1, *worker("deepspeed"), json.dumps(runs), DS_ACCELERATOR="cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_zero2(place, zero2, name):
    compare(place / f"plain-{name}", place / f"zero2-{name}", name)


@pytest.mark.parametrize("name", VARIANTS)
def test_fsdp2(place, both, name):
    compare(place / f"plain-{name}", place / f"fsdp2-{name}", name)


def compare(plain, sharded, name):
    """Answers, losses, gradient norms and weights are those of one plain process."""
    for file, keys in (
        ("interactions.jsonl", ("step", "prompt", "completion", "user_response")),
        ("eval_answers.jsonl", ("step", "prompt", "response", "satisfied")),
    ):
        assert rows(plain, file, *keys) == rows(sharded, file, *keys) != []
    want, got = (json.loads((folder / "report.json").read_text()) for folder in (plain, sharded))
    steps = [[row for row in report["history"] if "loss" in row] for report in (want, got)]
    assert len(steps[0]) == len(steps[1]) == 3
    for left, right in zip(*steps):
        for key in ("loss", "grad_norm", "online/entropy"):
            assert right[key] == pytest.approx(left[key], rel=1e-4, abs=1e-6), (key, left)
    assert got["after"] == pytest.approx(
        {**want["after"], **{k: v for k, v in got["after"].items() if "runtime" in k or "per_second" in k}}
    )
    weights = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    want, got = (load_file(folder / "model" / weights) for folder in (plain, sharded))
    assert want.keys() <= got.keys()  # FSDP2 writes a tied head beside the embedding
    assert max(float((want[key] - got[key]).abs().max()) for key in want) < 1e-5


def test_a_server_is_given_the_gathered_adapter(place, both, vllm):
    variant = {"served": [*VARIANTS["lora"], "--generation-url", vllm.url]}
    launch(place, "plain", 1, variant)
    plain, vllm.asked[:] = list(vllm.asked), []
    launch(place, "fsdp2", 2, variant, **FSDP2)
    loaded = [
        [body["lora_path"] for path, body in asked if path.endswith("/load_lora_adapter")]
        for asked in (plain, vllm.asked)
    ]
    assert len(loaded[0]) == len(loaded[1]) == 4  # three steps, and the answers after them
    for want, got in zip(*loaded):
        want, got = (load_file(f"{folder}/adapter_model.safetensors") for folder in (want, got))
        assert want.keys() == got.keys() and len(got) > 0
        assert max(float((want[key] - got[key]).abs().max()) for key in want) < 1e-5
    asked = [len(body["prompt"]) for path, body in vllm.asked if path.endswith("/completions")]
    assert sum(asked) == sum(len(body["prompt"]) for path, body in plain if path.endswith("/completions"))
