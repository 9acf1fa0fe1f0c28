"""The losses inside the installed verl: its configuration, its batches, its loss function, its engine."""

import functools
import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastsdpo.integrations import sdpo_fork
from fastsdpo.integrations import verl as integration
from fastsdpo.integrations.verl_self_teacher import use_self_teacher
from tests.forked import free_port, run_together
from tests.integrations import verl_on_cpu as lab

PROMPTS, ANSWERS = [2, 4, 3], [5, 1, 3]
MASKS = [[1, 1, 0, 0, 1], [1], [1, 1, 1]]  # a tool wrote two tokens of the first answer
AGGREGATIONS = (*sdpo_fork.AGGREGATIONS, "token-sum")
NAME = integration.LOSS_NAME


@pytest.fixture(scope="module")
def verl():
    """What is used of verl; imported here because that takes seconds."""
    pytest.importorskip("verl", reason="needs verl: see docs/integrations/verl.md for the install")
    lab.use_cpu()
    from omegaconf import OmegaConf
    from tensordict import TensorDict
    from verl.trainer.distillation import losses
    from verl.utils import tensordict_utils
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.metric import reduce_metrics
    from verl.utils.py_functional import append_to_dict
    from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig
    from verl.workers.utils.padding import left_right_2_no_padding

    integration.register_distillation_loss()
    folder = os.path.dirname(importlib.import_module("verl").__file__)
    yaml = OmegaConf.load(f"{folder}/trainer/config/distillation/distillation.yaml")

    def settings(loss_mode=NAME, **changes):
        """verl's YAML with changes, as its trainer reads it."""
        changed = OmegaConf.merge(yaml.distillation_loss, {"loss_mode": loss_mode, **changes})
        return DistillationConfig(distillation_loss=omega_conf_to_dataclass(changed))

    yield SimpleNamespace(
        settings=settings,
        actor=functools.partial(FSDPActorConfig, rollout_n=1, ppo_micro_batch_size_per_gpu=1),
        losses=losses,
        loss=losses.distillation_ppo_loss,
        TensorDict=TensorDict,
        DistillationConfig=DistillationConfig,
        DistillationLossConfig=DistillationLossConfig,
        assign=tensordict_utils.assign_non_tensor,
        unpad=left_right_2_no_padding,
        append_to_dict=append_to_dict,
        reduce_metrics=reduce_metrics,
    )
    for registry in (losses.DISTILLATION_LOSS_REGISTRY, losses.DISTILLATION_SETTINGS_REGISTRY):
        del registry[NAME]


nested = lab.nested


@pytest.fixture
def given():
    """Per sequence, in float64: log-probs of its tokens, each at the position before the token's."""
    torch.manual_seed(5)

    def rows(lengths, draw=torch.rand):
        return [draw(n, dtype=torch.float64) for n in lengths]

    lengths = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS)]
    values = {role: [-30 * row for row in rows(lengths)] for role in ("student", "teacher")}
    values["advantages"] = rows(ANSWERS, torch.randn)  # of the task's rewards
    values["weights"] = [row + 0.5 for row in rows(ANSWERS)]  # of the rollout correction
    values["teacher"][0][4] = -torch.inf  # of a token that a tool wrote
    return [
        SimpleNamespace(mask=mask, **{name: row[i] for name, row in values.items()}) for i, mask in enumerate(MASKS)
    ]


def answer(row, n):
    """The log-probs of the answer's ``n`` tokens, in a row of the whole sequence."""
    return row[len(row) - n - 1 : -1]


