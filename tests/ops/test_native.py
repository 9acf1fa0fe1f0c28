"""The native kernels under the contract of all backends, on every instruction set of this CPU, and what they
alone promise: the same bits for any number of threads, each tensor its own dtype, the first of equal logits.

Vocabularies: 1000 to 1025 and 4097 (a partial, a whole and one more block), 16385 (one value more than a
segment), 32000 and 50257 (several segments, the second odd).
"""

import itertools
import math

import pytest
import torch

import fastsdpo
from fastsdpo import _native
from fastsdpo.ops import _native as kernels
from fastsdpo.ops.rows import LossOptions, Tokens
from fastsdpo.testing import Rows, assert_gradient_close, make_rows, oracle_sdpo_loss
from tests.ops import contract
from tests.ops.contract import BF16, F32, FP16, INF, each_loss

AVAILABLE, WHY = _native.native_available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=f"native kernels: {WHY}")
INSTRUCTION_SETS = _native.instruction_sets() if AVAILABLE else []
LOG_PROB = {"rtol": 1e-6, "atol": 2e-6}
KEPT = 256 * 1024  # columns whose exponentials the kernels keep (kernels/cpu/rows.h)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    _native.set_instruction_set(request.param)
    yield request.param
    _native.set_instruction_set(INSTRUCTION_SETS[0])


every_isa = pytest.mark.usefixtures("isa")


class Native(contract.Contract):
    backend = "native"
    vocabularies = (1, 2, 127, 128, 1000, 1024, 1025, 4097, 16385, 32000, 50257)
    log_prob = LOG_PROB
    floor_beside_plain = 2e-6


@every_isa
class TestEverySet(Native, contract.Values, contract.Edges, contract.Layouts, contract.LogProbs):
    @each_loss()
    @pytest.mark.parametrize("kind", contract.Contract.dtypes, ids=str)
    def test_softcap_and_temperature_beyond_a_block(self, loss, kind):
        case = contract.without_ties(make_rows((7,), 4097, dtype=kind, seed=3), loss)
        # The contract's floor: vectors of four floats round in another order, and plain PyTorch's error is the CPU's.
        options = {"weights": case.weights, "temperature": 0.7, "softcap": 5.0}
        self.check(case, plain=True, floor=self.floor, **options, **loss)


class TestOneSet(Native, contract.Autograd, contract.Linear):
    pass


