"""`SDPODistillationLoss` beside the installed torchrl's loss, over its own data and wrappers (`make peers`)."""

import pytest
import torch

pytest.importorskip("torchrl", reason="needs torchrl: make peers")
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm.history import History
from torchrl.envs.llm.transforms import RetrieveLogProb
from torchrl.modules.llm import TransformersWrapper
from torchrl.modules.llm.policies.common import ChatHistory
from torchrl.objectives.llm import DistillationLoss
from transformers import AutoModelForCausalLM

from fastsdpo.integrations.torchrl import SDPODistillationLoss
from fastsdpo.testing import classes_divergence
from tests.integrations.conftest import make_tokenizer
from tests.integrations.test_adapters import packed
from tests.pages import ROOT, blocks

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} <end> {% endgeneration %}{% else %}{{ m['content'] }} <end> {% endif %}{% endfor %}"
)
ANSWERS = ["w5 w6 w7", "w8"]
CHATS = [[{"role": "user", "content": f"w{i} w2"}, {"role": "assistant", "content": a}] for i, a in enumerate(ANSWERS)]
HINTS = [[{"role": "user", "content": f"w{i} w2 w3 w{i + 9}"}, chat[1]] for i, chat in enumerate(CHATS)]


@pytest.fixture
def lab(qwen2_folder):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE

    def wrap(model, **more):
        return TransformersWrapper(
            model, tokenizer=tokenizer, generate=False, input_mode="history", pad_output=False, **more
        )

    model = AutoModelForCausalLM.from_pretrained(qwen2_folder)
    teacher = AutoModelForCausalLM.from_pretrained(qwen2_folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    history = History.from_chats(CHATS)
    data = TensorDict(
        history=ChatHistory(full=history, prompt=history[..., :-1], response=history[..., -1:]),
        teacher_history=ChatHistory(full=History.from_chats(HINTS)),
        next=TensorDict(done=torch.zeros(2, dtype=torch.bool), history=ChatHistory(prompt=history)),
        batch_size=(2,),
    )
    return wrap, model, teacher, tokenizer, lazy_stack(list(data.unbind(0)))


def rows(model, tokenizer, chats):
    """Log-probs of the whole vocabulary and the ids at the tokens of each answer, one conversation at a time."""
    found = []
    for chat in chats:
        given = tokenizer.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt", tokenize=True
        )
        counts = torch.as_tensor(given["assistant_masks"]).reshape(-1)[1:].bool()
        logits = model(input_ids=given["input_ids"]).logits[0, :-1]
        found.append((logits.log_softmax(-1)[counts], given["input_ids"][0, 1:][counts]))
    return found


def grads_of(loss, model):
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))


def same(got, want, model, rtol=1e-5):
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6)
    wanted = grads_of(want, model)
    scale = max(grad.abs().max() for grad in wanted.values())
    assert scale > 0
    for key, grad in grads_of(got, model).items():  # torchrl pads on the left
        assert (grad - wanted[key]).abs().max() <= 10 * rtol * scale, key


def with_scores(teacher, data, tokenizer):
    """The teacher's log-probs of the answers' tokens, where torchrl's loss reads them."""
    key = ("teacher_log_probs", "full")
    transform = RetrieveLogProb(teacher, log_probs_full_key=key, assistant_only=True, tokenizer=tokenizer)
    with torch.no_grad():
        return transform(data)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("more", [{}, {"reduction": "sum", "normalize_by_seq_length": False}], ids=["mean", "sum"])
def test_k3_is_torchrls_own_loss(lab, direction, more):
    wrap, model, teacher, tokenizer, data = lab
    data = with_scores(wrap(teacher, return_log_probs=True), data, tokenizer)
    actor = wrap(model)
    want = DistillationLoss(actor, kl_direction=direction, **more)(data)
    for options in ({}, {"teacher_network": teacher}):
        got = SDPODistillationLoss(actor, mode="k3", kl_direction=direction, **options, **more)(data)
        torch.testing.assert_close(got.kl_to_teacher, want.kl_to_teacher, rtol=1e-5, atol=1e-6)
    same(got.loss_distill, want.loss_distill, model)


