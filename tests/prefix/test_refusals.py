"""What sharing would get wrong is refused by name; heads are read or refused."""

import peft
import pytest
import torch

from benchmarks import tiny
from fastsdpo.prefix import check_head, check_passes, check_sharing, head_parameters, shared_forward
from fastsdpo.prefix.probe import probe_length

SUPPORTED = ["llama", "qwen3", "gemma3", "mistral", "qwen3_moe", "gpt2", "granite", "cohere", "bloom"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in SUPPORTED] + [("qwen3", torch.bfloat16), ("qwen3", torch.float16)],
)
def test_supported_models_pass_the_checks(lab, name, dtype):
    model = lab.tiny_model(name, dtype)
    assert check_sharing(model) == check_head(model) == check_sharing(model, attention="dense") == (True, "")


def test_checks_allow_for_autocast_inside_the_forward(lab):
    """Accelerate's way: float32 weights and float32 outputs, bfloat16 products."""
    model = lab.tiny_model("qwen3", torch.float32)
    forward = model.forward

    def autocast_forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = autocast_forward
    assert check_sharing(model) == check_head(model) == (True, "")


def test_a_backend_asked_for_by_name_is_not_replaced(lab):
    with pytest.raises(ValueError, match=r"attention='flash' needs torch\.nn\.attention"):
        check_sharing(lab.tiny_model("llama"), attention="flash")


def refused(lab, model, words):
    ok, reason = check_sharing(model)
    assert not ok and words in reason, reason
    with pytest.raises(NotImplementedError, match=r"sharing must be 'off'|shared prefixes"):
        shared_forward(model, lab.conversation(2))
    shared_forward(model, lab.conversation(1), sharing="off")  # which works with any model


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"layer_types": ["compressed_sparse_attention"] * 3}, "layers of type compressed_sparse_attention"),
        ("qwen3_moe", {"output_router_logits": True}, "output_router_logits=True"),
        # A layer that is said to slide but would be computed without its window.
        ("llama", {"sliding_window": 8}, "sliding window 8 by its configuration, but passes None"),
    ],
)
def test_refused_models(lab, name, changes, words):
    model = lab.tiny_model(name, torch.float32)
    for key, value in changes.items():
        setattr(model.config, key, value)
    refused(lab, model, words)


def test_positions_that_are_not_used_are_found(lab):
    """The numerical check alone finds a model that takes the position ids and forgets them."""
    model = lab.tiny_model("llama", torch.float32)
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None])
    ok, reason = check_sharing(model)
    assert not ok and "independent passes differ" in reason


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
DYNAMIC |= {"max_position_embeddings": 32}


def test_a_mask_of_the_layers_own(lab):
    """The plan's attention would leave it out: whatever its values are, and however short the passes."""
    model = lab.tiny_model("llama", torch.float32)

    def own_mask(_module, args, kwargs):
        tokens = kwargs["hidden_states"].shape[1]
        return args, {**kwargs, "attention_mask": torch.zeros(1, 1, tokens, tokens).tril()}

    model.model.layers[1].self_attn.register_forward_pre_hook(own_mask, with_kwargs=True)
    refused(lab, model, "layer 1 adds a mask of its own to its scores")


def test_what_changes_with_the_length_is_met(lab):
    """The probe is as long as what is trained, where a window or a chunk lets the model change there."""
    gemma = lab.tiny_model("gemma3", torch.float32)
    gemma.config.sliding_window = 100
    for layer in gemma.model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 100

    def by_place(_module, _args, output):
        place = torch.arange(output.shape[1])[None, :, None]
        return torch.where(place < 125, output, -output)

    gemma.model.layers[1].mlp.register_forward_hook(by_place)
    ok, reason = check_sharing(gemma)
    assert not ok and "independent passes differ" in reason
    assert check_sharing(gemma, longest=90) == (True, "")  # such a place is in no sequence of at most 90 tokens
    assert [probe_length(gemma, longest) for longest in (4096, 120, 90)] == [140, 120, 0]
    hybrid = tiny.build("qwen3_5_text")
    assert [probe_length(hybrid, longest) for longest in (4096, 120)] == [160, 120]
    assert probe_length(lab.tiny_model("llama"), 4096) == 0


# The length stands with the kind of layer; the configuration's positions are the extended ones.
BY_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 32},
}


def test_rotary_embeddings_that_change_with_the_length(lab):
    dynamic, longrope = lab.tiny_model("llama", torch.float32, **DYNAMIC), lab.tiny_model("llama", torch.float32)
    longrope.config.rope_parameters = BY_LAYER
    for kind, model in (("dynamic", dynamic), ("longrope", longrope)):
        with pytest.raises(NotImplementedError, match=f"{kind} rotary embeddings change beyond 32"):
            shared_forward(model, lab.conversation(4))


