"""How optimizer steps reach bfloat16 weights: every optimizer with every `weight_update`."""

import contextlib
import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsdpo.trainer import optim as optimizers_of
from fastsdpo.trainer.optim import ADAMW, TORCHAO, AdamWBF16, choose_update

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STEPS, RATE = 12, 2e-6


NAMES = ["adamw_torch", "adamw_torch_8bit"]
TWO, FOUR = ", ".join(ADAMW), ", ".join((*ADAMW, *TORCHAO))


@pytest.fixture(params=NAMES)
def optim(request):
    """torchao's optimizer as it is, but step by step instead of compiled for each shape."""
    if request.param != "adamw_torch":
        pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        yield request.param


@pytest.mark.parametrize(
    ("update", "optim", "dtypes", "chosen"),
    [
        ("auto", ADAMW[0], {FP32}, "plain"),
        ("auto", ADAMW[0], {BF16}, "float32_master"),
        ("auto", ADAMW[1], {BF16, FP32}, "float32_master"),
        ("auto", TORCHAO[0], {BF16}, "stochastic_rounding"),
        ("auto", TORCHAO[1], {BF16}, "stochastic_rounding"),
        ("auto", TORCHAO[0], {FP32}, "plain"),
        ("auto", "adamw_bnb_8bit", {BF16}, "plain"),
        ("auto", "sgd", {BF16}, "plain"),
        ("auto", ADAMW[0], {FP16}, "plain"),
        ("plain", ADAMW[0], {BF16}, "plain"),
        ("plain", TORCHAO[0], {BF16}, "plain"),
        ("plain", "sgd", {FP16}, "plain"),
        ("float32_master", ADAMW[0], {BF16}, "float32_master"),
        ("float32_master", TORCHAO[0], {BF16}, f"one of {TWO} with weight_update='float32_master', got 'a"),
        ("float32_master", "adamw_bnb_8bit", {BF16}, "got 'adamw_bnb_8bit'"),
        ("float32_master", ADAMW[0], {FP16}, "needs bfloat16 or float32 weights, got torch.float16"),
        ("stochastic_rounding", ADAMW[0], {BF16, FP32}, "stochastic_rounding"),
        ("stochastic_rounding", TORCHAO[0], {BF16}, "stochastic_rounding"),
        ("stochastic_rounding", "adamw_bnb_8bit", {BF16}, f"one of {FOUR} with weight_update='stochastic_rounding'"),
        ("stochastic_rounding", TORCHAO[0], {FP16}, "needs bfloat16 or float32 weights"),
    ],
)
def test_choices(update, optim, dtypes, chosen):
    """Of an update, or a refusal."""
    if chosen in ("plain", "float32_master", "stochastic_rounding"):
        assert choose_update(update, optim, dtypes) == chosen
    else:
        with pytest.raises(ValueError, match=chosen):
            choose_update(update, optim, dtypes)


def wide_model(lab, dtype):
    """The same weights in both dtypes; matrices large enough for states of 8 bits."""
    return lab.make_model(dtype=BF16, hidden_size=64, intermediate_size=96).to(dtype)


def movement(lab, folder, dtype, **settings):
    """How far each weight (or its float32 master) came at the learning rate of the paper."""
    model = wide_model(lab, dtype)
    before = [p.detach().float().clone() for p in model.parameters()]
    settings |= {"learning_rate": RATE, "max_steps": STEPS, "logging_steps": STEPS}
    trainer = lab.make_trainer(folder, model=model, **settings)
    trainer.train()
    state = trainer.optimizer.state
    after = [state[p].get("master", p.detach()).float() for p in trainer.model.parameters()]
    return torch.cat([(new - old).flatten() for new, old in zip(after, before)])


@pytest.fixture(scope="module")
def float32_movement(lab, tmp_path_factory):
    return movement(lab, tmp_path_factory.mktemp("float32"), FP32)


def followed(found, wanted):
    """The mean movement in the direction of the float32 run, as a share of that run's."""
    return float((found * wanted.sign()).mean() / wanted.abs().mean())


@pytest.mark.parametrize("update", ["auto", "stochastic_rounding"])
def test_bfloat16_weights_follow_the_float32_run(tmp_path, lab, float32_movement, optim, update, caplog):
    with caplog.at_level(logging.WARNING, logger="fastsdpo.trainer"):
        found = movement(lab, tmp_path, BF16, optim=optim, weight_update=update)
    assert followed(found, float32_movement) == pytest.approx(1, abs=0.15)
    assert not caplog.records


def test_plain_steps_are_lost(tmp_path, lab, float32_movement, optim, caplog):
    """And nothing is said: it was asked for."""
    with caplog.at_level(logging.WARNING, logger="fastsdpo.trainer"):
        found = movement(lab, tmp_path, BF16, optim=optim, weight_update="plain")
    assert followed(found, float32_movement) < 0.15
    assert not caplog.records


