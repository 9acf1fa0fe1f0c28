"""The contract of the losses: what every backend must do, each property stated once.

`test_reference`, `test_native`, `test_triton` and `gpu/test_gpu` subclass these classes and name the backend.
Beside them they test only what one backend alone promises. Values and gradients are compared with float64
autograd of the written formulas (`fastsdpo.testing`).
"""

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing

import fastsdpo
from fastsdpo.ops import rows as door
from fastsdpo.ops.checks import as_rows, flat_ids
from fastsdpo.ops.rows import LossOptions, RowCall, Tokens
from fastsdpo.testing import Rows, assert_gradient_close, effective_logits, make_rows, oracle_sdpo_loss

F32, BF16, FP16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
INF, NAN = math.inf, math.nan
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SCALES = {"plain": {}, "cap": {"temperature": 0.7, "softcap": 4.0}}
LOSSES = {
    "sampled": {"mode": "sampled_token"},
    "forward": {"mode": "full", "alpha": 0.0},
    "reverse": {"mode": "full", "alpha": 1.0},
    "jsd": {"mode": "full", "alpha": 0.3},
    "topk-forward": {"mode": "topk", "topk": 5, "alpha": 0.0},
    "topk-reverse": {"mode": "topk", "topk": 5, "alpha": 1.0},
    "topk-jsd": {"mode": "topk", "topk": 5, "alpha": 0.3},
    "topk-reverse-renorm": {"mode": "topk", "topk": 5, "alpha": 1.0, "add_tail": False},
    "topk-jsd-renorm": {"mode": "topk", "topk": 5, "alpha": 0.3, "add_tail": False},
}


def each_loss(*names: str):
    """Runs a test for the losses of these names, all without any."""
    return pytest.mark.parametrize("loss", [LOSSES[name] for name in names or LOSSES], ids=names or LOSSES)


