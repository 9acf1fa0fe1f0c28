"""The measures of held-out interactions, through `fastsdpo train`, against plain forward passes over text."""

import itertools
import json
import math
import re
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from fastsdpo.online.own_answers import OwnAnswers
from fastsdpo.online.rules import parse_rule
from fastsdpo.train import main
from fastsdpo.trainer.measures_verdict import changes, verdict
from tests.plain import answer_logps
from tests.trainer.conftest import command, report_of

DRAWS = True
RUNS = {
    "ema, nothing shared": "--teacher ema --sharing off --mode sampled_token",
    "lora, frozen": "--lora 4 --teacher frozen --guidance 2 --set neutral_followup=w1",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, lab):
    """Runs of two steps on held-out conversations of three turns; what they printed and wrote."""
    folder = tmp_path_factory.mktemp("measures")
    held_out = lab.make_conversations(4)
    lab.make_place(folder, lab.make_interactions(4), held_out)
    settings = (
        "--max-steps 2 --eval-steps 1 --warmup 0 --schedule constant --set teacher_check=0 --set measure_answers=3 "
        "--set measure_tokens=5 --set eval_on_start=false --measure-rule max_words=4"
    )
    found = {}
    for name, options in RUNS.items():
        out = folder / name.partition(",")[0]
        assert main(command(folder, out, *settings.split(), *options.split())) == 0
        before = AutoModelForCausalLM.from_pretrained(folder / "model")
        after = AutoModelForCausalLM.from_pretrained(folder / "model" if "lora" in name else out / "model")
        if "lora" in name:
            after = peft.PeftModel.from_pretrained(after, out / "model")
        found[name] = SimpleNamespace(out=out, before=before, after=after, held_out=held_out)
    return found


@pytest.fixture(params=RUNS)
def run(request, runs):
    return runs[request.param]


def prompt_of(item, note=None):
    messages = [dict(message) for message in item.prompt]
    if note is not None:
        messages[-1]["content"] += f" note {note}"
    return "".join(f"<{m['role']}> {m['content']} <end> " for m in messages) + "<assistant> "


@torch.no_grad()
def logps(lab, model, prompt, answer):
    """``[tokens]`` of an answer and its end, in a forward pass of its own."""
    tokenizer = lab.make_tokenizer()
    ids, answer_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{answer} <end>"))
    return answer_logps(model.eval(), ids, answer_ids, torch.float64)


def expected(lab, model, held_out):
    """Rows by id; every answer of a conversation but the last has the next one after it."""
    pairs = itertools.pairwise(held_out)
    following = {a.id: b.completion for a, b in pairs if a.conversation_id == b.conversation_id}
    order = [i for i in held_out if i.id in following] + [i for i in held_out if i.id not in following]
    rows = {}
    for place, item in enumerate(order):
        others = [o for o in order[place + 1 :] + order[:place] if o.conversation_id != item.conversation_id]

        def both(answer, note, item=item):
            return [logps(lab, model, prompt_of(item, n), answer) for n in (None, note)]

        own, given = both(item.completion, item.followup)
        unrelated = both(item.completion, others[0].followup)[1]
        row = {"real_abs": (given - own).abs().mean(), "unrelated_abs": (unrelated - own).abs().mean()}
        row["answer_logp"] = own.mean()
        if item.id in following:
            size = len(following[item.id].split()) + 1
            answers = [following[o.id] for o in others if o.id in following]
            far = [abs(math.log((len(a.split()) + 1) / size)) for a in answers]
            near, distant = (answers[far.index(found)] for found in (min(far), max(far)))
            chosen = {"": following[item.id], "stranger_": near, "stranger_length_": distant}
            for prefix, answer in chosen.items():
                student, teacher = both(answer, item.followup)
                row[f"{prefix}margin"] = student.mean() - own.mean()
                row[f"{prefix}headroom"] = (teacher.mean() - given.mean()) - row[f"{prefix}margin"]
        rows[item.id] = {name: float(value) for name, value in row.items()}
    return rows


