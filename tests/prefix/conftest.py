"""Tiny models of the families that matter, tokenized conversations, and independent passes."""

import copy
import types
from types import SimpleNamespace

import pytest
import torch
import transformers

from fastsdpo.prefix import head_parameters, shared_forward
from tests.plain import answer_logps

VOCABULARY = 211
BOS, USER, MODEL, END, THINK, THINK_END, HINDSIGHT = range(1, 8)
WINDOW = 24  # shorter than the sequences, so sliding layers matter
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, max_position_embeddings=512)
HEAD = SHAPE | dict(head_dim=16)
GEMMA3 = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
GEMMA3 |= dict(query_pre_attn_scalar=16, final_logit_softcapping=5.0)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
GPT2 = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=512)
CONFIGS = {
    "llama": (transformers.LlamaConfig, SHAPE),
    "qwen3": (transformers.Qwen3Config, HEAD),
    "gemma3": (transformers.Gemma3TextConfig, HEAD | GEMMA3),
    "mistral": (transformers.MistralConfig, HEAD | dict(sliding_window=WINDOW)),
    "qwen3_moe": (transformers.Qwen3MoeConfig, HEAD | MOE),
    "granite": (transformers.GraniteConfig, SHAPE | dict(logits_scaling=4.0, attention_multiplier=0.2)),
    "cohere": (transformers.CohereConfig, SHAPE | dict(logit_scale=0.25)),
    "gpt2": (transformers.GPT2Config, GPT2 | dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)),
    "gemma2": (transformers.Gemma2Config, HEAD | dict(attn_logit_softcapping=20.0)),
    # Attention of its own, and ALiBi.
    "bloom": (transformers.BloomConfig, dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
}


def tokenized(prompt, teacher_prompt, completion):
    return SimpleNamespace(
        prompt_ids=list(prompt), teacher_prompt_ids=list(teacher_prompt), completion_ids=list(completion)
    )


def conversation(turns, *, think=False, seed=0):
    """The interactions of one conversation, as a chat template would render them.

    ``think`` renders as Qwen3's template does: an empty think block before the answer that is being
    generated and none before the answers in the history, so histories branch off the fresh answers.
    """
    generator = torch.Generator().manual_seed(seed)

    def text():
        length = int(torch.randint(4, 14, (), generator=generator))
        return torch.randint(10, VOCABULARY, (length,), generator=generator).tolist()

    messages = [text() for _ in range(2 * turns + 1)]
    items, history, generation = [], [BOS], [MODEL, THINK, THINK_END] if think else [MODEL]
    for t in range(0, 2 * turns, 2):
        user, answer, followup = messages[t : t + 3]
        prompt = [*history, USER, *user, END, *generation]
        teacher_prompt = [*history, USER, *user, HINDSIGHT, *followup, END, *generation]
        items.append(tokenized(prompt, teacher_prompt, [*answer, END]))
        history += [USER, *user, END, MODEL, *answer, END]
    return items


def tiny_model(name, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    kind, options = CONFIGS[name]
    config = kind(**options, bos_token_id=BOS, eos_token_id=END, pad_token_id=None, experts_implementation="eager")
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if dtype == torch.float64:
        norms_in_float64(model)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that attention and norms matter
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def norms_in_float64(model):
    """transformers computes norms and routers in float32 whatever the model's dtype; the rounding
    would hide what is tested here."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):  # bound methods, which a deep copy binds to the copy
            module.forward = types.MethodType(_norm, module)
        elif kind.endswith("TopKRouter"):
            module.forward = types.MethodType(_route, module)


def _norm(module, x):
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    offset = 1.0 if "Gemma" in type(module).__name__ else 0.0
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (module.weight + offset)


def _route(module, x):
    logits = x.reshape(-1, module.hidden_dim) @ module.weight.T
    scores, experts = torch.topk(logits.softmax(-1), module.top_k, dim=-1)
    if module.norm_topk_prob:
        scores = scores / scores.sum(-1, keepdim=True)
    return logits, scores, experts


def moved_copy(model):
    """A teacher: the model with other weights."""
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    return teacher


def independent_logps(model, items, *, teacher=False):
    """``[N]`` log-probabilities of the response tokens from plain unpadded passes."""
    prompts = [item.teacher_prompt_ids if teacher else item.prompt_ids for item in items]
    return torch.cat([answer_logps(model, prompt, item.completion_ids) for prompt, item in zip(prompts, items)])


def hidden_logps(hidden, target_ids, head):
    """The same from hidden states and `head_parameters`."""
    z = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z.log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]


def gradients(model):
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def compare(model, items, tolerance, *, teacher=None, **options):
    """Asserts that shared passes give the log-probabilities and the gradients of independent ones.

    Gradients are compared relative to the largest of all, log-probabilities absolutely.
    """
    weights = torch.linspace(0.2, 1.0, sum(len(i.completion_ids) for i in items), dtype=model.dtype)
    want = independent_logps(model, items)
    (want * weights).sum().backward()
    want_grads = gradients(model)
    model.eval()  # checkpointing would only warn that there is no gradient
    with torch.no_grad():
        want_teacher = independent_logps(teacher or model, items, teacher=True)
    model.train()
    states = shared_forward(model, items, teacher_model=teacher, **options)
    got = hidden_logps(states.student_hidden, states.target_ids, head_parameters(model))
    (got * weights).sum().backward()
    got_grads = gradients(model)
    assert states.student_hidden.requires_grad and not states.teacher_hidden.requires_grad
    with torch.no_grad():
        head = head_parameters(teacher or model)
        got_teacher = hidden_logps(states.teacher_hidden, states.target_ids, head)
    assert (got - want).abs().max() < tolerance
    assert (got_teacher - want_teacher).abs().max() < tolerance
    assert got_grads.keys() == want_grads.keys()
    scale = max(g.abs().max() for g in want_grads.values())
    for name, wanted in want_grads.items():
        assert (got_grads[name] - wanted).abs().max() < tolerance * scale, name


@pytest.fixture(scope="session")
def lab():
    """The helpers above, for the tests of this folder."""
    return SimpleNamespace(
        **{k: v for k, v in globals().items() if callable(v) and not k.startswith("_")}, VOCABULARY=VOCABULARY
    )