class Contract:
    """Which backend computes, where, and what its arithmetic promises."""

    backend: str
    device = "cpu"
    dtypes = (F32, BF16, FP16)
    vocabularies = (1, 2, 127, 128, 4097)
    value = 1e-5  # of losses and log-probs, relative and absolute
    total = 1e-6  # of the sum, absolute
    log_prob = CLOSE  # of log-probs alone, and of entropies
    floor = 4e-6  # of gradients, see `assert_gradient_close`
    floor_beside_plain: float | None = None  # of gradients that may have twice plain PyTorch's error
    floor_rising = None  # of gradients where a maximum rises by e^150; None as above
    moved = EXACT  # between a row and the same row elsewhere in memory
    rows_are_alone = True  # a row's bits do not depend on the other rows
    several = 33_000  # a vocabulary of several tiles, segments or programs

    def pytest_generate_tests(self, metafunc):
        if "size" in metafunc.fixturenames:
            sizes = [(129, dtype, scale) for dtype in self.dtypes for scale in SCALES]
            sizes += [(v, self.dtypes[v % len(self.dtypes)], "plain") for v in self.vocabularies]
            ids = [f"V{v}-{str(dtype)[6:]}-{scale}" for v, dtype, scale in sizes]
            metafunc.parametrize("size", sizes, ids=ids)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=str)

    @pytest.fixture(autouse=True)
    def _tensors_are_made_on_the_device(self):
        if self.device == "cpu":
            yield
        else:
            with torch.device(self.device):
                yield

    def rows(self, shape, vocabulary, **options) -> Rows:
        with torch.device("cpu"):
            case = make_rows(shape, vocabulary, **options)
        tensors = (case.student, case.teacher, case.target_ids, case.weights)
        return Rows(*(tensor.to(self.device) for tensor in tensors))

    def loss(self, student, teacher, target_ids, **options):
        return fastsdpo.sdpo_loss(student, teacher, target_ids, backend=self.backend, **options)

    def run(self, case: Rows, **options):
        """(results, gradient of the student's logits), which stay where they lie."""
        leaf = case.student.detach().requires_grad_()
        out = self.loss(leaf, case.teacher, case.target_ids, **options)
        return out, torch.autograd.grad(out.loss, leaf)[0]

    def oracle(self, case: Rows, **options):
        """float64, on the support that the backend takes: which of equal logits belong to it is its choice."""
        ids = None
        if options.get("topk"):
            logits, targets = as_rows(case.student), flat_ids(case.target_ids)
            ids = door.support(logits, targets, options["topk"], -100, self.backend)
        return oracle_sdpo_loss(case.student, case.teacher, case.target_ids, topk_ids=ids, **options)

    def check(self, case: Rows, *, plain=False, floor=None, **options):
        """Compares all results and the gradient with the formula; ``plain`` allows plain PyTorch's error twice."""
        want = self.oracle(case, **options)
        out, grad = self.run(case, **options)
        exact = case.student.dtype == F64
        tight = 1e-12 if exact else self.value
        s, t = want.student_logps, want.teacher_logps
        ratio = torch.where(s == t, 0.0, t - s)
        for name, got, expected in zip(out._fields, out, (want.loss, want.per_token_loss, ratio, s, t), strict=True):
            rounded = plain or options.get("softcap")  # a softcap rounds the logits
            absolute = min(tight, self.total) if name == "loss" and not rounded else tight
            message = functools.partial("{}: {}".format, name)
            torch.testing.assert_close(got.double(), expected, rtol=tight, atol=absolute, msg=message)
        if not want.grad.isfinite().all():
            return out, grad
        if not plain:
            assert_gradient_close(grad, want.grad, floor=1e-13 if exact else self.floor)
        if plain or self.floor_beside_plain:
            wide = replace(case, student=case.student.float(), teacher=case.teacher.float())
            leaf = wide.student.detach().requires_grad_()
            loss = fastsdpo.sdpo_loss(leaf, wide.teacher, wide.target_ids, backend="reference", **options).loss
            yardstick = torch.autograd.grad(loss, leaf)[0].to(case.student.dtype)
            assert_gradient_close(grad, want.grad, yardstick, floor=floor or self.floor_beside_plain or self.floor)
        return out, grad

    def check_fused(self, case: Rows, softcap=0.0, **loss) -> list[torch.Tensor]:
        """Compares forward with a gradient buffer, apart and over the logits, with forward and then backward, bit by
        bit; returns the results. (`linear_sdpo_loss` passes the logits of a chunk as their gradient's buffer.)"""
        student, teacher = as_rows(case.student).clone(), as_rows(case.teacher)
        ids, weights = case.target_ids.flatten(), case.weights.flatten()
        tokens = Tokens(ids, weights, torch.full_like(weights, -6.0))
        options = LossOptions(0.9, softcap, is_clip=2.0, **loss)
        if options.topk:
            tokens = tokens._replace(topk_ids=student.topk(options.topk, -1).indices.flatten(0, 1))
        call = RowCall(student, teacher, tokens, options, self.backend)
        found = door.forward(call)
        grad, apart = torch.empty_like(student), torch.empty_like(student)
        door.backward(torch.ones(1), found, call, grad)
        for buffer in (apart, student):
            got = door.forward(call, buffer)
            for a, b in zip((*got[:4], buffer), (*found[:4], grad), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return [*found[:4], grad[0] if len(grad) == 1 else grad.flatten(0, 1)]


def limited(loss: dict, vocabulary: int) -> dict:
    """The loss with a support that fits into the vocabulary."""
    return {**loss, "topk": min(loss["topk"], vocabulary)} if "topk" in loss else loss


def without_ties(case: Rows, loss: dict) -> Rows:
    """Lowers logits that equal the last of the support, of which backends may choose another."""
    if "topk" in loss:
        equal = case.student == case.student.topk(loss["topk"], -1).values[..., -1:]
        case.student[equal & (equal.cumsum(-1) > 1)] -= 1
    return case


class Values(Contract):
    """Losses and gradients against the formula."""

    @each_loss()
    def test_loss_and_gradient_equal_the_formula(self, loss, size):
        vocabulary, dtype, scale = size
        case = self.rows((3, 4) if vocabulary < 5000 else (1, 3), vocabulary, dtype=dtype, seed=vocabulary % 7)
        options = {**limited(loss, vocabulary), **SCALES[scale], "weights": case.weights}
        without_ties(case, options)
        old = torch.full(case.target_ids.shape, -4.0)
        out, _ = self.check(case, old_logps=old, is_clip=2.0, **options)
        assert out.loss.dtype == (F64 if dtype == F64 else F32)
        assert out.loss.requires_grad and not any(field.requires_grad for field in out[1:])

    @each_loss()
    def test_a_common_offset_costs_no_digits(self, loss):
        """The logits are multiples of 1/64: adding 10,000 to them is exact."""
        case = self.rows((4,), 1000, ignored=0)
        student, teacher = ((x * 64).round() / 64 for x in (case.student, case.teacher))
        student += torch.arange(1000) * 2.0**-10 if "topk" in loss else 0.0
        for shift in (1e4, -1e4):
            self.check(replace(case, student=student + shift, teacher=teacher - shift), **loss)

    @each_loss()
    @pytest.mark.parametrize("largest", [3e5, 1e12, 1e30, 1e37])
    def test_logits_far_above_all_others(self, loss, largest):
        """One certain token; and two that share the probability, in the second of several tiles."""
        case = self.rows((2,), 9200, ignored=0)
        options = {**loss, "topk": 2} if "topk" in loss else loss  # a third would be a tie
        for width in (1,) if loss == LOSSES["topk-forward"] else (1, 2):  # of which the second is infinite
            student, teacher = case.student.clone(), case.teacher.clone()
            student[:, 9002 - width : 9002] = teacher[:, 9001 : 9001 + width] = largest
            moved = replace(case, student=student, teacher=teacher, target_ids=torch.full((2,), 9001))
            for temperature in (0.5, 3.0):
                out, _ = self.check(moved, temperature=temperature, **options)
                expected = torch.full((2,), -math.log(width))
                torch.testing.assert_close(out.student_logps, expected)

    @each_loss()
    def test_a_teacher_near_the_student(self, loss):
        """Self-distillation's usual case: the gradient consists of small differences of large numbers."""
        for vocabulary, offset in ((1000, 200.0), (8000, 0.0)):
            case = self.rows((4,), vocabulary, spread=1.0 if offset else 3.0, distance=1e-2, ignored=0)
            case = replace(case, student=case.student + offset, teacher=case.teacher + offset)
            want = self.oracle(case, **loss)
            error = (self.run(case, **loss)[1].double() - want.grad).norm()
            assert error < 2e-4 * want.grad.norm()
            if loss == LOSSES["reverse"]:
                leaf = case.student.clone().requires_grad_()
                s, t = torch.log_softmax(leaf, -1), torch.log_softmax(case.teacher, -1)
                (plain,) = torch.autograd.grad((s.exp() * (s - t)).sum(-1).mean(), leaf)
                assert error <= 2 * (plain.double() - want.grad).norm() + 1e-8

    @each_loss("sampled", "reverse", "jsd", "topk-reverse", "topk-jsd", "topk-reverse-renorm", "topk-jsd-renorm")
    def test_a_certain_student_far_from_the_teacher_has_no_gradient(self, loss, dtype):
        """The terms of its gradient, as large as divergence / temperature, cancel as they do in plain PyTorch."""
        case = self.rows((3,), 3000, dtype=dtype, ignored=0)
        case = replace(case, target_ids=torch.tensor([7, 1500, 2990]))
        case.student[range(3), case.target_ids] = 40.0
        options = {**loss, "temperature": 0.01, "weights": torch.ones(3)}
        assert not self.oracle(case, **options).grad.any()
        assert not self.run(case, **options)[1].any()

    @each_loss("sampled", "forward", "reverse", "jsd")
    @pytest.mark.parametrize("teacher", ["rises", "falls", "stays"])
    def test_a_maximum_that_rises_late(self, loss, teacher):
        """Each block exceeds the maximum so far, in all by e^150."""
        case = self.rows((3,), 40_000, ignored=0)
        ramp = torch.linspace(-150, 0, 40_000)
        move = {"rises": ramp, "falls": ramp.flip(0), "stays": 0.0}[teacher]
        targets = torch.tensor([39_999, 39_000, 20_000])
        case = replace(case, student=case.student + ramp, teacher=case.teacher + move, target_ids=targets)
        options = {**loss, "old_logps": torch.full((3,), -6.0), "is_clip": 2.0, "weights": case.weights}
        self.check(case, plain=True, floor=self.floor_rising, temperature=0.9, **options)
        self.check_fused(case, **loss)

    @each_loss("sampled", "forward", "reverse", "jsd")
    @pytest.mark.parametrize("low", [-1e4, -INF])
    def test_blocks_without_a_probability(self, loss, low):
        """Of both policies, of the student alone, of the teacher alone; not where the divergence is infinite."""
        case = self.rows((3,), 9000, ignored=0)
        case.student[0, :5000] = case.teacher[0, :5000] = low
        if loss.get("alpha") != 0.0:
            case.student[1, :2048] = low
        if loss.get("alpha") != 1.0:
            case.teacher[2, :2048] = low
        case = replace(case, target_ids=torch.full((3,), 8000))
        self.check(case, plain=True, temperature=0.9, weights=case.weights, **loss)
        self.check_fused(case, **loss)

    @each_loss("sampled", "forward", "reverse", "jsd", "topk-jsd")
    @pytest.mark.parametrize("half", [BF16, FP16], ids=str)
    def test_half_precision_gradients_are_rounded_to_nearest(self, loss, half):
        case = self.rows((2,), 130, dtype=half, ignored=0)
        _, grad = self.run(case, **loss)
        _, exact = self.run(replace(case, student=case.student.float(), teacher=case.teacher.float()), **loss)
        assert (grad != exact.to(half)).float().mean() < 0.02  # the last bit of float32 may decide a tie

    def test_given_log_probs_stand_for_the_teacher(self):
        """At the targets, or at the teacher's most likely tokens; outside of these its log-prob is unknown."""
        case = self.rows((6,), 2000, ignored=0.3)
        whole, grad = self.run(case, weights=case.weights)
        out, found = self.run(replace(case, teacher=None), weights=case.weights, teacher_logps=whole.teacher_logps)
        torch.testing.assert_close(out.per_token_loss, whole.per_token_loss)
        torch.testing.assert_close(found, grad)
        logps, ids = torch.log_softmax(case.teacher.double(), -1).topk(7, -1)
        ids[case.target_ids == -100] = -1  # padding
        for alpha in (0.0, 0.4, 1.0):
            for tail in (True, False):
                options = {"mode": "topk", "alpha": alpha, "add_tail": tail, "weights": case.weights}
                want = oracle_sdpo_loss(case.student, case.teacher, case.target_ids, topk_ids=ids, **options)
                out, grad = self.run(replace(case, teacher=None), teacher_topk=(ids, logps.float()), **options)
                torch.testing.assert_close(out.per_token_loss.double(), want.per_token_loss, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-4, atol=1e-5)
                assert_gradient_close(grad, want.grad, floor=1e-5)
                hit = (ids == case.target_ids[:, None]).any(-1)
                assert torch.equal(out.teacher_logps.isnan(), ~hit & (case.target_ids != -100))

    def test_a_given_support_that_leaves_no_tail_stays_finite(self):
        given = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log()
        out = self.loss(torch.randn(1, 6), None, torch.tensor([0]), mode="topk", teacher_topk=given)
        assert out.loss.isfinite()

    def test_the_support_holds_the_largest_logits(self, dtype):
        plain = torch.randn(2, 3, 1026).to(dtype)[..., 1:]
        masked, odd = plain.clone(), plain.clone()
        masked[..., ::2] = -INF
        odd[..., 500], odd[:, 1, 300] = -NAN, INF
        equal = (plain.float() * 2).round().to(dtype) / 2
        for logits in (plain, masked, odd, equal, plain.sort(-1).values):
            for k in (1, 20, 700, 1025):
                ids = door.support(logits, torch.zeros(6, dtype=torch.long), k, -100, self.backend)
                assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
                flat = logits.reshape(6, -1).float()
                got = flat.gather(1, ids).sort(-1, descending=True).values
                torch.testing.assert_close(got, flat.topk(k, -1).values, rtol=0, atol=0, equal_nan=True)

    @each_loss()
    def test_without_weights_the_loss_is_the_mean_over_tokens(self, loss):
        case = self.rows((7,), 50, seed=1, ignored=0.4)
        out, _ = self.run(case, **loss)
        keep = case.target_ids != -100
        assert 0 < keep.sum() < 7
        torch.testing.assert_close(out.loss, out.per_token_loss[keep].mean())

    @pytest.mark.parametrize(
        ("rate", "sampled", "full"),
        [(0.1, 0.1092, -0.1266), (0.3, 0.1114, -0.1477), (0.5, 0.0, 0.0), (0.9, -0.1092, 0.1266)],
    )
    def test_sampled_token_and_full_divergence_are_two_objectives(self, rate, sampled, full):
        """Two answers a, a follow-up o with P(o = a | a) = 0.9, and the teacher's P(a | o) by Bayes' rule.

        Expected ascent on the logit of a = 1. One sampled token stands for the whole divergence where o is
        drawn whatever a is; where o depends on a the two have opposite signs.
        """
        prior = torch.tensor([1 - rate, rate])
        joint = prior[:, None] * torch.tensor([[0.9, 0.1], [0.1, 0.9]])  # P(a, o)
        posterior = joint / joint.sum(0)
        answers, follow_ups = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])

        def ascent(mode, probabilities):
            teacher, weights = posterior.T[follow_ups].log(), probabilities[answers, follow_ups]
            case = Rows(prior.log().repeat(4, 1), teacher, answers, weights)
            return -float(self.run(case, mode=mode, alpha=1.0, weights=weights)[1][:, 1].sum())

        independent = prior[:, None] * joint.sum(0)
        assert ascent("sampled_token", joint) == pytest.approx(sampled, abs=1e-4)
        assert ascent("full", joint) == pytest.approx(full, abs=1e-4)
        assert ascent("sampled_token", independent) == pytest.approx(full, abs=1e-4)
        assert ascent("full", independent) == pytest.approx(full, abs=1e-4)