def warnings_of(trainer, caplog):
    told = caplog.at_level(logging.WARNING, logger="fastsdpo.trainer")
    with told, contextlib.suppress(ImportError):  # of the optimizer's package, asked for later
        trainer.create_optimizer()
    return [record.message for record in caplog.records]


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adafactor", "sgd"])
def test_an_optimizer_that_loses_steps_is_named(tmp_path, lab, caplog, optim):
    model = lab.make_model(dtype=BF16)
    trainer = lab.make_trainer(tmp_path, model=model, optim=optim, learning_rate=RATE)
    (said,) = warnings_of(trainer, caplog)
    assert said.startswith(
        f"optim={optim!r} trains bfloat16 weights without a float32 copy: a step "
        "below 1/512 of a weight is rounded away. At learning rate 2e-06 AdamW "
        "moves next to no weight above 0.001. Use optim='adamw_torch'"
    )
    assert "optim='adamw_torch_8bit' (stochastic rounding" in said


def test_a_given_optimizer(tmp_path, lab, caplog):
    model = lab.make_model(dtype=BF16)
    optimizers = (torch.optim.AdamW(model.parameters(), lr=RATE), None)
    (said,) = warnings_of(lab.make_trainer(tmp_path, model=model, optimizers=optimizers), caplog)
    assert said.startswith("the optimizer AdamW trains bfloat16 weights without a float32 copy")
    trainer = lab.make_trainer(tmp_path, model=model, optimizers=optimizers, weight_update="stochastic_rounding")
    with pytest.raises(ValueError, match="weight_update must be 'auto' or 'plain' with the optimizer"):
        trainer.create_optimizer()


def test_float16_weights_are_named(tmp_path, lab, caplog):
    trainer = lab.make_trainer(tmp_path, model=lab.make_model(dtype=FP16), learning_rate=RATE)
    (said,) = warnings_of(trainer, caplog)
    assert "float16 weights" in said and "1/4096" in said


@pytest.mark.parametrize("optim", NAMES[1:], indirect=True)
def test_a_resumed_run_with_eight_bit_states(tmp_path, lab, optim):
    """The rounding depends on seed and step, not on what else has drawn numbers."""

    def run(checkpoint=None, noise=0):
        steps = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
        trainer = lab.make_trainer(tmp_path, model=wide_model(lab, BF16), optim=optim, **steps)
        torch.rand(noise)
        trainer.train(resume_from_checkpoint=checkpoint)
        return lab.weights_of(trainer)

    whole = run()
    assert lab.largest_difference(run(noise=5), whole) == 0
    assert lab.largest_difference(run(str(tmp_path / "checkpoint-2")), whole) == 0


class Kernels(TorchDispatchMode):
    """Counts operators that do something, which are kernels on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = ("record_function", "view", "detach", "split", "empty", "alias", "expand")
        self.count += not any(word in func.__name__ for word in free)
        return func(*args, **(kwargs or {}))


def drawn_weights(dtype):
    """300 weights of odd shapes, one of them not contiguous, with gradients."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(n % 7 + 1, n % 11 + 1).to(dtype)) for n in range(299)]
    weights.append(torch.nn.Parameter(torch.randn(6, 5).to(dtype).T))
    for p in weights:
        p.grad = torch.randn(p.shape).to(dtype)
    return weights


@pytest.mark.parametrize("part", [2**24, 64])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(BF16, "float32_master"), (FP32, "float32_master"), (BF16, "stochastic_rounding")]
)
def test_steps_equal_adamw_in_float64(monkeypatch, dtype, rounding, part):
    """But for the rounding of float32; rounding to bfloat16 is right on average."""
    monkeypatch.setattr(optimizers_of, "PART", part)
    settings = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    found = drawn_weights(dtype)
    wanted = [torch.nn.Parameter(p.detach().double()) for p in found]
    oracle, optimizer = torch.optim.AdamW(wanted, **settings), AdamWBF16(found, **settings, rounding=rounding)
    for _ in range(3):
        for p, q in zip(found, wanted):
            q.grad = p.grad.double()
        oracle.step()
        optimizer.step()
    errors = []
    for p, q in zip(found, wanted):
        error = optimizer.state[p].get("master", p.detach()).double() - q.detach()
        scale = q.detach().abs().clamp(min=1e-3)
        errors.append((error / scale).flatten())
        if rounding == "float32_master":
            torch.testing.assert_close(p.detach(), optimizer.state[p].get("master", p.detach()).to(dtype))
    errors = torch.cat(errors)
    if rounding == "float32_master":
        assert float(errors.abs().max()) < 4e-7 * 3
    else:
        assert float(errors.abs().max()) < 3 * 2**-7 and abs(float(errors.mean())) < 3 * 2**-8 / len(errors) ** 0.5


def test_a_step_is_a_few_kernels():
    """However many weights there are: not eleven operators for each of 300."""
    counts = {}
    for rounding in ("float32_master", "stochastic_rounding"):
        weights = drawn_weights(BF16)[:-1]
        optimizer = AdamWBF16(weights, rounding=rounding)
        optimizer.step()
        with Kernels() as kernels:
            optimizer.step()
        counts[rounding] = kernels.count
    assert counts == {"float32_master": 4, "stochastic_rounding": 11}, counts


def test_what_is_not_finite_stays_so():
    """The NaN of CUDA kernels has all bits set, and would become -0."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int32).repeat(64)
    rounded = optimizers_of.stochastic_round(bits.view(torch.float32), BF16, 0).view(64, 4)
    assert rounded[:, :2].isnan().all() and (rounded[:, 2] == torch.inf).all() and (rounded[:, 3] == -torch.inf).all()
