"""The reference in eager PyTorch under the contract of all backends."""

import torch

from tests.ops import contract


class Reference(contract.Contract):
    backend = "reference"
    dtypes = (*contract.Contract.dtypes, torch.float64)
    several = 2100
    vocabularies = (*contract.Contract.vocabularies, 151_936)
    rows_are_alone = False  # PyTorch sums a row in another order where there are fewer rows


class TestValues(Reference, contract.Values):
    pass


class TestEdges(Reference, contract.Edges):
    pass


class TestLayouts(Reference, contract.Layouts):
    pass


class TestAutograd(Reference, contract.Autograd):
    pass


class TestLogProbs(Reference, contract.LogProbs):
    pass


class TestLinear(Reference, contract.Linear):
    pass