class Edges(Contract):
    """NaN, infinities, masked vocabularies, certain tokens, nothing at all."""

    @each_loss()
    def test_ignored_rows_may_hold_nan(self, loss, dtype):
        case = self.rows((8,), 1100, dtype=dtype, ignored=0.5)
        ignored = case.target_ids == -100
        assert 0 < ignored.sum() < 8
        clean, clean_grad = self.run(case, weights=case.weights, **loss)
        case.student[ignored], case.teacher[ignored] = NAN, INF
        out, grad = self.run(case, weights=case.weights, **loss)
        assert torch.equal(out.loss, clean.loss) and torch.equal(grad, clean_grad)
        assert not any(field[ignored].any() for field in (*out[1:], grad))

    @each_loss()
    @pytest.mark.parametrize("broken", [{"student": NAN}, {"teacher": NAN}, {"teacher": -INF}], ids=str)
    def test_a_token_of_weight_zero_counts_nothing(self, loss, broken):
        """Neither in the loss nor in the gradient, even where its divergence is NaN or infinite."""
        case = self.rows((4,), 1100, ignored=0)
        options = {"weights": case.weights * (torch.arange(4) != 2), "old_logps": torch.full((4,), -6.0), **loss}
        options |= {"ce_weights": options["weights"], "is_clip": 2.0}
        clean, clean_grad = self.run(case, **options)
        for name, value in broken.items():
            getattr(case, name)[2, 1:] = value
        out, grad = self.run(case, **options)
        assert torch.equal(out.loss, clean.loss) and torch.equal(grad, clean_grad) and not grad[2].any()

    @each_loss()
    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_a_bad_row_stays_its_own(self, loss, bad):
        case = self.rows((3,), 1100, ignored=0)
        plain, plain_grad = self.run(case, **loss)
        best = int(case.student[1].argmax())  # a renormalized loss looks at nothing outside its support
        for column in (best,) if "add_tail" in loss else (0, best, 1099):
            for broken in ("student", "teacher"):
                logits = getattr(case, broken).clone()
                logits[1, column] = bad
                out, grad = self.run(replace(case, **{broken: logits}), **loss)
                assert torch.equal(out.per_token_loss[::2], plain.per_token_loss[::2])
                assert torch.equal(grad[::2], plain_grad[::2])
                if bad is NAN:
                    assert not out.per_token_loss[1].isfinite() and not out.loss.isfinite()
                    assert not grad[1].isfinite().all()

    @each_loss()
    @pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (4,)])
    def test_nothing_to_learn_from_gives_zero(self, loss, shape):
        case = self.rows(shape, 20, ignored=1.1)
        assert bool((case.target_ids == -100).all())
        out, grad = self.run(case, **loss)
        assert out.loss.item() == 0 and out.per_token_loss.shape == shape
        assert grad.shape == (*shape, 20) and not grad.any()

    @each_loss()
    @pytest.mark.parametrize(
        ("low", "softcap"), [(-INF, None), (-INF, 5.0), (-1e5, None), (-1e30, None), (torch.finfo(F32).min, None)]
    )
    def test_masked_vocabulary_is_probability_zero(self, loss, low, softcap):
        """Masked in both policies: the result of the other tokens alone, and no gradient."""
        case = self.rows((4,), 1900, ignored=0)
        alone, alone_grad = self.run(case, softcap=softcap, **loss)
        place = torch.cat([torch.arange(3000, 4100), torch.arange(4101, 4901)])  # a whole first block is masked
        student, teacher = torch.full((2, 4, 4920), low)
        student[:, place], teacher[:, place] = case.student, case.teacher
        out, grad = self.run(Rows(student, teacher, place[case.target_ids], case.weights), softcap=softcap, **loss)
        atol = 1e-5 if softcap else 1e-6  # a softcap rounds the logits
        torch.testing.assert_close(out.per_token_loss, alone.per_token_loss, rtol=1e-5, atol=atol)
        torch.testing.assert_close(grad[:, place], alone_grad, rtol=1e-5, atol=1e-7)
        grad[:, place] = 0
        assert not grad.any()

    @pytest.mark.parametrize("vocabulary", [4, 5000])
    def test_an_infinite_divergence_is_inf_and_never_nan(self, vocabulary):
        whole, masked = torch.zeros(2, vocabulary), torch.zeros(2, vocabulary)
        masked[:, 2] = -INF
        y = torch.tensor([0, 1])
        assert self.loss(whole, masked, y, mode="full", alpha=1.0).per_token_loss.tolist() == [INF, INF]
        assert self.loss(masked, whole, y, mode="full", alpha=0.0).per_token_loss.tolist() == [INF, INF]
        for student, teacher, alphas in ((whole, masked, (0.0, 0.3, 0.5)), (masked, whole, (1.0, 0.3, 0.5))):
            for alpha in alphas:
                assert self.loss(student, teacher, y, mode="full", alpha=alpha).per_token_loss.isfinite().all()
        both = self.loss(masked, masked, torch.tensor([2, 2]))
        assert not both.log_ratio.any() and both.loss.item() == 0
        assert self.loss(masked, whole, torch.tensor([2, 2])).per_token_loss.tolist() == [INF, INF]

    @pytest.mark.parametrize(("teacher", "wanted"), [(NAN, NAN), (-INF, 0.0)])
    def test_sampled_values_where_the_student_is_certain(self, teacher, wanted):
        """log p_S = 0: nothing times infinity is nothing, and NaN stays NaN."""
        out = self.loss(torch.tensor([[60.0, 0.0, -10.0]]), torch.tensor([[teacher, 0.0, 1.0]]), torch.tensor([0]))
        assert float(out.student_logps) == 0
        torch.testing.assert_close(out.per_token_loss, torch.tensor([wanted]), equal_nan=True)

    def test_a_certain_token_has_probability_one_to_the_last_bit(self):
        """Whatever the rounding of its own logit x log2(e): log-prob 0, entropy 0, gradient 0."""
        student = torch.randn(6, 2100) - 300
        student[:, 1050] = torch.tensor([0.1, 3.3, 77.7, 1234.567, 98765.4, 3.3e4])
        y = torch.full((6,), 1050)
        logps, entropy = fastsdpo.token_logps(student, y, return_entropy=True, backend=self.backend)
        assert not logps.any() and not entropy.any()
        out, grad = self.run(Rows(student, student + 1, y, torch.ones(6)))
        assert not out.per_token_loss.any() and not grad.any()

    def test_a_tail_too_small_for_a_float_has_a_gradient(self):
        """Top-k where the student has e^-375 outside the support, and the teacher all but e^-800."""
        student = torch.tensor([[0.7812, -0.1562, -1.0938, 0.2812, -0.5312, -0.6875, 0.1875, 0.4062]])
        teacher = torch.tensor([[-0.6562, -0.9688, -2.2812, 0.6562, -2.25, 1.5, -1.9688, 0.6562]])
        case = Rows(student, teacher, torch.tensor([3]), torch.ones(1))
        options = {"mode": "topk", "alpha": 0.0, "topk": 3, "temperature": 1e-3}
        want, (out, grad) = self.oracle(case, **options), self.run(case, **options)
        torch.testing.assert_close(out.per_token_loss.double(), want.per_token_loss, rtol=2e-5, atol=2e-6)
        scale = 2e-6 * 1000 * float(want.per_token_loss)
        torch.testing.assert_close(grad.double(), want.grad, rtol=2e-5, atol=scale)

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    def test_a_support_that_the_teacher_hardly_has_is_renormalized(self, alpha):
        """Its log-probs there are -1400 and below; of one class alone there is no divergence."""
        teacher = torch.tensor([[1.0, 0.5, 700.0, 0.0, -3.0, 2.0]])
        case = Rows(torch.tensor([[3.0, 2.5, 0.0, 1.0, -1.0, 0.5]]), teacher, torch.tensor([3]), torch.ones(1))
        logps = torch.log_softmax(teacher.double() / 0.5, -1)
        for topk in (1, 3):
            options = {"mode": "topk", "topk": topk, "add_tail": False, "alpha": alpha, "temperature": 0.5}
            want, ids = self.oracle(case, **options), case.student.topk(topk).indices
            given = {**options, "topk": None, "teacher_topk": (ids, logps.gather(1, ids).float())}
            for out, grad in (self.run(case, **options), self.run(replace(case, teacher=None), **given)):
                torch.testing.assert_close(out.per_token_loss.double(), want.per_token_loss, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(grad.double(), want.grad, rtol=1e-3, atol=1e-3)


class Layouts(Contract):
    """Strides, gradients in place, memory beyond 2^31 elements; the same bits again and for rows alone."""

    @each_loss()
    def test_a_slice_gives_the_same(self, loss):
        """Of rows and columns, behind a 16-byte boundary, with a transpose for the teacher; all else is NaN."""
        case = self.rows((2, 6), 33)
        plain, grad = self.run(case, **loss)
        student, teacher = torch.full((2, 7, 40), NAN), torch.full((2, 14, 38), NAN)
        view = student[:, :-1, :33].copy_(case.student)
        columns = torch.empty(33, 2, 6).permute(1, 2, 0).copy_(case.teacher)
        targets = torch.stack([case.target_ids, case.target_ids], -1).flatten(1)[:, ::2]
        for other in (teacher[:, 2::2, 4:37].copy_(case.teacher), columns):
            leaf = view.detach().requires_grad_()
            out = self.loss(leaf, other, targets, **loss)
            (found,) = torch.autograd.grad(out.loss, leaf)
            torch.testing.assert_close(out.per_token_loss, plain.per_token_loss, **self.moved)
            torch.testing.assert_close(found, grad, **self.moved)

    @each_loss()
    def test_a_gradient_in_place_lies_in_the_logits(self, loss):
        """Also where they are a slice: nothing beside it changes, and a second backward raises."""
        case = self.rows((2, 5), 1003)
        expected = self.run(case, **loss)[1]
        whole = torch.full((2, 6, 1010), 7.0)
        for place in (case.student.clone(), whole[:, :-1, :1003].copy_(case.student)):
            logits = place.requires_grad_().view_as(place)
            out = self.loss(logits, case.teacher, case.target_ids, inplace_grad=True, **loss)
            (grad,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
            assert grad.data_ptr() == place.data_ptr()
            torch.testing.assert_close(grad, expected, **(EXACT if place.is_contiguous() else self.moved))
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.loss.backward()
        assert (whole[:, -1] == 7).all() and (whole[:, :, 1003:] == 7).all()

    @each_loss()
    def test_rows_beyond_two_to_the_31_elements(self, loss):
        """Offsets of rows have 64 bits, read and written. (Of the memory only the rows' pages are touched.)"""
        case = self.rows((2,), 64, dtype=FP16, ignored=0)
        plain, expected = self.run(case, **loss)
        stride = 2**31 + 8  # rows at the same place of a 16-byte piece: the same bits
        memory = torch.UntypedStorage(2 * (stride + 64), device=self.device)
        far = torch.empty(0, dtype=FP16).set_(memory, 0, (2, 64), (stride, 1)).copy_(case.student)
        logits = far.requires_grad_().view_as(far)
        out = self.loss(logits, case.teacher, case.target_ids, inplace_grad=True, **loss)
        assert torch.equal(out.per_token_loss, plain.per_token_loss)
        (grad,) = torch.autograd.grad(out.loss, logits)
        assert grad.stride() == (stride, 1) and grad.data_ptr() == memory.data_ptr()
        assert torch.equal(grad, expected)

    def test_a_gradient_in_place_of_an_expanded_tensor_is_allocated(self):
        row = torch.randn(1, 12)
        leaf = row.clone().requires_grad_()
        out = self.loss(leaf.expand(3, 12), torch.randn(3, 12), torch.tensor([1, 2, 3]), inplace_grad=True)
        out.loss.backward()
        assert torch.equal(leaf.detach(), row) and leaf.grad.any()

    @each_loss()
    def test_a_gradient_formed_with_the_loss_has_the_same_bits(self, loss, dtype):
        """Also of a row with NaN, and of an ignored one: the first has no gradient but NaN, the other none."""
        case = self.rows((2, 4), self.several, dtype=dtype, ignored=0)
        case.target_ids[1, 1] = -100
        case.student[1, 1] = case.teacher[1, 1] = case.student[0, 2, int(case.student[0, 2].argmax())] = NAN
        *found, grad = self.check_fused(case, softcap=30.0, **loss)
        assert not any(result[5].any() for result in (*found, grad))
        assert found[0][2].isnan() and grad[2].isnan().any()
        others = torch.arange(8) != 2
        assert found[0][others].isfinite().all() and grad[others].isfinite().all()

    @each_loss()
    def test_two_runs_agree_bit_by_bit(self, loss):
        case = self.rows((6,), self.several, dtype=BF16)
        leaf = case.student.detach().requires_grad_()
        one, two = (self.loss(leaf, case.teacher, case.target_ids, **loss) for _ in range(2))
        assert torch.equal(one.per_token_loss, two.per_token_loss)
        (first,) = torch.autograd.grad(one.loss, leaf, retain_graph=True)
        (scaled,) = torch.autograd.grad(4 * one.loss, leaf)
        assert torch.equal(first, torch.autograd.grad(two.loss, leaf)[0])
        assert torch.equal(scaled, 4 * first)

    @each_loss()
    @pytest.mark.parametrize("vocabulary", [320, 333])
    def test_rows_alone_give_the_same(self, loss, vocabulary):
        """Bit by bit, whatever rows there are in which order, where they start at the same place of 16 bytes."""
        case = self.rows((6,), vocabulary, ignored=0)
        out, grad = self.run(case, weights=case.weights, **loss)
        for order in ([0], [4, 2, 3]):
            part = Rows(*(getattr(case, name)[order] for name in ("student", "teacher", "target_ids", "weights")))
            got, found = self.run(part, weights=part.weights, **loss)
            exact = self.rows_are_alone and (vocabulary % 8 == 0 or order == [0] or self.moved == EXACT)
            limits = EXACT if exact else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(got.per_token_loss, out.per_token_loss[order], **limits)
            torch.testing.assert_close(found, grad[order], **limits)


class Autograd(Contract):
    """What goes with autograd, autocast and compilers."""

    @each_loss()
    def test_a_second_derivative_raises(self, loss):
        case = self.rows((3,), 20)
        leaf = case.student.requires_grad_()
        out = self.loss(leaf, case.teacher, case.target_ids, **loss)
        (grad,) = torch.autograd.grad(out.loss, leaf, create_graph=True)
        with pytest.raises(ValueError, match="second derivative"):
            grad.sum().backward()

    def test_the_teacher_gets_no_gradient(self):
        case = self.rows((3,), 20)
        student, teacher = case.student.requires_grad_(), case.teacher.requires_grad_()
        self.loss(student, teacher, case.target_ids, mode="full").loss.backward()
        assert student.grad is not None and teacher.grad is None

    @each_loss()
    def test_no_grad_and_autocast_change_no_value(self, loss):
        case = self.rows((3,), 20)
        want, _ = self.run(case, **loss)
        with torch.no_grad():
            out = self.loss(case.student.requires_grad_(), case.teacher, case.target_ids, **loss)
        with torch.autocast(torch.device(self.device).type, BF16):
            cast, _ = self.run(case, **loss)
        assert not out.loss.requires_grad
        assert torch.equal(out.loss, want.loss) and torch.equal(cast.loss, want.loss)

    @each_loss("sampled", "jsd", "topk-jsd")
    def test_compiles_as_one_graph(self, loss):
        """Compilers go through the operators, eager calls do not; the gradient in place becomes a new one."""
        torch.compiler.reset()  # each case is a program of its own
        case = self.rows((2, 3), 20)

        def step(z):
            out = self.loss(z[:, :-1], case.teacher, case.target_ids, inplace_grad=True, softcap=3.0, **loss)
            return out.loss, out.log_ratio

        z = torch.cat([case.student, torch.zeros(2, 1, 20)], 1)
        found = []
        for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
            leaf = z.clone().requires_grad_()
            value, ratio = function(leaf)
            value.backward()
            found.append((value.detach(), ratio, leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert not found[0][2][:, -1].any()

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_a_changing_number_of_tokens_compiles_twice_at_most(self, dynamic):
        torch.compiler.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

        @torch.compile(fullgraph=True, backend=counter, dynamic=dynamic)
        def step(z, t, y):
            return self.loss(z, t, y, mode="full").loss

        for tokens in (3, 5, 8, 13, 21):
            z = torch.randn(tokens, 9, requires_grad=True)
            step(z, torch.randn(tokens, 9), torch.randint(0, 9, (tokens,))).backward()
        assert counter.frame_count <= 2


class LogProbs(Contract):
    """`token_logps` and `token_log_ratio`."""

    def logps(self, logits, target_ids, **options):
        return fastsdpo.token_logps(logits, target_ids, backend=self.backend, **options)

    @pytest.mark.parametrize("softcap", [None, 5.0])
    @pytest.mark.parametrize("vocabulary", [1, 131, 32_000])
    def test_values_entropy_and_gradient(self, dtype, softcap, vocabulary):
        case = self.rows((2, 5) if vocabulary < 1000 else (2,), vocabulary, dtype=dtype, ignored=0.2)
        keep = case.target_ids != -100
        oracle = case.student.double().requires_grad_()
        log_probs = torch.log_softmax(effective_logits(oracle, 0.8, softcap), -1)
        want = log_probs.gather(-1, case.target_ids.clamp(min=0)[..., None])[..., 0] * keep
        upstream = torch.linspace(-1, 2, keep.numel()).view(keep.shape)
        (want_grad,) = torch.autograd.grad((want * upstream).sum(), oracle)
        leaf, options = case.student.detach().requires_grad_(), {"temperature": 0.8, "softcap": softcap}
        logps, entropy = self.logps(leaf, case.target_ids, return_entropy=True, **options)
        (grad,) = torch.autograd.grad((logps * upstream).sum(), leaf)
        limits = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else self.log_prob
        torch.testing.assert_close(logps.double(), want, **limits)
        want_entropy = -(log_probs.exp() * log_probs).sum(-1) * keep
        torch.testing.assert_close(
            entropy.double(), want_entropy, **{**limits, "rtol": 1e-12 if dtype == F64 else 1e-5}
        )
        assert not entropy.requires_grad
        assert_gradient_close(grad, want_grad)
        both = fastsdpo.token_log_ratio(leaf, case.teacher, case.target_ids, backend=self.backend, **options)
        assert torch.equal(both.student_logps, logps)
        assert torch.equal(both.teacher_logps, self.logps(case.teacher, case.target_ids, **options))
        assert torch.equal(both.log_ratio, both.teacher_logps - both.student_logps)
        same = fastsdpo.token_log_ratio(case.student, case.student, case.target_ids, backend=self.backend)
        assert not same.log_ratio.any()

    def test_a_single_row_and_many_axes(self):
        logits, y = torch.randn(2, 3, 4, 11), torch.randint(0, 11, (2, 3, 4))
        flat = self.logps(logits.reshape(-1, 11), y.reshape(-1))
        assert torch.equal(self.logps(logits, y).reshape(-1), flat)
        part = fastsdpo.token_log_ratio(logits[0, :, :-1], logits[1, :, :-1], y[0, :, :-1], backend=self.backend)
        assert torch.equal(part.student_logps, flat.view(y.shape)[0, :, :-1])
        one = self.logps(logits[0, 0, 0], y[0, 0, 0])
        assert one.shape == () and torch.equal(one, flat[0])
        transposed = logits.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        assert transposed.stride(-1) != 1
        assert torch.equal(self.logps(transposed, y).reshape(-1), flat)

    def test_uniform_masked_and_certain_rows(self):
        row = torch.full((1, 8), -INF)
        row[0, 3] = 2.0
        logps, entropy = self.logps(row, torch.tensor([3]), return_entropy=True)
        assert logps.item() == 0 and entropy.item() == 0
        assert self.logps(row, torch.tensor([2])).item() == -INF
        logps, entropy = self.logps(torch.zeros(1, 8), torch.tensor([0]), return_entropy=True)
        assert logps.item() == pytest.approx(-math.log(8), rel=1e-6)
        assert entropy.item() == pytest.approx(math.log(8), rel=1e-6)
        nan = torch.zeros(1, 8)
        nan[0, 5] = NAN
        assert math.isnan(self.logps(nan, torch.tensor([0])).item())


class Hidden:
    """Hidden states of student and teacher and a head; the fourth token is ignored."""

    def __init__(self, tokens=13, hidden=16, vocabulary=50, dtype=F32, distance=0.3):
        self.student = torch.randn(tokens, hidden).to(dtype)
        self.teacher = (self.student.float() + distance * torch.randn(tokens, hidden)).to(dtype)
        self.weight = (torch.randn(vocabulary, hidden) * 2 * hidden**-0.5).to(dtype)
        self.bias = torch.randn(vocabulary).to(dtype)
        self.target_ids = torch.randint(0, vocabulary, (tokens,))
        self.target_ids[3] = -100
        self.weights = torch.rand(tokens)

    def leaves(self, count=3):
        return [x.clone().requires_grad_() for x in (self.student, self.weight, self.bias)[:count]]

    def oracle(self, logit_scale=1.0, bias=False, **options):
        """float64 through a plain head: (results, gradients of hidden states, weight and bias)."""
        leaves = [x.double().requires_grad_() for x in (self.student, self.weight, self.bias)]
        added = leaves[2] if bias else 0.0
        z = logit_scale * (leaves[0] @ leaves[1].T + added)
        with torch.no_grad():
            z_teacher = logit_scale * (self.teacher.double() @ leaves[1].T + added)
        want = oracle_sdpo_loss(z, z_teacher, self.target_ids, weights=self.weights, **options)
        z.backward(want.grad)
        return want, [leaf.grad for leaf in leaves]


def relative(actual, expected) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


LINEAR = ("sampled", "forward", "reverse", "jsd", "topk-reverse")


class Linear(Contract):
    """`linear_sdpo_loss` and `linear_token_logps`."""

    def linear(self, hidden, teacher, weight, target_ids, **options):
        return fastsdpo.linear_sdpo_loss(hidden, teacher, weight, target_ids, backend=self.backend, **options)

    @each_loss(*LINEAR)
    @pytest.mark.parametrize("chunk_size", [None, 1, 4, 13, 100])
    def test_it_equals_the_formula_for_any_chunk(self, loss, chunk_size):
        case = Hidden()
        options = {**loss, "temperature": 0.9, "softcap": 4.0, "logit_scale": 1.7}
        want, grads = case.oracle(bias=True, **options)
        hidden, weight, bias = leaves = case.leaves()
        options |= {"bias": bias, "weights": case.weights, "chunk_size": chunk_size}
        out = self.linear(hidden, case.teacher, weight, case.target_ids, **options)
        (3 * out.loss).backward()
        torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
        for field in ("per_token_loss", "student_logps", "teacher_logps"):
            got, expected = getattr(out, field).double(), getattr(want, field)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for leaf, grad in zip(leaves, grads):
            assert relative(leaf.grad, 3 * grad) < 5e-6

    @each_loss(*LINEAR)
    def test_near_teacher_gradients_in_bfloat16(self, loss):
        """Logit tiles are float32: from bfloat16 logits these gradients would be several percent off."""
        case = Hidden(tokens=64, hidden=64, vocabulary=500, dtype=BF16, distance=0.02)
        _, grads = case.oracle(**loss)
        hidden, weight = leaves = case.leaves(2)
        options = {**loss, "weights": case.weights, "chunk_size": 16}
        self.linear(hidden, case.teacher, weight, case.target_ids, **options).loss.backward()
        for leaf, want in zip(leaves, grads):
            assert leaf.grad.dtype == BF16
            assert relative(leaf.grad, want) < 2e-3 + relative(want.bfloat16(), want)  # the result's own rounding

    @each_loss(*LINEAR)
    def test_tokens_that_do_not_count_may_be_nan(self, loss):
        """Hidden states of ignored tokens and of those of weight 0; their rows of the head's gradient are 0 x NaN."""
        case, found = Hidden(), []
        case.weights[5] = 0
        for value in (0.0, NAN):
            case.student[[3, 5]] = case.teacher[[3, 5]] = value
            leaves = case.leaves(2)
            options = {"weights": case.weights, "ce_weights": case.weights, "chunk_size": 4, **loss}
            whole = self.linear(leaves[0], case.teacher, leaves[1], case.target_ids, **options).loss
            assert whole.isfinite()
            whole.backward()
            options = {"chunk_size": 4, "return_entropy": True, "entropy_grad": True, "backend": self.backend}
            hidden, target_ids = leaves[0][:5], case.target_ids[:5]
            logps, entropy = fastsdpo.linear_token_logps(hidden, leaves[1], target_ids, **options)
            alone = fastsdpo.linear_token_logps(hidden, leaves[1], target_ids, backend=self.backend)
            (logps + entropy + alone).sum().backward()
            found.append([leaf.grad for leaf in leaves])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    @pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all"])
    def test_only_what_requires_a_gradient_gets_one(self, frozen):
        case = Hidden()
        hidden, weight, bias = leaves = case.leaves()
        for name, leaf in zip(("hidden", "weight", "bias"), leaves):
            leaf.requires_grad_(frozen not in (name, "all"))
        teacher = case.teacher.requires_grad_()
        out = self.linear(hidden, teacher, weight, case.target_ids, bias=bias, mode="full")
        assert out.loss.requires_grad == (frozen != "all")
        if frozen != "all":
            out.loss.backward()
        assert all((leaf.grad is not None) == leaf.requires_grad for leaf in leaves)
        assert teacher.grad is None

    def test_a_teacher_with_its_own_head(self):
        case, teacher, head, bias = Hidden(), torch.randn(13, 9), torch.randn(50, 9), torch.randn(50)
        z, z_teacher = case.student @ case.weight.T, teacher @ head.T + bias
        want = fastsdpo.sdpo_loss(z, z_teacher, case.target_ids, mode="full", alpha=0.5)
        options = {"teacher_weight": head, "teacher_bias": bias, "mode": "full", "alpha": 0.5, "chunk_size": 5}
        got = self.linear(case.student, teacher, case.weight, case.target_ids, **options)
        torch.testing.assert_close(got.per_token_loss, want.per_token_loss, rtol=1e-4, atol=1e-5)

    def test_given_log_probs_and_importance_ratio(self):
        case = Hidden()
        z, z_teacher = case.student @ case.weight.T, case.teacher @ case.weight.T
        logps, ids = torch.log_softmax(z_teacher, -1).topk(6, -1)
        given = fastsdpo.token_logps(z_teacher, case.target_ids)
        for options in (
            {"teacher_logps": given, "old_logps": torch.full((13,), -5.0), "is_clip": 1.5},
            {"mode": "topk", "alpha": 0.5, "teacher_topk": (ids, logps)},
        ):
            leaf, hidden = z.clone().requires_grad_(), case.student.clone().requires_grad_()
            want = self.loss(leaf, None, case.target_ids, **options)
            got = self.linear(hidden, None, case.weight, case.target_ids, chunk_size=4, **options)
            want.loss.backward()
            got.loss.backward()
            torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(hidden.grad, leaf.grad @ case.weight, rtol=1e-3, atol=1e-5)

    def test_log_probs_of_the_targets(self):
        case = Hidden()
        hidden, weight, bias = wanted = [x.double().requires_grad_() for x in (case.student, case.weight, case.bias)]
        options = {"softcap": 3.0, "temperature": 1.1, "return_entropy": True}
        want = fastsdpo.token_logps(0.5 * (hidden @ weight.T + bias), case.target_ids, **options)
        (want[0] * case.weights).sum().backward()
        hidden, weight, bias = leaves = case.leaves()
        options |= {"bias": bias, "logit_scale": 0.5, "chunk_size": 5, "backend": self.backend}
        got = fastsdpo.linear_token_logps(hidden, weight, case.target_ids, **options)
        (got[0] * case.weights).sum().backward()
        for a, b in zip(got, want):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        assert all(relative(a.grad, b.grad) < 5e-6 for a, b in zip(leaves, wanted))
        logps = fastsdpo.linear_token_logps(hidden, weight, case.target_ids, backend=self.backend)
        (grad,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
        with pytest.raises(ValueError, match="second derivative"):
            grad.sum().backward()

    def test_a_second_backward_and_a_second_derivative_raise(self):
        case, hidden = Hidden(), Hidden().student.requires_grad_()
        out = self.linear(hidden, case.teacher, case.weight, case.target_ids)
        out.loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.loss.backward()
        out = self.linear(hidden, case.teacher, case.weight, case.target_ids)
        (grad,) = torch.autograd.grad(out.loss, hidden, create_graph=True)
        with pytest.raises(ValueError, match="second derivative"):
            grad.sum().backward()

    @each_loss(*LINEAR)
    def test_it_compiles_as_one_graph(self, loss):
        """The teacher's head is the student's, its own, or its own with a bias."""
        torch.compiler.reset()  # each case is a program of its own
        case = Hidden()
        own = {"teacher_weight": torch.randn(50, 16), "teacher_bias": torch.randn(50)}
        if loss != LOSSES["jsd"]:
            own = {"teacher_weight": own["teacher_weight"]} if loss == LOSSES["forward"] else {}

        def step(hidden, weight, bias):
            options = {**loss, **own, "bias": bias, "chunk_size": 4}
            return self.linear(hidden, case.teacher, weight, case.target_ids, **options).loss

        found = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaves = case.leaves()
            value = function(*leaves)
            found.append((value.detach(), *torch.autograd.grad(3 * value, leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*found))

    def test_an_empty_batch_gives_zero(self):
        weight, hidden = torch.randn(7, 4, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
        out = self.linear(hidden, torch.zeros(0, 4), weight, torch.zeros(0, dtype=torch.long))
        out.loss.backward()
        assert out.loss.item() == 0 and not weight.grad.any()


class Whole(Values, Edges, Layouts, Autograd, LogProbs, Linear):
    """All of it, for a backend that makes no difference between the parts."""
