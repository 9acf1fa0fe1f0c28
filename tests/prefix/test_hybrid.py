"""Layers that are more than plain attention over a plan, against separate passes."""

import contextlib

import peft
import pytest
import torch

from benchmarks import coverage, tiny
from fastsdpo.prefix import check_sharing, recurrent, shared_forward
from fastsdpo.prefix.attention import SharedPass
from fastsdpo.prefix.plan import build_plan
from fastsdpo.prefix.stretches import group_calls, handed_on, plan_stretches

MODELS = ["qwen3_5_text", "qwen3_next", "olmo_hybrid", "granitemoehybrid", "nemotron_h", "lfm2", "gpt_oss"]
MORE = ["falcon_h1", "kimi_linear", "bailing_hybrid", "bamba", "lfm2_moe", "gemma2", "mimo_v2_flash", "granite_swa"]
# Attention of their own.
OWN = ["bloom", "deepseek_v32", "mpt", "stablelm", "glm_moe_dsa", "hrm_text", "longcat_flash"]
PATHS = ["minimax", "deepseek_v4", "zaya", "zamba", "recurrent_gemma"]
PLANS = coverage.plans()  # nested; prompts shorter than a convolution; single tokens between branches
# One projection in, and none out: PEFT refuses Mamba's out_proj.
TARGETS = ["in_proj", "in_proj_qkv", "in_proj_qkvz", "q_proj", "v_proj", "down_proj", "up_proj"]
TARGETS += ["query_key_value", "linear_y", "kv_proj", "linear_q", "q_b_proj"]


def errors(model, plans=PLANS, **options):
    """The largest difference, relative to each tensor."""
    options = {"sharing": "conversation", **options}
    found = [
        coverage.difference(coverage.separate(model, items), coverage.by_shared_forward(model, items, **options))
        for items in plans.values()
    ]
    return max(found)


@pytest.fixture
def float64():
    """A function that builds a model, all of whose casts are to float64 until the test ends."""
    with contextlib.ExitStack() as stack:

        def build(name):
            model = tiny.build(name).double()
            stack.enter_context(tiny.in_float64())
            return model

        yield build


# The others of MODELS are the same kinds of mixers; in float32 all of them are compared.
SOONER = ("qwen3_5_text", "nemotron_h", "lfm2", "gpt_oss", *OWN[:2], PATHS[0], "llama4_text")
LATER = [name for name in (*MODELS, *MORE, *OWN, *PATHS) if name not in SOONER]


@pytest.mark.parametrize("name", [*SOONER, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)])
def test_float64(float64, name):
    model = float64(name)
    assert errors(model) < 1e-10
    assert errors(model, {"nested": PLANS["nested"]}, sharing="interaction") < 1e-10
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert errors(model, {"nested": PLANS["nested"]}) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_float32(lab, name):
    lab.compare(tiny.build(name), lab.conversation(3, think=True), 1e-5)


OTHER_KINDS = ["bloom", "stablelm", "doge", "glm_moe_dsa", "minimax", "recurrent_gemma", "deepseek_v4", "zaya"]


FOUR = ("qwen3_5_text", "nemotron_h", "gpt_oss", "lfm2")


@pytest.mark.parametrize("name", [*FOUR, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_KINDS)])
def test_lora(float64, name):
    """Under reentrant checkpointing, and with the base model as the teacher."""
    model = float64(name)
    names = [n for n, _ in model.named_modules()]
    targets = [target for target in TARGETS if any(n.endswith(f".{target}") for n in names)]
    if any(n.endswith("experts") for n in names):  # whose projections PEFT takes all together
        targets = [target for target in targets if target not in ("up_proj", "down_proj")]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).double()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert errors(model, {"nested": PLANS["nested"]}) < 1e-10
    states = shared_forward(model, PLANS["single"], teacher_context=model.disable_adapter)
    with model.disable_adapter():
        alone = shared_forward(model, PLANS["single"], sharing="off")
    torch.testing.assert_close(states.teacher_hidden, alone.teacher_hidden, rtol=0, atol=1e-12)


def test_a_copy_runs_its_own_weights(lab, float64):
    """A teacher by moving average is a deep copy, made after the hooks were added."""
    model = float64("qwen3_5_text")
    shared_forward(model, PLANS["nested"])
    teacher = lab.moved_copy(model)
    assert errors(teacher, {"nested": PLANS["nested"]}) < 1e-10
    states = shared_forward(model, PLANS["nested"], teacher_model=teacher)
    alone = shared_forward(teacher, PLANS["nested"], sharing="off")
    torch.testing.assert_close(states.teacher_hidden, alone.teacher_hidden, rtol=0, atol=1e-11)


