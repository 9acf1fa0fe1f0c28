"""Adapters through the doors of all integrations; `peers/test_bitsandbytes.py` adds packed weights."""

import contextlib
import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastsdpo.integrations._head_logits import HeadLogits
from fastsdpo.integrations.axolotl import KDSettings, kd_loss
from fastsdpo.integrations.swift import GKDSettings, divergence
from fastsdpo.integrations.transformers import fused_logps
from fastsdpo.ops.divergence import sdpo_loss
from fastsdpo.prefix import check_head, head_parameters, no_grad_pass, run_inside
from fastsdpo.quantized import keep_differentiable

peft = pytest.importorskip("peft")

LAYERS = ["q_proj", "v_proj", "down_proj"]


def lora(*more, **changes):
    return peft.LoraConfig(
        **{"r": 4, "target_modules": [*LAYERS, *more], "task_type": "CAUSAL_LM", "init_lora_weights": False, **changes}
    )


ADAPTERS = {
    "lora": lora(),
    "lora-head": lora("lm_head"),
    "lora-embeddings-head": lora("embed_tokens", "lm_head"),
    "dora": lora(use_dora=True),
    "dora-head": lora("lm_head", use_dora=True),
    "modules-to-save": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "tokens": lora(trainable_token_indices=[9, 10]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
IDS = torch.randint(6, 60, (2, 9), generator=torch.Generator().manual_seed(5))
LABELS = torch.where(torch.arange(9) >= 4, IDS, -100)


def adapted(model, adapter):
    """An adapter of `ADAPTERS` that changes something, on ``model``."""
    torch.manual_seed(8)
    model = peft.get_peft_model(model, copy.deepcopy(ADAPTERS[adapter]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.train()


def make(folder, adapter=None, **given):
    model = AutoModelForCausalLM.from_pretrained(folder, **given)
    return adapted(model, adapter) if adapter else model.train()


def bits_and_bytes(bits, **more):
    packing = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
    return BitsAndBytesConfig(**packing, bnb_4bit_compute_dtype=torch.float32, **more)


def packed(folder, bits, adapter=None, **more):
    """A base that bitsandbytes packs in 4 or 8 bits, with an adapter of `ADAPTERS`."""
    given = {"quantization_config": bits_and_bytes(bits, **more), "device_map": {"": "cpu"}, "dtype": torch.float32}
    model = make(folder, adapter, **given)
    keep_differentiable(model)  # else layers of this size cannot even be evaluated where a CPU has AVX512-BF16
    return model


def doors(model):
    """Losses without logits, each beside the same from the model's own; the teacher is the model without adapters."""
    off = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    counts = LABELS[:, 1:] != -100
    with no_grad_pass(), off:
        head = run_inside(model, lambda hidden: (hidden, head_parameters(model).weight.detach()), {"input_ids": IDS})
        states = head[0]
        teacher = HeadLogits(states[:, :-1][counts], head_parameters(model)._replace(weight=head[1]))
        target = model(input_ids=IDS).logits[:, :-1][counts].float()
    logits = model(input_ids=IDS).logits[:, :-1].float()
    ids = LABELS[:, 1:]
    logps = fused_logps(model, IDS, None, LABELS)[:, 1:][counts]
    wanted = logits.log_softmax(-1).gather(-1, ids.clamp(min=0)[..., None])[..., 0][counts]
    yield "log-probs", logps.sum(), wanted.sum()
    settings = GKDSettings(0.4, 1.3)

    def swift(hidden):
        return divergence(HeadLogits(hidden[:, :-1][counts], head_parameters(model)), teacher, None, settings)[0]

    logits = model(input_ids=IDS).logits[:, :-1].float()
    full = {"mode": "full", "alpha": 0.4, "temperature": 1.3}
    want = sdpo_loss(logits[counts], target, ids[counts], backend="reference", **full).loss
    yield "divergence", run_inside(model, swift, {"input_ids": IDS}), want
    values, support = target.log_softmax(-1).topk(5)
    data = [torch.zeros(2, 9, 5, dtype=one.dtype) for one in (support, values)]
    where = torch.nn.functional.pad(counts, (0, 1))
    for whole, part in zip(data, (support, values)):
        whole[where] = part
    mask = where[..., None].expand(2, 9, 5)

    def axolotl(hidden):
        return kd_loss(hidden, head_parameters(model), LABELS, *data, mask, KDSettings(1.0, normalize_topk=True))

    logits = model(input_ids=IDS).logits[:, :-1].float()[counts]
    student, taught = logits.gather(-1, support).log_softmax(-1), values.log_softmax(-1)
    yield "top-k", run_inside(model, axolotl, {"input_ids": IDS}), (taught.exp() * (taught - student)).sum()


def compare(model, rtol):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name, loss, want in doors(model):
        assert want.abs() > 1e-4, name
        torch.testing.assert_close(loss.float(), want.float(), rtol=rtol, atol=rtol / 10)
        got, wanted = (torch.autograd.grad(one, trained, allow_unused=True) for one in (loss, want))
        scale = max(grad.abs().max() for grad in wanted if grad is not None)
        assert scale > 0
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        for parameter_name, one, other in zip(names, got, wanted, strict=True):
            assert (one is None) == (other is None), f"{name}: {parameter_name}"
            if one is not None:
                assert (one - other).abs().max() <= 10 * rtol * scale, f"{name}: {parameter_name}"


TIED = ("lora-head", "lora-embeddings-head", "modules-to-save", "tokens")


# PEFT warns of adapters on tied weights, which are compared here as they are.
@pytest.mark.filterwarnings("ignore:.*(tie|tying|tied):UserWarning")
@pytest.mark.parametrize(
    ("adapter", "folder"),
    [*((a, "qwen2_folder") for a in ADAPTERS if a != "tokens"), *((a, "llama_folder") for a in TIED)],
)
def test_adapters(adapter, folder, request):
    model = make(request.getfixturevalue(folder), adapter)
    assert check_head(model) == (True, "")
    compare(model, 1e-5)


def test_adapters_on_the_head_that_are_refused_name_the_remedy(qwen2_folder):
    cases = {
        "set lora_dropout=0": lora("lm_head", lora_dropout=0.1),
        "leave the head out of its target_modules": peft.IA3Config(
            target_modules=["k_proj", "lm_head"], feedforward_modules=[]
        ),
    }
    for message, config in cases.items():
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(qwen2_folder), config)
        with pytest.raises(NotImplementedError, match=message):
            head_parameters(model)
