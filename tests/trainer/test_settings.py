"""Settings that change how a step is computed, or what is said before it."""

import dataclasses
import logging

import pytest
import torch

from fastsdpo.modeling import default_dtype
from fastsdpo.online import ConstantUser, OnlineSDPOConfig, OnlineSDPOTrainer
from fastsdpo.train import build_parser, load, read_config
from fastsdpo.trainer import NonFiniteError, SDPOConfig, SDPOTrainer
from fastsdpo.trainer.data import InteractionDataset
from fastsdpo.trainer.presets import default_bf16, split_batch
from tests.plain import answer_logps
from tests.trainer.conftest import assert_close, gradients_of


@pytest.mark.parametrize("sharing", ["off", "conversation"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, lab, sharing, reentrant):
    settings = {"mode": "full", "sharing": sharing, "reference_kl": 0.2}
    loss, wanted = gradients_of(lab.make_trainer(tmp_path, **settings))
    settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = lab.make_trainer(tmp_path, **settings)
    checkpointed.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.model.enable_input_require_grads()
    other, found = gradients_of(checkpointed)
    assert other == pytest.approx(loss, rel=1e-6)
    assert_close(found, wanted, 1e-5)


def test_the_importance_ratio_is_that_to_the_initial_model(tmp_path, lab):
    """After the student has moved: r_t = min(p_student / p_initial, is_clip), without gradient."""
    clip = 1.1
    trainer = lab.make_trainer(tmp_path, mode="sampled_token", is_clip=clip)
    initial = lab.make_model()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    loss, found = gradients_of(trainer)

    model = trainer.model
    model.zero_grad()
    answers, ratios = [], []
    for index in range(len(trainer.train_dataset)):
        item = trainer.train_dataset[index]
        student = answer_logps(model, item.prompt_ids, item.completion_ids)
        with torch.no_grad():
            teacher = answer_logps(model, item.teacher_prompt_ids, item.completion_ids)
            before = answer_logps(initial, item.prompt_ids, item.completion_ids)
            ratio = (student - before).exp().clamp(max=clip)
        ratios.append(ratio)
        answers.append(-(ratio * (teacher - student.detach()) * student).mean())
    wanted = torch.stack(answers).mean()
    wanted.backward()
    ratios = torch.cat(ratios)
    assert (ratios == clip).any() and (ratios < clip).any()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert_close(found, {n: p.grad for n, p in model.named_parameters()}, 1e-5)


def check_with(tmp_path, lab, real, unrelated):
    """The check's warning when real and unrelated follow-ups have these log-ratios per token."""
    trainer = lab.make_trainer(tmp_path)
    sample = lab.make_interactions(3, turns=1)
    said = {item.followup.strip() for item in sample}
    from fastsdpo.trainer.teacher_check import teacher_check

    calls = []

    def log_ratios(items):
        calls.append(items)
        level = real if len(calls) == 1 else unrelated
        return [torch.full((len(item.completion_ids),), level) for item in items]

    check = teacher_check(sample, trainer.tokenize, log_ratios)
    assert len(said) == len(check.rows) == 3
    # The second call has every answer under another conversation's follow-up.
    for mine, other in zip(*calls):
        assert mine.completion_ids == other.completion_ids
        assert mine.teacher_prompt_ids != other.teacher_prompt_ids
    return check


def test_teacher_check_warnings(tmp_path, lab):
    assert "nothing to teach" in check_with(tmp_path, lab, 0.001, 0.5).warning
    assert "react" in check_with(tmp_path, lab, 0.3, 0.301).warning
    assert "unrelated follow-ups move" in check_with(tmp_path, lab, 0.2, 0.3).warning
    fine = check_with(tmp_path, lab, -0.4, 0.1)
    assert fine.warning is None
    assert (fine.real_abs, fine.unrelated_abs) == pytest.approx((0.4, 0.1))


def test_teacher_check_measures_the_model(tmp_path, lab, caplog):
    trainer = lab.make_trainer(tmp_path, teacher_check=3, max_steps=1)
    check = trainer.check_teacher()
    item = trainer.train_dataset[0]
    with torch.no_grad():
        teacher = answer_logps(trainer.model, item.teacher_prompt_ids, item.completion_ids)
        student = answer_logps(trainer.model, item.prompt_ids, item.completion_ids)
    assert check.rows[0].real == pytest.approx(float((teacher - student).mean()), abs=1e-5)
    with caplog.at_level(logging.INFO, logger="fastsdpo.trainer"):
        trainer.train()
    assert any("teacher check" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("batch", "processes", "most", "accumulation", "split"),
    [
        (32, 1, 8, 1, (8, 4)),
        (32, 2, 8, 1, (8, 2)),
        (32, 4, 8, 1, (8, 1)),
        (32, 8, 8, 1, (4, 1)),
        (32, 1, 32, 1, (32, 1)),
        (30, 1, 8, 1, (6, 5)),
        (14, 2, 4, 1, (1, 7)),
        (3, 3, 8, 1, (1, 1)),
        (32, 2, 8, 2, (8, 2)),  # of a configuration that is read back
    ],
)
def test_split_of_a_global_batch(batch, processes, most, accumulation, split):
    found = split_batch(batch, processes, most, accumulation)
    assert found == split
    assert found[0] * found[1] * processes == batch and found[0] <= most


@pytest.mark.parametrize(
    ("batch", "processes", "accumulation", "fault"),
    [
        (32, 3, 1, "global_batch_size must be a multiple of the 3 processes, got 32; take 30 or 33"),
        (2, 4, 1, "a multiple of the 4 processes, got 2; take 4 or 8"),
        (0, 1, 1, "got 0; take 1 or 2"),
        (32, 2, 4, "gradient_accumulation_steps must be left out .* got 4: 8 x 4 x 2 processes is not 32"),
    ],
)
def test_global_batches_that_cannot_be_split(batch, processes, accumulation, fault):
    with pytest.raises(ValueError, match=fault):
        split_batch(batch, processes, 8, accumulation)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(("config", "batch"), [(SDPOConfig, 32), (OnlineSDPOConfig, 16)])
def test_the_paper_s_batch_is_global(tmp_path, monkeypatch, processes, config, batch):
    """Where only the launcher knows the number of processes; test_two_processes: torchrun's variables."""
    monkeypatch.setattr(config, "world_size", property(lambda self: processes))
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    args = config.preset("paper", **settings)
    assert args.per_device_train_batch_size == batch // processes
    assert args.gradient_accumulation_steps == 1
    own = config.preset("paper", per_device_train_batch_size=4, **settings)
    assert (own.per_device_train_batch_size, own.gradient_accumulation_steps) == (4, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lab):
    """A checkpoint in bfloat16."""
    path = tmp_path_factory.mktemp("model")
    lab.make_model(dtype=torch.bfloat16).save_pretrained(path)
    lab.make_tokenizer().save_pretrained(path)
    return str(path)


def train_by_name(lab, folder, output, **changes):
    return SDPOTrainer(folder, lab.make_config(output, **changes), lab.make_interactions())


def online_by_name(lab, folder, output, **changes):
    config = OnlineSDPOConfig(output_dir=str(output), use_cpu=True, report_to=[], **changes)
    return OnlineSDPOTrainer(folder, config, ConstantUser("w3"), ["w1 w2"])


@pytest.mark.parametrize("by_name", [train_by_name, online_by_name])
def test_a_model_by_name_follows_the_rule_of_the_commands(tmp_path, lab, folder, by_name, monkeypatch):
    """float32 on a CPU; where the device has a GPU's rule, bfloat16 with a float32 master."""
    assert by_name(lab, folder, tmp_path).model.dtype == torch.float32
    asked = []

    def rule_of_a_gpu(device):
        asked.append(device)
        return default_dtype(torch.device("cuda"))

    monkeypatch.setattr("fastsdpo.trainer.model.default_dtype", rule_of_a_gpu)
    made = by_name(lab, folder, tmp_path)
    assert made.model.dtype == torch.bfloat16
    assert asked == [made.args.device]
    assert made.create_optimizer().rounding == "float32_master"
    asked.clear()
    assert by_name(lab, folder, tmp_path, dtype="float32").model.dtype == torch.float32
    assert not asked


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [([], torch.float32), (["--dtype", "auto"], torch.bfloat16), (["--set", "dtype=bfloat16"], torch.bfloat16)],
)
def test_the_command_s_dtype(tmp_path, lab, folder, flags, dtype):
    options = build_parser().parse_args(["data", "--model", folder, "-o", str(tmp_path), "--cpu", *flags])
    config = read_config(options)
    assert load(options, config)[0].dtype == dtype
    assert train_by_name(lab, folder, tmp_path, dtype=config.dtype).model.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "fp16", "has_bf16", "on"),
    [
        (None, False, True, True),
        ("auto", False, True, True),
        ("bfloat16", False, True, True),
        ("float32", False, True, False),
        ("float16", False, True, False),
        (None, True, True, False),
        (None, False, False, False),
    ],
)
def test_products_in_bfloat16_are_the_default_of_a_gpu(dtype, fp16, has_bf16, on):
    assert default_bf16(dtype, fp16, has_bf16) == on


