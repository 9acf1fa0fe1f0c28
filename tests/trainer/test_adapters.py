"""Adapters of PEFT: trained on from round to round, computed right, or refused by name."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastsdpo.cli import main as fastsdpo
from fastsdpo.modeling import load_model_and_tokenizer
from fastsdpo.train import main
from fastsdpo.trainer import SDPOTrainer
from tests.plain import answer_log_probs
from tests.trainer.conftest import command, report_of

peft = pytest.importorskip("peft")

LINEAR = ["q_proj", "v_proj", "down_proj"]


def lora(**changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    return peft.LoraConfig(**settings)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(6, 40)[None]).logits


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab):
    """``model/``, ``data.jsonl``, ``data.eval.jsonl``, and ``first/``, a run of `train --lora 4`."""
    folder = lab.make_place(tmp_path_factory.mktemp("adapters"))
    assert main(command(folder, folder / "first", "--lora", "4", "--quiet")) == 0
    return folder


@pytest.mark.parametrize("more", [[], ["--lora", "4", "--lora-alpha", "8"]], ids=["", "same-lora"])
def test_a_second_round_begins_where_the_first_ended(place, tmp_path, more):
    first, second = report_of(place / "first"), tmp_path / "second"
    assert first["after"]["eval_loss"] < 0.99 * first["before"]["eval_loss"]
    assert main(command(place, second, "--quiet", *more, model="first/model")) == 0
    report = report_of(second)
    assert report["before"]["eval_loss"] == pytest.approx(first["after"]["eval_loss"], rel=1e-5)
    assert report["after"]["eval_loss"] < 0.99 * report["before"]["eval_loss"]

    # Base model and saved adapter together are what was measured at the end.
    config = json.loads((second / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(place / "model"))
    assert main(command(place, tmp_path / "third", "--quiet", model=second / "model")) == 0
    third = report_of(tmp_path / "third")
    assert third["before"]["eval_loss"] == pytest.approx(report["after"]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora", "8"], "--lora must be left out for --model .*, got 8: it is a LoRA adapter with r=4"),
        (["--lora", "0"], "--lora must be left out for --model .*, got 0: it is a LoRA adapter with r=4"),
        (["--lora-alpha", "4"], "--lora-alpha must be left out .* LoRA adapter with --lora-alpha 8"),
    ],
)
def test_another_adapter_than_the_one_that_is_there(place, tmp_path, capsys, more, message):
    arguments = command(place, tmp_path / "out", *more, model="first/model")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_second_round_resumes_to_the_same_end(place, tmp_path):
    """With the frozen teacher, which is the adapter as the first round left it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--quiet", "--teacher", "frozen", "--schedule", "constant", "--save-steps", "1"]
    more += ["--set", "save_strategy=steps"]
    assert main(command(place, whole, *more, "--max-steps", "4", model="first/model")) == 0
    assert main(command(place, cut, *more, "--max-steps", "2", model="first/model")) == 0
    assert main(command(place, cut, *more, "--max-steps", "4", "--resume", model="first/model")) == 0
    ends = [load_model_and_tokenizer(folder / "model")[0] for folder in (whole, cut)]
    assert torch.equal(*map(logits, ends))


def test_the_frozen_teacher_is_the_adapter_as_it_was_at_the_start(place, lab, tmp_path):
    model, tokenizer = load_model_and_tokenizer(place / "first" / "model")
    start = logits(model)
    config = lab.make_config(tmp_path, teacher="frozen", max_steps=3)
    trainer = SDPOTrainer(model, config, lab.make_interactions(), processing_class=tokenizer)
    assert "frozen" in trainer.learner.copies
    trainer.train()
    assert float((logits(trainer.model) - start).abs().max()) > 1e-2
    with trainer.learner.initial.context():
        assert torch.equal(logits(trainer.model), start)

    # A new adapter needs no copy: switched off, it leaves the initial model.
    base, _ = load_model_and_tokenizer(place / "model")
    start = logits(base)
    trainer = SDPOTrainer(base, config, lab.make_interactions(), processing_class=tokenizer, peft_config=lora())
    assert "frozen" not in trainer.learner.copies
    trainer.train()
    with trainer.learner.initial.context():
        assert torch.equal(logits(trainer.model), start)


TOKENS = peft.TrainableTokensConfig(token_indices=[9, 10], target_modules=["embed_tokens"])
PISSA, BIASES = (lora(target_modules=LINEAR, **more) for more in ({"init_lora_weights": "pissa"}, {"bias": "all"}))


