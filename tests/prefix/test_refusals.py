"""What sharing would get wrong is refused by name; heads are read or refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastsdpo.prefix import (
    check_head,
    check_passes,
    check_sharing,
    head_parameters,
    shared_forward,
)

SHAPE = dict(
    vocab_size=211,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=4,
    pad_token_id=0,
)


def build(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "qwen3_moe", "gpt2", "granite", "cohere"])
def test_supported_models_pass_the_checks(lab, name):
    model = lab.tiny_model(name, torch.float32)
    assert check_sharing(model) == (True, "")
    assert check_head(model) == (True, "")
    assert check_sharing(model, attention="dense") == (True, "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checks_allow_for_rounding(lab, dtype):
    model = lab.tiny_model("qwen3", dtype)
    assert check_sharing(model) == (True, "")
    assert check_head(model) == (True, "")


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
    assert check_sharing(model) == (True, "")
    assert check_head(model) == (True, "")


def test_a_backend_asked_for_by_name_is_not_replaced(lab):
    with pytest.raises(ValueError, match="attention='flash' needs the package flash-attn"):
        check_sharing(lab.tiny_model("llama"), attention="flash")


def refused(lab, model, words):
    ok, reason = check_sharing(model)
    assert not ok and words in reason, reason
    with pytest.raises(NotImplementedError, match=r"sharing must be 'off'|shared prefixes"):
        shared_forward(model, lab.conversation(2))
    shared_forward(model, lab.conversation(1), sharing="off")  # which works with any model


def test_attention_softcap(lab):
    config = transformers.Gemma2Config(**SHAPE, head_dim=8, attn_logit_softcapping=20.0)
    refused(lab, build(config), "softcaps its attention scores")


def test_attention_sinks(lab):
    shape = SHAPE | {"num_hidden_layers": 1}
    config = transformers.GptOssConfig(**shape, head_dim=8, num_local_experts=4, layer_types=["full_attention"])
    refused(lab, build(config), "attention s_aux")


def test_recurrent_layers(lab):
    config = transformers.MambaConfig(
        vocab_size=211, hidden_size=32, state_size=4, num_hidden_layers=2, use_mambapy=False
    )
    refused(lab, build(config), "recurrent layers")


def test_hybrid_layers(lab):
    config = transformers.Qwen3NextConfig(
        **SHAPE,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    ok, reason = check_sharing(build(config))
    assert not ok and ("linear_attention" in reason or "recurrent" in reason)


def test_chunked_attention(lab):
    model = lab.tiny_model("llama", torch.float32)
    model.config.layer_types = ["chunked_attention", "full_attention", "chunked_attention"]
    refused(lab, model, "layers of type chunked_attention")


def test_position_ids_ignored(lab):
    """ALiBi takes distances from the order of tokens, which branches do not keep."""
    config = transformers.BloomConfig(vocab_size=211, hidden_size=32, n_layer=2, n_head=4)
    model = build(config)
    ok, reason = check_sharing(model)
    assert not ok and reason


def test_positions_that_are_not_used_are_found(lab):
    """The numerical check alone finds a model that takes the position ids and forgets them."""
    model = lab.tiny_model("llama", torch.float32)
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None])
    ok, reason = check_sharing(model)
    assert not ok and "independent passes differ" in reason


def test_window_that_the_attention_does_not_get(lab):
    """A layer that is said to slide but would be computed without its window."""
    model = lab.tiny_model("llama", torch.float32)
    model.config.sliding_window = 8
    ok, reason = check_sharing(model)
    assert not ok and "sliding window 8 by its configuration, but passes None" in reason


def test_rotary_that_changes_with_length(lab):
    model = lab.tiny_model(
        "llama",
        torch.float32,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    with pytest.raises(NotImplementedError, match="dynamic rotary embeddings change beyond 32"):
        shared_forward(model, lab.conversation(4))


def test_rotary_embeddings_of_single_kinds_of_layers(lab):
    """The length stands with the kind; the configuration's positions are the extended ones."""
    model = lab.tiny_model("llama", torch.float32)
    model.config.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 32},
    }
    with pytest.raises(NotImplementedError, match="longrope rotary embeddings change beyond 32"):
        shared_forward(model, lab.conversation(4))


