"""Online training: the clipped loss against float64, resumed runs, users, and answers that degenerate."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import TrainerCallback

from fastsdpo.data import HindsightTemplate, InteractionTokenizer
from fastsdpo.online import (
    ConstantUser,
    OnlineSDPOConfig,
    OnlineSDPOTrainer,
    RuleUser,
    SwitchingUser,
    degenerate,
)
from fastsdpo.online.presets import PRESETS
from fastsdpo.online.rules import parse_rule
from fastsdpo.trainer.loss import ppo_token_loss
from tests.plain import answer_log_probs
from tests.trainer.conftest import StopAt

TWICE = {"updates_per_batch": 2}


@pytest.mark.parametrize("center", [False, True])
def test_clipped_loss_and_gradient(center):
    g = torch.Generator().manual_seed(0)
    logps, teacher, old = (-3 * torch.rand(9, generator=g, dtype=torch.float64) for _ in range(3))
    weights = torch.rand(9, generator=g, dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    counts = torch.tensor([False, True, True, True, True, True, True, False, True])
    leaf = logps.float().requires_grad_()
    options = {"clip": 0.2, "old_logps": old.float(), "center": center}
    out = ppo_token_loss(leaf, teacher.float(), weights.float(), ids, counts, **options)
    out.loss.backward()
    exact = torch.zeros(9, dtype=torch.float64)
    loss = 0.0
    for t in range(9):
        if not counts[t]:
            continue
        mates = [i for i in range(9) if ids[i] == ids[t] and counts[i]]
        advantage = teacher[t] - logps[t]
        if center:
            advantage = advantage - sum(teacher[i] - logps[i] for i in mates) / len(mates)
        ratio = (logps[t] - old[t]).exp()
        clipped = min(max(ratio, 0.8), 1.2)
        own = teacher[t] - logps[t]  # the value is that of the advantages as they are, the gradient centered
        loss -= weights[t] * min(ratio * own, clipped * own)
        if ratio * advantage <= clipped * advantage:
            exact[t] = -weights[t] * ratio * advantage
    torch.testing.assert_close(out.loss.double(), torch.as_tensor(loss), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["paper", "paper-later"])
def test_steps_of_the_published_presets(preset, lab, tmp_path):
    """Gradients of 4 steps by two passes an answer: x and (x, o) from the chat template, then y as it was sampled.

    paper: -A ratio, with A centered over each answer, at ratio 1. paper-later: the reverse KL over the student's 20
    likeliest tokens and one bucket for the rest, with the teacher as it is after the step before.
    """
    changes = {"template": "online-v1", "learning_rate": 1e-3, "max_steps": 4, "max_new_tokens": 8}
    chosen = {"paper": PRESETS["paper"], "paper-later": {**PRESETS["paper-later"], "updates_per_batch": 2}}[preset]
    # An own batch size, as a user gives it: 2 x 2 answers a step.
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "global_batch_size": None}
    trainer = lab.trainer(tmp_path, **{**chosen, **changes, **(sizes if preset == "paper" else {})})
    tokenizer, model, seen, compared = lab.tokenizer(), trainer.model, [], []
    step = trainer.training_step

    def recorded(model, inputs, count=None):
        seen.append((inputs["interactions"], step(model, inputs, count)))
        return seen[-1][1]

    def context(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer_loss(student, teacher, answer):
        if preset == "paper":
            s, t = (part.gather(-1, torch.tensor(answer)[:, None])[:, 0] for part in (student, teacher))
            advantage = (t - s).detach()
            centered = -((advantage - advantage.mean()) * (s - s.detach()).exp()).mean()
            return centered - centered.detach() - advantage.mean()  # the value that is logged is not centered
        top = student.detach().topk(20).indices
        kept = [part.gather(-1, top) for part in (student, teacher)]
        s, t = (torch.cat([part, (1 - part.exp().sum(-1, keepdim=True)).log()], -1) for part in kept)
        return (s.exp() * (s - t)).sum(-1).mean()

    class Compare(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found = [p.grad.clone() for p in model.parameters()]
            items = [item for batch, _ in seen for item in batch]
            rows = {
                row["id"]: row for row in map(json.loads, (tmp_path / "interactions.jsonl").read_text().splitlines())
            }
            own = [rows[item.id] for item in items]
            answers = [item.completion_ids for item in items]
            told = HindsightTemplate.preset("online-v1").text
            xs = [context(row["prompt"]) for row in own]
            xos = [
                context([{**m, "content": m["content"] + told.replace("{o}", row["user_response"]["content"])}])
                for row in own
                for m in row["prompt"]
            ]
            student = [answer_log_probs(model, x, y) for x, y in zip(xs, answers)]
            with torch.no_grad():
                teacher = [answer_log_probs(model, x, y) for x, y in zip(xos, answers)]
            model.zero_grad()
            loss = torch.stack([answer_loss(*parts) for parts in zip(student, teacher, answers)]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
            error = (torch.cat([g.flatten() for g in found]) - wanted).norm() / wanted.norm()
            compared.append(float(error))
            assert float(sum(part for _, part in seen)) == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
            for parameter, gradient in zip(model.parameters(), found):
                parameter.grad = gradient
            seen.clear()

    trainer.training_step = recorded
    trainer.add_callback(Compare())
    trainer.train()
    assert len(compared) == 4 and max(compared) < 3e-5, compared


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "full"},
        {"mode": "sampled_token", "ppo_clip": 0.2, "center_advantages": True, **TWICE, "num_generations": 2},
        {"mode": "full", "is_clip": 2.0, "updates_per_batch": 3, "teacher": "ema", "reference_kl": 0.1},
        {"mode": "full", **TWICE, "teacher": "frozen", "guidance": 2.0, "neutral_followup": "w9"},
    ],
)
def test_resumed_run_is_the_same_run(lab, settings, tmp_path):
    whole = lab.trainer(tmp_path / "whole", **settings)
    whole.train()
    cut = lab.trainer(tmp_path / "cut", callbacks=[StopAt(3)], **settings)
    cut.train()
    resumed = lab.trainer(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    logs = [(tmp_path / name / "interactions.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert logs[0].count("\n") == len(set(logs[0].splitlines())) > 0


@pytest.mark.parametrize(
    ("settings", "neutral"),
    [
        ({"mode": "full", "guidance": 2.0}, "w9 w8"),
        ({"mode": "full", "guidance": 1.0, "teacher": "frozen"}, "w9 w8"),
        ({"mode": "full", "guidance": 2.5, "teacher": "frozen"}, None),
        ({"mode": "full", "guidance": 2.0, "teacher": "ema", "reference_kl": 0.1}, "w9 w8"),
        ({"mode": "sampled_token", "guidance": 2.0, "ppo_clip": 0.2}, "w9 w8"),
    ],
)
def test_a_guided_teacher(lab, settings, neutral, tmp_path):
    """Loss, log-ratio and gradients against separate passes in float64: q ~ p_x (p_o / p_n)^g."""
    trainer = lab.trainer(tmp_path, neutral_followup=neutral, **settings)
    first, model = lab.model().double(), lab.model().double()
    with torch.no_grad():  # a student that is no longer its teacher, where that stays behind
        for ours, exact in zip(trainer.model.parameters(), model.parameters()):
            moved = 0.1 * ours.std() * torch.randn(ours.shape)
            ours += moved
            exact += moved.double()
    weights = model if settings.get("teacher", "live") == "live" else first
    guidance, clip, kl = (settings.get(n, 0) for n in ("guidance", "ppo_clip", "reference_kl"))
    batch = next(iter(trainer.get_train_dataloader()))
    items = trainer.roll_out([batch["prompts"]], 0)[0]
    loss, statistics = trainer.compute_loss(
        trainer.model, {"interactions": items}, return_outputs=True, num_items_in_batch=len(items)
    )
    loss.backward()

    whole, ratios = 0.0, []
    note = lab.tokenizer()(f"note {neutral}")["input_ids"]
    for item in items:
        answer, prompt = item.completion_ids, item.prompt_ids  # <user> question <end> <assistant>
        if neutral is not None:
            assert item.neutral_prompt_ids == [*prompt[:-2], *note, *prompt[-2:]]
        student = answer_log_probs(model, prompt, answer)
        with torch.no_grad():
            base = answer_log_probs(weights, prompt, answer)
            followup = answer_log_probs(weights, item.teacher_prompt_ids, answer)
            subtracted = answer_log_probs(weights, item.neutral_prompt_ids or prompt, answer)
            teacher = (base + guidance * (followup - subtracted)).log_softmax(-1)
            reference = answer_log_probs(first, prompt, answer)
        chosen = torch.arange(len(answer)), torch.tensor(answer)
        ratio = (teacher - student.detach())[chosen]
        ratios.append(ratio)
        terms = -ratio * student[chosen] if clip else (student.exp() * (student - teacher)).sum(-1)
        terms = terms + kl * (student.exp() * (student - reference)).sum(-1)
        whole = whole + terms.mean() / len(items)
    whole.backward()
    torch.testing.assert_close(statistics.log_ratio.double(), torch.cat(ratios), rtol=1e-4, atol=1e-5)
    if not clip:
        torch.testing.assert_close(loss.detach().double(), whole.detach(), rtol=1e-4, atol=1e-6)
    for (name, ours), exact in zip(trainer.model.named_parameters(), model.parameters()):
        error = (ours.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neutral_followup": " "}, "neutral_followup must have a text"),
        ({"guidance": 0.0}, "guidance must be > 0"),
        ({"guidance": 2.0, "teacher": "trust_region"}, "teacher must be live, ema or frozen with"),
    ],
)
def test_where_guidance_is_refused(lab, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        lab.trainer(tmp_path, **settings)


def test_guidance_needs_logits_without_a_softcap(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("fastsdpo.trainer.teachers.head_parameters", lambda model: SimpleNamespace(softcap=30.0))
    lab.trainer(tmp_path)
    with pytest.raises(NotImplementedError, match="softcap"):
        lab.trainer(tmp_path, guidance=2.0)


@pytest.mark.parametrize(("said", "share"), [(["w1", "", "w1", ""], 0.5), ([""] * 4, 0.0)])
def test_answers_without_a_follow_up_are_dropped(said, share, lab, tmp_path):
    """Without any, nothing changes."""
    trainer = lab.trainer(tmp_path, user=SimpleNamespace(feedback=lambda prompts, responses: said), max_steps=1)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.log_history[0]["online/followups"] == share
    assert all(map(torch.equal, before, trainer.model.parameters())) == (share == 0)


@pytest.mark.parametrize("kind", ["RecurrentGemma", "Rwkv", "Llama"])
def test_answers_do_not_depend_on_the_prompts_beside_them(lab, kind, tmp_path):
    """Some models read padding in spite of the mask. The likeliest tokens, by calls of the model alone."""
    shape = {"vocab_size": 47, "hidden_size": 32, "num_attention_heads": 4, "lru_width": 32, "eos_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**shape, num_hidden_layers=3, intermediate_size=48)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "max_new_tokens": 6}
    args = OnlineSDPOConfig(**settings, template=" note {o}")
    texts = ["w1 w2", "w3", " ".join(f"w{n}" for n in range(20)), "w5 w6 w7 w8", "w9"]
    trainer = OnlineSDPOTrainer(model, args, ConstantUser("w1"), texts, processing_class=lab.tokenizer())
    asked = [[{"role": "user", "content": text}] for text in texts]
    samples = trainer.held_out_answers(asked).samples
    for messages, sample in zip(asked, samples):
        ids = trainer.tokenize.generation_prompt(messages)
        start = len(ids)
        while len(ids) - start < 6 and ids[-1] != 1:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert sample.ids == ids[start:]


def test_answers_beyond_the_positions_of_the_model(lab, tmp_path, caplog):
    trainer = lab.trainer(tmp_path, max_new_tokens=12)
    asked = [[{"role": "user", "content": "w1 " * 250}]]
    assert trainer.held_out_answers(asked).texts and "are longer than the 256 positions" in caplog.text


def test_evaluation_asks_the_user(lab, tmp_path):
    trainer = lab.trainer(tmp_path, user=RuleUser(["max_words=3"], praise="w1"))
    metrics = trainer.evaluate()
    rows = [json.loads(line) for line in (tmp_path / "eval_answers.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert metrics["eval_satisfaction"] == sum(row["satisfied"] for row in rows) / 3


def test_degeneration_stops_the_run_with_a_checkpoint(lab, tmp_path, monkeypatch):
    trainer = lab.trainer(tmp_path, stop_when_degenerate=0.5, degenerate_window=4)
    with torch.no_grad():  # the same word for ever
        trainer.model.lm_head.weight.zero_()
        trainer.model.lm_head.weight[20] = 1.0
        trainer.model.model.norm.weight.fill_(1.0)
    monkeypatch.setattr(InteractionTokenizer, "said", lambda self, ids, prompt: "again " * 8)
    trainer.train()
    assert trainer.degenerate_stop is not None
    assert (tmp_path / "checkpoint-1").is_dir()


def test_degenerate():
    repeats = dict.fromkeys(("yes " * 6, "I like tea. " * 9), "repetition")
    good = dict.fromkeys(("Water it weekly, keep it in the sun, and pinch the tips so that it stays bushy.", "Yes."))
    reasons = {"": "empty", "  ...!": "empty", **repeats, **good}
    assert {text: degenerate(text) for text in reasons} == reasons


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("max_words=3", "one two three", "one two three four"),
        ("min_words=2", "one two", "one"),
        ("max_sentences=1", "It costs 3.50 euros.", "Yes. No."),
        ("min_sentences=2", "Yes! No?", "Yes, no"),
        ("forbid=cat|dog", "category", "A Dog."),
        ("require=tea", "Tea, please", "coffee"),
        ("starts_with=TL;DR:", "TL;DR: x", "x"),
        ("regex=^\\d+$", "12", "x12"),
        ("case=lower", "abc.", "Abc."),
        ("format=json", '{"a": 1}', "{a}"),
        ("format=list", "- a\n- b", "a"),
        ("format=plain", "a b", "**a** b"),
    ],
)
def test_rules(rule, good, bad):
    assert parse_rule(rule).holds(good)
    assert not parse_rule(rule).holds(bad)


@pytest.mark.parametrize(
    "rule", ["", "max_words", "max_words=x", "max_words=0", "size=3", "regex=(", "case=odd", "format=xml", "forbid="]
)
def test_rule_errors(rule):
    with pytest.raises(ValueError, match="rule"):
        parse_rule(rule)


def test_preference_switches_at_the_interaction():
    user = SwitchingUser([(0, ConstantUser("a")), (10, ConstantUser("b"))])
    said = []
    for interactions in (0, 9, 10, 5):  # 5: a run resumed from before the switch
        user.at(interactions)
        said += user.feedback([], ["x"])
    assert said == ["a", "a", "b", "a"]


def test_broken_simulators_are_named(lab, tmp_path):
    class Short:
        def feedback(self, prompts, responses):
            return []

    with pytest.raises(ValueError, match=r"Short\.feedback must return 4 follow-ups"):
        lab.trainer(tmp_path, user=Short()).train()
    with pytest.raises(TypeError, match="user must have feedback"):
        lab.trainer(tmp_path, user=object())


def test_endpoint_failures_are_counted_and_drop_the_interaction(server):
    pytest.importorskip("openai")
    from fastsdpo.online import ChatEndpoint, EndpointUser

    endpoint = ChatEndpoint(server, "m", timeout=1.0, max_retries=0, concurrency=3)
    user = EndpointUser(endpoint, "wants short answers")
    answers = ["fine", "status 500", "malformed", "no choices", "empty", "slow", "fine"]
    said = user.feedback([[{"role": "user", "content": "hi"}]] * len(answers), answers)
    assert said == ["Shorter, please.", "", "", "", "", "", "Shorter, please."]
    assert sum(user.failures.values()) == 5
    assert user.failures["EmptyReply"] == 1
    assert user.failures["APITimeoutError"] == 1


def test_interactions_are_those_that_were_asked_about(tmp_path, lab):
    """The last batch of an epoch is smaller: 24 prompts in batches of 10; a user who changes is told the same."""
    told = []
    user = ConstantUser("w3 w4")
    user.at = told.append
    trainer = lab.trainer(tmp_path, user=user, per_device_train_batch_size=10, max_steps=5, max_new_tokens=1)
    trainer.train()
    logged = [row["online/interactions"] for row in trainer.state.log_history if "online/interactions" in row]
    assert logged == [10, 20, 24, 34, 44] and told == [0, *logged[:-1]]
    assert len((tmp_path / "interactions.jsonl").read_text().splitlines()) == 44


def test_a_step_to_which_nobody_reacts_changes_nothing(tmp_path, lab):
    """Neither by the momentum of the step before it, nor by the weight decay."""

    class User:
        asked = 0

        def feedback(self, prompts, responses):
            self.asked += 1
            return ["w3 w4" if self.asked == 1 else None for _ in prompts]

    seen = []

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append([p.detach().clone() for p in model.parameters()])

    lab.trainer(tmp_path, user=User(), callbacks=[Weights()], weight_decay=0.1, warmup_steps=0).train()
    first, *later = seen
    assert len(later) == 3 and any(not torch.equal(a, b) for a, b in zip(first, lab.model().parameters()))
    assert all(torch.equal(a, b) for step in later for a, b in zip(first, step))