@pytest.mark.parametrize("adapter", [PISSA, TOKENS, BIASES], ids=["pissa", "tokens", "bias"])
def test_a_new_adapter_that_changes_the_model_has_a_copy(lab, tmp_path, adapter):
    """PiSSA takes its first weights out of the base model's; a token's row is seldom looked at; biases that are
    trained stay in use while the adapter is off."""
    model = lab.make_model(tie_word_embeddings=False, attention_bias=True)
    start = logits(model)
    trainer = lab.make_trainer(tmp_path, model=model, peft_config=adapter, teacher="frozen", max_steps=2)
    trainer.train()
    assert "frozen" in trainer.learner.copies
    with trainer.learner.initial.context():
        torch.testing.assert_close(logits(trainer.model), start, rtol=1e-4, atol=1e-4)


def test_a_name_that_is_an_adapter(place, lab, tmp_path):
    folder = str(place / "first" / "model")
    config = lab.make_config(tmp_path, max_steps=1)
    trainer = SDPOTrainer(folder, config, lab.make_interactions())
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    with pytest.raises(ValueError, match="peft_config must be None, the model has an adapter"):
        SDPOTrainer(folder, config, lab.make_interactions(), peft_config=lora())


def test_models_whose_adapter_would_be_lost_or_is_frozen(place, lab, tmp_path):
    folder = place / "first" / "model"
    tokenizer = lab.make_tokenizer()
    injected = AutoModelForCausalLM.from_pretrained(folder)
    for adapter in (None, lora()):
        with pytest.raises(ValueError, match="got a transformers model with an adapter in its layers"):
            SDPOTrainer(injected, lab.make_config(tmp_path), processing_class=tokenizer, peft_config=adapter)
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    frozen = peft.PeftModel.from_pretrained(base, folder)
    with pytest.raises(ValueError, match=r"all are frozen \(load an adapter with is_trainable=True\)"):
        SDPOTrainer(frozen, lab.make_config(tmp_path), processing_class=tokenizer)
    beside = peft.get_peft_model(lab.make_model(), lora())
    beside.get_base_model().model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 weights beside its adapter.*model\.norm\.weight.*modules_to_save"):
        SDPOTrainer(beside, lab.make_config(tmp_path), processing_class=tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loading_puts_the_adapter_on_its_base(place, dtype):
    model, tokenizer = load_model_and_tokenizer(place / "first" / "model", dtype=dtype)
    assert isinstance(model, peft.PeftModel) and not model.training
    assert len(tokenizer) == 67
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=dtype)
    by_hand = peft.PeftModel.from_pretrained(base, place / "first" / "model")
    assert torch.equal(logits(model), logits(by_hand))
    assert {p.dtype for p in model.get_base_model().model.norm.parameters()} == {dtype}


