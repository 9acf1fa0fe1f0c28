"""What a launch compiles: one variant for every T, temperature, alpha, stride; nothing chosen by timing."""

import os

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
KERNELS = ("statistics_kernel", "jsd_kernel", "finish_kernel", "topk_finish_kernel", "gradient_kernel")


def test_every_kernel_is_looked_at():
    from triton.runtime import JITFunction

    from fastsdpo.ops import _triton_kernels

    found = {
        name
        for name, value in vars(_triton_kernels).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert found == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_values_never_compile_another_variant(name):
    """The key of Triton's cache of compiled kernels, for other sizes, strides, temperatures, alphas."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from fastsdpo.ops import _triton_kernels

    kernel = getattr(_triton_kernels, name)
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    tensor = torch.zeros(64)

    def key(integer, real):
        given = {}
        for p in kernel.params:
            real_number = p.name in ("k", "cap", "inv_temperature", "alpha", "is_clip")
            given[p.name] = (
                1 if p.is_constexpr else tensor if p.name.endswith("_ptr") else real if real_number else integer
            )
        return binder(**given)[1]

    # 1 and multiples of 16 are what Triton makes variants of; a temperature of 1, alpha of 0 and 1.
    keys = [key(i, r) for i, r in ((1, 1.0), (16, 0.0), (151936, 1.4426950408889634), (7, 0.3))]
    assert all(k == keys[0] for k in keys)


def test_tiles_are_a_function_of_dtypes_and_places_alone():
    from fastsdpo.ops import _triton

    def logits(dtype, vocabulary=64, start=0, rows=3):
        return torch.zeros(start + rows * vocabulary, dtype=dtype)[start:].view(1, rows, vocabulary)

    def tile(*tensors):
        return {k: v for k, v in _triton.tile_of(*tensors).items() if k != "ALIGNED"}

    for dtype, accesses in ((torch.bfloat16, 8), (torch.float32, 4)):
        one = logits(dtype)
        assert _triton.tile_of(one)["VEC"] == accesses
        assert tile(one) == tile(logits(dtype, 151, start=1, rows=1))
        assert tile(one, None, one) == tile(one, one)
        assert _triton.PART % (_triton.tile_of(one)["N"] * accesses) == 0
    assert _triton.tile_of(logits(torch.bfloat16), logits(torch.float32))["VEC"] == 8


def test_which_rows_are_read_in_pieces_of_16_bytes():
    """Contiguous rows of any length; not those that start at different places of a piece."""
    from fastsdpo.ops._triton import same_phase

    for vocabulary in (64, 33):
        wide = torch.zeros(3, 5, vocabulary, dtype=torch.bfloat16)
        teacher = torch.zeros(3, 5, vocabulary)
        assert same_phase(wide)
        assert same_phase(wide, teacher)
        assert same_phase(wide[:, :-1], teacher[:, :-1])
        assert same_phase(wide[:1, :-1], torch.zeros(1, 4, vocabulary))
        assert not same_phase(wide[..., 1:])
        assert not same_phase(wide, torch.zeros(3, 5, vocabulary + 1)[..., :-1])
    assert not same_phase(torch.zeros(2, 5, 33)[:, :-1], torch.zeros(2, 4, 33))


@pytest.mark.parametrize("vocabulary", [1, 32761, 32762, 32768, 151936])
def test_the_parts_of_a_row_hold_it_wherever_it_starts(vocabulary):
    from fastsdpo.ops import _triton
    from fastsdpo.ops.rows import LossOptions, Tokens

    def parts(rows):
        logits = torch.empty(1, rows, vocabulary, device="meta")
        ids = torch.empty(rows, dtype=torch.int64, device="meta")
        return _triton.Call(logits, None, Tokens(ids, ids), LossOptions(), "token").parts

    assert parts(1) * _triton.PART >= vocabulary + 7 > (parts(1) - 1) * _triton.PART
    assert parts(1) == parts(5000)
