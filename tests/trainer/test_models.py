"""What single families of models ask for."""

from __future__ import annotations

import pytest
import torch
import transformers


def gemma3(demanding):
    """With images; ``demanding``: as in some versions of transformers, which refuse to train without
    the kinds of the tokens."""
    torch.manual_seed(0)
    text = dict(
        vocab_size=68, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, sliding_window=8,
        pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                  image_size=28, patch_size=14)  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1,
                                  image_token_index=65, boi_token_index=66, eoi_token_index=67)
    )  # fmt: skip

    def demand(module, _args, kwargs):
        if module.training and kwargs.get("token_type_ids") is None:
            raise ValueError("`token_type_ids` is required as a model input when training")

    if demanding:
        model.model.register_forward_pre_hook(demand, with_kwargs=True)
    return model


@pytest.mark.parametrize("settings", [{}, {"sharing": "off", "teacher": "ema"}])
def test_a_model_with_images_is_trained_on_text(tmp_path, lab, settings):
    found = []
    for demanding in (False, True):
        made = lab.make_trainer(tmp_path, model=gemma3(demanding), max_steps=2, **settings)
        made.train()
        found.append([row["loss"] for row in made.state.log_history if "loss" in row])
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=1e-6)
