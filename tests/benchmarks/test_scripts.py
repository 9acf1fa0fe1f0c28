"""Each benchmark at its tiny sizes writes a file that the report reads."""

import importlib
import itertools
import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import bench_data, bench_processes, compare, conversations, harness, report, run_all, steps
from fastsdpo.data.tokenization import TokenizedInteraction
from tests.words import word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tokenizer(monkeypatch):
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<unk>"]
    tokenizer = word_tokenizer([*(f"w{n}" for n in range(9)), "Please"], special)
    monkeypatch.setattr(conversations, "load_tokenizer", lambda template="smollm2": tokenizer)
    monkeypatch.setattr(steps, "load_tokenizer", lambda: tokenizer)


@pytest.fixture
def source(tmp_path):
    """Conversations of which one has no turns, one too few messages and one begins like another."""
    texts = (["w1", "w2 w3", "w4"], ["w1", "w2"], ["w2", "w2", "w3", "w4", "w5 w6"], ["w1", "w2 w3", "w4", "w5", "w6"])
    rows = [[{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(talk)] for talk in texts]
    rows.append([{"role": "user", "content": "w1"}] * 3)
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


SLOW = pytest.mark.slow
NO_COMPILER = ["--without", "torch.compile", "Liger compiled", "CCE"]


@pytest.mark.parametrize(
    ("theme", "arguments"),
    [
        pytest.param("logits", NO_COMPILER, marks=SLOW),
        ("linear", [*NO_COMPILER, "--vocabulary", "512", "--modes", "sampled", "topk"]),
        pytest.param(
            "models",
            [*NO_COMPILER, "--logits", "SmolLM2-135M", "--hidden", "SmolLM2-135M", "--tokens", "2"],
            marks=SLOW,
        ),
        ("memory", []),
        ("trl", []),
        pytest.param("integrations", [], marks=SLOW),
        pytest.param("data", ["--source", "{source}"], marks=SLOW),
        pytest.param("processes", [], marks=SLOW),
    ],
)
def test_quick(theme, arguments, source, tokenizer, tmp_path, monkeypatch, capsys):
    if theme == "trl":
        pytest.importorskip("trl")
    module = importlib.import_module(f"benchmarks.bench_{theme}")
    arguments = [text.format(source=source) for text in arguments]
    module.main(["--quick", "--output", str(tmp_path), "--machine", "here", *arguments])
    path = tmp_path / f"{theme}_here.json"
    rows = harness.read(path)
    assert rows and all(row["run"]["command"] and len(row["rivals"]) for row in rows)
    assert compare.compare(rows, rows)[1] == []
    for known in harness.RESULTS.glob("*.json"):  # the page with this file in place of the recorded ones
        if not known.name.startswith(f"{theme}_") and not (tmp_path / known.name).exists():
            (tmp_path / known.name).symlink_to(known)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert f"`{path.name}`" in report.page()


def test_what_is_compared_must_be_the_same(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_data, "plain_prepare", lambda source, output: output.write_text(""))
    with pytest.raises(SystemExit, match="gives something else"):
        bench_data.main(["--quick", "--source", str(source), "--output", str(tmp_path)])


def test_interactions_of_drawn_lengths():
    items = bench_processes.make_interactions(40, 100, 2)
    assert len(items) == 40 and items == bench_processes.make_interactions(40, 100, 2)
    for one, two in itertools.pairwise(items):
        if one.conversation_id == two.conversation_id:  # the history goes on, so prefixes are shared
            assert two.prompt_ids[: len(one.prompt_ids)] == one.prompt_ids


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).train()


@pytest.mark.parametrize("name", steps.STEPS)
def test_every_step_is_the_official_one(name, model, tokenizer):
    """Loss and gradients on five interactions of one conversation: a batch of four and one of one."""
    if name.startswith("trl"):
        pytest.importorskip("trl")
    items, history = [], [3, 4, 5, 6, 7]
    for number in range(5):
        answer, followup = [*range(8 + number, 15 + 2 * number)], [60 + number, 70, 80]
        items.append(TokenizedInteraction(history, [*history, *followup], answer, str(number), "c"))
        history = [*history, *answer, *followup]

    def gradient(backward):
        loss = backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
        return loss, found

    ignored = 0 if name == "trl-sdpo" else steps.IGNORED  # TRL's SDPO has no option to leave tokens out
    want = gradient(lambda: steps.official(model, items, ignored))
    got = gradient(lambda: steps.STEPS[name](model, items))
    assert got[0] == pytest.approx(want[0], rel=1e-4)
    assert float((got[1] - want[1]).norm() / want[1].norm()) < 1e-4
    found = steps.describe(items)
    assert sum(n * (p + t + 2 * y) for n, p, t, y in found["sizes"]["batches"]) == found["padded_tokens"]


def test_run_all(tmp_path, monkeypatch, capsys):
    """Every theme's full arguments are its script's; a theme that fails is on the page, and the others run."""

    class Parsed(Exception):
        pass

    def stop(self, *arguments):
        plain(self, *arguments)
        raise Parsed

    plain = harness.Arguments.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(harness.Arguments, "parse_args", stop)
        for theme, (_, runs) in run_all.THEMES.items():
            for arguments in runs:
                with pytest.raises(Parsed):
                    importlib.import_module(f"benchmarks.bench_{theme}").main([*arguments.split(), "--machine", "x"])
    monkeypatch.setattr(run_all, "THEMES", {"none": ("what fails", [""]), "memory": ("what works", ["--help"])})
    assert run_all.main(["--output", str(tmp_path), "--only", "none", "memory"]) == 1
    page = (tmp_path / "index.md").read_text()
    assert page.count("**failed**") == 1 and "| what works | [log](memory.log) |" in page
    assert "failed: none" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_all.main(["--record", "--quick"])


@SLOW
@pytest.mark.parametrize("name", ["GKD", "GOLD", "Distillation", "SDFT", "IW-OPD", "Server", "Async"])
def test_quick_steps_of_trl_trainers(name, tmp_path):
    """Patched and not they give the same loss, or the script ends."""
    pytest.importorskip("trl")
    importlib.import_module("benchmarks.bench_trl").main(["--quick", "--output", str(tmp_path), "--trainers", name])
    rows = harness.read(tmp_path / "distillation_trainers_cpu.json")
    assert rows and all({"TRL", "hidden"} <= row["rivals"].keys() for row in rows)


@SLOW
def test_quick_steps_of_verl(tmp_path):
    """In a process of its own: verl's platform is the process's."""
    pytest.importorskip("verl")
    command = [sys.executable, "-m", "benchmarks.bench_verl", "--quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=harness.ROOT)
    rows = harness.read(tmp_path / "verl_cpu.json")
    assert [row["case"]["teacher"] for row in rows] == ["self"] * 4 + ["server"]