def test_states_are_not_written_in_place(float64, monkeypatch):
    """What the student's pass leaves is the same after the teacher's, and holds no graph."""
    model, kept, copies = float64("nemotron_h"), [], []
    take = SharedPass.take_kept

    def tensors():
        (states,) = kept
        for mixer in states.values():
            for one in mixer.states.values():
                yield from (*one.conv.values(), *one.recurrent.values())

    def remember(self):
        found = take(self)
        kept.append(dict(found.states))
        copies.extend(t.clone() for t in tensors())
        return found

    monkeypatch.setattr(SharedPass, "take_kept", remember)
    shared_forward(model, PLANS["single"])
    after = list(tensors())
    assert len(after) == len(copies) > 0 and not any(t.requires_grad for t in after)
    assert all(torch.equal(*pair) for pair in zip(after, copies))


def test_a_mixer_in_two_layers_is_refused():
    model = tiny.build("falcon_h1")
    model.model.layers[2].mamba = model.model.layers[0].mamba
    good, reason = check_sharing(model)
    assert not good and "FalconH1Mixer of layer 0 runs more than once in a pass: several layers share it" in reason
    shared_forward(model, PLANS["nested"], sharing="off")


STATES = [("qwen3_5_text", "conv"), ("qwen3_5_text", "recurrent"), ("nemotron_h", "recurrent"), ("lfm2", "conv")]


@pytest.mark.parametrize(
    ("name", "what", "change"), [*((*s, "detached") for s in STATES), *((*s, "ignored") for s in STATES[2:])]
)
def test_the_check_finds_states_that_are(monkeypatch, name, what, change):
    """A scan that ignores its state changes values; one that drops the gradient of it changes gradients alone."""
    model = tiny.build(name)
    assert check_sharing(model) == (True, "")
    read = getattr(recurrent.StretchStates, f"get_{what}_state")

    def wrong(self, layer_idx, state_idx=0):
        state = read(self, layer_idx, state_idx)
        if state is None:
            return None
        return state.detach() if change == "detached" else torch.zeros_like(state)

    monkeypatch.setattr(recurrent.StretchStates, f"get_{what}_state", wrong)
    good, reason = check_sharing(model)
    assert not good and ("(gradient" if change == "detached" else "(student") in reason


@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen3_5_text", "autocast"), ("nemotron_h", torch.bfloat16), ("gpt_oss", torch.bfloat16)]
)
def test_the_check_allows_for_rounding(name, dtype):
    model = tiny.build(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        assert check_sharing(model if dtype == "autocast" else model.to(dtype)) == (True, "")


REFUSED = {
    "jamba": "its selective scan (Mamba-1) takes no state to start from",
    "falcon_mamba": "its selective scan (Mamba-1) takes no state to start from",
    "inkling_text": "its attention has convolutions inside",
    "qwen4_exp_text": "its indexer chooses keys from recurrent states",
    "rwkv": "recurrent layers that do not take their states from a cache",
    "big_bird": "its attention is another one in longer passes",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    """And they run unshared."""
    model = tiny.build(name)
    good, reason = check_sharing(model)
    assert not good and REFUSED[name] in reason and type(model).__name__ in reason
    shared_forward(model, PLANS["short"], sharing="off")


@pytest.mark.parametrize("items", PLANS.values(), ids=list(PLANS))
def test_stretches(items):
    plan = build_plan(items)
    found = plan_stretches(plan)
    assert [t for s in found for t in range(s.start, s.stop)] == list(range(plan.tokens))
    after = {s.stop - 1: s for s in found}
    position = plan.position_ids
    for s in found:
        path = [*s.again, s.start]
        if s.before is None:
            assert position[path[0]] == 0
        else:  # states come from a stretch that leaves them, and the tokens follow them without a gap
            assert after[s.before].kept and position[path[0]] == position[s.before] + 1
        assert [int(position[t]) for t in path] == list(range(int(position[path[0]]), int(position[s.start]) + 1))
        assert not (s.kept and s.stop - s.start == 1 and s.before is not None)  # one token and states
    for first, stop in ((0, plan.student_tokens), (plan.student_tokens, plan.tokens)):
        calls = group_calls(plan, first, stop)
        assert sorted(s.start for call in calls for s in call) == [s.start for s in found if first <= s.start < stop]
        assert all(len(call) == 1 for call in calls if call[0].kept)
        for call in calls:
            lengths = [s.length for s in call]
            assert min(lengths) >= 0.75 * max(lengths)
    states, again = handed_on(plan, plan.student_tokens)
    assert all(after[t].kept for t in states) and max([*states, *again]) < plan.student_tokens


def test_single_tokens_run_again():
    """Trap: one token and states is the decoding path, which writes in place and has no backward pass."""
    assert any(s.again for s in plan_stretches(build_plan(PLANS["single"])))
