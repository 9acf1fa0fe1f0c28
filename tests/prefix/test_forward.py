"""Shared passes against independent ones: log-probabilities and the gradient of every parameter."""

import weakref

import peft
import pytest
import torch

from fastsdpo.prefix import ForwardSession, check_head, head_parameters, shared_forward
from fastsdpo.prefix.attention import SharedPass

MODELS = ["llama", "qwen3", "gemma3", "mistral", "qwen3_moe", "gpt2", "granite"]


@pytest.mark.parametrize("think", [False, True], ids=["chain", "think"])
@pytest.mark.parametrize(
    ("name", "sharing"),
    [(name, "conversation") for name in MODELS]
    + [(name, sharing) for name in ("mistral", "gpt2") for sharing in ("interaction", "off")],
)
def test_float64(lab, name, sharing, think):
    items = lab.conversation(3, think=think) + lab.conversation(2, think=think, seed=1)
    lab.compare(lab.tiny_model(name), items, 1e-12, sharing=sharing)


@pytest.mark.parametrize("name", [*MODELS, "cohere"])  # Cohere rotates in float32 at best
def test_float32(lab, name):
    lab.compare(lab.tiny_model(name, torch.float32), lab.conversation(4, think=True), 1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_gradient_checkpointing(lab, name, reentrant):
    """Trap: transformers drops caches under checkpointing; and a layer that runs again in the
    backward pass must find the plan, and must not keep its keys and values a second time."""
    model = lab.tiny_model(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    lab.compare(model, lab.conversation(3, think=True), 1e-12)


def lora_model(lab, targets, **options):
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, **options)
    model = peft.get_peft_model(lab.tiny_model("llama"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.double()


@pytest.mark.parametrize(
    ("targets", "options", "checkpointing"),
    [
        (["q_proj", "v_proj", "down_proj"], {}, False),
        (["q_proj", "v_proj", "down_proj"], {}, True),
        (["q_proj", "lm_head"], {}, False),  # an adapter of the head, or a trained copy of it, is not ignored
        (["q_proj"], {"modules_to_save": ["lm_head"]}, False),
    ],
)
def test_lora(lab, targets, options, checkpointing):
    model = lora_model(lab, targets, **options)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lab.compare(model, lab.conversation(3, think=True), 1e-12)


@pytest.mark.parametrize("sharing", ["conversation", "off"])
def test_another_teacher(lab, sharing):
    model, items = lab.tiny_model("qwen3"), lab.conversation(3, think=True)
    teacher = lab.moved_copy(model)
    lab.compare(model, items, 1e-12, teacher=teacher, sharing=sharing)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", False), ("qwen3", True)])
def test_flash(lab, varlen_on_cpu, name, checkpointing):
    """The model's own forward and backward pass on the varlen calls of a GPU: no keys are gathered or joined."""
    model = lab.tiny_model(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    items = lab.conversation(5, think=True) + lab.conversation(3, seed=1)
    items += [lab.tokenized(items[1].prompt_ids, items[1].teacher_prompt_ids, [20 + n]) for n in range(3)]
    lab.compare(model, items, 1e-12, attention="flash")
    assert varlen_on_cpu.calls
    lab.compare(model, items, 1e-12, attention="flash", sharing="interaction")


def test_teacher_context(lab):
    """PEFT's base model as the teacher, with no second copy of the weights."""
    model, items = lora_model(lab, ["q_proj", "down_proj"]), lab.conversation(2)
    states = shared_forward(model, items, teacher_context=model.disable_adapter)
    with torch.no_grad(), model.disable_adapter():
        want = lab.independent_logps(model, items, teacher=True)
        got = lab.hidden_logps(states.teacher_hidden, states.target_ids, head_parameters(model))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    live = shared_forward(model, items)
    assert (live.teacher_hidden - states.teacher_hidden).abs().max() > 1e-3


def test_empty_hindsight_block(lab):
    """Rows of the teacher that stand on the student's tokens: all of them, and some of them."""
    items = lab.conversation(2)
    items[0].teacher_prompt_ids = list(items[0].prompt_ids)
    lab.compare(lab.tiny_model("llama"), items, 1e-12)
    lab.compare(lab.tiny_model("llama"), items[:1], 1e-12)


def test_completions_that_share_tokens(lab):
    """Several sampled responses to one prompt, equal in part, equal in whole, one inside another."""
    prompt, teacher = [1, 2, 10, 11, 12], [1, 2, 10, 11, 12, 7, 13]
    completions = [[20, 21, 22], [20, 21, 23, 24], [20, 21], [20, 21, 22], [30]]
    items = [lab.tokenized(prompt, teacher, c) for c in completions]
    lab.compare(lab.tiny_model("gemma3"), items, 1e-12)


def test_autocast(lab):
    """Keys and values are kept in the dtype that the attention used."""
    model = lab.tiny_model("llama", torch.float32)
    items = lab.conversation(3, think=True)
    with torch.autocast("cpu", torch.bfloat16):
        shared = shared_forward(model, items)
        alone = shared_forward(model, items, sharing="off")
    exact = shared_forward(model, items, sharing="off")
    for got, rival, want in zip(shared[:2], alone[:2], exact[:2]):
        error, budget = (got - want).norm(), (rival - want).norm()
        assert 0 < error < 2 * budget


def test_the_model_is_left_as_it_was(lab):
    """Evaluation, generation and padded batches run as before."""
    model = lab.tiny_model("llama", torch.float32).eval()
    ids, mask = torch.tensor([[1, 2, 3, 10, 11], [1, 2, 3, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    implementation = model.config._attn_implementation
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        generated = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
        for _ in range(2):
            shared_forward(model, lab.conversation(2))
            hooked = [type(m).__name__ for m in model.modules() for _ in m._forward_hooks]
            assert hooked == ["LlamaAttention"] * 3  # added once, and these act on shared passes only
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, before)
        assert torch.equal(model.generate(ids[:1], max_new_tokens=5, do_sample=False), generated)
    assert model.config._attn_implementation == implementation


def test_an_error_inside_leaves_no_hook(lab):
    model, items = lab.tiny_model("llama"), lab.conversation(2)
    implementation = model.config._attn_implementation
    items[0].prompt_ids[3] = lab.VOCABULARY + 5  # no such embedding
    with pytest.raises(IndexError):
        shared_forward(model, items)
    assert model.config._attn_implementation == implementation
    assert not model._forward_hooks and not model.model._forward_hooks
    lab.compare(model, lab.conversation(2), 1e-12)


def test_no_logits_are_computed(lab):
    """The head's own forward never runs; what wraps the head sees the result as its output."""
    model, seen = lab.tiny_model("llama"), []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out))
    model.lm_head.weight = None
    states = shared_forward(model, lab.conversation(3))
    assert len(seen) == 1 and seen[0] is states
    assert len(model.lm_head._forward_hooks) == 1 and "forward" not in vars(model.lm_head)


def test_a_head_that_accelerate_placed(lab):
    """As with ``device_map``: hooks move the head's input, and call its forward from a wrapper."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = lab.tiny_model("llama")
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
    wrapper, own = model.lm_head.forward, model.lm_head._old_forward
    assert check_head(model) == (True, "")
    lab.compare(model, lab.conversation(2), 1e-12)
    assert model.lm_head.forward is wrapper and model.lm_head._old_forward == own


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_keys_and_values_are_freed_before_the_loss(lab, monkeypatch, checkpointing):
    """Also where checkpointing keeps the pass, and runs its layers again in the backward pass."""
    model, passes, keys = lab.tiny_model("llama"), [], []
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    take = SharedPass.take_kept

    def remember(self):
        kept = take(self)
        passes.append(self)
        keys.extend(weakref.ref(key) for key, _ in kept.keys_values.values())
        return kept

    def loss_fn(states):
        assert len(keys) == 3 and not any(key() is not None for key in keys)
        return states.student_hidden.sum()

    monkeypatch.setattr(SharedPass, "take_kept", remember)
    shared_forward(model, lab.conversation(3), loss_fn=loss_fn).backward()
    (student,) = passes
    assert student.kept is None and student.calls.keys() == {0, 1, 2}


@pytest.mark.parametrize("order", [("student", "teacher"), ("teacher", "student")], ids=["student", "teacher"])
@pytest.mark.parametrize("sharing", ["conversation", "off"])
def test_session(lab, sharing, order):
    """Either side first, each computed once; nothing is kept and nothing runs afterwards."""
    model, items = lab.tiny_model("llama"), lab.conversation(2)
    want = shared_forward(model, items, sharing=sharing)

    def body(session):
        rows = {name: getattr(session, name)() for name in order}
        assert all(getattr(session, name)() is rows[name] for name in order)
        assert rows["student"].requires_grad and not rows["teacher"].requires_grad
        return rows["student"], rows["teacher"], *session.labels

    session = ForwardSession(model, items, sharing=sharing)
    with pytest.raises(RuntimeError, match="in the body of run"):
        session.student()
    for got, wanted in zip(session.run(body), want, strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(RuntimeError, match="in the body of run"):
        session.teacher()
    with pytest.raises(RuntimeError, match="run must be called once"):
        session.run(body)
    lone = [lab.tokenized(items[0].prompt_ids, items[0].prompt_ids, items[0].completion_ids)]
    rows = ForwardSession(model, lone, sharing=sharing).run(lambda session: (session.teacher(), session.student()))
    assert torch.equal(*rows) and rows[1].requires_grad and not rows[0].requires_grad


def test_loss_fn_runs_inside(lab):
    model, items, inside = lab.tiny_model("llama"), lab.conversation(2), []
    model.register_forward_pre_hook(lambda m, args: inside.append(True))
    model.register_forward_hook(lambda m, args, out: inside.clear())

    def loss_fn(states):
        assert inside
        return states.student_hidden.sum(), len(states.target_ids)

    loss, count = shared_forward(model, items, loss_fn=loss_fn)
    torch.testing.assert_close(loss, shared_forward(model, items).student_hidden.sum())
    assert count == sum(len(i.completion_ids) for i in items)
    loss.backward()


def test_bad_arguments(lab):
    model, items = lab.tiny_model("llama"), lab.conversation(2)
    for options, words in [
        ({"sharing": "all"}, "sharing must be"),
        ({"attention": "fast"}, "attention must be 'auto' or one of"),
        ({"attention": "flex"}, "attention='flex' has no backward pass on a CPU"),
        ({"attention": "flash"}, "attention='flash' needs torch.nn.attention.varlen"),
        ({"teacher_model": model, "teacher_context": torch.no_grad}, "must not both be given"),
    ]:
        with pytest.raises(ValueError, match=words):
            shared_forward(model, items, **options)
    with pytest.raises(TypeError, match="must be a transformers causal language model, got Linear"):
        shared_forward(torch.nn.Linear(2, 2), items)
    items[1].completion_ids = []
    with pytest.raises(ValueError, match=r"interactions\[1\]\.completion_ids must not be empty"):
        shared_forward(model, items)