def test_dynamic_rotary_embeddings_forget_the_pass_before(lab):
    """Each sequence has the frequencies of its own length, as in a model that has seen no other."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    shape = {"max_position_embeddings": 32, "rope_parameters": rope}
    model, items = lab.tiny_model("llama", **shape), lab.conversation(4)[::-1]  # the longest first
    states = shared_forward(model, items, sharing="off")
    head = head_parameters(model)
    for hidden, teacher in ((states.student_hidden, False), (states.teacher_hidden, True)):
        alone = [lab.independent_logps(lab.tiny_model("llama", **shape), [i], teacher=teacher) for i in items]
        found = lab.hidden_logps(hidden, states.target_ids, head)
        assert (found - torch.cat(alone)).abs().max() < 1e-5


def test_router_auxiliary_loss(lab):
    model = lab.tiny_model("qwen3_moe", torch.float32)
    model.config.output_router_logits = True
    refused(lab, model, "output_router_logits=True")


def test_active_dropout(lab):
    import peft

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


def adapter(name):
    import peft

    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    if name == "PROMPT_TUNING":
        return peft.PromptTuningConfig(**options)
    if name == "PREFIX_TUNING":
        return peft.PrefixTuningConfig(**options)
    if name == "P_TUNING":
        return peft.PromptEncoderConfig(**options)
    if name == "MULTITASK_PROMPT_TUNING":
        return peft.MultitaskPromptTuningConfig(**options, num_tasks=2)
    if name == "CPT":
        four = [1, 2, 3, 4]
        return peft.CPTConfig("CAUSAL_LM", cpt_token_ids=four, cpt_tokens_type_mask=four)
    if name == "POLY":
        return peft.PolyConfig(target_modules=["q_proj"], r=4)
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("PROMPT_TUNING", "the PROMPT_TUNING adapter puts virtual tokens into the sequence"),
        ("PREFIX_TUNING", "the PREFIX_TUNING adapter puts virtual tokens into the sequence"),
        ("P_TUNING", "the P_TUNING adapter puts virtual tokens into the sequence"),
        ("MULTITASK_PROMPT_TUNING", "adapter puts virtual tokens into the sequence"),
        ("CPT", "the CPT adapter puts virtual tokens into the sequence"),
        ("POLY", "the POLY adapter needs task_ids"),
        ("aLoRA", "the LORA adapter looks for its alora_invocation_tokens"),
    ],
)
def test_adapters_above_the_decoder(lab, name, words):
    """Calls of the decoder alone would lack them: also without sharing."""
    import peft

    adapted = peft.get_peft_model(lab.tiny_model("llama", torch.float32), adapter(name))
    for sharing in ("off", "conversation"):
        with pytest.raises(NotImplementedError, match=words):
            shared_forward(adapted, lab.conversation(1), sharing=sharing)
    with pytest.raises(NotImplementedError, match=words):
        shared_forward(lab.tiny_model("llama"), lab.conversation(1), teacher_model=adapted, sharing="off")
    ok, reason = check_sharing(adapted)
    assert not ok and words in reason


def test_experts_weighed_by_a_pass_of_their_own(lab, tmp_path):
    import peft

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


def test_head_scales(lab):
    gemma = head_parameters(lab.tiny_model("gemma3"))
    assert (gemma.softcap, gemma.logit_scale) == (5.0, 1.0)
    assert head_parameters(lab.tiny_model("granite")).logit_scale == 0.25
    assert head_parameters(lab.tiny_model("cohere")).logit_scale == 0.25
    llama = head_parameters(lab.tiny_model("llama"))
    assert (llama.bias, llama.softcap, llama.logit_scale) == (None, None, 1.0)


def test_unknown_heads_are_refused(lab):
    model = lab.tiny_model("llama", torch.float32)
    model.config.logits_scaling = 2.0  # divides in Granite, multiplies in others
    with pytest.raises(NotImplementedError, match="logits_scaling of model type 'llama'"):
        head_parameters(model)
    assert not check_head(model)[0]
    del model.config.logits_scaling
    model.config.lm_head_multiplier = 0.5
    with pytest.raises(NotImplementedError, match="lm_head_multiplier is not supported"):
        head_parameters(model)
    del model.config.lm_head_multiplier
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 211))
    with pytest.raises(NotImplementedError, match=r"must be a torch\.nn\.Linear, got Sequential"):
        head_parameters(model)


def test_check_head_finds_what_no_attribute_tells(lab):
    model = lab.tiny_model("llama", torch.float32)
    assert check_head(model) == (True, "")
    model.lm_head.register_forward_hook(lambda m, args, out: out * 0.5)
    ok, reason = check_head(model)
    assert not ok and "differ from those of its head's weights" in reason