def make_batch(verl, given, layout="nested", dtype=torch.float64, stale=0.0, corrected=False):
    """``(leaf, model_output, data)`` as verl's engine hands them to a loss, for one micro-batch.

    ``stale``: log-probs of now minus those of the policy that wrote the answers, in nats.
    """
    leaf = torch.cat([row.student for row in given]).to(dtype).requires_grad_()
    answers = [len(row.mask) for row in given]
    lengths = [len(row.student) for row in given]
    columns = {
        "response_mask": [torch.tensor(row.mask) for row in given],
        "old_log_probs": [answer(row.student, n).to(dtype) - stale for row, n in zip(given, answers)],
        "advantages": [row.advantages.to(dtype) for row in given],
    }
    if corrected:
        columns["rollout_is_weights"] = [row.weights.to(dtype) for row in given]
    if layout == "nested":
        tensors = {name: nested(rows) for name, rows in columns.items()}
        tensors["prompts"] = nested(torch.zeros(n - m) for n, m in zip(lengths, answers))
        tensors["responses"] = nested(torch.zeros(n) for n in answers)
        tensors["teacher_logprobs"] = nested(row.teacher.to(dtype)[:, None] for row in given)
        data = verl.TensorDict(tensors, batch_size=len(given))
    else:
        width = max(n - m for n, m in zip(lengths, answers))
        used = torch.zeros(len(given), width + max(answers), dtype=torch.long)
        teacher = torch.zeros(*used.shape, 1, dtype=dtype)
        for i, (n, m) in enumerate(zip(lengths, answers)):
            used[i, width + m - n : width + m] = 1
            teacher[i, width + m - n : width + m, 0] = given[i].teacher
        tensors = {name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for name, rows in columns.items()}
        tensors |= {"prompts": used[:, :width], "responses": used[:, width:]}
        tensors |= {"input_ids": used, "position_ids": used, "attention_mask": used}
        tensors |= {"teacher_logprobs": teacher, "teacher_ids": used[..., None]}
        data = verl.unpad(verl.TensorDict(tensors, batch_size=len(given)))
    tokens = sum(map(sum, MASKS))  # of the whole batch, of which this may be a part
    verl.assign(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=len(MASKS))
    return leaf, {"log_probs": nested(leaf.split(lengths))}, data


def run(verl, given, config, *, aggregation="token-mean", **how):
    """``(loss, gradient of the student's log-probs, metrics)`` from verl's own function; ``how`` of `make_batch`."""
    leaf, output, data = make_batch(verl, given, **how)
    loss, metrics = verl.loss(verl.actor(loss_agg_mode=aggregation), config, output, data)
    loss.backward()
    return loss.detach(), leaf.grad, metrics


def defined(given, aggregation="token-mean", bound=None, corrected=False, task=None):
    """The gradient of ``-sum_i w_i A_i log p_S`` with the constants ``A = log p_T - log p_S``."""
    leaf = torch.cat([row.student for row in given]).requires_grad_()
    counts = [sum(row.mask) for row in given]
    total = torch.zeros((), dtype=torch.float64)
    for i, (whole, row) in enumerate(zip(leaf.split([len(r.student) for r in given]), given)):
        counted = torch.tensor(row.mask) == 1
        student, teacher = (answer(x, len(row.mask))[counted] for x in (whole, row.teacher))
        advantage = (teacher - student).detach()
        if bound is not None:
            advantage = advantage.clamp(-bound, bound)
        if task is not None:
            advantage = task * advantage + row.advantages[counted]
        if corrected:
            advantage = advantage * row.weights[counted]
        weight = {
            "token-mean": 1 / sum(counts),
            "token-sum": 1.0,
            "seq-mean-token-sum": 1 / len(counts),
            "seq-mean-token-mean": 1 / counts[i] / len(counts),
            "seq-mean-token-sum-norm": 1 / len(counts) / max(ANSWERS),
        }
        total = total - (advantage * student).sum() * weight[aggregation]
    total.backward()
    return leaf.grad


def assert_same(found, want):
    assert want.norm() > 0
    assert (found.double() - want).norm() <= 1e-6 * want.norm()


def gaps(given):
    """``log p_S - log p_T`` of the tokens that count."""
    return torch.cat([answer(row.student - row.teacher, len(row.mask))[torch.tensor(row.mask) == 1] for row in given])


PLAIN = {"use_task_rewards": False}
# Settings of verl, arguments of `run` and arguments of `defined`.
CASES = {
    f"{how}-{bound}": (PLAIN | {"loss_max_clamp": bound}, {"aggregation": how}, {"aggregation": how, "bound": bound})
    for how in AGGREGATIONS
    for bound in (None, 10.0)
} | {
    "padded, as verl's older trainer": (PLAIN, {"layout": "padded"}, {}),
    "beside task rewards": ({"distillation_loss_coef": 0.5}, {}, {"task": 0.5}),
    # Bounds that float32 rounds.
    "0.1": (PLAIN | {"loss_max_clamp": 0.1}, {"dtype": torch.float32}, {"bound": 0.1}),
    "3.3": (PLAIN | {"loss_max_clamp": 3.3}, {"dtype": torch.float32}, {"bound": 3.3}),
}


