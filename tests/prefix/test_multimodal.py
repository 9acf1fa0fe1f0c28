"""Text on models that also take images: what their forward pass demands of text is given."""

import pytest
import torch
import transformers

from fastsdpo.prefix import check_head, check_passes, check_sharing, head_parameters, shared_forward
from tests.prefix import conftest

SHAPE = conftest.SHAPE | dict(num_hidden_layers=2)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
TEXT = SHAPE | SPECIAL | dict(head_dim=8)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
HEADS = dict(num_key_value_heads=2, head_dim=16)
ADAPTER = HEADS | dict(vision_feature_layer=[-1], hidden_size=32, num_attention_heads=2, intermediate_size=32)
ROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
OPTIONS = {
    "Gemma3": dict(
        text_config=TEXT | dict(sliding_window=8),
        vision_config=VISION | dict(image_size=28),
        **dict(mm_tokens_per_image=1, image_token_index=205, boi_token_index=206, eoi_token_index=207),
    ),
    "Llama4": dict(
        text_config=TEXT | dict(num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=8),
        vision_config=VISION
        | dict(image_size=28, vision_output_dim=32, projector_input_dim=32)
        | dict(projector_output_dim=32, pixel_shuffle_ratio=0.5),
        image_token_index=205,
    ),
    "Molmo2": dict(
        text_config=SHAPE | dict(head_dim=8, additional_vocab_size=8),
        vision_config=VISION | HEADS | dict(image_size=[28, 28], num_position_embeddings=5),
        **dict(adapter_config=ADAPTER | dict(text_hidden_size=32), image_patch_id=205),
    ),
    "Qwen2VL": dict(
        text_config=SHAPE | SPECIAL | dict(rope_parameters=ROPE),
        vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2),
        **dict(image_token_id=205, video_token_id=206, vision_start_token_id=207),
    ),
    "PaliGemma": dict(
        text_config=TEXT | dict(model_type="gemma"),
        vision_config=VISION | dict(model_type="siglip_vision_model", image_size=28),
        **dict(image_token_id=205, projection_dim=32),
    ),
}


def build(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**OPTIONS[name])
    model = transformers.AutoModelForImageTextToText.from_config(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def demand(model, name):
    """In training a pass without ``name`` is refused, as some versions of transformers do."""

    def refuse(module, _args, kwargs):
        if module.training and kwargs.get(name) is None:
            raise ValueError(f"`{name}` is required as a model input when training")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.parametrize(
    ("name", "demanded", "shares"),
    [
        ("Gemma3", "token_type_ids", True),
        ("Llama4", None, True),  # its decoder is a causal LM, with the head inside
        ("Molmo2", "mm_token_type_ids", True),
        ("Qwen2VL", "mm_token_type_ids", True),
        ("PaliGemma", None, False),  # its zeros are a prefix in which tokens see those behind them
    ],
)
def test_text_equals_the_model_s_own_passes(lab, name, demanded, shares):
    model, items = build(name), lab.conversation(2)
    model.eval()  # nothing is demanded, and no kind of token is given
    with torch.no_grad():
        wanted = [lab.independent_logps(model, items, teacher=teacher) for teacher in (False, True)]
    model.train()
    if demanded is not None:
        demand(model, demanded)
    assert check_head(model) == (True, "")
    assert check_passes(model) == (True, "")
    assert check_sharing(model)[0] == shares
    for sharing in ("off", "conversation") if shares else ("off",):
        states = shared_forward(model, items, sharing=sharing)
        head = head_parameters(model)
        for hidden, logps in zip((states.student_hidden, states.teacher_hidden), wanted):
            found = lab.hidden_logps(hidden, states.target_ids, head)
            assert (found - logps).abs().max() < 1e-3
