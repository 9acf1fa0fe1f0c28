"""The Triton kernels in Triton's interpreter (`TRITON_INTERPRET=1 pytest -m interpreted`) under the contract of
all backends; and bugs known from other kernels, a test each, on ours."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastsdpo
from fastsdpo.testing import Rows, assert_gradient_close, make_rows
from tests.ops import contract
from tests.ops.contract import BF16, F32, FP16, each_loss

pytestmark = pytest.mark.interpreted
FIVE = ("sampled", "forward", "reverse", "jsd", "topk-jsd")
MOVED = {"rtol": 1e-5, "atol": 1e-6}  # a row that starts at another place of 16 bytes is summed in another order
EPSILON = torch.finfo(F32).eps


class Triton(contract.Contract):
    backend = "triton"
    moved = MOVED
    several = 9001
    floor_rising = 2e-5


class TestSample(Triton):
    """The part of the contract that `make test` has time for; the classes below, all of it, are slow."""

    dtypes = (BF16,)
    test_ignored_rows = contract.Edges.test_ignored_rows_may_hold_nan
    test_nothing_to_learn_from = contract.Edges.test_nothing_to_learn_from_gives_zero
    test_a_certain_token = contract.Edges.test_a_certain_token_has_probability_one_to_the_last_bit
    test_a_support_hardly_had = contract.Edges.test_a_support_that_the_teacher_hardly_has_is_renormalized
    test_a_slice = contract.Layouts.test_a_slice_gives_the_same
    test_in_place = contract.Layouts.test_a_gradient_in_place_lies_in_the_logits


@pytest.mark.slow
class TestThreeTypes(Triton, contract.Values, contract.Autograd, contract.LogProbs, contract.Linear):
    @each_loss("sampled", "forward", "reverse", "jsd")
    @pytest.mark.parametrize("teacher", ["rises", "falls", "stays"])
    def test_a_maximum_that_rises_late(self, loss, teacher):
        if teacher == "falls" and loss == contract.LOSSES["jsd"]:
            pytest.skip("policies without overlap: the exact gradient is near 0, a rounding of p is more")
        super().test_a_maximum_that_rises_late(loss, teacher)


@pytest.mark.slow
class TestTwoTypes(Triton, contract.Edges, contract.Layouts):
    dtypes = (F32, BF16)


def moved(tensor, by):
    """The same rows ``by`` elements behind a 16-byte boundary, at an odd stride, with NaN around them."""
    wide = torch.full((len(tensor), tensor.shape[1] + 13), math.nan, dtype=tensor.dtype)
    return wide[:, by : by + tensor.shape[1]].copy_(tensor)


class TestTritonAlone(Triton):
    def exact_to_roundings(self, case, loss, roundings=1.0, parts=(slice(None),), **options):
        """Within twice plain PyTorch's error, and roundings of a probability; for the sampled token of a log-prob."""
        options = {**loss, **options, "weights": torch.ones(len(case.target_ids))}
        want, (out, grad) = self.oracle(case, **options), self.run(case, **options)
        leaf = case.student.detach().requires_grad_()
        plain = fastsdpo.sdpo_loss(leaf, case.teacher, case.target_ids, backend="reference", **options).loss
        (plain,) = torch.autograd.grad(plain, leaf)
        size = 1.0
        if loss["mode"] == "sampled_token":
            size = float(torch.maximum(want.student_logps.abs(), want.teacher_logps.abs()).max())
        for part in parts:
            limits = {"floor": EPSILON, "absolute": roundings * EPSILON * size}
            assert_gradient_close(grad[part], want.grad[part], plain[part], **limits)
        return out, want

    @pytest.mark.slow
    @each_loss(*FIVE)
    @pytest.mark.parametrize(("vocabulary", "kind"), [(32000, FP16), (50257, BF16), (151936, F32)], ids=str)
    def test_real_vocabularies(self, loss, vocabulary, kind):
        """Whole rows, many tiles and programs; the teacher at another place of 16 bytes."""
        case = make_rows((1,), vocabulary, dtype=kind, ignored=0)
        self.check(contract.without_ties(replace(case, teacher=moved(case.teacher, 1)), loss), plain=True, **loss)

    @each_loss("forward", "reverse")
    def test_the_last_bits_of_a_certain_token_that_is_not_the_target(self, loss):
        """Its weight is not taken beside the target's, where 2^16 would leave four roundings of 2^-23."""
        below = torch.linspace(5, 11, 24)  # nats
        top = 3 + torch.rand(24, generator=torch.Generator().manual_seed(0)) * 90
        student = torch.full((24, 129), -200.0)
        student[:, 100], student[:, 70] = top, top - below  # beyond the first 64 tokens
        teacher = student.clone()
        teacher[:, 70] -= 0.1
        case = Rows(student, teacher, torch.full((24,), 70), torch.ones(24))
        want, (_, grad) = self.oracle(case, weights=case.weights, **loss), self.run(case, weights=case.weights, **loss)
        assert float((grad.double() - want.grad).abs().max()) < 2 * EPSILON

    @each_loss(*FIVE)
    @pytest.mark.parametrize("softcap", [None, 30.0])
    def test_gradients_of_unlikely_targets_and_softcaps_are_as_exact_as_plain_pytorch(self, loss, softcap):
        """Every row by itself, except with a softcap and for the KLs: of a row whose target is far less likely
        than the best token, the sums are exact to a few roundings."""
        case = make_rows((24,), 300, spread=3.0, ignored=0, seed=1)
        parts = [slice(None)] if softcap or loss.get("alpha") in (0.0, 1.0) else range(24)
        self.exact_to_roundings(case, loss, parts=parts, temperature=0.5, softcap=softcap)

    @pytest.mark.slow
    @each_loss(*FIVE)
    @pytest.mark.parametrize("spread", [3.0, 30.0])
    def test_exponentials_that_are_as_exact_as_those_of_a_gpu(self, loss, spread, monkeypatch):
        """PTX documents 2^-22 for ex2.approx, and for lg2.approx near 1: no kernel makes much more of it."""
        from triton.runtime import interpreter

        def approximate(function):
            """With a GPU's errors, up or down by the argument's bits."""

            def operation(self, argument):
                x = np.ascontiguousarray(argument.data)
                bits = x.view(np.uint32) * np.uint32(2654435761)
                error = np.where((bits ^ (bits >> np.uint32(15))) & np.uint32(64), 2.0**-22, -(2.0**-22))
                with np.errstate(all="ignore"):
                    y = function(x.astype(np.float64), error).astype(np.float32)
                return interpreter.TensorHandle(y, argument.dtype.scalar)

            return operation

        builder = interpreter.InterpreterBuilder
        monkeypatch.setattr(builder, "create_exp2", approximate(lambda x, error: np.exp2(x) * (1 + error)))
        monkeypatch.setattr(builder, "create_log2", approximate(lambda x, error: np.log2(x) + error))
        case = make_rows((24,), 300, spread=spread, ignored=0, seed=1)
        # One rounding, and two each of a probability and of a row's sum, over the temperature.
        out, want = self.exact_to_roundings(case, loss, roundings=5 / 0.5, temperature=0.5)
        error = (out.per_token_loss.double() - want.per_token_loss).abs()
        assert bool((error <= 1e-5 * want.per_token_loss.abs().clamp(min=1)).all())

    @pytest.mark.slow
    @each_loss("forward", "reverse")
    def test_a_kl_does_not_depend_on_where_a_row_lies(self, loss):
        """One constant on all of the teacher's logits: it is not the difference of two large means."""
        case = make_rows((8,), 129, ignored=0)
        y = torch.arange(8) * 16
        case.student[torch.arange(8), y] += torch.linspace(0, 30, 8)  # up to certain
        teacher = case.student + 0.01 * torch.randn(8, 129)
        # Multiples of 2^-10: adding a constant is exact.
        student, teacher = (torch.round(x * 1024) / 1024 for x in (case.student, teacher))
        for constant in (0.0, -100.0, 1000.0):
            out, want = self.exact_to_roundings(Rows(student, teacher + constant, y, case.weights), loss)
            assert float((out.per_token_loss - want.per_token_loss).abs().max()) < 4 * EPSILON