@pytest.mark.parametrize("policy_gradient", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_definitions(verl, given, name, policy_gradient):
    assert (gaps(given) > 10).any() and (gaps(given) < -10).any()
    changes, how, want = CASES[name]
    config = verl.settings(use_policy_gradient=policy_gradient, **changes)
    assert config.distillation_loss.use_task_rewards == ("task" in want)
    assert_same(run(verl, given, config, **how)[1], defined(given, **want))


def test_defaults_of_the_dataclass(verl, given):
    """Not those of the YAML: policy gradient, clamp 10, task rewards."""
    config = verl.DistillationConfig(distillation_loss=verl.DistillationLossConfig(loss_mode=NAME))
    assert_same(run(verl, given, config)[1], defined(given, bound=10.0, task=1.0))


@pytest.mark.parametrize(("layout", "policy_gradient"), [("nested", False), ("padded", False), ("padded", True)])
def test_rollout_correction(verl, given, layout, policy_gradient):
    """verl multiplies by it in its policy loss only; backpropagation must not lose it."""
    config = verl.settings(use_policy_gradient=policy_gradient, loss_max_clamp=10.0, use_task_rewards=False)
    found = run(verl, given, config, layout=layout, corrected=True)[1]
    assert_same(found, defined(given, bound=10.0, corrected=True))


BOUNDS = {"loss_max_clamp": 10.0, "log_prob_min_clamp": -10.0, "topk": 4, "use_chunked_topk": True}
CLIPS = {"use_task_rewards": False, "clip_ratio_low": 0.6, "clip_ratio_high": 0.7}


@pytest.mark.parametrize("stale", [0.0, 0.5, -0.5])
@pytest.mark.parametrize("changes", [{}, BOUNDS, CLIPS], ids=str)
def test_policy_gradient_is_verls_k1(verl, given, changes, stale):
    """Every setting means what it means there, the clipping of stale answers included."""
    changes = {"use_policy_gradient": True, **changes}
    given[0].teacher[4] = -3.0  # k1 makes NaN of infinity, also where it does not count
    ours = run(verl, given, verl.settings(**changes), stale=stale)
    theirs = run(verl, given, verl.settings(loss_mode="k1", **changes), stale=stale)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=0, atol=0)
    assert theirs[1].norm() > 0


def test_metrics_of_micro_batches(verl, given):
    """Per token of the batch, however it is split: tokens count 3, and 1 and 3."""
    config = verl.settings(use_task_rewards=False, loss_max_clamp=10.0)
    metrics = {}
    for part in (given[:1], given[1:]):
        verl.append_to_dict(metrics, run(verl, part, config)[2])
    reduced = verl.reduce_metrics(metrics)
    assert reduced["distillation/log_ratio_mean"] == pytest.approx(-gaps(given).mean().item())
    assert reduced["distillation/loss"] == pytest.approx(gaps(given).clamp(-10, 10).mean().item())


@pytest.mark.parametrize("policy_gradient", [False, True])
@pytest.mark.parametrize("bound", [0.0, -10.0])
def test_bound_below_zero(verl, given, bound, policy_gradient):
    config = verl.settings(use_policy_gradient=policy_gradient, loss_max_clamp=bound)
    with pytest.raises(ValueError, match=r"loss_max_clamp must be null or above 0, got -?[01]"):
        run(verl, given, config)


def test_more_than_one_teacher_logprob(verl, given):
    _, output, data = make_batch(verl, given)
    data["teacher_logprobs"] = nested(row.teacher[:, None].expand(-1, 2) for row in given)
    with pytest.raises(ValueError, match=r"teacher_logprobs must have one .* \(3, 5\), got \(3, 5, 2\)"):
        verl.loss(verl.actor(), verl.settings(), output, data)


def test_registered_twice(verl):
    with pytest.raises(ValueError, match="already registered"):
        integration.register_distillation_loss()


def test_not_the_fork(verl):
    with pytest.raises(ImportError, match="has no compute_self_distillation_loss"):
        sdpo_fork.patch_sdpo_fork()