@pytest.mark.parametrize("hindsight", [False, True], ids=["teacher", "hindsight"])
@pytest.mark.parametrize("mode", ["full", "topk", "sampled_token"])
def test_whole_distributions_against_the_formula(lab, mode, hindsight):
    wrap, model, teacher, tokenizer, data = lab
    if not hindsight:
        data = data.exclude("teacher_history")
    options = {"alpha": 0.3} if mode == "full" else {"topk": 5, "add_tail": False} if mode == "topk" else {}
    loss = SDPODistillationLoss(wrap(model), mode=mode, teacher_network=None if hindsight else teacher, **options)
    got = loss(data)
    assert not any(parameter is other for parameter in loss.parameters() for other in teacher.parameters())
    with torch.no_grad():
        taught = rows(model if hindsight else teacher, tokenizer, HINTS if hindsight else CHATS)
    means = []
    for (student, ids), (target, _) in zip(rows(model, tokenizer, CHATS), taught, strict=True):
        if mode == "full":
            per = classes_divergence(student, target, 0.3)
        elif mode == "topk":
            support = student.topk(5).indices
            s, t = (one.gather(-1, support).log_softmax(-1) for one in (student, target))
            per = (s.exp() * (s - t)).sum(-1)
        else:
            s, t = (one.gather(-1, ids[:, None])[:, 0] for one in (student, target))
            per = -(t - s).detach() * s
        means.append(per.mean())
    same(got.loss_distill, torch.stack(means).mean(), model)


@pytest.mark.parametrize(
    ("bits", "adapter"),
    [(4, "lora-embeddings-head"), (4, "dora-head"), (4, "modules-to-save"), (8, "ia3"), (8, "lora")],
)
def test_packed_weights(lab, qwen2_folder, bits, adapter):
    pytest.importorskip("bitsandbytes")
    wrap, _, teacher, tokenizer, data = lab
    model = packed(qwen2_folder, bits, adapter)
    loss = SDPODistillationLoss(wrap(model), teacher_network=teacher, mode="full", alpha=0.3)
    got = loss(data.exclude("teacher_history")).loss_distill
    with torch.no_grad():
        taught = rows(teacher, tokenizer, CHATS)
    both = zip(rows(model, tokenizer, CHATS), taught, strict=True)
    want = torch.stack([classes_divergence(student, target, 0.3).mean() for (student, _), (target, _) in both]).mean()
    same(got, want, model, 1e-5 if bits == 4 else 5e-3)  # 8 bits round by the outliers of a whole pass
    with pytest.raises(NotImplementedError, match="llm_int8_skip_modules"):
        SDPODistillationLoss(wrap(packed(qwen2_folder, bits, "lora", llm_int8_skip_modules=["none"])))(data)


def test_what_is_refused(lab):
    wrap, model, _, _, data = lab
    actor = wrap(model)
    with pytest.raises(ValueError, match="mode must be one of"):
        SDPODistillationLoss(actor, mode="k2")
    with pytest.raises(ValueError, match="topk must be given with mode='topk' only"):
        SDPODistillationLoss(actor, mode="topk")
    with pytest.raises(NotImplementedError, match="reduction must be 'mean' or 'sum'"):
        SDPODistillationLoss(actor, reduction="none")
    loss = SDPODistillationLoss(actor)
    other = [[chat[0], {"role": "assistant", "content": "w1 w1 w1 w1"}] for chat in HINTS]
    data = data.clone()
    data["teacher_history"] = lazy_stack([ChatHistory(full=one) for one in History.from_chats(other).unbind(0)])
    with pytest.raises(ValueError, match="must have the tokens of the answers"):
        loss(data)
    model.config.lm_head_multiplier = 2.0
    with pytest.raises(NotImplementedError, match="use torchrl's DistillationLoss"):
        SDPODistillationLoss(actor)(data)


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(lab):
    """Each loss of its blocks, on the data that it takes; a vocabulary of 63 has no 100 most likely tokens."""
    wrap, model, teacher, tokenizer, data = lab
    names = {"actor": wrap(model), "teacher": wrap(teacher)}
    before, after = blocks(ROOT / "docs/integrations/torchrl.md", "python")
    exec(compile(before, "torchrl.md", "exec"), names)
    assert type(names["loss"]) is DistillationLoss
    start, *each = after.split("\nloss = ")
    exec(compile(start, "torchrl.md", "exec"), names)
    assert len(each) == 3
    for text in each:
        exec(compile(f"loss = {text.replace('topk=100', 'topk=5')}", "torchrl.md", "exec"), names)
        given = with_scores(wrap(teacher, return_log_probs=True), data, tokenizer) if "k3" in text else data
        model.zero_grad()
        loss = names["loss"](given).loss_distill
        loss.backward()
        assert loss.isfinite() and model.lm_head.weight.grad.abs().sum() > 0