@pytest.mark.parametrize("door", ["trainer", "command"])
def test_a_float32_checkpoint_trains_in_bfloat16_on_a_gpu(tmp_path, lab, monkeypatch, door):
    """The decision alone is a GPU's here; autocast is that of the CPU."""
    path = tmp_path / "model"
    lab.make_model().save_pretrained(path)
    lab.make_tokenizer().save_pretrained(path)
    assert not lab.make_config(tmp_path).bf16
    monkeypatch.setattr("fastsdpo.trainer.config.gpu_has_bf16", lambda use_cpu: True)
    given = []
    if door == "trainer":
        config = lab.make_config(tmp_path, max_steps=1)
        made = SDPOTrainer(str(path), config, lab.make_interactions())
    else:
        options = build_parser().parse_args(["data", "--model", str(path), "-o", str(tmp_path), "--cpu"])
        config = read_config(options)
        model, tokenizer, _ = load(options, config)
        config = lab.make_config(tmp_path, max_steps=1, bf16=config.bf16, dtype=config.dtype)
        made = SDPOTrainer(model, config, lab.make_interactions(), processing_class=tokenizer)
    made.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _m, _a, out: given.append(out.dtype))
    made.train()
    assert config.bf16 and made.model.dtype == torch.float32 and set(given) == {torch.bfloat16}
    for off in ({"bf16": False}, {"dtype": "float32"}):
        assert not lab.make_config(tmp_path, **off).bf16


