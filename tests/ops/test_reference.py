"""The reference in eager PyTorch under the contract of all backends."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastsdpo
from fastsdpo.ops import reference
from tests.ops import contract


class Reference(contract.Contract):
    backend = "reference"
    dtypes = (*contract.Contract.dtypes, torch.float64)
    several = 2100
    vocabularies = (*contract.Contract.vocabularies, 151_936)
    rows_are_alone = False  # PyTorch sums a row in another order where there are fewer rows


class TestReference(Reference, contract.Whole):
    @contract.each_loss()
    def test_a_teacher_in_float64(self, loss):
        case = self.rows((4,), 50, ignored=0)
        self.check(replace(case, teacher=case.teacher.double()), **loss)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made, but for views of those that are there."""

    def __init__(self, *there):
        super().__init__()
        self.there, self.elements = {one.untyped_storage().data_ptr() for one in there}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in self.there:
                self.elements = max(self.elements, one.numel())
        return made


@pytest.mark.parametrize(
    "mode", [{"mode": "sampled_token"}, {"mode": "full", "alpha": 0.5}, {"mode": "topk", "topk": 7}]
)
def test_blocks_of_rows_give_the_same_and_bound_the_memory(mode, monkeypatch):
    student, teacher = torch.randn(2, 24, 20_000)
    ids = torch.randint(20_000, (24,))

    def results():
        logits = student.clone().requires_grad_()
        out = fastsdpo.sdpo_loss(logits, teacher, ids, backend="reference", **mode)
        out.loss.backward()
        return [out.loss, out.per_token_loss, out.log_ratio, logits.grad]

    in_blocks = results()
    with torch.no_grad(), Largest(student, teacher) as largest:
        fastsdpo.sdpo_loss(student, teacher, ids, backend="reference", **mode)
    size = reference.CACHED * max(2, torch.get_num_threads())
    assert largest.elements <= size < student.numel() // 2
    monkeypatch.setattr(reference, "CACHED", student.numel())
    torch.testing.assert_close(in_blocks, results())
