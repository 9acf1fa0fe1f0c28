"""The native kernels' exp2, log2, tanh and dtype conversions, on every instruction set of this CPU."""

import math

import pytest
import torch
from torch import Tensor

from fastsdpo import _native
from tests.ops.test_native import isa as isa
from tests.ops.test_native import pytestmark as needs_native

pytestmark = [needs_native, pytest.mark.usefixtures("isa")]


def evaluate(function: int, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    assert _native.library().fastsdpo_math(function, x.data_ptr(), y.data_ptr(), x.numel()) == 0
    return y


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    codes = _native.DTYPES
    status = _native.library().fastsdpo_convert(x.data_ptr(), codes[x.dtype], y.data_ptr(), codes[dtype], x.numel())
    assert status == 0
    return y


def relative_error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).abs() / exact.abs()).max().item()


def test_exp2_accuracy():
    x = torch.linspace(-125.9, 126.9, 1_000_003)
    assert relative_error(evaluate(0, x), x.double().exp2()) < 2e-7


def test_exp2_special_values():
    payload = torch.tensor([0x7FC00001, -0x3FFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([0.0, -math.inf, -127.5, -3e38, math.nan, 1.0]), payload])
    y = evaluate(0, x)
    assert y[:4].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert y[5] == 2.0
    assert y[[4, 6, 7]].isnan().all()


def test_log2_accuracy_is_relative_near_one():
    x = torch.cat([torch.rand(400_000) * 2 + 1e-30, 1 + (torch.rand(400_001) - 0.5) * 1e-2])
    exact = x.double().log2()
    allowed = 2e-7 * torch.maximum(exact.abs(), (x.double() - 1).abs())
    assert ((evaluate(1, x).double() - exact).abs() <= allowed).all()
    assert evaluate(1, torch.ones(1)).item() == 0


def test_log2_of_a_ratio_is_relative_near_one():
    g = torch.Generator().manual_seed(0)
    b = torch.rand(400_000, generator=g) * 4.0 ** torch.randint(-40, 40, (400_000,), generator=g)
    near, far = (1 + (torch.rand(400_000, generator=g) - 0.5) * 1e-2, torch.randn(400_000, generator=g))
    for a in (b * near, b * (8 * far).exp2(), b * 1.4999, b * 0.6667, b):
        ratio = a.double() / b.double()
        exact = ratio.log2()
        allowed = 3e-7 * torch.maximum(exact.abs(), (ratio - 1).abs())
        got = b.clone()
        status = _native.library().fastsdpo_math(3, a.data_ptr(), got.data_ptr(), a.numel())
        assert status == 0
        assert ((got.double() - exact).abs() <= allowed).all()


def test_tanh_accuracy():
    x = torch.cat([torch.randn(300_000), torch.rand(300_001) * 24 - 12, torch.randn(1000) * 1e-5])
    x = x[x != 0]
    got = evaluate(2, x)
    assert relative_error(got, x.double().tanh()) < 4e-7
    assert relative_error(got[x.abs() < 1], x[x.abs() < 1].double().tanh()) < 2.5e-7
    assert got.abs().max() == 1
    edge = evaluate(2, torch.tensor([math.inf, -math.inf, 1e30, -1e30, 0.0, math.nan]))
    assert edge[:5].tolist() == [1, -1, 1, -1, 0]
    assert edge[5].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loads_are_exact(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = convert(every, torch.float32)
    assert (got.eq(every.float()) | (got.isnan() & every.isnan())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stores_round_to_nearest_even(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    # Around each representable value: itself, its neighbours, halves and their neighbours.
    offsets = torch.tensor([0, 1, -1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001])
    near = every.float().view(torch.int32)[:, None] + offsets.to(torch.int32)
    g = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (300_001,), generator=g).to(torch.int32)
    x = torch.cat([near.flatten(), anything]).view(torch.float32)
    got, expected = convert(x, dtype), x.to(dtype)
    same = got.view(torch.int16) == expected.view(torch.int16)
    assert (same | (got.isnan() & x.isnan())).all()