def test_dynamic_rotary_embeddings_forget_the_pass_before(lab):
    """Each sequence has the frequencies of its own length, as in a model that has seen no other."""
    model, items = lab.tiny_model("llama", **DYNAMIC), lab.conversation(4)[::-1]  # the longest first
    states = shared_forward(model, items, sharing="off")
    head = head_parameters(model)
    for hidden, teacher in ((states.student_hidden, False), (states.teacher_hidden, True)):
        alone = [lab.independent_logps(lab.tiny_model("llama", **DYNAMIC), [i], teacher=teacher) for i in items]
        found = lab.hidden_logps(hidden, states.target_ids, head)
        assert (found - torch.cat(alone)).abs().max() < 1e-5


def test_active_dropout(lab):
    gpt2 = lab.tiny_model("gpt2", torch.float32)
    gpt2.transformer.drop.p = 0.1
    refused(lab, gpt2, "dropout is active (transformer.drop")
    gpt2.eval()
    assert check_sharing(gpt2) == (True, "")

    model = lab.tiny_model("llama", torch.float32)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    refused(lab, model, "attention dropout 0.1")

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.05)
    lora = peft.get_peft_model(lab.tiny_model("llama", torch.float32), config)
    refused(lab, lora, "lora_dropout")


VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
FOUR = [1, 2, 3, 4]
ADAPTERS = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**VIRTUAL),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(**VIRTUAL),
    "P_TUNING": lambda: peft.PromptEncoderConfig(**VIRTUAL),
    "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(**VIRTUAL, num_tasks=2),
    "CPT": lambda: peft.CPTConfig("CAUSAL_LM", cpt_token_ids=FOUR, cpt_tokens_type_mask=FOUR),
    "POLY": lambda: peft.PolyConfig(target_modules=["q_proj"], r=4),
    "LORA": lambda: peft.LoraConfig("CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6]),
}
WORDS = {"POLY": "needs task_ids", "LORA": "looks for its alora_invocation_tokens"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_above_the_decoder(lab, name):
    """Calls of the decoder alone would lack them: also without sharing."""
    adapted = peft.get_peft_model(lab.tiny_model("llama", torch.float32), ADAPTERS[name]())
    words = f"the {name} adapter {WORDS.get(name, 'puts virtual tokens into the sequence')}"
    teacher = {"teacher_model": adapted, "sharing": "off"}
    for model, options in ((adapted, {}), (adapted, {"sharing": "off"}), (lab.tiny_model("llama"), teacher)):
        with pytest.raises(NotImplementedError, match=words):
            shared_forward(model, lab.conversation(1), **options)
    ok, reason = check_sharing(adapted)
    assert not ok and words in reason


def test_experts_weighed_by_a_pass_of_their_own(lab, tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(lab.tiny_model("llama"), lora).save_pretrained(tmp_path)
    model = lab.tiny_model("llama", torch.float32)
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters={"0": str(tmp_path)}
    )
    with pytest.raises(NotImplementedError, match="XLORA adapter weighs its experts"):
        shared_forward(peft.get_peft_model(model, config), lab.conversation(1), sharing="off")


def test_check_passes_finds_what_no_attribute_tells(lab):
    """Whatever stands above the decoder and changes what it is given."""
    model = lab.tiny_model("llama", torch.float32)
    assert check_passes(model) == (True, "")

    def shift(_module, _args, kwargs):
        return _args, {**kwargs, "input_ids": (kwargs["input_ids"] + 1) % 200}

    model.register_forward_pre_hook(shift, with_kwargs=True)
    ok, reason = check_passes(model)
    assert not ok and "its decoder, called alone, gives other logits" in reason


def test_unknown_heads_are_refused(lab):
    model = lab.tiny_model("llama", torch.float32)
    model.config.logits_scaling = 2.0  # divides in Granite, multiplies in others
    with pytest.raises(NotImplementedError, match="logits_scaling of model type 'llama'"):
        head_parameters(model)
    assert not check_head(model)[0]
    del model.config.logits_scaling
    model.config.output_multiplier = 0.5
    with pytest.raises(NotImplementedError, match="output_multiplier is not supported"):
        head_parameters(model)
    del model.config.output_multiplier
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 211))
    with pytest.raises(NotImplementedError, match=r"must be a torch\.nn\.Linear, got Sequential"):
        head_parameters(model)


def test_check_head_finds_what_no_attribute_tells(lab):
    model = lab.tiny_model("llama", torch.float32)
    assert check_head(model) == (True, "")
    model.lm_head.register_forward_hook(lambda m, args, out: out * 0.5)
    ok, reason = check_head(model)
    assert not ok and "differ from those of its head's weights" in reason