def test_measures_are_those_of_plain_passes_before_and_after(run, lab):
    """The model as it is, whatever the teacher, the sharing and the adapter."""
    report = report_of(run.out)
    written = json.loads((run.out / "before.json").read_text())["measured"]
    before, after = (expected(lab, model, run.held_out) for model in (run.before, run.after))
    assert [row["id"] for row in written] == list(before) and len(written) == 12
    for row in written:
        assert {k: v for k, v in row.items() if k != "id"} == pytest.approx(before[row["id"]], abs=2e-5)
    for name, change in report["measures"].items():
        if name in ("margin_over_stranger", "margin"):
            assert change["interactions"] == 8
        if name != "margin_over_stranger":
            pairs = [(before[i][name], after[i][name]) for i in before if name in before[i]]
            differences = torch.tensor([b - a for a, b in pairs], dtype=torch.float64)
            error = float(differences.std() / math.sqrt(len(pairs)))
            assert change["change"] == pytest.approx(float(differences.mean()), abs=2e-5)
            assert change["standard_error"] == pytest.approx(error, abs=2e-5)
    assert abs(report["measures"]["answer_logp"]["change"]) > 1e-3  # the run has moved the model
    # Before and at every evaluation, of which the last is that after training; and in the picture.
    steps = [row["step"] for row in report["history"] if "eval_measures/margin" in row]
    assert steps == [0, 1, 2] and (run.out / "report.png").stat().st_size > 20_000
    assert report["after"]["eval_measures/margin"] == pytest.approx(report["measures"]["margin"]["after"], abs=1e-6)
    share = sum(row["headroom"] > 0 for row in written if "headroom" in row) / 8
    assert report["before"]["eval_measures/headroom_share"] == share


def test_own_answers_before_with_the_follow_up_and_after(run, lab):
    tokenizer = lab.make_tokenizer()

    @torch.no_grad()
    def greedy(model, prompt):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = len(ids)
        while len(ids) < start + 5 and ids[-1] != 1:
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        return tokenizer.decode([i for i in ids[start:] if i != 1])

    rows = json.loads((run.out / "answers.json").read_text())
    assert len(rows) == 3 and report_of(run.out)["answers"] == rows
    for row in rows:
        item = next(i for i in run.held_out if i.id == row["id"])
        for name, model, note in (
            ("before", run.before, None),
            ("with_followup", run.before, item.followup),
            ("with_unrelated", run.before, row["unrelated"]),
            ("after", run.after, None),
        ):
            assert row[name].split() == [w for w in greedy(model, prompt_of(item, note)).split() if w[0] != "<"], name
    told = object.__new__(OwnAnswers)
    told.rule, told.rows = parse_rule("max_words=99"), rows
    assert "before 100% (44% to 100%)" in told.headroom()[-1]  # three answers are few


def test_measures_can_be_off(lab, tmp_path, runs, capsys):
    off = "--max-steps 1 --set measure_interactions=0 --set teacher_check=0"
    assert main(command(runs["lora, frozen"].out.parent, tmp_path, *off.split())) == 0
    report = report_of(tmp_path)
    assert report["measures"] == {} and report["answers"] is None and not (tmp_path / "answers.json").exists()
    assert not [name for row in report["history"] for name in row if "measures" in name]
    assert "held-out loss: " in capsys.readouterr().out


def rows_of(noise=0.01, **shifts):
    """Measures of 16 interactions, each moved by its shift; the noise adds up to 0."""
    base = {"real_abs": 0.5, "unrelated_abs": 0.4, "answer_logp": -2.0, "margin": -0.5, "stranger_margin": -1.5}
    signs = [(-1) ** i for i in range(16)]
    return [
        {"id": str(i), **{name: value + shifts.get(name, 0.0) + noise * sign for name, value in base.items()}}
        for i, sign in enumerate(signs)
    ]


@pytest.mark.parametrize(
    ("shifts", "first", "second"),
    [
        ({"margin": 0.5, "stranger_margin": 0.3}, "improved: the answers that came after", "listening: no sign"),
        ({"margin": 0.3, "stranger_margin": 0.3}, "not improved: .* strangers' answers .* did so too", "listening"),
        ({"real_abs": -0.1, "unrelated_abs": -0.2}, "not improved: .* did not gain", "worse: the model forgets to"),
        ({"real_abs": -0.1, "unrelated_abs": 0.1}, "not improved", "listening: real follow-ups .* less and unrelated"),
        ({"margin": -0.2}, "not improved: .* lost on", "listening: no sign"),
    ],
)
def test_the_verdict_names_what_improved_and_what_did_not(shifts, first, second):
    lines = verdict(changes(rows_of(), rows_of(0.03, **shifts)))
    for line, pattern in zip(lines, (first, second, "drift: the logged answers are as likely")):
        assert re.match(pattern, line), lines
    assert not any("loss" in line for line in lines)


def test_no_verdict_on_few_interactions_and_none_on_others():
    assert "too few for a verdict" in verdict(changes(rows_of()[:5], rows_of()[:5]))[0]
    with pytest.raises(ValueError, match="not those that were measured before"):
        changes(rows_of(), rows_of()[1:])