def test_an_adapter_without_a_tokenizer_takes_its_base_s(place, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(place / "first" / "model" / name, tmp_path / name)
    _, tokenizer = load_model_and_tokenizer(tmp_path)
    assert len(tokenizer) == 67


def broken(place, folder, **changes):
    shutil.copytree(place / "first" / "model", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


GONE = r"base_model_name_or_path of .*adapter_config.json: no such file or folder: /nowhere/base"


def test_adapters_that_cannot_be_loaded(place, tmp_path):
    first = str(place / "first" / "model")
    for name, changes, error, message in (
        ("gone", {"base_model_name_or_path": "/nowhere/base"}, FileNotFoundError, GONE),
        ("nameless", {"base_model_name_or_path": None}, ValueError, "must be a folder or hub id, got None"),
        (
            "elsewhere",
            {"base_model_name_or_path": "runs/base"},
            OSError,
            r"adapter_config.json: 'runs/base' is no local folder or file",
        ),
        ("chain", {"base_model_name_or_path": first}, ValueError, r"must be a whole model, but .* is an adapter too"),
        ("other", {"r": 2}, ValueError, r"the adapter in .* cannot be put on its base model"),
    ):
        with pytest.raises(error, match=message):
            load_model_and_tokenizer(broken(place, tmp_path / name, **changes))
    missing = broken(place, tmp_path / "missing", target_modules=[*LINEAR, "o_proj", "up_proj"])
    weights = load_file(missing / "adapter_model.safetensors")
    some = {name: value for name, value in weights.items() if "o_proj" not in name}
    save_file(some, missing / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="Found missing adapter keys"):
        load_model_and_tokenizer(missing)
    both = broken(place, tmp_path / "both")
    shutil.copy(place / "model" / "config.json", both)
    shutil.copy(place / "model" / "model.safetensors", both)
    with pytest.raises(ValueError, match="must hold a model or an adapter, got both"):
        load_model_and_tokenizer(both)


def by_definition(model, items):
    """Mean over the answers' tokens of KL(student || teacher), each from a pass of its own."""
    total, count = 0.0, 0
    with torch.no_grad():
        for item in items:
            student, teacher = (
                answer_log_probs(model, prompt, item.completion_ids, torch.float64)
                for prompt in (item.prompt_ids, item.teacher_prompt_ids)
            )
            total += float((student.exp() * (student - teacher)).sum())
            count += len(item.completion_ids)
    return total / count


COMPUTED = {
    "lora": lora(lora_dropout=0.2),
    "dora": lora(use_dora=True, target_modules=LINEAR),
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "modules_to_save": lora(modules_to_save=["lm_head"]),
    "ia3": peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(target_modules=LINEAR, r=4, rank_dropout=0.2, module_dropout=0.2),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, module_dropout=0.2),
    "tokens": peft.TrainableTokensConfig(token_indices=[9, 10], target_modules=["embed_tokens"]),
    "adaption_prompt": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2),
    "lily": peft.LilyConfig(target_modules=LINEAR, r=4),
}
for _config in COMPUTED.values():
    _config.task_type = "CAUSAL_LM"


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_loss_is_that_of_two_passes_of_the_adapted_model(lab, tmp_path, name, training):
    model = peft.get_peft_model(lab.make_model(tie_word_embeddings=False), COMPUTED[name])
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn_like(weight)
    trainer = lab.make_trainer(tmp_path, model=model, normalization="token", interactions=lab.make_interactions(2))
    items = [trainer.train_dataset[index] for index in range(4)]
    model.train(training)
    with torch.no_grad():
        loss = float(trainer.run_pass(model, items, sum(len(i.completion_ids) for i in items))[0])
    model.eval()
    assert loss == pytest.approx(by_definition(model, items), rel=1e-4)


def test_a_saved_prompt_is_refused(place, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "prompt")
    assert main(command(place, tmp_path / "out", model=tmp_path / "prompt")) == 1
    assert "PROMPT_TUNING adapter puts virtual tokens" in capsys.readouterr().err


def test_merge_is_that_of_peft_and_keeps_the_dtype(place, tmp_path, capsys):
    """`fastsdpo merge` of a trained adapter on a bfloat16 model; its files are as servers read them."""
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    load_model_and_tokenizer(place / "model")[1].save_pretrained(tmp_path / "base")
    options = command(place, tmp_path / "run", "--lora", "4", "--quiet")
    options[2] = str(tmp_path / "base")
    assert main(options) == 0
    adapter = tmp_path / "run" / "model"
    assert fastsdpo(["merge", "--model", str(adapter), "-o", str(tmp_path / "merged")]) == 0
    assert "bfloat16" in capsys.readouterr().out
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    expected = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    assert whole.dtype == torch.bfloat16
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto").state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value), name
        assert torch.equal(before[name], value) != ("proj" in name), name
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "12 interactions" in card and "library_name: transformers" in card and "AutoPeft" not in card
    # What vLLM asks of an adapter (docs/serving.md).
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8 and isinstance(config["target_modules"], list)
    assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none"
    for name in load_file(adapter / "adapter_model.safetensors"):
        assert re.fullmatch(r"base_model\.model\.model\.layers\.\d+\.\w+\.\w+_proj\.lora_[AB]\.weight", name), name
    # Refused: another model in that place, and what is no adapter.
    held = "holds a model; pass --overwrite"
    beside = "--output must not be the folder of an adapter"
    refused = [(adapter, "merged", held), (adapter, "run/model", beside)]
    refused.append((tmp_path / "base", "other", "must be the folder or hub id"))
    for model, name, said in refused:
        output = tmp_path / name
        assert fastsdpo(["merge", "--model", str(model), "-o", str(output)]) == 1
        assert said in capsys.readouterr().err


def test_an_adapter_that_goes_on_with_another_base_is_told(place, tmp_path, caplog):
    shutil.copytree(place / "model", tmp_path / "other")
    for model, steps, more in (("model", "1", []), (tmp_path / "other", "2", ["--resume"])):
        saved = ("--set", "save_strategy=steps", "--save-steps", "1")
        run = command(place, tmp_path / "out", "--lora", "4", "--max-steps", steps, *saved, *more, model=model)
        assert main(run) == 0
    said = f"was trained on {place / 'model'}, and goes on with {tmp_path / 'other'}; they must be one model"
    assert said in caplog.text
