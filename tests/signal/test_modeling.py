"""The loader: folders, GGUF files, and what it says when something is wrong."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsdpo.modeling import default_dtype, load_model_and_tokenizer
from tests.servers import serving


def copy_of(folder, tmp_path, *without):
    path = tmp_path / "copy"
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns(*without))
    return path


def test_folder(folder, model, tokenizer):
    loaded, its_tokenizer = load_model_and_tokenizer(folder)
    assert not loaded.training
    assert loaded.dtype == torch.float32 and loaded.device.type == "cpu"
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters()):
        assert torch.equal(a, b), name
    assert its_tokenizer("the é").input_ids == tokenizer("the é").input_ids
    assert its_tokenizer.pad_token == tokenizer.eos_token, "no pad token of its own"


def test_options(folder):
    settings = {"dtype": "bfloat16", "device": "cpu", "attn_implementation": "eager", "tokenizer": folder}
    loaded, _ = load_model_and_tokenizer(str(folder), **settings)
    assert (loaded.dtype, loaded.config._attn_implementation) == (torch.bfloat16, "eager")
    assert load_model_and_tokenizer(folder, dtype=torch.float64)[0].dtype == torch.float64


def test_default_dtype():
    assert default_dtype(torch.device("cpu")) == "float32"
    assert {default_dtype(torch.device(name)) for name in ("cuda", "cuda:1", "xpu", "mps")} == {"auto"}


def test_missing_weights(folder, tmp_path):
    path = copy_of(folder, tmp_path)
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights.*: lm_head.weight"):
        load_model_and_tokenizer(path)


def test_tokenizer_of_another_model(folder, tokenizer, tmp_path):
    path = copy_of(folder, tmp_path)
    larger = type(tokenizer).from_pretrained(folder)
    larger.add_tokens([f"extra{i}" for i in range(20)])
    larger.save_pretrained(path)
    with pytest.raises(ValueError, match=r"ids must be below the model's \d+ embedding rows, got"):
        load_model_and_tokenizer(folder, tokenizer=path)


def test_no_chat_template(folder, tmp_path):
    path = copy_of(folder, tmp_path, "chat_template*")
    with pytest.raises(ValueError, match="must have a chat template, got none; use an instruction"):
        load_model_and_tokenizer(path)
    _, tokenizer = load_model_and_tokenizer(path, require_chat_template=False)
    assert tokenizer.chat_template is None


def test_no_tokenizer(folder, tmp_path):
    path = copy_of(folder, tmp_path, "*token*")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer; copy the one of its base model"):
        load_model_and_tokenizer(path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./a", "model.gguf", "a/b/c"])
def test_nothing_there(name):
    with pytest.raises(FileNotFoundError, match=f"no such file or folder: {name}"):
        load_model_and_tokenizer(name)


def test_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"'nobody/nothing' is no local folder or file, and as a hub"):
        load_model_and_tokenizer("nobody/nothing")


@pytest.mark.parametrize("name", ["mistyped", "runs/mistyped"])
def test_the_hub_is_asked_once_for_what_it_does_not_have(name, monkeypatch, tmp_path):
    asked = []

    def answer(path, body):
        asked.append(path)
        return 404, b"", {"X-Error-Code": "RepoNotFound"}

    with serving(answer) as url:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        with pytest.raises(OSError, match=f"'{name}' is no local folder .* has no model of that name"):
            load_model_and_tokenizer(name)
    assert asked == [f"/api/models/{name}"]


def test_bad_options(folder):
    for options, error, message in (
        ({"dtype": "int8"}, ValueError, "dtype must be auto, float32, .*, got 'int8'"),
        ({"device": "toaster"}, ValueError, "device must be one that this PyTorch can use, got 'toaster'"),
        ({"gguf_file": "none.gguf"}, FileNotFoundError, "no such file: .*none.gguf"),
    ):
        with pytest.raises(error, match=message):
            load_model_and_tokenizer(folder, **options)


def test_folder_of_neither(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold config.json or a .gguf file, got nei"):
        load_model_and_tokenizer(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"PK\3\4....")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files, choose one .*: a.gguf, b.gguf"):
        load_model_and_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"b.gguf must be a GGUF file, but it starts with b'PK"):
        load_model_and_tokenizer(tmp_path / "b.gguf")
    with pytest.raises(ValueError, match="gguf_file needs a folder or hub id"):
        load_model_and_tokenizer(tmp_path / "b.gguf", gguf_file="a.gguf")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, model, tokenizer):
    """The tiny model as a GGUF file, its matrices quantized to 8 bits."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|start|>"),
        "unk_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template,
        "tokenizer_model": "gpt2",
    }.items():
        getattr(writer, f"add_{name}")(value)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"<pad{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in ("<|start|>", "<|end|>") else 1 for t in tokens])
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in pairs])

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:  # GGUF keeps the halves of a rotary head interleaved
                halves = weight.reshape(count, 2, -1, weight.shape[-1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
        data = weight.float().numpy()
        kind = gguf.GGMLQuantizationType.F32
        if data.ndim == 2 and data.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_becomes_an_ordinary_model(gguf_file, model, tokenizer, tmp_path):
    loaded, its_tokenizer = load_model_and_tokenizer(gguf_file)
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters()):
        assert (a - b).abs().max() <= a.abs().max() / 127, f"{name}: 8-bit rounding and no more"
    text = "the answer 🎉 is short"
    assert its_tokenizer(text).input_ids == tokenizer(text).input_ids
    assert its_tokenizer.chat_template == tokenizer.chat_template
    assert len(its_tokenizer) == model.config.vocab_size, "no token that the model lacks"
    assert max(its_tokenizer("<|endoftext|>").input_ids) < model.config.vocab_size
    # It trains, saves and loads like any other.
    assert not loaded.is_quantized and not hasattr(loaded.config, "quantization_config")
    loaded.train()
    ids = torch.tensor([its_tokenizer(text).input_ids])
    loaded(ids, labels=ids).loss.backward()
    assert loaded.get_input_embeddings().weight.grad.abs().sum() > 0
    loaded.save_pretrained(tmp_path)
    its_tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load_model_and_tokenizer(tmp_path)
    for (name, a), (_, b) in zip(loaded.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b), name
    assert tokenizer_again(text).input_ids == its_tokenizer(text).input_ids


def test_gguf_by_folder(gguf_file):
    by_folder, _ = load_model_and_tokenizer(gguf_file.parent, dtype="float16")
    assert by_folder.dtype == torch.float16
    named, _ = load_model_and_tokenizer(gguf_file.parent, gguf_file=gguf_file.name, dtype="auto", tokenizer=gguf_file)
    assert named.dtype == torch.float32


def test_gguf_without_its_packages(gguf_file, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find_spec(name, *a))
    with pytest.raises(ImportError, match="need the package gguf; install with: pip install gguf"):
        load_model_and_tokenizer(gguf_file)