TEACHERS = {"live": {}, "ema": {"teacher": "ema"}, "frozen": {"teacher": "frozen", "reference_kl": 0.1}}
TEACHERS |= {"trust_region": {"teacher": "trust_region"}, "guidance": {"guidance": 2.0}}
TEACHERS |= {"neutral": {"neutral_followup": "w3 w4", "max_tokens_per_pack": 60}}


@pytest.mark.parametrize("sharing", ["conversation", "off"])
@pytest.mark.parametrize("settings", TEACHERS.values(), ids=TEACHERS)
def test_tokens_per_second_are_those_computed(tmp_path, lab, sharing, settings):
    """Counted at the embedding, through which every token goes once per forward pass."""
    made = lab.make_trainer(tmp_path, sharing=sharing, max_steps=1, **settings)
    computed, items = [], []
    embedding = made.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: computed.append(args[0].numel()))
    run_pass = made.run_pass

    def noted(model, interactions, num_items, **options):
        items.extend(interactions)
        return run_pass(model, interactions, num_items, **options)

    made.run_pass = noted
    made.train()
    whole = sum(len(i.prompt_ids) + len(i.teacher_prompt_ids) + 2 * len(i.completion_ids) for i in items)
    (row,) = [row for row in made.state.log_history if "loss" in row]
    rates = row["sdpo/tokens_per_second"], row["sdpo/sequence_tokens_per_second"]
    assert rates[0] / rates[1] == pytest.approx(sum(computed) / whole, rel=1e-6)
    if sharing == "conversation" and not settings:
        assert sum(computed) < 0.8 * whole