@pytest.fixture(scope="module")
def engine(verl, qwen2_folder):
    with lab.one_process():
        yield lab.make_engine(qwen2_folder)


@pytest.mark.parametrize("name", lab.OBJECTIVES)
def test_self_teacher(verl, engine, qwen2_folder, name):
    """Values and gradients of a plain model, from either trainer's batches."""
    objective = lab.OBJECTIVES[name]
    want = lab.defined(qwen2_folder, **objective)
    with use_self_teacher(**objective):
        for data in (lab.make_batch(), lab.make_batch(packed=False, padded=True, teacher="agent loop")):
            found = lab.run(engine, data, lab.actor_loss())
            lab.assert_same(found, want)
            # 6 of the 9 tokens that count
            assert found[2]["distillation/teacher_fraction"].aggregate() == pytest.approx(6 / 9)
    assert engine.module.training


def test_self_teacher_and_dropout(verl, engine, qwen2_folder, monkeypatch):
    """The teacher's pass runs without; for the student's every module has the mode that it had before."""
    layers, modes, begin = engine.module.model.layers, [], engine.optimizer_zero_grad
    for layer in layers:
        monkeypatch.setattr(layer.self_attn, "attention_dropout", 0.5)

    def frozen_attention():
        begin()
        for layer in layers:
            layer.self_attn.eval()

    monkeypatch.setattr(engine, "optimizer_zero_grad", frozen_attention)
    hook = layers[0].mlp.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    with hook, use_self_teacher("full"):
        found = lab.run(engine, lab.make_batch(), lab.actor_loss())
    lab.assert_same(found, lab.defined(qwen2_folder, "full"))
    assert modes[0] is False and modes.count(False) == 2 and modes.count(True) >= 2  # two micro-batches


def test_loss_scale_factor(verl, engine):
    """Without it verl's seq-mean-token-sum-norm divides by the longest answer of a micro-batch, for every loss."""
    losses = {}
    for factor in (None, 7):
        loss = lab.actor_loss(loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=factor)
        for size in (1, 4):
            data = lab.make_batch()
            verl.assign(data, micro_batch_size_per_gpu=size)
            with use_self_teacher("full"):
                losses[factor, size] = lab.run(engine, data, loss)[0]
    assert losses[7, 1] == pytest.approx(losses[7, 4])
    assert losses[7, 4] == pytest.approx(losses[None, 4] * max(map(len, lab.ANSWERS)) / 7)
    assert losses[None, 1] > 1.1 * losses[None, 4]


def answers_of(folder, temperature):
    """Float32 log-probs of the answers' tokens."""
    student = lab.logits_of(folder)[1]
    rows = [(z.detach() / temperature).log_softmax(-1) for z in student]
    return [row[range(len(ids)), ids].float() for row, ids in zip(rows, lab.ANSWERS)]


def test_self_teacher_as_a_penalty_of_the_policy_loss(verl, engine, qwen2_folder):
    """With answers of the present policy its gradient is that of the plain loss."""
    columns = {"old_log_probs": answers_of(qwen2_folder, lab.TEMPERATURE)}
    columns["advantages"] = [torch.zeros(len(ids)) for ids in lab.ANSWERS]
    with use_self_teacher("sampled_token", use_policy_gradient=True, use_task_rewards=True):
        found = lab.run(engine, lab.make_batch(**columns), lab.actor_loss())
    want = lab.defined(qwen2_folder, "sampled_token")
    lab.assert_same((want[0], found[1]), want)


def test_self_teacher_with_bound_and_rollout_correction(verl, engine, qwen2_folder):
    factors = [[0.5 + 0.3 * i for i in range(len(ids))] for ids in lab.ANSWERS]
    want = lab.defined(qwen2_folder, "full", factors=factors, bound=1.0)
    assert 0.1 < want[0] < 0.99 * lab.defined(qwen2_folder, "full", factors=factors)[0]
    with use_self_teacher("full", loss_max_clamp=1.0):
        found = lab.run(engine, lab.make_batch(rollout_is_weights=factors), lab.actor_loss())
    lab.assert_same(found, want)
    assert 0 < found[2]["distillation/clamped_fraction"].aggregate() < 6 / 9