class TestNativeAlone(Native):
    @each_loss("sampled", "forward", "reverse", "jsd")
    @pytest.mark.parametrize("kind", [F32, BF16], ids=str)
    def test_more_columns_than_are_kept(self, loss, kind, isa):
        """The columns beyond are computed again; the target lies there in one row, before in the other."""
        case = make_rows((2,), KEPT + 1500, dtype=kind, ignored=0)
        case.target_ids[:] = torch.tensor([KEPT + 1100, KEPT - 1])
        self.check(case, plain=True, weights=case.weights, temperature=0.9, **loss)
        self.check_fused(case, **loss)

    @each_loss("sampled", "forward", "reverse", "jsd", "topk-jsd")
    def test_the_same_bits_for_any_thread_count_and_batch(self, loss):
        """1 thread, 2, and more threads than rows (the row is split); so do single rows."""
        case, before = make_rows((6,), 50257, ignored=0.3), torch.get_num_threads()
        order = [3, 0, 5]
        part = Rows(case.student[order], case.teacher[order], case.target_ids[order], case.weights[order])
        try:
            torch.set_num_threads(1)
            expected = self.check_fused(case, **loss)
            for threads in (1, 2, 4, 5, 16):
                torch.set_num_threads(threads)
                assert all(map(torch.equal, self.check_fused(case, **loss), expected)), threads
                rows = [whole[order] for whole in expected]
                assert all(map(torch.equal, self.check_fused(part, **loss), rows)), threads
        finally:
            torch.set_num_threads(before)

    def test_each_tensor_has_its_own_dtype(self):
        """A float32 tile of the student may take a bfloat16 teacher and give a float16 gradient."""
        case = make_rows((1, 4), 1500, ignored=0)
        tokens = Tokens(case.target_ids.flatten(), case.weights.flatten())
        options = LossOptions(mode="full", alpha=0.3)
        for student, teacher, grad in itertools.product((F32, BF16, FP16), repeat=3):
            s, t = case.student.to(student), case.teacher.to(teacher)
            out = torch.full((1, 4, 1500), math.nan, dtype=grad)
            want = oracle_sdpo_loss(s, t, case.target_ids, mode="full", alpha=0.3, weights=case.weights)
            got = kernels.forward(s, t, tokens, options, out).per_token
            torch.testing.assert_close(got.double(), want.per_token_loss.flatten(), rtol=1e-5, atol=1e-6)
            assert_gradient_close(out, want.grad)

    @pytest.mark.parametrize("vocabulary", [1, 2, 129, 1000, 1025, 5003, 50257])
    def test_a_support_is_sorted_and_has_the_first_of_equal_logits(self, vocabulary, dtype, isa):
        torch.manual_seed(vocabulary)
        plain = torch.randn(2, 3, vocabulary + 1).to(dtype)[..., 1:]
        masked, odd = plain.clone(), plain.clone()
        masked[..., ::2] = -INF
        odd[..., vocabulary // 2], odd[:, 1, vocabulary // 3] = -math.nan, INF
        equal = (plain.float() * 2).round().to(dtype) / 2  # many of each, and -0 beside 0
        targets = torch.tensor([0, -100, 0, 0, 0, 0])
        for logits in (plain, masked, equal, odd, plain.sort(-1).values):
            flat = logits.reshape(6, -1).float()
            ranked = torch.where(flat.isnan(), INF, flat).sort(dim=-1, descending=True, stable=True)
            for k in {min(k, vocabulary) for k in (1, 20, 700, 1025)}:
                ids = kernels.support(logits, targets, k, -100)
                assert (ids.diff(dim=-1) > 0).all()
                assert torch.equal(ids[1], torch.arange(k))  # ignored
                live = targets == 0
                if not ranked.values.isposinf().any():
                    assert torch.equal(ids[live], ranked.indices[live, :k].sort(-1).values)
                got = torch.where(flat.isnan(), INF, flat).gather(1, ids).sort(-1, descending=True).values
                assert torch.equal(got[live], ranked.values[live, :k])

    def test_a_small_tail_is_summed(self, isa):
        """With 1 - sum the tail's 1e-9 would be lost in float32."""
        student, teacher = torch.zeros(1, 3000), torch.zeros(1, 3000)
        student[0, 0], teacher[0, 0] = 29.0, 31.0
        case = Rows(student, teacher, torch.tensor([0]), torch.ones(1))
        options = {"mode": "topk", "topk": 1, "alpha": 0.0}
        want, (out, _) = self.oracle(case, **options), self.run(case, **options)
        assert want.per_token_loss.item() < 1e-8
        torch.testing.assert_close(out.per_token_loss.double(), want.per_token_loss, rtol=1e-3, atol=0)

    def test_an_id_out_of_range_is_refused(self):
        case, ids = make_rows((1, 2), 50, ignored=0), torch.tensor([3, 50])
        with pytest.raises(ValueError, match=r"target_ids must lie in \[0, V\)"):
            kernels.token_forward(case.student, ids, LossOptions())
        with pytest.raises(ValueError, match="target_ids must lie in"):
            kernels.support(case.student, ids, 3, -100)
        with pytest.raises(ValueError, match="target_ids must lie in"):
            fastsdpo.sdpo_loss(case.student, case.student, ids[None], mode="topk", topk=3)
        tokens = Tokens(ids - 3, torch.ones(2), topk_ids=torch.tensor([[0, 50], [0, 1]]))
        with pytest.raises(ValueError, match=r"topk_ids must lie in \[0, V\)"):
            kernels.forward(case.student, case.teacher, tokens, LossOptions(mode="topk"))