def test_a_run_of_defaults_shows_its_loss(tmp_path, lab):
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    steps = {"max_steps": 11, "save_strategy": "no", "teacher_check": 0}
    args = SDPOConfig(str(tmp_path), template=lab.TEMPLATE, **steps, **quiet)
    made = SDPOTrainer(lab.make_model(), args, lab.make_interactions(), None, lab.make_tokenizer())
    made.train()
    assert [row["step"] for row in made.state.log_history if "loss" in row] == [1, 10, 11]


def test_the_sampled_token_loss_has_its_own_name(tmp_path, lab):
    held_out = lab.make_interactions(2, seed=7)
    sampled = lab.make_trainer(tmp_path, mode="sampled_token", eval_dataset=held_out).evaluate()
    full = lab.make_trainer(tmp_path, mode="full", eval_dataset=held_out).evaluate()
    assert "eval_sdpo/sampled_token_loss" in sampled and "eval_sdpo/divergence" not in sampled
    assert "eval_sdpo/divergence" in full and "eval_sdpo/sampled_token_loss" not in full


def test_a_guided_teacher_of_logged_interactions(tmp_path, lab):
    """Of text it is made; tokens must have it. Where the follow-up is the neutral one: no signal."""
    texts = [dataclasses.replace(i, followup="w3 w4") for i in lab.make_interactions(2)]
    settings = {"neutral_followup": "w3 w4", "guidance": 2.0, "allow_leaks": True}
    trainer = lab.make_trainer(tmp_path, interactions=texts, eval_dataset=texts[:1], **settings)
    loss, found = gradients_of(trainer)
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert max(float(gradient.norm()) for gradient in found.values()) < 1e-5
    _, plain = gradients_of(lab.make_trainer(tmp_path, interactions=texts))
    assert max(float(gradient.norm()) for gradient in plain.values()) > 1e-2
    tokens = list(lab.make_trainer(tmp_path, interactions=texts).train_dataset)
    for source in (tokens, InteractionDataset(tokens)):
        with pytest.raises(ValueError, match="came as tokens, which must have neutral"):
            lab.make_trainer(tmp_path, interactions=source, **settings)
    again = lab.make_trainer(tmp_path, interactions=list(trainer.train_dataset), **settings)
    assert again.train_dataset[1] == trainer.train_dataset[1]


def test_several_held_out_sets(tmp_path, lab):
    sets = {"a": lab.make_interactions(2, seed=7), "b": lab.make_interactions(3, seed=8)}
    metrics = lab.make_trainer(tmp_path, eval_dataset=sets).evaluate()
    for name, held_out in sets.items():
        alone = lab.make_trainer(tmp_path, eval_dataset=held_out).evaluate()
        assert metrics[f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)


def test_an_infinite_gradient_names_the_interaction(tmp_path, lab):
    """A finite loss whose gradient overflows, in one interaction of four."""
    interactions = lab.make_interactions(4, turns=1)
    trainer = lab.make_trainer(tmp_path, interactions=interactions, max_steps=1, sharing="off")
    poisoned = trainer.train_dataset[2].completion_ids
    run_pass = trainer.run_pass

    def run(model, items, num_items, **options):
        loss, statistics = run_pass(model, items, num_items, **options)
        if any(item.completion_ids == poisoned for item in items):
            loss = lab.Overflow.apply(loss)
        return loss, statistics

    trainer.run_pass = run
    with pytest.raises(NonFiniteError, match=r"the gradient is not finite; interactions: 'c2:0'\."):
        trainer.train()


def test_the_launcher_s_compiler_is_refused(tmp_path, lab, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match=r"ACCELERATE_DYNAMO_BACKEND .* must be 'no': .*'INDUCTOR'"):
        lab.make_config(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as accelerate launch sets it
    assert not lab.make_config(tmp_path).torch_compile


def test_evaluations_leave_no_loader_behind(tmp_path, lab):
    held_out = lab.make_interactions(2, seed=7)
    trainer = lab.make_trainer(tmp_path, eval_dataset={"a": held_out, "b": held_out[:1]})
    trainer.evaluate()
    kept = len(trainer.accelerator._dataloaders)
    trainer.evaluate()
    assert len(trainer.accelerator._dataloaders) == kept == 0