def test_topk_of_a_server(verl, engine, qwen2_folder):
    """The divergences of `register_distillation_loss`; verl's own goes its own way."""
    torch.manual_seed(3)
    logits = [torch.randn(len(prompt + ids), 63) for prompt, ids in zip(lab.PROMPTS, lab.ANSWERS)]
    best = [row.log_softmax(-1).topk(lab.TOPK) for row in logits]
    served = {"teacher_ids": [b.indices.int() for b in best], "teacher_logprobs": [b.values for b in best]}
    rows = [slice(len(prompt) - 1, -1) for prompt in lab.PROMPTS]
    given = {"teacher": [lab.TEMPERATURE * z[r] for z, r in zip(logits, rows)], "mode": "topk"}
    given["support"] = [b.indices[r] for b, r in zip(best, rows)]

    def found(loss_mode):
        data = lab.make_batch(teacher=None, **served)
        verl.assign(data, distillation_use_topk=True, distillation_only=True)
        config = verl.settings(loss_mode, use_task_rewards=False, topk=lab.TOPK)
        return lab.run(engine, data, functools.partial(verl.loss, verl.actor(), config))

    before = found("forward_kl_topk")
    cases = {"tail": {"alpha": 0.0}, "renormalized": {"alpha": 0.4, "add_tail": False}}
    try:
        for name, options in cases.items():
            integration.register_distillation_loss(name, mode="topk", **options)
            lab.assert_same(found(name), lab.defined(qwen2_folder, **given, **options))
        after = found("forward_kl_topk")
    finally:
        for registry in (verl.losses.DISTILLATION_LOSS_REGISTRY, verl.losses.DISTILLATION_SETTINGS_REGISTRY):
            [registry.pop(name, None) for name in cases]
    assert before[0] == after[0] != 0
    assert all(torch.equal(grad, after[1][name]) for name, grad in before[1].items())


REFUSED = {
    "policy gradient": ({"use_policy_gradient": True}, {}, ValueError, "use_policy_gradient must be False for a div"),
    "no support": ({"mode": "topk"}, {}, ValueError, "topk must be given"),
    "mode": ({"mode": "all"}, {}, ValueError, "mode must be one of"),
    "alpha": ({"alpha": 2.0}, {}, ValueError, "alpha must lie in"),
    "bound": ({"loss_max_clamp": 0.0}, {}, ValueError, "loss_max_clamp must be null or above 0"),
    "no prompts": ({}, {"teacher": None}, ValueError, "teacher_prompt_ids must be a column of the batch or"),
    "fused kernels": ({}, {"use_fused_kernels": True}, NotImplementedError, "use_fused_kernels must be False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_self_teacher_refuses(verl, engine, name):
    options, batch, error, words = REFUSED[name]
    data = lab.make_batch(teacher=batch.get("teacher", "column"))
    verl.assign(data, use_fused_kernels=batch.get("use_fused_kernels", False))
    with pytest.raises(error, match=words), use_self_teacher(**options):
        lab.run(engine, data, lab.actor_loss())
    with use_self_teacher():  # nothing is left of it
        pass


def test_only_the_versions_that_were_tested(verl, monkeypatch):
    monkeypatch.setattr(importlib.import_module("verl"), "__version__", "0.10.0")
    for call in (use_self_teacher, functools.partial(integration.register_distillation_loss, "new", mode="topk")):
        with pytest.raises(ImportError, match=r"was tested with verl 0\.9\.\*, got 0\.10\.0"):
            call()
    with pytest.raises(ValueError, match="a server scores K tokens"):
        integration.register_distillation_loss("new", mode="full")


def test_recipe(verl):
    """The configuration of examples/verl is one that this verl knows, and starts no teacher servers."""
    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.utils import need_teacher_policy
    from verl.utils.config import omega_conf_to_dataclass

    with initialize_config_dir(str(Path(__file__).parents[2] / "examples/verl"), version_base=None):
        config = compose("self_teacher", overrides=["trainer.n_gpus_per_node=8"])
    assert not need_teacher_policy(config)
    assert omega_conf_to_dataclass(config.actor_rollout_ref.actor).engine.strategy == "fsdp2"


@pytest.mark.slow
def test_self_teacher_in_two_processes(verl, qwen2_folder):
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [Path(__file__).with_name("verl_on_cpu.py"), qwen2_folder]
    run_together([(command, {**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(2)], timeout=480)
