"""`--quantize`: an adapter on weights that bitsandbytes packs, through the commands."""

import importlib.util
import json

import pytest
from transformers import AutoModelForCausalLM

from fastsdpo.commands import chat, online, train
from fastsdpo.modeling import load_model_and_tokenizer
from fastsdpo.online.terminal import MessageReader
from tests.trainer.launching import Variant, arguments, compare, runs, torchrun, worker

LORA = ["--lora", "4"]
VARIANTS = {
    "4bit": Variant([*LORA, "--quantize", "4bit"], "base", 1e-4),
    "4bit-checkpointing": Variant([*LORA, "--quantize", "4bit", "--gradient-checkpointing"], "base", 1e-4),
    # Its layers round what they read to 8 bits as well, by the outliers of all tokens of a pass.
    "8bit": Variant([*LORA, "--learning-rate", "0.1", "--sharing", "off", "--quantize", "8bit"], "base", 2e-2),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    folder = tmp_path_factory.mktemp("quantized")
    lab.save(folder / "base", hidden_size=64, intermediate_size=128)
    lab.write_rows(folder / "data.jsonl", lab.make_interactions(8)[:15])
    lab.write_rows(folder / "data.eval.jsonl", lab.make_interactions(2, seed=9)[:3])
    return folder


@pytest.fixture(scope="module")
def dequantized(place):
    """What one plain process trains on the weights that the packed ones stand for, by the name of the variant."""
    pytest.importorskip("bitsandbytes")
    for kind in ("4bit", "8bit"):
        packed, tokenizer = load_model_and_tokenizer(place / "base", device="cpu", quantize=kind)
        packed.dequantize().save_pretrained(place / kind)
        tokenizer.save_pretrained(place / kind)
        assert AutoModelForCausalLM.from_pretrained(place / kind).dtype == packed.dtype
    for name, variant in VARIANTS.items():
        plain = [text for text in variant.arguments if text not in ("--quantize", "4bit", "8bit")]
        run = Variant(plain, name[:4])
        assert train.main(arguments(place, place / f"plain1-{name}", run)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_trains_what_the_packed_weights_stand_for(place, dequantized, lab, name, capsys):
    output = place / f"one-{name}"
    assert train.main(arguments(place, output, VARIANTS[name])) == 0
    compare(place, output.name, name, lab, VARIANTS)
    # The saved adapter, again on the packed weights, is what was evaluated last.
    variant = Variant(VARIANTS[name].arguments[2:], output.name + "/model")
    assert train.main(arguments(place, place / f"again-{name}", variant)) == 0
    reports = [json.loads((place / folder / "report.json").read_text()) for folder in (output.name, f"again-{name}")]
    assert reports[1]["before"]["eval_loss"] == pytest.approx(reports[0]["after"]["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_two_processes(place, dequantized, lab):
    torchrun(2, *worker("plain"), runs(place, "ddp", ["4bit"], 2, variants=VARIANTS))
    compare(place, "ddp2-4bit", "4bit", lab, VARIANTS)


@pytest.mark.parametrize(
    ("more", "environment", "message"),
    [
        ([], {}, "--quantize 4bit needs an adapter to train"),
        (["--lora", "4", "absent"], {}, "--quantize 4bit needs the package bitsandbytes"),
        (["--lora", "4"], {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "not possible with FSDP"),
    ],
)
def test_refused_before_weights_are_loaded(place, tmp_path, capsys, monkeypatch, more, environment, message):
    find = importlib.util.find_spec
    absent = "absent" in more
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (None if absent else True) if name == "bitsandbytes" else find(name, *rest),
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    flags = [flag for flag in more if flag != "absent"]
    run = arguments(place, tmp_path / "out", Variant(["--quantize", "4bit", *flags], "base"))
    assert train.main(run) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["online", "chat"])
def test_online_and_chat(place, dequantized, tmp_path, monkeypatch, capsys, command):
    options = "--cpu --lora 4 --quantize 4bit --max-new-tokens 6"
    common = ["--model", str(place / "base"), "-o", str(tmp_path / "out"), "--template", " note {o}", *options.split()]
    if command == "online":
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("w1 w2\nw3 w4\nw5 w6\nw7 w8\n")
        user = ["--rule", "max_words=3", "--wish", "w1 w2", "--batch-size", "2", "--max-steps", "2"]
        assert online.main([str(prompts), *common, *user]) == 0
        assert (tmp_path / "out" / "model" / "adapter_config.json").exists()
        return
    lines = iter(["w1 w2", "/teach w3 w4", f"/save {tmp_path / 'saved'}", None])
    monkeypatch.setattr(MessageReader, "read", lambda self, question: next(lines))
    assert chat.main(common) == 0
    assert (tmp_path / "saved" / "adapter_config.json").exists()
